"""GraSP: before training, keep the weights without which the gradient would shrink."""

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from secateur.core.errors import ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.sockets import Criterion
from secateur.core.task import Batch, Statistics, Task
from secateur.linalg.products import Operator


@dataclass(frozen=True)
class Grasp(Criterion):
    """``w · (Hg)``: minus half the first-order change of ``g·g`` when a weight is set to zero, with its sign.

    ``g`` is the gradient of the mean loss at the kept weights of the tensors in ``masks`` and ``H`` its Hessian
    there. A positive score says that the gradient would shrink without the weight, so it is kept; the most negative
    go first, and weights without any influence (score 0) lie in the middle. Scores have the shape of each weight,
    float32 or wider, in units of the loss squared over those of a weight squared. Dropout is off. The paper takes
    one batch of about ten examples a class: pass that batch as the data to follow it.

    Args:
        temperature: the outputs are divided by this before the loss; 200 in the paper, which makes the classes
            nearly alike and the ranking one of the network more than of its targets.
        statistics: what BatchNorm uses, as for ``snip``: ``"auto"`` takes fresh statistics of each batch for
            layers never trained and running ones for the others. Fresh ones make the scores depend on how the data
            is cut into batches.

    Raises:
        UsageError: for a temperature that is not positive, or other statistics.
        ModelError: when a weight is NaN or infinite, the output is not a tensor, or the network cannot be
            differentiated twice.
        DataError: when the data is empty or spent, or the loss is not finite.
        MaskError: when ``masks`` belong to another network.

    Cost: one gradient and one Hessian product (two more backward passes) over the data; memory of three gradients.
    """

    temperature: float = 200.0
    statistics: Statistics = "auto"

    paper = Paper(
        "Picking Winning Tickets Before Training by Preserving Gradient Flow",
        "Wang, Zhang, Grosse",
        2020,
        "arXiv:2002.07376",
        differs="the gradient is the mean over all of the data, not a sum over two halves of a batch, and scores are "
        "not divided by their sum (the ranking is the same); Linear weights are scored as they are, where the "
        "authors' code draws them anew",
    )
    needs = frozenset({"gradients", "hessian"})

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"temperature must be a positive number, not {self.temperature:g}; the paper takes 200.")
        if self.statistics not in get_args(Statistics):
            raise UsageError(f"statistics must be 'auto', 'running' or 'fresh', not {self.statistics!r}.")

    def __call__(self, task: Task, masks: Masks) -> Named:
        """Scores for every tensor of ``masks``; higher = keep."""
        weights = masks.match(task.model)
        check_finite(dict(weights))
        calm = _Calm(task.model, task.loss, task.data, self.temperature, self.statistics)
        curvature = Operator(calm, masks)
        slopes = calm.gradients(statistics=self.statistics)
        curved = curvature.unflatten(curvature @ curvature.flatten({name: slopes[name] for name in masks}))
        scores = {}
        for name, w in weights.items():
            wide = torch.promote_types(w.dtype, torch.float32)  # products in half precision tie
            scores[name] = w.detach().to(wide) * curved[name]
        return scores


@dataclass(frozen=True)
class _Calm(Task):
    """The task with its outputs divided by a temperature, whatever asks for its loss."""

    temperature: float
    statistics: Statistics

    def loss_at(self, batch: Batch, at: Named | None = None, statistics: Statistics = "running") -> Tensor:
        def loss(output: Any, target: Any) -> Tensor:
            if not isinstance(output, Tensor):
                raise ModelError(
                    f"the network gives {type(output).__name__}; GraSP divides its outputs by a temperature and needs "
                    "one tensor. Wrap the network, or use `snip`."
                )
            wide = torch.promote_types(output.dtype, torch.float32)  # calm outputs are all but equal
            return self.loss(output.to(wide) / self.temperature, target)

        return Task(self.model, loss, self.data).loss_at(batch, at, self.statistics)
