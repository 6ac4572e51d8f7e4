"""LeNet-300-100 on MNIST over seeds: dense, 5 % and 2 % kept, and random pruning at 5 %, as a table.

Run `python scripts/mnist_results.py DATA_FOLDER` from the project's root; finished runs are not repeated.

Intervals are 95 % and have two parts, added in quadrature: Student's t over the seeds (two degrees of freedom), and the
sampling error of the test examples, which all seeds share and which therefore does not shrink with more of them
(binomial for an accuracy, that of the paired example-wise difference for a difference).
"""

from __future__ import annotations

import math
import pathlib
import statistics
import sys
from collections.abc import Sequence

from secateur.core.files import read_json
from secateur.engine.recipe import Recipe, read_recipe
from secateur.engine.runner import Runner

ROOT = pathlib.Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
STUDENT = {2: 4.303}
"""The 97.5 % point of Student's t by degrees of freedom."""
NORMAL = 1.960
CASES = {
    "5 % kept": ("mnist-lenet-5pct", {}),
    "2 % kept": ("mnist-lenet-2pct", {}),
    "5 % kept, random scores": ("mnist-lenet-5pct", {"criterion": "random"}),
}


def verdict(name: str, changes: dict[str, object], seed: int, data_dir: str | None) -> dict[str, dict]:
    """The verdict of one run: readings of the dense network, of the pruned one, and of their difference."""
    table = read_recipe(ROOT / "recipes" / f"{name}.toml")
    table["seed"] = seed
    table["step"][1]["rules"][0].update(changes)
    out = ROOT / "runs" / f"{name}-{'-'.join(map(str, changes.values())) or 'magnitude'}-{seed}"
    Runner(Recipe.from_table(table), out, data_dir).run()
    last = read_json(out / "run.json")["steps"][-1]
    return read_json(out / last["folder"] / "verdict.json")


def half_width(values: Sequence[float], errors: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean over seeds, given each seed's standard error over the test examples.

    >>> round(half_width([98.53, 98.53, 98.33], [0.12, 0.12, 0.13]), 2)
    0.38
    """
    over_seeds = STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return math.hypot(over_seeds, NORMAL * statistics.mean(errors))


def row(case: str, readings: Sequence[dict], sign: str = "") -> str:
    """One line of the table."""
    values = [reading["value"] for reading in readings]
    mean, half = statistics.mean(values), half_width(values, [reading["stderr"] for reading in readings])
    each = ", ".join(f"{value:{sign}.2f}" for value in values)
    spread = f"{mean - half:{sign}.2f} to {min(mean + half, 100.0):{sign}.2f}"
    return f"| {case} | {mean:{sign}.2f} | {spread} | {statistics.stdev(values):.2f} | {each} |"


def main() -> int:
    """Run what is missing and print the table."""
    data_dir = sys.argv[1] if len(sys.argv) > 1 else None
    found = {
        case: [verdict(name, changes, seed, data_dir) for seed in SEEDS] for case, (name, changes) in CASES.items()
    }
    print("| network | accuracy, mean of 3 seeds | 95 % interval | standard deviation | seeds 0, 1, 2 |")
    print("|---|---|---|---|---|")
    print(row("dense", [run["dense"]["accuracy"] for run in next(iter(found.values()))]))
    for case, runs in found.items():
        print(row(case, [run["pruned"]["accuracy"] for run in runs]))
    for case, runs in found.items():
        print(row(f"{case}, less dense", [run["change"]["accuracy"] for run in runs], "+"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
