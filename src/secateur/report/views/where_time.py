"""Where the time goes: the share of each layer, compiled and dense in torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.report.numbers import many, number, percent, percent_cell, shorten
from secateur.report.sections import EMPTY, Bars, Cell, Column, Number, Section, Table
from secateur.report.source import RunRecord, StepRecord, as_finite, as_table, as_whole, names

DRAWN = 24
"""Parts in a chart; those that take least are summed up."""
_REST = "everything else"


@dataclass(frozen=True)
class Part:
    """A layer: its milliseconds, and how the compiled network runs it."""

    name: str
    ms: Number
    path: str = ""
    why: str = ""
    dense: Number | None = None


@dataclass(frozen=True)
class Times:
    """What a measure step tells of the time of each layer; ``dense_ms`` is None when it is not known."""

    parts: tuple[Part, ...]
    dense_ms: Number | None
    isa: str
    threads: int | None
    batch: int | None

    @property
    def ms(self) -> Number:
        """Milliseconds of all compiled steps."""
        return sum(part.ms for part in self.parts)

    def of(self, tensor: str) -> Part | None:
        """The layer that computes with a tensor."""
        return next((part for part in self.parts if part.name == tensor), None)


def section(run: RunRecord) -> Section | str:
    """Bars of the share of time by layer, and the table of all; nothing where no clock looked at the layers."""
    step = run.measured()
    times = spent(step) if step is not None else None
    if step is None or times is None:
        return ""
    parts = sorted(times.parts, key=lambda part: -part.ms)
    known = times.dense_ms and any(part.dense for part in parts)
    charts = [_chart("Compiled", [(part.name, part.ms) for part in parts], times.ms)]
    if known and times.dense_ms:
        slow = [(part.name, part.dense) for part in parts if part.dense is not None]
        left = max(0.0, times.dense_ms - sum(ms for _, ms in slow))
        charts.append(_chart("Dense in torch", [*slow, (_REST, left)], max(times.dense_ms, sum(ms for _, ms in slow))))
    return Section(
        "Where the time goes", _says(parts, times), _table(parts, times), tuple(charts), names([step]), (_how(times),)
    )


def spent(step: StepRecord) -> Times | None:
    """The times of the layers in a verdict; None when it has none."""
    table = as_table(step.verdict.get("time"))
    dense = _dense(table.get("dense"))
    found: dict[str, Part] = {}
    for row in _rows(table.get("compiled")):
        ms, node = as_finite(row.get("ms")), row.get("node")
        if ms is None or ms < 0 or not isinstance(node, str):
            continue
        tensors = _names(row)
        name = tensors[0] if tensors else node
        path, why = (text if isinstance(text := row.get(key), str) else "" for key in ("path", "reason"))
        before = found.get(name, Part(name, 0.0, dense=dense.get(name)))
        tells = bool(as_finite(row.get("weights"))) or not before.path  # not the step that only moves its inputs
        way = (path, why) if tells else (before.path, before.why)
        found[name] = Part(name, before.ms + ms, *way, before.dense)
    if not found or not sum(part.ms for part in found.values()):
        return None
    isa, whole = table.get("isa"), as_finite(table.get("dense_ms"))
    counts = (as_whole(table.get(key)) for key in ("threads", "batch"))
    return Times(
        tuple(found.values()), whole if whole and whole > 0 else None, isa if isinstance(isa, str) else "", *counts
    )


def _dense(entry: Any) -> dict[str, Number]:
    """Milliseconds in torch by the first tensor of each module."""
    found = {}
    for row in _rows(entry):
        ms, tensors = as_finite(row.get("ms")), _names(row)
        if ms is not None and ms >= 0 and tensors:
            found[tensors[0]] = ms
    return found


def _rows(entry: Any) -> list[Mapping[str, Any]]:
    return [as_table(row) for row in entry] if isinstance(entry, list) else []


def _names(row: Mapping[str, Any]) -> list[str]:
    listed = row.get("tensors")
    return [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []


def _chart(title: str, parts: list[tuple[str, Number]], whole: Number) -> Bars:
    ranked = sorted(parts, key=lambda part: -part[1])
    shown, left = ranked[:DRAWN], ranked[DRAWN:]
    if left:
        shown.append((f"{len(left):,} more", sum(ms for _, ms in left)))
    shares = tuple(100 * ms / whole for _, ms in shown)
    texts = tuple(percent(share) for share in shares)
    says = f"{number(whole, 3)} ms in all; most in {shorten(shown[0][0], 60)}, {texts[0]}."
    return Bars(title, "share of the time (%)", tuple(name for name, _ in shown), shares, texts, says)


def _table(parts: list[Part], times: Times) -> Table:
    columns = [Column("Layer"), Column("Compiled, ms", True), Column("Share", True)]
    known = any(part.dense is not None for part in parts)
    columns += [Column("Dense in torch, ms", True), Column("Times as fast", True)] if known else []
    columns += [Column("Path"), Column("Why", wide=True)]
    rows = tuple(_row(part, times, known) for part in parts)
    total = [Cell("all", "all"), _ms(times.ms), percent_cell(100.0)]
    total += [_ms(times.dense_ms), EMPTY] if known else []
    return Table(
        "One row a layer, or a step of the compiled network that has no weights; medians of calls for one batch.",
        tuple(columns), rows, (*total, EMPTY, EMPTY), sortable=True,
    )  # fmt: skip


def _row(part: Part, times: Times, known: bool) -> tuple[Cell, ...]:
    cells = [Cell(part.name, part.name), _ms(part.ms), percent_cell(100 * part.ms / times.ms)]
    ratio = part.dense / part.ms if part.dense is not None and part.ms else None
    cells += [_ms(part.dense), EMPTY if ratio is None else Cell(ratio, f"{number(ratio, 3)}×")] if known else []
    return (*cells, *(Cell(text, text) if text else EMPTY for text in (part.path, part.why)))


def _ms(value: Number | None) -> Cell:
    return EMPTY if value is None else Cell(value, number(value, 3))


def _says(parts: list[Part], times: Times) -> str:
    most = parts[0]
    says = f"{shorten(most.name, 60)} takes {percent(100 * most.ms / times.ms)} of the compiled network's time"
    half, count = 0.0, 0
    while count < len(parts) and half < 0.5 * times.ms:
        half, count = half + parts[count].ms, count + 1
    if count > 1:
        says += f"; {many(count, 'layer')} of {len(parts):,} take half of it"
    return f"{says}."


def _how(times: Times) -> str:
    begin = [f"batch {times.batch}"] if times.batch else []
    begin += [many(times.threads, "thread")] if times.threads else []
    begin += [times.isa] if times.isa else []
    return (
        f"Timed step by step ({', '.join(begin)}), which takes longer than the whole network at once: the clock itself "
        "adds a little to every step, in torch some microseconds a layer. Everything else in torch is what lies "
        "between the layers with prunable weights."
    )
