"""What a report is made of: plain data that the page, the terminal and the JSON file write each in their way."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from secateur.report.densities import Overlay
from secateur.report.exhibits import Explorer, Gallery

Number = float | int
Value = Number | str | None


@dataclass(frozen=True)
class Cell:
    """One entry of a table.

    Args:
        value: what tables sort by and other programs read; None when unknown.
        text: what people read, already rounded, with its unit.
        low: lower end of the 95 % interval, in the unit of ``value``.
        high: upper end of it.
        span: the interval as text.
    """

    value: Value
    text: str
    low: Number | None = None
    high: Number | None = None
    span: str = ""


EMPTY = Cell(None, "–")
FEW = 8
"""Rows that an eye takes in without help."""


@dataclass(frozen=True)
class Column:
    """A column: its heading, whether it holds numbers, and whether only the wide page has room for it."""

    name: str
    numeric: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns; ``total`` is a last row that sorting leaves at the foot.

    A sortable table of more than a few rows, or one that asks for it, gets a box to filter its rows and a button that
    writes them as CSV.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    total: tuple[Cell, ...] = ()
    sortable: bool = False
    saved: bool = False

    @property
    def tools(self) -> bool:
        """Whether there are enough rows to look among, or some that are worth saving."""
        return self.sortable and (self.saved or len(self.rows) > FEW)


@dataclass(frozen=True)
class Series:
    """A curve: points ``(x, y)`` in order; ``stepped`` holds a value until the next, ``dots`` marks every point."""

    name: str
    points: tuple[tuple[Number, Number], ...]
    dots: bool = False
    stepped: bool = False


@dataclass(frozen=True)
class Lines:
    """A line chart.

    Args:
        title: what it shows.
        x: what runs along the bottom, with its unit.
        y: what runs up the side, with its unit.
        series: the curves.
        says: the same in one sentence, for those who cannot see it.
        marks: positions on the x axis where something happened, and what.
        low: lowest value of the y axis; from the points by default.
        high: highest value of it.
        equal: whether to draw the line on which x and y are equal.
        log: whether the y axis is logarithmic in any case; what is not above 0 then lies on its lower edge.
    """

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    says: str
    marks: tuple[tuple[Number, str], ...] = ()
    low: Number | None = None
    high: Number | None = None
    equal: bool = False
    log: bool = False


@dataclass(frozen=True)
class Bars:
    """A bar chart: one bar a name, from zero to ``values``; ``texts`` are the values as people read them."""

    title: str
    x: str
    names: tuple[str, ...]
    values: tuple[Number, ...]
    texts: tuple[str, ...]
    says: str
    high: Number | None = None


@dataclass(frozen=True)
class Dots:
    """Points on two logarithmic axes of one range, beside the line on which both values are equal.

    Args:
        title: what it shows.
        x: what runs along the bottom, with its unit.
        y: what runs up the side, with its unit.
        names: what each point is.
        points: ``(x, y)``, both positive.
        says: the same in one sentence, for those who cannot see it.
        low: lower edge of the shaded band, as a ratio ``y / x`` below 1.
        high: upper edge of it, above 1.
    """

    title: str
    x: str
    y: str
    names: tuple[str, ...]
    points: tuple[tuple[Number, Number], ...]
    says: str
    low: Number
    high: Number


@dataclass(frozen=True)
class Ranged:
    """A curve whose points ``(x, y, low, high)`` have intervals; without one ``low`` and ``high`` are None.

    A ``control`` is drawn in grey in every chart, so that colours are left for what is compared with it. ``names`` says
    what each point is, where that is more than the curve's name; ``loose`` points have no line through them.
    """

    name: str
    points: tuple[tuple[Number, Number, Number | None, Number | None], ...]
    control: bool = False
    names: tuple[str, ...] = ()
    loose: bool = False


@dataclass(frozen=True)
class Tradeoff:
    """Curves with intervals over a logarithmic x axis, beside the level of something without an x.

    Args:
        title: what it shows.
        x: what runs along the bottom; its values are ratios.
        y: what runs up the side, with its unit.
        series: the curves.
        says: the same in one sentence, for those who cannot see it.
        low: lowest value of the y axis, so that several charts can share one.
        high: highest value of it.
        fine: y is in per cent, and finer towards 100: equal distances are equal ratios of what is missing from 100.
        level: name of the level.
        band: its value, and the ends of its interval.
        amounts: whether the values of x are amounts instead of ratios.
        front: points that no other one beats, ``(x, y, name)``, from the lowest x on.
        choice: charts of a section with different choices take each other's place: the page shows one at a time.
    """

    title: str
    x: str
    y: str
    series: tuple[Ranged, ...]
    says: str
    low: Number
    high: Number
    fine: bool = False
    level: str = ""
    band: tuple[Number, Number, Number] | None = None
    amounts: bool = False
    front: tuple[tuple[Number, Number, str], ...] = ()
    choice: str = ""


@dataclass(frozen=True)
class Heat:
    """A matrix of weights as cells, each with the exact number of kept weights in it.

    A cell holds ``tall`` rows and ``wide`` columns of the matrix (the last ones less), each crossing with ``depth``
    weights: 1 in a matrix, those of a kernel in a convolution.

    Args:
        title: the tensor.
        shape: of the tensor.
        height: rows of the matrix.
        width: columns of it.
        depth: weights where a row and a column cross.
        tall: rows of a cell.
        wide: columns of a cell.
        kept: kept weights in all.
        size: bytes of a count, 1, 2, 4 or 8.
        data: counts of kept weights, cell by cell along the rows, little-endian and unsigned, in base64.
        profile: share of weights kept in equal parts of the rows, for where no picture can be drawn.
        says: the same in one sentence, for those who cannot see it.
    """

    title: str
    shape: tuple[int, ...]
    height: int
    width: int
    depth: int
    tall: int
    wide: int
    kept: int
    size: int
    data: str
    profile: tuple[Number, ...]
    says: str

    def counts(self) -> list[int]:
        """Kept weights of each cell, along the rows."""
        raw = base64.b64decode(self.data)
        return [int.from_bytes(raw[i : i + self.size], "little") for i in range(0, len(raw), self.size)]


@dataclass(frozen=True)
class Histogram:
    """Kept and pruned things by the logarithm of a figure.

    Args:
        title: what it shows.
        x: what runs along the bottom; its logarithm to base 10 is drawn.
        edges: ends of the bins, positive and ascending, one more than there are bins; a bin holds its lower end.
        kept: things kept in each bin.
        pruned: things pruned in each bin.
        says: the same in one sentence, for those who cannot see it.
        marks: figures at which a line stands, and what it means.
        small: one of many, drawn without labels of its bins.
    """

    title: str
    x: str
    edges: tuple[Number, ...]
    kept: tuple[int, ...]
    pruned: tuple[int, ...]
    says: str
    marks: tuple[tuple[Number, str], ...] = ()
    small: bool = False


Drawn = Lines | Bars | Dots | Tradeoff
Chart = Drawn | Heat | Histogram


@dataclass(frozen=True)
class Tile:
    """One figure to be seen first: what it is, its value, what it is compared with, and how to take it."""

    label: str
    text: str
    beside: str
    tone: str = ""


@dataclass(frozen=True)
class Section:
    """One part of a report.

    Args:
        title: its heading.
        says: what a reader should take from it, in one sentence.
        table: figures.
        chart: a picture of them; several when they share an x axis.
        source: names of the step folders the figures were read from.
        more: further sentences.
        tiles: figures to be seen first.
        texts: pieces to be copied as they are: caption and content.
        gallery: single examples.
        explorer: points to explore; the page alone can draw them.
        overlay: layers of two runs beside one another; the page alone can draw them.
    """

    title: str
    says: str
    table: Table | None = None
    chart: tuple[Chart, ...] = ()
    source: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    tiles: tuple[Tile, ...] = ()
    texts: tuple[tuple[str, str], ...] = ()
    gallery: Gallery | None = None
    explorer: Explorer | None = None
    overlay: Overlay | None = None


@dataclass(frozen=True)
class Report:
    """A whole report: its title, its sections in order, and what is missing and why."""

    title: str
    folder: str
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; NaN and infinity become strings, empty entries are left out."""
        return {"format": "secateur.report/1", **{f.name: _plain(getattr(self, f.name)) for f in fields(self)}}


def _plain(entry: Any) -> Any:
    if is_dataclass(entry) and not isinstance(entry, type):
        kind = {"kind": type(entry).__name__.lower()} if isinstance(entry, Chart) else {}
        table = {f.name: getattr(entry, f.name) for f in fields(entry)}
        return kind | {name: _plain(v) for name, v in table.items() if name in ("value", "text") or not _empty(v)}
    if isinstance(entry, tuple | list):
        return [_plain(item) for item in entry]
    if isinstance(entry, float) and not math.isfinite(entry):
        return str(entry)
    return entry


def _empty(value: Any) -> bool:
    return value is None or value is False or value in ((), "")
