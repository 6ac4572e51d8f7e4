"""Run folders written by hand with plain JSON, in the layout that the engine writes."""

import json
import math
from pathlib import Path

import pytest

MADE_BY = {
    "secateur": "0.1.0",
    "torch": "2.11.0",
    "python": "3.11.9",
    "system": "Linux-6.1-x86_64",
    "cpu": "Example CPU @ 3.0GHz",
    "cores": 8,
    "threads": 4,
    "gpu": None,
}
RECIPE = """secateur = "0.1"
seed = 0

[model]
use = "resnet20"

[data]
use = "cifar10"

[[step]]
do = "train"
epochs = 20

[[step]]
do = "prune"
to = "sparsity 0.9"

[[step]]
do = "train"
epochs = 10
lr = 0.02

[[step]]
do = "measure"
"""


def layer_table():
    """Shapes and MACs in the manner of a ResNet-20 for 32 x 32 images."""
    rows = [("stem.weight", [16, 3, 3, 3], 1024)]
    for stage, (width, places) in enumerate(((16, 1024), (32, 256), (64, 64)), 1):
        for block in range(1, 4):
            for conv in (1, 2):
                entering = width // 2 if stage > 1 and block == 1 and conv == 1 else width
                rows.append((f"stage{stage}.{block}.conv{conv}.weight", [width, entering, 3, 3], places))
    rows.append(("head.weight", [10, 64], 1))
    made = []
    for i, (name, shape, places) in enumerate(rows):
        weights = math.prod(shape)
        kept = max(1, round(weights * (0.6 if i == 0 else 0.35 / (1 + 0.18 * i))))
        made.append(
            {
                "name": name,
                "shape": shape,
                "weights": weights,
                "kept": kept,
                "sparsity": 1 - kept / weights,
                "macs": weights * places,
                "macs_effective": kept * places,
            }
        )
    return made


def reading(value, unit="", low=None, high=None, n=1, parts=None, note="", stderr=None):
    return {
        "value": value,
        "unit": unit,
        "stderr": stderr,
        "low": low,
        "high": high,
        "n": n,
        "parts": parts or {},
        "note": note,
    }


def verdict_table(layers):
    macs, effective = sum(r["macs"] for r in layers), sum(r["macs_effective"] for r in layers)
    packed = {"weights.safetensors": 1103456.0, "masks.safetensors": 34816.0}
    return {
        "dense": {
            "accuracy": reading(91.66, "%", 91.1, 92.19, 10000),
            "latency": reading(1.9312, "ms", 1.921, 1.945, 40),
            "cost": reading(macs, "MAC", parts={"macs_dense": macs, "macs_effective": macs, "params_kept": 269722}),
            "disk": reading(1103456.0, "B", parts={**packed, "weights compressed": 1020345.0}),
        },
        "pruned": {
            "accuracy": reading(91.05, "%", 90.47, 91.6, 10000),
            "latency": reading(1.9288, "ms", 1.917, 1.94, 40),
            "cost": reading(macs, "MAC", parts={"macs_dense": macs, "macs_effective": effective, "params_kept": 29928}),
            "disk": reading(1103456.0, "B", parts={**packed, "weights compressed": 187654.0}),
        },
        "change": {
            "accuracy": reading(-0.61, "%", -0.98, -0.24, 10000),
            "latency": reading(1.0012, "x", 0.9921, 1.0098, 40),
        },
        "baselines": {"random": reading(10.42, "%", 9.8, 11.03, 10000)},
        "layers": layers,
        "probes": {"hessian_trace": reading(1843.2, "", 1700.0, 1990.0, 30, note="Hutchinson's estimate")},
        "flatness": {
            "dense": {"noise 0.1": reading(0.012, "", 0.011, 0.013, 20, {"size": 0.1})},
            "pruned": {"noise 0.1": reading(0.034, "", 0.03, 0.038, 20, {"size": 0.1})},
        },
    }


def metrics(steps, epochs, start, end, accuracy, sparsity, kept):
    """Rows as the training loop writes them: every tenth step, and one an epoch."""
    rows, per = [], steps // epochs
    for step in range(10, steps + 1, 10):
        loss = end + (start - end) * math.exp(-4 * step / steps) * (1 + 0.1 * math.sin(step * 1.7))
        common = {"step": step, "epoch": (step - 1) // per + 1}
        state = {"kept": kept, "sparsity": sparsity}
        rows.append({**common, "train/loss": loss, "lr": 0.1 * (1 - step / steps), **state})
        if step % per == 0:
            share = step / steps
            a, t = accuracy[0] + (accuracy[1] - accuracy[0]) * share**0.3, loss * 1.2 + 0.05 * share
            rows.append({**common, "test/accuracy": a, "test/loss": t, **state, "seconds": step / 100})
    return rows


def write_json(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table), encoding="utf-8")


def write_metrics(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def net_card(do, key, layers, dense, accuracy, **more):
    counts = {r["name"]: [r["weights"] if dense else r["kept"], r["weights"]] for r in layers}
    kept, total = sum(c[0] for c in counts.values()), sum(c[1] for c in counts.values())
    return {
        "format": "secateur.card/1",
        "do": do,
        "key": key,
        "seed": 0,
        "kept": kept,
        "total": total,
        "sparsity": 1 - kept / total,
        "counts": counts,
        "seconds": 61.25,
        "left_alone": {"stem_norm.weight": "not a matrix or kernel", "stem_norm.bias": "not a matrix or kernel"},
        "readings": {"accuracy": reading(accuracy, "%", n=10000)},
        "made_by": MADE_BY,
        "files": {"weights.safetensors": "ab" * 32},
        **more,
    }


FORECAST = {
    "loss_before": 0.0421,
    "loss_after": 1.8342,
    "rise_forecast": 1.2034,
    "rise_measured": 1.7921,
    "slope": 0.0034,
    "curvature": 1.2,
}


def full_run(folder: Path, layers=None, kinds=("train", "prune", "train", "measure")):
    """A run of some steps; ``layers`` may bring names of their own."""
    layers = layers or layer_table()
    share = sum(r["kept"] for r in layers) / sum(r["weights"] for r in layers)
    rows, cut = [], False
    for number, do in enumerate(kinds, 1):
        key = f"{number}c1f00aa"
        name = f"{number}-{do}-{key}"
        rows.append({"number": number, "do": do, "key": key, "folder": name, "done": True})
        if do == "measure":
            write_json(folder / name / "verdict.json", verdict_table(layers))
            card = {"format": "secateur.card/1", "do": do, "key": key, "dense": "1-train", "pruned": "3-train"}
            write_json(folder / name / "card.json", {**card, "made_by": MADE_BY})
            continue
        cut = cut or do == "prune"
        more = {"forecast": FORECAST, "target": "sparsity 0.9"} if do == "prune" else {}
        accuracy = {"prune": 34.5, "train": 91.05 if cut else 91.66}[do]
        write_json(folder / name / "card.json", net_card(do, key, layers, not cut, accuracy, **more))
        (folder / name / "weights.safetensors").write_bytes(b"\0" * 1000)
        if do == "train":
            figures = (2000, 10, 0.9, 0.03, (85.0, 91.05)) if cut else (4000, 20, 2.3, 0.02, (45.0, 91.66))
            sparsity = 1 - share if cut else 0.0
            write_metrics(folder / name / "metrics.jsonl", metrics(*figures, sparsity, 1))
    about = {"format": "secateur.run/1", "title": "resnet20 on cifar10", "seed": 0}
    write_json(folder / "run.json", {**about, "steps": rows})
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return folder


@pytest.fixture
def layers():
    """Rows of the per-layer table, to be renamed or cut short."""
    return layer_table()


@pytest.fixture
def edit():
    """Changes a JSON file in place."""

    def change(path, **entries):
        write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **entries})

    return change


@pytest.fixture
def make_run(tmp_path):
    """Writes a run folder and returns its path."""

    def make(name="run", **options):
        return full_run(tmp_path / name, **options)

    return make
