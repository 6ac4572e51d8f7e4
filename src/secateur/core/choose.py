"""From scores to masks: one pure function for every criterion, pattern and allocation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.core.allocations import Allocation, Global
from secateur.core.errors import BudgetError, DataError, ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.patterns import Pattern, Unstructured
from secateur.core.select import check_scores
from secateur.core.sockets import Criterion, blame
from secateur.core.task import Task


def keep_counts(
    scores: Named, keep: int, pattern: Pattern, allocation: Allocation, cost: Mapping[str, float] | None = None
) -> dict[str, int]:
    """Units to keep in each tensor. A pattern that fixes its own counts (N:M) leaves the allocation nothing to do.

    Raises:
        BudgetError: when the budget cannot be met, or is not the one that the pattern fixes.
        UsageError: when a tensor cannot take the pattern.
    """
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    with blame(pattern):
        for name, shape in shapes.items():
            pattern.check(name, shape)
        fixed = fixed_counts(scores, pattern)
        if fixed is not None:
            if keep != sum(fixed.values()):
                total = sum(score.numel() for score in scores.values())
                raise BudgetError(
                    f"{pattern} keeps {sum(fixed.values()):,} of {total:,} weights, not {keep:,}. Ask for its own "
                    "density, or use another pattern."
                )
            return fixed
        sizes = {name: pattern.unit_size(shape) for name, shape in shapes.items()}
        units = {name: pattern.unit_scores(score) for name, score in scores.items()}
    return allocation(units, keep, sizes, shapes, cost)


def fixed_counts(scores: Named, pattern: Pattern) -> dict[str, int] | None:
    """The units that the pattern itself prescribes for each tensor (N:M), or None."""
    fixed = {name: pattern.fixed(tuple(score.shape)) for name, score in scores.items()}
    known = {name: count for name, count in fixed.items() if count is not None}
    return known if len(known) == len(fixed) else None


def scores_of(criterion: Criterion, task: Task, masks: Masks) -> Named:
    """The scores of a criterion, checked: it may be a class from outside.

    Raises:
        UsageError: when it fails, or gives something else than real numbers for every weight of every tensor.
    """
    with blame(criterion):
        scores = criterion(task, masks)
    if not isinstance(scores, Mapping) or set(scores) != set(masks):
        found = f"keys {sorted(map(str, scores))}" if isinstance(scores, Mapping) else type(scores).__name__
        raise UsageError(f"{criterion} gave {found}; it must give a dict of scores with the keys {sorted(masks)}.")
    for name, found in scores.items():
        real = isinstance(found, Tensor) and found.is_floating_point() and found.shape == masks[name].shape
        if not real:
            what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise UsageError(
                f"{criterion} gave {what} for `{name}`; scores are floating-point tensors of the shape of the "
                f"weights, {tuple(masks[name].shape)}."
            )
    return {name: scores[name].detach() for name in masks}


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
        keep: weights to keep in all. Exact for single weights; rounded down to whole blocks; N:M takes no number
            but its own.
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
    if keep < sum(s.numel() for s in scores.values()):
        check_not_zero(scores)
    counts = keep_counts(scores, keep, pattern, allocation, cost)
    return cut(scores, counts, pattern)


def cut(scores: Named, counts: Mapping[str, int], pattern: Pattern) -> Masks:
    """The masks of the best units, so many of each tensor.

    Raises:
        UsageError: when a pattern from outside gives something else.
    """
    with blame(pattern):
        masks = {name: pattern.mask(score, counts[name]) for name, score in scores.items()}
    for name, mask in masks.items():
        if not (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == scores[name].shape):
            raise UsageError(f"{pattern} gave no boolean mask of shape {tuple(scores[name].shape)} for `{name}`.")
    return Masks(masks)


def check_not_zero(scores: Named) -> None:
    """Refuse scores that say nothing.

    Raises:
        ModelError: when all are zero.
    """
    if scores and not any(bool(score.any()) for score in scores.values()):
        raise ModelError(
            "all scores are zero, so nothing tells one weight from another. The loss does not reach the weights: "
            "check the data and the network, or use another criterion."
        )


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
