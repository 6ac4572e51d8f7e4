"""What rules share that train sparse from the first step and let zeros move: first masks, and places to grow in."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from secateur.core.allocations import Allocation, ByCost
from secateur.core.budget import keep_for
from secateur.core.choose import broadcast, choose
from secateur.core.errors import BudgetError, UsageError
from secateur.core.masks import Masks
from secateur.core.run import Run
from secateur.core.streams import stream


def check_options(rule: str, sparsity: float, allocation: Allocation) -> None:
    """Refuse a sparsity outside (0, 1), and an allocation that needs what a rule does not know.

    Raises:
        BudgetError: for the sparsity.
        UsageError: for the allocation.
    """
    if not 0 < sparsity < 1:
        raise BudgetError(
            f"{rule}: sparsity is {sparsity!r}; it must be in (0, 1), 0.9 means 90 % zeros. Without zeros there is "
            "nothing to move; leave the rule out."
        )
    if isinstance(allocation, ByCost):
        raise UsageError(f"{rule}: allocation by-cost needs MACs, which a rule does not know; use `erk` or `uniform`.")


def check_trained(rule: str, run: Run) -> None:
    """Refuse masks over tensors that are not trained: nothing would make up for zeros there.

    Raises:
        UsageError: naming them.
    """
    still = [name for name, w in run.weights().items() if not w.requires_grad]
    if still:
        named = ", ".join(f"`{name}`" for name in still[:4])
        raise UsageError(f"{rule}: {named} cannot be trained (`requires_grad` is off). Leave it out: `skip = {still}`.")


def start(rule: str, run: Run, sparsity: float, allocation: Allocation) -> None:
    """The first masks: random ones of exact counts, or those the network came with when their count is the same.

    Args:
        rule: name of the rule; a part of the name of the random stream.
        run: the run, before its first step.
        sparsity: pruned / prunable weights.
        allocation: how the budget is shared out over tensors.

    Raises:
        BudgetError: when the network came with zeros of another count, or the budget would empty layers.

    Cost: one random number for each prunable weight and a selection among them.
    """
    masks, keep = run.masks, keep_for(sparsity, run.masks.total)
    if masks.kept == masks.total:
        run.masks = broadcast(choose(draws(run, rule), keep, allocation=allocation))
    elif masks.kept != keep:
        raise BudgetError(
            f"{rule}: the network came with {masks.kept:,} of {masks.total:,} weights, and sparsity = {sparsity:g} "
            f"keeps {keep:,}. Set `sparsity = {_told(masks)}` to begin with its zeros, or begin from a dense network."
        )


def _told(masks: Masks) -> str:
    """The sparsity to twelve places, rounded up, so that it gives the very count when it is read again."""
    return f"{math.ceil(Fraction(masks.total - masks.kept, masks.total) * 10**12) / 10**12:.12g}"


def draws(run: Run, rule: str) -> dict[str, Tensor]:
    """A number in [0, 1) for each prunable weight: a function of the run's seed alone, on any device."""
    return {
        name: torch.rand(w.shape, generator=stream(run.seed, rule, "start", name)).to(w.device)
        for name, w in run.weights().items()
    }


def pick(places: Tensor, count: int, random: torch.Generator) -> Tensor:
    """A mask of ``count`` distinct places among those that are True, every set of them equally likely.

    Args:
        places: boolean.
        count: at most the number of places.
        random: a generator on the CPU, so that the choice is the same on every device.

    Cost: one pass over the tensor and a permutation of the places.
    """
    flat = places.reshape(-1).nonzero().reshape(-1)
    chosen = flat[torch.randperm(len(flat), generator=random)[:count].to(flat.device)]
    picked = torch.zeros(places.numel(), dtype=torch.bool, device=places.device)
    picked[chosen] = True
    return picked.reshape(places.shape)


def silent(masks: Masks) -> int:
    """Output units without any weight of their own, over all tensors; growth may bring them back."""
    return int(sum((~mask.flatten(1).any(1)).sum() for mask in masks.values() if mask.dim() > 1))
