"""``secateur measure``."""

import argparse
from pathlib import Path

from secateur.cli.request import default_out, execute, table_of


def run(request: argparse.Namespace) -> int:
    """Measure a network against the dense one it came from."""
    step: dict = {"do": "measure"}
    if request.probe:
        step["probes"] = list(request.probe)
    if request.damage:
        step["damage"] = True
    if request.beside:
        step["beside"] = list(request.beside)
    if request.flatness:
        step["flatness"] = True
    return execute(request, table_of(request, [step]), Path(request.out or default_out(request.start, "measure")))
