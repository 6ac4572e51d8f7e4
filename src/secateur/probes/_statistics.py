"""Intervals: Wilson's, the bootstrap over groups, of a median, of a paired difference. All levels are 95 %."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.core.errors import DataError
from secateur.core.reading import Reading
from secateur.core.streams import stream

Z = 1.959963984540054
"""The 97.5 % point of the normal distribution."""

DRAWS = 1000
"""Resamples of a bootstrap."""


class Spread(NamedTuple):
    """Standard error and 95 % interval of an estimate."""

    stderr: float
    low: float
    high: float


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: stays inside [0, 1] and has a width at 0 and 1 too.

    >>> low, high = wilson(0, 10)
    >>> round(low, 4), round(high, 4)
    (0.0, 0.2775)
    """
    p, z2 = right / n, Z * Z
    middle, half = (p + z2 / (2 * n)) / (1 + z2 / n), Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))


def bootstrap(estimate: Callable[[Tensor], float], value: float, groups: int, random: torch.Generator) -> Spread | None:
    """Percentile bootstrap that draws whole groups with replacement; None for fewer than two groups.

    Args:
        estimate: the estimate when group ``i`` counts ``weights[i]`` times, (groups,) float64 on the CPU.
        value: the estimate itself; the interval is widened to hold it when a bias pushes it out.
        groups: independent examples or sequences.
        random: where the draws come from.

    Cost: 1,000 estimates.
    """
    if groups < 2:
        return None
    found = torch.empty(DRAWS, dtype=torch.float64)
    for i in range(DRAWS):
        drawn = torch.randint(groups, (groups,), generator=random)
        found[i] = estimate(torch.bincount(drawn, minlength=groups).double())
    found = found[found.isfinite()]
    if len(found) < 2:
        return None
    low, high = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Spread(float(found.std()), min(low, value), max(high, value))


def ratio_of_sums(top: Tensor, bottom: Tensor) -> Callable[[Tensor], float]:
    """The estimate ``Σ top / Σ bottom`` over groups, for :func:`bootstrap`; both (groups,)."""
    pair = torch.stack([top.double(), bottom.double()])

    def estimate(weights: Tensor) -> float:
        over, under = (pair @ weights).tolist()
        return over / under if under else math.nan

    return estimate


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The tightest pair of order statistics that holds the median with 95 %, whatever the distribution.

    For fewer than six values no pair does, and the range is returned.

    >>> median_interval([5.0, 1.0, 4.0, 2.0, 3.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    (2.0, 9.0)
    """
    n, ranked = len(values), sorted(values)
    below, tail = 0, 1  # tail / 2**n = P(Binomial(n, 1/2) <= below), in whole numbers: exact for any n
    while 40 * (tail + math.comb(n, below + 1)) <= 2**n:
        below += 1
        tail += math.comb(n, below)
    return ranked[below], ranked[n - 1 - below]


def paired_difference(right_a: Tensor, right_b: Tensor, groups: Tensor | None = None) -> Reading:
    """Accuracy of ``a`` minus accuracy of ``b`` on the same examples, in percentage points.

    Examples on which both agree cancel, so the interval is much tighter than that of two separate accuracies.
    Independent examples: Bonett and Price's interval (2012), which has a width even when nothing differs. With
    ``groups`` (tokens of sequences): a seeded bootstrap over the groups.

    Args:
        right_a: whether ``a`` is right, (n,) boolean.
        right_b: the same for ``b``, in the same order.
        groups: number of the sequence that each answer belongs to, (n,) whole numbers.

    Returns:
        ``value`` in points; parts ``only_a`` and ``only_b`` (answers that one alone has right) and ``p``, the
        two-sided exact McNemar probability (without groups).

    Raises:
        DataError: when the answers are not as many, or there is none.
    """
    _check_pair(right_a, right_b, groups)
    a, b = right_a.reshape(-1).bool().cpu(), right_b.reshape(-1).bool().cpu()
    n, only_a, only_b = a.numel(), int((a & ~b).sum()), int((b & ~a).sum())
    value = (only_a - only_b) / n
    parts: dict[str, float] = {"only_a": float(only_a), "only_b": float(only_b)}
    if groups is not None:
        return _grouped_difference(a, b, groups.reshape(-1).cpu(), value, parts)
    spread = math.sqrt(max(0.0, only_a + only_b - n * value * value)) / n
    one, two = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = Z * math.sqrt((one + two - (one - two) ** 2) / (n + 2))
    low, high = max(-1.0, min(value, one - two - half)), min(1.0, max(value, one - two + half))
    parts = {**parts, "p": _mcnemar(only_a, only_b)}
    return Reading(100 * value, "points", 100 * spread, 100 * low, 100 * high, n, parts, "paired: the same examples")


def _check_pair(a: Tensor, b: Tensor, groups: Tensor | None) -> None:
    sizes = {a.numel(), b.numel()} | ({groups.numel()} if groups is not None else set())
    if len(sizes) != 1:
        raise DataError(
            f"a paired difference needs as many answers of both networks, these are {a.numel():,} and {b.numel():,}"
            f"{f' in {groups.numel():,} groups entries' if groups is not None else ''}. Use the same data, unshuffled."
        )
    if not a.numel():
        raise DataError("a paired difference needs at least one answer, there is none. Pass data with examples.")


def _grouped_difference(a: Tensor, b: Tensor, groups: Tensor, value: float, parts: dict[str, float]) -> Reading:
    names, index = groups.unique(return_inverse=True)
    count, size = len(names), torch.bincount(index)
    gain = torch.bincount(index, weights=a.double() - b.double(), minlength=count)
    spread = bootstrap(ratio_of_sums(gain, size), value, count, stream(0, "paired_difference", "bootstrap"))
    note = f"paired: the same {a.numel():,} tokens of {count:,} sequences; the interval is a bootstrap over sequences"
    errors = [100 * x for x in spread] if spread else [None, None, None]
    return Reading(100 * value, "points", *errors, n=count, parts=parts, note=note)


def _mcnemar(only_a: int, only_b: int) -> float:
    """Probability of a split at least as uneven when either side is equally likely."""
    n, k = only_a + only_b, min(only_a, only_b)
    if 2 * k == n:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2 * math.fsum(math.exp(term) for term in logs))
