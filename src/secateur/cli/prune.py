"""``secateur prune``."""

import argparse
import re
from pathlib import Path
from typing import Any

from secateur.cli.request import default_out, execute, table_of
from secateur.core.budget import Target, parse_target
from secateur.core.errors import UsageError
from secateur.core.patterns import NM, Pattern
from secateur.engine.binding import value_of
from secateur.engine.cutting import aim
from secateur.engine.planning.plan_files import read_plan_file

_OF_THE_RULE = ("criterion", "score", "allocation", "pattern", "schedule")


def run(request: argparse.Namespace) -> int:
    """Prune once, or gradually while training, and measure the result against the dense network."""
    if request.epochs < 0:
        raise UsageError(f"--epochs is {request.epochs}; it must be at least 0 (0 prunes once, without training).")
    if request.lr is not None and not request.epochs:
        raise UsageError("--lr has no effect when nothing is trained; add `--epochs N`, or leave it out.")
    if request.solver and request.epochs:
        raise UsageError("--solver prunes once, and --epochs step by step; leave one of the two out.")
    if request.inputs and not request.solver:
        raise UsageError("--inputs has no effect without a solver; add `--solver sparsegpt`, or leave it out.")
    if request.curvature and not request.solver:
        raise UsageError("--curvature has no effect without a solver; add `--solver exact_obs`, or leave it out.")
    if request.plan and request.epochs:
        raise UsageError("--plan prunes once, and --epochs step by step; leave one of the two out.")
    if request.plan and ":" not in f"{request.criterion}{request.solver}":  # a class of the user is found by the step
        read_plan_file(request.plan)  # a file that is no plan leaves no folder behind
    if request.to is not None:
        parse_target(request.to)
    given = {
        key: getattr(request, key) for key in ("criterion", "allocation", "pattern", "solver", "inputs", "curvature")
    }
    choices = {key: value for key, value in given.items() if value is not None}
    step: dict[str, Any] = {key: value for key in ("only", "skip", "plan") if (value := getattr(request, key))}
    if request.epochs:
        step |= {"do": "train", "epochs": request.epochs, "lr": 0.1 if request.lr is None else request.lr}
        step["rules"] = [{"use": "gradual", **choices}]
        request.settings = [f"rules.1.{s}" if re.split(r"[.=]", s)[0] in _OF_THE_RULE else s for s in request.settings]
    else:
        step |= {"do": "prune", **({} if request.to is None else {"to": request.to}), **choices}
    table = table_of(request, [step, {"do": "measure"}])
    target = _aim_rule(table["step"][0], request.to) if request.epochs else _aim(table["step"][0], None)[0]
    named = Path(request.plan).stem if request.plan else str(target)
    out = request.out or default_out(request.start, "prune", request.solver or request.criterion or "", named)
    return execute(request, table, Path(out))


def _aim(options: dict[str, Any], to: str | None) -> tuple[Target, Pattern]:
    """The target and the pattern of a step or a rule, with the settings of ``-s`` carried out."""
    to = options.get("to", to)
    pattern = value_of(Pattern, options.get("pattern", "unstructured"), "pattern")
    return aim(None if to is None else value_of(str, to, "to"), pattern)


def _aim_rule(step: dict[str, Any], to: str | None) -> Target:
    """Give gradual pruning the sparsity and the pattern that the target means, where ``-s`` has not set them."""
    rule = step["rules"][0] if isinstance(step.get("rules"), list) and step["rules"] else None
    if not isinstance(rule, dict) or rule.get("use") != "gradual":
        if to is not None:
            raise UsageError("--to has no effect when `-s rules=...` takes the place of gradual pruning; leave it out.")
        return parse_target("sparsity 0.9")
    if "sparsity" in rule and to is None:
        return Target("sparsity", float(value_of(float, rule["sparsity"], "sparsity")))
    target, pattern = _aim(rule, to)
    if target.kind not in ("nm", "sparsity", "params"):
        raise UsageError(
            f"the target {target} cannot be reached step by step; use `params 5%`, or leave `--epochs` out."
        )
    if isinstance(pattern, NM):
        rule["pattern"] = {"use": "nm", "n": pattern.n, "m": pattern.m}
        share = round(1 - pattern.n / pattern.m, 12)
    else:
        share = target.value if target.kind == "sparsity" else round(1 - target.value, 12)
    rule.setdefault("sparsity", share)
    return target
