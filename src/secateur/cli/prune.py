"""``secateur prune``."""

import argparse
import re
from pathlib import Path
from typing import Any

from secateur.cli.request import default_out, execute, table_of
from secateur.core.budget import Target, parse_target
from secateur.core.errors import UsageError

_OF_THE_RULE = ("criterion", "score", "allocation", "pattern", "schedule")


def run(request: argparse.Namespace) -> int:
    """Prune once, or gradually while training, and measure the result against the dense network."""
    target = parse_target(request.to or "sparsity 0.9")
    choices = {key: getattr(request, key) for key in ("criterion", "allocation", "pattern") if getattr(request, key)}
    step: dict[str, Any] = {"only": request.only, "skip": request.skip}
    step = {key: value for key, value in step.items() if value}
    if request.epochs < 0:
        raise UsageError(f"--epochs is {request.epochs}; it must be at least 0 (0 prunes once, without training).")
    if request.epochs:
        step |= {"do": "train", "epochs": request.epochs, "lr": request.lr or 0.1}
        step["rules"] = [{"use": "gradual", **_gradual(target), **choices}]
        request.settings = [f"rules.1.{s}" if re.split(r"[.=]", s)[0] in _OF_THE_RULE else s for s in request.settings]
    else:
        step |= {"do": "prune", "to": str(request.to or "sparsity 0.9"), **choices}
    table = table_of(request, [step, {"do": "measure"}])
    out = request.out or default_out(request.start, "prune", request.criterion or "", str(target))
    return execute(request, table, Path(out))


def _gradual(target: Target) -> dict[str, Any]:
    """The options of gradual pruning that a target means."""
    if target.kind == "nm":
        return {"pattern": {"use": "nm", "n": int(target.value), "m": target.m}}
    if target.kind in ("sparsity", "params"):
        return {"sparsity": target.value if target.kind == "sparsity" else round(1 - target.value, 12)}
    raise UsageError(f"the target {target} cannot be reached step by step; use `params 5%`, or leave `--epochs` out.")
