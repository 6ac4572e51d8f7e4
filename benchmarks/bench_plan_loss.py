"""The forecast of the rise of the loss against the truth: random plans of five networks.

Run: ``python benchmarks/bench_plan_loss.py --data-dir FOLDER [--net resnet20 ...] [--plans 50] [--quick]
[--write docs/results/plan.jsonl]``. Each network is trained first (a few minutes on one core for the three small ones,
a few hundred steps for the two large ones, which are far from done then) and kept in ``$SECATEUR_CACHE``. The forecast
comes from 512 training examples. Then plans are drawn: each layer gets one of the patterns and a density, log-uniform
down to a limit that differs from plan to plan, and one in four stays as it is. The loss is measured under each plan,
on the examples of the forecast and on test examples. The forecast should lie within a factor 3 of the measured rise in
nine of ten plans whose rise is below 0.5. A rise that its examples do not tell from nothing (two standard errors) is
only asked to be forecast small: below three times what it may be. Rows that are in the file already are not measured
again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.losses import CrossEntropy
from secateur.core.names import parameters
from secateur.core.patterns import parse_pattern
from secateur.core.prunable import coverage
from secateur.core.streams import seeded, stream
from secateur.core.task import Task
from secateur.data import Dataset, Loader, load
from secateur.engine.planning.rises import Rises, loss_rises, masks_for
from secateur.nets import build

PATTERNS = ("unstructured", "4x1", "2:4")
FACTOR, HIGHEST, SHARE = 3.0, 0.5, 0.9
EXAMPLES, HELD_OUT = 512, 1000
Chosen = dict[str, tuple[str, float]]


@dataclass(frozen=True)
class Case:
    """A network and how it is trained, briefly."""

    net: str
    data: str
    steps: int
    rate: float
    options: dict[str, Any] = field(default_factory=dict)
    data_options: dict[str, Any] = field(default_factory=dict)
    augment: str = "none"
    adam: bool = False


CASES = {
    "resnet20": Case("resnet20", "cifar10", 1500, 0.15, augment="crop-flip"),
    "mobilenet": Case("mobilenet_v1", "cifar10", 1200, 0.1, {"width": 0.5}, augment="crop-flip"),
    "mlp": Case("mlp", "mnist", 1500, 0.1, {"widths": (1024, 1024)}),
    "resnet50": Case("resnet50", "cifar10", 500, 1e-3, augment="crop-flip", adam=True),  # SGD takes longer to begin
    "bert": Case(
        "bert_tiny", "nettalk", 400, 0.02, {"vocab": 27, "dim": 768, "depth": 4, "heads": 12, "dropout": 0.0},
        {"tokens": True, "test_words": 2000},
    ),
}  # fmt: skip


def trained(name: str, case: Case, data: Dataset, folder: Path) -> nn.Module:
    """The network of a case, from the folder if it has been trained before."""
    with seeded(0, "bench_plan_loss", name):
        net = build(case.net, data.input_shape, data.outputs, **case.options)
    file = folder / f"{name}-{case.steps}.pt"
    if file.is_file():
        net.load_state_dict(torch.load(file, weights_only=True))
        return net.eval()
    began = time.perf_counter()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), case.rate, momentum=0.9, weight_decay=5e-4)
    if case.adam:
        optimizer = torch.optim.AdamW(net.parameters(), case.rate, weight_decay=0.05)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, case.rate, case.steps)
    loader = Loader(data.train, 64, shuffle=True, augment=case.augment, mean=data.mean, std=data.std, drop_last=True)
    loss = torch.zeros(())
    for _, (x, y) in zip(range(case.steps), _forever(loader), strict=False):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        rates.step()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), file)
    print(f"{name}: trained to {loss.item():.3f} in {time.perf_counter() - began:.0f} s", flush=True)
    return net.eval()


def _forever(loader: Loader) -> Iterator[Any]:
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def sample(data: Dataset, part: str, count: int) -> Loader:
    """Some examples of a part of the data, drawn once."""
    split = data.train if part == "train" else data.test
    order = torch.randperm(len(split), generator=stream(0, "bench_plan_loss", part))[:count]
    return Loader(split.take(order), 64, mean=data.mean, std=data.std)


def random_choices(weights: dict[str, Tensor], count: int, seed: int = 0) -> list[Chosen]:
    """Plans from gentle to harsh; a plan that prunes nothing is drawn again."""
    random, plans = stream(seed, "bench_plan_loss", "plans"), list[Chosen]()
    while len(plans) < count:
        harsh = math.exp(math.log(0.03) + float(torch.rand((), generator=random)) * math.log(0.8 / 0.03))
        chosen: Chosen = {}
        for name, weight in weights.items():
            left, which, group, far = torch.rand(4, generator=random).tolist()
            fits = [p for p in PATTERNS if not parse_pattern(p).why_not(tuple(weight.shape))]
            pattern = fits[int(which * len(fits))]
            if pattern == "2:4" and group > 1.5 * harsh:  # half of the weights at once: not in a gentle plan
                pattern = "unstructured"
            if left > 0.25:
                chosen[name] = (pattern, 0.5 if pattern == "2:4" else math.exp(math.log(0.02) * harsh * far))
        if chosen:
            plans.append(chosen)
    return plans


@torch.no_grad()
def losses(net: nn.Module, loader: Loader) -> Tensor:
    """The loss of every example."""
    return torch.cat([F.cross_entropy(net(x), y, reduction="none").double() for x, y in loader])


def rises_under(task: Task, chosen: Chosen, parts: dict[str, tuple[Loader, Tensor]]) -> dict[str, float]:
    """Measured rise on each part and its standard error; the network is put back."""
    masks, own = masks_for(task, chosen), parameters(task.model)
    kept = {name: own[name].detach().clone() for name in masks}
    found = {}
    try:
        masks.apply_(task.model)
        for part, (loader, before) in parts.items():
            rise = losses(task.model, loader) - before
            found |= {part: float(rise.mean()), f"{part}_error": float(rise.std()) / math.sqrt(len(rise))}
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                own[name].copy_(weight)
    return found


def hit(row: dict[str, Any], part: str) -> bool | None:
    """Whether a forecast is good; None where the rise is not to be judged."""
    rise, error = row[part], row[f"{part}_error"]
    if rise >= HIGHEST:
        return None
    if rise <= 2 * error:
        return bool(row["forecast"] <= FACTOR * (max(rise, 0.0) + 2 * error))
    return bool(rise / FACTOR <= row["forecast"] <= rise * FACTOR)


def summary(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """The share of good forecasts, of all that are judged and of the rises that are clear."""
    lines = []
    for part, what in (("same", "on its own examples"), ("held_out", "on test examples")):
        judged = [row for row in rows if hit(row, part) is not None]
        clear = [row for row in judged if row[part] > 2 * row[f"{part}_error"]]
        good, sure = (sum(bool(hit(row, part)) for row in some) for some in (judged, clear))
        inside = sum(row["low"] <= row[part] <= row["high"] for row in clear)
        share = good / max(1, len(judged))
        verdict = "held" if share >= SHARE else "MISSED"
        lines.append(
            f"{name:10s} {what:20s} {good} of {len(judged)} within a factor {FACTOR:g} ({share:.0%}, {verdict}); of "
            f"{len(clear)} clear ones {sure}, {inside} inside the interval"
        )
    return "\n".join(lines)


def known_rows(path: Path | None, name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the file about this network."""
    if path is None or not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    steps = CASES[name].steps
    about = {"part": "loss", "net": name, "seed": args.seed, "plans": args.plan_seed, "steps": steps}
    return [row for row in rows if all(row.get(key) == value for key, value in about.items())]


def forecast(task: Task, names: Sequence[str], seed: int) -> tuple[Rises, float]:
    """The forecast and the seconds it takes."""
    began = time.perf_counter()
    made = loss_rises(task, names, PATTERNS, seed=seed)
    return made, time.perf_counter() - began


def run(name: str, args: argparse.Namespace) -> None:
    """Training, forecast and plans of one network."""
    rows = known_rows(args.write, name, args)
    missing = [number for number in range(args.plans) if number not in {row["plan"] for row in rows}]
    if missing:
        case = CASES[name]
        data = load(case.data, args.data_dir, **case.data_options)
        net = trained(name, case, data, args.nets)
        parts = {"same": sample(data, "train", EXAMPLES), "held_out": sample(data, "test", HELD_OUT)}
        task = Task(net, CrossEntropy(), list(parts["same"]))
        prunable = coverage(net).prunable
        made, seconds = forecast(task, list(prunable), args.seed)
        print(f"{name}: forecast in {seconds:.1f} s from {made.examples[0]} examples, the law from "
              f"{len(made.probes)} choices on {made.examples[1]}", flush=True)  # fmt: skip
        plans = random_choices(dict(prunable), args.plans, args.plan_seed)
        before = {part: (loader, losses(net, loader)) for part, loader in parts.items()}
        for number in missing:
            told = made.total(plans[number])
            row = {
                "part": "loss", "net": name, "plan": number, "seed": args.seed, "plans": args.plan_seed,
                "steps": case.steps, "forecast": told.value, "low": told.low, "high": told.high,
                "share": made.share(plans[number]),
                **rises_under(task, plans[number], before), "layers": len(plans[number]), "seconds": seconds,
                "loss": float(before["same"][1].mean()), "loss_held_out": float(before["held_out"][1].mean()),
                "examples": list(made.examples),
            }  # fmt: skip
            rows.append(row)
            if args.write:
                with open(args.write, "a") as file:
                    file.write(json.dumps(row) + "\n")
            if args.verbose:
                print(f"  {number:3d} {row['forecast']:8.4f} ({row['low']:.4f} to {row['high']:.4f})  "
                      f"{row['same']:8.4f} ± {row['same_error']:.4f}  {row['held_out']:8.4f} ± "
                      f"{row['held_out_error']:.4f}", flush=True)  # fmt: skip
    print(summary(name, rows), flush=True)


def main() -> None:
    """Run the networks asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--net", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--plans", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the forecast")
    parser.add_argument("--plan-seed", type=int, default=1, help="of the plans; the method was made while looking at 0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-dir", default=os.environ.get("SECATEUR_DATA"))
    home = Path(os.environ.get("SECATEUR_CACHE") or Path.home() / ".cache" / "secateur")
    parser.add_argument("--nets", type=Path, default=home / "bench_plan", help="folder of the trained networks")
    parser.add_argument("--quick", action="store_true", help="ten plans")
    parser.add_argument("--write", type=Path, metavar="FILE", help="append rows as JSON lines; rows there are kept")
    parser.add_argument("--verbose", action="store_true", help="a line a plan")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        args.plans = 10
    for name in args.net:
        run(name, args)


if __name__ == "__main__":
    main()
