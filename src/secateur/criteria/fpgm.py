"""FPGM: prune the filters that the others of their layer can stand in for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.masks import Masks
from secateur.core.names import Named, owners
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.select import spread
from secateur.core.sockets import Criterion
from secateur.core.task import Task

_DISTANCES = 1 << 24


@dataclass(frozen=True)
class Fpgm(Criterion):
    """Sum of distances ``Σ_j ‖F_i - F_j‖₂`` of each output unit to the others of its layer.

    A filter near the geometric median scores low: the others can replace it, whatever its norm. Scores have the shape
    of each weight, float32 or wider, at least 0. Every weight carries the score of its unit (in a unit pruned in part
    the kept weights share it evenly and pruned ones score 0), so ``Unit`` ranks units as the method does; for single
    weights the score says nothing more. Sums grow with the number and the size of filters: rank within layers
    (``uniform``), as the paper does.

    Units that ``masks`` prune whole are no neighbours. Grouped convolutions compare filters within their group; those
    of a depthwise convolution, alone in their groups, are compared with one another.

    Raises:
        ModelError: when a weight is NaN or infinite.
        MaskError: when ``masks`` belong to another network.

    Cost: ``n² k`` for n filters of k weights, memory of 64 MB in float32; no data, no gradient.
    """

    paper = Paper(
        "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration",
        "He, Liu, Wang, Hu, Yang",
        2019,
        "arXiv:1811.00250",
        differs="scores only; the paper zeroes filters after every epoch and lets them grow back, which is left to a "
        "rule; its optional first cut by norm is left out",
    )
    needs = frozenset({"data-free"})

    def __call__(self, task: Task, masks: Masks) -> Named:
        """Scores for every tensor of ``masks``; higher = keep."""
        weights = masks.match(task.model)
        check_finite(dict(weights))
        holders = owners(task.model)
        scores = {}
        for name, w in weights.items():
            kept = masks[name].to(w.device)
            rows = (w.detach().to(torch.promote_types(w.dtype, torch.float32)) * kept).reshape(len(w), -1)
            groups = max(getattr(module, "groups", 1) for module in holders[name])
            size = len(w) // groups if 1 < groups < len(w) else len(w)
            alive = kept.reshape(len(w), -1).any(1)
            units = torch.zeros_like(rows[:, 0])
            for start in range(0, len(w), size):
                here = alive[start : start + size].nonzero()[:, 0] + start
                units[here] = _distances(rows[here])
            scores[name] = spread(units, kept)
        return scores


def _distances(rows: Tensor) -> Tensor:
    """Sum of the distances of each row to all rows; differences, not products, since near rows would round to 0."""
    if not len(rows):
        return rows.sum(1)
    parts = rows.split(max(1, _DISTANCES // len(rows)))
    return torch.cat([torch.cdist(p, rows, compute_mode="donot_use_mm_for_euclid_dist").sum(1) for p in parts])
