"""Which negative weights can go so that units fire more often, and how many units never do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.core.errors import ModelError
from secateur.core.masks import Masks
from secateur.core.names import Named, unwrap
from secateur.core.task import Task
from secateur.rules._survivors import best_left


def awaken(masks: Masks, weights: Named, start: Named, keep: int) -> Masks:
    """Masks without the negative weights that moved least from ``start``, so that ``keep`` are left.

    Args:
        masks: which weights are left.
        weights: their values now; those that are not negative stay.
        start: their values when the cycle began.
        keep: how many stay; every tensor keeps one.

    Raises:
        ModelError: when there are too few negative weights.

    Cost: one selection.
    """
    if keep == masks.kept:
        return masks
    low = {name: masks[name] & (w < 0) for name, w in weights.items()}
    wide = {name: w.to(torch.promote_types(w.dtype, torch.float32)) for name, w in weights.items()}
    scores = {name: torch.where(low[name], (w - start[name]).abs(), torch.inf) for name, w in wide.items()}
    chosen = best_left(masks, scores, keep)
    if any(bool((mask & ~chosen[name] & ~low[name]).any()) for name, mask in masks.items()):
        raise ModelError(
            f"activating_while_pruning: {masks.kept - keep:,} negative weights are to go, but only "
            f"{sum(int(n.sum()) for n in low.values()):,} are left, and every tensor keeps a weight. Lower `extra`."
        )
    return chosen


def dead_rate(task: Task) -> float | None:
    """Share of the outputs of ``nn.ReLU`` modules that are 0 for all examples; None without such a module.

    A module that is used several times in a pass counts once for each shape of its output. Cost: one forward pass.
    """

    def fold(name: str, seen: dict[tuple[int, ...], Tensor] | None, inputs: object, output: Tensor) -> object:
        shape, awake = tuple(output.shape[1:]), (output != 0).any(0)
        return {**(seen or {}), shape: awake | seen[shape] if seen and shape in seen else awake}

    found = task.collect({n: m for n, m in unwrap(task.model).named_modules() if isinstance(m, nn.ReLU)}, fold)
    awake = [part.reshape(-1) for shapes in found.values() for part in shapes.values()]
    return 1 - sum(int(part.sum()) for part in awake) / sum(map(len, awake)) if awake else None
