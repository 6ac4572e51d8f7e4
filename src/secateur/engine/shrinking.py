"""Removing units until a network costs what it may, in rounds: scores, surgery, statistics taken anew."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any

from torch import nn
from torch.optim import Optimizer

from secateur.core.errors import UsageError, nearest
from secateur.core.masks import Masks
from secateur.core.names import unwrap
from secateur.core.sockets import Criterion
from secateur.core.task import Task
from secateur.engine.recovering import normed, reestimate
from secateur.engine.removing import Choice, Removing, Way, below
from secateur.engine.undoing import Undo
from secateur.surgery.analysis import Analysis, Granularity, Row
from secateur.surgery.choosing import Goal, Scope
from secateur.surgery.costs import Costs
from secateur.surgery.scoring import Normalize
from secateur.surgery.shrink import Shrunk
from secateur.surgery.shrink import shrink as remove

__all__ = ["Round", "Thinned", "shrink", "thin"]

Between = Callable[[nn.Module, Optimizer | None], object]
Judge = Callable[[Task], Mapping[str, Any]]


@dataclass(frozen=True)
class Round:
    """One round of removal.

    Args:
        limit: what the network could cost after it, in the quantity of the target.
        cost: what it costs, counted anew.
        removed: units that went, by group.
        error: largest difference from the network before with the units zeroed, relative to its largest output.
        loss: mean loss right after the removal.
        recovered: and once the statistics of BatchNorm were taken anew; None where they were not.
    """

    limit: float
    cost: float
    removed: Mapping[str, int]
    error: float
    loss: float
    recovered: float | None


@dataclass(frozen=True)
class Thinned:
    """A network without the units that mattered least.

    Args:
        model: the smaller network: the one handed in, or a ``GraphModule`` where its forward writes sizes down.
        shrunk: the records of the surgery, one for each round that removed something.
        coverage: which slices of which tensors could go and why the others stay, before the first round.
        groups: units kept and all, by group of the first round.
        left: why groups stayed whole, by group.
        before: parameters, multiply-adds of one example, and bytes before.
        after: the same, counted anew on the smaller network.
        target: what was asked for.
        loss: mean loss before.
        rounds: what each round did.
        judged: what the judge read ``before`` and ``after`` the last statistics were taken anew; empty without either.
        notes: anything else that the user should know.
    """

    model: nn.Module
    shrunk: tuple[Shrunk, ...]
    coverage: tuple[Row, ...]
    groups: Mapping[str, tuple[int, int]]
    left: Mapping[str, str]
    before: Mapping[str, int]
    after: Mapping[str, int]
    target: str
    loss: float
    rounds: tuple[Round, ...]
    judged: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def rewritten(self) -> bool:
        """Whether the model is a ``GraphModule`` in the place of the user's class."""
        return any(one.rewritten for one in self.shrunk)

    def masks(self, masks: Masks) -> Masks:
        """Masks of the network before as masks of this one."""
        for one in self.shrunk:
            masks = one.masks(masks)
        return masks

    def to_json(self) -> dict[str, Any]:
        """Plain values, the whole coverage table among them."""
        groups = [{"name": name, "units": units, "kept": kept, "why": self.left.get(name, "")}
                  for name, (kept, units) in self.groups.items()]  # fmt: skip
        return {
            "target": self.target, "figures": {name: [n, self.after[name]] for name, n in self.before.items()},
            "groups": groups, "loss_before": self.loss, "rounds": [asdict(one) for one in self.rounds],
            "coverage": [asdict(row) for row in self.coverage], "rewritten": self.rewritten, "notes": list(self.notes),
            **({"recovered": {"steps": [{"step": "batchnorm", **self.judged}]}} if self.judged else {}),
        }  # fmt: skip

    def __str__(self) -> str:
        """Figures before and after, the loss, and a line for each group that lost units."""
        lines = [f"{name}: {n:,} -> {self.after[name]:,} ({self.after[name] / max(n, 1):.4g}x)"
                 for name, n in self.before.items()]  # fmt: skip
        last = (self.rounds[-1].loss, self.rounds[-1].recovered)
        lines.append("loss: " + " -> ".join(f"{x:.4g}" for x in (self.loss, *last) if x is not None))
        lines += [f"{name}: {kept:,} of {units:,} units" for name, (kept, units) in self.groups.items() if kept < units]
        return "\n".join([*lines, *self.notes])


def shrink(
    task: Task,
    to: str = "macs 0.5x",
    criterion: Criterion | None = None,
    *,
    granularity: Granularity = "heads",
    inexact: bool = False,
    scope: Scope = "global",
    minimum: int | float = 1,
    multiple: int = 1,
    normalize: Normalize | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    equal: Sequence[str] = (),
    rounds: int = 1,
    between: Between | None = None,
    optimizer: Optimizer | None = None,
    also: Sequence[nn.Module] = (),
    rewriting: bool = True,
    statistics: bool = True,
) -> Thinned:
    """Remove the units that matter least from the task's network, in place, until it costs what it may.

    Every removal is proved: the smaller network computes what the larger one does with the units zeroed.

    Args:
        task: network, loss (mean over examples) and data for scores and statistics. The first two examples of its
            first batch show surgery how the network is called.
        to: what it may cost, such as ``"macs 0.5x"``, ``"params 100k"``, ``"bytes 5MB"``, ``"units 0.7x"`` or
            ``"ms 3.5"``; a share is of the whole network as it is now.
        criterion: which weights matter; magnitude by default. :func:`secateur.surgery.how` says how their scores become
            scores of units.
        granularity: what units of attention are: ``"heads"``, or ``"dims"``, the same index in every head.
        inexact: let also those groups lose units whose removal changes the statistics of a normalisation.
        scope: compare scores over all groups (``"global"``), or take the same share of each ``"group"``.
        minimum: units that each group keeps: a whole number, or (in one round) a share below 1.
        multiple: let groups that lose units keep a multiple of so many slices.
        normalize: what the scores of a group are divided by, as for :func:`secateur.surgery.unit_scores`. By default
            ``"standard"`` for FLAP, ``"none"`` for estimates of the loss and scales of BatchNorm, else ``"mean"``.
        only: globs of groups that may lose units; groups are named in the coverage table.
        skip: globs of groups that stay whole.
        equal: globs; groups that match the same one keep equally many units.
        rounds: removals on the way; each leaves the same share of what the one before left, by scores taken anew.
        between: called with the network and the optimizer after every round but the last, for fine-tuning.
        optimizer: the one that goes on training; it gets the new parameters, and its state is sliced.
        also: averaged copies (EMA), edited alike.
        rewriting: take a ``GraphModule`` where the network's own forward cannot take the new sizes; dropout and
            BatchNorm act there as in evaluation mode. Without, such a network is refused.
        statistics: take the statistics of BatchNorm anew from the task's data after every round.

    Raises:
        UsageError: for unknown names, globs without a match, or options that contradict each other.
        BudgetError: when the target cannot be reached; the message has the best that can.
        ModelError: for a network that cannot be traced, without units that can go, or a removal that is not proved.
        SecateurError: whatever it is, nothing is changed then; but once ``between`` was called the network stays as the
            last whole round left it.

    Cost: for each round a trace, the criterion, the surgery (two copies of the network) and up to two passes over the
    data.

    Source: scoring, removing and fine-tuning in turn is the loop of arXiv:1611.06440.
    """
    choice = Choice(granularity, inexact, scope, minimum, multiple, normalize, only, skip, equal)
    return thin(
        task, to, criterion, choice, rounds=rounds, between=between, optimizer=optimizer, also=also,
        rewriting=rewriting, statistics=statistics,
    )  # fmt: skip


def thin(
    task: Task,
    to: str,
    criterion: Criterion | None,
    choice: Choice,
    *,
    rounds: int = 1,
    between: Between | None = None,
    optimizer: Optimizer | None = None,
    also: Sequence[nn.Module] = (),
    rewriting: bool = True,
    statistics: bool = True,
    base: Costs | None = None,
    judge: Judge | None = None,
    told: Callable[[Removing], object] | None = None,
    units: Mapping[str, Sequence[int]] | None = None,
) -> Thinned:
    """What :func:`shrink` does, for the steps of recipes too.

    Args:
        task: as there, like all arguments that are not named here.
        to: the target.
        criterion: which weights matter.
        choice: how units are chosen.
        rounds: removals on the way.
        between: fine-tuning between rounds.
        optimizer: the one that goes on training.
        also: averaged copies.
        rewriting: whether a graph may take the place of the network.
        statistics: whether statistics of BatchNorm are taken anew.
        base: the network that shares of the target are of; by default the one at hand.
        judge: reads the network before and after its last statistics are taken anew.
        told: hears what can go and what one round would remove, before anything is changed.
        units: exactly the units that go, by group, in one round; nothing is scored then.

    Raises:
        UsageError: for units that the network does not have.
        SecateurError: as :func:`shrink`.
    """
    check_rounds(rounds, choice.minimum)
    way = Way.of(task, to, criterion, choice, base)
    run = _Run(way, task, rounds, _Surgery(optimizer, also, rewriting), statistics, judge)
    run.plan(told, units)
    undo: Undo | None = Undo((task.model, *also), optimizer)
    try:
        for number in range(1, rounds + 1):
            run.round(number)
            if between is not None and number < rounds:
                undo = None
                between(run.task.model, optimizer)
        return run.result()
    except BaseException:
        if undo is not None:
            undo()
        raise


def check_rounds(rounds: int, minimum: int | float) -> None:
    """Refuse numbers that mean nothing, or something else in every round.

    Raises:
        UsageError: naming them.
    """
    if rounds < 1:
        raise UsageError(f"rounds is {rounds}; it must be at least 1.")
    if rounds > 1 and 0 < minimum < 1:
        raise UsageError(
            f"minimum is {minimum}, a share of what each of {rounds} rounds begins with; give a whole number of units."
        )


def _check_units(found: Analysis, units: Mapping[str, Sequence[int]]) -> None:
    """Refuse units that a network does not have.

    Raises:
        UsageError: naming the group.
    """
    sizes = {group.name: len(group) for group in found.groups}
    for name, gone in units.items():
        if name not in sizes:
            raise UsageError(f"no group of units is called {name!r}. {nearest(name, sizes)}")
        if len(set(gone)) != len(gone) or not all(0 <= unit < sizes[name] for unit in gone) or len(gone) >= sizes[name]:
            raise UsageError(f"units {sorted(gone)[:8]} cannot go from `{name}`, which has {sizes[name]:,}.")


@dataclass(frozen=True)
class _Surgery:
    """What goes with every removal."""

    optimizer: Optimizer | None
    also: Sequence[nn.Module]
    rewriting: bool

    def __call__(self, task: Task, plan: Removing, example: Any) -> Shrunk:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch's own ways when it copies a graph
            return remove(
                task.model, example, plan.units, analysis=plan.analysis, optimizer=self.optimizer, also=self.also,
                rewriting=self.rewriting,
            )  # fmt: skip


class _Run:
    """The rounds, and what they leave."""

    def __init__(
        self, way: Way, task: Task, rounds: int, surgery: _Surgery, statistics: bool, judge: Judge | None
    ) -> None:
        self.way, self.task, self.rounds, self.surgery = way, task, rounds, surgery
        self.statistics, self.judge = statistics, judge
        self.loss = task.mean_loss()
        self.found, self.costs = way.look(task)
        self.shrunk: list[Shrunk] = []
        self.records: list[Round] = []
        self.judged: dict[str, Mapping[str, Any]] = {}
        self.notes: list[str] = []
        self.hidden: int | float = 0
        """Units left in groups of one, which are no groups any more."""

    def plan(self, told: Callable[[Removing], object] | None, units: Mapping[str, Sequence[int]] | None) -> None:
        """Find out whether the target can be reached, before the first of the rounds that lead to it."""
        if units is None:
            self.scored = self.way.score(self.task, self.found)
            self.first = self.way.decide(self.found, self.costs, self.scored, self.way.first_goal())
        else:
            _check_units(self.found, units)
            self.scored, self.first = ({}, {}), Removing(self.found, self.costs, units)
        self.before = Removing(self.found, self.costs).figures()
        self.start = self._cost()
        self.limit = self.way.first_goal().limit(self.start)
        if told is not None:
            told(self.first)

    def round(self, number: int) -> None:
        """Score, choose, remove, and take statistics anew."""
        plan, limit = self.first, self._limit(number)
        if self.rounds > 1:
            scored = self.scored if number == 1 else self.way.score(self.task, self.found)
            goal = Goal(self.way.goal.quantity, limit - float(self.hidden), relative=False)
            plan = self.way.decide(self.found, self.costs, scored, goal)
        done = self._remove(plan)
        loss = self.task.mean_loss()
        recovered = self._recover(number == self.rounds)
        removed = {name: len(units) for name, units in plan.units.items()}
        self.records.append(Round(limit, float(self._cost()), removed, done.error if done else 0.0, loss, recovered))

    def _cost(self, units: Mapping[str, Sequence[int]] | None = None) -> int | float:
        found = self.costs.at(self.way.goal.quantity, self.costs.gone(self.costs.kept(units or {})))
        return found + self.hidden

    def _limit(self, number: int) -> float:
        """Limits fall by the same factor from round to round."""
        last = below(self.limit)
        if number == self.rounds or Fraction(self.start) <= self.limit:
            return last
        return float(self.start) * (last / float(self.start)) ** (number / self.rounds)

    def _remove(self, plan: Removing) -> Shrunk | None:
        if not any(len(units) for units in plan.units.values()):
            return None
        expected = self._cost(plan.units)
        done = self.surgery(self.task, plan, self.way.example)
        if done.rewritten:
            done.model.train(unwrap(self.task.model).training)
            self.task = replace(self.task, model=done.model)
            self.notes.append(
                f"the network's own forward cannot take the new sizes ({done.rewritten}); it goes on as a graph, in "
                "which dropout and BatchNorm act as in evaluation mode"
            )
        self.notes += done.notes
        self.shrunk.append(done)
        self.found, self.costs = self.way.look(self.task)
        if self.way.goal.quantity == "units":
            self.hidden += expected - self._cost()
        return done

    def _recover(self, last: bool) -> float | None:
        if not self.statistics or not normed(self.task.model):
            return None
        judge = self.judge if last else None
        before = judge(self.task) if judge else None
        reestimate(self.task)
        if judge and before is not None:
            self.judged = {"before": before, "after": judge(self.task)}
        return self.task.mean_loss()

    def result(self) -> Thinned:
        """The smaller network and its record."""
        groups = {name: units for name, (_, units) in self.first.groups().items()}
        gone = {name: sum(record.removed.get(name, 0) for record in self.records) for name in groups}
        if not self.shrunk:
            self.notes.append(f"the target `{self.way.goal}` holds already: nothing was removed")
        return Thinned(
            self.task.model, tuple(self.shrunk), self.first.analysis.rows,
            {name: (units - gone[name], units) for name, units in groups.items()}, self.first.left,
            self.before, Removing(self.found, self.costs).figures(), str(self.way.goal), self.loss,
            tuple(self.records), self.judged, tuple(dict.fromkeys(self.notes)),
        )  # fmt: skip
