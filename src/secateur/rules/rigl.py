"""RigL: train sparse from the first step; drop small weights, grow where the gradient is large."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from secateur.core.allocations import Allocation, ErdosRenyi
from secateur.core.choose import broadcast
from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.run import Run
from secateur.core.select import check_scores, top_mask
from secateur.core.sockets import Rule
from secateur.core.streams import stream
from secateur.rules._dynamic import check_options, check_trained, pick, silent, start


@dataclass(frozen=True)
class Rigl(Rule):
    """At intervals drop the smallest weights of each tensor, and grow as many where the gradient is large.

    Of a tensor's ``n`` kept weights ``floor(f n)`` of the least magnitude are dropped, with ``f = alpha / 2 *
    (1 + cos(pi * step / T))`` and ``T = stop * steps``; as many are grown where ``|gradient|`` is largest among all
    places that are not kept, those just dropped included. Grown weights begin at zero with cleared optimizer state; a
    weight dropped and grown again in one update keeps its value and state. The step of an update is spent on it: the
    optimizer does not move then. After ``T`` the zeros stand still and training goes on.

    Counts stay exact in every tensor at every step. The network begins with random zeros; zeros it came with are kept
    as the first ones when their number is that of ``sparsity``. For the paper's uniform variant use ``allocation =
    "uniform"`` and leave the first layer out with ``skip``.

    Args:
        sparsity: pruned / prunable weights, in (0, 1).
        alpha: share of kept weights that the first update would replace, in (0, 1).
        every: steps between updates; by default 100, in short runs a tenth of the steps before ``T`` (at least 2).
        stop: share of the run after which zeros stand still, in (0, 1].
        grow: by ``"gradient"``, or at ``"random"`` with everything else equal, to see what the gradient is worth.
        allocation: how the budget is shared out over tensors.

    Raises:
        BudgetError: for a sparsity out of range, or zeros of another number.
        UsageError: for other values out of range, or tensors that are not trained.

    Cost: two selections over the prunable weights at each update; between updates nothing is computed or kept.
    """

    paper = Paper(
        "Rigging the Lottery: Making All Tickets Winners",
        "Evci, Gale, Menick, Castro, Elsen",
        2019,
        "arXiv:1911.11134",
        differs="no noise is added to the magnitudes (ties go by index); ``every`` and ``T`` follow the length of the "
        "run by default; the gradient of zeros comes from torch's dense backward pass, which computes it at every step "
        "and throws it away between updates",
    )
    needs = frozenset({"dense gradients"})

    sparsity: float = 0.9
    alpha: float = 0.3
    every: int | None = None
    stop: float = 0.75
    grow: Literal["gradient", "random"] = "gradient"
    allocation: Allocation = field(default_factory=ErdosRenyi)

    def __post_init__(self) -> None:
        check_options("rigl", self.sparsity, self.allocation)
        if not 0 < self.alpha < 1:
            raise UsageError(f"rigl: alpha is {self.alpha!r}; it must be in (0, 1), 0.3 is usual.")
        if self.every is not None and self.every < 1:
            raise UsageError(f"rigl: every is {self.every!r}; it must be at least 1 step, 100 is usual.")
        if not 0 < self.stop <= 1:
            raise UsageError(f"rigl: stop is {self.stop!r}; it is a share of the run, in (0, 1], 0.75 is usual.")

    def interval(self, total: int) -> int:
        """Steps between updates in a run of ``total`` steps."""
        return self.every or max(2, min(100, round(self.stop * total) // 10))

    def updates(self, total: int) -> int:
        """Updates in a run of ``total`` steps."""
        return (max(1, round(self.stop * total)) - 1) // self.interval(total)

    def share(self, step: int, total: int) -> float:
        """``f``: the share of kept weights that an update after ``step`` of ``total`` steps replaces."""
        return self.alpha / 2 * (1 + math.cos(math.pi * min(1.0, step / (self.stop * total))))

    def due(self, step: int, total: int) -> bool:
        """Whether the step after ``step`` of ``total`` ones is spent on an update."""
        return 0 < step < round(self.stop * total) and step % self.interval(total) == 0

    def begin(self, run: Run) -> None:
        """Choose the first zeros."""
        if run.resumed:
            return
        check_trained("rigl", run)
        if self.every is not None and self.updates(run.total) == 0:
            raise UsageError(
                f"rigl: every is {self.every}, but zeros may move only in the first {round(self.stop * run.total)} of "
                f"{run.total} steps, so they never would. Set a smaller `every`, or train longer."
            )
        start("rigl", run, self.sparsity, self.allocation)

    @torch.no_grad()
    def before_step(self, run: Run) -> None:
        """Move zeros when an update is due, and let the optimizer skip this step."""
        if not self.due(run.step, run.total):
            return
        old, weights = run.masks, run.weights()
        check_finite(weights)
        new = {name: self._moved(run, name, w, old[name]) for name, w in weights.items()}
        run.masks = broadcast(Masks(new))
        run.note("rigl/grown", float((run.masks - old).kept))
        run.note("rigl/silent_units", float(silent(run.masks)))
        for p in run.model.parameters():
            p.grad = None  # an optimizer passes by what has no gradient

    def _moved(self, run: Run, name: str, w: Tensor, mask: Tensor) -> Tensor:
        """The new mask of one tensor, with as many weights as the old one."""
        kept = int(mask.sum())
        count = math.floor(self.share(run.step, run.total) * kept)
        left = top_mask(torch.where(mask, w.abs(), -1.0), kept - count)
        if self.grow == "random":
            return left | pick(~left, count, stream(run.seed, "rigl", name, run.step))
        slope = run.dense_gradient(name).abs()
        check_scores({name: slope})
        return left | top_mask(torch.where(left, -1.0, slope), count)
