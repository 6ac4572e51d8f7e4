"""SparseGPT: prune from the first column to the last, each pruned weight made up for by the columns after it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.core.errors import UsageError
from secateur.core.patterns import NM
from secateur.core.reading import Paper
from secateur.core.select import top_mask
from secateur.core.sockets import Solver
from secateur.solvers._layer import Layer, check_damping, factor, solve, turn


@dataclass(frozen=True)
class SparseGpt(Solver):
    """One sweep over the columns of a layer, all rows at once, with one factor ``H⁻¹ = UᵀU`` for all of them.

    Because every row goes through the columns in the same order, row j of the upper factor U holds all that is
    needed to make up for column j. A pruned weight leaves ``e = w_j / U_jj``, the columns after it move by
    ``-e · U_j``, and the error grows by ``e²``. Of every block of columns, the same share of weights goes, those with
    the smallest ``e²``; N:M chooses at each group of m columns. Columns after the block move once, when the block
    is done. The result depends on the order of the columns.

    Args:
        damping: added to the diagonal of ``gram``, relative to its mean.
        block: columns whose weights are compared with each other; rounded down to whole groups for N:M, where it
            changes nothing but the speed.

    Raises:
        UsageError: for another pattern than single weights or N:M, or a block below 1.
        BudgetError: for a count out of range.
        ModelError: for weights that are not finite.
        DataError: for a matrix that is not finite, or singular in spite of the damping.

    Cost: O(in³ + out · in²) time; one float64 copy of the Gram matrix and two of the layer.
    """

    damping: float = 0.01
    block: int = 128

    paper = Paper(
        "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        "Frantar, Alistarh",
        2023,
        "arXiv:2301.00774",
        differs="the factor comes from one Cholesky factorisation of the matrix in reverse order, in float64; the "
        "counts of the blocks add up to the count asked for; weights of dead inputs go before any other; a row that "
        "would be no better than with zeros alone is only zeroed; no quantisation. The published perplexities are "
        "unverified",
    )
    needs = frozenset({"activations", "order"})

    def __post_init__(self) -> None:
        check_damping(self.damping)
        if self.block < 1:
            raise UsageError(f"block must be at least 1, not {self.block}; 128 is usual.")

    def __call__(self, weight: Tensor, gram: Tensor, pattern: Any, keep: int) -> tuple[Tensor, Tensor]:
        """New weight ``(out, in)`` and boolean mask (True = kept) with exactly ``keep`` weights kept."""
        return solve(self._sweep, weight, gram, pattern, keep, self.damping)

    def _sweep(self, layer: Layer) -> tuple[Tensor, Tensor]:
        upper = factor(layer, reverse=True).T
        turn(upper)
        upper = upper.T  # H = R·Rᵀ, and R⁻¹ is the factor of H⁻¹
        # A column of the layer is a row in memory; where the sweep has been, it holds what the column has lost
        w = layer.weight.T.to(upper.dtype, copy=True, memory_format=torch.contiguous_format)
        w[layer.dead] = 0.0
        mask = torch.ones_like(w, dtype=torch.bool)
        group = layer.pattern.m if isinstance(layer.pattern, NM) else 1
        block = min(max(self.block // group, 1) * group, len(w))
        eye = torch.eye(block, dtype=w.dtype, device=w.device)
        for start in range(0, len(w), block):
            stop = min(start + block, len(w))
            own = upper[start:stop, start:stop]
            inverse = torch.linalg.solve_triangular(own, eye[: stop - start, : stop - start], upper=True)
            now = w[start:stop].addmm(inverse.T, upper[:start, start:stop].T @ w[:start])
            if group == 1:
                count = _gone(layer, stop) - _gone(layer, start)
                mask[start:stop] = _chosen(now, inverse.diagonal(), count)
            _prune(now, mask[start:stop], inverse, layer.pattern)
            w[start:stop] -= now
        del upper, own
        return w.neg_().add_(layer.weight.T).T, mask.T


def _prune(now: Tensor, mask: Tensor, factor: Tensor, pattern: Any) -> None:
    """A block ``(columns, out)`` from its first column to its last, in place; N:M fills in the mask on the way."""
    for j in range(len(now)):
        if isinstance(pattern, NM) and j % pattern.m == 0:
            group = slice(j, j + pattern.m)
            rises = (now[group] / factor.diagonal()[group, None]).square()
            mask[group] = pattern.mask(rises.T, pattern.n * now.shape[1]).T
        left = now[j].masked_fill(mask[j], 0.0) / factor[j, j]
        now[j:].addr_(factor[j, j:], left, alpha=-1)


def _gone(layer: Layer, stop: int) -> int:
    """How many weights of the columns before ``stop`` go: those of dead inputs first, the rest evenly."""
    total = layer.weight.numel() - layer.keep
    dead, rows = int(layer.dead.sum()) * len(layer.weight), len(layer.weight)
    dead_before = int(layer.dead[:stop].sum()) * rows
    if total <= dead:
        return total * dead_before // max(dead, 1)
    live_before = stop * rows - dead_before
    return dead_before + (total - dead) * live_before // (layer.weight.numel() - dead)


def _chosen(w: Tensor, pivots: Tensor, gone: int) -> Tensor:
    """The mask of a block ``(columns, out)``: the ``gone`` weights of the smallest rise go."""
    return top_mask((w / pivots[:, None]).square().T, w.numel() - gone).T
