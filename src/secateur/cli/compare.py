"""``secateur compare``."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from secateur.cli.request import dump
from secateur.core.errors import UsageError
from secateur.engine.binding import set_option
from secateur.engine.comparing import Job
from secateur.engine.recipe import read_recipe
from secateur.report.comparing import compare, states
from secateur.report.text import show
from secateur.report.views.comparison import report

_TOP = ("model", "data", "compare", "train", "method")


def run(request: argparse.Namespace) -> int:
    """Run a comparison, and show its table."""
    path = Path(request.comparison)
    table = read_recipe(path)
    _settle(table, request.settings)
    out = Path(request.out or Path("runs") / path.stem)
    if request.dry_run:
        rows = states(table, out, request.data_dir)
        if request.json:
            dump({"runs": rows})
            return 0
        for row in rows:
            print(f"{row['state']:<10} {out / row['run']}")
        return 0
    address = None if request.ray is None else "" if request.ray == "local" else request.ray
    console = Console(stderr=True, quiet=request.json)
    found = compare(
        table, out, data_dir=request.data_dir, workers=request.workers, ray=address,
        told=lambda *told: console.print(_line(*told), highlight=False, markup=False, soft_wrap=True),
    )  # fmt: skip
    if request.json:
        dump(found)
        return 0
    console = Console()
    show(report(found, str(out)), console)
    console.print(f"\nfolder {out}   page {out / 'report.html'}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _line(job: Job, result: Mapping[str, Any], done: int, total: int) -> str:
    if "error" in result:
        return f"{done:>4}/{total} {job.name}: refused: {result['error']}"
    return f"{done:>4}/{total} {job.name}: accuracy {result['accuracy']:.2f} %, {result['seconds']:.1f} s"


def _settle(table: dict[str, Any], settings: list[str]) -> None:
    """Carry out ``-s a.b=value``.

    Raises:
        UsageError: when a setting has no value, or begins with none of the sections.
    """
    for setting in settings:
        path, sign, value = setting.partition("=")
        top = path.strip().split(".")
        if not sign or len(top) < 2 or top[0] not in _TOP:
            raise UsageError(
                f"`-s {setting}`: write `-s a.b=value`, beginning with {', '.join(_TOP)}, for example "
                "`-s compare.epochs=5`."
            )
        set_option(table, path.strip(), value.strip())
