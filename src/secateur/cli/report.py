"""``secateur report``."""

import argparse
from pathlib import Path

from rich.console import Console

from secateur.cli.request import dump
from secateur.core.files import read_json
from secateur.report import show, write


def run(request: argparse.Namespace) -> int:
    """Write the page and show the verdict."""
    folder = Path(request.folder)
    page = write(folder, Path(request.out) if request.out else None)
    if request.json:
        dump(read_json(page.with_suffix(".json")))
        return 0
    console = Console()
    show(folder, console)
    console.print(f"page {page}", soft_wrap=True, highlight=False)
    return 0
