"""Where the weights went: one row a tensor."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

from secateur.report.maskfile import NAME, Damaged, read_masks
from secateur.report.numbers import count_cell, many, number, percent, percent_cell, scaled_cell, shorten
from secateur.report.sections import EMPTY, Bars, Cell, Column, Number, Section, Table
from secateur.report.source import RunRecord, StepRecord, as_finite, as_table, as_whole, names
from secateur.report.views.where_time import Part, Times, spent

NAME_WIDTH = 60


@dataclass(frozen=True)
class Layer:
    """One prunable tensor."""

    name: str
    shape: tuple[int, ...]
    weights: Number
    kept: Number
    macs: Number | None
    effective: Number | None
    pattern: str = ""
    part: Part | None = None

    @property
    def density(self) -> Number:
        """Kept weights in per cent."""
        return 100 * self.kept / self.weights


def section(run: RunRecord) -> Section | str:
    """The per-layer table and a chart of the densities."""
    measured, last = run.measured(), run.last_net()
    for step, read in ((measured, _measured), (last, _counted)):
        layers = read(step) if step is not None else []
        if step is not None and layers:
            layers = _more(layers, last, spent(step))
            return Section("Layers", _says(layers), _table(layers), (_chart(layers),), names([step]))
    return "No layers: no finished step tells how many weights each tensor keeps."


def _measured(step: StepRecord) -> list[Layer]:
    rows = step.verdict.get("layers")
    found = []
    for row in rows if isinstance(rows, list) else []:
        row = as_table(row)
        weights, kept, name = as_finite(row.get("weights")), as_finite(row.get("kept")), row.get("name")
        if weights and weights > 0 and kept is not None and isinstance(name, str):
            macs, effective = as_finite(row.get("macs")), as_finite(row.get("macs_effective"))
            found.append(Layer(name, _shape(row.get("shape")), weights, kept, macs, effective))
    return found


def _counted(step: StepRecord) -> list[Layer]:
    shapes = as_table(step.structure.get("parameters"))
    return [
        Layer(name, _shape(as_table(shapes.get(name)).get("shape")), total, kept, None, None)
        for name, (kept, total) in step.counts.items()
        if as_finite(total) and total > 0 and as_finite(kept) is not None
    ]


def _more(layers: list[Layer], net: StepRecord | None, times: Times | None) -> list[Layer]:
    """The layers with the pattern of their zeros, read off the masks, and how they run when compiled."""
    shapes: dict[str, str] = {}
    if net is not None and net.density != 100:
        with contextlib.suppress(FileNotFoundError, Damaged):  # the section on masks tells of it
            shapes = {mask.name: mask.pattern() for mask in read_masks(net.folder / NAME)}
    parts = {layer.name: times.of(layer.name) if times else None for layer in layers}
    return [replace(layer, pattern=shapes.get(layer.name, ""), part=parts[layer.name]) for layer in layers]


def _shape(entry: Any) -> tuple[int, ...]:
    sizes = tuple(as_whole(size) for size in entry) if isinstance(entry, list) else ()
    return tuple(size for size in sizes if size is not None) if None not in sizes else ()


def _table(layers: list[Layer]) -> Table:
    costs = any(layer.macs or layer.effective for layer in layers)
    columns = [Column("Tensor"), Column("Shape", wide=True)]
    columns += [Column(name, True) for name in ("Weights", "Kept", "Density")]
    columns += [Column("MACs", True), Column("Effective MACs", True)] if costs else []
    shaped, timed = any(layer.pattern for layer in layers), any(layer.part for layer in layers)
    columns += [Column("Pattern", wide=True)] if shaped else []
    columns += [Column("ms", True), Column("Path and why", wide=True)] if timed else []
    rows = tuple((*_row(layer, costs), *_runs(layer, shaped, timed)) for layer in layers)
    weights, kept = sum(layer.weights for layer in layers), sum(layer.kept for layer in layers)
    total = [Cell("all", "all"), EMPTY, count_cell(weights), count_cell(kept), percent_cell(100 * kept / weights)]
    if costs:
        macs, effective = sum(layer.macs or 0 for layer in layers), sum(layer.effective or 0 for layer in layers)
        total += [scaled_cell(macs), scaled_cell(effective)]
    total += [EMPTY] if shaped else []
    ms = sum(layer.part.ms for layer in layers if layer.part)
    total += [Cell(ms, number(ms, 3)), EMPTY] if timed else []
    caption = "One row a prunable tensor."
    if costs:
        caption += " MACs: multiply-adds for one example; the effective ones leave zero weights out."
    if timed:
        caption += " ms: of the compiled layer; the path is how it runs there."
    return Table(caption, tuple(columns), rows, tuple(total), sortable=True, saved=True)


def _row(layer: Layer, costs: bool) -> tuple[Cell, ...]:
    shape = " × ".join(map(str, layer.shape))
    cells = [Cell(layer.name, layer.name), Cell(shape, shape) if shape else EMPTY]
    cells += [count_cell(layer.weights), count_cell(layer.kept), percent_cell(layer.density)]
    return tuple(cells + [scaled_cell(layer.macs), scaled_cell(layer.effective)] if costs else cells)


def _runs(layer: Layer, shaped: bool, timed: bool) -> list[Cell]:
    """Cells of the pattern and of the compiled layer."""
    part = layer.part
    words = [layer.pattern] if shaped else []
    cells = [Cell(text, text) if text else EMPTY for text in words]
    if not timed:
        return cells
    cells.append(EMPTY if part is None else Cell(part.ms, number(part.ms, 3)))
    way = ": ".join(text for text in (part.path, part.why) if text) if part else ""
    return [*cells, Cell(way, way) if way else EMPTY]


def _chart(layers: list[Layer]) -> Bars:
    densities = tuple(layer.density for layer in layers)
    says = f"Density of {many(len(layers), 'tensor')}, from {percent(min(densities))} to {percent(max(densities))}."
    labels, texts = tuple(layer.name for layer in layers), tuple(map(percent, densities))
    return Bars("Density by tensor", "weights kept (%)", labels, densities, texts, says, 100.0)


def _says(layers: list[Layer]) -> str:
    low, high = min(layers, key=lambda d: d.density), max(layers, key=lambda d: d.density)
    if low.density == high.density:
        begin = f"Every tensor keeps {percent(low.density)} of its weights"
    else:
        begin = f"{_name(low)} is the sparsest tensor ({percent(low.density)} kept)"
        begin += f" and {_name(high)} the densest ({percent(high.density)})"
    empty = sum(1 for layer in layers if layer.kept == 0)
    if empty:
        begin += f"; nothing is left of {many(empty, 'tensor')}, so check that signals still pass"
    effective = sum(layer.effective or 0 for layer in layers)
    if not effective:
        return f"{begin}."
    most = max(layers, key=lambda d: d.effective or 0)
    return f"{begin}; {_name(most)} holds {percent(100 * (most.effective or 0) / effective)} of the effective MACs."


def _name(layer: Layer) -> str:
    return shorten(layer.name, NAME_WIDTH)
