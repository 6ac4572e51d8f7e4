"""Minitron: an input matters by how strongly it is active."""

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
from secateur.linalg.columns import check_heard, hear, on_columns


@dataclass(frozen=True)
class Minitron(Criterion):
    """``sqrt(Σ over examples of (mean over positions of |x_j|)²)`` for each input j of a layer.

    Of the ways to add up activations the paper tries, this one served it best: the mean over a sequence (or over the
    places of an image), then the root of the sum of squares over examples. Weights play no part.

    The scores of an input stand on the column that multiplies it (the weights of a channel, over all filters of its
    group), shared evenly, so that the column's sum is the score; for single weights they say nothing more. Pruned
    weights score 0. Higher = keep; shape of each weight, float32 or wider, at least 0. Evaluation mode, no gradient.

    Heard are linear layers, convolutions and a single recurrent layer, called as modules. Positions that an
    ``attention_mask`` among the inputs marks 0 do not count. The first dimension of an input is taken for the
    examples; a layer that gets examples and positions in one dimension takes each row for an example.

    Raises:
        ModelError: when a weight is not finite, or its inputs are not heard.
        DataError: when the data is empty or spent, or an input of a layer is not finite.
        MaskError: when ``masks`` belong to another network.

    Cost: one forward pass over the data; memory of one layer's input in float64.
    """

    paper = Paper(
        "Compact Language Models via Pruning and Knowledge Distillation",
        "Muralidharan, Sreenivas, Joshi, Chochowski, Patwary, Shoeybi, Catanzaro, Kautz, Molchanov",
        2024,
        "arXiv:2407.14679",
        differs="neurons and channels are heard where they are used, so neurons behind their activation function; "
        "heads are scored by their inputs to the output projection, added up, not by the norm of their output",
    )
    needs = frozenset({"activations"})

    @torch.no_grad()
    def __call__(self, task: Task, masks: Masks) -> Named:
        """Scores for every tensor of ``masks``; higher = keep."""
        weights = masks.match(task.model)
        check_finite(dict(weights))
        heard: dict[str, Tensor] = hear(task, masks, _added)
        scores = {}
        for name, w in weights.items():
            columns = check_heard(name, heard[name].sqrt())
            kind = torch.promote_types(w.dtype, torch.float32)
            scores[name] = on_columns(columns, masks[name].to(w.device)).to(kind)
        return scores


def _added(before: Tensor | None, x: Tensor, real: Tensor) -> Tensor:
    """Sums over examples of the squared mean over their real positions."""
    sizes = torch.where(real[:, :, None], x.abs(), 0).sum(1)
    squares = (sizes / real.sum(1).clamp(min=1)[:, None]).square().sum(0)
    return squares if before is None else before + squares
