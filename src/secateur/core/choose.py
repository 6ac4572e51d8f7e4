"""From scores to masks: one pure function for every criterion, pattern and allocation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from secateur.core.allocations import Allocation, Global
from secateur.core.errors import DataError, ModelError
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.patterns import Pattern, Unstructured
from secateur.core.select import check_scores


def keep_counts(
    scores: Named, keep: int, pattern: Pattern, allocation: Allocation, cost: Mapping[str, float] | None = None
) -> dict[str, int]:
    """Units to keep in each tensor. A pattern that fixes its own counts (N:M) overrides the allocation.

    Raises:
        BudgetError: when the budget cannot be met.
        UsageError: when a tensor cannot take the pattern.
    """
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    for name, shape in shapes.items():
        pattern.check(name, shape)
    fixed = {name: pattern.fixed(shape) for name, shape in shapes.items()}
    if all(count is not None for count in fixed.values()):
        return {name: count for name, count in fixed.items() if count is not None}
    sizes = {name: pattern.unit_size(shape) for name, shape in shapes.items()}
    units = {name: pattern.unit_scores(score) for name, score in scores.items()}
    return allocation(units, keep, sizes, shapes, cost)


def choose(
    scores: Named,
    keep: int,
    pattern: Pattern | None = None,
    allocation: Allocation | None = None,
    cost: Mapping[str, float] | None = None,
) -> Masks:
    """Masks that keep ``keep`` weights of the highest scores, as pattern and allocation allow.

    Args:
        scores: a score for each weight, by parameter name; higher = keep.
        keep: weights to keep in all. Exact for single weights; rounded down to whole blocks; ignored by N:M.
        pattern: which shapes zeros may take; single weights by default.
        allocation: how the budget is shared out; one global threshold by default.
        cost: cost of one weight of each tensor, for allocation by cost.

    Raises:
        BudgetError: when the budget cannot be met.
        ModelError: for NaN scores, or scores that are all zero.
        UsageError: when a tensor cannot take the pattern.
    """
    pattern, allocation = pattern or Unstructured(), allocation or Global()
    check_scores(scores)
    if (
        scores
        and not any(bool(score.any()) for score in scores.values())
        and keep < sum(s.numel() for s in scores.values())
    ):
        raise ModelError(
            "all scores are zero, so nothing tells one weight from another. The loss does not reach the weights: "
            "check the data and the network, or use another criterion."
        )
    counts = keep_counts(scores, keep, pattern, allocation, cost)
    return Masks({name: pattern.mask(score, counts[name]) for name, score in scores.items()})


def broadcast(masks: Masks) -> Masks:
    """Rank 0's masks on every process of a distributed run; unchanged in a single process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return masks
    shared = {}
    for name, mask in masks.items():
        bits = mask.to(torch.uint8).contiguous()
        dist.broadcast(bits, src=0)
        shared[name] = bits.bool()
    return Masks(shared)


def reduce_scores(scores: Named, examples: int) -> Named:
    """Mean of the scores over the processes of a distributed run, each weighted by its examples.

    Raises:
        DataError: when no process has an example.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return scores
    first = next(iter(scores.values()))
    total = torch.tensor(examples, dtype=torch.int64, device=first.device)
    dist.all_reduce(total)
    if not total:
        raise DataError("no process has an example to score with; give every process its part of the data.")
    share, reduced = examples / int(total), {}
    for name, score in scores.items():
        mean = score * share
        dist.all_reduce(mean)
        reduced[name] = mean
    return reduced
