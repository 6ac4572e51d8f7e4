"""SOSP-H: whole output units by slope and curvature of the loss, each unit together with all others."""

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
class SospH(Criterion):
    """``|w_s · g| + |w_s · H w| / 2`` for each output unit ``s``: what the loss has to do with it, to second order.

    A unit is a row of a matrix or a filter of a convolution, as in the pattern ``unit``; ``w_s`` are its kept
    weights, ``w`` those of all tensors in ``masks`` together, ``g`` and ``H`` gradient and Hessian of the mean
    loss. Biases and the scales of norms stay out, since pruning leaves them where they are.

    The value of a unit is shared out among its weights in proportion to ``|w g| + |w (Hw)| / 2`` of each, so that
    sums over units are exactly the formula. Scores have the shape of each weight, float32 or wider, in units of
    the loss, at least 0; pruned weights score 0. Evaluation mode: running statistics of BatchNorm.

    Raises:
        ModelError: when a weight is NaN or infinite, or the network cannot be differentiated twice.
        DataError: when the data is empty or spent, or the loss is not finite.
        MaskError: when ``masks`` belong to another network.

    Cost: one Hessian product over the data, which gives the gradient on its way; memory of four gradients.
    """

    paper = Paper(
        "SOSP: Efficiently Capturing Global Correlations by Second-Order Structured Pruning",
        "Nonnenmacher, Pfeil, Steinwart, Reeb",
        2022,
        "arXiv:2110.11395",
        differs="units that a shortcut couples are scored one by one; biases and the scales of norms do not count; "
        "where the absolute values stand is not checked against the paper's text, and there is no code to compare with",
    )
    needs = frozenset({"gradients", "hessian"})

    def __call__(self, task: Task, masks: Masks) -> Named:
        """Scores for every tensor of ``masks``; higher = keep. Meant for whole output units."""
        weights = masks.match(task.model)
        check_finite(dict(weights))
        curvature = Operator(task, masks)
        both = curvature.with_gradient(curvature.flatten({n: w.detach() for n, w in weights.items()}))
        slopes, curved = map(curvature.unflatten, both)
        scores = {}
        for name, w in weights.items():
            wide = torch.promote_types(w.dtype, torch.float32)  # products in half precision tie
            kept = (w.detach() * masks[name].to(w.device)).to(wide)
            first, second = (kept * slopes[name]).flatten(1), (kept * curved[name]).flatten(1) / 2
            share = first.abs() + second.abs()
            unit = first.sum(1).abs() + second.sum(1).abs()
            # no share is smaller than what it adds to its unit, so a sum of 0 means a unit of 0
            whole = share.sum(1)
            factor = torch.where(whole > 0, unit / whole.where(whole > 0, torch.ones_like(whole)), 0.0)
            scores[name] = (share * factor[:, None]).reshape(w.shape)
        return scores
