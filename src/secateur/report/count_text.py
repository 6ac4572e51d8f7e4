"""Heat maps and histograms in the terminal: a row of blocks each."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.report.numbers import count, number, percent, shorten
from secateur.report.sections import Chart, Heat, Histogram, Number

MOST = 40
"""Tensors shown; all are in the page and its JSON."""
NAME, BLOCKS = 30, " ▁▂▃▄▅▆▇█"


def lines(charts: Sequence[Chart], blocks: bool = True) -> list[str]:
    """What the terminal shows of the counts among some charts; without ``blocks`` figures only."""
    heats = [chart for chart in charts if isinstance(chart, Heat)]
    found = ["From the first rows to the last, share of weights kept:"] if heats and blocks else []
    found += [_heat(chart, blocks) for chart in heats[:MOST]]
    if len(heats) > MOST:
        found.append(f"  and {len(heats) - MOST:,} tensors more, in the page")
    for chart in charts:
        if isinstance(chart, Histogram) and not chart.small:
            found += _histogram(chart, blocks)
    return found


def _heat(chart: Heat, blocks: bool) -> str:
    share = percent(100 * chart.kept / (chart.height * chart.width * chart.depth))
    picture = f"{bars(chart.profile):<24} " if blocks else ""
    return f"  {shorten(chart.title, NAME):<{NAME}} {picture}{share:>9}"


def _histogram(chart: Histogram, blocks: bool) -> list[str]:
    found = [f"{chart.title}: {chart.says}"]
    if blocks:
        ends = f"{number(chart.edges[0], 3)} to {number(chart.edges[-1], 3)}"
        for name, counts in (("kept", chart.kept), ("pruned", chart.pruned)):
            found.append(f"  {name:<8} {bars(counts)} {count(sum(counts))}, {chart.x} {ends}")
    return found


def bars(values: Sequence[Number]) -> str:
    """Values from 0 to the largest as blocks; what is not 0 is seen.

    >>> bars([0, 0.01, 0.5, 1])
    ' ▁▄█'
    """
    most = max(values, default=0) or 1
    return "".join(BLOCKS[max(int(value > 0), round(value / most * (len(BLOCKS) - 1)))] for value in values)
