"""Weights drawn from a Gaussian each before a forward pass, and the priors they are held against."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from secateur.core.names import Named, unwrap
from secateur.core.run import Run
from secateur.core.streams import stream

Prior = Literal["gaussian", "gaussian-mixture", "laplace", "laplace-mixture"]


class Draw:
    """Before a forward pass in training, puts drawn weights into the network; once for each step.

    A hook of the network itself, so that modules which read their weights in ways of their own see the draw too.

    Args:
        run: the weights in its masks are drawn around what they are; their noise is a function of seed and step.
        rhos: logarithms of the deviations, as ``rho:NAME``.
    """

    def __init__(self, run: Run, rhos: dict[str, Any]) -> None:
        self.run, self.rhos = run, rhos
        self.noise: Named = {}
        self.means: Named = {}
        self.seen = 0

    def forget(self) -> None:
        """The step is over: the next pass draws anew."""
        self.noise, self.means, self.seen = {}, {}, 0

    @torch.no_grad()
    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Keep the means aside and write the draw."""
        if not module.training or self.noise:
            return
        run = self.run
        for name, w in run.weights().items():
            rho = self.rhos[f"rho:{name}"]
            random = stream(run.seed, "variational_inference", run.step, name, device=w.device)
            noise = torch.randn(w.shape, generator=random, dtype=rho.dtype, device=w.device)
            self.noise[name], self.means[name] = noise * run.masks[name], w.detach().clone()
            w.copy_(self.means[name].to(rho.dtype) + rho.exp() * self.noise[name])


def install(run: Run, rhos: dict[str, Any]) -> None:
    """Let the network draw its weights."""
    remove(run.model)
    unwrap(run.model).register_forward_pre_hook(Draw(run, rhos))


def draw_of(model: nn.Module) -> Draw:
    """The draw of this step."""
    return cast(Draw, next(hook for hook in unwrap(model)._forward_pre_hooks.values() if isinstance(hook, Draw)))


def remove(model: nn.Module) -> None:
    """Leave the network without a draw."""
    hooks = unwrap(model)._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, Draw)]:
        del hooks[key]


@dataclass(frozen=True)
class Density:
    """A prior of single weights around zero.

    Args:
        kind: which.
        scale: standard deviation of a Gaussian, ``b`` of Laplace's ``exp(-|w| / b) / 2b``.
        spike: the same of the narrow part of a mixture.
        share: probability of the wide part of a mixture.
    """

    kind: Prior
    scale: float
    spike: float
    share: float

    def log(self, w: Tensor) -> Tensor:
        """``log p(w)`` of each weight, in nats; parts of a mixture are added as logarithms."""
        wide = self._part(w, self.scale)
        if not self.kind.endswith("mixture"):
            return wide
        return torch.logaddexp(wide + math.log(self.share), self._part(w, self.spike) + math.log1p(-self.share))

    @torch.enable_grad()
    def slope(self, w: Tensor) -> Tensor:
        """The derivative of ``log p(w)``."""
        w = w.detach().requires_grad_()
        return torch.autograd.grad(self.log(w).sum(), w)[0]

    def _part(self, w: Tensor, scale: float) -> Tensor:
        if self.kind.startswith("laplace"):
            return -w.abs() / scale - math.log(2 * scale)
        return -0.5 * (w / scale).square() - math.log(scale) - 0.5 * math.log(2 * math.pi)
