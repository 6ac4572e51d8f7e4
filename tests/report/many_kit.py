"""Many finished run folders, written by hand, whose figures a test can know."""

import json
from pathlib import Path

from tests.report.conftest import full_run, write_json

METHODS = {"gradual": 91.0, "acdc": 90.0}
SPARSITIES = (0.8, 0.9, 0.95)
SEEDS = (0, 1)


def recipe(net, method, sparsity, seed):
    return f"""secateur = "0.1"
seed = {seed}

[model]
use = "{net}"

[data]
use = "cifar10"

[[step]]
do = "train"
epochs = 20

[[step]]
do = "train"
epochs = 10
rules = [{{ use = "{method}", sparsity = {sparsity} }}]

[[step]]
do = "measure"
"""


def accuracy_of(method, sparsity, seed):
    """What each run gets right, in per cent: two decimals, so that pages print it whole."""
    return round(METHODS[method] - 4 * (sparsity - 0.8) + 0.3 * seed, 2)


def write_run(folder, net="resnet20", method="gradual", sparsity=0.9, seed=0, params=270_000):
    """A run whose network keeps ``(1 - sparsity) * params`` parameters."""
    full_run(folder, kinds=("train", "train", "measure"))
    kept, accuracy = round((1 - sparsity) * params), accuracy_of(method, sparsity, seed)
    measure = next(folder.glob("3-measure-*"))
    verdict = json.loads((measure / "verdict.json").read_text())
    for side, left in (("dense", params), ("pruned", kept)):
        parts = {"params": params, "params_kept": left, "macs_dense": 40 * params, "macs_effective": 40 * left}
        verdict[side]["cost"]["parts"] = parts
    verdict["pruned"]["accuracy"] |= {"value": accuracy, "low": accuracy - 0.5, "high": accuracy + 0.5}
    verdict["change"]["accuracy"] |= {"value": accuracy - 91.66}
    verdict["pruned"]["latency"]["value"] = round(1 + kept / params, 4)
    verdict["pruned"]["disk"]["parts"]["weights compressed"] = 4.0 * kept
    write_json(measure / "verdict.json", verdict)
    net_folder = next(folder.glob("2-train-*"))
    card = json.loads((net_folder / "card.json").read_text())
    card["files"] = {"weights.safetensors": f"{net} {method} {sparsity} {seed}"}
    write_json(net_folder / "card.json", card)
    about = json.loads((folder / "run.json").read_text())
    write_json(folder / "run.json", {**about, "title": f"{net} on cifar10", "seed": seed})
    (folder / "recipe.toml").write_text(recipe(net, method, sparsity, seed), encoding="utf-8")
    return folder


def many_runs(root: Path):
    """Twelve runs of one network, and two of another."""
    made = [
        write_run(root / f"{method}-{sparsity}-{seed}", "resnet20", method, sparsity, seed)
        for method in METHODS
        for sparsity in SPARSITIES
        for seed in SEEDS
    ]
    return [*made, *(write_run(root / f"wide-{s}", "resnet56", "gradual", s, 0, 850_000) for s in (0.8, 0.9))]


def write_comparison(root: Path):
    """A comparison of one method and a dense network, two seeds each."""
    for seed in SEEDS:
        for method, sparsity, kept in (("dense", 0.0, 1000), ("snip", 0.9, 100), ("small-dense", 0.9, 101)):
            folder = root / f"{method}-{sparsity}-{seed}"
            full_run(folder, kinds=("train",))
            accuracy = 90.0 + seed if method == "dense" else 80.0 + 3 * seed
            params = kept if method == "small-dense" else 1000
            result = {
                "name": folder.name, "method": method, "sparsity": sparsity, "seed": seed, "epochs": 2, "keys": [],
                "accuracy": accuracy, "low": accuracy - 1, "high": accuracy + 1, "params": params, "params_kept": kept,
                "macs": 10 * kept, "bytes": 4 * params,
            }  # fmt: skip
            write_json(folder / "result.json", result)
            card_path = next(folder.glob("1-train-*")) / "card.json"
            card = json.loads(card_path.read_text())
            write_json(card_path, {**card, "files": {"weights.safetensors": folder.name}})
    return root
