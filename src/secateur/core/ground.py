"""What there is to choose from: the scores of a network that may be pruned already, and what a budget keeps of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from secateur.core.allocations import Allocation, ByCost, Lamp
from secateur.core.choose import check_not_zero, choose, cut, fixed_counts, keep_counts
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.patterns import Pattern
from secateur.core.select import check_scores
from secateur.core.sockets import blame


@dataclass(frozen=True)
class Ground:
    """Scores, and which of their weights are still there; pruned weights never come back.

    In a pruned network a unit (a block, an output unit) is ranked by the weights it has left, and what is kept of
    it is those weights. An allocation may give a tensor more units than it has left; it then keeps all of them, and
    the rest is shared out among the others.

    Args:
        scores: a score for each weight, by parameter name; higher = keep.
        pattern: which shapes zeros may take.
        allocation: how the budget is shared out.
        cost: cost of one weight of each tensor, for allocation by cost.
        old: which weights are still there; all of a tensor it does not name.
    """

    scores: Named
    pattern: Pattern
    allocation: Allocation
    cost: Mapping[str, float]
    old: Masks | None = None

    @property
    def total(self) -> int:
        """All weights, those that are gone too."""
        return sum(score.numel() for score in self.scores.values())

    @cached_property
    def live(self) -> dict[str, int]:
        """Weights of each tensor that are still there."""
        return {name: int(live.sum()) for name, live in self._live.items()}

    @property
    def left(self) -> int:
        """Weights that are still there."""
        return sum(self.live.values())

    @cached_property
    def fixed(self) -> dict[str, int] | None:
        """Units that the pattern prescribes (N:M), or None."""
        with blame(self.pattern):
            return fixed_counts(self.scores, self.pattern)

    @property
    def fresh(self) -> bool:
        """Whether nothing is pruned yet."""
        return self.left == self.total

    @cached_property
    def single(self) -> bool:
        """Whether a budget is met to the weight: units are single weights and their number is free."""
        return self.fixed is None and all(size == 1 for size in self._sizes.values())

    def masks(self, budget: int) -> Masks:
        """The masks that a budget of weights, counted in whole units, leads to.

        Raises:
            BudgetError: when the budget cannot be met.
            ModelError: for NaN scores, or scores that are all zero.
            UsageError: when a tensor cannot take the pattern.
        """
        if self.fresh:
            return choose(self.scores, budget, self.pattern, self.allocation, self.cost)
        check_scores(self.scores)
        if budget < self.left:
            check_not_zero({name: torch.where(self._live[name], s, 0) for name, s in self.scores.items()})
        chosen = cut(self._below, self._counts(budget), self.pattern)
        return Masks({name: mask & self._live[name] for name, mask in chosen.items()})

    def kept(self, budget: int) -> dict[str, int]:
        """Weights that :meth:`masks` keeps in each tensor."""
        if self.fixed is not None and not self.fresh:
            return self.masks(budget).counts()
        counts = self._counts(budget)
        if self.fresh or self.single:
            return {name: count * self._sizes[name] for name, count in counts.items()}
        return {name: int(self._running[name][count]) for name, count in counts.items()}

    def largest(self, weigh: Callable[[Mapping[str, int]], float], limit: float) -> int | None:
        """The largest budget of which ``weigh(kept)`` is at most ``limit``; None when even one unit a tensor is more.

        Cost: one allocation for each binary digit of the number of weights.
        """
        low = self._one_each
        high = sum(self._sizes[name] * count for name, count in self._whole.items())
        if self.least(weigh) > limit:
            return None
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if weigh(self.kept(middle)) <= limit else (low, middle - 1)
        return low

    def least(self, weigh: Callable[[Mapping[str, int]], float]) -> float:
        """What the smallest budget weighs: one unit of each tensor."""
        return float(weigh(self.kept(self._one_each)))

    @property
    def _one_each(self) -> int:
        return sum(self._sizes[name] for name, count in self._whole.items() if count)

    def _counts(self, budget: int) -> dict[str, int]:
        """Units to keep in each tensor, at most those it has left."""
        if self.fresh or self.fixed is not None:
            return keep_counts(self.scores, budget, self.pattern, self.allocation, self.cost)
        full = {name: 0 for name, count in self._whole.items() if not count}
        while len(full) < len(self.scores):
            free: Named = {name: self._ranked[name] for name in self.scores if name not in full}
            left = budget - sum(count * self._sizes[name] for name, count in full.items())
            counts = keep_counts(free, left, self.pattern, self.allocation, self.cost)
            over = {name: self._whole[name] for name in free if counts[name] > self._whole[name]}
            if not over:
                return {**full, **counts}
            full |= over
        return full

    @cached_property
    def _live(self) -> Named:
        old = self.old if self.old is not None else {}
        return {
            name: old[name].to(score.device) if name in old else torch.ones_like(score, dtype=torch.bool)
            for name, score in self.scores.items()
        }

    @cached_property
    def _sizes(self) -> dict[str, int]:
        with blame(self.pattern):
            return {name: self.pattern.unit_size(tuple(score.shape)) for name, score in self.scores.items()}

    @cached_property
    def _whole(self) -> dict[str, int]:
        """Units of each tensor in which a weight is left."""
        with blame(self.pattern):
            return {n: int((self.pattern.unit_scores(live.double()) > 0).sum()) for n, live in self._live.items()}

    @cached_property
    def _below(self) -> Named:
        """Scores in which pruned weights add nothing to their unit, and units that are gone come last."""
        below = {}
        for name, score in self.scores.items():
            live, units = self._live[name], self._live[name]
            if self._sizes[name] > 1:
                with blame(self.pattern):
                    units = self.pattern.mask(live.double(), self._whole[name])
            below[name] = torch.where(live, score, 0).masked_fill(~units, -torch.inf)
        return below

    @cached_property
    def _ranked(self) -> Named:
        """As :attr:`_below`, in numbers that every allocation takes: 0 is the lowest score without a sign."""
        lowest = min(float(torch.where(self._live[n], s, 0).min()) for n, s in self.scores.items())
        if lowest < 0 and not isinstance(self.allocation, Lamp | ByCost):
            return self._below
        return {name: below.masked_fill(below == -torch.inf, 0) for name, below in self._below.items()}

    @cached_property
    def _running(self) -> dict[str, Tensor]:
        """Weights left in the best 0, 1, 2, ... units of each tensor."""
        running = {}
        with blame(self.pattern):
            for name, below in self._below.items():
                order = self.pattern.unit_scores(below).reshape(-1).sort(descending=True, stable=True).indices
                held = self.pattern.unit_scores(self._live[name].double()).reshape(-1)[order].long()
                running[name] = torch.cat([held.new_zeros(1), held.cumsum(0)])
        return running
