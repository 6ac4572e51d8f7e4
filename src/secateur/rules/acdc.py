"""AC/DC: alternate dense and sparse phases, and end sparse."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from secateur.core.allocations import Allocation, ByCost, Global
from secateur.core.budget import keep_for
from secateur.core.choose import broadcast, choose, keep_counts
from secateur.core.errors import BudgetError, UsageError
from secateur.core.masks import Masks
from secateur.core.patterns import Unstructured
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.run import Run
from secateur.core.sockets import Rule


@dataclass(frozen=True)
class Acdc(Rule):
    """Train dense and sparse by turns: weights that were pruned too early get another chance, from zero.

    At the beginning of a sparse phase the weights of the smallest magnitude become zero and stay so for the phase.
    At the beginning of a dense phase all may move again; the optimizer's state is reset then, for it belongs to the
    sparse network. Masks change at these points only. The network begins dense (masks it came with are lifted) and
    ends sparse.

    The learning rate must still be high in the dense phases, or they change nothing. BatchNorm statistics lag behind
    for some steps after each change, so figures measured right there say little.

    Args:
        sparsity: pruned / prunable weights in the sparse phases, in [0, 1).
        phases: lengths as shares of the run: dense, sparse, dense, ..., sparse; they sum to 1. The default is
            for short runs; the paper's 100 ImageNet epochs are
            ``(0.1, 0.05, 0.05, ... (13 in all), 0.1, 0.15)``.
        allocation: how the budget is shared out over tensors.

    Raises:
        BudgetError: for a sparsity out of range, or one that would empty layers.
        UsageError: for phases that do not sum to 1, end dense or are shorter than an epoch.

    Cost: one selection over the weights for each sparse phase.
    """

    paper = Paper(
        "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks",
        "Peste, Iofinova, Vladu, Alistarh",
        2021,
        "arXiv:2106.12379",
        differs="all optimizer state is reset when a dense phase begins, not the momentum of SGD alone; "
        "the last dense network is not kept",
    )

    sparsity: float = 0.9
    phases: tuple[float, ...] = field(default=(0.2, 0.1, 0.1, 0.1, 0.1, 0.4))
    allocation: Allocation = field(default_factory=Global)

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise BudgetError(f"acdc: sparsity is {self.sparsity!r}; it must be in [0, 1), 0.9 means 90 % zeros.")
        if not self.phases or len(self.phases) % 2:
            raise UsageError(
                f"acdc: phases has {len(self.phases)} entries (dense, sparse, dense, ...), so the run would end dense. "
                "Add a last sparse phase."
            )
        if not all(0 < share < 1 for share in self.phases) or abs(math.fsum(self.phases) - 1) > 1e-6:
            raise UsageError(
                f"acdc: phases are {self.phases} and sum to {math.fsum(self.phases):g}; they are positive shares of "
                "the run that sum to 1, for example `phases = [0.2, 0.1, 0.1, 0.1, 0.1, 0.4]`."
            )
        if isinstance(self.allocation, ByCost):
            raise UsageError("acdc: allocation by-cost needs MACs, which a rule does not know; use `global` or `erk`.")

    def starts(self, total: int) -> list[int]:
        """The steps at which the second, third, ... phase begins, in a run of ``total`` steps."""
        return [round(share * total) for share in accumulate(self.phases[:-1])]

    def begin(self, run: Run) -> None:
        """Check lengths and budget, and begin dense."""
        if run.resumed:
            return
        edges = [0, *self.starts(run.total), run.total]
        shortest = min(b - a for a, b in zip(edges, edges[1:], strict=False))
        if shortest < run.steps_per_epoch:
            raise UsageError(
                f"acdc: the shortest phase has {shortest} steps, an epoch {run.steps_per_epoch}; no phase may be "
                f"shorter. Train for {math.ceil(1 / min(self.phases) - 1e-9)} epochs or more, or set longer `phases`."
            )
        magnitudes = {name: w.detach().abs() for name, w in run.weights().items()}
        keep_counts(magnitudes, keep_for(self.sparsity, run.masks.total), Unstructured(), self.allocation)
        if run.masks.kept < run.masks.total:
            run.masks = _all(run.masks)

    def after_step(self, run: Run) -> None:
        """Change the phase when its time has come."""
        starts = self.starts(run.total)
        if run.step not in starts:
            return
        if starts.index(run.step) % 2 == 0:
            self._compress(run)
        elif run.masks.kept < run.masks.total:
            run.masks = _all(run.masks)
            run.optimizer.state.clear()

    def _compress(self, run: Run) -> None:
        weights = run.weights()
        check_finite(weights)
        keep = keep_for(self.sparsity, run.masks.total)
        if keep < run.masks.total:
            scores = {name: w.detach().abs() for name, w in weights.items()}
            run.masks = broadcast(choose(scores, keep, allocation=self.allocation))


def _all(masks: Masks) -> Masks:
    return Masks({name: torch.ones_like(mask) for name, mask in masks.items()})
