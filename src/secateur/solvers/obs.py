"""OBS: take the weight that costs least to lose away, move all others to make up for it, and again."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.core.errors import DataError
from secateur.core.patterns import NM
from secateur.core.reading import Paper
from secateur.core.sockets import Solver
from secateur.linalg.memory import check, estimate
from secateur.solvers._layer import Layer, check_damping, inverse, shed, solve

_SHED = 64


@dataclass(frozen=True)
class Obs(Solver):
    """Optimal Brain Surgeon: one weight at a time over the whole layer, every survivor moves.

    Losing weight q raises the error by ``w_q² / [H⁻¹]_qq`` at least, and does so when the others move by
    ``-w_q / [H⁻¹]_qq · H⁻¹ e_q``. The weight of the smallest rise goes, and row and column q are taken out of the
    inverse (one update of rank 1, nothing is inverted again). With one row ``gram`` may be any positive definite
    Hessian of a whole network's weights as one vector. With several rows it is the Hessian of each row, the rows
    share no error, and the cheapest weight of the layer goes next. N:M skips groups that have lost their share.

    Args:
        damping: added to the diagonal of ``gram``, relative to its mean. Where inputs are redundant the damping
            decides which of them stays.

    Raises:
        UsageError: for another pattern than single weights or N:M, or inverses that do not fit into memory.
        BudgetError: for a count out of range.
        ModelError: for weights that are not finite.
        DataError: for a matrix that is not finite, or singular in spite of the damping.

    Cost: O(in²) time for each pruned weight, in a Python loop; one float64 copy of the Gram matrix for each row that
    loses a weight, and one where there are several. ``exact_obs`` gives the same weights faster and with less memory.
    """

    damping: float = 1e-4

    paper = Paper(
        "Second order derivatives for network pruning: Optimal Brain Surgeon",
        "Hassibi, Stork",
        1992,
        "NIPS 5, pp. 164-171",
        differs="the Hessian is given and factored once, where the paper inverts it by a recursion over the examples; "
        "it is not measured again after a weight is gone; damping is relative to the mean diagonal, the paper's 1e-8 "
        "to 1e-4 is absolute; it stops at a count, not at a rise of the error; a row that would be no better than "
        "with zeros alone is only zeroed. The paper's accuracies on the MONK's problems are unverified",
    )
    needs = frozenset({"hessian"})

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def __call__(self, weight: Tensor, gram: Tensor, pattern: Any, keep: int) -> tuple[Tensor, Tensor]:
        """New weight ``(out, in)`` and boolean mask (True = kept) with exactly ``keep`` weights kept."""
        return solve(_eliminate, weight, gram, pattern, keep, self.damping)


@dataclass
class _Row:
    """What is left of a row: its weights, their columns and their inverse; zeros where weights went since it shrank."""

    w: Tensor
    place: Tensor
    inverse: Tensor

    def lose(self, q: int, pivot: float) -> None:
        """Take weight ``q`` of those left away and let the others make up for it, in place."""
        column = self.inverse[q].clone()
        self.w.sub_(column * (float(self.w[q]) / pivot))
        self.inverse.addr_(column, column, alpha=-1 / pivot)
        self.inverse[q], self.inverse[:, q], self.w[q] = 0.0, 0.0, 0.0

    def shrink(self, mask: Tensor) -> None:
        """Leave out what has gone, in place."""
        stay = mask[self.place].nonzero()[:, 0]
        self.w, self.place, self.inverse = self.w[stay], self.place[stay], shed(self.inverse, stay)

    def rises(self, closed: Tensor) -> Tensor:
        """What the loss of each weight left would cost; infinite where it cannot go."""
        return (self.w.square() / self.inverse.diagonal()).masked_fill(closed[self.place], torch.inf)


def _eliminate(layer: Layer) -> tuple[Tensor, Tensor]:
    gone, (rows, width) = layer.weight.numel() - layer.keep, layer.weight.shape
    count, type_ = min(gone, rows), layer.diagonal().dtype
    what = f"the inverses of {count:,} rows of {width:,} inputs, which obs holds,"
    check(estimate((count, width, width), type_), what, "use exact_obs: the same weights", layer.weight.device)
    w = layer.rows()
    first = inverse(layer)
    mask, every = torch.ones_like(w, dtype=torch.bool), torch.arange(w.shape[1], device=w.device)
    best = (w.square() / first.diagonal()).amin(1)
    left: dict[int, _Row] = {}  # a row shares the first inverse until it loses a weight
    for _ in range(gone):
        r = int(best.argmin())
        if r not in left:
            left[r] = _Row(w[r].clone(), every, first if len(w) == 1 else first.clone())
        row = left[r]
        q = int(row.rises(_closed(mask[r], layer)).argmin())
        row.lose(q, _positive(float(row.inverse[q, q]), layer.damping))
        mask[r, row.place[q]] = False
        if int(mask[r].sum()) <= len(row.w) - _SHED:
            row.shrink(mask[r])
        best[r] = row.rises(_closed(mask[r], layer)).amin() if len(row.w) else torch.inf
    for r, row in left.items():
        w[r, row.place] = row.w
    return w, mask


def _positive(pivot: float, damping: float) -> float:
    if not pivot > 0:
        raise DataError(
            f"the inverse Hessian lost its sign: {pivot:.3g} on its diagonal, by rounding, with damping {damping:g}. "
            f"Raise the damping, for example to {max(0.01, 10 * damping):g}, or use more examples than the layer has "
            "inputs."
        )
    return pivot


def _closed(mask: Tensor, layer: Layer) -> Tensor:
    """Weights of one row that cannot go: they have gone, or their group has lost its share."""
    if not isinstance(layer.pattern, NM):
        return ~mask
    spent = mask.view(-1, layer.pattern.m).sum(1) <= layer.pattern.n
    return ~mask | spent.repeat_interleave(layer.pattern.m)
