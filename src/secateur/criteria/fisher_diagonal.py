"""Diagonal Fisher: the rise of the loss when a weight goes, from the squared slopes of single examples."""

from dataclasses import dataclass

import torch

from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.sockets import Criterion
from secateur.core.task import Task
from secateur.linalg import diagonals


@dataclass(frozen=True)
class FisherDiagonal(Criterion):
    """``w² F_qq / 2``, where ``F_qq`` is the mean over examples of the squared slope of each example's own loss.

    The empirical Fisher stands for the Hessian, so this is optimal brain damage with a curvature that is never
    negative and costs no second derivative. Scores have the shape of each weight, float32 or wider, in units of
    the loss squared; pruned weights score 0. Evaluation mode: running statistics of BatchNorm. Slopes of single
    examples vanish where the network fits each of them exactly; the ranking is then noise.

    Raises:
        ModelError: when a weight is NaN or infinite.
        DataError: when the data is empty or spent, or the loss is not finite.
        MaskError: when ``masks`` belong to another network.

    Cost: one gradient for every example; memory of one batch of them.
    """

    paper = Paper(
        "WoodFisher: Efficient Second-Order Approximation for Neural Network Compression",
        "Singh, Alistarh",
        2020,
        "arXiv:2004.14340",
        differs="the diagonal baseline of the paper; slopes of single examples, where the paper averages them over a "
        "mini-batch before it squares, which depends on the batch size; no damping",
    )
    needs = frozenset({"gradients"})

    @torch.no_grad()
    def __call__(self, task: Task, masks: Masks) -> Named:
        """Scores for every tensor of ``masks``; higher = keep."""
        weights = masks.match(task.model)
        check_finite(dict(weights))
        fisher = diagonals.fisher_diagonal(task, masks)
        scores = {}
        for name, w in weights.items():
            wide = torch.promote_types(w.dtype, torch.float32)  # products in half precision tie
            scores[name] = w.detach().to(wide).square() * fisher[name] / 2
        return scores
