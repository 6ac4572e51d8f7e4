"""Figures of counts as HTML: histograms of kept and pruned things, and the frames that heat maps are drawn in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from secateur.report.numbers import count, number
from secateur.report.sections import Heat, Histogram, Number

WIDTH, HEIGHT, LOW = 480, 250, 130
LEFT, RIGHT, TOP, BOTTOM = 16, 12, 22, 40
_LEGEND = (
    '<ul class="legend"><li><svg viewBox="0 0 28 10" aria-hidden="true"><rect class="kept" width="28" height="10"/>'
    '</svg>kept</li><li><svg viewBox="0 0 28 10" aria-hidden="true"><rect class="pruned" width="28" height="10"/></svg>'
    "pruned</li></ul>"
)


def heat(chart: Heat) -> str:
    """A heat map's caption; the page's script draws the picture from the JSON in the page."""
    words = f"<h3>{escape(chart.title)}</h3><p>{' × '.join(map(str, chart.shape))}: {escape(chart.says)}</p>"
    return f'<figure class="heat"><figcaption>{words}</figcaption></figure>'


def histogram(chart: Histogram) -> str:
    """Bars of kept things upon those of pruned ones, and a line at each mark."""
    high = LOW if chart.small else HEIGHT
    bars = _Bars(chart, high)
    parts = [*bars.areas(), *bars.axis(), *bars.marks(), *([] if chart.small else bars.hovers())]
    label = escape(f"{chart.title}. {chart.says}", quote=True)
    body = f'<svg viewBox="0 0 {WIDTH} {high}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    kind = ' class="small"' if chart.small else ""
    head = f"<figcaption><h3>{escape(chart.title)}</h3><p>{escape(chart.says)}</p></figcaption>"
    return f"<figure{kind}>{head}{'' if chart.small else _LEGEND}{body}</figure>"


class _Bars:
    """Places of the parts of a histogram."""

    def __init__(self, chart: Histogram, high: Number) -> None:
        self.chart, self.foot = chart, high - BOTTOM
        self.ends = [math.log10(edge) for edge in chart.edges]
        self.most = max((a + b for a, b in zip(chart.kept, chart.pruned, strict=True)), default=0) or 1

    def across(self, value: Number) -> float:
        """Place of a logarithm."""
        low, high = self.ends[0], self.ends[-1]
        return LEFT + (value - low) / ((high - low) or 1.0) * (WIDTH - LEFT - RIGHT)

    def up(self, amount: Number) -> float:
        return self.foot - amount / self.most * (self.foot - TOP)

    def areas(self) -> list[str]:
        both = [a + b for a, b in zip(self.chart.kept, self.chart.pruned, strict=True)]
        return [
            f'<path class="{kind}" d="{self._area(lower, upper)}"/>'
            for kind, lower, upper in (
                ("pruned", [0] * len(both), self.chart.pruned),
                ("kept", self.chart.pruned, both),
            )
        ]

    def _area(self, lower: Sequence[Number], upper: Sequence[Number]) -> str:
        """Rectangles from ``lower`` to ``upper``, one a bin that holds something."""
        words = []
        for i, (foot, top) in enumerate(zip(lower, upper, strict=True)):
            if top > foot:
                left, right = self.across(self.ends[i]), self.across(self.ends[i + 1])
                high = max(0.6, self.up(foot) - self.up(top))
                words.append(
                    f"M{left:.1f} {self.up(foot):.1f}v{-high:.1f}h{max(0.5, right - left - 0.8):.1f}v{high:.1f}z"
                )
        return "".join(words)

    def axis(self) -> list[str]:
        parts = [f'<line class="axis" x1="{LEFT}" y1="{self.foot}" x2="{WIDTH - RIGHT}" y2="{self.foot}"/>']
        first, last = math.ceil(self.ends[0]), math.floor(self.ends[-1])
        every = max(1, -(-(last - first) // 6))
        for power in range(first, last + 1, every):
            at, text = self.across(power), f"10{_raised(power)}"
            parts.append(f'<line class="axis" x1="{at:.1f}" y1="{self.foot}" x2="{at:.1f}" y2="{self.foot + 4}"/>')
            parts.append(f'<text class="mid" x="{at:.1f}" y="{self.foot + 16}">{text}</text>')
        label = f"{self.chart.x}, logarithmic"
        return [*parts, f'<text class="mid" x="{WIDTH / 2:g}" y="{self.foot + 34}">{escape(label)}</text>']

    def marks(self) -> list[str]:
        parts = []
        for value, text in self.chart.marks:
            if not (value > 0 and self.ends[0] <= math.log10(value) <= self.ends[-1]):
                continue
            at = self.across(math.log10(value))
            side = "end" if at > 0.6 * WIDTH else ""
            place = at - 4 if side else at + 4
            parts.append(f'<line class="mark" x1="{at:.1f}" y1="{TOP - 12}" x2="{at:.1f}" y2="{self.foot}"/>')
            parts.append(f'<text class="small {side}" x="{place:.1f}" y="{TOP - 5}">{escape(text)}</text>')
        return parts

    def hovers(self) -> list[str]:
        parts = []
        for i, (kept, pruned) in enumerate(zip(self.chart.kept, self.chart.pruned, strict=True)):
            left, right = self.across(self.ends[i]), self.across(self.ends[i + 1])
            span = f"{number(self.chart.edges[i], 3)} to {number(self.chart.edges[i + 1], 3)}"
            told = escape(f"{self.chart.x} {span}\n{count(kept)} kept, {count(pruned)} pruned")
            box = f'x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{self.foot - TOP}"'
            parts.append(f'<rect class="hover" {box}><title>{told}</title></rect>')
        return parts


def _raised(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
