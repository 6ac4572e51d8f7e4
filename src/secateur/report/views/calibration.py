"""Calibration: whether the networks are right as often as they are sure, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.core.reading import Reading
from secateur.report.damage import NAME, DamageRecord
from secateur.report.numbers import number, number_cell, percent, percent_cell, shorten
from secateur.report.sections import EMPTY, Cell, Column, Lines, Number, Section, Series, Table
from secateur.report.source import as_finite, as_reading, as_table, interval, names

CURVES = 4
"""Curves that one chart can tell apart."""
_CAPTION = (
    "ECE: expected calibration error, the mean distance of accuracy from confidence over 15 bins; the smaller, the "
    "better. It is biased upwards for few examples, and so are the 95 % bootstrap intervals in small print, which do "
    "not compare the networks in pairs."
)


def section(found: DamageRecord) -> Section | str:
    """Calibration errors, the reliability diagram, and histograms of confidence and of margin."""
    every = as_table(found.table.get("calibration"))
    tables = {name: as_table(every.get(name)) for name in found.networks if as_table(every.get(name))}
    if not tables:
        return f"No calibration: {found.step.folder.name}/damage.json holds none."
    shapes = as_table(found.table.get("geometry"))
    shown = list(tables)[:CURVES]
    charts = (
        _reliability({name: tables[name] for name in shown}),
        _histogram(
            {name: tables[name].get("confidences") for name in shown}, "Confidence", "highest probability",
            "How sure the networks are of their answers.", log=True,
        ),
        _histogram(
            {name: as_table(shapes.get(name)).get("margins") for name in shown}, "Margin",
            "distance to the nearest boundary of the right class",
            "Distance of the last features from the boundary; answers below 0 are wrong.",
        )
        or _histogram(
            {name: tables[name].get("leads") for name in shown}, "Lead of the right class",
            "its probability less the highest other one", "Answers below 0 are wrong.",
        ),
    )  # fmt: skip
    return Section(
        "Calibration", _says(found, tables), _table(tables), tuple(chart for chart in charts if chart is not None),
        names([found.step]),
    )  # fmt: skip


def _table(tables: Mapping[str, Mapping[str, Any]]) -> Table:
    heads = ("ECE", "Largest gap", "Confidence", "Accuracy", "NLL", "Brier score")
    wide = ("Largest gap", "NLL", "Brier score")
    columns = (Column("Network"), *(Column(head, True, head in wide) for head in heads))
    rows = []
    for name, table in tables.items():
        worst, nll, brier = (number_cell(as_finite(table.get(key)), 3) for key in ("mce", "nll", "brier"))
        sure, right = (percent_cell(_hundredfold(as_finite(table.get(key)))) for key in ("confidence", "accuracy"))
        rows.append((Cell(name, name), _error(as_reading(table.get("ece"))), worst, sure, right, nll, brier))
    return Table(_CAPTION, columns, tuple(rows))


def _hundredfold(share: Number | None) -> Number | None:
    return None if share is None else 100 * share


def _error(reading: Reading | None) -> Cell:
    if reading is None:
        return EMPTY
    ends = interval(reading)
    if ends is None:
        return Cell(reading.value, number(reading.value, 3))
    return Cell(reading.value, number(reading.value, 3), *ends, " to ".join(number(end, 3) for end in ends))


def _says(found: DamageRecord, tables: Mapping[str, Mapping[str, Any]]) -> str:
    told = [text for name, table in tables.items() if (text := _told(name, table))]
    return f"Calibration error (ECE): {'; '.join(told)}." if told else "How sure the networks are, and how often right."


def _told(name: str, table: Mapping[str, Any]) -> str:
    error = as_reading(table.get("ece"))
    if error is None:
        return ""
    begin = f"{shorten(name, NAME)} {number(error.value, 3)}"
    sure, right = (as_finite(table.get(key)) for key in ("confidence", "accuracy"))
    if sure is None or right is None:
        return begin
    return f"{begin}, {percent(100 * sure)} sure and {percent(100 * right)} right on average"


def _reliability(tables: Mapping[str, Mapping[str, Any]]) -> Lines | None:
    series = []
    for name, table in tables.items():
        bins = table.get("bins")
        points = []
        for row in map(as_table, bins if isinstance(bins, list) else []):
            sure, right = as_finite(row.get("confidence")), as_finite(row.get("accuracy"))
            if sure is not None and right is not None:
                points.append((100 * sure, 100 * right))
        if points:
            series.append(Series(name, tuple(sorted(points)), dots=True))
    if not series:
        return None
    says = (
        "Accuracy against confidence in 15 bins; on the line both are equal, below it a network is too sure. "
        "Bins of few answers stray."
    )
    return Lines("Reliability", "confidence (%)", "accuracy (%)", tuple(series), says, low=0.0, high=100.0, equal=True)


def _histogram(tables: Mapping[str, Any], title: str, x: str, says: str, log: bool = False) -> Lines | None:
    """Counts by bin as steps, one curve a network; right and wrong answers together."""
    series = []
    for name, entry in tables.items():
        table = as_table(entry)
        edges, right, wrong = (_numbers(table.get(key)) for key in ("edges", "right", "wrong"))
        if len(right) == len(wrong) == len(edges) - 1 and sum(right) + sum(wrong) > 0:
            counts = [a + b for a, b in zip(right, wrong, strict=True)]
            series.append(Series(name, tuple(zip(edges, [*counts, counts[-1]], strict=True)), stepped=True))
    return Lines(title, x, "answers in a bin", tuple(series), says, low=0.0, log=log) if series else None


def _numbers(entry: Any) -> list[Number]:
    found = [as_finite(value) for value in entry] if isinstance(entry, list) else []
    return [value for value in found if value is not None] if None not in found else []
