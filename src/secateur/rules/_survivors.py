"""Choosing among the weights that are left: shared by rules that prune in rounds."""

from __future__ import annotations

import torch

from secateur.core.allocations import Global
from secateur.core.choose import cut, keep_counts
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.patterns import Unstructured


def best_left(masks: Masks, scores: Named, keep: int) -> Masks:
    """The ``keep`` weights of the highest scores among those that ``masks`` keep, over all tensors together.

    Every tensor that has a weight left keeps at least one. Among equal scores the lower index stays.

    Args:
        masks: which weights are left.
        scores: for every weight of every tensor, in its shape; those of pruned weights are not looked at.
        keep: how many stay, at most those that are left.

    Raises:
        BudgetError: when fewer weights are asked for than there are tensors.
        ModelError: for NaN scores.

    Cost: one selection over the scores.
    """
    left = {
        name: torch.where(mask, scores[name], -torch.inf) for name, mask in masks.items() if bool(mask.any())
    }  # an empty tensor has nothing to give
    chosen = cut(left, keep_counts(left, keep, Unstructured(), Global()), Unstructured())
    return Masks({name: chosen[name] if name in left else mask for name, mask in masks.items()})
