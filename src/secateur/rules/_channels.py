"""Whole output channels, with all that are added to them, as one budget."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.allocations import Global
from secateur.core.errors import BudgetError
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.select import top_mask
from secateur.core.task import Task, frozen
from secateur.linalg.products import Operator
from secateur.surgery.analysis import analyse


def gate_slopes(task: Task, masks: Masks) -> Named:
    """``g² + w · (Hg)`` for every kept weight: summed over some weights, the slope of the flow along one gate on all.

    With a gate ``c`` that multiplies these weights, the slope at ``c = 1`` is that of ``g·∇L``, where ``g`` is held
    still. ``g`` and ``H`` are gradient and Hessian of the mean loss, in evaluation mode.

    Returns:
        One number for every weight, in its shape, float32 or wider; 0 where pruned.

    Raises:
        ModelError: when the network cannot be differentiated twice.

    Cost: one gradient and one Hessian product over the data.
    """
    curvature = Operator(task, masks)
    slopes = curvature.flatten({name: slope for name, slope in task.gradients().items() if name in masks})
    weights = curvature.flatten({name: w.detach() for name, w in masks.match(task.model).items()})
    return curvature.unflatten(slopes.square() + weights * (curvature @ slopes))


def best_channels(task: Task, slopes: Named, keep: int) -> Masks:
    """Masks of whole channels that keep at most ``keep`` weights: those with the largest ``|sum of slopes|`` stay.

    A channel is the rows of all weight tensors that make it: what residual sums join stays or goes together, and so
    do heads of attention. Channels of the network's outputs stay, and those whose removal would change what a
    normalisation sees. Every group of channels keeps one.

    Args:
        task: the network; the first batch shows how it is called.
        slopes: for every weight of every tensor that may lose channels.
        keep: weights to keep in all these tensors.

    Raises:
        BudgetError: when channels cannot be as few as that.
        ModelError: when the network cannot be traced.

    Cost: one trace of the network.
    """
    inputs = next(iter(task.batches()))[0]
    with frozen(task.model):
        groups = analyse(task.model, inputs[:2] if isinstance(inputs, Tensor) else inputs).groups
    scores: Named = {}
    sizes: dict[str, int] = {}
    makers: dict[str, list[tuple[str, Tensor]]] = {}
    for group in groups:
        made = [(n, rows) for (n, d), rows in zip(group.tensors, group.index, strict=True) if d == 0 and n in slopes]
        if made and not group.inexact:
            every = [slopes[n].flatten(1).sum(1)[rows.to(slopes[n].device)].sum(1) for n, rows in made]
            sizes[group.name] = sum(rows.shape[1] * slopes[n][0].numel() for n, rows in made)
            # Allocations compare by the weight, the method by the channel
            scores[group.name] = torch.stack(every).sum(0).abs() * sizes[group.name]
            makers[group.name] = made
    total = sum(slope.numel() for slope in slopes.values())
    free = sum(sizes[name] * len(score) for name, score in scores.items())
    if keep - total + free < sum(sizes.values()):
        raise BudgetError(
            f"earlycrop: {keep:,} of {total:,} weights are to be kept, but only {free:,} lie in channels that can go, "
            f"and one channel of each of {len(sizes)} groups stays. Ask for a lower sparsity, or leave tensors that "
            "cannot lose channels out with `skip`."
        )
    counts = Global()(scores, keep - total + free, sizes)
    masks = {name: torch.ones_like(slope, dtype=torch.bool) for name, slope in slopes.items()}
    for name, made in makers.items():
        gone = ~top_mask(scores[name], counts[name])
        for tensor, rows in made:
            masks[tensor][rows.to(gone.device)[gone].flatten()] = False
    return Masks(masks)
