"""Movement: keep the weights that training moves away from zero, whatever their size."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from secateur.core.errors import DataError, ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.sockets import Criterion
from secateur.core.task import Task


@dataclass(frozen=True)
class Movement(Criterion):
    """Movement score ``-Σ_t w_t · dL/dw_t`` along ``steps`` steps of gradient descent from the weights as they stand.

    Scores have the shape of each weight, float32 or wider, in units of the loss, and a sign: positive where the loss
    pushes a weight away from zero, negative where it pulls it there. A weight that nothing moves scores 0 and so
    ranks above one that shrinks; ``lamp`` and ``by-cost`` refuse negative scores, ``global`` and ``uniform`` do not.
    With one step the score is ``-w · dL/dw``. Further steps go on copies, over all of the data each, and follow the
    fine-tuning on the new task that the method is made for; pruned weights stay zero. Evaluation mode, running
    statistics.

    Args:
        steps: gradients to add up, at least 1.
        rate: learning rate of the steps between them; of no effect with one.

    Raises:
        UsageError: when steps or rate are out of range.
        ModelError: when a weight is NaN or infinite, or the steps diverge.
        DataError: when the data is empty or spent, or the loss is not finite.
        MaskError: when ``masks`` belong to another network.

    Cost: ``steps`` forward and backward passes over the data; memory of one gradient, and with several steps of a
    float32 copy of the parameters.
    """

    steps: int = 1
    rate: float = 0.01

    paper = Paper(
        "Movement Pruning: Adaptive Sparsity by Fine-Tuning",
        "Sanh, Wolf, Rush",
        2020,
        "arXiv:2005.07683",
        differs="scores only: the gradient is that of the network as masked, over all of the data, by plain gradient "
        "descent; the paper learns scores and weights together, batch by batch, through a mask that follows the "
        "scores, so that its pruned weights are scored further and may return",
    )
    needs = frozenset({"gradients"})

    def __post_init__(self) -> None:
        if not (isinstance(self.steps, int) and self.steps >= 1):
            raise UsageError(f"steps must be a whole number of at least 1, not {self.steps!r}.")
        if not 0 < self.rate < float("inf"):
            raise UsageError(f"rate must be a number above 0, not {self.rate!r}; 0.01 is usual.")

    def __call__(self, task: Task, masks: Masks) -> Named:
        """Scores for every tensor of ``masks``; higher = keep."""
        check_finite(dict(masks.match(task.model)))
        own = task.params()
        wide = {name: p.detach().to(torch.promote_types(p.dtype, torch.float32)) for name, p in own.items()}
        scores = {name: torch.zeros_like(wide[name]) for name in masks}
        for step in range(self.steps):
            at = {name: w.to(own[name].dtype) for name, w in wide.items()} if step else None
            try:
                slopes = task.gradients(at)
            except DataError as error:
                if not step:
                    raise
                raise ModelError(
                    f"after {step} steps with rate {self.rate:g} the network has diverged; take a lower rate. {error}"
                ) from error
            for name, score in scores.items():
                score.sub_(wide[name] * slopes[name])
            if step + 1 < self.steps:
                wide = {name: w - self.rate * slopes[name] * (masks.get(name, 1)) for name, w in wide.items()}
        return scores
