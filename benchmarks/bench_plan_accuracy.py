"""Accuracy at equal measured time: a plan layer by layer beside one pattern at one density everywhere.

Run: ``python benchmarks/bench_plan_accuracy.py runs/plan-dense-? --ratio 0.4 --epochs 2 --write
docs/results/plan.jsonl`` from the project's root; every folder is a run of
``recipes/dense-resnet20-cifar10.toml`` with a seed of its own. The mixed plan is made for ``ratio`` of the dense
network's time. Every other candidate then gets the highest density whose plan file is no slower than the mixed one's,
both files taken in turn. All are fine-tuned in the same way with the same seed, written, and timed once more in turn
with each other and the dense network. Runs that are in the file already are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timing
import torch
from torch import nn

import secateur
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.patterns import parse_pattern
from secateur.core.prunable import coverage
from secateur.core.task import Task
from secateur.data import Dataset, Loader, load
from secateur.engine.folder import Artefact
from secateur.engine.planning.planner import Planning, plan_network
from secateur.engine.planning.trying import arrays_of, write_plan
from secateur.probes.accuracy import Accuracy
from secateur.runtime.session import Session

MIXED = "mixed plan"
UNIFORM = ("unstructured", "4x1", "2:4")
GLOBAL = "unstructured, one threshold"
TUNING: dict[str, Any] = {
    "lr": 0.1, "nesterov": True, "weight_decay": 5e-4, "schedule": "one-cycle", "amp": True, "channels_last": True,
}  # fmt: skip


class Net:
    """A trained network and its data."""

    def __init__(self, folder: Path, data: Dataset, seed: int, batch: int) -> None:
        self.dense, self.data, self.seed = Artefact.open(folder).build().eval(), data, seed
        self.example = torch.randn(batch, *data.input_shape, generator=torch.Generator().manual_seed(0))

    def sample(self, model: nn.Module, count: int = 1024) -> Task:
        """Some training examples without augmentation."""
        order = torch.randperm(len(self.data.train), generator=torch.Generator().manual_seed(self.seed))[:count]
        split = self.data.train.take(order)
        return Task(model, CrossEntropy(), Loader(split, 256, mean=self.data.mean, std=self.data.std))

    def accuracy(self, model: nn.Module) -> dict[str, Any]:
        """On all test images."""
        loader = Loader(self.data.test, 500, mean=self.data.mean, std=self.data.std)
        return Accuracy()(Task(model.eval(), CrossEntropy(), loader)).to_json()

    def tuned(self, masks: Masks, epochs: int) -> nn.Module:
        """A copy with these zeros, trained on."""
        net = copy.deepcopy(self.dense)
        masks.apply_(net)
        batches = Loader(
            self.data.train, 128, shuffle=True, seed=self.seed, augment="crop-flip", mean=self.data.mean,
            std=self.data.std,
        )  # fmt: skip
        kept = secateur.train(net, batches, masks=masks, epochs=epochs, seed=self.seed, **TUNING)
        kept.check(net)
        return net.eval()


def times_as_long(files: Sequence[Path], example: torch.Tensor, rounds: int) -> list[float]:
    """What each plan file takes over the first one: medians of rounds in turn, one thread, processor time."""
    arrays = arrays_of(example)
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(Session(file, threads=1)) for file in files]

        def call(session: Session) -> Callable[[], object]:
            return lambda: [session(*arrays) for _ in range(8)]

        calls = {str(i): call(session) for i, session in enumerate(sessions)}
        times = timing.measure(calls, rounds, clock=time.process_time)
    return [timing.ratio(times, str(i), "0") for i in range(len(files))]


def uniform(model: nn.Module, word: str, density: float) -> Masks:
    """One pattern at one density in every tensor that can take it."""
    pattern, found = parse_pattern(word), {}
    for name, weight in coverage(model).prunable.items():
        shape = tuple(weight.shape)
        if pattern.why_not(shape):
            found[name] = torch.ones(shape, dtype=torch.bool)
            continue
        fixed, units = pattern.fixed(shape), pattern.units(shape)
        keep = fixed if fixed is not None else max(1, round(density * units))
        found[name] = pattern.mask(weight.detach().abs(), keep)
    return Masks(found)


def one_threshold(model: nn.Module, density: float) -> Masks:
    """The largest weights of the whole network."""
    weights = coverage(model).prunable
    scores = torch.cat([w.detach().abs().flatten() for w in weights.values()])
    keep = max(1, round(density * len(scores)))
    cut = scores.kthvalue(len(scores) - keep + 1).values
    return Masks({name: w.detach().abs() >= cut for name, w in weights.items()})


def as_fast(net: Net, make: Callable[[float], Masks], mixed: Path, folder: Path, rounds: int) -> tuple[Masks, float]:
    """The masks of highest density whose file is no slower than the mixed plan's, and their share of its time."""
    low, high = 0.004, 1.0
    best: tuple[Masks, float] | None = None
    for _ in range(9):
        middle = (low * high) ** 0.5
        masks = make(middle)
        share = times_as_long([mixed, written(net, masks, folder / "try.safetensors")], net.example, rounds)[1]
        if share <= 1.005:
            low, best = middle, (masks, share)
        else:
            high = middle
    if best is None:
        masks = make(low)
        return masks, times_as_long([mixed, written(net, masks, folder / "try.safetensors")], net.example, rounds)[1]
    return best


def written(net: Net, masks: Masks, path: Path) -> Path:
    model = copy.deepcopy(net.dense)
    masks.apply_(model)
    write_plan(model, net.example, path)
    return path


def candidates(net: Net, ratio: float, folder: Path, rounds: int) -> dict[str, tuple[Masks, dict[str, Any]]]:
    """Masks of every candidate, and what is to be told of them."""
    how = Planning(patterns=UNIFORM, example=net.example, threads=1, seed=net.seed)
    plan = plan_network(net.sample(net.dense), f"latency {ratio}x", how)
    print(plan, flush=True)
    copied = copy.deepcopy(net.dense)
    masks = secateur.prune(net.sample(copied), plan).masks
    mixed = written(net, masks, folder / "mixed.safetensors")
    taken: dict[str, int] = {}
    for layer in plan.layers:
        taken[layer.pattern or "as it is"] = taken.get(layer.pattern or "as it is", 0) + 1
    made: dict[str, tuple[Masks, dict[str, Any]]] = {MIXED: (masks, {"layers": taken, "target": str(plan.target)})}
    ways: dict[str, Callable[[float], Masks]] = {
        **{f"{word}, everywhere": (lambda d, w=word: uniform(net.dense, w, d)) for word in UNIFORM},
        GLOBAL: lambda d: one_threshold(net.dense, d),
    }
    for name, make in ways.items():
        masks, share = as_fast(net, make, mixed, folder, rounds)
        print(f"{name}: keeps {masks.kept:,} of {masks.total:,}, {share:.3f} of the mixed plan's time", flush=True)
        if share > 1.03:
            made[name] = (masks, {"slower": share})
            continue
        made[name] = (masks, {})
    return made


def seed_of(folder: Path) -> int:
    return int(json.loads(next(folder.glob("1-train-*/card.json")).read_text())["seed"])


def one(folder: Path, args: argparse.Namespace, data: Dataset) -> None:
    """All candidates of one dense network."""
    done = [json.loads(line) for line in args.write.read_text().splitlines()] if args.write.exists() else []
    if any(row.get("run") == folder.name and row["ratio"] == args.ratio for row in done):
        return print(f"{folder.name}: done before")
    net = Net(folder, data, seed_of(folder), args.batch)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        files = [written(net, uniform(net.dense, "unstructured", 1.0), Path(place) / "dense.safetensors")]
        for name, (masks, about) in candidates(net, args.ratio, Path(place), args.rounds).items():
            row = {
                "part": "accuracy",
                "run": folder.name,
                "seed": net.seed,
                "ratio": args.ratio,
                "batch": args.batch,
                "name": name,
            }
            row |= {"kept": masks.kept, "total": masks.total, "epochs": args.epochs, **about}
            if "slower" not in about:
                tuned = net.tuned(masks, args.epochs)
                row["accuracy"] = net.accuracy(tuned)
                row["file"] = len(files)
                files.append(Path(place) / f"{len(files)}.safetensors")
                write_plan(tuned, net.example, files[-1])
                print(f"{name}: {row['accuracy']['value']:.2f} %", flush=True)
            rows.append(row)
        shares = times_as_long(files, net.example, 5 * args.rounds)
    before = net.accuracy(net.dense)["value"]
    with args.write.open("a") as file:
        for row in rows:
            share = shares[row.pop("file")] if "file" in row else None
            file.write(json.dumps({**row, "share": share, "dense": before, **timing.machine()}) + "\n")
    return None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--ratio", type=float, default=0.4, help="of the dense network's milliseconds")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning")
    parser.add_argument("--rounds", type=int, default=100, help="of timing")
    parser.add_argument("--write", type=Path, required=True, metavar="JSONL")
    args = parser.parse_args(argv)
    data = load("cifar10")
    torch.set_num_threads(1)
    for folder in args.folders:
        one(folder, args, data)


if __name__ == "__main__":
    main()
