"""Sparse variational dropout: learn how noisy every weight may be, and prune the noisiest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.core.errors import ModelError, UsageError
from secateur.core.reading import Paper
from secateur.core.run import Run
from secateur.core.sockets import Rule
from secateur.core.task import Batch
from secateur.rules import _behind

K1, K2, K3 = 0.63576, 1.87320, 1.48695
"""Constants of the fit of the divergence."""
EPSILON, WIDEST = 1e-8, 8.0
"""Added under logarithms and roots; log alpha is clipped to [-8, 8]."""


@dataclass(frozen=True)
class VariationalDropout(Rule):
    """Train a mean and a variance for every weight, and prune weights whose noise exceeds their signal by far.

    A weight is drawn from ``N(theta, sigma^2)``; ``log alpha = log sigma^2 - log theta^2``. Noise is added to the
    outputs of dense and convolutional layers, for each example and position: mean ``x theta``, variance
    ``x^2 sigma^2``. The penalty is ``r / N`` times the divergence from the log-uniform prior, summed over the weights;
    ``r`` rises from 0 to ``strength`` in a straight line between two points of the run. Evaluation mode has no noise
    and leaves weights out whose ``log alpha`` is at least ``threshold``; at the end they are pruned.

    Other weights stay as they are, so do layers whose weight is read without a call (in ``nn.MultiheadAttention``);
    masks the network came with are held. Biases are not pruned. The optimizer of the run trains ``log sigma^2``, at its
    rate and without weight decay; its gradient is of the order of ``1 / N``, so use Adam. Averages (``ema``) are
    refused. BatchNorm statistics are those of noisy outputs: a `recover` step, or more training, afterwards
    mends them.

    Args:
        strength: weight of the divergence after the rise, at least 0; 1 is the bound on the evidence.
        start: share of the run before the rise.
        stop: share of the run at which it ends. With ``start = stop = 0`` whole layers may die at once.
        threshold: ``log alpha`` from which on a weight is pruned, between -8 and 8; 3 is a dropout rate of 0.95.
        variance: first value of ``log sigma^2``.
        drop: leave weights above the threshold out in training too; their noise remains.
        examples: training examples ``N`` (terms of the mean loss); 0 counts them in the first epoch.

    Raises:
        UsageError: for values out of range.
        ModelError: when there is no such layer, or all weights of a layer end above the threshold.

    Cost: a second product for each layer with its backward pass, and about fifteen passes over the weights in each
    step; one more copy of the weights, which the optimizer trains.
    """

    paper = Paper(
        "Variational Dropout Sparsifies Deep Neural Networks",
        "Molchanov, Ashukha, Vetrov",
        2017,
        "arXiv:1701.05369",
        differs="the variance of the noise is sigma^2 without the clip of log alpha; the divergence rises over shares "
        "of the run, 5 % to 30 % by default",
    )

    strength: float = 1.0
    start: float = 0.05
    stop: float = 0.3
    threshold: float = 3.0
    variance: float = -10.0
    drop: bool = False
    examples: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise UsageError(
                f"variational_dropout: strength is {self.strength!r}; it must be at least 0, 1.0 is usual."
            )
        if not 0 <= self.start <= self.stop <= 1:
            raise UsageError(
                f"variational_dropout: start is {self.start!r} and stop {self.stop!r}; they are shares of the run with "
                "0 <= start <= stop <= 1, for example `start = 0.05`, `stop = 0.3`."
            )
        if not -WIDEST < self.threshold < WIDEST:
            raise UsageError(
                f"variational_dropout: threshold is {self.threshold!r}; it must lie between -8 and 8, 3.0 is usual."
            )
        if not -50 <= self.variance <= 5:
            raise UsageError(
                f"variational_dropout: variance is {self.variance!r}; it is a logarithm in [-50, 5], -10.0 is usual."
            )
        if self.examples < 0:
            raise UsageError(
                f"variational_dropout: examples is {self.examples!r}; it must be positive, or 0 to count them."
            )

    def begin(self, run: Run) -> None:
        """Put variances behind the weights, and noise on the outputs."""
        _behind.attach(run, self, Noise, called=True)
        for module, noise in _behind.standing(run, Noise).values():
            noise.handle = module.register_forward_hook(_noisy, with_kwargs=True)
        _behind.enlist(run, Noise)

    def loss(self, run: Run, loss: Tensor, batch: Batch, output: Any) -> Tensor:
        """Unchanged; the examples are counted."""
        _behind.hear(run, self, batch[1])
        return loss

    def weight(self, progress: float) -> float:
        """``r`` at a share of the run."""
        if progress >= self.stop:
            return self.strength
        return self.strength * max(0.0, progress - self.start) / (self.stop - self.start)

    def before_step(self, run: Run) -> None:
        """Add the gradient of the divergence, once a step, for the layers that the loss went through."""
        size, r = _behind.data_size(run, self, self.examples), self.weight(run.progress)
        if not r:
            return
        for module, noise in _behind.standing(run, Noise).values():
            if noise.calls:
                theta = _behind.weight(module)
                with torch.enable_grad():
                    total = (divergence(noise.log_alpha(theta)) * noise.mask).sum()
                _behind.add_gradient(total * (r / size), [noise.log_variance, theta])

    def after_step(self, run: Run) -> None:
        """Make ready for the noise of the next step."""
        _behind.renew(run, Noise)

    def end(self, run: Run) -> None:
        """Prune by the threshold."""
        every = _behind.standing(run, Noise)
        dead = [name for name, (m, b) in every.items() if not (b.kept(_behind.weight(m)) & b.mask).any()]
        _behind.bake(run, Noise)
        run.state(self).clear()
        if dead:
            raise ModelError(
                f"variational_dropout: no weight of `{'`, `'.join(dead[:4])}` is left. Let the divergence rise later "
                "(`start`, `stop`), lower `strength`, or begin with a trained network."
            )


def divergence(log_alpha: Tensor) -> Tensor:
    """The divergence of each weight from the log-uniform prior, fitted to 0.01; 0 for endless noise."""
    return K1 - K1 * torch.sigmoid(K2 + K3 * log_alpha) + functional.softplus(-log_alpha) / 2


class Noise(_behind.Behind):
    """The variances of one layer."""

    def __init__(self, rule: Any, module: Any, random: torch.Generator) -> None:
        super().__init__(rule, module, random)
        self.log_variance = nn.Parameter(torch.full_like(module.weight, rule.variance, dtype=self.like.dtype))

    def log_alpha(self, theta: Tensor) -> Tensor:
        """``log sigma^2 - log theta^2``, clipped."""
        return (self.log_variance - torch.log(theta.to(self.like.dtype).square() + EPSILON)).clamp(-WIDEST, WIDEST)

    def kept(self, weight: Tensor) -> Tensor:
        """Weights below the threshold."""
        return self.log_alpha(weight) < self.rule.threshold

    def forward(self, weight: Tensor) -> Tensor:
        """The mean in training, what is left in evaluation mode."""
        return self.baked(weight) if self.rule.drop or not self.training else weight


def _noisy(module: Any, inputs: Any, more: Any, output: Tensor) -> Tensor:
    noise: Noise = module.parametrizations.weight[0]
    if not noise.training:
        return output
    squares = (inputs[0] if inputs else more["input"]).square()
    variance = (noise.log_variance.exp() * noise.mask).to(_behind.weight(module).dtype)
    if isinstance(module, nn.Linear):
        spread = functional.linear(squares, variance)
    else:
        spread = module._conv_forward(squares, variance, None)
    random = noise.stream(*_behind.rank())
    drawn = torch.randn(output.shape, generator=random, dtype=output.dtype, device=output.device)
    return output + (spread + EPSILON).sqrt() * drawn
