"""EarlyCroP: keep the weights whose removal would change the flow of the gradient most, shortly after the start."""

from dataclasses import dataclass

import torch

from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.sockets import Criterion
from secateur.core.task import Task
from secateur.linalg.products import Operator


@dataclass(frozen=True)
class EarlyCrop(Criterion):
    """``|w · (Hg)|``: half the first-order change of the gradient flow ``g·g`` when a weight is set to zero.

    ``g`` is the gradient of the mean loss at the kept weights of the tensors in ``masks`` and ``H`` its Hessian
    there. Scores have the shape of each weight, float32 or wider, in units of the loss squared over those of a
    weight squared; pruned weights score 0. Evaluation mode: running statistics of BatchNorm. Unlike ``grasp`` the
    sign is dropped: a removal that would raise the flow counts as much as one that would lower it.

    The score is meant for the first epochs: at a minimum ``g`` and with it every score vanishes.

    Raises:
        ModelError: when a weight is NaN or infinite, or the network cannot be differentiated twice.
        DataError: when the data is empty or spent, or the loss is not finite.
        MaskError: when ``masks`` belong to another network.

    Cost: one gradient and one Hessian product (two more backward passes) over the data; memory of three gradients.
    """

    paper = Paper(
        "Winning the Lottery Ahead of Time: Efficient Early Network Pruning",
        "Rachwan, Zügner, Charpentier, Geisler, Ayle, Günnemann",
        2022,
        "arXiv:2206.10451",
        differs="the score of single weights only: when to prune is left to a schedule, and a unit scores the sum of "
        "its weights, not the slope along one gate on all of it; one score, not a hundred nearly equal rounds",
    )
    needs = frozenset({"gradients", "hessian"})

    def __call__(self, task: Task, masks: Masks) -> Named:
        """Scores for every tensor of ``masks``; higher = keep."""
        weights = masks.match(task.model)
        check_finite(dict(weights))
        curvature = Operator(task, masks)
        slopes = task.gradients()
        curved = curvature.unflatten(curvature @ curvature.flatten({name: slopes[name] for name in masks}))
        scores = {}
        for name, w in weights.items():
            wide = torch.promote_types(w.dtype, torch.float32)  # products in half precision tie
            scores[name] = (w.detach().to(wide) * curved[name]).abs()
        return scores
