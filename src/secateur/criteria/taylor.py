"""Taylor: keep the weights whose removal would change the loss of a trained network most, to first order."""

from dataclasses import dataclass

import torch

from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.sockets import Criterion
from secateur.core.task import Task


@dataclass(frozen=True)
class Taylor(Criterion):
    """The squared first-order change of the mean loss when a weight is set to zero: ``(w · dL/dw)²``.

    Scores have the shape of each weight, float32 or wider, in units of the loss squared. For single weights the
    ranking is that of ``|w · dL/dw|``. The square matters where scores are added up (blocks, whole output units): a
    sum of squares lets a few important weights carry their unit. The network is judged as it stands: evaluation
    mode, running statistics of BatchNorm; for a network that was never trained use ``snip``.

    The gradient is that of the mean loss. At an exact minimum it vanishes and with it every score; prune before
    the last bit of training, or on data the network has not fitted.

    Raises:
        ModelError: when a weight is NaN or infinite.
        DataError: when the data is empty or spent, or the loss is not finite.
        MaskError: when ``masks`` belong to another network.

    Cost: one forward and backward pass over the data; memory of one gradient.
    """

    paper = Paper(
        "Importance Estimation for Neural Network Pruning",
        "Molchanov, Mallya, Tyree, Frosio, Kautz",
        2019,
        "arXiv:1906.10771",
        differs="the gradient over all of the data is squared once; the paper squares that of every mini-batch during "
        "training and averages, which depends on the batch size. A unit scores the sum of its weights' squares, the "
        "second of the paper's two forms, not the square of their sum",
    )
    needs = frozenset({"gradients"})

    def __call__(self, task: Task, masks: Masks) -> Named:
        """Scores for every tensor of ``masks``; higher = keep."""
        weights = masks.match(task.model)
        check_finite(dict(weights))
        slopes = task.gradients()
        scores = {}
        for name, w in weights.items():
            wide = torch.promote_types(w.dtype, torch.float32)  # products in half precision tie
            scores[name] = (w.detach().to(wide) * slopes[name]).square()
        return scores
