"""Roots of the curvature of a loss in the outputs of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils import _pytree as pytree

from secateur.core.task import check_loss

_SMALL = 64  # outputs of an example whose curvature is taken as a matrix

Push = Callable[[Tensor], Tensor]


@torch.enable_grad()
def root(loss: Callable[[Any, Any], Tensor], output: Tensor, target: Any, generator: Generator) -> Push | None:
    """A linear map ``s -> A s`` with ``A Aᵀ`` the Hessian of a batch's loss in the outputs; examples do not mix.

    The Hessian is recognised by its own products, never by the name of the loss: where it is a softmax cross entropy
    over the second or the last dimension (class weights, ignored positions and label smoothing among them), where
    every output stands for itself (mean squared error, binary cross entropy), or where an example has at most 64
    outputs. Every other loss, and one that is not convex in its outputs, gives None.

    Args:
        loss: ``loss(output, target)``, the mean over the batch.
        output: the outputs of a batch, examples first.
        target: of the batch.
        generator: of the signs of the probes; one on the CPU gives the same for every device.

    Returns:
        The map, from and to tensors of the shape of ``output``, float32 or wider.

    Raises:
        DataError: when the loss is not finite.

    Cost: two to three backward passes through the loss alone, and one for each output of an example in the last case.
    """
    free = output.detach().to(torch.promote_types(output.dtype, torch.float32)).requires_grad_()
    value = loss(free, target)
    check_loss(value)
    (slope,) = torch.autograd.grad(value, free, create_graph=True, materialize_grads=True)
    if not slope.requires_grad:
        return torch.zeros_like

    def push(z: Tensor) -> Tensor:
        return torch.autograd.grad(slope, free, z, retain_graph=True, materialize_grads=True)[0]

    return _root(free.detach(), push, generator)


def _root(output: Tensor, push: Push, generator: Generator) -> Push | None:
    # no two numbers of an example agree, since a softmax does not see what is the same for all classes
    sizes = 1 + torch.arange(max(output[0].numel(), 1), device=output.device).to(output).mul(0.6180339887).frac()
    probe = signs(output, generator) * sizes.reshape(output.shape[1:])
    pushed = push(probe)
    for dim in (output.dim() - 1, 1) if output.dim() > 1 else ():
        way, product = _softmax(output.softmax(dim), dim, probe, pushed)
        if _agree(product, pushed):
            return way
    other = signs(output, generator) * (3 - probe.abs())  # by a second probe: the first decides the diagonal
    own = pushed / probe
    if bool((own >= 0).all()) and _agree(own * other, push(other)):
        return lambda s: own.sqrt() * s
    return _matrix(output, push, probe, pushed)


def _agree(found: Tensor, pushed: Tensor) -> bool:
    return bool((found - pushed).abs().max() <= 1e-4 * pushed.abs().max())


def signs(like: Tensor, generator: Generator) -> Tensor:
    """Random signs of the shape, type and device of a tensor."""
    coins = torch.randint(0, 2, like.shape, generator=generator, device=generator.device)
    return (coins * 2 - 1).to(like.device, like.dtype)


def _softmax(p: Tensor, dim: int, probe: Tensor, pushed: Tensor) -> tuple[Push, Tensor]:
    """``s (diag(p) - p pᵀ)`` along the classes with the factor of each position that fits best, times the probe."""
    base = p * probe - p * (p * probe).sum(dim, keepdim=True)
    length = base.square().sum(dim, keepdim=True)
    factor = ((base * pushed).sum(dim, keepdim=True) / length).nan_to_num(0.0, 0.0, 0.0)
    # where the network is certain the curvature is all rounding, and no larger factor than elsewhere is true
    sure = length >= 1e-6 * length.max()
    factor = factor.clamp(min=0.0, max=float(factor.where(sure, torch.zeros_like(factor)).max().clamp(min=0.0)))
    root = (factor * p).sqrt()
    # signs at the classes, each weighed by the root of its probability, less their mean
    return lambda s: root * s - p * (root * s).sum(dim, keepdim=True), factor * base


def _matrix(output: Tensor, push: Push, probe: Tensor, pushed: Tensor) -> Push | None:
    """A matrix for each example, from products with every axis of all examples at once."""
    flat = output.reshape(len(output), -1)
    if not 0 < flat.shape[1] <= _SMALL:
        return None
    columns = []
    for j in range(flat.shape[1]):
        axis = torch.zeros_like(flat)
        axis[:, j] = 1.0
        columns.append(push(axis.view_as(output)).reshape(flat.shape))
    matrix = torch.stack(columns, 2)
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    if bool((values < -1e-5 * values.abs().max()).any()):
        return None

    def times(factor: Tensor, z: Tensor) -> Tensor:
        return (factor @ z.reshape(flat.shape)[:, :, None]).view_as(z)

    # the symmetric root, which no choice of the eigenvectors' signs can change
    roots = (vectors * values.clamp(min=0.0).sqrt()[:, None]) @ vectors.mT
    return (lambda s: times(roots, s)) if _agree(times(matrix, probe), pushed) else None


def example_signs(inputs: Any, like: Tensor, seed: int) -> Tensor:
    """Random signs for every example that follow from its own inputs: no matter in which batch it comes, or where.

    Args:
        inputs: of the batch; of every tensor whose first dimension is the number of examples a row counts.
        like: a tensor with the examples first; the signs have its shape, type and device.
        seed: other signs for another seed.
    """
    n = len(like)
    state = torch.full((n,), _signed(seed * _STEP), dtype=torch.int64, device=like.device)
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == n:
            rows = leaf.detach().reshape(n, -1)
            bits = rows.float().view(torch.int32) if rows.is_floating_point() else rows  # of float32, whatever it is
            bits = bits.to(torch.int64)
            places = torch.arange(bits.shape[1], device=bits.device)
            state = _mixed(state + (bits * (_mixed(places * _signed(_STEP)) | 1)).sum(1))
    places = torch.arange(like[0].numel(), device=like.device) * _signed(_STEP)
    coins = (_mixed(state[:, None] + places) >> 33) & 1
    return (coins * 2 - 1).to(like.dtype).reshape(like.shape)


_STEP = 0x9E3779B97F4A7C15


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _mixed(z: Tensor) -> Tensor:
    """The last step of the generator SplitMix64 (Steele, Lea, Flood 2014): all bits depend on all bits."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return z ^ ((z >> 31) & ((1 << 33) - 1))
