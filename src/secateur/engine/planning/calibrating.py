"""Fills the table of costs: networks given by name or folder, or a base set whose shapes many networks share."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from secateur import _native
from secateur.core.errors import SecateurError, UsageError, nearest
from secateur.core.patterns import parse_pattern
from secateur.core.streams import seeded, stream
from secateur.engine.planning import checking, measuring
from secateur.engine.planning.costs import NetworkCost
from secateur.engine.planning.energy import joules, why_no_energy
from secateur.engine.planning.engines import ENGINES, as_it_is, places
from secateur.engine.planning.shapes import held_out
from secateur.engine.planning.table import CostTable, Machine
from secateur.engine.planning.variants import Variants
from secateur.nets import build

__all__ = ["BASE", "Calibration", "Subject", "base_set", "calibrate", "status"]

SECONDS = 8.0  # of the clock for one network of the base set
PATTERNS = ("unstructured", "4x1", "2:4")


@dataclass(frozen=True)
class Subject:
    """A network to measure.

    Attributes:
        name: As it is reported.
        make: Gives the network and one batch of so many examples.
    """

    name: str
    make: Callable[[int], tuple[nn.Module, Any]]


@dataclass
class Calibration:
    """What a calibration did.

    Attributes:
        path: The file of the table.
        rows: One a network and batch: name, batch, threads, isa, ms, error, measured (figures), seconds, and engines
            (label to milliseconds of the network as it is).
        error: Relative error that nine of ten figures stay within when a shape is forecast from the others.
        median: That half of them stay within.
        shapes: How many shapes that was tried on.
        stopped: Whether it was ended early.
        notes: What a user may want to know.
    """

    path: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: float | None = None
    median: float | None = None
    shapes: int = 0
    stopped: bool = False
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


def _images(size: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, 3, size, size, generator=stream(0, "calibrate"))


def _tokens(length: int, vocab: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randint(0, vocab, (batch, length), generator=stream(0, "calibrate"))


def _numbers(width: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, width, generator=stream(0, "calibrate"))


BASE: dict[str, tuple[str, dict[str, Any], Callable[[int], Tensor]]] = {
    "resnet20 at 32 px": ("resnet20", {}, _images(32)),
    "mlp 784-300-100-10": ("mlp", {"inputs": 784, "outputs": 10, "widths": (300, 100)}, _numbers(784)),
    "mlp 784-1024-1024-10": ("mlp", {"inputs": 784, "outputs": 10, "widths": (1024, 1024)}, _numbers(784)),
    "mobilenet_v2 at 96 px": ("mobilenet_v2", {}, _images(96)),
    "resnet50 at 64 px": ("resnet50", {"width": 32}, _images(64)),
    "vit_tiny at 32 px": ("vit_tiny", {"depth": 2}, _images(32)),
    "bert of width 256": (
        "bert_tiny", {"vocab": 1000, "length": 64, "dim": 256, "depth": 1, "heads": 4}, _tokens(64, 1000),
    ),
    "lstm of width 128": ("lstm", {"vocab": 100, "hidden": 128}, _tokens(32, 100)),
}  # fmt: skip
"""Networks whose layers are measured when none is named: kind, options and input."""


def base_set() -> list[Subject]:
    """The networks that are measured when none is named."""

    def subject(name: str) -> Subject:
        kind, options, example = BASE[name]

        def make(batch: int) -> tuple[nn.Module, Any]:
            with seeded(0, "calibrate", kind):
                return build(kind, None, None, **options).eval(), example(batch)

        return Subject(name, make)

    return [subject(name) for name in BASE]


def calibrate(
    subjects: Sequence[Subject],
    batches: Sequence[int] = (1,),
    threads: int | None = None,
    patterns: Sequence[str] = PATTERNS,
    cache: str | PathLike[str] | None = None,
    again: bool = False,
    seconds: float | None = None,
    say: Callable[[str], None] = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
    others: Sequence[str] = (),
) -> Calibration:
    """Measure what the table lacks of some networks; each network is saved when it is done.

    Args:
        subjects: The networks.
        batches: Examples in a call: each is measured by itself.
        threads: Of the compiled core; None takes one for each core that this process may use.
        patterns: In words.
        cache: Folder of the table.
        again: Measure anew what is known of these networks under these patterns; all else stays, and what is known is
            replaced when it is measured.
        seconds: Of the clock for one network, at most about; None takes eight.
        say: Told what is being done.
        stop: Asked now and then whether to end with what is measured.
        others: Further engines that the networks are timed in as they are: ``torch``, on the CPU and on a CUDA device
            where there is one, and ``onnxruntime``. One that cannot run a network is told in the notes.

    Raises:
        UsageError: a pattern or engine that is not understood, or no compiled core.
        CaptureError: a network cannot be captured.

    Cost: about ``seconds`` and the packing of twenty versions for each network and batch.
    """
    if _native.library() is None:
        raise UsageError(f"there is nothing to measure: {_native.why_not()}. Install a wheel with the compiled core.")
    words = tuple(dict.fromkeys(str(parse_pattern(word)) for word in patterns))
    seconds = SECONDS if seconds is None else seconds
    table = CostTable.open(cache)
    found = Calibration(str(table.path), notes=[table.note] if table.note else [])
    machine = None
    if wrong := next((name for name in others if name not in ENGINES[1:]), ""):
        raise UsageError(f"no engine is called {wrong!r}. {nearest(wrong, ENGINES)}")
    for subject in subjects:
        for batch in batches:
            if stop():
                found.stopped = True
                break
            net, example = subject.make(batch)
            say(f"{subject.name}, batch {batch} ...")
            began = time.perf_counter()
            cost = measuring.forecast(net, example, threads, words, True, cache, seconds, say, stop, again=again)
            machine = Machine.here(cost.isa, cost.threads)
            times = {} if stop() else _others(others, subject.name, net, example, cost, cache, again, found.notes)
            found.rows.append({**_row(subject.name, cost, time.perf_counter() - began), "engines": times})
            found.notes += [f"{subject.name}: {name}: {why}" for name, why in cost.left.items()]
            unsaved = [note for note in cost.notes if note.startswith(measuring.UNSAVED)]
            found.notes += [note for note in unsaved if note not in found.notes]
    if machine is not None:
        held = held_out(CostTable.open(cache), machine)
        found.shapes = held.shapes
        if not math.isnan(held.error):
            found.error, found.median = held.error, held.median
    if subjects and not found.stopped:
        found.notes.append(_energy(subjects[0], batches[0], threads))
    if "torch" in others and not torch.cuda.is_available():
        found.notes.append("torch on CUDA: not measured, there is none here")
    return found


def status(cache: str | PathLike[str] | None = None) -> dict[str, Any]:
    """What the table holds, machine by machine.

    Args:
        cache: Folder of the table.
    """
    table = CostTable.open(cache)
    rows = []
    for name in sorted({*table.points, *table.checks}):
        points = table.points.get(name, {})
        figures = sum(len(rungs) for by in points.values() for rungs in by.values())
        errors = [checking.off(pair) for pairs in table.checks.get(name, {}).values() for pair in pairs]
        within = checking.bound(errors) if errors else None
        patterns = sorted({pattern for by in points.values() for pattern in by if pattern != measuring.DENSE})
        rows.append({"machine": name, "layers": len(points), "figures": figures, "patterns": patterns,
                     "checks": len(errors), "error": within})  # fmt: skip
    engines = {name: len(networks) for name, networks in table.engines.items()}
    return {"path": str(table.path), "note": table.note, "machines": rows, "engines": engines}


def _others(
    others: Sequence[str], name: str, net: nn.Module, example: Any, cost: NetworkCost,
    cache: str | PathLike[str] | None, again: bool, notes: list[str],
) -> dict[str, float]:  # fmt: skip
    """What the network takes in other engines, as it is: measured, or remembered; why not, in the notes."""
    table, found = CostTable.open(cache), dict[str, float]()
    for engine in others:
        where = places(engine, cost.threads)
        if not where:
            notes.append(f"{engine}: not measured, it is not installed: `pip install 'secateur[bench]'`")
        for label, (key, device) in where.items():
            known = table.engines.get(key, {}).get(cost.network)
            try:
                found[label] = known if known and not again else as_it_is(engine, net, example, cost.threads, device)
            except (SecateurError, RuntimeError, ValueError, TypeError) as error:  # what exporting and CUDA raise
                notes.append(f"{name}: {label}: not measured: {(str(error).splitlines() or ['it failed'])[0]}")
            else:
                table.engine(key, cost.network, found[label])
    with contextlib.suppress(SecateurError):  # the cost has told that the folder cannot be written
        table.save()
    return found


def _row(name: str, cost: NetworkCost, seconds: float) -> dict[str, Any]:
    return {
        "name": name, "batch": cost.batch, "threads": cost.threads, "isa": cost.isa, "ms": cost.now,
        "error": cost.error, "layers": len(cost.layers), "measured": cost.measured, "seconds": seconds,
    }  # fmt: skip


def _energy(subject: Subject, batch: int, threads: int | None) -> str:
    if why := why_no_energy():
        return f"energy: {why}"
    net, example = subject.make(batch)
    variants = Variants(net, example, threads)
    try:
        with variants.as_it_is() as session:
            reading = joules(lambda: session(*variants.arrays))
    finally:
        variants.close()
    return f"energy: {reading.value:.3g} J a call of {subject.name}" if reading.n else f"energy: {reading.note}"
