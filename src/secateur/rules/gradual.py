"""Gradual: prune along a smooth schedule while training goes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secateur.core.allocations import Allocation, ByCost, Global
from secateur.core.budget import keep_for
from secateur.core.choose import broadcast, choose, keep_counts, reduce_scores, scores_of
from secateur.core.errors import BudgetError, ModelError, UsageError
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.patterns import NM, Pattern, Unstructured
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.run import Run
from secateur.core.schedules import Cubic, Levels, Schedule
from secateur.core.sockets import Criterion, Rule
from secateur.core.task import Task, device_of
from secateur.criteria.magnitude import Magnitude


@dataclass(frozen=True)
class Gradual(Rule):
    """Prune in many small rounds between two points of the run, so that training makes up for each of them.

    Round ``i = 0 .. updates`` leaves a sparsity of ``initial + (sparsity - initial) * schedule(i / updates)``
    over all tensors the masks cover, as an exact integer count. Rounds are a number, not an interval in steps,
    because a number fits short and long runs alike; rounds that fall on the same step are one.

    ``N:M`` patterns ramp by whole numbers: 2:4 passes through 3:4, and ``sparsity`` must be that of the pattern.
    Groups whose zeros were there before may keep fewer than ``N``. Blocks and output units round the count of
    kept weights down to whole ones.

    Args:
        sparsity: pruned / prunable weights at the end, in [0, 1).
        criterion: which weights matter.
        allocation: how the budget is shared out over tensors.
        pattern: which shapes zeros may take; every tensor the masks cover must be able to take it.
        schedule: how fast the sparsity rises.
        start: share of the run before the first round.
        stop: share of the run after which the target is reached; leave time to recover.
        updates: rounds between ``start`` and ``stop``. 100 to 1,000 steps between rounds are usual.
        initial: sparsity of the first round.
        regrow: let pruned weights return with the value they had when they were pruned, if their score
            has become high enough. Without it pruned weights stay pruned.
        examples: training examples for criteria that need data.

    Raises:
        BudgetError: for sparsities out of range, or a network that is sparser than the target already.
        UsageError: for other values out of range, or tensors that cannot take the pattern.

    Cost: ``updates`` times the criterion and a selection over its scores; with ``regrow`` memory of one more copy
    of the prunable weights.
    """

    paper = Paper(
        "To prune, or not to prune: exploring the efficacy of pruning for model compression",
        "Zhu, Gupta",
        2017,
        "arXiv:1710.01878",
        differs="one global threshold by default, the paper prunes each layer to the same sparsity (`uniform`); "
        "any criterion and pattern; state of the optimizer is cleared where weights are pruned",
    )

    sparsity: float = 0.9
    criterion: Criterion = field(default_factory=Magnitude)
    allocation: Allocation = field(default_factory=Global)
    pattern: Pattern = field(default_factory=Unstructured)
    schedule: Schedule = field(default_factory=Cubic)
    start: float = 0.0
    stop: float = 0.7
    updates: int = 50
    initial: float = 0.0
    regrow: bool = False
    examples: int = 512

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise BudgetError(f"gradual: sparsity is {self.sparsity!r}; it must be in [0, 1), 0.9 means 90 % zeros.")
        if not 0 <= self.initial <= self.sparsity:
            raise BudgetError(f"gradual: initial is {self.initial!r}; it must be in [0, {self.sparsity:g}].")
        if not 0 <= self.start < self.stop <= 1:
            raise UsageError(
                f"gradual: start is {self.start!r} and stop {self.stop!r}; they are shares of the run with "
                "0 <= start < stop <= 1, for example `start = 0.0`, `stop = 0.7`."
            )
        for name, count in (("updates", self.updates), ("examples", self.examples)):
            if count < 1:
                raise UsageError(f"gradual: {name} is {count!r}; it must be at least 1.")
        if isinstance(self.allocation, ByCost):
            raise UsageError("gradual: allocation by-cost needs MACs, which a rule does not know; use `lamp` or `erk`.")
        if isinstance(self.pattern, NM) and abs(self.sparsity - (1 - self.pattern.n / self.pattern.m)) > 0.005:
            raise UsageError(
                f"gradual: the pattern {self.pattern.n}:{self.pattern.m} fixes the sparsity, and sparsity is "
                f"{self.sparsity:g}; set `sparsity = {1 - self.pattern.n / self.pattern.m:.4g}`."
            )
        self._check_levels()

    def _check_levels(self) -> None:
        """Levels of equal shares must lead from the first sparsity to the last."""
        if not isinstance(self.schedule, Levels) or self.sparsity == self.initial:
            return
        final = (self.sparsity - self.initial) / (1 - self.initial)
        if abs(self.schedule.final - final) > 5e-4:
            begin = f" from initial = {self.initial:g}" if self.initial else ""
            raise UsageError(
                f"gradual: the levels lead to final = {self.schedule.final:g}, sparsity is {self.sparsity:g}{begin}; "
                f"set `final = {final:.6g}` in the schedule."
            )

    def begin(self, run: Run) -> None:
        """Check that the target can be met, and prune when the first round comes before the first step."""
        if run.resumed:
            return
        masks, weights = run.masks, run.weights()
        unfit = {name: why for name, w in weights.items() if (why := self.pattern.why_not(tuple(w.shape)))}
        if unfit:
            reasons = "; ".join(f"`{name}`: {why}" for name, why in unfit.items())
            raise UsageError(
                f"gradual: not every tensor can take the pattern {self.pattern} ({reasons}). "
                f"Leave them out: `skip = {list(unfit)}`."
            )
        if "data-free" not in self.criterion.needs and run.sample is None:
            run.task(self.examples)
        keep = keep_for(self.sparsity, masks.total)
        if not isinstance(self.pattern, NM):
            if keep > masks.kept and not self.regrow:
                raise BudgetError(
                    f"gradual: sparsity is {self.sparsity:g}, but {masks.sparsity:.4g} of the network is pruned "
                    "already. Set a higher `sparsity`, or `regrow = true`."
                )
            magnitudes = {name: w.detach().abs() for name, w in weights.items()}
            keep_counts(magnitudes, keep, self.pattern, self.allocation)
        self._round(run)

    def after_step(self, run: Run) -> None:
        """Prune when a round is due."""
        self._round(run)

    def _due(self, step: int, total: int) -> int | None:
        """The number of the round that falls on ``step``, the last one when several do."""
        first, last = round(self.start * total), round(self.stop * total)
        if not first <= step <= last:
            return None
        span = last - first
        latest = self.updates if span == 0 else (step - first) * self.updates // span
        return latest if first - (-latest * span // self.updates) == step else None

    def _round(self, run: Run) -> None:
        number = self._due(run.step, run.total)
        if number is None:
            return
        way = self.schedule(number / self.updates)
        sparsity = self.sparsity if way == 1 else self.initial + (self.sparsity - self.initial) * way
        pattern, keep = self.pattern, keep_for(sparsity, run.masks.total)
        if isinstance(pattern, NM):
            most = pattern.n if way == 1 else max(pattern.n, pattern.m - int(sparsity * pattern.m + 1e-9))
            if most == pattern.m:
                return
            pattern = NM(most, pattern.m)
            keep = run.masks.total // pattern.m * most
        elif keep >= run.masks.kept and not self.regrow:
            return
        if self.regrow:
            _restore(run, run.state(self))
        check_finite(run.weights())
        scores = self._scores(run)
        if self.regrow:
            masks = choose(scores, keep, pattern, self.allocation)
            run.state(self).update({name: w.detach().clone() for name, w in run.weights().items()})
        else:
            masks = _within(run.masks.to(device_of(run.model)), scores, keep, pattern, self.allocation)
        run.masks = broadcast(masks)

    def _scores(self, run: Run) -> Named:
        if "data-free" in self.criterion.needs:
            return scores_of(self.criterion, Task(run.model, CrossEntropy(), ()), run.masks)
        return reduce_scores(scores_of(self.criterion, run.task(self.examples), run.masks), self.examples)


@torch.no_grad()
def _restore(run: Run, stored: dict[str, Any]) -> None:
    """Put the values that pruned weights had back into them, for a moment."""
    for name, w in run.weights().items():
        if name in stored:
            w.copy_(torch.where(run.masks[name], w, stored[name].to(w.device)))


def _within(old: Masks, scores: Named, keep: int, pattern: Pattern, allocation: Allocation) -> Masks:
    """As :func:`choose`, but only among the weights that ``old`` keeps.

    An allocation may give a tensor more than it has left; it then keeps all of that, and the rest is shared out
    among the others.

    Raises:
        BudgetError: when the zeros that are there do not leave enough whole units.
        ModelError: when all scores are zero.
    """
    if old.kept == old.total:
        return choose(scores, keep, pattern, allocation)
    if not any(bool(score[old[name]].any()) for name, score in scores.items()):
        raise ModelError(
            "gradual: the scores of all weights that are left are zero, so nothing tells one from another. "
            "End the rounds earlier (`stop`), or use another criterion."
        )
    below = {name: torch.where(old[name], score, -torch.inf) for name, score in scores.items()}
    if isinstance(pattern, NM):
        counts = keep_counts(below, keep, pattern, allocation)
        return Masks({name: pattern.mask(score, counts[name]) & old[name] for name, score in below.items()})
    whole = {name: int(torch.isfinite(pattern.unit_scores(score)).sum()) for name, score in below.items()}
    counts = _shares(scores, below, whole, keep, pattern, allocation)
    return Masks({name: pattern.mask(score, counts[name]) for name, score in below.items()})


def _shares(
    scores: Named, below: Named, whole: dict[str, int], keep: int, pattern: Pattern, allocation: Allocation
) -> dict[str, int]:
    """Units to keep in each tensor, at most the ``whole`` ones it has left."""
    sizes = {name: pattern.unit_size(tuple(score.shape)) for name, score in scores.items()}
    if sum(whole[name] * sizes[name] for name in scores) < keep:
        raise BudgetError(
            f"gradual: {keep:,} weights are to be kept, but the zeros that are there leave fewer in whole units of "
            f"{pattern}. Begin from a dense network, or use the pattern it was pruned with."
        )
    # Zero is the lowest score of criteria without a sign, and what LAMP can square
    lowest = min(float(torch.where(torch.isfinite(b), b, 0).min()) for b in below.values())
    ranked = below if lowest < 0 else {name: torch.where(torch.isfinite(b), b, 0) for name, b in below.items()}
    full: dict[str, int] = {name: 0 for name in scores if whole[name] == 0}
    while len(full) < len(scores):
        free: dict[str, Tensor] = {name: ranked[name] for name in scores if name not in full}
        left = keep - sum(count * sizes[name] for name, count in full.items())
        counts = keep_counts(free, left, pattern, allocation)
        over = {name: whole[name] for name in free if counts[name] > whole[name]}
        if not over:
            return {**full, **counts}
        full |= over
    return full
