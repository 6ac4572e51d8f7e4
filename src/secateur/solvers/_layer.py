"""What the solvers share: the checks of what they are given, the damped Gram matrix, and the last step.

That step sees to it that no row is worse than with its pruned weights merely set to zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.core.errors import BudgetError, DataError, UsageError
from secateur.core.patterns import NM, Unstructured
from secateur.core.prunable import check_finite

WORK = 1 << 25
"""Bytes of per-row matrices that a solver holds at a time; those of one row where they are more."""


class Layer(NamedTuple):
    """One layer ready to be solved; its tensors are float64 (float32 where the device has no wider type).

    Args:
        weight: ``(out, in)``, a copy, zero in the columns of dead inputs, so that these cost nothing and go first.
        matrix: ``(in, in)``, the Gram matrix plus the damping, positive on its diagonal.
        pattern: single weights or N:M groups.
        keep: how many weights stay, less than all and more than none.
        dead: ``(in,)``, inputs that are always zero.
        damping: what was added to the diagonal, relative to its mean.
    """

    weight: Tensor
    matrix: Tensor
    pattern: Unstructured | NM
    keep: int
    dead: Tensor
    damping: float


@torch.no_grad()
def solve(
    method: Callable[[Layer], tuple[Tensor, Tensor]],
    weight: Tensor,
    gram: Tensor,
    pattern: Any,
    keep: int,
    damping: float,
) -> tuple[Tensor, Tensor]:
    """Check the layer, let ``method`` choose a mask and weights, and hand back what keeps every promise.

    Pruned weights are +0.0; weights of dead inputs that stay are as they were; a row whose error (after rounding to
    the type of the weight) is not below that of zeroing the same weights takes the zeroed ones.

    Raises:
        UsageError: for another pattern, shapes or types that do not fit, or a count that N:M does not allow.
        BudgetError: for a count out of range.
        ModelError: for weights that are not finite.
        DataError: for a matrix that is not the Gram matrix of finite inputs.
    """
    _check(weight, gram, pattern, keep)
    if keep in (0, weight.numel()):
        mask = torch.full(weight.shape, keep > 0, dtype=torch.bool, device=weight.device)
        return (weight.detach().clone() if keep else torch.zeros_like(weight)), mask
    layer = _opened(weight, gram, pattern, keep, damping)
    dead = layer.dead
    new, mask = method(layer)
    del layer
    zeroed = weight.detach().masked_fill(~mask, 0.0)
    new = torch.where(mask & ~dead, new.to(weight.dtype), zeroed)
    better = errors(new, weight, gram) < errors(zeroed, weight, gram)
    return torch.where(better[:, None], new, zeroed), mask


def factor(layer: Layer, reverse: bool = False) -> Tensor:
    """The lower Cholesky factor of the layer's matrix; with ``reverse`` of the matrix in reverse order.

    Raises:
        DataError: when the matrix is singular to working precision: its smallest eigenvalue, the damping, the cure.
    """
    matrix = layer.matrix.flip(0, 1) if reverse else layer.matrix
    lower, info = torch.linalg.cholesky_ex(matrix)
    # A pivot is what is left of a diagonal entry once the other inputs explain theirs: rounding when nothing is left
    left = lower.diagonal().square() / matrix.diagonal()
    if int(info) or not bool((left > len(matrix) * torch.finfo(matrix.dtype).eps).all()):
        least = float(torch.linalg.eigvalsh(matrix)[0])
        raise DataError(
            f"the Gram matrix of {len(matrix)} inputs is singular: its smallest eigenvalue is {least:.3g} with damping "
            f"{layer.damping:g} (mean diagonal {float(matrix.diagonal().mean()):.3g}). Raise the damping, for example "
            f"to {max(0.01, 10 * layer.damping):g}, or use more examples than the layer has inputs."
        )
    return lower


def refit(w: Tensor, matrix: Tensor, mask: Tensor) -> Tensor:
    """The weights of least error on each row's survivors: ``H_KK δ_K = H_KP w_P``.

    Args:
        w: ``(out, in)``, the dense weights.
        matrix: ``(in, in)``, positive definite.
        mask: ``(out, in)``, True = kept.

    Cost: a third of the cube of its survivors for each row; systems of 32 MiB at a time, or one row's.
    """
    new = torch.where(mask, w, 0.0)
    pull = (w - new) @ matrix
    kept = mask.sum(1)
    size = max(1, WORK // (8 * max(int(kept.max()), 1) ** 2))
    for part in kept.argsort().split(size):  # rows with like counts share a batch
        count = kept[part]
        place = mask[part].to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : int(count.max())]
        real = torch.arange(place.shape[1], device=w.device) < count[:, None]
        system = matrix[place[:, :, None], place[:, None]].mul_(real[:, :, None] & real[:, None])
        system.diagonal(dim1=1, dim2=2).add_((~real).to(w.dtype))  # short rows are filled up with ones
        right = pull[part].gather(1, place) * real
        change = torch.cholesky_solve(right[..., None], torch.linalg.cholesky(system))[..., 0]
        new[part] = new[part].scatter_add(1, place, change)
    return new


def largest(score: Tensor, layer: Layer) -> Tensor:
    """The mask of the largest scores, as ``pattern.mask`` gives it, but in one pass for single weights."""
    if isinstance(layer.pattern, NM):
        return layer.pattern.mask(score, layer.keep)
    flat = score.flatten()
    cut = flat.kthvalue(len(flat) - layer.keep + 1).values
    mask = flat > cut
    mask[(flat == cut).nonzero()[: layer.keep - int(mask.sum())]] = True
    return mask.view(score.shape)


def errors(new: Tensor, weight: Tensor, gram: Tensor) -> Tensor:
    """The error of every row: how much its outputs change, squared, mean over the examples."""
    change = new.to(_wide(weight)) - weight.detach().to(_wide(weight))
    return (change @ gram.detach().to(change.dtype)).mul_(change).sum(1)


def check_damping(damping: float) -> None:
    """Refuse a damping that is negative or not finite.

    Raises:
        UsageError: with the value.
    """
    if not (math.isfinite(damping) and damping >= 0):
        raise UsageError(f"damping must be a finite number of at least 0, not {damping}; 0.01 is usual.")


def _check(weight: Tensor, gram: Tensor, pattern: Any, keep: int) -> None:
    if not isinstance(pattern, Unstructured | NM):
        raise UsageError(f"solvers take the patterns 'unstructured' and 'nm', not {pattern!r}.")
    if weight.dim() != 2 or gram.shape != (weight.shape[1], weight.shape[1]):
        raise UsageError(
            f"a solver needs a weight (out, in) and a Gram matrix (in, in), not {tuple(weight.shape)} and "
            f"{tuple(gram.shape)}; flatten convolutions to (out, in * kernel)."
        )
    if not (weight.is_floating_point() and gram.is_floating_point() and weight.device == gram.device):
        raise UsageError(
            f"weight and Gram matrix must be floats on one device, not {weight.dtype} on {weight.device} and "
            f"{gram.dtype} on {gram.device}."
        )
    if not 0 <= keep <= weight.numel():
        raise BudgetError(f"cannot keep {keep:,} of {weight.numel():,} weights; ask for 0 to {weight.numel():,}.")
    pattern.check("weight", tuple(weight.shape))
    if pattern.fixed(tuple(weight.shape)) not in (None, keep):
        raise UsageError(f"{pattern} keeps {pattern.fixed(tuple(weight.shape)):,} weights here, not {keep:,}.")
    check_finite({"weight": weight})
    bad = int((~gram.isfinite()).sum())
    if bad:
        raise DataError(
            f"{bad:,} of {gram.numel():,} entries of the Gram matrix are NaN or infinite: the layer's inputs are not "
            "finite or overflow. Run `secateur doctor` on the network, or add them up in float32."
        )


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float32 if weight.device.type == "mps" else torch.float64


def _opened(weight: Tensor, gram: Tensor, pattern: Unstructured | NM, keep: int, damping: float) -> Layer:
    matrix = gram.detach().to(_wide(weight), copy=True)
    diagonal = matrix.diagonal()
    apart = matrix.T.sub(matrix)
    if float(apart.max()) > 1e-2 * float(diagonal.abs().max()):
        raise DataError("the Gram matrix is not symmetric: give the mean of the outer products of the inputs.")
    matrix.add_(apart, alpha=0.5)
    del apart
    least, dead = float(diagonal.min()), diagonal == 0
    if least < 0 or bool(matrix[dead].any()):
        raise DataError(
            f"the Gram matrix has {least:.3g} on its diagonal, which no mean of squares can give beside "
            "the rest of it. Give the Gram matrix itself, not its inverse."
        )
    mean = float(diagonal.mean())
    diagonal += damping * mean
    diagonal[dead] = mean or 1.0
    w = weight.detach().to(matrix.dtype, copy=True, memory_format=torch.contiguous_format)
    w[:, dead] = 0.0
    return Layer(w, matrix, pattern, keep, dead, damping)
