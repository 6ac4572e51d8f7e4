"""A plan layer by layer: what each tensor keeps and why, what that should cost, and what it should do to the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.core.sockets import Criterion, Solver
from secateur.criteria.magnitude import Magnitude
from secateur.engine.compensating import Inputs

__all__ = ["Figure", "LayerChoice", "LayerPlan", "Other", "Removal"]

UNITS = {"ms": "ms", "bytes": "bytes", "macs": "MACs", "params": "weights", "loss": "", "accuracy": "%"}
_NAMES = 8  # of tensors with one reason are listed at most
WHOLE = ("bytes", "macs", "params")
"""Figures that are whole numbers."""


@dataclass(frozen=True)
class LayerChoice:
    """What becomes of one tensor.

    Args:
        name: the tensor.
        shape: its shape.
        pattern: in one word; empty for a tensor that is left as it is.
        kept: weights kept.
        loss: its share of the forecast rise of the loss; the shares sum to the whole.
        before: ``ms``, ``bytes`` and ``macs`` as it is now; ``ms`` is missing where it is not known.
        after: the same, planned.
        why: why it is left as it is.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    kept: int
    loss: float
    before: Mapping[str, float | int]
    after: Mapping[str, float | int]
    why: str = ""

    @property
    def total(self) -> int:
        """All its weights."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Figure:
    """One figure of the whole network: as it is, as forecast, and as measured on a copy, where it was.

    Args:
        before: as the network is.
        forecast: what it should be after pruning; of the loss it is the loss itself, not its rise.
        low: lower end of what is likely.
        high: upper end of it.
        measured: of the copy that was pruned.
    """

    before: float | None
    forecast: float | None
    low: float | None = None
    high: float | None = None
    measured: float | None = None


@dataclass(frozen=True)
class Other:
    """What another choice gives for the same target.

    Args:
        what: in words.
        met: whether the target can be met.
        quantity: what ``figure`` counts: the quantity of the target, or the one that was to be least.
        figure: what it comes to; the best that can be when that is not enough.
        rise: forecast rise of the loss; None when the target cannot be met.
        low: lower end of what is likely.
        high: upper end of it.
    """

    what: str
    met: bool
    quantity: str
    figure: float
    rise: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Removal:
    """Units that go before weights do.

    Args:
        to: how much of the network may be left, such as ``"macs 0.7x"``; of blocks how many go.
        kinds: what goes: ``"channels"``, ``"heads"``, ``"depth"``.
        criterion: by which units are scored.
        groups: units kept and all, by group.
        rise: measured rise of the loss by the removal alone.
        blocks: names of whole blocks that go.
        units: indices of the units that go, by group; empty where they are chosen anew, by their scores.
    """

    to: str
    kinds: tuple[str, ...]
    criterion: Criterion
    groups: Mapping[str, tuple[int, int]]
    rise: float
    blocks: tuple[str, ...] = ()
    units: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerPlan:
    """What will be pruned, layer by layer; nothing has changed yet.

    ``secateur.prune(task, plan)`` carries it out, ``str(plan)`` is a table, ``save`` and ``LayerPlan.open`` keep it.

    Args:
        target: what was asked for.
        patterns: what was allowed, in words.
        layers: every prunable tensor.
        left_alone: the reason for every tensor that is not prunable.
        figures: of the whole network: ``ms``, ``bytes``, ``macs``, ``params``, ``loss``, and ``accuracy`` where it was
            asked for. ``bytes`` are those of the plan file; ``macs`` and ``params`` count prunable weights alone.
        others: what other choices give for the same target.
        weights: digest of the weights that it was made for.
        criterion: which weights of a tensor go.
        solver: chooses them instead, and moves the others.
        inputs: what a solver's layers are given.
        removal: units that go first.
        exact: it is proven that no choice among the offers of the ladder is better: none that takes as little by
            forecast has a lower forecast of the loss; for targets of loss and accuracy, none that loses as little by
            forecast takes less.
        machine: ``engine``, ``isa``, ``threads``, ``batch`` of the milliseconds, and ``name``: the processor and the
            compiled core, on one line.
        notes: what else is to be known.
        data: ``examples``, ``seed`` and ``digest`` of the data that it was made with.
        masks: digest of the weights that its counts keep, where a criterion that goes by the data scores them.
    """

    target: str
    patterns: tuple[str, ...]
    layers: tuple[LayerChoice, ...]
    left_alone: Mapping[str, str]
    figures: Mapping[str, Figure]
    others: tuple[Other, ...] = ()
    weights: str = ""
    criterion: Criterion = field(default_factory=Magnitude)
    solver: Solver | None = None
    inputs: Inputs = "sequential"
    removal: Removal | None = None
    exact: bool = False
    machine: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    masks: str = ""

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Weights kept and all, by tensor."""
        return {layer.name: (layer.kept, layer.total) for layer in self.layers}

    @property
    def rise(self) -> float | None:
        """The forecast rise of the loss."""
        loss = self.figures["loss"]
        return None if loss.before is None or loss.forecast is None else loss.forecast - loss.before

    def to_json(self) -> dict[str, Any]:
        """Plain values: what ``secateur plan -o`` writes."""
        from secateur.engine.planning.plan_files import table_of_plan

        return table_of_plan(self)

    def save(self, path: Any) -> None:
        """Write the plan, whole or not at all.

        Raises:
            FileError: when it cannot be written.
        """
        from secateur.engine.planning.plan_files import write_plan_file

        write_plan_file(path, self)

    @staticmethod
    def open(path: Any) -> LayerPlan:
        """Read a plan; nothing in the file is believed.

        Raises:
            FileError: when it is missing, damaged, or of another format.
        """
        from secateur.engine.planning.plan_files import read_plan_file

        return read_plan_file(path)

    def __str__(self) -> str:
        """A table: a row a tensor, the totals, what is left alone, and what other choices would give."""
        lines = [f"target {self.target}, allowed {', '.join(self.patterns)}"]
        if self.removal is not None:
            lines += _removed(self.removal)
        lines += _rows(self.layers)
        lines += [line for name, figure in self.figures.items() if (line := _figure(name, figure))]
        reasons: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.why:
                reasons.setdefault(layer.why, []).append(layer.name)
        lines += [f"as it is: {', '.join(names)} ({why})" for why, names in reasons.items()]
        lines += _left(self.left_alone)
        lines += [_other(other) for other in self.others]
        lines += [_proof(self), *_clock(self.machine)]
        return "\n".join([*lines, *self.notes])


def _proof(plan: LayerPlan) -> str:
    """What no choice among the offers can do better: for what is forecast, whatever was asked for."""
    if not plan.exact:
        return "better choices among the offers are not ruled out"
    word = plan.target.partition(" ")[0]
    if word in ("loss", "accuracy"):
        return "no choice among the offers with as low a forecast of the loss takes less (proven)"
    name = "ms" if word == "latency" else word
    figure = plan.figures.get(name)
    if figure is None or figure.forecast is None:
        return "no choice among the offers that takes as little has a lower forecast of the loss (proven)"
    most = f"{shown(name, figure.forecast)} {UNITS[name]}"
    return f"no choice among the offers of at most {most} by forecast has a lower forecast of the loss (proven)"


def _clock(machine: Mapping[str, Any]) -> list[str]:
    """Which milliseconds these are."""
    if not machine:
        return []
    engine = {"secateur": "compiled core"}.get(str(machine.get("engine")), str(machine.get("engine")))
    threads, batch = machine.get("threads", 1), machine.get("batch", 1)
    parts = [engine, str(machine.get("isa") or ""), f"{threads} thread{'' if threads == 1 else 's'}", f"batch {batch}"]
    processor = str(machine.get("name") or "").partition(" | ")[0]
    return [f"ms: {', '.join(part for part in (*parts, processor) if part)}"]


def _rows(layers: tuple[LayerChoice, ...]) -> list[str]:
    if not layers:
        return []
    width = max(len(layer.name) for layer in layers)
    head = f"{'tensor':<{width}}  {'pattern':<12}  {'kept':>24}  {'ms':>18}  {'loss':>10}"
    return [head, *(_row(layer, width) for layer in layers)]


def _row(layer: LayerChoice, width: int) -> str:
    kept = f"{layer.kept:,} of {layer.total:,} {layer.kept / layer.total:7.2%}"
    was, will = layer.before.get("ms"), layer.after.get("ms")
    ms = "" if was is None or will is None else f"{was:.4f} -> {will:.4f}"
    return f"{layer.name:<{width}}  {layer.pattern or 'as it is':<12}  {kept:>24}  {ms:>18}  {layer.loss:>+10.3g}"


def _figure(name: str, figure: Figure) -> str:
    if figure.before is None and figure.forecast is None and figure.measured is None:
        return ""
    unit = f" {UNITS[name]}" if UNITS.get(name) else ""
    parts = [f"{name}: {shown(name, figure.before)}"]
    if figure.forecast is not None:
        parts.append(f" -> {shown(name, figure.forecast)}{unit}")
    if figure.low is not None and figure.high is not None:
        parts.append(f" ({shown(name, figure.low)} to {shown(name, figure.high)})")
    if figure.measured is not None:
        parts.append(f", measured on a copy {shown(name, figure.measured)}{unit}")
    return "".join(parts)


def shown(name: str, value: float | None) -> str:
    """A figure as people read it."""
    if value is None:
        return "unknown"
    return f"{round(value):,}" if name in WHOLE else f"{value:.4g}"


def _removed(removal: Removal) -> list[str]:
    lost = {name: pair for name, pair in removal.groups.items() if pair[0] < pair[1]}
    kinds = f"the blocks {', '.join(removal.blocks)}" if removal.blocks else " and ".join(removal.kinds)
    lines = [f"first {kinds} go, to {removal.to}: the loss rises by {removal.rise:.4g} (measured)"]
    return lines + [f"  {name}: {kept:,} of {units:,} units" for name, (kept, units) in lost.items()]


def _left(left_alone: Mapping[str, str]) -> list[str]:
    """A line for each reason: how many tensors, and the names; of many the first and the last."""
    reasons: dict[str, list[str]] = {}
    for name, why in left_alone.items():
        reasons.setdefault(why, []).append(name)
    lines = []
    for why, names in reasons.items():
        listed = names if len(names) <= _NAMES else [*names[: _NAMES - 2], "...", names[-1]]
        count = f" {len(names)} tensors" if len(names) > 1 else ""
        lines.append(f"left alone{count}: {', '.join(listed)} ({why})")
    return lines


def _other(other: Other) -> str:
    figure = f"{shown(other.quantity, other.figure)} {UNITS[other.quantity]}"
    if not other.met or other.rise is None:
        return f"{other.what}: cannot meet the target; at best {figure}"
    span = "" if other.low is None or other.high is None else f" ({other.low:+.3g} to {other.high:+.3g})"
    return f"{other.what}: {figure}, loss {other.rise:+.4g}{span}"
