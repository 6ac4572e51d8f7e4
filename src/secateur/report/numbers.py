"""Numbers as people read them. Each function rounds once; nothing is computed from rounded figures."""

from __future__ import annotations

import math

from secateur.report.sections import EMPTY, Cell, Number

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: Number, digits: int = 4) -> str:
    """A number to so many significant digits, with thousands separated.

    >>> [number(v) for v in (0.123456, 12345.678, -2.0, 1.2e-7, float("nan"))]
    ['0.1235', '12,346', '−2.000', '1.200e−07', 'not a number']
    """
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else _minus(f"{value:+.0f}").replace("inf", "infinite").lstrip("+")
    if value == 0:
        return "0"
    size = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded number: 999.96 counts as 1000
    if size < -4 or size >= 15:
        return _minus(f"{value:.{digits - 1}e}")
    return _minus(f"{value:,.{max(0, digits - 1 - size)}f}")


def fixed(value: Number, places: int = 2, sign: bool = False) -> str:
    """A number with so many places after the point.

    >>> fixed(-0.354), fixed(2, 1, sign=True), fixed(-0.001)
    ('−0.35', '+2.0', '0.00')
    """
    if not math.isfinite(value):
        return number(value)
    text = f"{value:{'+' if sign else ''},.{places}f}"
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")
    return _minus(text)


def count(value: Number) -> str:
    """A whole number with thousands separated."""
    return number(value) if not math.isfinite(value) else _minus(f"{round(value):,}")


def percent(value: Number) -> str:
    """A number of per cent; very small ones keep two significant digits.

    >>> percent(91.314), percent(0.0012)
    ('91.31 %', '0.0012 %')
    """
    small = math.isfinite(value) and 0 < abs(value) < 0.01
    return f"{number(value, 2) if small else fixed(value)} %"


def scaled(value: Number, unit: str = "") -> str:
    """A large number with a metric prefix (decimal: 1 kB is 1,000 B) to four significant digits.

    >>> scaled(40813184), scaled(999999, "B"), scaled(512, "B")
    ('40.81 M', '1.000 MB', '512 B')
    """
    if not math.isfinite(value):
        return number(value)
    for factor, prefix in _PREFIXES:
        if abs(value) >= factor * 0.99995:
            return f"{number(value / factor, 4)} {prefix}{unit}"
    text = f"{value:.0f}" if float(value).is_integer() else number(value)
    return f"{_minus(text)} {unit}".rstrip()


def tick(value: Number) -> str:
    """A short label for an axis."""
    if value and (abs(value) >= 1_000 or abs(value) < 1e-3):
        for factor, prefix in _PREFIXES:
            if abs(value) >= factor:
                return _minus(f"{value / factor:g} {prefix}")
    return _minus(f"{value:g}")


def percent_cell(value: Number | None) -> Cell:
    """A cell with a number of per cent."""
    return EMPTY if value is None else Cell(value, percent(value))


def count_cell(value: Number | None) -> Cell:
    """A cell with a whole number."""
    return EMPTY if value is None else Cell(value, count(value))


def scaled_cell(value: Number | None, unit: str = "") -> Cell:
    """A cell with a metric prefix."""
    return EMPTY if value is None else Cell(value, scaled(value, unit))


def number_cell(value: Number | None, digits: int = 4) -> Cell:
    """A cell with significant digits."""
    return EMPTY if value is None else Cell(value, number(value, digits))


def many(amount: int, thing: str) -> str:
    """How many of a thing, in the singular or the plural.

    >>> many(1, "tensor"), many(2000, "tensor")
    ('1 tensor', '2,000 tensors')
    """
    return f"{amount:,} {thing}{'' if amount == 1 else 's'}"


def relative_cell(before: Number | None, after: Number | None) -> Cell:
    """A cell with the change from ``before`` to ``after`` in per cent of ``before``."""
    if before is None or after is None or not before:
        return EMPTY
    change = 100 * (after / before - 1)
    text = fixed(change, 2 if -100 < change < -99 else 1, sign=True)
    return Cell(change, f"{text} %")


def shorten(text: str, width: int) -> str:
    """The text with its middle left out when it is longer than ``width``; the end of a name tells most.

    >>> shorten("backbone.stage3.block5.conv2.weight", 20)
    'backbon…conv2.weight'
    """
    if len(text) <= width:
        return text
    head = (width - 1) * 2 // 5
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def _minus(text: str) -> str:
    return text.replace("-", "−")
