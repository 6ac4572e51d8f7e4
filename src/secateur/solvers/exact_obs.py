"""Exact OBS: the greedy order of Optimal Brain Surgeon for every row of a layer at once, then the best counts."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.core.patterns import NM, Pattern
from secateur.core.reading import Paper
from secateur.core.select import top_mask
from secateur.core.sockets import Solver
from secateur.solvers._layer import WORK, Layer, check_damping, inverse, refit, shed, solve

_PANEL = 64


@dataclass(frozen=True)
class ExactObs(Solver):
    """Optimal Brain Compression: each row loses its weights one by one, and the cheapest losses of the layer are taken.

    Rows share no error. Losing weight q raises the error of a row by ``w_q² / [H⁻¹]_qq`` once the others have moved;
    the smallest goes, and so on until the row is empty. The rises recorded on the way say how many weights each row
    loses: the layer goes on with the row whose next loss is cheapest. The survivors of a row are its least-squares
    fit on them. N:M skips groups that have lost their share; then all rows lose equally many.

    All rows take a step together. Within a panel of 64 steps only the columns needed are updated; at its end the
    inverses take one product of rank 64 and shed the rows and columns that went.

    Args:
        damping: added to the diagonal of ``gram``, relative to its mean.

    Raises:
        UsageError: for another pattern than single weights or N:M.
        BudgetError: for a count out of range.
        ModelError: for weights that are not finite.
        DataError: for a matrix that is not finite, or singular in spite of the damping.

    Cost: O(out · in³) time, mostly in matrix products; two float64 copies of the Gram matrix (or one and 32 MiB)
    and five of the layer.
    """

    damping: float = 0.01

    paper = Paper(
        "Optimal Brain Compression: A Framework for Accurate Post-Training Quantization and Pruning",
        "Frantar, Singh, Alistarh",
        2022,
        "arXiv:2208.11580",
        differs="the inverse is updated by panels, not by every weight; the weights of a row come from one "
        "least-squares fit on its survivors, not from a stored trace; a loss cheaper than one before it in its row is "
        "taken together with that one; damping is 1 % (the paper's is unverified); a row that would be no better than "
        "with zeros alone is only zeroed; no quantisation, no blocks. The published tables are unverified",
    )
    needs = frozenset({"activations"})

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def __call__(self, weight: Tensor, gram: Tensor, pattern: Any, keep: int) -> tuple[Tensor, Tensor]:
        """New weight ``(out, in)`` and boolean mask (True = kept) with exactly ``keep`` weights kept."""
        return solve(_solve, weight, gram, pattern, keep, self.damping)


def _solve(layer: Layer) -> tuple[Tensor, Tensor]:
    nm, (rows, width) = layer.pattern, layer.weight.shape
    gone = layer.weight.numel() - layer.keep
    steps = width // nm.m * (nm.m - nm.n) if isinstance(nm, NM) else min(width, gone)
    shared, diagonal = inverse(layer), layer.diagonal()
    size = max(1, WORK // (8 * width * width))
    parts = [layer.rows(slice(start, start + size)) for start in range(0, rows, size)]
    traces = [_trace(part, shared, diagonal, steps, nm) for part in parts]
    order, rises = (torch.cat(parts) for parts in zip(*traces, strict=True))
    del shared, parts, traces
    peaks = rises.cummax(1).values  # after a dear loss the cheaper ones that follow it are worth taking at once
    lost = steps - top_mask(peaks, rows * steps - gone).sum(1, keepdim=True)
    del rises, peaks
    mask = torch.ones(rows, width, dtype=torch.bool, device=order.device)
    mask.scatter_(1, order, torch.arange(steps, device=order.device) >= lost)
    return refit(layer.rows(), layer.matrix(), mask), mask


def _trace(w: Tensor, inverse: Tensor, diagonal: Tensor, steps: int, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The first ``steps`` losses of each row: their columns in order, and the rises of the error."""
    rows, width = w.shape
    row = torch.arange(rows, device=w.device)
    place = torch.arange(width, device=w.device).expand(rows, width)
    inverses = inverse.expand(rows, width, width)  # until the first panel is full all rows share it
    floor = (1 / diagonal).expand(rows, width)  # no entry of the inverse's diagonal can be less
    quota, size = _quota(w, pattern), pattern.m if isinstance(pattern, NM) else 1
    order, rises = [], []
    while len(order) < steps:
        panel = w.new_empty(rows, min(_PANEL, steps - len(order)), w.shape[1])
        left = inverses.diagonal(dim1=1, dim2=2).clone()
        for k in range(panel.shape[1]):
            torch.maximum(left, floor, out=left)
            rise = w.square().div_(left)
            if quota is not None:
                rise.masked_fill_(quota.gather(1, place // size) == 0, torch.inf)
            q = rise.argmin(1, keepdim=True)
            order.append(place.gather(1, q))
            rises.append(rise.gather(1, q))
            pivot = left.gather(1, q)
            column = inverses[row, q[:, 0]]
            if k:
                past = panel[:, :k]
                column = torch.baddbmm(column[:, None], past[row, :, q[:, 0]][:, None], past, alpha=-1)[:, 0]
            w.addcmul_(w.gather(1, q).div_(pivot), column, value=-1)
            torch.mul(column, pivot.rsqrt(), out=panel[:, k])
            left.addcmul_(panel[:, k], panel[:, k], value=-1)
            w.scatter_(1, q, torch.inf)  # marks what has gone: its rise is infinite from now on
            if quota is not None:
                quota.scatter_add_(1, order[-1] // size, torch.full_like(q, -1))
        stay = w.isfinite().nonzero()[:, 1].view(rows, -1)
        inverses = _shed(inverses, panel, stay, own=len(order) > panel.shape[1])
        w, place, floor = (entry.gather(1, stay) for entry in (w, place, floor))
    return torch.cat(order, 1), torch.cat(rises, 1)


def _quota(w: Tensor, pattern: Pattern) -> Tensor | None:
    """How many weights each group of each row may still lose."""
    if not isinstance(pattern, NM):
        return None
    shape = (len(w), w.shape[1] // pattern.m)
    return torch.full(shape, pattern.m - pattern.n, dtype=torch.int64, device=w.device)


def _shed(inverses: Tensor, panel: Tensor, stay: Tensor, own: bool) -> Tensor:
    """The inverses after a panel of losses, without the rows and columns that went; in place where they are our own."""
    rows, size = stay.shape
    if own:
        for one, rest in zip(inverses, stay, strict=True):
            shed(one, rest)
        left = inverses.as_strided((rows, size, size), (inverses.stride(0), size, 1))
    else:
        left = inverses.new_empty(rows, size, size)
        for one, rest, out in zip(inverses, stay, left, strict=True):
            shed(one, rest, out)
    panel = panel.gather(2, stay[:, None].expand(-1, panel.shape[1], -1))
    return left.baddbmm_(panel.mT, panel, alpha=-1)
