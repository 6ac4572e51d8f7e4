"""LeNet-300-100 on MNIST over seeds: dense, 5 % and 2 % kept, and random pruning at 5 %, as a table.

Run `python scripts/mnist_results.py` from the project's root; finished runs are not repeated.
"""

from __future__ import annotations

import pathlib
import statistics
import sys

from secateur.core.files import read_json
from secateur.engine.recipe import Recipe, read_recipe
from secateur.engine.runner import Runner

ROOT = pathlib.Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
CASES = {
    "5 % kept": ("mnist-lenet-5pct", {}),
    "2 % kept": ("mnist-lenet-2pct", {}),
    "5 % kept, random scores": ("mnist-lenet-5pct", {"criterion": "random"}),
}


def accuracies(name: str, changes: dict[str, object], seed: int, data_dir: str | None) -> tuple[float, float]:
    """Dense and pruned test accuracy of one run."""
    table = read_recipe(ROOT / "recipes" / f"{name}.toml")
    table["seed"] = seed
    table["step"][1]["rules"][0].update(changes)
    out = ROOT / "runs" / f"{name}-{'-'.join(map(str, changes.values())) or 'magnitude'}-{seed}"
    Runner(Recipe.from_table(table), out, data_dir).run()
    steps = read_json(out / "run.json")["steps"]
    dense, pruned = (read_json(out / row["folder"] / "card.json")["readings"]["accuracy"]["value"] for row in steps[:2])
    return dense, pruned


def main() -> int:
    """Run what is missing and print the table."""
    data_dir = sys.argv[1] if len(sys.argv) > 1 else None
    print("| network | accuracy, mean of 3 seeds | standard deviation | seeds 0, 1, 2 |\n|---|---|---|---|")
    rows: dict[str, list[float]] = {"dense": []}
    for case, (name, changes) in CASES.items():
        found = [accuracies(name, changes, seed, data_dir) for seed in SEEDS]
        rows["dense"] = [dense for dense, _ in found]
        rows[case] = [pruned for _, pruned in found]
    for case, values in rows.items():
        each = ", ".join(f"{value:.2f}" for value in values)
        print(f"| {case} | {statistics.mean(values):.2f} % | {statistics.stdev(values):.2f} | {each} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
