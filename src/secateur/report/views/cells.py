"""Readings as cells: accuracies in per cent, differences in points, times in milliseconds."""

from __future__ import annotations

from typing import Any

from secateur.core.reading import Reading
from secateur.report.numbers import fixed, number, percent
from secateur.report.sections import EMPTY, Cell, Number
from secateur.report.source import as_finite, as_reading, as_table, interval

_MILLISECONDS = {"s": 1e3, "us": 1e-3, "µs": 1e-3, "ns": 1e-6}


def readings(table: Any) -> dict[str, Reading]:
    """The readings in a table by name; entries that are none are dropped."""
    return {name: found for name, entry in as_table(table).items() if (found := as_reading(entry)) is not None}


def in_percent(reading: Reading) -> float:
    """What turns the reading into per cent: a reading without a unit is a share of 1."""
    return 1.0 if reading.unit.strip() in ("%", "points", "percentage points", "pp") else 100.0


def accuracy_cell(reading: Reading | None) -> Cell:
    """An accuracy in per cent with its interval."""
    if reading is None:
        return EMPTY
    factor, ends = in_percent(reading), interval(reading)
    value = reading.value * factor
    if ends is None:
        return Cell(value, percent(value))
    low, high = ends[0] * factor, ends[1] * factor
    return Cell(value, percent(value), low, high, f"{fixed(low)} to {fixed(high)}")


def points_cell(reading: Reading | None) -> Cell:
    """A difference of accuracies in percentage points with its interval."""
    if reading is None:
        return EMPTY
    factor, ends = in_percent(reading), interval(reading)
    value = reading.value * factor
    text = f"{fixed(value, sign=True)} points"
    if ends is None:
        return Cell(value, text)
    low, high = ends[0] * factor, ends[1] * factor
    return Cell(value, text, low, high, f"{fixed(low, sign=True)} to {fixed(high, sign=True)}")


def time_cell(reading: Reading | None) -> Cell:
    """A time in milliseconds with its interval."""
    if reading is None:
        return EMPTY
    factor, ends = _MILLISECONDS.get(reading.unit, 1.0), interval(reading)
    value = reading.value * factor
    if ends is None:
        return Cell(value, f"{number(value, 3)} ms")
    low, high = ends[0] * factor, ends[1] * factor
    return Cell(value, f"{number(value, 3)} ms", low, high, f"{number(low, 3)} to {number(high, 3)}")


def speed_cell(ratio: Reading | None) -> Cell:
    """How many times as fast the pruned network is, with its interval."""
    if ratio is None or not as_finite(ratio.value):
        return EMPTY
    text, ends = f"{fixed(ratio.value)}× as fast", interval(ratio)
    if ends is None:
        return Cell(ratio.value, text)
    return Cell(ratio.value, text, *ends, f"{fixed(ends[0])} to {fixed(ends[1])}")


def milliseconds(reading: Reading | None) -> Number | None:
    """A time in milliseconds; None when it is unknown or not finite."""
    return None if reading is None else as_finite(reading.value * _MILLISECONDS.get(reading.unit, 1.0))
