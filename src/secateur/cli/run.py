"""``secateur run``."""

import argparse
from pathlib import Path
from typing import Any

from secateur.cli.request import execute, settle
from secateur.core.errors import UsageError
from secateur.engine.recipe import Recipe, read_recipe

_QUEUE = {"workers": 1, "lease": 60.0, "status": False, "retry": False}
"""Flags that mean something with ``--queue`` only, and their defaults."""


def run(request: argparse.Namespace) -> int:
    """Run a recipe, or work on a queue of them."""
    if request.queue is not None:
        from secateur.cli import queueing

        names = queueing.named(request.recipe)
        tables = [_table(Path(place), request.settings) for place in request.recipe]
        return queueing.run(
            request, {name: Recipe.from_table(table) for name, table in zip(names, tables, strict=True)}
        )
    for flag, usual in _QUEUE.items():
        if getattr(request, flag) != usual:
            raise UsageError(f"--{flag} is for queues; name the queue's folder with `--queue FOLDER`.")
    if len(request.recipe) != 1:
        told = f"{len(request.recipe)} recipes are named" if request.recipe else "no recipe is named"
        raise UsageError(f"{told}; name one, or several with `--queue FOLDER`. See `secateur run --help`.")
    path = Path(request.recipe[0])
    table = _table(path, request.settings)
    request.out = request.out or str(Path("runs") / path.stem)
    return execute(request, table, Path(request.out))


def _table(path: Path, settings: list[str]) -> dict[str, Any]:
    table = read_recipe(path)
    if "compare" in table:
        raise UsageError(f"{path} compares methods; run it with `secateur compare {path}`.")
    for setting in settings:
        if setting.split(".")[0].split("=")[0] not in ("model", "data", "step", "seed"):
            raise UsageError(
                f"`-s {setting}`: in a recipe, begin with model, data, seed or step.N, for example `step.1.lr=0.05`."
            )
    settle(table, settings)
    return table
