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

_TILE = 512


class Layer(NamedTuple):
    """One layer ready to be solved. Weight and Gram matrix are the caller's: methods make what a solver may overwrite.

    What they make is float64 (float32 where the device has no wider type), so that a solver holds no copy for longer
    than it needs one.

    Args:
        weight: ``(out, in)``, as given.
        gram: ``(in, in)``, as given, not negative on its diagonal.
        pattern: single weights or N:M groups.
        keep: how many weights stay, less than all and more than none.
        dead: ``(in,)``, inputs that are always zero.
        damping: what is added to the diagonal, relative to its mean.
    """

    weight: Tensor
    gram: Tensor
    pattern: Unstructured | NM
    keep: int
    dead: Tensor
    damping: float

    def rows(self, part: slice = slice(None)) -> Tensor:
        """A copy of some rows, zero in the columns of dead inputs, so that these cost nothing and go first."""
        w = self.weight[part].to(_wide(self.weight), copy=True, memory_format=torch.contiguous_format)
        w[:, self.dead] = 0.0
        return w

    def diagonal(self) -> Tensor:
        """``(in,)``: the diagonal of :meth:`matrix`."""
        diagonal = self.gram.diagonal().to(_wide(self.weight), copy=True)
        mean = float(diagonal.mean())
        diagonal += self.damping * mean
        diagonal[self.dead] = mean or 1.0
        return diagonal

    def matrix(self) -> Tensor:
        """A copy ``(in, in)`` of the Gram matrix, symmetric to the bit, damped, positive on its diagonal.

        Raises:
            DataError: when the Gram matrix is not symmetric up to rounding.
        """
        matrix = self.gram.to(_wide(self.weight), copy=True, memory_format=torch.contiguous_format)
        apart = _make_symmetric(matrix)
        if apart > 1e-2 * float(matrix.diagonal().max()):
            raise DataError("the Gram matrix is not symmetric: give the mean of the outer products of the inputs.")
        matrix.diagonal().copy_(self.diagonal())
        return matrix


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
    dead = _dead(gram)
    new, mask = method(Layer(weight.detach(), gram.detach(), pattern, keep, dead, damping))
    new = new.to(weight.dtype)
    zeroed = weight.detach().masked_fill(~mask, 0.0)
    new = torch.where(mask & ~dead, new, zeroed)
    better = errors(new, weight, gram) < errors(zeroed, weight, gram)
    return torch.where(better[:, None], new, zeroed), mask


def factor(layer: Layer, reverse: bool = False) -> Tensor:
    """The lower Cholesky factor of the layer's matrix; with ``reverse`` of the matrix in reverse order.

    Memory: one matrix, which is the result.

    Raises:
        DataError: when the matrix is singular to working precision: its smallest eigenvalue, the damping, the cure.
    """
    matrix = layer.matrix()
    if reverse:
        turn(matrix)
    diagonal = matrix.diagonal().clone()
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    # The transpose of a symmetric matrix is the same numbers by columns, as LAPACK wants them
    lower, info = torch.linalg.cholesky_ex(matrix.T, out=(matrix.T, info) if in_place(matrix) else None)
    # A pivot is what is left of a diagonal entry once the other inputs explain theirs: rounding when nothing is left
    left = lower.diagonal().square() / diagonal
    if int(info) or not bool((left > len(lower) * torch.finfo(lower.dtype).eps).all()):
        least, mean = float(torch.linalg.eigvalsh(layer.matrix())[0]), float(diagonal.mean())
        missing = 2 * max(-least, 0.0) * (1 + layer.damping) / mean  # damping is relative to the diagonal without it
        raise DataError(
            f"the Gram matrix of {len(lower)} inputs is singular: its smallest eigenvalue is {least:.3g} with damping "
            f"{layer.damping:g} (mean diagonal {mean:.3g}). Raise the damping, for example to "
            f"{max(0.01, 10 * layer.damping, layer.damping + missing):.3g}, or use more examples than the layer has "
            "inputs."
        )
    return lower


def inverse(layer: Layer) -> Tensor:
    """The inverse of the layer's matrix, contiguous; errors and memory as for :func:`factor`."""
    lower = factor(layer)
    return torch.cholesky_inverse(lower, out=lower if in_place(lower) else None).T


def in_place(matrix: Tensor) -> bool:
    """Whether LAPACK or its like may write over the matrix it reads."""
    return matrix.device.type in ("cpu", "cuda")


def turn(matrix: Tensor) -> None:
    """Reverse the order of rows and columns of a contiguous matrix, in place."""
    flat, count = matrix.view(-1), matrix.numel()
    for start in range(0, count // 2, _TILE * _TILE):
        stop = min(start + _TILE * _TILE, count // 2)
        front, back = flat[start:stop], flat[count - stop : count - start]
        turned = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(turned)


def shed(matrix: Tensor, stay: Tensor, out: Tensor | None = None) -> Tensor:
    """The rows and columns ``stay`` (ascending) of a square matrix; without ``out`` moved to the front of its memory.

    A matrix without ``out`` must be contiguous.
    """
    size = len(stay)
    left = matrix.view(-1)[: size * size].view(size, size) if out is None else out
    done = 0
    for part in stay.split(max(1, _TILE * _TILE // len(matrix))):  # what is written is never ahead of what is read
        torch.gather(matrix[part], 1, stay.expand(len(part), -1), out=left[done : done + len(part)])
        done += len(part)
    return left


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
        right = (pull[part].gather(1, place) * real)[..., None]
        lower = torch.linalg.cholesky(system.mT, out=system.mT if in_place(system) else None)
        half = torch.linalg.solve_triangular(lower, right, upper=False)
        change = torch.linalg.solve_triangular(lower.mT, half, upper=True)[..., 0]
        new[part] = new[part].scatter_add(1, place, change)
    return new


def spans(rows: int, width: int) -> list[slice]:
    """Blocks of the rows of a layer, of 2 MiB in float64 and 16 rows at least."""
    size = max(16, WORK // (128 * width))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def largest(score: Tensor, layer: Layer) -> Tensor:
    """The mask of the largest scores, as ``pattern.mask`` gives it; quicker where small, with less memory where not."""
    pattern = layer.pattern
    if isinstance(pattern, NM):
        parts = [score[part] for part in spans(*score.shape)]
        return torch.cat([pattern.mask(part, part.numel() // pattern.m * pattern.n) for part in parts])
    flat = score.flatten()
    if 16 * len(flat) > WORK:
        return pattern.mask(score, layer.keep)
    cut = flat.kthvalue(len(flat) - layer.keep + 1).values
    mask = flat > cut
    mask[(flat == cut).nonzero()[: layer.keep - int(mask.sum())]] = True
    return mask.view(score.shape)


def errors(new: Tensor, weight: Tensor, gram: Tensor) -> Tensor:
    """The error of every row: how much its outputs change, squared, mean over the examples.

    Cost: half a product of the layer with the matrix, which is taken as symmetric; tiles of 512 columns and rows.
    """
    dtype = _wide(weight)
    found = torch.zeros(len(new), dtype=dtype, device=new.device)
    for start in range(0, len(gram), _TILE):
        stop = start + _TILE
        tile = gram[:stop, start:stop].detach().to(dtype, copy=True)
        tile[:start] += gram[start:stop, :start].detach().T  # both halves of a symmetric sum
        for row in range(0, len(new), _TILE):
            part = slice(row, row + _TILE)
            change = new[part, :stop].to(dtype, copy=True).sub_(weight[part, :stop].detach())
            found[part] += (change @ tile).mul_(change[:, start:stop]).sum(1)
    return found


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


def _dead(gram: Tensor) -> Tensor:
    diagonal = gram.detach().diagonal()
    least, dead = float(diagonal.min()), diagonal == 0
    if least < 0 or bool(gram[dead].any()) or bool(gram[:, dead].any()):
        raise DataError(
            f"the Gram matrix has {least:.3g} on its diagonal, which no mean of squares can give beside "
            "the rest of it. Give the Gram matrix itself, not its inverse."
        )
    return dead


def _make_symmetric(matrix: Tensor) -> float:
    """Put the mean of a matrix and its transpose in its place; how far they were apart at most."""
    worst = matrix.new_zeros(())
    for i in range(0, len(matrix), _TILE):
        for j in range(i, len(matrix), _TILE):
            above, below = matrix[i : i + _TILE, j : j + _TILE], matrix[j : j + _TILE, i : i + _TILE]
            apart = below.T - above
            worst = torch.maximum(worst, apart.abs().max())
            mean = above.add(apart, alpha=0.5)
            above.copy_(mean)
            below.copy_(mean.T)
    return float(worst)
