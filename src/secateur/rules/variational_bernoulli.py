"""Bernoulli gates: units learn whether to stay, and most decide."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import UsageError
from secateur.core.reading import Paper
from secateur.core.run import Run
from secateur.core.sockets import Rule
from secateur.core.task import Batch
from secateur.rules import _behind


@dataclass(frozen=True)
class VariationalBernoulli(Rule):
    """Switch the inputs of layers on and off at random, and learn the chances: they are drawn to 0 or 1.

    Input channel ``i`` of a layer is multiplied by ``xi ~ Bernoulli(theta_i)``, for each example anew. With the
    hyper-prior of the paper eliminated, the objective is ``sum of the losses - log gamma * sum theta`` (and weight
    decay, which is the run's): linear in each ``theta``, so that its minima are networks without chance. ``theta``
    moves by ``-rate * (mean over examples of d loss / d xi - log gamma / N)``, is projected to [0, 1], and its rate
    falls as a cosine. In evaluation mode channels with ``theta > 1/2`` are on, the others off; at the end they are
    pruned. A layer never loses all its channels: the best one stays.

    Gates belong to dense and convolutional layers whose weight the masks cover, so leave the first layer out (`skip`)
    where all inputs of the network are to stay; it still loses the units that no layer reads, when the network is
    shrunk. They stand behind norm and activation, and layers that read one residual stream choose for themselves. Other
    weights stay as they are, so do layers whose weight is read without a call (in ``nn.MultiheadAttention``). Weight
    decay acts on switched-off weights too. Averages (``ema``) are refused.

    Args:
        log_gamma: logarithm of the hyper-prior's gamma, below 0: -20 on MNIST. Lower prunes more.
        start: first value of all ``theta``, in [0, 1].
        rate: the rate of ``theta`` at the beginning of the run, at least 0; 1 to 2 for a mean loss.
        examples: training examples ``N`` (terms of the mean loss); 0 counts them in the first epoch.

    Raises:
        UsageError: for values out of range.
        ModelError: when no layer can be gated.

    Cost: each step a product with the inputs of every layer; one number for each input channel.
    """

    paper = Paper(
        "Robust Learning of Parsimonious Deep Neural Networks",
        "Guenter, Sideris",
        2022,
        "arXiv:2205.04650",
        differs="the penalty is our own derivation from the hyper-prior, the first-order gradient of theta and all "
        "defaults are unverified against the paper; gates stand at inputs of layers, each layer its own; units are "
        "pruned at the end by theta alone and removed by a step of its own, not while the network trains",
    )

    log_gamma: float = -20.0
    start: float = 0.9
    rate: float = 1.5
    examples: int = 0

    def __post_init__(self) -> None:
        if not -math.inf < self.log_gamma < 0:
            raise UsageError(
                f"variational_bernoulli: log_gamma is {self.log_gamma!r}; it must be below 0, -20.0 is usual."
            )
        if not 0 <= self.start <= 1:
            raise UsageError(f"variational_bernoulli: start is {self.start!r}; it must be in [0, 1], 0.9 is usual.")
        if not 0 <= self.rate < math.inf:
            raise UsageError(f"variational_bernoulli: rate is {self.rate!r}; it must be at least 0, 1.5 is usual.")
        if self.examples < 0:
            raise UsageError(
                f"variational_bernoulli: examples is {self.examples!r}; it must be positive, or 0 to count them."
            )

    def begin(self, run: Run) -> None:
        """Put switches before the layers."""
        _behind.attach(run, self, Switch, called=True)
        for module, switch in _behind.standing(run, Switch).values():
            switch.handle = module.register_forward_pre_hook(_switched, with_kwargs=True)

    def loss(self, run: Run, loss: Tensor, batch: Batch, output: Any) -> Tensor:
        """Unchanged; the examples are counted."""
        _behind.hear(run, self, batch[1])
        return loss

    @torch.no_grad()
    def before_step(self, run: Run) -> None:
        """Move ``theta`` by its gradient, for the layers that the loss went through."""
        size = _behind.data_size(run, self, self.examples)
        rate = self.rate * (1 + math.cos(math.pi * run.progress)) / 2
        for _, switch in _behind.standing(run, Switch).values():
            theta = switch.theta
            if theta.grad is not None:
                theta.sub_(theta.grad - self.log_gamma / size, alpha=rate).clamp_(0, 1)
                theta.grad = None  # clipping is for the weights

    def after_step(self, run: Run) -> None:
        """Make ready for the chances of the next step."""
        _behind.renew(run, Switch)

    def end(self, run: Run) -> None:
        """Prune the weights of channels that are off."""
        off = [name for name, (_, b) in _behind.standing(run, Switch).items() if not (b.theta > 0.5).any()]
        if off:
            warnings.warn(
                f"variational_bernoulli: all inputs of `{'`, `'.join(off[:4])}` went off; the best one stays.",
                stacklevel=2,
            )
        _behind.bake(run, Switch)
        run.state(self).clear()


class Switch(_behind.Behind):
    """The chances of one layer's input channels."""

    def __init__(self, rule: Any, module: Any, random: torch.Generator) -> None:
        super().__init__(rule, module, random)
        channels = self.mask.shape[1] * self.parts
        self.theta = nn.Parameter(torch.full((channels,), rule.start, device=self.like.device, dtype=self.like.dtype))

    def kept(self, weight: Tensor) -> Tensor:
        """Weights of channels that are on; the best channel that has weights always is."""
        on = self.spread(self.theta > 0.5) & self.mask
        if not on.any():
            theta = self.spread(self.theta).expand_as(self.mask).masked_fill(~self.mask, -1.0)
            best = (
                self.spread(torch.arange(self.theta.numel(), device=on.device)).expand_as(on).flatten()[theta.argmax()]
            )
            on = self.spread(torch.arange(self.theta.numel(), device=on.device) == best)
        return on.expand_as(weight)

    def sample(self, x: Tensor) -> Tensor:
        """Zeros and ones for each example and channel; their gradient goes to ``theta`` as if it were they."""
        spatial = self.mask.dim() - 2
        batched = x.dim() > spatial + 1
        shape = (
            x.shape[0] if batched else 1,
            *[1] * (x.dim() - batched - 1 - spatial),
            len(self.theta),
            *[1] * spatial,
        )
        random = self.stream(*_behind.rank())
        drawn = torch.rand(shape, generator=random, dtype=self.like.dtype, device=self.like.device)
        theta = self.theta.view(-1, *[1] * spatial)
        # A chance of 1 is always on and one of 0 always off, for draws lie in [0, 1)
        xi = (drawn < theta.detach()).to(theta.dtype) + (theta - theta.detach())
        return (xi if batched else xi[0]).to(x.dtype)


def _switched(module: Any, inputs: Any, more: Any) -> Any:
    switch: Switch = module.parametrizations.weight[0]
    if not switch.training:
        return None
    x = inputs[0] if inputs else more["input"]
    return (x * switch.sample(x), *inputs[1:]), {key: value for key, value in more.items() if key != "input"}
