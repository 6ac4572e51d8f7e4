"""``secateur train``."""

import argparse
from pathlib import Path

from secateur.cli.request import default_out, execute, table_of
from secateur.core.errors import UsageError


def run(request: argparse.Namespace) -> int:
    """Train from scratch, or go on from a folder with its zeros held."""
    step: dict = {"do": "train"}
    for key in ("epochs", "lr"):
        if getattr(request, key) is not None:
            step[key] = getattr(request, key)
    if request.rule:
        step["rules"] = list(request.rule)
    if not request.start and not request.net:
        raise UsageError("no network is named; pass `--net NAME` (for example lenet_300_100) or a run folder.")
    steps = [step, {"do": "measure"}] if request.start else [step]
    table = table_of(request, steps)
    name = f"{request.net}-{table['data'].get('use', 'data')}".replace(":", ".").replace("/", ".")
    out = request.out or (default_out(request.start, "train") if request.start else Path("runs") / name)
    return execute(request, table, Path(out))
