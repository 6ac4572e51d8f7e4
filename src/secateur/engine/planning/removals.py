"""Plans that remove units first: channels, heads or blocks go, to a few levels; weights are chosen in what is left."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from secateur.core.errors import BudgetError, ModelError, SecateurError
from secateur.core.names import unwrap
from secateur.core.prunable import coverage
from secateur.core.task import Task
from secateur.criteria.taylor_filter import TaylorFilter
from secateur.engine.planning.carrying import digest_of, take_out
from secateur.engine.planning.planner import Planner, Planning
from secateur.engine.planning.plans import LayerPlan, Other, Removal
from secateur.engine.planning.rises import Rises
from secateur.engine.planning.sealing import data_of, masks_seal
from secateur.engine.planning.targets import Aim
from secateur.engine.planning.trying import Trial, accuracy
from secateur.engine.removing import Choice, Way, few
from secateur.surgery.analysis import Group
from secateur.surgery.blocks import block_influence, blocks

__all__ = ["plan_with_units"]

LEVELS = (0.85, 0.7, 0.55, 0.4)
"""Shares of the multiply-adds that removal leaves, where weights go too."""
ALONE = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
"""The same where only units go."""
FEWER = 4
"""Levels of whole blocks, where weights go too: one block less in each."""


@dataclass(frozen=True)
class _Level:
    """A network without some of its units (None: with all), and the plan for what is left."""

    task: Task
    removal: Removal | None
    plan: LayerPlan


def plan_with_units(task: Task, aim: Aim, how: Planning) -> LayerPlan:
    """The best plan of those that remove no unit and those that remove units first, to a few levels.

    Not separable, so not proven: each level is removed from a copy, its rise of the loss measured, and the plan for
    weights made in what is left, with what is left of the target.

    Raises:
        ModelError: when no unit of these kinds can go.
        BudgetError: when the target cannot be met even so.
        SecateurError: as for plans without removal.

    Cost: surgery and a plan without timing for each level; then a plan with everything for the best.
    """
    return _Search(task, aim, how).best()


class _Smaller(Planner):
    """A plan for a network without some units, with the target of the whole one.

    Shares of the time are of the whole network's: both files are called in turn.
    """

    def __init__(self, task: Task, aim: Aim, how: Planning, whole: Planner) -> None:
        self.whole = whole
        super().__init__(task, aim, how)

    @cached_property
    def goal(self) -> float:
        """The most that may be measured: what the target leaves of the whole network."""
        return self.whole.goal if self.aim.resource else super().goal

    @cached_property
    def ms_now(self) -> float:
        """Milliseconds of the whole network."""
        return self.whole.ms_now

    def trying(self) -> Trial:
        """A copy to prune, timed beside the whole network."""
        trial = super().trying()
        trial.beside = self.whole.trial
        return trial

    def _keep_pace(self) -> None:
        """The pace of the machine is told by the whole network."""
        whole = self.whole.cost
        if self.aim.quantity == "ms" and self.aim.relative and self.cost is not None and whole is not None:
            self.cost = self.cost.times(self.whole.ms_now / whole.now) if whole.now > 0 else self.cost


class _Search:
    """The levels of one target for one network."""

    def __init__(self, task: Task, aim: Aim, how: Planning) -> None:
        self.task, self.aim, self.how = task, aim, how
        if how.patterns:
            self.inner = replace(how, units=())
        else:  # no weight has an offer
            self.inner = replace(how, patterns=("unstructured",), units=(), rises=Rises((0.5,), {}), compare=False)
        self.whole = whole = Planner(task, aim, self.inner)
        self.loss, self.judge = whole.loss, whole.judge
        seen = sum(count for _, _, count in self.judge.batches()) if aim.resource else None
        rises = self.inner.rises if not how.patterns else None
        self.again = replace(
            self.inner, cost=None, rises=rises, tested=seen
        )  # levels are compared on the same examples
        self.inner = replace(self.inner, cost=whole.cost, rises=whole.rises, tested=seen)

    def best(self) -> LayerPlan:
        """The best level, with everything measured; the next best where the clock says that it falls short."""
        with self.whole.trying() as self.whole.trial:
            self.now = self.whole.figures_now()
            return self._best()

    def _best(self) -> LayerPlan:
        plain, failed = self.tried(self.task, self.aim, self.inner)
        levels = ([] if plain is None else [_Level(self.task, None, plain)]) + self.levels()
        levels.sort(key=self.worth)
        for level in levels:
            plan = level.plan
            if level.removal is not None and self.how.measure:
                found, why = self.tried(level.task, self.left(level.removal, level.task), self.again)
                failed = why or failed
                if found is None:
                    continue
                plan = found
            return self.told(level, plan, [other for other in levels if other is not level])
        kinds = " and ".join(self.how.units)
        raise BudgetError(f"{failed or f'{self.aim} cannot be met.'} Removing {kinds} first does not suffice either.")

    def levels(self) -> list[_Level]:
        """A copy for each level that surgery reaches, with the plan for what is left of the target."""
        made = []
        slow = self.aim.quantity == "accuracy"
        quick = replace(self.again, measure=slow, compare=False, timed=self.aim.quantity == "ms")
        for ladder in self.ladders():
            for removal in ladder:
                smaller = replace(self.task, model=copy.deepcopy(unwrap(self.task.model)))
                try:
                    gone = take_out(smaller, removal)
                except BudgetError:
                    break  # removal cannot leave less
                smaller = replace(smaller, model=gone.model)
                kept = {name: gone.groups.get(name, (1, 1)) for name in removal.groups}
                rise = replace(self.judge, model=gone.model).mean_loss() - self.loss
                done = replace(removal, groups=kept, rise=rise, units=gone.units)
                plan, _ = self.tried(smaller, self.left(done, smaller), quick)
                if plan is not None:
                    made.append(_Level(smaller, done, plan))
                    if not self.how.patterns and self.aim.resource:
                        break  # the first that meets the target has lost least
        return made

    def ladders(self) -> list[list[Removal]]:
        """What may go, from little to much: channels and heads together, and whole blocks."""
        found, kinds = [], tuple(kind for kind in self.how.units if kind != "depth")
        if kinds:
            groups = {name: (1, 1) for name in self.groups(kinds)}
            shares = LEVELS if self.how.patterns else ALONE
            found.append([Removal(f"macs {share:g}x", kinds, TaylorFilter(), groups, 0.0) for share in shares])
        if "depth" in self.how.units:
            order = self.blocks()
            most = min(len(order), FEWER if self.how.patterns else len(order))
            fewer = [tuple(order[: n + 1]) for n in range(most)]
            found.append([Removal(_less(b), ("depth",), TaylorFilter(), {}, 0.0, b) for b in fewer])
        return found

    def blocks(self) -> list[str]:
        """Residual blocks that can go, those first that change least of what passes through them.

        Raises:
            ModelError: when there is none.
        """
        every = blocks(unwrap(self.task.model), few(self.task))
        free = [block.path for block in every if block.residual and not block.why_not]
        inner = [path for path in free if not any(other.startswith(f"{path}.") for other in free)]
        left = coverage(self.task.model, self.how.only, self.how.skip).left_alone
        stay = [name for name, why in left.items() if why in ("skipped by name", "not named")]
        inner = [path for path in inner if not any(name.startswith(f"{path}.") for name in stay)]
        if not inner:
            raise ModelError("no residual block of this network can go; leave `depth` out of the patterns.")
        influence = block_influence(self.task, inner)
        return sorted(inner, key=lambda path: influence[path])

    def left(self, removal: Removal, smaller: Task) -> Aim | None:
        """What of the target is left after the removal; None when nothing is."""
        goal = self.aim
        if goal.resource:
            return goal
        spent = removal.rise if goal.quantity == "loss" else accuracy(self.task) - accuracy(smaller)
        return replace(goal, value=goal.value - spent) if spent < goal.value else None

    def worth(self, level: _Level) -> float:
        """What is to be small: the loss, or for targets of quality what the network takes."""
        figure = level.plan.figures.get("loss" if self.aim.resource else self.how.least)
        return float("inf") if figure is None or figure.forecast is None else figure.forecast

    def tried(self, task: Task, aim: Aim | None, how: Planning) -> tuple[LayerPlan | None, BudgetError | None]:
        """A plan for a level, or why there is none; shapes that no table knows are measured."""
        if aim is None:
            return None, None
        try:
            planner = _Smaller(task, aim, how, self.whole)
            made = planner.plan()
            return replace(made, masks=masks_seal(made, planner)), None
        except BudgetError as error:
            return None, error
        except SecateurError:
            if how.measure:
                raise
            return self.tried(task, aim, replace(how, measure=True))

    def told(self, level: _Level, plan: LayerPlan, rest: Sequence[_Level]) -> LayerPlan:
        """The plan with the figures of the network before the removal, and the levels that were not taken."""
        figures = {
            name: replace(figure, before=self.now[name].before) if name in self.now else figure
            for name, figure in plan.figures.items()
        }
        layers = plan.layers
        if not self.how.patterns:
            layers = tuple(replace(layer, why="only units may go") for layer in layers)
        return replace(
            plan, target=str(self.aim), patterns=(*self.how.patterns, *self.how.units), layers=layers, figures=figures,
            others=(*plan.others, *(self.other(one) for one in rest)), weights=digest_of(self.task.model),
            removal=level.removal, exact=False, data=data_of(self.task, self.how.seed),
        )  # fmt: skip

    def other(self, level: _Level) -> Other:
        """A level that was not taken."""
        gone = level.removal
        what = "no units removed" if gone is None else f"{' and '.join(gone.kinds)} to {gone.to} first"
        quantity = self.aim.quantity if self.aim.resource else self.how.least
        figure = level.plan.figures.get(quantity)
        reached = 0.0 if figure is None or figure.forecast is None else figure.forecast
        return Other(what, True, quantity, reached, (level.plan.figures["loss"].forecast or self.loss) - self.loss)

    def groups(self, kinds: Sequence[str]) -> tuple[str, ...]:
        """The groups of the kinds that may go, without tensors that are to stay as they are.

        Raises:
            ModelError: when there is none.
        """
        found = Way.of(self.task, "macs 0.5x", TaylorFilter(), Choice()).look(self.task)[0]
        left = coverage(self.task.model, self.how.only, self.how.skip).left_alone
        stay = {name for name, why in left.items() if why in ("skipped by name", "not named")}
        free = [group for group in found.groups if not group.inexact and not stay & {name for name, _ in group.tensors}]
        names = tuple(group.name for group in free if _kind(group) in kinds)
        if not names:
            there = " and ".join(sorted({_kind(group) for group in free})) or "none"
            asked = " or ".join(kinds)
            raise ModelError(
                f"no unit of this network can go as {asked}; of kinds that can go it has {there}. Leave that word "
                "out of the patterns."
            )
        return names


def _less(paths: Sequence[str]) -> str:
    return f"{len(paths)} block{'' if len(paths) == 1 else 's'} less"


def _kind(group: Group) -> str:
    """Heads take several slices each of the tensor that makes them; a channel takes one."""
    makes = next((index for (_, d), index in zip(group.tensors, group.index, strict=True) if d == 0), group.index[0])
    return "heads" if makes.shape[1] > 1 else "channels"
