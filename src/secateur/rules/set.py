"""SET: train sparse from the first step; weights nearest zero go, random ones come."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from secateur.core.allocations import Allocation, ErdosRenyi
from secateur.core.choose import broadcast
from secateur.core.errors import BudgetError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.run import Run
from secateur.core.select import top_mask
from secateur.core.sockets import Rule
from secateur.core.streams import stream
from secateur.rules._dynamic import check_options, check_trained, pick, silent, start


@dataclass(frozen=True)
class Set(Rule):
    """After each epoch but the last, replace a share of the weights of each tensor by new ones at random places.

    Of the kept positive weights the share ``zeta`` nearest zero goes, of the negative ones too (both rounded down);
    kept weights that are exactly zero have no sign and stay. As many places that were empty before are drawn, all
    equally likely. A new weight is a small random number, and its optimizer state is clear. A tensor with fewer empty
    places than weights to remove replaces only as many as fit; a dense one stays dense. Counts stay exact in every
    tensor at every step.

    The network begins with random zeros; zeros it came with are kept as the first ones when their number is that of
    ``sparsity``. The paper leaves the output layer dense (``skip``).

    Args:
        sparsity: pruned / prunable weights, in (0, 1).
        zeta: share of weights that an evolution replaces, in [0, 1).
        epsilon: the paper's density instead of ``sparsity``: each weight of a tensor is kept with probability
            ``min(1, epsilon * sum of dimensions / product of dimensions)``; zeros the network came with may be of any
            number then, and ``allocation`` is not used.
        every: steps between evolutions; an epoch by default. None happens with fewer steps to come.
        spread: standard deviation of new weights; with 0 they begin at zero.
        allocation: how the budget is shared out over tensors.

    Raises:
        BudgetError: for a sparsity or epsilon out of range, or zeros of another number.
        UsageError: for other values out of range, or tensors that are not trained.

    Cost: three selections over the prunable weights at each evolution.
    """

    paper = Paper(
        "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network science",
        "Mocanu, Mocanu, Stone, Nguyen, Gibescu, Liotta",
        2018,
        "arXiv:1707.04780",
        differs="an exact number of weights by default, the paper draws each one (`epsilon`); kernel dimensions count "
        "for convolutions, as in RigL; weights that were just removed do not come back in the same evolution; new "
        "weights as in the authors' sparse code, their Keras code begins them at zero",
    )

    sparsity: float = 0.9
    zeta: float = 0.3
    epsilon: float | None = None
    every: int | None = None
    spread: float = 0.1
    allocation: Allocation = field(default_factory=ErdosRenyi)

    def __post_init__(self) -> None:
        check_options("set", self.sparsity, self.allocation)
        if self.epsilon is not None and not 0 < self.epsilon < math.inf:
            raise BudgetError(f"set: epsilon is {self.epsilon!r}; it must be positive, 10 to 20 is usual.")
        if not 0 <= self.zeta < 1:
            raise UsageError(f"set: zeta is {self.zeta!r}; it must be in [0, 1), 0.3 is usual.")
        if self.every is not None and self.every < 1:
            raise UsageError(f"set: every is {self.every!r}; it must be at least 1 step, or left out for an epoch.")
        if not 0 <= self.spread < math.inf:
            raise UsageError(f"set: spread is {self.spread!r}; it must be at least 0, 0.1 is usual.")

    def begin(self, run: Run) -> None:
        """Choose the first zeros."""
        if run.resumed:
            return
        check_trained("set", run)
        if self.epsilon is None:
            start("set", run, self.sparsity, self.allocation)
        elif run.masks.kept == run.masks.total:
            run.masks = broadcast(erdos_renyi(run.weights(), self.epsilon, run.seed))

    def after_step(self, run: Run) -> None:
        """Replace weights when it is time."""
        every = self.every or run.steps_per_epoch
        if run.step % every == 0 and run.step + every <= run.total and self.zeta:
            self._evolve(run)

    @torch.no_grad()
    def _evolve(self, run: Run) -> None:
        weights, old = run.weights(), run.masks
        check_finite(weights)
        zeta, new = Fraction(f"{self.zeta:.12f}"), {}
        for name, w in weights.items():
            gone = removed(w, old[name], zeta)
            places = pick(~old[name], int(gone.sum()), stream(run.seed, "set", name, run.step))
            new[name] = (old[name] & ~gone) | places
        run.masks = broadcast(Masks(new))
        grown = run.masks - old
        for name, w in weights.items():
            random = stream(run.seed, "set", "values", name, run.step)
            values = self.spread * torch.randn(int(grown[name].sum()), generator=random)
            w[grown[name]] = values.to(w)
        run.note("set/grown", float(grown.kept))
        run.note("set/silent_units", float(silent(run.masks)))


def removed(w: Tensor, mask: Tensor, zeta: Fraction) -> Tensor:
    """Which kept weights an evolution takes away, at most as many as there are empty places.

    Args:
        w: the weights.
        mask: which are kept, same shape.
        zeta: share of the positive ones and of the negative ones.
    """
    kept = int(mask.sum())
    share = min(zeta, Fraction(mask.numel() - kept, max(1, kept)))
    gone = torch.zeros_like(mask)
    for side in (w, -w):
        some = mask & (side > 0)
        gone |= top_mask(torch.where(some, -side, -torch.inf), math.floor(share * int(some.sum())))
    return gone


def erdos_renyi(weights: Named, epsilon: float, seed: int) -> Masks:
    """Random masks in which each weight is kept with ``min(1, epsilon * sum of dimensions / product of dimensions)``.

    Args:
        weights: the tensors, by name.
        epsilon: about ``epsilon`` weights for each input unit, output unit and kernel row and column.
        seed: of the random stream.

    Raises:
        BudgetError: when a tensor is left without any weight.
    """
    masks = {}
    for name, w in weights.items():
        chance = min(1.0, epsilon * sum(w.shape) / max(1, w.numel()))
        drawn = torch.rand(w.shape, generator=stream(seed, "set", "start", name), dtype=torch.float64) < chance
        if not bool(drawn.any()):
            raise BudgetError(f"set: epsilon = {epsilon:g} leaves `{name}` without any weight; set a larger one.")
        masks[name] = drawn.to(w.device)
    return Masks(masks)
