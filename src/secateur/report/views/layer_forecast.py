"""What pruning each layer was forecast to do to the loss, and what it did."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.report.numbers import many, number, number_cell, percent
from secateur.report.sections import EMPTY, Cell, Column, Dots, Number, Section, Table
from secateur.report.source import RunRecord, StepRecord, as_finite, as_table, names

LOW, HIGH = 0.3, 3.0
"""Ratios of forecast to measured rise that count as the same order of magnitude."""
SMALL = 1e-4
"""Rises below this share of the loss are not judged."""


@dataclass(frozen=True)
class _Layer:
    """One tensor of one pruning step; ``ratio`` is None where it is not judged."""

    name: str
    kept: Number
    total: Number
    forecast: Number
    rise: Number
    ratio: Number | None

    @property
    def near(self) -> bool:
        return self.ratio is not None and LOW <= self.ratio <= HIGH


def section(run: RunRecord) -> Section | str:
    """Forecast and measured rise of the loss for each tensor, at each pruning step that recorded them."""
    found = [(step, layers) for step in run.of("prune") if (layers := _layers(step))]
    if not found:
        return ""
    steps = [step for step, _ in found]
    says = [_says(step, layers) for step, layers in found]
    several = len(found) > 1
    columns = (Column("Tensor"), *([Column("Step", True)] if several else []))
    columns += tuple(Column(name, True) for name in ("Kept", "Rise forecast", "Rise measured", "Forecast / measured"))
    rows = tuple(_row(step, layer, several) for step, layers in found for layer in layers)
    caption = (
        "Tensors in the order in which they run; each rise is that of pruning one tensor with those before it pruned "
        "already, in the mean loss of the first 256 examples."
    )
    more = (
        *says[:-1],
        f"The forecast takes slope and curvature of the loss along the change of the tensor's weights. A measured "
        f"rise below {percent(100 * SMALL)} of the loss before pruning is too small to judge by; it has no ratio.",
    )
    charts = tuple(chart for step, layers in found for chart in _chart(step, layers, several))
    table = Table(caption, columns, rows, sortable=True)
    return Section("Forecast and truth by layer", says[-1], table, charts, names(steps), more)


def _layers(step: StepRecord) -> list[_Layer]:
    before = as_finite(as_table(step.card.get("forecast")).get("loss_before"))
    least = SMALL * abs(before or 0.0)
    entries, found = step.card.get("layers"), []
    for entry in entries if isinstance(entries, list) else []:
        row = as_table(entry)
        kept, total, forecast, rise = (as_finite(row.get(key)) for key in ("kept", "total", "forecast", "rise"))
        if kept is None or not total or forecast is None or rise is None or not isinstance(row.get("name"), str):
            continue
        ratio = as_finite(forecast / rise) if rise and abs(rise) >= least else None
        found.append(_Layer(row["name"], kept, total, forecast, rise, ratio))
    return found


def _row(step: StepRecord, layer: _Layer, several: bool) -> tuple[Cell, ...]:
    share = 100 * layer.kept / layer.total
    return (
        Cell(layer.name, layer.name), *([Cell(step.number, str(step.number))] if several else []),
        Cell(share, percent(share)), number_cell(layer.forecast), number_cell(layer.rise),
        EMPTY if layer.ratio is None else Cell(layer.ratio, number(layer.ratio, 3)),
    )  # fmt: skip


def _says(step: StepRecord, layers: list[_Layer]) -> str:
    judged = [layer for layer in layers if layer.ratio is not None]
    begin = f"At step {step.number}"
    small = len(layers) - len(judged)
    if not judged:
        return f"{begin} no rise of the loss was large enough to judge a forecast by ({many(small, 'tensor')})."
    near = sum(layer.near for layer in judged)
    says = f"{begin} the forecast was {LOW:g} to {HIGH:g} times the measured rise for {near} of "
    says += many(len(judged), "tensor")
    return (
        f"{says}; {many(small, 'rise')} more {'was' if small == 1 else 'were'} too small to judge."
        if small
        else f"{says}."
    )


def _chart(step: StepRecord, layers: list[_Layer], several: bool) -> tuple[Dots, ...]:
    """A picture from two points on; a logarithm has no place for a rise that is negative or nothing."""
    drawn = [layer for layer in layers if layer.ratio is not None and layer.forecast > 0 and layer.rise > 0]
    if len(drawn) < 2:
        return ()
    left = len(layers) - len(drawn)
    says = (
        f"The dashed line is where both are equal, the band where the forecast is {LOW:g} to {HIGH:g} times the truth."
    )
    says += f" {many(left, 'tensor')} with a rise below zero or too small to judge not drawn." if left else ""
    title = "Forecast against measured rise of the loss" + (f", step {step.number}" if several else "")
    points = tuple((layer.rise, layer.forecast) for layer in drawn)
    labels = tuple(layer.name for layer in drawn)
    return (Dots(title, "measured rise", "forecast rise", labels, points, says, LOW, HIGH),)
