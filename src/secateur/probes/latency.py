"""Latency: milliseconds of a call, and of two networks measured in turn."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.reading import Paper, Reading
from secateur.core.sockets import Probe
from secateur.core.streams import stream
from secateur.core.task import Task, call, device_of, frozen, to
from secateur.probes._statistics import bootstrap, median_interval
from secateur.probes._still import check_whole, first_examples, unchanged


@dataclass(frozen=True)
class Latency(Probe):
    """Median milliseconds of a forward pass in evaluation mode, without gradients.

    The input is the first ``batch`` examples of the data (over and over when the first batch holds fewer), already
    on the network's device; the device is waited for before and after each call. ``low..high`` is the pair of
    order statistics that holds the median with 95 % whatever the distribution (the range below six rounds).
    Parts: ``p10`` and ``p90`` in milliseconds, ``threads`` and ``batch``. Zeros make dense kernels no faster, and
    wrappers such as ``torch.compile`` are looked through: time a compiled network with :func:`compare`.

    Args:
        batch: examples a call.
        rounds: calls that count.
        warmup: calls before that.
        threads: threads of torch while it is measured; as they are by default, and as they were afterwards.

    Raises:
        UsageError: when one of them is below 1 (``warmup``: below 0).
        DataError: when the data is empty or spent.

    Cost: ``warmup + rounds`` forward passes of ``batch`` examples.
    """

    batch: int = 1
    rounds: int = 30
    warmup: int = 5
    threads: int | None = None

    paper = Paper(
        "What is the State of Neural Network Pruning?",
        "Blalock, Gonzalez Ortiz, Frankle, Guttag",
        2020,
        "arXiv:2003.03033",
        differs="reports p10, p90 and an interval of the median where the paper asks for quartiles",
    )
    needs = frozenset({"clock"})

    def __post_init__(self) -> None:
        _check(self.rounds, self.warmup, self.threads)
        check_whole("batch", self.batch)

    def __call__(self, task: Task, masks: Masks | None = None) -> Reading:
        """Milliseconds of a call."""
        with unchanged():
            inputs = first_examples(task, self.batch)
            with frozen(task.model), _threads(self.threads) as threads:
                times = _in_turn({"": lambda: call(task.model, inputs)}, self.rounds, self.warmup)[""]
        return _reading(times, threads, self.batch)


def compare(
    candidates: Mapping[str, Callable[[], object]], rounds: int = 30, warmup: int = 5, threads: int | None = None
) -> dict[str, Reading]:
    """Median milliseconds of several calls, taken in turn in one process.

    Every round calls each candidate once, beginning with another one each time, so that heat and neighbours
    weigh on all alike. Gradient mode is as the caller set it.

    Args:
        candidates: what to call, by name.
        rounds: calls of each that count.
        warmup: calls of each before that.
        threads: threads of torch while it is measured; as they are by default.

    Raises:
        UsageError: for no candidate, ``rounds`` or ``threads`` below 1, or ``warmup`` below 0.

    Cost: ``warmup + rounds`` calls of each.
    """
    _check(rounds, warmup, threads)
    if not candidates:
        raise UsageError('there is nothing to compare; pass `{"name": function}`.')
    with _threads(threads) as count:
        times = _in_turn(candidates, rounds, warmup)
    return {name: _reading(found, count) for name, found in times.items()}


def dense_and_pruned(
    dense: nn.Module,
    pruned: nn.Module,
    example: Any,
    rounds: int = 30,
    warmup: int = 5,
    threads: int | None = None,
) -> tuple[Reading, Reading, Reading]:
    """Milliseconds of two networks on the same inputs, taken in turn, and how many times as fast the second is.

    Args:
        dense: the network to compare with.
        pruned: the other one.
        example: inputs of one batch, as a task's data gives them; moved to each network's device beforehand.
        rounds: calls of each that count.
        warmup: calls of each before that.
        threads: threads of torch while it is measured; as they are by default.

    Returns:
        Readings of the dense and of the pruned network, and the ratio of their medians (dense / pruned, above 1
        when the pruned one is faster) with a seeded bootstrap over rounds, both times of a round together.

    Raises:
        UsageError: for ``rounds`` or ``threads`` below 1, or ``warmup`` below 0.

    Cost: ``warmup + rounds`` forward passes of each.
    """
    _check(rounds, warmup, threads)
    pair = {"dense": dense, "pruned": pruned}
    with unchanged(), frozen(dense), frozen(pruned), _threads(threads) as count:
        calls = {name: _caller(net, to(example, device_of(net))) for name, net in pair.items()}
        times = _in_turn(calls, rounds, warmup)
    slow, fast = times["dense"], times["pruned"]
    return _reading(slow, count), _reading(fast, count), _ratio(slow, fast)


def in_turn(
    dense: nn.Module,
    other: Callable[[], object],
    example: Any,
    rounds: int = 100,
    warmup: int = 10,
    threads: int | None = None,
) -> tuple[Reading, Reading, Reading]:
    """Milliseconds of a network in torch and of any other way to compute it, taken in turn, and their ratio.

    Args:
        dense: the network, timed in evaluation mode.
        other: what to call beside it.
        example: inputs of one batch for ``dense``.
        rounds: calls of each that count.
        warmup: calls of each before that.
        threads: threads of torch while it is measured; ``other`` brings its own.

    Returns:
        Readings of both, and the ratio of their medians (dense / other) with its interval.

    Raises:
        UsageError: for ``rounds`` or ``threads`` below 1, or ``warmup`` below 0.

    Cost: ``warmup + rounds`` calls of each.
    """
    _check(rounds, warmup, threads)
    with unchanged(), frozen(dense), _threads(threads) as count:
        times = _in_turn({"dense": _caller(dense, to(example, device_of(dense))), "other": other}, rounds, warmup)
    slow, fast = times["dense"], times["other"]
    return _reading(slow, count), _reading(fast, count), _ratio(slow, fast)


def _caller(net: nn.Module, inputs: Any) -> Callable[[], object]:
    return lambda: call(net, inputs)


def _ratio(slow: list[float], fast: list[float]) -> Reading:
    pair = torch.tensor([slow, fast], dtype=torch.float64)

    def estimate(weights: Tensor) -> float:
        drawn = pair.repeat_interleave(weights.long(), dim=1)
        top, bottom = drawn.quantile(0.5, dim=1).tolist()
        return top / bottom

    value = estimate(torch.ones(len(slow)))
    spread = bootstrap(estimate, value, len(slow), stream(0, "latency", "bootstrap"))
    note = "dense / pruned, medians of calls taken in turn" + ("" if spread else "; one round gives no interval")
    return Reading(value, "x", *(spread or (None, None, None)), n=len(slow), note=note)


def _in_turn(candidates: Mapping[str, Callable[[], object]], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Milliseconds of each call, without the garbage collector's pauses."""
    names, times = list(candidates), {name: [] for name in candidates}
    collecting = gc.isenabled()
    for name in names * warmup:
        candidates[name]()
    _wait()
    gc.disable()
    try:
        for turn in range(rounds):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                begin = time.perf_counter_ns()
                candidates[name]()
                _wait()
                times[name].append((time.perf_counter_ns() - begin) / 1e6)
    finally:
        if collecting:
            gc.enable()
    return times


def _wait() -> None:
    """Until the accelerator, if there is one, has done what it was told."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _reading(times: list[float], threads: int, batch: int | None = None) -> Reading:
    p10, median, p90 = torch.tensor(times, dtype=torch.float64).quantile(_POINTS).tolist()
    low, high = median_interval(times)
    parts = {"p10": p10, "p90": p90, "threads": float(threads)} | ({} if batch is None else {"batch": float(batch)})
    note = "" if len(times) > 5 else f"{len(times)} rounds are too few for a 95 % interval: it is their range"
    return Reading(median, "ms", low=low, high=high, n=len(times), parts=parts, note=note)


_POINTS = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[int]:
    """Torch's threads set to ``count``, and put back; yields how many there are."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _check(rounds: int, warmup: int, threads: int | None) -> None:
    check_whole("rounds", rounds)
    if threads is not None:
        check_whole("threads", threads)
    if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
        raise UsageError(f"warmup={warmup!r} must be a whole number of at least 0; write `warmup = 5`.")
