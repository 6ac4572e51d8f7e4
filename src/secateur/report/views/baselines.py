"""Baselines and probes: what the result must beat, and what else was measured."""

from __future__ import annotations

from collections.abc import Mapping

from secateur.core.reading import Reading
from secateur.report.numbers import count_cell, fixed, many, number
from secateur.report.sections import EMPTY, Bars, Cell, Column, Section, Table
from secateur.report.source import RunRecord, as_finite, interval, names
from secateur.report.views.cells import accuracy_cell, in_percent, readings

_ABOUT = {
    "dense": "this run, before pruning",
    "pruned": "this run",
    "random": "as many weights kept in each tensor, but chosen by chance, without training afterwards",
}


def section(run: RunRecord) -> Section | str:
    """Accuracy of the result beside that of the baselines."""
    step = run.measured()
    if step is None:
        return "No baselines: the run has no finished measure step."
    baselines = readings(step.verdict.get("baselines"))
    if not baselines:
        return "No baselines were measured."
    own = {kind: readings(step.verdict.get(kind)).get("accuracy") for kind in ("dense", "pruned")}
    found = {name: reading for name, reading in (own | baselines).items() if reading is not None}
    cells = {name: accuracy_cell(reading) for name, reading in found.items()}
    about = {name: _ABOUT.get(name) or reading.note or EMPTY.text for name, reading in found.items()}
    rows = tuple((Cell(name, name), cell, Cell(about[name], about[name])) for name, cell in cells.items())
    columns = (Column("Network"), Column("Accuracy", True), Column("How it was made"))
    table = Table("Accuracy on the test data; figures in small print are 95 % intervals.", columns, rows)
    return Section("Baselines", _says(found, baselines), table, _chart(cells), names([step]))


def _chart(cells: Mapping[str, Cell]) -> tuple[Bars, ...]:
    drawn = {name: (value, cell.text) for name, cell in cells.items() if (value := as_finite(cell.value)) is not None}
    if not drawn:
        return ()
    values, texts = zip(*drawn.values(), strict=True)
    says = f"Accuracy: {', '.join(f'{name} {text}' for name, (_, text) in drawn.items())}."
    return (Bars("Accuracy beside baselines", "accuracy (%)", tuple(drawn), values, texts, says, 100.0),)


def _says(found: dict[str, Reading], baselines: dict[str, Reading]) -> str:
    own = found.get("pruned")
    if own is None:
        return "Baselines were measured, but not the pruned network."
    name, best = max(baselines.items(), key=lambda item: item[1].value * in_percent(item[1]))
    gap = own.value * in_percent(own) - best.value * in_percent(best)
    if as_finite(gap) is None:
        return "The accuracies cannot be compared: one is not a finite number."
    gap = round(gap, 2)
    if gap <= 0:
        gap_text = f"{fixed(gap, sign=True)} points"
        return f"The pruned network does not beat the {name} baseline ({gap_text}): look for a fault before using it."
    return f"The pruned network is {fixed(gap)} points above the {name} baseline."


def probes(run: RunRecord) -> Section | str:
    """Further readings of the pruned network."""
    step = run.measured()
    found = readings(step.verdict.get("probes")) if step else {}
    if step is None or not found:
        return ""
    notes = [Cell(reading.note, reading.note) if reading.note else EMPTY for reading in found.values()]
    rows = tuple(
        (Cell(name, name), _value(reading), count_cell(reading.n), note)
        for (name, reading), note in zip(found.items(), notes, strict=True)
    )
    columns = (Column("Probe"), Column("Value", True), Column("Draws or examples", True), Column("Note"))
    table = Table("Figures in small print are 95 % intervals.", columns, rows)
    return Section(
        "Probes", f"{many(len(found), 'further figure')} of the pruned network.", table, source=names([step])
    )


def _value(reading: Reading) -> Cell:
    text, ends = f"{number(reading.value)} {reading.unit}".rstrip(), interval(reading)
    if ends is None:
        return Cell(reading.value, text)
    return Cell(reading.value, text, *ends, " to ".join(map(number, ends)))
