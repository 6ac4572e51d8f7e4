"""Network slimming: a penalty that draws the scales of BatchNorm to zero while the network trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.core.errors import ModelError, UsageError
from secateur.core.reading import Paper
from secateur.core.run import Run
from secateur.core.sockets import Rule


@dataclass(frozen=True)
class Slimming(Rule):
    """Add ``strength * sign(gamma)`` to the gradient of every BatchNorm scale; 0 where the scale is 0.

    It is the gradient of ``strength * sum |gamma|`` beside the loss. Nothing is pruned: rank channels by the scales
    afterwards (criterion ``bn_scale``), remove them, and train on without the rule.

    A scale moves by about the learning rate times ``strength`` in each step, divided by ``1 - momentum``; summed over
    the run this must exceed the scales' first value several times, else none of them gets near zero. Weight decay on
    the scales would add an L2 penalty. ``clip`` counts the penalty as part of the gradient.

    Args:
        strength: weight of the penalty, at least 0. The paper's 1e-4 (VGG) and 1e-5 (ResNet, DenseNet) are for 160
            epochs; short runs need more.

    Raises:
        UsageError: for a strength that is negative or not finite.
        ModelError: when the network has no BatchNorm with a scale that is trained.

    Cost: one addition for each scale and step; no memory.
    """

    paper = Paper(
        "Learning Efficient Convolutional Networks through Network Slimming",
        "Liu, Li, Shen, Huang, Yan, Zhang",
        2017,
        "arXiv:1708.06519",
        differs="the penalty alone; pruning and fine-tuning are steps of their own. Scales start where the network "
        "has them, in the authors' code at 0.5",
    )

    strength: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 <= self.strength < float("inf"):
            raise UsageError(f"slimming: strength is {self.strength!r}; it must be at least 0, 1e-4 is usual.")

    def begin(self, run: Run) -> None:
        """Check that there is something to penalise."""
        if not _scales(run.model):
            raise ModelError(
                f"slimming: {type(run.model).__name__} has no BatchNorm with a trained scale, so there is nothing to "
                "draw to zero. Put BatchNorm (affine) behind its convolutions, or rank by another criterion."
            )

    @torch.no_grad()
    def before_step(self, run: Run) -> None:
        """Add the penalty's gradient."""
        for gamma in _scales(run.model):
            slope = self.strength * gamma.sign()
            gamma.grad = slope if gamma.grad is None else gamma.grad.add_(slope)


def _scales(model: nn.Module) -> list[nn.Parameter]:
    """The scales that are trained, each once."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    found = [norm.weight for norm in norms if isinstance(norm.weight, nn.Parameter) and norm.weight.requires_grad]
    return list(dict.fromkeys(found))
