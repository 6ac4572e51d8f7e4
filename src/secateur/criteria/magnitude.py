"""Magnitude: keep the largest weights."""

from dataclasses import dataclass

from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.sockets import Criterion
from secateur.core.task import Task


@dataclass(frozen=True)
class Magnitude(Criterion):
    """The absolute value ``|w|`` of each weight, in its own type and shape.

    The baseline that every other criterion must beat. Scales differ from layer to layer (a normalisation layer
    undoes any factor), so the ``lamp`` allocation is fairer across layers than one global threshold.

    Raises:
        ModelError: when a weight is NaN or infinite.
        MaskError: when ``masks`` belong to another network.

    Cost: one pass over the weights; no data, no gradient.
    """

    paper = Paper(
        "Learning both Weights and Connections for Efficient Neural Networks",
        "Han, Pool, Tran, Dally",
        2015,
        "arXiv:1506.02626",
        differs="scores only; the paper's threshold of a multiple of each layer's standard deviation is an allocation",
    )
    needs = frozenset({"data-free"})

    def __call__(self, task: Task, masks: Masks) -> Named:
        """Scores for every tensor of ``masks``; higher = keep."""
        weights = masks.match(task.model)
        check_finite(dict(weights))
        return {name: w.detach().abs() for name, w in weights.items()}
