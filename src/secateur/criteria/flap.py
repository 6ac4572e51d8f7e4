"""FLAP: an input matters by how far it strays from its mean, times the weights that it meets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.sockets import Criterion
from secateur.core.task import Task
from secateur.linalg.columns import by_group, check_heard, hear, on_columns

_Moments = tuple[int, Tensor, Tensor]


@dataclass(frozen=True)
class Flap(Criterion):
    """``Var(x_j) · ‖W_j‖²`` for each input j of a layer: what is lost when the input is replaced by its mean.

    The variance (with n - 1) runs over every position of every example. For a linear layer or a 1×1 convolution the
    score is the squared error of the output, summed over positions and divided by n - 1, when the input goes and its
    mean moves into the bias; for larger kernels, whose border meets padding and whose taps are correlated, it is that
    of each tap by itself, added up.

    The scores of an input stand on the column that multiplies it (the weights of a channel, over all filters of its
    group), shared evenly, so that the column's sum is the score; for single weights they say nothing more. Pruned
    weights score 0 and do not count. Higher = keep; shape of each weight, float32 or wider, at least 0 unless
    standardised. Evaluation mode, no gradient.

    Heard are linear layers, convolutions and a single recurrent layer, called as modules. Positions that an
    ``attention_mask`` among the inputs marks 0 do not count.

    Args:
        standardize: subtract the mean over the layer's inputs and divide by their standard deviation, as the paper
            does to compare layers with one threshold; scores may then be negative.

    Raises:
        ModelError: when a weight is not finite, or its inputs are not heard.
        DataError: when the data is empty or spent, or an input of a layer is not finite.
        MaskError: when ``masks`` belong to another network.

    Cost: one forward pass over the data; memory of one layer's input in float64.
    """

    standardize: bool = False

    paper = Paper(
        "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
        "An, Zhao, Yu, Tang, Wang",
        2024,
        "arXiv:2312.11983",
        differs="one pass through the network as it stands, where the paper goes block by block; layers of any kind, "
        "not only those behind attention and gated neurons; the bias that makes up for the removal is not written",
    )
    needs = frozenset({"activations"})

    @torch.no_grad()
    def __call__(self, task: Task, masks: Masks) -> Named:
        """Scores for every tensor of ``masks``; higher = keep."""
        weights = masks.match(task.model)
        check_finite(dict(weights))
        heard: dict[str, _Moments] = hear(task, masks, _merged)
        scores = {}
        for name, w in weights.items():
            count, mean, squares = heard[name]
            kept = masks[name].to(w.device)
            norms = by_group((w.detach().double() * kept).square(), len(mean)).sum((1, 3)).reshape(-1)
            columns = check_heard(name, squares / max(1, count - 1) * norms)
            if self.standardize:
                spread = columns.std() if len(columns) > 1 else columns.new_zeros(())
                columns = (columns - columns.mean()) / torch.where(spread > 0, spread, 1)
            scores[name] = on_columns(columns, kept).to(torch.promote_types(w.dtype, torch.float32))
        return scores


def _merged(before: _Moments | None, x: Tensor, real: Tensor) -> _Moments:
    """Count, mean and sum of squared differences from it, with more inputs; differences, so that nothing cancels."""
    rows = x[real]
    here = rows.mean(0) if len(rows) else rows.new_zeros(rows.shape[1])
    squares = (rows - here).square().sum(0)
    if before is None:
        return len(rows), here, squares
    count, mean, so_far = before
    total = max(1, count + len(rows))
    apart = here - mean
    return (
        count + len(rows),
        mean + apart * (len(rows) / total),
        so_far + squares + apart.square() * (count * len(rows) / total),
    )
