"""Which units go: those of the lowest score, until the network costs what it may."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

from secateur.core.errors import BudgetError, ModelError, UsageError, nearest
from secateur.surgery.analysis import Analysis, Group
from secateur.surgery.costs import Costs, Quantity

Scope = Literal["global", "group"]

_FORM = "`params 50%`, `macs 0.5x`, `units 0.7x`, `bytes 5MB`, `ms 3.5` or `latency 0.5x`"
_MANY = {"k": 10**3, "m": 10**6, "g": 10**9}
_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_UNITS: dict[str, dict[str, int | float]] = {
    "params": {**_MANY}, "macs": {**_MANY}, "units": {**_MANY}, "bytes": {**_BYTES},
    "ms": {"us": 1e-3, "ms": 1, "s": 1e3},
}  # fmt: skip


@dataclass(frozen=True)
class Goal:
    """What the network may cost.

    Args:
        quantity: ``"params"``, ``"macs"``, ``"bytes"``, ``"units"`` or ``"ms"``.
        value: the number.
        relative: whether it is a share of what the dense network costs: of all its parameters, not only of those that
            can go.
    """

    quantity: Quantity
    value: float
    relative: bool = True

    def limit(self, dense: int | float) -> Fraction:
        """The most that it may cost; shares are read as decimal numbers of twelve places."""
        return Fraction(f"{self.value:.12f}") * Fraction(dense) if self.relative else Fraction(self.value)

    def __str__(self) -> str:
        """As the user would type it."""
        return f"{self.quantity} {self.value:.12g}{'x' if self.relative else ''}"


def parse_goal(text: str) -> Goal:
    """A goal from the words a user types; a number below 1 without a unit is a share, except of milliseconds.

    >>> parse_goal("params 50%"), parse_goal("bytes 5MB"), parse_goal("ms 3.5")
    (Goal(quantity='params', value=0.5, relative=True), Goal(quantity='bytes', value=5000000.0, relative=False), \
Goal(quantity='ms', value=3.5, relative=False))

    Raises:
        UsageError: when the phrase is not understood.
        BudgetError: when the number is out of range.
    """
    phrase = " ".join(text.split()).lower()
    match = re.fullmatch(r"(\w+) (\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?|\.\d+)\s*(%|[a-z]*)", phrase)
    if not match:
        raise UsageError(f"the target {text!r} is not understood; write {_FORM}.")
    word, digits, unit = match.groups()
    quantity = "ms" if word == "latency" else word
    if quantity not in _UNITS:
        raise UsageError(f"the target {text!r} names no known quantity ({word!r}); write {_FORM}.")
    known = _UNITS[quantity]
    if unit and unit not in ("%", "x") and unit not in known:
        raise UsageError(f"the target {text!r}: {word} takes no unit {unit!r} but %, x, {', '.join(known)}.")
    number = float(digits.replace(",", ""))
    relative = unit in ("%", "x") or (not unit and number < 1 and quantity != "ms")
    number = number / 100 if unit == "%" else number * known.get(unit, 1)
    if not 0 < number < math.inf or (relative and number > 1):
        raise BudgetError(f"{text!r}: a share must be in (0, 1] and a number above 0; write {_FORM}.")
    return Goal(quantity, number, relative)  # type: ignore[arg-type]  # its keys are the quantities


def choose(
    analysis: Analysis,
    scores: Mapping[str, Tensor],
    to: Goal | str,
    cost: Costs | None = None,
    *,
    scope: Scope = "global",
    minimum: int | float = 1,
    multiple: int = 1,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    equal: Sequence[str] = (),
) -> dict[str, list[int]]:
    """The units that must go for the network to cost no more than it may; those of the lowest scores go first.

    With the last of them back the network costs more than it may: it is the shortest beginning of the order that
    reaches the target (for ``"ms"``, where wider can be faster, one such beginning). Equal scores go in the order of
    the groups. The network is not changed: pass the result to ``shrink``.

    Args:
        analysis: the groups.
        scores: float, shape ``(units,)``, higher = keep, by the name of the group; other groups stay whole.
        to: a goal, or the words for it. Shares are of the whole network's cost, or of all units of all groups.
        cost: what the network costs; pass the same one again to keep its measured times.
        scope: compare scores over all groups, or take the same share of each group.
        minimum: units that each group keeps: a whole number, or a share below 1 (rounded up). With 0 a group may go
            whole where other slices are left in each dimension that it has a part of.
        multiple: let groups that lose units keep a multiple of so many slices in the dimension they are named after.
        skip: globs of groups that stay whole.
        only: globs of groups; all others stay whole.
        equal: globs; the groups that match one of them keep the same number of units.

    Returns:
        The units to remove by group, ascending; empty when the target holds already.

    Raises:
        UsageError: for unknown names and options, globs without a match, and scores of another length.
        ModelError: for scores that are not finite.
        BudgetError: when the target cannot be met, with the best that can.

    Cost: a sort of the scores, and a question to ``cost`` for every doubling of their number.
    """
    goal = parse_goal(to) if isinstance(to, str) else to
    if scope not in get_args(Scope) or multiple < 1 or minimum < 0 or (minimum >= 1 and minimum != int(minimum)):
        raise UsageError(
            f"scope {scope!r}, minimum {minimum!r} and multiple {multiple!r}: scope is 'global' or 'group', minimum a "
            "whole number or a share below 1, multiple a whole number of at least 1."
        )
    cost = cost or Costs(analysis)
    if cost.analysis is not analysis:
        raise UsageError("these costs are those of another analysis; make them from this one.")
    groups = _candidates(analysis, scores, skip, only)
    plans = [_Plan.of(part, scores, minimum, multiple) for part in _parts(analysis, groups, equal)]
    order = _order(plans, scope)
    if not minimum:
        order = order[_allowed(analysis, plans, order)]
    places = {name: i for i, name in enumerate(cost.units)}

    def at(steps: int) -> int | float:
        gone = torch.zeros(len(places), dtype=torch.int64)
        for plan, taken in zip(plans, torch.bincount(order[:steps], minlength=len(plans)).tolist(), strict=True):
            for group in plan.groups:
                gone[places[group.name]] = plan.gone[taken]
        return cost.at(goal.quantity, gone)

    steps = _fewest(at, len(order), goal)
    taken = torch.bincount(order[:steps], minlength=len(plans)).tolist()
    return {
        group.name: sorted(ranked[: plan.gone[t]].tolist())
        for plan, t in zip(plans, taken, strict=True)
        for group, ranked in zip(plan.groups, plan.ranked, strict=True)
        if t
    }


def _fewest(at: Callable[[int], int | float], most: int, goal: Goal) -> int:
    """How many steps the target takes."""
    dense = at(0)
    limit = goal.limit(dense)
    if dense <= limit:
        return 0
    best = at(most)
    if best > limit:
        raise BudgetError(
            f"the target `{goal}` cannot be met: it allows {_told(float(limit))} {goal.quantity} and the dense network "
            f"has {_told(dense)}; without all units that may go {_told(best)} are left ({best / dense:.4g}x). "
            "Let more go with a lower minimum or multiple, or fewer groups skipped, or ask for less."
        )
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle) <= limit else (middle, high)
    return high


def _told(number: int | float) -> str:
    return f"{number:,.0f}" if number == int(number) else f"{number:,.4g}"


def _candidates(
    analysis: Analysis, scores: Mapping[str, Tensor], skip: Sequence[str], only: Sequence[str]
) -> list[Group]:
    """Groups that may lose units."""
    names = [group.name for group in analysis.groups]
    for glob in (*skip, *only):
        if not fnmatch.filter(names, glob):
            raise UsageError(f"no group matches {glob!r}. {nearest(glob, names)}")
    for name, score in scores.items():
        if len(analysis.group(name)) != score.numel() or score.dim() != 1:
            raise UsageError(
                f"group {name!r} has {len(analysis.group(name))} units, its scores have shape {tuple(score.shape)}."
            )
        if not bool(score.isfinite().all()):
            raise ModelError(
                f"{int((~score.isfinite()).sum())} of {score.numel()} scores of group {name!r} are NaN or infinite: "
                "its weights or the gradients there are not finite. Run `secateur doctor`, or leave the group out."
            )
    return [
        group
        for group in analysis.groups
        if group.name in scores and not _matches(group.name, skip) and (not only or _matches(group.name, only))
    ]


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _parts(analysis: Analysis, groups: Sequence[Group], equal: Sequence[str]) -> list[list[Group]]:
    """Groups that lose the same number, together; every other one by itself."""
    parts: list[list[Group]] = []
    free, held = {group.name for group in groups}, dict[str, str]()
    for glob in equal:
        part = [group for group in analysis.groups if fnmatch.fnmatchcase(group.name, glob)]
        if not part:
            raise UsageError(f"no group matches {glob!r}. {nearest(glob, [g.name for g in analysis.groups])}")
        for group in part:
            if group.name not in free:
                raise UsageError(
                    f"group {group.name!r} matches {glob!r} and stays whole (skipped, or without scores), so none of "
                    "the others could lose a unit; leave it out of `equal`, or let it lose units too."
                )
            if len(group) != len(part[0]):
                raise UsageError(
                    f"groups {part[0].name!r} of {len(part[0])} units and {group.name!r} of {len(group)} match "
                    f"{glob!r} and cannot lose equally many; name groups of one size."
                )
            if group.name in held:
                raise UsageError(f"group {group.name!r} matches {held[group.name]!r} and {glob!r}; name it once.")
            held[group.name] = glob
        parts.append(part)
    return [*parts, *([group] for group in groups if group.name not in held)]


@dataclass(frozen=True)
class _Plan:
    """The steps in which groups lose units together.

    Args:
        groups: which.
        ranked: for each its units, the lowest score first.
        gone: how many units are gone after each number of steps.
        scores: the mean score of the units of each step.
    """

    groups: list[Group]
    ranked: list[Tensor]
    gone: list[int]
    scores: Tensor

    @classmethod
    def of(cls, groups: list[Group], scores: Mapping[str, Tensor], minimum: int | float, multiple: int) -> _Plan:
        own = [scores[group.name].detach().double().cpu() for group in groups]
        ranked = [torch.argsort(score, stable=True) for score in own]
        units = len(groups[0])
        least = math.ceil(Fraction(f"{minimum:.12f}") * units) if minimum < 1 else int(minimum)
        each = math.lcm(*(multiple // math.gcd(multiple, _slices(group)) for group in groups))
        gone = [0, *(units - kept for kept in range(units - 1, least - 1, -1) if kept % each == 0)]
        ends = torch.tensor(gone)
        summed = torch.stack([s[r].cumsum(0) for s, r in zip(own, ranked, strict=True)]).mean(0)
        summed = torch.cat([summed.new_zeros(1), summed])[ends]
        means = summed.diff() / ends.diff()
        if each == 1:  # without the rounding of differences of sums
            means = torch.stack([s[r] for s, r in zip(own, ranked, strict=True)]).mean(0)[: len(gone) - 1]
        return cls(groups, ranked, gone, means)


def _slices(group: Group) -> int:
    """Slices of a unit in the dimension that the group is named after."""
    for (name, d), index in zip(group.tensors, group.index, strict=True):
        if group.name.partition("#")[0] in (name, f"{name}:{d}") and (d == 0 or ":" in group.name):
            return index.shape[1]
    return group.index[0].shape[1]


def _order(plans: Sequence[_Plan], scope: Scope) -> Tensor:
    """Which plan takes the next step, step by step; int64."""
    if not plans:
        return torch.zeros(0, dtype=torch.int64)
    ranks = [
        plan.scores if scope == "global" else torch.tensor(plan.gone[1:], dtype=torch.float64) / len(plan.groups[0])
        for plan in plans
    ]
    whose = torch.repeat_interleave(torch.arange(len(plans)), torch.tensor([len(rank) for rank in ranks]))
    return whose[torch.argsort(torch.cat(ranks), stable=True)]


def _allowed(analysis: Analysis, plans: Sequence[_Plan], order: Tensor) -> Tensor:
    """False at steps that would leave nothing of a dimension."""
    sharing: dict[tuple[str, int], set[str]] = {}
    covered: dict[tuple[str, int], int] = {}
    for group in analysis.groups:
        for place, index in zip(group.tensors, group.index, strict=True):
            sharing.setdefault(place, set()).add(group.name)
            covered[place] = covered.get(place, 0) + index.numel()
    whole = {place for place, n in covered.items() if n >= analysis.run.parameters[place[0]].shape[place[1]]}
    allowed = torch.ones(len(order), dtype=torch.bool)
    empty: set[str] = set()
    for p, plan in enumerate(plans):
        if plan.gone[-1] < len(plan.groups[0]):
            continue
        last = int((order == p).nonzero()[-1])
        allowed[last] = False
    for i in (~allowed).nonzero()[:, 0].tolist():  # the last steps, in their order
        plan = plans[int(order[i])]
        gone = empty | {group.name for group in plan.groups}
        places = {place for group in plan.groups for place in group.tensors}
        if not any(place in whole and sharing[place] <= gone for place in places):
            allowed[i], empty = True, gone
    return allowed
