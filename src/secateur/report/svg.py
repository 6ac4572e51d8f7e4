"""Line, bar and dot charts as inline SVG. Colours come from the page's style sheet, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from secateur.report.numbers import number, shorten, tick
from secateur.report.scale import Scale
from secateur.report.sections import Bars, Dots, Drawn, Lines, Number, Series, Tradeoff

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 14, 40
LABELS = 150
PITCH = 17
# Beyond so many bars names would no longer fit; the bars then stand upright and tell their names when pointed at.
UPRIGHT = 40
HOVERS = 48
STYLES = 4
DECADES = 12
DODGE = 2.5


def figure(chart: Drawn) -> str:
    """A chart with its caption, its legend and a text alternative."""
    legend = ""
    if isinstance(chart, Lines):
        body, legend = _lines(chart), _legend(chart)
    elif isinstance(chart, Tradeoff):
        body, legend = _tradeoff(chart), _tradeoff_legend(chart)
    else:
        body = _dots(chart) if isinstance(chart, Dots) else _bars(chart)
    says = f"<p>{escape(chart.says)}</p>"
    choice = chart.choice if isinstance(chart, Tradeoff) else ""
    choice = f' data-choice="{escape(choice, quote=True)}"' if choice else ""
    return f"<figure{choice}><figcaption><h3>{escape(chart.title)}</h3>{says}</figcaption>{legend}{body}</figure>"


def _svg(height: Number, title: str, says: str, parts: Sequence[str]) -> str:
    label = escape(f"{title}. {says}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _text(x: Number, y: Number, text: str, kind: str = "", title: str = "") -> str:
    more = f' class="{kind}"' if kind else ""
    full = f"<title>{escape(title)}</title>" if title else ""
    return f'<text x="{_at(x)}" y="{_at(y)}"{more}>{escape(text)}{full}</text>'


def _line(x1: Number, y1: Number, x2: Number, y2: Number, kind: str) -> str:
    return f'<line class="{kind}" x1="{_at(x1)}" y1="{_at(y1)}" x2="{_at(x2)}" y2="{_at(y2)}"/>'


def _box(kind: str, x: Number, y: Number, width: Number, height: Number, title: str) -> str:
    """A rectangle that tells its title when pointed at; never too thin to be seen."""
    size = f'width="{_at(max(0.5, width))}" height="{_at(max(0.5, height))}"'
    return f'<rect class="{kind}" x="{_at(x)}" y="{_at(y)}" {size}><title>{escape(title)}</title></rect>'


def _at(place: Number) -> str:
    return f"{place:.1f}".removesuffix(".0")


def _legend(chart: Lines) -> str:
    """What each curve is; drawn as the curves are, dashes included."""
    swatches = []
    for i, series in enumerate(chart.series):
        dot = f'<circle class="dot s{i % STYLES}" cx="14" cy="5" r="3.5"/>'
        line = f'<line class="curve s{i % STYLES}" x1="1" y1="5" x2="27" y2="5"/>'
        swatches.append((dot if _loose(series) else line, series.name))
    if chart.marks:
        swatches.append(('<line class="mark" x1="14" y1="0" x2="14" y2="10"/>', "pruning step"))
    entries = (f'<li><svg viewBox="0 0 28 10" aria-hidden="true">{s}</svg>{escape(name)}</li>' for s, name in swatches)
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _loose(series: Series) -> bool:
    """Whether a series is points without a line: those that lie on another curve."""
    return series.name == "pruning"


def _lines(chart: Lines) -> str:
    points = [p for s in chart.series for p in s.points]
    xs = [x for x, _ in points] + [x for x, _ in chart.marks]
    low, high = min(xs), max(xs)
    if low > 0 and low < 0.1 * high:
        low = 0.0
    across = Scale(low - (low == high) * 0.5, high + (low == high) * 0.5, LEFT, WIDTH - RIGHT)
    up = Scale.over([y for _, y in points], HEIGHT - BOTTOM, TOP, chart.low, chart.high)
    if chart.log:
        up = _powers([y for _, y in points if y > 0])
    parts = [*_frame(across, up, chart.x, chart.y + (", logarithmic" if up.log else "")), *_marks(chart, across)]
    if chart.equal:
        ends = max(across.low, up.low), min(across.high, up.high)
        parts.append(_line(across(ends[0]), up(ends[0]), across(ends[1]), up(ends[1]), "mark"))
    for i, series in enumerate(chart.series):
        parts += _curve(series, i % STYLES, across, up)
    return _svg(HEIGHT, chart.title, chart.says, [*parts, *_hovers(chart, across)])


def _powers(values: Sequence[Number]) -> Scale:
    """An upward scale of powers of ten, with room for positive values and, on its lower edge, for what is not."""
    values = values or (1.0,)
    low, high = (round_(math.log10(v)) for round_, v in ((math.floor, min(values)), (math.ceil, max(values))))
    high = min(max(high, low + 1, DECADES - 300), 308)
    return Scale(10.0 ** max(low, high - DECADES) / 2, 10.0**high, HEIGHT - BOTTOM, TOP, True)


def _frame(across: Scale, up: Scale, x: str, y: str) -> list[str]:
    parts = []
    for value in up.ticks():
        place = up(value)
        parts += [_line(LEFT, place, WIDTH - RIGHT, place, "grid"), _text(LEFT - 6, place + 4, tick(value), "end")]
    for value in across.ticks():
        place = across(value)
        parts += [
            _line(place, HEIGHT - BOTTOM, place, HEIGHT - BOTTOM + 4, "axis"),
            _text(place, HEIGHT - BOTTOM + 16, tick(value), "mid"),
        ]
    parts.append(_line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, x, "mid"))
    return [
        *parts,
        f'<text transform="translate(11 {(HEIGHT - BOTTOM + TOP) / 2:g}) rotate(-90)" class="mid">{escape(y)}</text>',
    ]


def _marks(chart: Lines, across: Scale) -> list[str]:
    parts = []
    for x, what in chart.marks:
        place = across(x)
        parts.append(_line(place, TOP, place, HEIGHT - BOTTOM, "mark"))
        if len(chart.marks) <= 6:
            parts.append(
                _text(place + 3, TOP - 4, what.partition(":")[0], "small end" if place > WIDTH - 70 else "small")
            )
    return parts


def _curve(series: Series, style: int, across: Scale, up: Scale) -> list[str]:
    places = [(across(x), up(y)) for x, y in series.points]
    parts = []
    if len(places) > 1 and not _loose(series):
        parts.append(f'<path class="curve s{style}" d="{_path(places, series.stepped)}"/>')
    if series.dots or len(places) == 1:
        radius = 3 if len(places) <= 30 else 2
        parts += [f'<circle class="dot s{style}" cx="{_at(x)}" cy="{_at(y)}" r="{radius}"/>' for x, y in places]
    return parts


def _path(places: Sequence[tuple[Number, Number]], stepped: bool) -> str:
    words, before = [], None
    for x, y in places:
        if before is None:
            words.append(f"M{_at(x)} {_at(y)}")
        elif stepped:
            words += [f"H{_at(x)}", *([f"V{_at(y)}"] if y != before else [])]
        else:
            words.append(f"L{_at(x)} {_at(y)}")
        before = y
    return "".join(words)


def _hovers(chart: Lines, across: Scale) -> list[str]:
    """Invisible strips that tell the figures under the pointer."""
    xs = sorted({x for s in chart.series for x, _ in s.points} | {x for x, _ in chart.marks})
    every = -(-len(xs) // HOVERS)
    chosen = xs[::every]
    parts = []
    for i, x in enumerate(chosen):
        left = across.start if i == 0 else across((chosen[i - 1] + x) / 2)
        right = across.end if i + 1 == len(chosen) else across((x + chosen[i + 1]) / 2)
        upto = chosen[i + 1] if i + 1 < len(chosen) else math.inf
        told = [f"{chart.x} {number(x, 6).removesuffix('.00000')}" if x % 1 else f"{chart.x} {x:,.0f}"]
        for series in chart.series:
            found = [y for at, y in series.points if x <= at < upto]
            told += [f"{series.name} {number(found[0])}"] if found and not _loose(series) else []
        told += [what for at, what in chart.marks if x <= at < upto]
        parts.append(_box("hover", left, TOP, right - left, HEIGHT - TOP - BOTTOM, "\n".join(told)))
    return parts


def _dots(chart: Dots) -> str:
    values = [value for point in chart.points for value in point]
    low, high = (round_(math.log10(v)) for round_, v in ((math.floor, min(values)), (math.ceil, max(values))))
    high = min(max(high, low + 1, DECADES - 300), 308)  # powers of ten that a float can hold
    low = max(low, high - DECADES)
    across = Scale(10.0**low, 10.0**high, LEFT, WIDTH - RIGHT, True)
    up = Scale(10.0**low, 10.0**high, HEIGHT - BOTTOM, TOP, True)
    parts = [_band(chart, across, up), *_frame(across, up, chart.x, chart.y)]
    parts.append(_line(across.start, up.start, across.end, up.end, "mark"))
    radius = 3.5 if len(chart.points) <= 30 else 2.5
    for name, (x, y) in zip(chart.names, chart.points, strict=True):
        told = escape(f"{shorten(name, 80)}: {chart.x} {number(x)}, {chart.y} {number(y)}")
        kind = f"dot s{int(not chart.low <= y / x <= chart.high)}"
        place = f'cx="{_at(across(min(x, across.high)))}" cy="{_at(up(min(y, up.high)))}" r="{radius:g}"'
        parts.append(f'<circle class="{kind}" {place}><title>{told}</title></circle>')
    return _svg(HEIGHT, chart.title, chart.says, parts)


def _band(chart: Dots, across: Scale, up: Scale) -> str:
    """The part of the frame where ``y / x`` lies between two ratios, of which one is below and one above 1."""
    low, high = across.low, across.high
    corners = [
        (low, low), (low / chart.low, low), (high, high * chart.low),
        (high, high), (high / chart.high, high), (low, low * chart.high),
    ]  # fmt: skip
    path = "L".join(f"{_at(across(min(x, high)))} {_at(up(min(y, high)))}" for x, y in corners)
    return f'<path class="band" d="M{path}Z"/>'


def _bars(chart: Bars) -> str:
    return _upright(chart) if len(chart.names) > UPRIGHT else _lying(chart)


def _lying(chart: Bars) -> str:
    bottom = TOP + PITCH * len(chart.names)
    across = _bar_scale(chart, LABELS + 8, WIDTH - 68)
    parts = [_line(across(v), TOP, across(v), bottom, "grid") for v in across.ticks()]
    parts += [_text(across(v), bottom + 14, tick(v), "mid") for v in across.ticks()]
    zero = across(0)
    for i, (name, value, text) in enumerate(zip(chart.names, chart.values, chart.texts, strict=True)):
        y = TOP + PITCH * i
        left, right = sorted((zero, across(value)))
        parts.append(_text(LABELS, y + 12, shorten(name, 23), "end mono", name if len(name) > 23 else ""))
        parts.append(_box("bar", left, y + 2, right - left, PITCH - 5, f"{shorten(name, 80)}: {text}"))
        parts.append(_text(right + 5, y + 12, text, "small"))
    parts.append(_line(zero, TOP, zero, bottom, "axis"))
    parts.append(_text((LABELS + WIDTH - 60) / 2, bottom + 30, chart.x, "mid"))
    return _svg(bottom + 36, chart.title, chart.says, parts)


def _upright(chart: Bars) -> str:
    up = _bar_scale(chart, HEIGHT - BOTTOM, TOP)
    across = Scale(0.5, len(chart.names) + 0.5, LEFT, WIDTH - RIGHT)
    parts = _frame(across, up, "tensor, in the order of the network", chart.x)
    width = (WIDTH - RIGHT - LEFT) / len(chart.names)
    for i, (name, value, text) in enumerate(zip(chart.names, chart.values, chart.texts, strict=True), 1):
        top, foot = sorted((up(value), up(0)))
        label = f"{i}. {shorten(name, 80)}: {text}"
        parts.append(_box("bar", across(i) - 0.4 * width, top, 0.8 * width, foot - top, label))
    return _svg(HEIGHT, chart.title, chart.says, parts)


def _bar_scale(chart: Bars, start: Number, end: Number) -> Scale:
    values = [*chart.values, 0.0]
    return Scale(min(values), chart.high if chart.high is not None else max(values) or 1.0, start, end)


def _tradeoff(chart: Tradeoff) -> str:
    points = [point for series in chart.series for point in series.points]
    xs = [x for x, *_ in (*points, *chart.front)]
    least, most = min(xs), max(xs)
    across = Scale(least / 1.15, most * 1.15, LEFT, WIDTH - RIGHT, True)
    up = Upward(chart.low, chart.high, chart.fine)
    parts = [*_level(chart, up), *_ratio_frame(across, up, chart), *_front(chart, across, up)]
    kinds = _kinds(chart)
    for i, (series, kind) in enumerate(zip(chart.series, kinds, strict=True)):
        aside = (i - (len(kinds) - 1) / 2) * DODGE  # intervals at the same place stand beside one another
        places = [(across(x) + aside, up(y)) for x, y, *_ in series.points]
        if len(places) > 1 and not series.loose:
            parts.append(f'<path class="curve {kind}" d="{_path(places, False)}"/>')
        names = series.names or (series.name,) * len(places)
        for name, (x, y, low, high), (at, place) in zip(names, series.points, places, strict=True):
            told = f"{name}: {chart.y} {number(y)}, {chart.x} {number(x)}"
            if low is not None and high is not None:
                ends = up(max(low, chart.low)), up(min(high, chart.high))
                parts.append(_line(at, ends[0], at, ends[1], f"range {kind}"))
                parts += [_line(at - 3, end, at + 3, end, f"range {kind}") for end in ends]
                told += f", 95 % interval {number(low)} to {number(high)}"
            parts.append(_sign(kind, at, place, told))
    return _svg(HEIGHT, chart.title, chart.says, parts)


def _front(chart: Tradeoff, across: Scale, up: Upward) -> list[str]:
    """A broad stair behind the points that no other one beats, and rings around them."""
    if not chart.front:
        return []
    places = [(across(x), up(y)) for x, y, _ in chart.front]
    parts = [f'<path class="front" d="{_path([*places, (across.end, places[-1][1])], True)}"/>']
    for (x, y), (*_, name) in zip(places, chart.front, strict=True):
        told = f"<title>on the Pareto front: {escape(name)}</title>"
        parts.append(f'<circle class="ring" cx="{_at(x)}" cy="{_at(y)}" r="6.5">{told}</circle>')
    return parts


def _kinds(chart: Tradeoff) -> list[str]:
    """The style of each curve: a grey one for controls, a colour for the others."""
    greys, colours = (f"k{i % 3}" for i in range(99)), (f"s{i % STYLES}" for i in range(99))
    return [next(greys) if series.control else next(colours) for series in chart.series]


def _sign(kind: str, x: Number, y: Number, told: str = "") -> str:
    title = f"<title>{escape(told)}</title>" if told else ""
    if kind == "k2":
        return f'<rect class="dot k2" x="{_at(x - 3)}" y="{_at(y - 3)}" width="6" height="6">{title}</rect>'
    return f'<circle class="dot {kind}" cx="{_at(x)}" cy="{_at(y)}" r="3.2">{title}</circle>'


def _level(chart: Tradeoff, up: Upward) -> list[str]:
    if chart.band is None:
        return []
    middle, low, high = chart.band
    top, foot = up(min(high, chart.high)), up(max(low, chart.low))
    told = f"{chart.level}: {number(middle)}" + (
        f", 95 % interval {number(low)} to {number(high)}" if high > low else ""
    )
    return [
        _box("level", LEFT, top, WIDTH - RIGHT - LEFT, foot - top, told),
        _line(LEFT, up(middle), WIDTH - RIGHT, up(middle), "mark"),
    ]


@dataclass(frozen=True)
class Upward:
    """The y axis of a trade-off: linear, or finer towards 100."""

    low: Number
    high: Number
    fine: bool

    def __call__(self, value: Number) -> Number:
        """The place of a value."""
        if self.fine:
            return Scale(100 - self.high, 100 - self.low, TOP, HEIGHT - BOTTOM, True)(100 - value)
        return Scale(self.low, self.high, HEIGHT - BOTTOM, TOP)(value)

    def ticks(self) -> list[Number]:
        """Round values inside."""
        if not self.fine:
            return Scale(self.low, self.high, HEIGHT - BOTTOM, TOP).ticks()
        missing = [factor * 10.0**power for power in range(-2, 3) for factor in (1, 2, 5)]
        return [float(f"{100 - gap:.6g}") for gap in missing if 100 - self.high <= gap <= 100 - self.low]


def _ratio_frame(across: Scale, up: Upward, chart: Tradeoff) -> list[str]:
    """A frame whose x axis has round ratios."""
    ticks: list[Number] = []
    for factors in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9)):
        ratios = [factor * 10.0**power for power in range(-9, 16) for factor in factors]
        ticks = [ratio for ratio in ratios if across.low <= ratio <= across.high]
        if len(ticks) >= 4:
            break
    foot, parts, times = HEIGHT - BOTTOM, [], "" if chart.amounts else "×"
    for value in up.ticks():
        place = up(value)
        parts += [_line(LEFT, place, WIDTH - RIGHT, place, "grid"), _text(LEFT - 6, place + 4, tick(value), "end")]
    for value in ticks:
        place = across(value)
        parts += [_line(place, foot, place, foot + 4, "axis"), _text(place, foot + 16, tick(value) + times, "mid")]
    parts.append(_line(LEFT, foot, WIDTH - RIGHT, foot, "axis"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, f"{chart.x}, logarithmic", "mid"))
    turned = f"translate(11 {(foot + TOP) / 2:g}) rotate(-90)"
    label = chart.y + (", finer towards 100" if chart.fine else "")
    return [*parts, f'<text transform="{turned}" class="mid">{escape(label)}</text>']


def _dash(kind: str) -> str:
    return f'<line class="curve {kind}" x1="1" y1="5" x2="27" y2="5"/>'


def _tradeoff_legend(chart: Tradeoff) -> str:
    swatches = [
        (f"{'' if series.loose else _dash(kind)}{_sign(kind, 14, 5)}", series.name)
        for series, kind in zip(chart.series, _kinds(chart), strict=True)
    ]
    if chart.band is not None:
        box = '<rect class="level" x="1" y="1" width="26" height="8"/><line class="mark" x1="1" y1="5" x2="27" y2="5"/>'
        swatches.append((box, chart.level))
    if chart.front:
        stair = '<line class="front" x1="1" y1="5" x2="27" y2="5"/><circle class="ring" cx="14" cy="5" r="4"/>'
        swatches.append((stair, "Pareto front"))
    entries = (f'<li><svg viewBox="0 0 28 10" aria-hidden="true">{s}</svg>{escape(name)}</li>' for s, name in swatches)
    return f'<ul class="legend">{"".join(entries)}</ul>'
