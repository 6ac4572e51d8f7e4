"""SR-STE: learn an N:M pattern from scratch, with a straight-through gradient and a pull on what is pruned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.patterns import NM
from secateur.core.reading import Paper
from secateur.core.run import Run
from secateur.core.sockets import Rule
from secateur.rules._dense import lay_aside


@dataclass(frozen=True)
class SrSte(Rule):
    """Compute with the N largest weights of every M consecutive inputs, and train all of them.

    Behind every weight tensor stands a dense one, ``W``. In each step the network computes with ``W * m``, where ``m``
    keeps the ``n`` entries of the largest magnitude in each group of ``m`` inputs; the gradient by these values moves
    all of ``W``, those left out too (straight through), and ``decay * (1 - m) * W`` is added to it, which draws what is
    left out to zero, so that groups change their minds less often. ``decay = 0`` is the plain straight-through
    estimator. ``clip`` counts the pull as part of the gradient.

    Between steps the network itself holds the N:M weights; ``run.masks`` become the last ``m`` at the end. The
    network begins dense (masks it came with are lifted). The first convolution, depthwise ones and others whose inputs
    do not divide by M are refused by name: leave them out with ``skip``.

    Args:
        pattern: ``n`` and ``m``.
        decay: weight of the pull, at least 0; the paper's 2e-4 is for 120 epochs.

    Raises:
        UsageError: for a decay that is negative or not finite, or tensors that cannot take the pattern.

    Cost: each step a sort within the groups and a few passes over the weights; memory of one more copy of the weights
    and a mask. Products are computed dense, so no time is saved in training.
    """

    paper = Paper(
        "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
        "Zhou, Ma, Zhu, Liu, Zhang, Yuan, Sun, Li",
        2021,
        "arXiv:2102.04010",
        differs="tensors whose inputs do not divide by M are refused by name, not left dense",
    )

    pattern: NM = field(default_factory=NM)
    decay: float = 2e-4

    def __post_init__(self) -> None:
        if not 0 <= self.decay < float("inf"):
            raise UsageError(f"sr_ste: decay is {self.decay!r}; it must be at least 0, 2e-4 is usual.")

    @property
    def sparsity(self) -> float:
        """The share of zeros that the pattern prescribes."""
        return 1 - self.pattern.n / self.pattern.m

    def begin(self, run: Run) -> None:
        """Check the tensors, and leave only the first pattern in the network."""
        unfit = {n: why for n, w in run.weights().items() if (why := self.pattern.why_not(tuple(w.shape)))}
        if unfit:
            reasons = "; ".join(f"`{name}`: {why}" for name, why in unfit.items())
            raise UsageError(
                f"sr_ste: not every tensor can take {self.pattern.n}:{self.pattern.m} ({reasons}). "
                f"Leave them dense: `skip = {list(unfit)}`."
            )
        state = run.state(self)
        if lay_aside(run, state):
            self._show(run, state)

    @torch.no_grad()
    def before_step(self, run: Run) -> None:
        """Put ``W`` into the network, and add the pull to the gradient."""
        state = run.state(self)
        for name, w in run.weights().items():
            w.copy_(state[f"theta:{name}"])
            if w.grad is not None and self.decay:
                w.grad.add_(w.masked_fill(state[f"mask:{name}"], 0), alpha=self.decay)

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Keep ``W``, and leave only the pattern in the network."""
        state = run.state(self)
        for name, w in run.weights().items():
            state[f"theta:{name}"].copy_(w)
        self._show(run, state)

    def end(self, run: Run) -> None:
        """The last pattern becomes the masks of the network."""
        state = run.state(self)
        run.masks = Masks({name: state[f"mask:{name}"] for name in run.masks})
        state.clear()

    @torch.no_grad()
    def _show(self, run: Run, state: dict[str, Any]) -> None:
        for name, w in run.weights().items():
            theta = state[f"theta:{name}"]
            mask = self.pattern.mask(theta.abs(), self.pattern.fixed(tuple(theta.shape)) or 0)
            state[f"mask:{name}"] = mask
            w.copy_(theta.masked_fill(~mask, 0))
