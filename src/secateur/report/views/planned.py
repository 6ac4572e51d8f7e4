"""What a plan layer by layer forecast, and what came of it: the whole network, then each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.report.numbers import count_cell, many, number, number_cell, percent
from secateur.report.sections import EMPTY, Bars, Cell, Column, Dots, Number, Section, Table
from secateur.report.source import RunRecord, StepRecord, as_finite, as_table, names

_FIGURES = (
    ("ms", "Milliseconds of a call"), ("bytes", "Bytes of the plan file"), ("macs", "MACs of prunable weights"),
    ("params", "Prunable weights kept"), ("loss", "Loss"), ("accuracy", "Accuracy in per cent"),
)  # fmt: skip
_WHEN = (("before", "Before"), ("forecast", "Forecast"), ("low", "From"), ("high", "To"), ("measured", "Measured"))
_WHOLE = ("bytes", "macs", "params")
_LAYER = (
    ("ms_before", "ms before"), ("ms_forecast", "ms forecast"), ("ms", "ms measured"),
    ("loss_forecast", "Rise forecast"), ("loss", "Rise measured"),
)  # fmt: skip
_AS_IT_IS = "as it is"
DRAWN = 24
"""Layers in a chart: those that take most time."""


def sections(run: RunRecord) -> tuple[Section, ...]:
    """For the last pruning step that carried a plan out; nothing where none did."""
    steps = [step for step in run.of("prune") if _rows(step)]
    if not steps:
        return ()
    step = steps[-1]
    return (_whole(step), _layers(step))


def _planned(step: StepRecord) -> Mapping[str, Any]:
    return as_table(step.card.get("planned"))


def _rows(step: StepRecord) -> list[Mapping[str, Any]]:
    entries = _planned(step).get("layers")
    rows = [as_table(entry) for entry in (entries if isinstance(entries, list) else [])]
    wanted = ("kept", "total", "loss_forecast")
    return [r for r in rows if isinstance(r.get("name"), str) and all(as_finite(r.get(k)) is not None for k in wanted)]


def _whole(step: StepRecord) -> Section:
    figures = as_table(_planned(step).get("figures"))
    rows = []
    for key, label in _FIGURES:
        row = as_table(figures.get(key))
        found = [as_finite(row.get(when)) for when, _ in _WHEN]
        if any(value is not None for value in found):
            rows.append((Cell(label, label), *(_figure(key, value) for value in found)))
    columns = (Column("Figure"), *(Column(head, True) for _, head in _WHEN))
    caption = (
        "Before: as the network was. The forecast was made before anything was changed. From and to: of milliseconds, "
        "the range that nine of ten forecasts like it keep to; of the loss, that of 95 in 100 by the fit to measured "
        "prunings. What units that were removed do to the loss is measured when the plan is made, so it adds no "
        "width. Measured: of the network as it was pruned, the file written, opened again and timed."
    )
    notes = _planned(step).get("notes")
    more = tuple(note for note in (notes if isinstance(notes, list) else []) if isinstance(note, str))
    table = Table(caption, columns, tuple(rows))
    return Section("Plan and truth", _says(step, figures), table, source=names([step]), more=more)


def _figure(key: str, value: Number | None) -> Cell:
    return count_cell(value) if key in _WHOLE else number_cell(value)


def _says(step: StepRecord, figures: Mapping[str, Any]) -> str:
    target = _planned(step).get("target")
    begin = f"Step {step.number} carried out a plan for {target}" if isinstance(target, str) else f"Step {step.number}"
    parts = []
    for key, word in (("ms", "ms"), ("bytes", "bytes")):
        row = as_table(figures.get(key))
        guess, truth = as_finite(row.get("forecast")), as_finite(row.get("measured"))
        if guess is not None and truth is not None:
            shown = (f"{round(guess):,}", f"{round(truth):,}") if key in _WHOLE else (number(guess), number(truth))
            parts.append(f"{shown[0]} {word} were forecast and {shown[1]} measured")
    loss = as_table(figures.get("loss"))
    before, guess, truth = (as_finite(loss.get(when)) for when in ("before", "forecast", "measured"))
    if before is not None and guess is not None and truth is not None:
        parts.append(f"the loss was forecast at {number(guess)} and is {number(truth)}, from {number(before)}")
    verdict = _planned(step).get("verdict")
    said = f" {verdict[:1].upper()}{verdict[1:]}." if isinstance(verdict, str) and verdict else ""
    return f"{begin}: {'; '.join(parts)}.{said}" if parts else f"{begin}.{said}"


def _layers(step: StepRecord) -> Section:
    rows = _rows(step)
    columns = (Column("Tensor"), Column("Pattern"), Column("Kept", True))
    columns += tuple(Column(head, True, wide=key == "ms_before") for key, head in _LAYER)
    caption = (
        "Tensors in the order of the network. Milliseconds are those of the compiled step that computes with the "
        "tensor; the rise forecast is the tensor's share of the whole, the measured one that of pruning it with those "
        "before it pruned already."
    )
    cut = [row for row in rows if _pattern(row) != _AS_IT_IS]
    kinds = sorted({_pattern(row) for row in cut})
    says = f"{many(len(cut), 'tensor')} of {len(rows):,} lost weights" + (f", as {', '.join(kinds)}." if kinds else ".")
    cells = tuple(_row(row) for row in rows)
    charts = (*_times(rows), *_rises(rows))
    table = Table(caption, columns, cells, sortable=True)
    return Section("Plan and truth by layer", says, table, charts, names([step]))


def _pattern(row: Mapping[str, Any]) -> str:
    word = row.get("pattern")
    return word if isinstance(word, str) and word else _AS_IT_IS


def _row(row: Mapping[str, Any]) -> tuple[Cell, ...]:
    kept, total = as_finite(row["kept"]) or 0, as_finite(row["total"]) or 0
    share = 100 * kept / total if total else None
    word = _pattern(row)
    return (
        Cell(row["name"], row["name"]), Cell(word, word), EMPTY if share is None else Cell(share, percent(share)),
        *(number_cell(as_finite(row.get(key))) for key, _ in _LAYER),
    )  # fmt: skip


def _times(rows: list[Mapping[str, Any]]) -> tuple[Bars, ...]:
    """Forecast and measured milliseconds, layers that take most first, on one scale."""
    known = [(row, as_finite(row.get("ms_forecast")), as_finite(row.get("ms"))) for row in rows]
    both = [(row, guess, truth) for row, guess, truth in known if guess is not None and truth is not None]
    if len(both) < 2:
        return ()
    both = sorted(both, key=lambda entry: -max(entry[1], entry[2]))[:DRAWN]
    high = max(max(guess, truth) for _, guess, truth in both) or 1.0
    says = f"{many(len(both), 'layer')} of {len(rows):,}, those that take most time first."
    labels = tuple(str(row["name"]) for row, _, _ in both)
    made = []
    for title, values in (("Forecast", [guess for _, guess, _ in both]), ("Measured", [truth for _, _, truth in both])):
        texts = tuple(number(value) for value in values)
        made.append(Bars(f"{title} milliseconds", "ms", labels, tuple(values), texts, says, high))
    return tuple(made)


def _rises(rows: list[Mapping[str, Any]]) -> tuple[Dots, ...]:
    """A logarithm has no place for a rise that is negative or nothing."""
    known = [(row, as_finite(row.get("loss_forecast")), as_finite(row.get("loss"))) for row in rows]
    drawn = [(row, guess, truth) for row, guess, truth in known if guess and truth and guess > 0 and truth > 0]
    if len(drawn) < 2:
        return ()
    says = "The dashed line is where both are equal, the band where the forecast is a third to three times the truth."
    points = tuple((truth, guess) for _, guess, truth in drawn)
    labels = tuple(str(row["name"]) for row, _, _ in drawn)
    title = "Planned against measured rise of the loss"
    return (Dots(title, "measured rise", "planned rise", labels, points, says, 1 / 3, 3.0),)
