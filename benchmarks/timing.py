"""Fair timing for all benchmarks: candidates in turn, medians, ratios of neighbours, one JSON line a result."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from secateur.engine.folder import cpu_name

RESULTS = Path(__file__).with_name("results.jsonl")

Times = dict[str, list[float]]
"""Seconds of every round, by candidate; round ``i`` of all candidates ran one after another."""


def measure(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int = 30,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Seconds of every round of each callable, taken in turn so that a noisy machine is fair to all.

    Every other round runs in reverse, so that no candidate always follows the same one. Work queued on an
    accelerator is waited for. ``clock`` is wall time by default; ``time.process_time`` counts the CPU alone, which
    is steadier on a shared machine and fair only when all candidates use one thread.
    """
    times: Times = {name: [] for name in candidates}
    order = list(candidates.items())
    for i in range(rounds + warmup):
        for name, run in order if i % 2 else reversed(order):
            _wait()
            begin = clock()
            run()
            _wait()
            if i >= warmup:
                times[name].append(clock() - begin)
    return times


def compare(candidates: Mapping[str, Callable[[], object]], rounds: int = 30, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each callable; see :func:`measure`."""
    return medians(measure(candidates, rounds, warmup))


def medians(times: Times) -> dict[str, float]:
    """Median seconds of each candidate."""
    return {name: statistics.median(taken) for name, taken in times.items()}


def ratio(times: Times, one: str, other: str) -> float:
    """Median over the rounds of ``one / other``: what a neighbour slows down it slows down for both."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def machine() -> dict[str, object]:
    """What a result depends on: commit, CPU, accelerator, threads, versions, date."""
    return {
        "commit": _commit(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def record(benchmark: str, results: Mapping[str, object], path: Path = RESULTS) -> None:
    """Append one JSON line: the benchmark, its figures, and the machine they were taken on."""
    line = {"benchmark": benchmark, **results, **machine()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _commit() -> str:
    def git(*words: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False).stdout.strip()

    try:
        commit = git("rev-parse", "--verify", "--short=12", "HEAD")
        return (commit or "none") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except OSError:
        return "none"
