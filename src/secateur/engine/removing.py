"""Which units of a network would go: what can, what it scores, and what a target takes. Changes nothing."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from secateur.core.choose import check_not_zero, scores_of
from secateur.core.errors import BudgetError, ModelError, UsageError, nearest
from secateur.core.masks import Masks
from secateur.core.names import aliases
from secateur.core.prunable import coverage
from secateur.core.sockets import Criterion, name_of
from secateur.core.task import Task, device_of
from secateur.criteria.magnitude import Magnitude
from secateur.engine import distributed
from secateur.engine.cautions import check_passes
from secateur.runtime.lower_export import quiet
from secateur.surgery.analysis import Analysis, Granularity, Group, analyse
from secateur.surgery.choosing import Goal, Scope, choose, parse_goal
from secateur.surgery.costs import Costs
from secateur.surgery.scoring import Normalize, how, unit_scores, unscored
from secateur.surgery.times import LayerTimes

_SHOWN = 4


@dataclass(frozen=True)
class Choice:
    """How units are chosen: arguments of :func:`secateur.engine.shrinking.shrink`, under the same names."""

    granularity: Granularity = "heads"
    inexact: bool = False
    scope: Scope = "global"
    minimum: int | float = 1
    multiple: int = 1
    normalize: Normalize | None = None
    only: Sequence[str] = ()
    skip: Sequence[str] = ()
    equal: Sequence[str] = ()

    @classmethod
    def of(cls, other: Any) -> Choice:
        """From anything with fields of these names, such as the step of a recipe."""
        return cls(**{f.name: getattr(other, f.name) for f in fields(cls)})


@dataclass(frozen=True)
class Removing:
    """What would be removed from a network as it is.

    Args:
        analysis: what can go.
        costs: what the network costs.
        units: the units that go, by group.
        left: why groups stay whole, by group.
    """

    analysis: Analysis
    costs: Costs
    units: Mapping[str, Sequence[int]] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)

    def figures(self) -> dict[str, int]:
        """Parameters, multiply-adds of one example, and bytes once the units are gone."""
        kept = self.costs.kept(self.units)
        return {"params": self.costs.params(kept), "macs": self.costs.macs(kept), "bytes": self.costs.bytes(kept)}

    def groups(self) -> dict[str, tuple[int, int]]:
        """Units kept and all, by group."""
        kept = self.costs.kept(self.units)
        return {group.name: (kept[group.name], len(group)) for group in self.analysis.groups}

    def brief(self) -> str:
        """How much can go, and which groups and tensors stay whole by reason; a line each."""
        free = [group for group in self.analysis.groups if group.name not in self.left]
        lines = [f"{sum(map(len, free)):,} units in {len(free)} {'group' if len(free) == 1 else 'groups'} can go"]
        for what, reasons in (("group", self.left), ("tensor", whole(self.analysis))):
            for why, names in by_reason(reasons).items():
                stay = f"1 {what} stays" if len(names) == 1 else f"{len(names)} {what}s stay"
                lines.append(f"{stay} whole ({why}): {_listed(names)}")
        for name, count in self.analysis.operators.items():
            lines.append(f"{name} is not known (met {count} times): what flows into it stays")
        return "\n".join(lines)

    def __str__(self) -> str:
        """The coverage in short, a line for each group, and the figures before and after."""
        groups = self.groups()
        width = max(map(len, groups), default=0)
        lines = [self.brief()]
        lines += [f"{name:<{width}}  {kept:>6,} of {size:>6,} units" for name, (kept, size) in groups.items()]
        before, after = Removing(self.analysis, self.costs).figures(), self.figures()
        return "\n".join([*lines, *(f"{n}: {before[n]:,} -> {after[n]:,}" for n in before)])


@dataclass
class Way:
    """A target and how it is reached; the same for all rounds.

    Args:
        choice: how units are chosen.
        goal: what the network may cost.
        criterion: which weights matter.
        example: inputs that show how the network is called.
        times: measured times of layers, for targets in milliseconds.
        base: what shares are of; None for the network that the first round begins with.
    """

    choice: Choice
    goal: Goal
    criterion: Criterion
    example: Any
    times: LayerTimes
    base: int | float | None = None
    named: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, task: Task, to: str, criterion: Criterion | None, choice: Choice, base: Costs | None = None) -> Way:
        """For a task; ``base`` is the network that shares are of (shares of units are of the network at hand).

        Raises:
            UsageError, BudgetError: when the target is not understood.
            DataError: when there is no example.
        """
        goal, whole = parse_goal(to), None
        if base is not None and goal.relative and goal.quantity != "units":
            whole = base.at(goal.quantity, base.gone({}))
        return cls(choice, goal, criterion or Magnitude(), few(task), LayerTimes(device_of(task.model)), whole)

    def look(self, task: Task) -> tuple[Analysis, Costs]:
        """What can go from the network as it is, and what it costs."""
        with quiet():  # torch warns of its own ways when it copies a graph
            found = analyse(task.model, self.example, self.choice.granularity)
        return found, Costs(found, self.times)

    def first_goal(self) -> Goal:
        """The goal for the network at hand."""
        return self.goal if self.base is None else Goal(self.goal.quantity, below(self.goal.limit(self.base)), False)

    def score(self, task: Task, found: Analysis) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Scores of units by group, and why the other groups stay whole.

        Raises:
            SecateurError: when a glob matches no group, no unit can go, or the criterion fails.
        """
        left = self._left(found)
        free = [group for group in found.groups if group.name not in left]
        if not free:
            raise ModelError(f"no unit of this network can go: {_why_none(found, left)}.")
        way = how(name_of(self.criterion))
        counted = {name for g in free for name, d in g.tensors if way["where"] == "all" or _makes(d, way["where"])}
        names = aliases(task.model)
        wanted = {n: p for n, p in coverage(task.model).prunable.items() if counted & set(names[n])}
        if not wanted:
            raise ModelError(f"no group has a weight that {name_of(self.criterion)} scores; use magnitude.")
        if "data-free" not in self.criterion.needs:
            check_passes(task, self.criterion)
        masks = Masks({name: torch.ones_like(p, dtype=torch.bool) for name, p in wanted.items()})
        raw = scores_of(self.criterion, task, masks)
        by = self.choice.normalize or _normalize(self.criterion)
        every = unit_scores(found, raw, **way, normalize=by, missing="leave")
        scores = {group.name: every[group.name] for group in free if group.name in every}
        check_not_zero(scores)
        without = unscored(found, raw, way["where"])
        return scores, left | {g.name: "not scored" for g in free if g.name in without}

    def decide(
        self, found: Analysis, costs: Costs, scored: tuple[dict[str, Tensor], dict[str, str]], goal: Goal
    ) -> Removing:
        """The units that go for a goal; the same in all processes.

        Raises:
            BudgetError: when the goal cannot be met, with the best that can and what stays whole.
        """
        choice, (scores, left) = self.choice, scored
        present = [glob for glob in choice.equal if glob not in self.named or _matching(found, glob)]
        try:
            units = choose(found, scores, goal, costs, scope=choice.scope, minimum=choice.minimum,
                           multiple=choice.multiple, equal=present)  # fmt: skip
        except BudgetError as error:
            if not left:
                raise
            raise BudgetError(f"{error} Groups that stay whole: {_reasons(left)}.") from error
        self.named |= set(choice.equal)
        return Removing(found, costs, _agreed(units), left)

    def _left(self, found: Analysis) -> dict[str, str]:
        """Groups that may not lose units. A group of one unit is none any more: globs must match in the first round."""
        skip, only = self.choice.skip, self.choice.only
        for glob in (*only, *skip):
            if glob not in self.named and not _matching(found, glob):
                raise UsageError(f"no group matches {glob!r}. {nearest(glob, [g.name for g in found.groups])}")
            self.named.add(glob)
        left = {}
        for group in found.groups:
            if _named(group, skip):
                left[group.name] = "skipped by name"
            elif only and not _named(group, only):
                left[group.name] = "not named"
            elif group.inexact and not self.choice.inexact:
                left[group.name] = f"inexact ({', '.join(group.inexact)})"
        return left


def survey(task: Task, to: str, criterion: Criterion | None, choice: Choice, base: Costs | None = None) -> Removing:
    """What would be removed in one round; changes nothing.

    Raises:
        SecateurError: as :func:`secateur.engine.shrinking.shrink`.
    """
    way = Way.of(task, to, criterion, choice, base)
    found, costs = way.look(task)
    return way.decide(found, costs, way.score(task, found), way.first_goal())


def few(task: Task, count: int = 2) -> Any:
    """The inputs of the first examples of a task's data, on the network's device."""
    return _few(next(iter(task.batches()))[0], count)


def reference(model: nn.Module, task: Task, granularity: Granularity = "heads") -> Costs:
    """What another network costs, called as that of a task: what shares of a target may be of."""
    example = few(task)
    with quiet():
        return Costs(analyse(model, example, granularity))


def below(limit: Fraction) -> float:
    """The nearest float that is not more."""
    near = float(limit)
    return near if Fraction(near) <= limit else math.nextafter(near, -math.inf)


def whole(found: Analysis) -> dict[str, str]:
    """Why tensors stay whole in all their dimensions."""
    free = {row.tensor for row in found.rows if row.units}
    rows = sorted((row for row in found.rows if row.tensor not in free), key=lambda row: row.size == 1)
    reasons: dict[str, str] = {}
    for row in rows:
        reasons.setdefault(row.tensor, row.why)
    return reasons


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Names by reason."""
    found: dict[str, list[str]] = {}
    for name, why in reasons.items():
        found.setdefault(why, []).append(name)
    return found


def _few(inputs: Any, count: int) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[:count] if inputs.dim() else inputs
    if isinstance(inputs, Mapping):
        return {key: _few(value, count) for key, value in inputs.items()}
    return tuple(_few(value, count) for value in inputs) if isinstance(inputs, tuple | list) else inputs


def _makes(d: int, where: str) -> bool:
    return (d == 0) == (where == "producers")


def _named(group: Group, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(group.name, glob) for glob in globs)


def _matching(found: Analysis, glob: str) -> bool:
    return any(_named(group, (glob,)) for group in found.groups)


def _normalize(criterion: Criterion) -> Normalize:
    """What makes the scores of groups comparable; estimates of the loss, and scales of BatchNorm, are already."""
    name = name_of(criterion)
    if name == "flap":
        return "standard"
    return "none" if name == "bn_scale" or criterion.needs & {"gradients", "hessian"} else "mean"


def _agreed(units: dict[str, list[int]]) -> dict[str, list[int]]:
    """The first process's choice, in all of them."""
    if distributed.world() == 1:
        return units
    told: list[Any] = [units]
    dist.broadcast_object_list(told, 0)
    return told[0]


def _why_none(found: Analysis, left: Mapping[str, str]) -> str:
    if left:
        return f"all groups stay whole, {_reasons(left)}. Name fewer, or let inexact ones go too"
    return f"{_reasons(whole(found)) or 'it has no parameter'}; `str(secateur.surgery.analyse(model, x))` has the table"


def _reasons(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{why}: {_listed(names)}" for why, names in list(by_reason(reasons).items())[:_SHOWN])


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
