"""Points by network and data: means over seeds, the dense reference, and which settings nothing else beats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from secateur.engine.comparing_summary import statistics
from secateur.report.points import COSTS, Point
from secateur.report.recipes import telling
from secateur.report.sections import Number


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed only.

    Args:
        method: what pruned, told apart from other curves of the group.
        target: what was asked for.
        points: the runs.
        accuracy: mean, and half of Student's 95 % interval over seeds (None for one), as
            :func:`secateur.engine.comparing_summary.statistics` gives them.
        change: the same of the differences from the dense network; None when unknown.
        costs: means by the names in ``COSTS``.
        control: drawn in grey.
    """

    method: str
    target: str
    points: tuple[Point, ...]
    accuracy: Mapping[str, Any]
    change: Mapping[str, Any] | None
    costs: Mapping[str, Number]
    control: bool

    @property
    def called(self) -> str:
        """Method and target."""
        return f"{self.method} at {self.target}" if self.target else self.method


@dataclass(frozen=True)
class Group:
    """All settings of one network and one data set.

    Args:
        title: ``"lenet_300_100 on mnist"``, told apart from other groups.
        settings: in the order in which they were found.
        dense: statistics of the dense networks' accuracies; None when none is known.
        dense_costs: means of their costs.
        fronts: by cost, the settings that no other one, nor the dense network, beats in both accuracy and cost.
        machines: what the times were taken on.
    """

    title: str
    settings: tuple[Setting, ...]
    dense: Mapping[str, Any] | None
    dense_costs: Mapping[str, Number]
    machines: tuple[str, ...]
    fronts: Mapping[str, tuple[Setting, ...]] = field(default_factory=dict)

    @property
    def axes(self) -> list[str]:
        """Costs known of some setting and not the same for all networks."""
        return [name for name in COSTS if len(self.values(name)) > 1]

    def values(self, name: str) -> set[Number]:
        """All values of a cost, that of the dense network among them."""
        found = [setting.costs[name] for setting in self.settings if name in setting.costs]
        return {*found, *([self.dense_costs[name]] if found and name in self.dense_costs else [])}


def grouped(points: Sequence[Point]) -> list[Group]:
    """Groups in the order in which their first runs come; those without a pruned run are left out."""
    found: dict[tuple[str, str, Number | None], list[Point]] = {}
    for point in points:
        found.setdefault((point.network, point.data, point.params), []).append(point)
    found = {key: mine for key, mine in found.items() if any(not point.is_dense for point in mine)}
    names = [(network, data) for network, data, _ in found]
    groups = []
    for (network, data, params), mine in found.items():
        size = f" ({params:,.0f} parameters)" if params is not None and names.count((network, data)) > 1 else ""
        groups.append(_group(f"{network} on {data}{size}", mine))
    return groups


def _group(title: str, points: Sequence[Point]) -> Group:
    paired = _paired(points)
    names = _names(paired)
    settings: dict[str, list[Point]] = {}
    for point in paired:
        settings.setdefault(point.setting, []).append(point)
    made = tuple(_setting(mine, names[mine[0].curve]) for mine in settings.values())
    dense, costs = _dense(points)
    machines = tuple(dict.fromkeys(point.machine for point in points if point.machine))
    group = Group(title, made, statistics(dense) if dense else None, costs, machines)
    return replace(group, fronts={name: front(group, name) for name in group.axes})


def _paired(points: Sequence[Point]) -> list[Point]:
    """All but dense networks; those of a comparison with their differences from the dense network of their seed."""
    dense = {(p.origin, p.seed): p.accuracy for p in points if p.is_dense}
    found = []
    for point in points:
        beside = dense.get((point.origin, point.seed))
        if not point.is_dense:
            found.append(point if beside is None else replace(point, change=point.accuracy - beside, dense=beside))
    return found


def _names(points: Sequence[Point]) -> dict[str, str]:
    """How each curve is called: its method, and where methods of one name differ, in what."""
    curves: dict[str, dict[str, str]] = {}
    for point in points:
        curves.setdefault(point.method, {}).setdefault(point.curve, point.home)
    names: dict[str, str] = {}
    for method, mine in curves.items():
        own = [curve for curve, home in mine.items() if not home]
        told = dict(zip(own, telling(own), strict=True))
        taken: set[str] = set()
        for curve, home in mine.items():
            more = home if home and len(mine) > 1 else told.get(curve, "")
            name = f"{method} ({more})" if more else method
            while name in taken:
                name += "′"
            taken.add(name)
            names[curve] = name
    return names


def _setting(points: Sequence[Point], method: str) -> Setting:
    changes = [point.change for point in points if point.change is not None]
    costs = {}
    for name in COSTS:
        found = [point.costs[name][1] for point in points if name in point.costs]
        if found:
            costs[name] = _mean(found)
    first = points[0]
    return Setting(
        method, first.target, tuple(points), statistics([point.accuracy for point in points]),
        statistics(changes) if changes else None, costs, first.control,
    )  # fmt: skip


def _dense(points: Sequence[Point]) -> tuple[list[Number], dict[str, Number]]:
    """Accuracies of the dense networks, each counted once, and means of their costs."""
    accuracies: dict[tuple[str, int | None], Number] = {}
    costs: dict[str, list[Number]] = {}
    for point in points:
        value = point.accuracy if point.is_dense else point.dense
        if value is not None:
            accuracies.setdefault((point.origin, point.seed), value)
        for name, (dense, own) in point.costs.items():
            known = own if point.is_dense else dense
            if known is not None:
                costs.setdefault(name, []).append(known)
    return list(accuracies.values()), {name: _mean(found) for name, found in costs.items()}


def front(group: Group, name: str) -> tuple[Setting, ...]:
    """The Pareto front of a group by one cost, from the cheapest on.

    A setting is on it when nothing that costs at most as much has a higher mean accuracy, and nothing of at least its
    accuracy costs less; the dense network counts among the others.

    Cost: one sort.
    """
    known = [setting for setting in group.settings if name in setting.costs]
    rivals = [(setting.costs[name], setting.accuracy["mean"]) for setting in known]
    if group.dense is not None and name in group.dense_costs:
        rivals.append((group.dense_costs[name], group.dense["mean"]))
    best = _staircase(rivals)
    return tuple(
        sorted(
            (setting for setting in known if (setting.costs[name], setting.accuracy["mean"]) in best),
            key=lambda setting: setting.costs[name],
        )
    )


def _staircase(places: Iterable[tuple[Number, Number]]) -> set[tuple[Number, Number]]:
    """Of pairs (cost, worth) those that no other one beats."""
    kept: set[tuple[Number, Number]] = set()
    highest = -math.inf
    for cost, worth in sorted(places, key=lambda place: (place[0], -place[1])):
        if worth > highest:
            kept.add((cost, worth))
            highest = worth
    return kept


def _mean(values: Sequence[Number]) -> Number:
    return math.fsum(values) / len(values)
