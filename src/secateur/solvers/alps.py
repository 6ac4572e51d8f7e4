"""ALPS: search the set of weights to keep by the alternating direction method of multipliers, then fit them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.core.errors import DataError, UsageError
from secateur.core.reading import Paper
from secateur.core.sockets import Solver
from secateur.solvers._layer import Layer, check_damping, in_place, largest, solve, spans

_LEAST, _MOST = 1e-8, 1e6


@dataclass(frozen=True)
class Alps(Solver):
    """The layer's error with ``keep`` weights at most, split in two that are pulled together ever harder.

    ``W`` minimises the error, ``D`` holds ``keep`` weights; ``V`` is the price of their difference, ``rho`` the force:
    ``W = (ŴH - V + ρD)(H + ρI)⁻¹``, ``D = the keep largest of W + V/ρ``, ``V += ρ(W - D)``. Inputs are scaled to unit
    diagonal first. Every 3 rounds the weights that entered or left ``D`` are counted: many raise ρ by 1.3, some by
    1.2, few by 1.1, none ends the search; before the first stir ρ falls to a fifth instead. Then the set is frozen
    and conjugate gradients fit the weights in it, all rows together. If the largest scaled weights, fitted alike, do
    better than the set found, they are taken.

    Args:
        damping: added to the diagonal of ``gram``, relative to its mean.
        rho: the force at the start, relative to the scaled diagonal.
        rounds: the search ends after so many rounds at the latest.
        fit: steps of conjugate gradients at the end, at most.

    Raises:
        UsageError: for another pattern than single weights or N:M, or options out of range.
        BudgetError: for a count out of range.
        ModelError: for weights that are not finite.
        DataError: for a matrix that is not finite, or has a negative eigenvalue in spite of the damping.

    Cost: O(in³ + rounds · out · in²) time; three float64 copies of the Gram matrix and one of
    the layer, or one and four.
    """

    damping: float = 0.01
    rho: float = 0.1
    rounds: int = 300
    fit: int = 100

    paper = Paper(
        "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
        "Meng, Behdin, Wang, Mazumder",
        2024,
        "arXiv:2406.07831",
        differs="the search also ends when rho has fallen to 1e-8; the set of the start is fitted too and taken if "
        "it is better; conjugate gradients go on to convergence, 100 steps at most, not 10; a row no better than with "
        "zeros alone is zeroed; keep 0 gives zeros. The calibration data and published perplexities are unverified",
    )
    needs = frozenset({"activations"})

    def __post_init__(self) -> None:
        check_damping(self.damping)
        if not (0 < self.rho <= _MOST and self.rounds >= 1 and self.fit >= 0):
            raise UsageError(
                f"rho must lie in (0, {_MOST:g}], rounds be at least 1 and fit at least 0, not {self.rho:g}, "
                f"{self.rounds} and {self.fit}."
            )

    def __call__(self, weight: Tensor, gram: Tensor, pattern: Any, keep: int) -> tuple[Tensor, Tensor]:
        """New weight ``(out, in)`` and boolean mask (True = kept) with exactly ``keep`` weights kept."""
        return solve(self._solve, weight, gram, pattern, keep, self.damping)

    def _solve(self, layer: Layer) -> tuple[Tensor, Tensor]:
        scale = layer.diagonal().sqrt()
        first = largest(layer.rows().mul_(scale).abs_(), layer)
        found, mask = self._search(layer, first)
        matrix, new = _scaled(layer), layer.rows().mul_(scale).masked_fill_(~first, 0.0)
        if self._fit(layer, matrix, found, mask) > self._fit(layer, matrix, new, first):
            found, mask = new, first  # the search can end worse than it began
        return found.div_(scale), mask

    def _search(self, layer: Layer, before: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = _eigen(layer)
        scale, parts = layer.diagonal().sqrt(), spans(*before.shape)
        pull = layer.rows().mul_(scale)
        for part in parts:
            pull[part] = (pull[part] @ vectors).mul_(values)
        # D where `held` and V/price elsewhere, in one tensor
        lifted, held, price = layer.rows().mul_(scale), before, 0.0
        mask, rho, stirred = before, self.rho, False
        for count in range(1, self.rounds + 1):
            for part in parts:
                v = lifted[part].masked_fill(held[part], 0.0).mul_(price / rho)
                pushed = torch.where(held[part], lifted[part], -v).mul_(rho) @ vectors
                w = pushed.add_(pull[part]).div_(values + rho) @ vectors.T
                lifted[part] = w.add_(v)
            mask = _largest_sizes(lifted, layer)
            held, price = mask, rho
            if count % 3:
                continue
            changed = int((mask ^ before).count_nonzero())  # a sum would widen every bit to eight bytes
            before = mask
            stirred = stirred or changed > 0.005 * layer.keep
            if not stirred:
                rho /= 5
                if changed:
                    lifted, held, price = layer.rows().mul_(scale), torch.ones_like(mask), 0.0
            elif not changed:
                break
            else:
                rho *= 1.3 if changed > 0.1 * layer.keep else 1.2 if changed > 0.005 * layer.keep else 1.1
                rho = min(rho, _MOST)
            if rho < _LEAST:
                break
        return lifted.masked_fill_(~mask, 0.0), mask

    def _fit(self, layer: Layer, matrix: Tensor, x: Tensor, mask: Tensor) -> float:
        """Fit the weights of ``mask``, in place, a block of rows at a time; the error they leave."""
        scale, error = layer.diagonal().sqrt(), matrix.new_zeros(())
        for part in spans(*x.shape):
            dense = layer.rows(part).mul_(scale)
            x[part] = self._gradients(dense, matrix, x[part], mask[part])
            change = x[part] - dense
            error += (change @ matrix).mul_(change).sum()
        return float(error)

    def _gradients(self, dense: Tensor, matrix: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """Conjugate gradients on each row's survivors; with a unit diagonal they need no preconditioner."""
        residual = ((dense - x) @ matrix).mul_(mask)
        direction, size = residual, residual.square().sum(1, keepdim=True)
        enough = 1e-26 * dense.square().sum(1, keepdim=True)
        for _ in range(self.fit):
            if bool((size <= enough).all()):
                break
            push = (direction @ matrix).mul_(mask)
            curve = (direction * push).sum(1, keepdim=True)
            step = torch.where((curve > 0) & (size > enough), size / curve, 0.0)
            x = x + step * direction
            residual = residual - step * push
            last, size = size, residual.square().sum(1, keepdim=True)
            direction = residual + torch.where(last > enough, size / last, 0.0) * direction
        return x


def _scaled(layer: Layer) -> Tensor:
    """The layer's matrix with a diagonal of ones."""
    scale = layer.diagonal().sqrt()
    return layer.matrix().div_(scale).div_(scale[:, None])


def _largest_sizes(lifted: Tensor, layer: Layer) -> Tensor:
    """The mask of the largest sizes, which are taken in place and given their signs again."""
    below = lifted.signbit()
    mask = largest(lifted.abs_(), layer)
    for part in spans(*lifted.shape):
        lifted[part] *= 1 - 2 * below[part].to(torch.int8)
    return mask


def _eigen(layer: Layer) -> tuple[Tensor, Tensor]:
    matrix = _scaled(layer)
    out = (matrix.new_empty(len(matrix)), matrix.T) if in_place(matrix) else None
    values, vectors = torch.linalg.eigh(matrix.T, out=out)
    least = float(values[0])
    if least < -1e-4:  # a Gram matrix added up in float32 may miss zero by rounding
        raise DataError(
            f"this is no Gram matrix: scaled to unit diagonal, its smallest eigenvalue is {least:.3g} with damping "
            f"{layer.damping:g}. Raise the damping to at least {layer.damping - 2 * least:.2g}."
        )
    return values.clamp_(min=0.0), vectors
