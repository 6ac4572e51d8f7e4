"""``secateur shrink``."""

import argparse
from pathlib import Path
from typing import Any

from secateur.cli.request import default_out, execute, table_of
from secateur.core.errors import UsageError
from secateur.engine.binding import value_of
from secateur.surgery.choosing import parse_goal

_CHOICES = ("to", "criterion", "granularity", "scope", "minimum", "multiple", "rounds")


def run(request: argparse.Namespace) -> int:
    """Remove units, train the smaller network if asked to, and measure it against the dense one."""
    if request.epochs < 0:
        raise UsageError(f"--epochs is {request.epochs}; it must be at least 0 (0 removes units and trains nothing).")
    if request.lr is not None and not request.epochs:
        raise UsageError("--lr has no effect when nothing is trained; add `--epochs N`, or leave it out.")
    step: dict[str, Any] = {key: value for key in _CHOICES if (value := getattr(request, key)) is not None}
    step |= {key: value for key in ("only", "skip", "equal") if (value := getattr(request, key))}
    if isinstance(step.get("minimum"), float) and step["minimum"].is_integer():
        step["minimum"] = int(step["minimum"])
    if request.inexact:
        step["inexact"] = True
    steps = [{"do": "shrink", **step}]
    if request.epochs:
        steps.append({"do": "train", "epochs": request.epochs, "lr": 0.1 if request.lr is None else request.lr})
    table = table_of(request, [*steps, {"do": "measure"}])
    goal = parse_goal(value_of(str, table["step"][0].get("to", "macs 0.5x"), "to"))
    out = request.out or default_out(request.start, "shrink", request.criterion or "", str(goal))
    return execute(request, table, Path(out))
