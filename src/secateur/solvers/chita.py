"""CHITA: iterative hard thresholding with a line search, fitting the survivors between the steps."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.core.errors import UsageError
from secateur.core.reading import Paper
from secateur.core.sockets import Solver
from secateur.solvers._layer import Layer, check_damping, factor, largest, refit, solve, spans

_TRIALS = 60
_LEAST = 1e-9  # a fall of the error that is no rounding, as a share of it


@dataclass(frozen=True)
class Chita(Solver):
    """The layer's error ``trace((W - Ŵ)H(W - Ŵ)ᵀ)`` with ``keep`` weights at most, by projected gradient steps.

    ``W ← the keep largest of W - τG`` with ``G = (W - Ŵ)H``, in inputs scaled to unit diagonal, beginning with the
    largest weights. After each trial conjugate gradients fit the weights on their set, so that a step is judged by
    what enters and leaves it. The length τ starts at the minimum along ``-G``, later at that of the last step; it is
    doubled until the set changes, then doubled or halved for as long as the error falls. The search ends when no
    length that changes the set lowers the error; it never rises. At the end every row is fitted on its survivors
    exactly. With one row the matrix may be any Hessian, such as the Fisher matrix of a whole network.

    Args:
        damping: added to the diagonal of ``gram``, relative to its mean.
        rounds: the search ends after so many steps at the latest; 0 fits the largest weights.
        fit: conjugate gradient steps after each trial.

    Raises:
        UsageError: for another pattern than single weights or N:M, or options out of range.
        BudgetError: for a count out of range.
        ModelError: for weights that are not finite.
        DataError: for a matrix that is not finite, or singular in spite of the damping.

    Cost: O(in³ + rounds · trials · fit · out · in²) time with some three trials a step, and for each row a third of
    the cube of its survivors; two float64 copies of the Gram matrix and six of the layer.
    """

    damping: float = 0.01
    rounds: int = 50
    fit: int = 5

    paper = Paper(
        "Fast as CHITA: Neural Network Pruning with Combinatorial Optimization",
        "Benbaki, Chen, Meng, Hazimeh, Ponomareva, Zhao, Mazumder",
        2023,
        "arXiv:2302.14623",
        differs="one layer and its Gram matrix, where the paper takes all gradients of the network and their linear "
        "term; inputs are scaled to unit diagonal; the survivors are fitted after every step; the line search "
        "doubles and halves instead of following the breaks of the path; no active set, since one product for the "
        "whole layer is as fast; no coordinate descent, no stages of rising sparsity. The published accuracies are "
        "unverified",
    )
    needs = frozenset({"activations"})

    def __post_init__(self) -> None:
        check_damping(self.damping)
        if not (self.rounds >= 0 and self.fit >= 1):
            raise UsageError(f"rounds must be at least 0 and fit at least 1, not {self.rounds} and {self.fit}.")

    def __call__(self, weight: Tensor, gram: Tensor, pattern: Any, keep: int) -> tuple[Tensor, Tensor]:
        """New weight ``(out, in)`` and boolean mask (True = kept) with exactly ``keep`` weights kept."""
        return solve(self._solve, weight, gram, pattern, keep, self.damping)

    def _solve(self, layer: Layer) -> tuple[Tensor, Tensor]:
        factor(layer)  # refuses what the fit at the end cannot solve
        scale = layer.diagonal().sqrt()
        problem = _Problem(layer, layer.rows().mul_(scale), layer.matrix().div_(scale).div_(scale[:, None]), self.fit)
        mask = largest(problem.dense.abs(), layer)
        point = _Point(problem.dense * mask, mask, 0.0)
        least = problem.fitted(point)
        for _ in range(self.rounds):
            found = problem.step(point, least)
            if found is None:
                break
            point, least = found
        return refit(problem.dense, problem.matrix, point.mask).div_(scale), point.mask


class _Point(NamedTuple):
    """Where the search stands, and the length of the step that led there."""

    x: Tensor
    mask: Tensor
    length: float


class _Problem(NamedTuple):
    """A layer in inputs scaled to unit diagonal."""

    layer: Layer
    dense: Tensor
    matrix: Tensor
    fit: int

    def step(self, at: _Point, least: float) -> tuple[_Point, float] | None:
        """The best step found that changes the set and lowers the error, and its error; None where there is none."""
        slope, best, way = (at.x - self.dense) @ self.matrix, None, 2.0
        point = self.moved(at, slope, at.length or self.steepest(slope))
        for _ in range(_TRIALS):
            if not torch.equal(point.mask, at.mask):
                break
            point = self.moved(at, slope, 2 * point.length)
        for _ in range(_TRIALS):
            if torch.equal(point.mask, at.mask):
                break
            error = self.fitted(point)
            if error < least * (1 - _LEAST):
                least, best = error, point
            elif best is not None:
                break
            else:
                way = 0.5
            point = self.moved(at, slope, way * point.length)
        return None if best is None else (best, least)

    def moved(self, at: _Point, slope: Tensor, length: float) -> _Point:
        """A gradient step and the set of its largest weights."""
        x = at.x - length * slope
        mask = largest(x.abs(), self.layer)
        return _Point(x.mul_(mask), mask, length)

    def steepest(self, slope: Tensor) -> float:
        """The length at which the error along the slope is least; 1 where the slope is zero."""
        curve = float(sum(((slope[part] @ self.matrix) * slope[part]).sum() for part in spans(*slope.shape)))
        return float(slope.square().sum()) / curve if curve > 0 else 1.0

    def fitted(self, point: _Point) -> float:
        """Fit the weights of a point on its set, in place, a block of rows at a time; the error they leave."""
        error = self.matrix.new_zeros(())
        for part in spans(*point.x.shape):
            x, mask = point.x[part], point.mask[part]
            residual = (self.dense[part] - x) @ self.matrix
            direction = residual.mul_(mask)  # with a unit diagonal conjugate gradients need no preconditioner
            size, enough = _squares(residual), 1e-26 * _squares(self.dense[part])
            for _ in range(self.fit):
                push = (direction @ self.matrix).mul_(mask)
                length = torch.where(size > enough, size / (direction * push).sum(1, keepdim=True), 0.0)
                x += length * direction
                residual = residual - length * push
                last, size = size, _squares(residual)
                direction = residual + torch.where(last > enough, size / last, 0.0) * direction
            change = x - self.dense[part]
            error += (change @ self.matrix).mul_(change).sum()
        return float(error)


def _squares(rows: Tensor) -> Tensor:
    return rows.square().sum(1, keepdim=True)
