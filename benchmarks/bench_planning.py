"""How long planning takes once the cost table knows the layers: seconds by phase, of the wall and of the processors.

Run: ``python benchmarks/bench_planning.py [--net resnet50] [--size 224] [--examples 64] [--to "latency 0.5x"]
[--patterns unstructured] [--threads 2] [--write docs/results/plan.jsonl]``. A first run fills the table of
``$SECATEUR_CACHE`` (a folder of its own unless the variable is set); the second, in a process that has planned already,
is timed by phase; the third, in a new process, tells what a user waits for. Phases: ``costs`` (capture, and the calls
that bring remembered figures to the machine's pace), ``rises`` (the forecast of the loss), ``choosing`` (offers and the
best choice among them), ``measuring`` (files written, called, and the loss of the pruned copy) and ``rest``. A phase
within another counts as itself alone. Weights and examples are random; neither changes what planning has to do. On a
machine that does other things too, the wall says less than the processors.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.core.losses import CrossEntropy
from secateur.core.task import Task
from secateur.engine.folder import cpu_name
from secateur.engine.planning import planner
from secateur.engine.planning.choosing import Market
from secateur.engine.planning.plans import LayerPlan
from secateur.engine.planning.trying import Trial
from secateur.nets import build

PHASES = ("costs", "rises", "choosing", "measuring", "rest")


class Clock:
    """Seconds of the wall and of the processors by phase; the innermost open phase runs."""

    def __init__(self) -> None:
        self.wall = dict.fromkeys(PHASES, 0.0)
        self.cpu = dict.fromkeys(PHASES, 0.0)
        self._open = ["rest"]
        self._last = self._now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens meanwhile for a phase."""
        self.tick()
        self._open.append(name)
        try:
            yield
        finally:
            self.tick()
            self._open.pop()

    def tick(self) -> None:
        """Book the time since the last tick."""
        wall, cpu = self._now()
        self.wall[self._open[-1]] += wall - self._last[0]
        self.cpu[self._open[-1]] += cpu - self._last[1]
        self._last = wall, cpu

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


@contextmanager
def clocked(clock: Clock) -> Iterator[None]:
    """The parts of planning report to a clock until the end."""
    parts: list[tuple[Any, str, str]] = [
        (planner, "network_cost", "costs"), (planner, "loss_rises", "rises"), (Market, "best", "choosing"),
        (Market, "cheapest", "choosing"), (Market, "uniform", "choosing"), (Market, "least", "choosing"),
    ]  # fmt: skip
    parts += [(planner, "captured_of", "costs"), (planner, "masks_of", "measuring"), (Task, "mean_loss", "measuring")]
    parts += [(Trial, name, "measuring") for name in ("prune", "loss", "accuracy", "bytes", "ms", "share")]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in parts]
    for owner, name, phase in parts:
        setattr(owner, name, counted(getattr(owner, name), clock, phase))
    try:
        yield
    finally:
        for owner, name, own in kept:
            setattr(owner, name, own)


def counted(own: Callable[..., Any], clock: Clock, phase: str) -> Callable[..., Any]:
    """A function that reports to a clock."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with clock.phase(phase):
            return own(*args, **kwargs)

    return call


def task_of(net: str, size: int, examples: int) -> Task:
    """A network with random weights, and random images in batches of 32."""
    torch.manual_seed(0)
    model = build(net).eval()
    x = torch.randn(examples, 3, size, size)
    with torch.no_grad():
        y: Tensor = torch.cat([model(part).argmax(1) for part in x.split(32)])
    return Task(model, CrossEntropy(), list(zip(x.split(32), y.split(32), strict=True)))


def timed(task: Task, to: str, how: planner.Planning) -> tuple[LayerPlan, Clock]:
    """One plan, and what its phases took."""
    clock = Clock()
    with clocked(clock):
        plan = planner.plan_network(task, to, how)
    clock.tick()
    return plan, clock


def in_a_new_process(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of one plan where nothing is imported, compiled or remembered but the table."""
    own = ["--net", options.net, "--size", options.size, "--examples", options.examples, "--to", options.to]
    own += ["--threads", options.threads, "--patterns", *options.patterns, "--once"]
    done = subprocess.run([sys.executable, __file__, *map(str, own)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(
    options: argparse.Namespace, plan: LayerPlan, clock: Clock, first: Clock, fresh: dict[str, float]
) -> dict[str, Any]:
    """What is written."""
    ms, parts = plan.figures["ms"], {"wall": clock.wall, "cpu": clock.cpu}
    return {
        "part": "planning", "net": options.net, "size": options.size, "to": options.to, "patterns": options.patterns,
        "threads": options.threads, "examples": options.examples, "batch": 1,
        **{f"{kind}_s": round(sum(by.values()), 2) for kind, by in parts.items()},
        **{f"{name}_{kind}_s": round(by[name], 2) for name in PHASES for kind, by in parts.items()},
        **fresh,
        "first_wall_s": round(sum(first.wall.values()), 2), "first_cpu_s": round(sum(first.cpu.values()), 2),
        "before_ms": ms.before, "forecast_ms": ms.forecast, "measured_ms": ms.measured,
        "isa": plan.machine.get("isa"), "machine": cpu_name(),
    }  # fmt: skip


def asked() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--to", default="latency 0.5x")
    parser.add_argument("--patterns", nargs="+", default=["unstructured"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", type=Path, help="where the profile of the second run goes")
    parser.add_argument("--once", action="store_true", help="one plan with what is remembered; its seconds as JSON")
    parser.add_argument("--write", type=Path)
    return parser.parse_args()


def main() -> None:
    """Plan twice, and once more in a new process, and say what the second and the third took."""
    options = asked()
    torch.set_num_threads(options.threads)
    task = task_of(options.net, options.size, options.examples)
    how = planner.Planning(tuple(options.patterns), threads=options.threads)
    if options.once:
        _, clock = timed(task, options.to, how)
        seconds = {"wall": sum(clock.wall.values()), "cpu": sum(clock.cpu.values())}
        print(json.dumps({f"fresh_{kind}_s": round(value, 2) for kind, value in seconds.items()}))
        return
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        os.environ.setdefault("SECATEUR_CACHE", folder)
        _, first = timed(task, options.to, how)
        print(
            f"the first run: {sum(first.wall.values()):.1f} s, processors {sum(first.cpu.values()):.1f} s", flush=True
        )
        if options.profile:
            import cProfile

            with cProfile.Profile() as profile:
                plan, clock = timed(task, options.to, how)
            profile.dump_stats(options.profile)
        else:
            plan, clock = timed(task, options.to, how)
        fresh = in_a_new_process(options)
    for name in PHASES:
        print(f"{name:<10} {clock.wall[name]:6.1f} s   processors {clock.cpu[name]:6.1f} s")
    print(f"a new process: {fresh['fresh_wall_s']:.1f} s, processors {fresh['fresh_cpu_s']:.1f} s")
    found = row(options, plan, clock, first, fresh)
    print(json.dumps(found))
    if options.write:
        with open(options.write, "a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
