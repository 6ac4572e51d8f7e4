"""SNIP: keep the connections whose removal would change the loss fastest, before any training."""

from dataclasses import dataclass
from typing import get_args

import torch

from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.sockets import Criterion
from secateur.core.task import Statistics, Task


@dataclass(frozen=True)
class Snip(Criterion):
    """Connection sensitivity ``|w · dL/dw|``: the slope of the mean loss along a gate on each weight, at gate 1.

    Scores have the shape of each weight, float32 or wider, in units of the loss. The gradient is over all of
    ``task.data``; the paper uses one batch of about ten examples a class, so pass that batch as the data to follow
    it. Dropout is off.

    Args:
        statistics: what BatchNorm uses. At initialisation its running statistics (mean 0, variance 1) describe no
            data and mislead the gradient, so ``"auto"`` takes fresh statistics of each batch for layers never
            trained and running ones for the others. ``"running"`` and ``"fresh"`` force one of the two. Fresh
            statistics make the scores depend on how the data is cut into batches. Running ones never change.

    Raises:
        UsageError: for other statistics.
        ModelError: when a weight is NaN or infinite.
        DataError: when the data is empty or spent, or the loss is not finite.
        MaskError: when ``masks`` belong to another network.

    Cost: one forward and backward pass over the data; memory of one gradient.
    """

    statistics: Statistics = "auto"

    paper = Paper(
        "SNIP: Single-shot Network Pruning based on Connection Sensitivity",
        "Lee, Ajanthan, Torr",
        2019,
        "arXiv:1810.02340",
        differs="scores are not divided by their sum (the ranking is the same); several batches are averaged with "
        "their sign before the absolute value is taken",
    )
    needs = frozenset({"gradients"})

    def __post_init__(self) -> None:
        if self.statistics not in get_args(Statistics):
            raise UsageError(f"statistics must be 'auto', 'running' or 'fresh', not {self.statistics!r}.")

    def __call__(self, task: Task, masks: Masks) -> Named:
        """Scores for every tensor of ``masks``; higher = keep."""
        weights = masks.match(task.model)
        check_finite(dict(weights))
        slopes = task.gradients(statistics=self.statistics)
        scores = {}
        for name, w in weights.items():
            wide = torch.promote_types(w.dtype, torch.float32)  # products in half precision tie
            scores[name] = (w.detach().to(wide) * slopes[name]).abs()
        return scores
