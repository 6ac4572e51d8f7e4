"""Random: the control that every criterion is compared with."""

from dataclasses import dataclass

import torch

from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.reading import Paper
from secateur.core.sockets import Criterion
from secateur.core.streams import stream
from secateur.core.task import Task


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform scores in [0, 1), float32, in the shape of each weight; weights pruned already score 0.

    Each tensor has its own stream of random numbers, named after it, so the scores of one tensor do not depend on
    which others are pruned. They are drawn on the CPU and then moved: every device gives the same masks.

    Args:
        seed: another seed gives other scores; the same seed gives the same ones, and masks that nest.

    Raises:
        MaskError: when ``masks`` belong to another network.

    Cost: one random number a weight; no data, no gradient.
    """

    seed: int = 0

    paper = Paper(
        "The State of Sparsity in Deep Neural Networks",
        "Gale, Elsen, Hooker",
        2019,
        "arXiv:1902.09574",
        differs="scores only; their random baseline prunes gradually, which is left to a rule here",
    )
    needs = frozenset({"data-free", "random"})

    def __call__(self, task: Task, masks: Masks) -> Named:
        """Scores for every tensor of ``masks``; higher = keep."""
        scores = {}
        for name, w in masks.match(task.model).items():
            drawn = torch.rand(w.shape, generator=stream(self.seed, "random", name), dtype=torch.float32)
            scores[name] = drawn.to(w.device) * masks[name].to(w.device)
        return scores
