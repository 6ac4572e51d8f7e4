"""Corruptions: how both networks fare when the test images are spoilt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.report.damage import NAME, DamageRecord, whole
from secateur.report.numbers import count_cell, shorten
from secateur.report.sections import EMPTY, Cell, Column, Lines, Number, Section, Series, Table
from secateur.report.source import as_finite, as_reading, as_table, names
from secateur.report.views.calibration import CURVES
from secateur.report.views.cells import accuracy_cell, points_cell

CLEAN = "none"


def section(found: DamageRecord) -> Section | str:
    """Accuracy of every network at every corruption and severity."""
    table = as_table(found.table.get("corruptions"))
    listed = table.get("rows")
    rows = [row for row in map(as_table, listed if isinstance(listed, list) else []) if _named(row)]
    if not rows:
        return ""  # the record says why
    clean = as_table(table.get("clean"))
    return Section(
        "Corruptions", _says(found, rows), _table(found, table, clean, rows), _charts(found, clean, rows),
        names([found.step]),
    )  # fmt: skip


def _named(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("corruption"), str) and as_finite(row.get("severity")) is not None


def _table(
    found: DamageRecord, table: Mapping[str, Any], clean: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> Table:
    columns = [Column("Corruption"), Column("Severity", True), Column("Parameter", True, wide=True)]
    columns += [Column(name, True) for name in found.networks]
    several = len(found.networks) > 2
    columns += [Column(f"Change: {name}" if several else "Change", True) for name in found.networks[1:]]
    every = ([{"corruption": CLEAN, "severity": 0, **clean}] if clean else []) + list(rows)
    parameters = as_table(table.get("parameters"))
    meaning = "; ".join(f"{name}: {what}" for name, what in parameters.items() if isinstance(what, str))
    caption = (
        f"Accuracy on {whole(table.get('examples')):,} test images, the same for all networks. Figures in small print "
        f"are 95 % intervals; changes are paired, in percentage points. Parameters: {meaning}."
    )
    return Table(caption, tuple(columns), tuple(_row(found, row) for row in every), sortable=True)


def _row(found: DamageRecord, row: Mapping[str, Any]) -> tuple[Cell, ...]:
    right, change = as_table(row.get("accuracy")), as_table(row.get("change"))
    parameter = as_finite(row.get("parameter"))
    cells = [Cell(row["corruption"], row["corruption"]), count_cell(as_finite(row.get("severity")))]
    cells.append(EMPTY if parameter is None else Cell(parameter, f"{parameter:g}"))
    cells += [accuracy_cell(as_reading(right.get(name))) for name in found.networks]
    return (*cells, *(_points(change.get(name)) for name in found.networks[1:]))


def _points(entry: Any) -> Cell:
    found = as_reading(entry)
    return points_cell(found) if found is not None else EMPTY


def _says(found: DamageRecord, rows: Sequence[Mapping[str, Any]]) -> str:
    """How many changes chance does not explain, and the largest loss and gain."""
    changes = [
        (value, cell, row, name)
        for row in rows
        for name in found.networks[1:]
        if (value := as_finite((cell := _points(as_table(row.get("change")).get(name))).value)) is not None
    ]
    if not changes:
        return "Accuracy on spoilt test images."
    lost = sum(cell.high is not None and cell.high < 0 for _, cell, _, _ in changes)
    won = sum(cell.low is not None and cell.low > 0 for _, cell, _, _ in changes)
    total = len(rows) * (len(found.networks) - 1)
    said = [f"In {lost} of {total} cases the interval of the change lies below 0, in {won} above"]
    order = sorted(changes, key=lambda change: change[0])
    for word, change in (("lowest", order[0]), ("highest", order[-1])):
        if change[0] < 0 if word == "lowest" else change[0] > 0:
            said.append(f"the {word} change is {_case(found, *change[1:])}")
    return f"{'; '.join(said)}."


def _case(found: DamageRecord, cell: Cell, row: Mapping[str, Any], name: str) -> str:
    """A change, its interval, and what it is of."""
    whose = f" for {shorten(name, NAME)}" if len(found.networks) > 2 else ""
    span = f" (95 % interval of this case alone {cell.span})" if cell.span else ""
    where = f"{shorten(row['corruption'], NAME)} at severity {count_cell(row['severity']).text}"
    return f"{cell.text}{span}, at {where}{whose}"


def _charts(found: DamageRecord, clean: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[Lines, ...]:
    """Accuracy against severity, a chart a corruption, all with the same y axis; severity 0 is the clean image."""
    charts = []
    for kind in dict.fromkeys(row["corruption"] for row in rows):
        mine = [{"severity": 0, **clean}, *(row for row in rows if row["corruption"] == kind)]
        series = tuple(
            Series(name, points, dots=True) for name in found.networks[:CURVES] if (points := _points_of(mine, name))
        )
        if series:
            says = "; ".join(f"{s.name} from {s.points[0][1]:.1f} to {s.points[-1][1]:.1f} %" for s in series) + "."
            title = "JPEG" if kind == "jpeg" else shorten(kind[:1].upper() + kind[1:], NAME)
            charts.append(Lines(title, "severity", "accuracy (%)", series, says, low=0.0, high=100.0))
    return tuple(charts)


def _points_of(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[tuple[Number, Number], ...]:
    points = []
    for row in rows:
        severity = as_finite(row.get("severity"))
        value = as_finite(accuracy_cell(as_reading(as_table(row.get("accuracy")).get(name))).value)
        if severity is not None and value is not None:
            points.append((severity, value))
    return tuple(sorted(points))
