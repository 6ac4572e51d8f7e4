"""Forecast beside truth: what a plan said of every layer and of the whole network, and what came of it."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.core.budget import keep_for
from secateur.core.errors import SecateurError
from secateur.core.masks import Masks
from secateur.core.names import unwrap
from secateur.core.task import Task, to
from secateur.engine.layer_records import LayerCut
from secateur.engine.planning.plans import UNITS, LayerPlan, shown
from secateur.engine.planning.table import Machine
from secateur.engine.planning.targets import Aim, parse_aim
from secateur.engine.planning.trying import accuracy, batch_of, call_ms, in_turn, write_plan
from secateur.engine.planning.variants import arrays_of
from secateur.runtime.session import Session

__all__ = ["LayerOutcome", "Outcome", "Watch", "aim_of", "compare_plan", "elsewhere", "verdict_of"]

_ROUNDS = 9
_ROUNDING = 1e-6  # of a loss that is taken twice


@dataclass(frozen=True)
class LayerOutcome:
    """One tensor.

    Args:
        name: the tensor.
        pattern: in one word; empty for a tensor that was left as it is.
        kept: weights kept.
        total: all its weights.
        loss_forecast: its share of the forecast rise of the loss.
        loss: measured rise when it was pruned, those before it pruned already; None where it was not measured.
        ms_before: forecast milliseconds of the layer as it was.
        ms_forecast: and as planned.
        ms: measured milliseconds of the step that computes with it, in the file.
    """

    name: str
    pattern: str
    kept: int
    total: int
    loss_forecast: float
    loss: float | None = None
    ms_before: float | None = None
    ms_forecast: float | None = None
    ms: float | None = None


@dataclass(frozen=True)
class Outcome:
    """A plan beside what came of it.

    Args:
        target: what was asked for.
        layers: every prunable tensor.
        figures: ``before``, ``forecast``, ``low``, ``high`` and ``measured`` of the whole network, by name.
        notes: what could not be measured, and why; what was carried out otherwise than it was planned.
        met: whether the target was met; None where that was not measured.
        verdict: the same in a line.
    """

    target: str
    layers: tuple[LayerOutcome, ...]
    figures: Mapping[str, Mapping[str, float | None]]
    notes: tuple[str, ...] = field(default=())
    met: bool | None = None
    verdict: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the card."""
        layers = [asdict(layer) for layer in self.layers]
        figures = {name: dict(row) for name, row in self.figures.items()}
        told = {"met": self.met, "verdict": self.verdict, "notes": list(self.notes)}
        return {"target": self.target, "layers": layers, "figures": figures, **told}

    def __str__(self) -> str:
        """A line for each figure, and whether the target was met."""
        lines = [f"planned for {self.target}"]
        for name, row in self.figures.items():
            known = [when for when in ("before", "forecast", "measured") if row[when] is not None]
            lines.append(f"{name}: {', '.join(f'{when} {shown(name, row[when])}' for when in known)}")
        return "\n".join([*lines, *([self.verdict] if self.verdict else []), *self.notes])


class Watch:
    """Writes files and times them while a plan is carried out; a failure of measuring becomes a note.

    Everything is measured on copies, before the network itself is changed.

    Args:
        plan: what is carried out.
        task: network and data, as they were before anything.
        example: one batch of inputs; None takes the first of the data, as large as that of the plan.
        measure: whether anything is written and timed.

    Attributes:
        notes: what could not be measured, and why.
        ms: milliseconds of a call of the pruned network's file.
        size: its bytes.
        share: for shares of the time: those milliseconds over those of the network before, both called in turn.
        times: milliseconds of the step that computes with each tensor.
    """

    def __init__(self, plan: LayerPlan, task: Task, example: Any, measure: bool) -> None:
        self.plan, self.measure = plan, measure
        self.notes: list[str] = []
        self.ms: float | None = None
        self.size: float | None = None
        self.share: float | None = None
        self.times: dict[str, float] = {}
        self._accuracy: float | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="secateur-plan-", ignore_cleanup_errors=True)
        self._before = Path(self._folder.name) / "before.safetensors"
        aim = aim_of(plan)
        self._beside = aim is not None and aim.quantity == "ms" and aim.relative
        self._judged = aim is not None and aim.quantity == "accuracy"
        with self._noting("timed"):
            self._prepare(task, example)
        if self._judged:
            with self._noting("judged"):
                self._accuracy = accuracy(task)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._folder.cleanup()

    def read(self, model: nn.Module, masks: Masks | None = None) -> None:
        """Write, weigh and time a network with the zeros of some masks; it is left as it is."""
        if not self.measure:
            return
        with self._noting("timed"):
            cpu = _copy(model)
            if masks is not None:
                masks.to("cpu").apply_(cpu)
            self._read(cpu)

    def judge(self, task: Task, figures: dict[str, dict[str, float | None]]) -> None:
        """Put the accuracy of a pruned network beside that before, where the target is a matter of it."""
        if not self._judged:
            return
        with self._noting("judged"):
            row = figures.setdefault("accuracy", dict.fromkeys(("before", "forecast", "low", "high", "measured")))
            row |= {"before": self._accuracy, "measured": accuracy(task)}

    def _prepare(self, task: Task, example: Any) -> None:
        if not self.measure:
            return
        batch = int(self.plan.machine.get("batch", 1))
        self.example = to(example, torch.device("cpu")) if example is not None else batch_of(task, batch)
        self.arrays = arrays_of(self.example)
        if self._beside:
            write_plan(_copy(task.model), self.example, self._before)

    def _read(self, cpu: nn.Module) -> None:
        path, threads = Path(self._folder.name) / "pruned.safetensors", self.plan.machine.get("threads")
        write_plan(cpu, self.example, path)
        self.size = float(path.stat().st_size)
        with Session(path, threads=threads) as session:
            self.ms = call_ms(session, self.example)
            self.times = _by_tensor(session, self.arrays, [layer.name for layer in self.plan.layers])
            if self._beside:
                with Session(self._before, threads=threads) as before:
                    self.share = in_turn(lambda: before(*self.arrays), lambda: session(*self.arrays))

    @contextlib.contextmanager
    def _noting(self, what: str) -> Iterator[None]:
        """Nothing that goes wrong with measuring stops the pruning, or leaves it half done."""
        try:
            yield
        except Exception as error:
            kind = "" if isinstance(error, SecateurError) else f"{type(error).__name__}: "
            self.notes.append(f"not {what}: {kind}{error}")
            if what == "timed":
                self.measure = False


def compare_plan(
    plan: LayerPlan,
    watch: Watch,
    task: Task,
    counts: Mapping[str, tuple[int, int]],
    cuts: Sequence[LayerCut],
    loss: tuple[float, float],
    notes: Sequence[str] = (),
) -> Outcome:
    """What came of a plan: the loss tensor by tensor, and what was measured of the file.

    Args:
        plan: what was planned.
        watch: what measured.
        task: the pruned network, with its data.
        counts: weights that it kept and all, by tensor.
        cuts: what pruning did to the loss, tensor by tensor.
        loss: mean loss before anything was changed, and in the end.
        notes: what else is to be told.
    """
    rises = {cut.name: cut.rise for cut in cuts}
    figures = {name: {**vars(figure), "measured": None} for name, figure in plan.figures.items()}
    told = figures["loss"]["before"]
    apart = loss[0] - told if told is not None else 0.0  # the plan's losses may be those of fewer examples
    moved = {k: v + apart for k in ("forecast", "low", "high") if (v := figures["loss"][k]) is not None}
    figures["loss"] |= {**moved, "before": loss[0], "measured": loss[1]}
    for name, value in (("ms", watch.ms), ("bytes", watch.size)):
        if value is not None:
            figures.setdefault(name, dict.fromkeys(("before", "forecast", "low", "high")))["measured"] = value
    watch.judge(task, figures)
    figures["params"]["measured"] = float(sum(counts[layer.name][0] for layer in plan.layers))
    figures["macs"]["measured"] = float(
        sum(counts[layer.name][0] * layer.before["macs"] // max(layer.total, 1) for layer in plan.layers)
    )
    layers = tuple(
        LayerOutcome(
            layer.name, layer.pattern, *counts[layer.name], layer.loss,
            rises.get(layer.name, 0.0 if not layer.pattern and rises else None),
            layer.before.get("ms"), layer.after.get("ms"), watch.times.get(layer.name),
        )
        for layer in plan.layers
    )  # fmt: skip
    met, verdict = verdict_of(plan, figures, watch.share)
    every = (*notes, *watch.notes)
    return Outcome(plan.target, layers, figures, tuple(dict.fromkeys(every)), met, verdict)


def verdict_of(
    plan: LayerPlan, figures: Mapping[str, Mapping[str, float | None]], share: float | None
) -> tuple[bool | None, str]:
    """Whether the target was met, and a line that says so; None where that was not measured.

    Args:
        plan: what was planned.
        figures: ``before`` and ``measured`` of the whole network, by name.
        share: of the milliseconds, for targets that are a share of them.
    """
    aim = aim_of(plan)
    row = figures.get(aim.quantity, {}) if aim is not None else {}
    before, got = row.get("before"), row.get("measured")
    if aim is not None and aim.quantity == "ms" and aim.relative:
        before, got = 1.0, share
    if aim is None or got is None or (before is None and (aim.relative or not aim.resource)):
        return None, f"target {plan.target}: whether it is met was not measured"
    if aim.resource:
        limit, reached = _limit(aim, before or 0.0), got
    else:
        limit = aim.value + _ROUNDING * max(1.0, abs(before or 0.0))
        reached = got - (before or 0.0) if aim.quantity == "loss" else (before or 0.0) - got
    met = reached <= limit
    return met, f"target {plan.target}: {'met' if met else 'missed'}, {_reached(aim, reached)}"


def aim_of(plan: LayerPlan) -> Aim | None:
    """The target of a plan; None for words that are none."""
    try:
        return parse_aim(plan.target)
    except SecateurError:
        return None


def elsewhere(plan: LayerPlan) -> list[str]:
    """A line where the milliseconds of a plan are those of another processor or another core."""
    name = plan.machine.get("name")
    if not isinstance(name, str) or not name:
        return []
    here = str(Machine.here(str(plan.machine.get("isa", "")), int(plan.machine.get("threads") or 1)))
    return [] if name == here else [f"the plan's milliseconds are those of another machine ({name}), not of this one"]


def _limit(aim: Aim, before: float) -> float:
    """The most that a network may take, as when the plan was made."""
    if aim.quantity == "params" and aim.relative:
        return float(keep_for(1 - aim.value, round(before)))
    limit = aim.limit(before)
    return limit if aim.quantity == "ms" else float(math.floor(limit))


def _reached(aim: Aim, reached: float) -> str:
    """What it came to, in the unit of the target."""
    if aim.quantity == "ms" and aim.relative:
        return f"{reached:.4g}x of the time before, both called in turn"
    if aim.quantity == "loss":
        return f"the loss rose by {reached:.4g}" if reached >= 0 else f"the loss fell by {-reached:.4g}"
    if aim.quantity == "accuracy":
        word = "lost" if reached >= 0 else "gained"
        return f"{abs(reached):.4g} points of accuracy {word}"
    return f"{shown(aim.quantity, reached)} {UNITS[aim.quantity]}"


def _copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(unwrap(model)).cpu().eval()


def _by_tensor(session: Session, arrays: Sequence[np.ndarray], names: Sequence[str]) -> dict[str, float]:
    """Median milliseconds of the steps that compute with each tensor; a step with several shares them equally."""
    if session.isa == "reference":  # its steps have no clock
        return {}
    batch = len(arrays[0]) if arrays and arrays[0].ndim else 1
    session.profile(True)
    rounds = []
    for _ in range(_ROUNDS):
        session(*arrays)
        rounds.append(session.explain(batch)["steps"])
    session.profile(False)
    weights = {node.name: tuple(node.weights.values()) for node in session.graph.nodes}
    found: dict[str, float] = {}
    for steps in zip(*rounds, strict=True):
        node = str(steps[0]["node"])
        used = weights.get(node, ())
        mine = [n for n in names if n in used] or [n for n in names if used and n.rpartition(".")[0] == node]
        for name in mine:
            found[name] = found.get(name, 0.0) + statistics.median(step["ms"] for step in steps) / len(mine)
    return found
