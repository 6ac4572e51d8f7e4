"""Many runs on one page: accuracy against what the networks cost, by network and data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.report.densities import Carrier, Overlay
from secateur.report.groups import Group, Setting, grouped
from secateur.report.numbers import count_cell, fixed, many, number, percent, scaled_cell, shorten
from secateur.report.points import Gathered, Point
from secateur.report.sections import EMPTY, Cell, Column, Number, Ranged, Report, Section, Table, Tradeoff
from secateur.report.views.comparison import TOGETHER, limits

LISTED = 6
NEAR = 1.0
NAME = 60

# Name in sentences and on the axis, heading in tables, how a value is written.
AXES: dict[str, tuple[str, str]] = {
    "params": ("parameters kept", ""),
    "macs": ("effective MACs", ""),
    "disk": ("file on disk (B)", "B"),
    "packed": ("file, compressed (B)", "B"),
    "ms": ("time for one example (ms)", "ms"),
    "fast": ("time for one example, compiled (ms)", "ms"),
}
_HEADS = {
    "params": "Parameters kept", "macs": "Effective MACs", "disk": "File on disk", "packed": "File, compressed",
    "ms": "Time", "fast": "Time, compiled",
}  # fmt: skip

_BRIEF = {"params": "size", "macs": "MACs", "disk": "file", "packed": "zip", "ms": "ms", "fast": "compiled"}


def report(found: Gathered, places: Sequence[str]) -> Report:
    """The page of many runs; no network is loaded."""
    groups = grouped(found.points)
    runs = sum(len(setting.points) for group in groups for setting in group.settings)
    title = f"{many(runs, 'run')} compared: {shorten(', '.join(group.title for group in groups), 120)}"
    sections = [
        _summary(groups, runs),
        _overview(groups),
        *(part for group in groups for part in (_group(group), _figures(group))),
    ]
    sections += [_layers(found.points), _runs(groups), _reading(groups)]
    where = shorten(", ".join(map(str, places)), 200)
    return Report(title, where, tuple(s for s in sections if s is not None), found.notes)


def _summary(groups: Sequence[Group], runs: int) -> Section:
    settings = sum(len(group.settings) for group in groups)
    says = f"{many(runs, 'run')} in {many(settings, 'setting')}"
    says += f" of {len(groups)} networks or data sets." if len(groups) > 1 else f" of {groups[0].title}."
    return Section("Verdict", says, more=tuple(_told(group) for group in groups))


def _told(group: Group) -> str:
    """What a group comes to in a sentence or two."""
    best = max(group.settings, key=lambda setting: setting.accuracy["mean"])
    text = f"{group.title}: {_call(best)} has the highest mean accuracy, {percent(best.accuracy['mean'])}"
    if group.dense is None:
        return f"{text}; no dense network is among the runs."
    level = group.dense["mean"]
    text += f" (dense network {percent(level)})"
    near = [s for s in group.settings if "params" in s.costs and s.accuracy["mean"] >= level - NEAR]
    if not near:
        return f"{text}; none comes within {NEAR:g} point of the dense network."
    least = min(near, key=lambda setting: setting.costs["params"])
    figures = f"{_value('params', least.costs['params']).text} parameters and {percent(least.accuracy['mean'])}"
    return f"{text}; of those within {NEAR:g} point of the dense network, {_call(least)} keeps least: {figures}."


def _call(setting: Setting) -> str:
    return shorten(setting.called, NAME)


def _overview(groups: Sequence[Group]) -> Section | None:
    """Small multiples: a chart for each network."""
    if len(groups) < 2:
        return None
    charts = tuple(_cloud(group, name, group.title) for group in groups for name in group.axes)
    says = "A chart for each network and data set: all settings, and those on the Pareto front ringed."
    return Section("All networks", says, chart=charts) if charts else None


def _group(group: Group) -> Section:
    charts = [chart for name in group.axes for chart in _charts(group, name)]
    same = [name for name in AXES if len(group.values(name)) == 1]
    more = [_on_front(group, name) for name in group.axes]
    more += [f"No curve over {AXES[n][0]}: it is {_value(n, *group.values(n)).text} for all." for n in same]
    if len(group.machines) > 1 and "ms" in group.axes:
        more.append(f"Times were taken on different machines ({'; '.join(group.machines)}): compare them with care.")
    says = f"{many(len(group.settings), 'setting')}; a line is a method, a point the mean of the runs of one setting."
    return Section(group.title, says, chart=tuple(charts), more=tuple(more))


def _figures(group: Group) -> Section:
    says = "Each setting with the means of its runs; intervals are over seeds."
    return Section(f"{group.title}: figures", says, _table(group))


def _on_front(group: Group, name: str) -> str:
    """The Pareto front in words."""
    front = group.fronts[name]
    if not front:
        return f"Pareto front by {_bare(name)}: the dense network alone."
    parts = [f"{_call(s)} ({_value(name, s.costs[name]).text}, {percent(s.accuracy['mean'])})" for s in front[:LISTED]]
    rest = f" and {len(front) - LISTED} more" if len(front) > LISTED else ""
    return f"Pareto front by {_bare(name)}: {'; '.join(parts)}{rest}."


def _bare(name: str) -> str:
    return AXES[name][0].removesuffix(" (B)").removesuffix(" (ms)")


def _charts(group: Group, name: str) -> list[Tradeoff]:
    """All settings in one chart, then a few methods a chart."""
    curves = [curve for curve in _curves(group, name) if curve.points]
    controls = [curve for curve in curves if curve.control]
    others = [curve for curve in curves if not curve.control]
    charts = [] if len(others) <= TOGETHER else [_cloud(group, name, "All settings")]
    for begin in range(0, max(1, len(others)), TOGETHER):
        shown = others[begin : begin + TOGETHER]
        names = ", ".join(shorten(curve.name, 32) for curve in shown or controls)
        charts.append(_chart(group, name, names, (*controls, *shown)))
    return charts


def _curves(group: Group, name: str) -> list[Ranged]:
    """A curve a method; those with a setting on the front come first, so that they are seen together."""
    ahead = {setting.method for setting in group.fronts[name]}
    methods = dict.fromkeys(setting.method for setting in group.settings)
    curves = []
    for method in sorted(methods, key=lambda m: m not in ahead):
        mine = [s for s in group.settings if s.method == method and name in s.costs]
        mine.sort(key=lambda s: s.costs[name])
        points = tuple((s.costs[name], s.accuracy["mean"], *_ends(s.accuracy)) for s in mine)
        curves.append(Ranged(method, points, any(s.control for s in mine), tuple(shorten(s.called, 120) for s in mine)))
    return curves


def _cloud(group: Group, name: str, title: str) -> Tradeoff:
    known = sorted((s for s in group.settings if name in s.costs), key=lambda s: s.costs[name])
    points = tuple((s.costs[name], s.accuracy["mean"], None, None) for s in known)
    names = tuple(shorten(s.called, 120) for s in known)
    return _chart(group, name, title, (Ranged("all settings", points, True, names, True),))


def _chart(group: Group, name: str, title: str, curves: tuple[Ranged, ...]) -> Tradeoff:
    band = _band(group)
    low, high, fine = limits([curve for curve in _curves(group, name) if curve.points], band)
    front = tuple((s.costs[name], s.accuracy["mean"], shorten(s.called, 120)) for s in group.fronts[name])
    values = [point[1] for curve in curves for point in curve.points]
    says = f"Accuracy from {percent(min(values))} to {percent(max(values))} against {_bare(name)}."
    level = "dense network" if band is not None else ""
    return Tradeoff(
        title, AXES[name][0], "test accuracy (%)", curves, says, low, high, fine, level, band, True, front, _HEADS[name]
    )


def _band(group: Group) -> tuple[Number, Number, Number] | None:
    if group.dense is None:
        return None
    middle, (low, high) = group.dense["mean"], _ends(group.dense)
    return middle, middle if low is None else low, middle if high is None else high


def _ends(figure: Mapping[str, Any], bounded: bool = True) -> tuple[Number | None, Number | None]:
    """The ends of an interval; those of an accuracy lie between 0 and 100 %, those of a change need not."""
    if figure["half"] is None:
        return None, None
    low, high = figure["mean"] - figure["half"], figure["mean"] + figure["half"]
    return (max(0.0, low), min(100.0, high)) if bounded else (low, high)


def _value(name: str, value: Number | None) -> Cell:
    if value is None:
        return EMPTY
    unit = AXES[name][1]
    if unit == "ms":
        return Cell(value, f"{number(value, 3)} ms")
    return count_cell(value) if name == "params" else scaled_cell(value, unit)


def _table(group: Group) -> Table:
    shown = [name for name in AXES if group.values(name)]
    columns = [Column("Method"), Column("Target", wide=True), Column("Accuracy", True), Column("Change", True)]
    columns += [Column(_HEADS[name], True, name in ("disk", "packed", "fast")) for name in shown]
    columns += [Column("Pareto front by", wide=True), Column("Runs", True)]
    rows = []
    for setting in group.settings:
        fronts = [_BRIEF[name] for name in group.axes if setting in group.fronts[name]]
        rows.append(
            (
                Cell(setting.method, setting.method), Cell(setting.target, setting.target or EMPTY.text),
                _figure(setting.accuracy, False), _figure(setting.change, True),
                *(_value(name, setting.costs.get(name)) for name in shown),
                Cell(", ".join(fronts), ", ".join(fronts) or EMPTY.text),
                Cell(len(setting.points), str(len(setting.points))),
            )
        )  # fmt: skip
    total = _dense_row(group, shown)
    return Table(
        "One row a setting; figures in small print are 95 % intervals.",
        tuple(columns),
        tuple(rows),
        total,
        sortable=True,
    )


def _dense_row(group: Group, shown: Sequence[str]) -> tuple[Cell, ...]:
    if group.dense is None:
        return ()
    costs = (_value(name, group.dense_costs.get(name)) for name in shown)
    runs = Cell(group.dense["n"], str(group.dense["n"]))
    return (Cell("dense", "dense network"), EMPTY, _figure(group.dense, False), EMPTY, *costs, EMPTY, runs)


def _figure(figure: Mapping[str, Any] | None, change: bool) -> Cell:
    if figure is None:
        return EMPTY
    middle, (low, high) = figure["mean"], _ends(figure, not change)
    text = fixed(middle, sign=True) if change else percent(middle)
    if low is None or high is None:
        return Cell(middle, text)
    return Cell(middle, text, low, high, f"{fixed(low, sign=change)} to {fixed(high, sign=change)}")


def _layers(points: Sequence[Point]) -> Section | None:
    """Two runs to be chosen, their densities beside one another."""
    shown = [point for point in points if point.layers and not point.is_dense]
    if len(shown) < 2:
        return None
    lists: dict[tuple[str, ...], int] = {}
    runs = []
    for point in shown:
        place = lists.setdefault(tuple(point.layers), len(lists))
        kept = tuple(round(100 * kept / total, 4) for kept, total in point.layers.values())
        runs.append(Carrier(point.name, place, kept))
    says = "Where two runs keep their weights, tensor by tensor; choose any two."
    more = ("A tensor that lost units is counted against the dense network's, where the run tells its size.",)
    return Section("Layer densities", says, more=more, overlay=Overlay(tuple(lists), tuple(runs)))


def _runs(groups: Sequence[Group]) -> Section:
    columns = [Column("Run"), Column("Network and data"), Column("Method"), Column("Seed", True)]
    columns += [
        Column("Accuracy", True),
        Column("Change", True),
        *(Column(_HEADS[name], True, name != "params") for name in AXES),
    ]
    rows = tuple(
        _run(point, setting, group) for group in groups for setting in group.settings for point in setting.points
    )
    caption = "One row a run; figures in small print are 95 % intervals over test examples."
    return Section("Runs", "Every run by itself.", Table(caption, tuple(columns), rows, sortable=True))


def _run(point: Point, setting: Setting, group: Group) -> tuple[Cell, ...]:
    accuracy = Cell(point.accuracy, percent(point.accuracy))
    if point.span is not None:
        accuracy = Cell(point.accuracy, accuracy.text, *point.span, " to ".join(map(fixed, point.span)))
    return (
        Cell(point.name, point.name), Cell(group.title, group.title), Cell(setting.called, setting.called),
        EMPTY if point.seed is None else Cell(point.seed, str(point.seed)), accuracy,
        EMPTY if point.change is None else Cell(point.change, fixed(point.change, sign=True)),
        *(_value(name, point.costs[name][1] if name in point.costs else None) for name in AXES),
    )  # fmt: skip


def _reading(groups: Sequence[Group]) -> Section:
    more = [
        "Runs whose recipes differ in their seed alone are one setting. Its interval is Student's 95 % interval of the "
        "mean over its runs, cut off at 0 and 100 %; a setting with one run has none. Intervals in the table of runs "
        "are over test examples.",
        "On the Pareto front is a setting when nothing that costs at most as much has a higher mean accuracy, the "
        "dense network included. It goes by means: neighbours whose intervals overlap may change places with other "
        "seeds.",
        "Changes are in points, from the dense network of the same run or seed.",
        "Effective MACs are multiply-adds of one example without zero weights; ordinary kernels compute them all the "
        "same, so they are no times.",
    ]  # fmt: skip
    if any("ms" in group.axes for group in groups):
        more.append("Times are those of each run's own measurement; only times of one machine and moment compare well.")
    return Section("How to read it", "What the figures are and what they are not.", more=tuple(more))
