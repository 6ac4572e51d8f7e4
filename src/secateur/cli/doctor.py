"""``secateur doctor``."""

import argparse
from pathlib import Path

from secateur.cli.request import dump
from secateur.engine.doctor import environment, examine


def run(request: argparse.Namespace) -> int:
    """Look at the machine, or at a file of weights; findings make exit code 2."""
    if request.path is None:
        facts = environment(request.data_dir)
        if request.json:
            dump(facts)
        else:
            for name, value in facts.items():
                print(f"{name:<14} {value}")
        return 0
    findings = examine(Path(request.path))
    if request.json:
        dump(findings)
    else:
        for row in findings["tensors"]:
            zeros = f"zeros {row['zeros']:>10,} of {row['numel']:>10,} ({row['share']:.2%})"
            print(f"{row['name']:<40} {row['shape']!s:<18} {zeros}")
        for finding in findings["findings"]:
            print(f"\n{finding['what']}\n  do: {finding['cure']}")
        if not findings["findings"]:
            print("\nnothing is wrong with it")
    return 2 if findings["findings"] else 0
