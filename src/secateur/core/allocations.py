"""How many weights each tensor keeps. A closed set; counts are integers and sum to the budget exactly.

All counts here are *units* of the pattern (single weights for unstructured and N:M, blocks, output
units). The budget is a number of weights. Where units have different sizes in different tensors (whole
output units) it is never exceeded: allocations by shape stop when no further unit fits, allocations
by threshold at the first unit, in the order of the scores, that does not fit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.core.errors import BudgetError, UsageError
from secateur.core.names import Named
from secateur.core.select import check_scores, top_counts, top_mask
from secateur.core.sockets import blame
from secateur.core.tails import lamp_counts


class Allocation(ABC):
    """Shares a budget of weights out over tensors."""

    def __call__(
        self,
        scores: Named,
        keep: int,
        sizes: Mapping[str, int] | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        cost: Mapping[str, float] | None = None,
    ) -> dict[str, int]:
        """Units to keep in each tensor.

        Args:
            scores: a score for each unit of each tensor; higher = keep.
            keep: weights to keep in all.
            sizes: weights in one unit of each tensor; 1 when absent.
            shapes: shapes of the weight tensors; those of the scores when absent.
            cost: cost of one weight of each tensor, such as its MACs; 1 when absent.

        Raises:
            BudgetError: when the budget is out of range or below one unit for each tensor.
            ModelError: for NaN scores.
        """
        check_scores(scores)
        sizes = {name: 1 for name in scores} if sizes is None else dict(sizes)
        total = sum(s.numel() * sizes[n] for n, s in scores.items())
        if not 0 <= keep <= total:
            raise BudgetError(f"cannot keep {keep:,} of {total:,} weights; ask for 0 to {total:,}.")
        least = sum(sizes[name] for name in scores)
        if keep < least:
            most = math.floor((1 - least / total) * 1e6) / 1e6
            raise BudgetError(
                f"keeping {keep:,} of {total:,} weights would empty whole layers: {len(scores)} tensors need at least "
                f"one unit each, {least:,} weights in all. Ask for a sparsity of at most {most:.6g}."
            )
        shapes = {n: tuple(s.shape) for n, s in scores.items()} if shapes is None else shapes
        with blame(self):
            counts = self.share(scores, keep, sizes, shapes, cost or {n: 1.0 for n in scores})
        _check_counts(self, counts, scores, keep, sizes)
        return counts

    @abstractmethod
    def share(
        self,
        scores: Named,
        keep: int,
        sizes: dict[str, int],
        shapes: Mapping[str, tuple[int, ...]],
        cost: Mapping[str, float],
    ) -> dict[str, int]:
        """Units to keep; every argument is present and checked."""


def _check_counts(allocation: Allocation, counts: Any, scores: Named, keep: int, sizes: Mapping[str, int]) -> None:
    """Refuse what is no allocation of the budget, whoever wrote it."""
    whole = isinstance(counts, dict) and set(counts) == set(scores)
    fine = whole and all(isinstance(n, int) and 0 <= n <= scores[name].numel() for name, n in counts.items())
    if not fine or sum(n * sizes[name] for name, n in counts.items()) > keep:
        raise UsageError(
            f"{allocation} gave {counts!r} for a budget of {keep:,} weights; it must give each tensor a whole number "
            "of its units, together at most the budget."
        )


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same share of every tensor, rounded so that the total is exact."""

    def share(
        self,
        scores: Named,
        keep: int,
        sizes: dict[str, int],
        shapes: Mapping[str, tuple[int, ...]],
        cost: Mapping[str, float],
    ) -> dict[str, int]:
        """Largest remainders get the units left over."""
        return _shares({n: 1.0 for n in scores}, {n: s.numel() for n, s in scores.items()}, sizes, keep)


@dataclass(frozen=True)
class Global(Allocation):
    """One threshold for all tensors; each keeps at least one unit."""

    def share(
        self,
        scores: Named,
        keep: int,
        sizes: dict[str, int],
        shapes: Mapping[str, tuple[int, ...]],
        cost: Mapping[str, float],
    ) -> dict[str, int]:
        """Counts of the units above the common threshold."""
        return _global(scores, keep, sizes)


@dataclass(frozen=True)
class ErdosRenyi(Allocation):
    """Density in proportion to ``sum of dimensions / product of dimensions`` (Mocanu 2018; kernel form: Evci 2020).

    Tensors whose share exceeds 1 stay dense and the rest is shared out again.

    Args:
        kernel: count the kernel dimensions of convolutions too (ERK).
    """

    kernel: bool = True

    def share(
        self,
        scores: Named,
        keep: int,
        sizes: dict[str, int],
        shapes: Mapping[str, tuple[int, ...]],
        cost: Mapping[str, float],
    ) -> dict[str, int]:
        """Shares by shape alone; the scores choose within each tensor."""
        wish = {}
        for name in scores:
            dims = shapes[name] if self.kernel else shapes[name][:2]
            wish[name] = sum(dims) / math.prod(dims) if math.prod(dims) else 1.0
        return _shares(wish, {n: s.numel() for n, s in scores.items()}, sizes, keep)


@dataclass(frozen=True)
class Lamp(Allocation):
    """One threshold on ``s_u^2 / sum of s_v^2 over all v at least as large`` (Lee et al. 2021, with ``s = |w|``).

    Scaling a layer changes nothing, and the largest weight of each layer scores 1, so no layer vanishes.
    Equal scores stand in the order of a stable sort. Cost: about two passes over the scores (see
    :func:`secateur.core.tails.lamp_counts`); sums in float64. Units of different sizes are sorted.
    """

    def share(
        self,
        scores: Named,
        keep: int,
        sizes: dict[str, int],
        shapes: Mapping[str, tuple[int, ...]],
        cost: Mapping[str, float],
    ) -> dict[str, int]:
        """Counts of the units above the common threshold of LAMP scores.

        Raises:
            UsageError: when a score is negative or infinite.
        """
        for name, score in scores.items():
            low, high = (v.item() for v in torch.aminmax(score))
            if low < 0 or math.isinf(high):
                raise UsageError(
                    f"LAMP squares the scores, so they must be finite and >= 0; those of `{name}` run from "
                    f"{low:.3g} to {high:.3g}. Use `global` instead."
                )
        if len(set(sizes.values())) > 1:
            return _global_uneven({name: lamp(score) for name, score in scores.items()}, keep, sizes)
        return lamp_counts(scores, keep // next(iter(sizes.values())))


@dataclass(frozen=True)
class ByCost(Allocation):
    """One threshold on score per cost, so that weights which cost many MACs go first."""

    def share(
        self,
        scores: Named,
        keep: int,
        sizes: dict[str, int],
        shapes: Mapping[str, tuple[int, ...]],
        cost: Mapping[str, float],
    ) -> dict[str, int]:
        """Counts of the units above the common threshold of ``score / cost``.

        Raises:
            UsageError: when scores are negative, or a cost is missing or not positive.
        """
        for name, score in scores.items():
            price = cost.get(name, math.nan)
            if not 0 < price < math.inf or bool((score < 0).any()):
                raise UsageError(
                    f"allocation by cost needs scores >= 0 and a known cost > 0; `{name}` has a lowest score of "
                    f"{score.min().item():.3g} and a cost of {price:.3g}. Use `global` instead."
                )
        return _global({name: score.double() / cost[name] for name, score in scores.items()}, keep, sizes)


ALLOCATIONS: dict[str, type[Allocation]] = {
    "uniform": Uniform,
    "global": Global,
    "erk": ErdosRenyi,
    "lamp": Lamp,
    "by-cost": ByCost,
}
"""Names of the allocations in recipes."""


def lamp(score: Tensor) -> Tensor:
    """LAMP scores of one tensor, in float64, same shape.

    >>> lamp(torch.tensor([1.0, 2.0, 3.0])) * torch.tensor([14, 13, 9])
    tensor([1., 4., 9.], dtype=torch.float64)
    """
    values = score.reshape(-1).double()
    exponent = torch.frexp(values.max()).exponent.clamp(-1000, 1000) if values.numel() else 0
    squares = torch.ldexp(values, torch.as_tensor(-exponent)).square()  # a power of two: exact, and no overflow
    ordered, order = torch.sort(squares, stable=True)
    tails = ordered.flip(0).cumsum(0).flip(0)
    values = torch.where(tails > 0, ordered / tails, torch.zeros_like(tails))
    return torch.empty_like(values).scatter_(0, order, values).reshape(score.shape)


def _global(scores: Named, keep: int, sizes: dict[str, int]) -> dict[str, int]:
    if len(set(sizes.values())) > 1:
        return _global_uneven(scores, keep, sizes)
    units = keep // next(iter(sizes.values()))
    counts = top_counts(scores, units)
    empty = [name for name, count in counts.items() if count == 0]
    if empty:  # one unit each for tensors that would vanish; the others share what is left
        rest = {name: _without_best(score) for name, score in scores.items()}
        left = units - len(scores)
        counts = top_counts(rest, left) if left else dict.fromkeys(scores, 0)
        counts = {name: count + 1 for name, count in counts.items()}
    return counts


def _without_best(score: Tensor) -> Tensor:
    """The scores without the largest one (the first of equals), flat."""
    return score.reshape(-1)[~top_mask(score, 1).reshape(-1)]


def _global_uneven(scores: Named, keep: int, sizes: dict[str, int]) -> dict[str, int]:
    """Units in the order of their score per weight, as many as the budget holds; each tensor's best one first."""
    names = list(scores)
    where = scores[names[0]].device
    flat = torch.cat([scores[n].reshape(-1).double().to(where) / sizes[n] for n in names])
    owner = torch.cat([torch.full((scores[n].numel(),), i, device=where) for i, n in enumerate(names)])
    first = torch.cat([top_mask(scores[n], 1).reshape(-1).to(where) for n in names])
    order = torch.sort(flat, descending=True, stable=True).indices
    order = torch.cat([order[first[order]], order[~first[order]]])
    weight = torch.tensor([sizes[n] for n in names], device=where)[owner[order]]
    kept = int((weight.cumsum(0) <= keep).sum())
    counts = torch.bincount(owner[order[:kept]], minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=True))


def _shares(wish: dict[str, float], units: dict[str, int], sizes: dict[str, int], keep: int) -> dict[str, int]:
    """Integer counts in proportion to ``wish * units``, at least 1 and at most all, that use up the budget."""
    full: set[str] = set()
    while True:
        free = [n for n in units if n not in full]
        left = keep - sum(units[n] * sizes[n] for n in full)
        weight = sum(wish[n] * units[n] * sizes[n] for n in free)
        scale = left / weight if weight else 0.0
        over = {n for n in free if wish[n] * scale >= 1}
        if not over:
            break
        full |= over
    ideal = {n: float(units[n]) if n in full else wish[n] * scale * units[n] for n in units}
    counts = {n: min(units[n], max(1, math.floor(ideal[n] + 1e-9))) for n in units}
    spare = keep - sum(counts[n] * sizes[n] for n in units)
    while spare < 0:  # floors of 1 can overdraw: take from the tensors that have most above their share
        name = max((n for n in units if counts[n] > 1), key=lambda n: counts[n] - ideal[n])
        counts[name] -= 1
        spare += sizes[name]
    return _fill(counts, ideal, units, sizes, spare)


def _fill(
    counts: dict[str, int], ideal: dict[str, float], units: dict[str, int], sizes: dict[str, int], spare: int
) -> dict[str, int]:
    """Give what is left to the largest remainders, round by round, until nothing fits."""
    while True:
        order = sorted((n for n in units if counts[n] < units[n]), key=lambda n: counts[n] - ideal[n])
        given = False
        for name in order:
            if sizes[name] <= spare:
                counts[name] += 1
                spare -= sizes[name]
                given = True
        if not given:
            return counts
