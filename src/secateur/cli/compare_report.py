"""``secateur compare-report``."""

import argparse

from rich.console import Console

from secateur.cli.request import dump
from secateur.report.overlook import build, save
from secateur.report.text import show


def run(request: argparse.Namespace) -> int:
    """Write the page of many runs and show its figures."""
    made = build(request.folders)
    page = save(made, request.out)
    if request.json:
        dump(made.to_json())
        return 0
    console = Console()
    show(made, console)
    console.print(f"page {page}", soft_wrap=True, highlight=False, markup=False)
    return 0
