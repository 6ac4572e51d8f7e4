"""``secateur run``."""

import argparse
from pathlib import Path

from secateur.cli.request import execute, settle
from secateur.core.errors import UsageError
from secateur.engine.recipe import read_recipe


def run(request: argparse.Namespace) -> int:
    """Run a recipe."""
    path = Path(request.recipe)
    table = read_recipe(path)
    if "compare" in table:
        raise UsageError(f"{path} compares methods; run it with `secateur compare {path}`.")
    for setting in request.settings:
        if setting.split(".")[0].split("=")[0] not in ("model", "data", "step", "seed"):
            raise UsageError(
                f"`-s {setting}`: in a recipe, begin with model, data, seed or step.N, for example `step.1.lr=0.05`."
            )
    settle(table, request.settings)
    request.out = request.out or str(Path("runs") / path.stem)
    return execute(request, table, Path(request.out))
