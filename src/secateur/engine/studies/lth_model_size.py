"""Ticket search at several model sizes: how often it succeeds, what it gains, and how much of that is luck.

Sahu, Mitheran & Mahapatra, Not All Lotteries Are Made Equal, arXiv:2206.08175 (workshop). A trial is iterative
magnitude pruning with rewinding to the beginning; it succeeds when a sparse round is at least as accurate as the dense
network, and its gain is the best round's accuracy less the dense one's. The authors call the share of successes the
difficulty of the search, although a high share means an easy one.

Both figures take a maximum over rounds, which is above the dense accuracy by luck alone, and more so for small
networks, whose accuracies vary more. So :func:`null` repeats the dense training with other orders of the data and takes
the same maximum, and :class:`Trial` can choose its round on validation data. The null is ours. One budget is not the
same convergence at every size. The paper's rounds, shares and epochs are unverified, and no code of the authors is
known; accuracies are per cent here.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core import streams
from secateur.core.errors import BudgetError, DataError, UsageError
from secateur.core.files import read_tensors, write_tensors
from secateur.core.masks import Masks
from secateur.core.names import Named, parameters
from secateur.engine.folder import clean
from secateur.engine.recipe import TrainStep
from secateur.engine.studies.rewind import Scope, Way, fewer, train_from, train_to
from secateur.probes._statistics import wilson

Judge = Callable[[nn.Module], float]
"""The accuracy of a network, per cent."""


@dataclass(frozen=True)
class Budget:
    """What every size is given.

    Args:
        rounds: prunings, or dense trainings more than one.
        share: of what is left that each prunes.
        steps: optimizer steps of each training.
        options: of each training.
    """

    rounds: int
    share: float
    steps: int
    options: TrainStep


@dataclass(frozen=True)
class Trial:
    """What one search found.

    Args:
        accuracies: of the dense network and after each round, on test data.
        densities: share of the prunable weights that were left; parameters of BatchNorm are not among them.
        chosen: accuracies on validation data, to choose the round by; test data chooses where there are none.
        lengths: of the trajectory of each training (:func:`trajectory_length`).
        budget: what was spent.
        collapsed: a layer would have lost all of its weights, so that later rounds failed; they stay in all counts.

    Raises:
        DataError: when the lists differ in length, are empty, or hold what is not finite.
    """

    accuracies: tuple[float, ...]
    densities: tuple[float, ...]
    chosen: tuple[float, ...] = ()
    lengths: tuple[float, ...] = ()
    budget: Budget | None = None
    collapsed: bool = False

    def __post_init__(self) -> None:
        n = len(self.accuracies)
        if not n or any(len(found) not in (0, n) for found in (self.chosen, self.lengths)) or len(self.densities) != n:
            raise DataError(
                f"a trial with {n} accuracies, {len(self.densities)} densities, {len(self.chosen)} accuracies to "
                f"choose by and {len(self.lengths)} lengths; give one of each a round, or none of the last two."
            )
        if not all(map(math.isfinite, (*self.accuracies, *self.chosen))):
            raise DataError(f"accuracies {self.accuracies} of a trial are not all finite.")

    @property
    def rounds(self) -> int:
        """Prunings that were planned."""
        return self.budget.rounds if self.budget else len(self.accuracies) - 1

    @property
    def best(self) -> float:
        """Test accuracy of the best round, the dense network among them."""
        by = self.chosen or self.accuracies
        return self.accuracies[max(range(len(by)), key=lambda i: by[i])]

    @property
    def gain(self) -> float:
        """Of the best round over the dense network, points."""
        return self.best - self.accuracies[0]

    def matches(self, tolerance: float = 0.0) -> bool:
        """Whether a sparse round comes within ``tolerance`` points of the dense accuracy, chosen as :attr:`best` is.

        Raises:
            UsageError: when no round was planned.
        """
        if not self.rounds:
            raise UsageError("a trial with 0 rounds can neither succeed nor fail; plan at least 1 round.")
        sparse = range(1, len(self.accuracies))
        by = self.chosen or self.accuracies
        best = max(sparse, key=lambda i: by[i], default=0)
        return bool(best) and self.accuracies[best] >= self.accuracies[0] - tolerance

    def sparsest(self, tolerance: float = 0.0) -> float | None:
        """Least density of a round whose test accuracy comes within ``tolerance`` of the dense one; None: no round."""
        fine = [
            density
            for density, accuracy in zip(self.densities[1:], self.accuracies[1:], strict=True)
            if accuracy >= self.accuracies[0] - tolerance
        ]
        return min(fine, default=None)


@dataclass(frozen=True)
class Success:
    """Share of trials that match the dense network, with Wilson's 95 % interval."""

    matched: int
    trials: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """``matched / trials``."""
        return self.matched / self.trials


@dataclass(frozen=True)
class Summary:
    """One size.

    Args:
        success: with tolerance 0.
        within: with a tolerance of one standard deviation of the dense accuracies.
        tolerance: that deviation, points; 0 for a single trial.
        gain: mean of the trials' gains, points.
        collapsed: trials that lost a layer.
    """

    success: Success
    within: Success
    tolerance: float
    gain: float
    collapsed: int


def summary(trials: Sequence[Trial], unequal: bool = False) -> Summary:
    """Success and gain of one size.

    Raises:
        UsageError: for no trials, trials without rounds, or budgets that differ, unless ``unequal`` allows these.
    """
    check_budgets(trials, unequal)
    dense = [trial.accuracies[0] for trial in trials]
    tolerance = statistics.stdev(dense) if len(dense) > 1 else 0.0
    gain = statistics.fmean(trial.gain for trial in trials)
    lost = sum(trial.collapsed for trial in trials)
    return Summary(success(trials), success(trials, tolerance), tolerance, gain, lost)


def success(trials: Sequence[Trial], tolerance: float = 0.0) -> Success:
    """How many trials match the dense network; trials that collapsed count too.

    Raises:
        UsageError: for no trials, or trials without rounds.
    """
    if not trials:
        raise UsageError("no trials; give at least one.")
    matched = sum(trial.matches(tolerance) for trial in trials)
    return Success(matched, len(trials), *wilson(matched, len(trials)))


def check_budgets(trials: Sequence[Trial], unequal: bool = False) -> None:
    """Refuse trials of unequal budgets: what differs would not be the size alone.

    Raises:
        UsageError: naming both budgets.
    """
    for trial in trials:
        if not unequal and trial.budget != trials[0].budget:
            raise UsageError(
                f"trials of unequal budgets, {trials[0].budget} and {trial.budget}; give every size the same, or say "
                "`unequal=True`."
            )


def trajectory_length(points: Sequence[Named]) -> float:
    """Sum of the Euclidean distances from each point to the next, in float64; a lower bound between the points.

    Args:
        points: parameters by name, in the order of training.
    """
    pairs = zip(points, points[1:], strict=False)
    return math.fsum(math.sqrt(sum(_square(a[n], b[n]) for n in a)) for a, b in pairs)


def search(
    model: nn.Module,
    way: Way,
    folder: Path,
    judge: Judge,
    *,
    rounds: int,
    share: float = 0.2,
    scope: Scope = "layer",
    chooser: Judge | None = None,
    masks: Masks | None = None,
    points: int = 1,
) -> Trial:
    """One trial: train, prune the smallest of what is left, set the rest back to the beginning, again.

    The networks are those of :func:`secateur.engine.studies.rewind.prune_and_rewind`, in folders of the same names.

    Args:
        model: the network at its initial weights; it stays as it is.
        way: how each round is trained.
        folder: finished rounds there are read.
        judge: accuracy on test data, per cent.
        rounds: prunings.
        share: of what is left that each round prunes.
        scope: of each tensor, or of all together.
        chooser: accuracy on validation data.
        masks: what may be pruned.
        points: of each training after its beginning between which its length is measured, equally far apart.

    Raises:
        UsageError: for fewer than one point, more points than steps, or a share out of range.
        SecateurError: as those functions.

    Cost: ``rounds + 1`` trainings and judgements.
    """
    if not 1 <= points <= way.steps:
        raise UsageError(f"{points} points of a training of {way.steps} steps; take 1 to {way.steps}.")
    if not 0 <= share < 1:
        raise UsageError(f"share={share!r} must be at least 0 and below 1; write `share = 0.2`.")
    masks = masks or Masks.dense(model, way.step.only, way.step.skip)
    start = folder / "start-0"
    train_to(copy.deepcopy(model), way, start, 0, masks)
    rows: list[tuple[float, float, float, float]] = []
    collapsed = False
    for number in range(rounds + 1):
        net, length = _followed(start, model, way, folder / f"round-{number}", masks, points)
        rows.append((judge(net), masks.kept / masks.total, chooser(net) if chooser else 0.0, length))
        try:
            masks = fewer(net, masks, share, scope) if number < rounds else masks
        except BudgetError:  # a layer would lose all of its weights: the rounds that are left have failed
            collapsed = True
            break
    accuracies, densities, chosen, lengths = (tuple(map(float, column)) for column in zip(*rows, strict=True))
    budget = Budget(rounds, share, way.steps, way.step)
    return Trial(accuracies, densities, chosen if chooser else (), lengths, budget, collapsed)


def null(model: nn.Module, ways: Sequence[Way], folder: Path, judge: Judge, *, chooser: Judge | None = None) -> Trial:
    """The same network trained densely again and again: what a search finds by luck.

    Args:
        model: the network at its initial weights; it stays as it is.
        ways: the first as in the search, the others with other orders of the data: as many as a search has trainings.
        folder: finished trainings there are read; the first one may be that of a search, ``round-0``.
        judge: accuracy on test data, per cent.
        chooser: accuracy on validation data.

    Raises:
        UsageError: for no ways.
        SecateurError: as :func:`secateur.engine.studies.rewind.train_to`.

    Cost: as many trainings as there are ways.
    """
    if not ways:
        raise UsageError("no ways to train; give as many as a search has trainings.")
    accuracies, chosen = [], []
    for number, way in enumerate(ways):
        net = copy.deepcopy(model)
        train_to(net, way, folder / f"order-{number}")
        accuracies.append(judge(net))
        chosen += [chooser(net)] if chooser else []
    budget = Budget(len(ways) - 1, 0.0, ways[0].steps, ways[0].step)
    return Trial(tuple(accuracies), (1.0,) * len(ways), tuple(chosen), (), budget)


def rank_correlation(
    sizes: Mapping[int, Sequence[Trial]],
    figure: Callable[[Sequence[Trial]], float],
    *,
    draws: int = 1000,
    level: float = 0.9,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Spearman's correlation of a figure with the number of parameters, and its bootstrap interval.

    Args:
        sizes: trials by number of parameters.
        figure: of the trials of one size, such as ``lambda trials: summary(trials).gain``.
        draws: resamples; each draws the trials of every size with replacement.
        level: of the percentile interval.
        seed: of the draws.

    Returns:
        The correlation and both ends; draws in which all sizes have the same figure count as 0.

    Raises:
        UsageError: for fewer than two sizes, a size without trials, or a level out of range.
    """
    if len(sizes) < 2 or not all(sizes.values()):
        raise UsageError(f"a correlation over {len(sizes)} sizes; give at least two, each with trials.")
    counts, parts = [float(size) for size in sizes], list(sizes.values())

    def correlation(drawn: Sequence[Sequence[Any]]) -> float:
        return _spearman(counts, [figure(trials) for trials in drawn])

    return correlation(parts), *resampled(parts, correlation, draws, level, seed)


def resampled(
    parts: Sequence[Sequence[Any]],
    figure: Callable[[Sequence[Sequence[Any]]], float],
    draws: int = 1000,
    level: float = 0.9,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap of a figure of several samples (of trials, say), each drawn by itself with replacement.

    Raises:
        UsageError: for a level that is not between 0 and 1, or fewer than one draw.
    """
    if not 0 < level < 1 or draws < 1:
        raise UsageError(f"a level of {level!r} from {draws} draws; take a level between 0 and 1 and at least 1 draw.")
    random, found = streams.stream(seed, "bootstrap", "trials"), []
    for _ in range(draws):
        index = [torch.randint(len(part), (len(part),), generator=random).tolist() for part in parts]
        found.append(figure([[part[i] for i in chosen] for part, chosen in zip(parts, index, strict=True)]))
    ends = torch.tensor(found, dtype=torch.float64).quantile(
        torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    )
    return float(ends[0]), float(ends[1])


def _followed(
    start: Path, model: nn.Module, way: Way, place: Path, masks: Masks, points: int
) -> tuple[nn.Module, float]:  # fmt: skip
    """The trained network, and the length of its way; the points on it are kept as files, so it can be stopped."""
    marks = [round(i * way.steps / points) for i in range(points + 1)]
    for mark in marks[:-1]:
        file = place / f"step-{mark}.safetensors"
        if not file.is_file():
            net = train_from(start, model, way, place, masks, at=mark)
            write_tensors(file, {name: clean(p.detach()) for name, p in parameters(net).items()})
    net = train_from(start, model, way, place, masks)
    passed = [read_tensors(place / f"step-{mark}.safetensors")[0] for mark in marks[:-1]]
    return net, trajectory_length([*passed, {name: p.detach().cpu() for name, p in parameters(net).items()}])


def _square(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).square().sum())


def _spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Of ranks with ties at their mean; 0 where one side is constant."""
    a, b = (torch.tensor(side, dtype=torch.float64) for side in (one, other))
    ranks = [(v[:, None] > v).sum(1) + ((v[:, None] == v).sum(1) - 1) / 2 for v in (a, b)]
    a, b = (r.double() - r.double().mean() for r in ranks)
    spread = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / spread if spread else 0.0
