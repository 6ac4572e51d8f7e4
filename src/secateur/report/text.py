"""Writes a report in the terminal: the same figures, fitted to its width."""

from __future__ import annotations

import textwrap

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from secateur.report import count_text, exhibit_text
from secateur.report.numbers import number, shorten
from secateur.report.sections import Cell, Chart, Column, Lines, Number, Report, Section, Series, Table

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII = str.maketrans({"−": "-", "–": "-", "×": "x", "…": "~", "·": "|", "µ": "u", "→": ">", "²": "2"})
NAME, WORDS, BLOCKS = 30, 160, 32


def show(report: Report, console: Console, brief: bool = False) -> None:
    """Print the report; ``brief`` stops after its first section, the verdict."""
    _say(console, report.title, "bold")
    _say(console, report.folder, "dim")
    for section in report.sections[: 1 if brief else None]:
        _section(section, console)
    if report.notes and not brief:
        _heading(console, "What is missing")
        for note in report.notes:
            _item(console, note)


def _section(section: Section, console: Console) -> None:
    _heading(console, section.title)
    _say(console, section.says)
    for line in section.more:
        _item(console, line)
    if section.table is not None:
        console.print(_grid(section.table, console))
    for chart in section.chart:
        _chart(chart, console)
    for line in count_text.lines(section.chart, _unicode(console)):
        _say(console, line)
    for line in exhibit_text.lines(section.gallery, section.explorer):
        _item(console, line)
    for caption, text in section.texts:
        _say(console, f"\n{caption}:", "bold")
        for line in text.rstrip().split("\n"):
            _say(console, f"  {line}")


def _heading(console: Console, title: str) -> None:
    console.print()
    _say(console, title, "bold underline")


def _item(console: Console, line: str) -> None:
    for i, part in enumerate(textwrap.wrap(line, max(20, console.width - 2))):
        _say(console, ("- " if i == 0 else "  ") + part)


def _say(console: Console, line: str, style: str = "") -> None:
    console.print(_fit(line, console, style), soft_wrap=False)


def _fit(line: str, console: Console, style: str = "") -> Text:
    """Plain text (brackets in a layer name are no markup), in characters that the terminal can show."""
    try:
        line.encode(console.encoding)
    except UnicodeEncodeError:
        line = line.translate(_ASCII).encode(console.encoding, "replace").decode(console.encoding)
    return Text(line, style=style, overflow="fold")


def _grid(table: Table, console: Console) -> Grid:
    shown = [i for i, column in enumerate(table.columns) if not column.wide]
    grid = Grid(box=box.SIMPLE_HEAD if _unicode(console) else box.ASCII2, pad_edge=False, show_footer=bool(table.total))
    for i in shown:
        column = table.columns[i]
        foot = _entry(table.total[i], column, i == 0, console) if table.total else ""
        grid.add_column(
            _fit(column.name, console),
            foot,
            justify="right" if column.numeric else "left",
            overflow="fold",
            no_wrap=column.numeric and len(shown) < 7,
        )
    for row in table.rows:
        grid.add_row(*(_entry(row[i], table.columns[i], i == 0, console) for i in shown))
    return grid


def _entry(cell: Cell, column: Column, first: bool, console: Console) -> Text:
    text = cell.text
    if first and " " not in text:
        text = shorten(text, NAME)  # of a name the end tells most
    elif not column.numeric:
        text = textwrap.shorten(text, WORDS, placeholder=" …")
    entry = _fit(text, console)
    return entry if not cell.span else entry.append("\n").append_text(_fit(cell.span, console, "dim"))


def _chart(chart: Chart, console: Console) -> None:
    """A line a curve; bars and dots are in the table already."""
    if not isinstance(chart, Lines):
        return
    _say(console, chart.title if chart.title == chart.says else f"{chart.title}: {chart.says}")
    if not _unicode(console):
        return
    for series in chart.series:
        values = _values(series)
        if len(values) > 1 and series.name != "pruning":
            _say(console, f"  {series.name:<20} {spark(values, BLOCKS)} {number(min(values))} to {number(max(values))}")


def _values(series: Series) -> list[Number]:
    """The heights of a curve; those of a stepped one at even distances, as its points stand only where it changes."""
    if not series.stepped or len(series.points) < 2:
        return [y for _, y in series.points]
    first, last = series.points[0][0], series.points[-1][0]
    places = [first + (last - first) * i / (BLOCKS - 1) for i in range(BLOCKS)]
    return [
        max((p for p in series.points if p[0] <= x + 1e-9), key=lambda p: p[0], default=series.points[0])[1]
        for x in places
    ]


def spark(values: list[Number], width: int) -> str:
    """Values as a row of blocks, at most ``width`` of them.

    >>> spark([0.0, 1.0, 2.0, 3.0], 4)
    '▁▃▆█'
    """
    every = -(-len(values) // width)
    means = [sum(group) / len(group) for group in (values[i : i + every] for i in range(0, len(values), every))]
    low, spread = min(means), (max(means) - min(means)) or 1.0
    return "".join(_BLOCKS[round((v - low) / spread * (len(_BLOCKS) - 1))] for v in means)


def _unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")
