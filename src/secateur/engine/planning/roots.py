"""Directions of a network's output, and what moving along them does to the loss beyond its slope."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.core.errors import ModelError
from secateur.core.losses import CrossEntropy

MOST = 256
"""Outputs of an example of which the curvature of a loss that is not known here is taken as a matrix."""


MOST_DRAWS = 4
"""Random directions of an example, beyond which they tell little more."""

CLASSES = 16
"""Classes that are few enough for a backward pass each."""


@dataclass(frozen=True)
class Directions:
    """Directions of the output, and how far along them becomes a rise.

    Args:
        along: each of the output's shape.
        p: the probabilities of the classes where each class is a direction of its own; else None, and the directions
            are random ones as of :func:`root`.
    """

    along: Sequence[Tensor]
    p: Tensor | None = None

    def rises(self, moved: Sequence[Tensor]) -> Tensor:
        """Sum over the examples of the rise of their losses, but for the slope.

        Args:
            moved: for each direction, how far each example moves under each option, ``(examples, options)``.
        """
        every = torch.stack(list(moved))
        if self.p is None:
            return every.square().sum(1).mean(0) / 2
        p = self.p.T.unsqueeze(2).to(every.device, every.dtype)  # the divergence of the probabilities before from after
        return (torch.logsumexp(every + p.log(), 0) - (p * every).sum(0)).clamp(min=0).sum(0)


def directions(
    loss: Callable[[Any, Any], Tensor], output: Any, target: Any, draws: int, random: torch.Generator
) -> Directions:
    """Of the output of some examples: one for each class if they are at most ``draws``, else so many random ones.

    Args:
        loss: as for :func:`root`.
        output: likewise.
        target: likewise.
        draws: backward passes that may be made.
        random: for random ones.
    """
    few = isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] <= draws
    if few and _classes(loss, output, target) == 1 and bool(counted(loss, target).all()):
        p = output.detach().double().softmax(1)
        units = torch.eye(output.shape[1], dtype=output.dtype, device=output.device)
        return Directions([unit.expand_as(output) for unit in units], p)
    return Directions([root(loss, output, target, random) for _ in range(min(draws, MOST_DRAWS))])


def root(loss: Callable[[Any, Any], Tensor], output: Any, target: Any, random: torch.Generator) -> Tensor:
    """``u`` of the output's shape with ``E[u uᵀ] = H`` for each example, H the second derivative of its own loss.

    For a change ``d`` of an example's output, ``E[(u · d)² / 2]`` is then the second-order rise of its loss; for
    cross-entropy that is the divergence between the class probabilities before and after.

    Args:
        loss: of a batch, the mean over its examples. Cross-entropy is taken in closed form; for any other loss the
            matrix H of an example is made where it has at most 256 outputs; beyond, the slope takes its place.
        output: logits or whatever the loss takes, one row an example.
        target: as the loss takes it.
        random: for the signs.

    Raises:
        ModelError: when the output is no tensor.

    Cost: none to speak of for cross-entropy; else a second derivative of the loss for each output.
    """
    if not isinstance(output, Tensor):
        raise ModelError(
            f"the network gives {type(output).__name__}; a forecast of the loss needs one tensor. Let it return its "
            "logits."
        )
    output = output.detach()
    classes = _classes(loss, output, target)
    if classes is not None:
        return _divergence(output, counted(loss, target), classes, random)
    return _general(loss, output, target, random)


def _classes(loss: Any, output: Tensor, target: Any) -> int | None:
    """The dimension of the classes of a plain cross-entropy with class numbers; None for any other loss."""
    if not isinstance(target, Tensor) or target.is_floating_point():
        return None
    if isinstance(loss, CrossEntropy):
        return output.dim() - 1
    plain = loss is functional.cross_entropy or (isinstance(loss, nn.CrossEntropyLoss) and loss.weight is None)
    return 1 if plain else None


def counted(loss: Any, target: Any) -> Tensor:
    """Which targets count towards a loss: for cross-entropy with class numbers all but those it ignores."""
    if not isinstance(target, Tensor) or target.is_floating_point():
        return torch.ones(1, dtype=torch.bool)
    ignored = getattr(loss, "ignore", getattr(loss, "ignore_index", -100))
    return target != ignored if isinstance(ignored, int) else torch.ones_like(target, dtype=torch.bool)


def _divergence(output: Tensor, counts: Tensor, classes: int, random: torch.Generator) -> Tensor:
    """With ``ε`` random signs, ``√p ε - p (√p · ε)`` has the second moment ``diag(p) - p pᵀ``."""
    wide = torch.promote_types(output.dtype, torch.float32)
    p = output.to(wide).softmax(classes)
    signed = p.sqrt() * _signs(p.shape, random, p)
    u = signed - p * signed.sum(classes, keepdim=True)
    counts = counts.to(wide)
    share = (
        counts / counts.flatten(1).sum(1).clamp(min=1).reshape(-1, *[1] * (counts.dim() - 1)) if p.dim() > 2 else counts
    )
    return (u * share.sqrt().unsqueeze(classes)).to(output.dtype)


def _general(loss: Callable[[Any, Any], Tensor], output: Tensor, target: Any, random: torch.Generator) -> Tensor:
    count, size = output.shape[0], output[0].numel()
    with torch.enable_grad():
        z = output.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(z, target), z, create_graph=True)
        if size > MOST or not slope.requires_grad:
            return slope.detach() * count * _signs((count, *[1] * (z.dim() - 1)), random, z)
        flat = slope.flatten(1)
        rows = [torch.autograd.grad(flat[:, j].sum(), z, retain_graph=True)[0].flatten(1) for j in range(size)]
    curvature = torch.stack(rows, 1).detach().double() * count
    values, vectors = torch.linalg.eigh((curvature + curvature.mT) / 2)
    signs = _signs((count, size), random, values)
    u = (vectors @ (values.clamp(min=0).sqrt() * signs).unsqueeze(2)).squeeze(2)
    return u.to(output.dtype).reshape(output.shape)


def _signs(shape: tuple[int, ...] | torch.Size, random: torch.Generator, like: Tensor) -> Tensor:
    return (torch.randint(0, 2, tuple(shape), generator=random) * 2 - 1).to(like.device, like.dtype)
