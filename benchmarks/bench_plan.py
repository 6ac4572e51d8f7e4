"""The forecast of milliseconds against the clock: random plans of five networks.

Run: ``python benchmarks/bench_plan.py [--net resnet20 ...] [--plans 50] [--batch 1] [--threads 1] [--quick]
[--write docs/results/plan.jsonl]``. The cost of each network is measured first (or read from the table of
``$SECATEUR_CACHE``). Then plans are drawn: each layer gets one of the patterns and a density between 0.005 and 1,
log-uniform, and one in five stays as it is. A plan is written to disk, opened as a fresh session and timed in turn with
the network as it is; the lower quartile of its calls counts. Calls during which another process was given the
processor do not count; with one thread such a call is told by the processor's own time. The forecast should lie within
20 % of it in nine of ten plans. Two figures are given: as the clock said, and at the pace that the machine had when the
cost was measured, told by the network as it is. Rows that are in the file already, of the same core, are not measured
again. The zeros are random, and so are the weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.engine.planning.clocks import clocked, steady
from secateur.engine.planning.costs import NetworkCost, network_cost, random_plans
from secateur.engine.planning.table import Machine
from secateur.engine.planning.variants import Variants
from secateur.nets import build
from secateur.runtime.session import Session

PATTERNS = ("unstructured", "4x1", "2:4")
WITHIN, SHARE = 0.2, 0.9
Made = tuple[nn.Module, Tensor]


def bert(batch: int, layers: int) -> Made:
    """An encoder of BERT-base's widths over 128 tokens."""
    net = build("bert_tiny", None, None, vocab=1000, length=128, dim=768, depth=layers, heads=12)
    return net, torch.randint(0, 1000, (batch, 128))


def images(name: str, size: int) -> Callable[[int, int], Made]:
    """A network of secateur.nets on images."""
    return lambda batch, layers: (build(name), torch.randn(batch, 3, size, size))


NETS: dict[str, Callable[[int, int], Made]] = {
    "resnet20": images("resnet20", 32),
    "mlp": lambda batch, layers: (build("mlp", (784,), 10, widths=(1024, 1024)), torch.randn(batch, 784)),
    "mobilenet": images("mobilenet_v1", 224),
    "resnet50": images("resnet50", 224),
    "bert": bert,
}


def made(name: str, batch: int, layers: int) -> Made:
    """A network in evaluation mode whose normalisations are not trivial, and one batch."""
    torch.manual_seed(0)
    net, example = NETS[name](batch, layers)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.weight, 0.5, 1.5), (module.running_var, 0.5, 1.5)):
                tensor.data.uniform_(low, high)
            module.bias.data.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
    return net.eval(), example


def quartile(times: Sequence[float]) -> float:
    """What a call takes when nothing else runs."""
    return float(np.percentile(times, 25))


def turn(session: Session, arrays: Sequence[np.ndarray], threads: int, least: int = 1) -> list[tuple[float, bool]]:
    """Some calls after one that warms the caches, more of short ones: milliseconds, and whether one was disturbed."""
    calls: list[tuple[float, bool]] = []
    session(*arrays)
    while len(calls) < least or sum(ms for ms, _ in calls) < 3.0 and len(calls) < 30:
        calls.append(clocked(lambda: session(*arrays), threads))
    return calls


def plan_rows(
    name: str, cost: NetworkCost, variants: Variants, numbers: Sequence[int], rounds: int
) -> Iterator[dict[str, Any]]:
    """One row a plan."""
    plans = random_plans(cost, max(numbers) + 1)
    with variants.as_it_is() as base:
        for number in numbers:
            with variants.session(plans[number], number) as session:
                mine: list[tuple[float, bool]] = []
                theirs: list[tuple[float, bool]] = []
                for _ in range(rounds):
                    theirs += turn(base, variants.arrays, cost.threads)
                    mine += turn(session, variants.arrays, cost.threads, least=2)
            ms, reference = quartile(steady(mine)), quartile(steady(theirs))
            kept = [density for _, density in plans[number].values()]
            yield {
                "part": "ms", "net": name, "plan": number, "threads": cost.threads, "batch": cost.batch,
                "forecast": cost.total(plans[number]), "measured": ms, "reference": reference, "now": cost.now,
                "error": cost.error, "layers": len(kept), "density": float(np.mean(kept)), "isa": cost.isa,
            }  # fmt: skip


def summary(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """The share of plans within a fifth, and how far off the forecasts are."""
    raw = np.array([row["forecast"] / row["measured"] - 1 for row in rows])
    paced = np.array([row["forecast"] / row["measured"] * row["reference"] / row["now"] - 1 for row in rows])
    lines = []
    for what, errors in (("as the clock said", raw), ("at one pace", paced)):
        share = float(np.mean(np.abs(errors) <= WITHIN))
        verdict = "held" if share >= SHARE else "MISSED"
        low, middle, high = np.percentile(errors, (5, 50, 95))
        lines.append(f"{name:10s} {len(rows):3d} plans {what:17s} {share:6.1%} within 20 % ({verdict}); error median "
                     f"{middle:+.1%}, 5 to 95 %: {low:+.1%} to {high:+.1%}")  # fmt: skip
    return "\n".join(lines)


def known_rows(path: Path | None, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the file that were measured under the same conditions."""
    if path is None or not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [row for row in rows if all(row.get(key) == value for key, value in about.items())]


def run(name: str, args: argparse.Namespace) -> None:
    """Cost, plans and summary of one network."""
    began = time.perf_counter()
    net, example = made(name, args.batch, args.layers)
    cost = network_cost(net, example, threads=args.threads, patterns=PATTERNS, cache=args.cache)
    print(f"{name}: {cost.now:.3f} ms as it is, fixed {cost.fixed:.3f}, factor {cost.factor:.3f}, error stated "
          f"{cost.error:.1%}, cost in {time.perf_counter() - began:.1f} s", flush=True)  # fmt: skip
    machine = Machine.here(cost.isa, cost.threads)
    about = {"part": "ms", "net": name, "threads": cost.threads, "batch": cost.batch, "machine": str(machine)}
    rows = known_rows(args.write, about)
    done = {row["plan"] for row in rows}
    numbers = [number for number in range(args.plans) if number not in done]
    if numbers:
        variants = Variants(net, example, args.threads)
        for row in plan_rows(name, cost, variants, numbers, args.rounds):
            rows.append({**row, "machine": str(machine)})
            if args.write:
                with open(args.write, "a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
            if args.verbose:
                print(f"  {row['plan']:3d} {row['forecast']:9.4f} {row['measured']:9.4f} ms "
                      f"{row['forecast'] / row['measured'] - 1:+.1%} pace {row['reference'] / row['now']:.2f} "
                      f"density {row['density']:.2f}", flush=True)  # fmt: skip
        variants.close()
    print(summary(name, rows), f"  {time.perf_counter() - began:.0f} s", flush=True)


def main() -> None:
    """Run the networks asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--net", nargs="*", choices=list(NETS), default=list(NETS))
    parser.add_argument("--plans", type=int, default=50)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4, help="of the encoder")
    parser.add_argument("--rounds", type=int, default=6, help="turns of a plan and the network as it is")
    parser.add_argument("--quick", action="store_true", help="ten plans, three rounds")
    parser.add_argument("--cache", type=Path, help="folder of the table of costs")
    parser.add_argument("--write", type=Path, metavar="FILE", help="append rows as JSON lines; rows there are kept")
    parser.add_argument("--verbose", action="store_true", help="a line a plan")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        args.plans, args.rounds = 10, 3
    for name in args.net:
        run(name, args)


if __name__ == "__main__":
    main()
