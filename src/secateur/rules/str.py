"""STR: soft thresholds that are learnt, one for each layer, decide how sparse it becomes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import SGD

from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.reading import Paper
from secateur.core.run import Run
from secateur.core.sockets import Rule
from secateur.rules._dense import lay_aside


@dataclass(frozen=True)
class Str(Rule):
    """Compute with ``sign(W) * relu(|W| - g(s))``, and train ``W`` and the number ``s`` of each tensor together.

    Weights below the threshold ``g(s)`` are zero and get no gradient from the loss, only decay. The thresholds move by
    the gradient of the loss and by decay, ``s <- s - lr * (slope + decay * s)``, with the learning rate of the run, and
    with its momentum where it trains by SGD. Begun far below zero the thresholds are 0, and **decay alone makes them
    grow**: without gradient ``s = initial * (1 - lr * decay)^t`` under SGD without momentum. There is no target; how
    sparse the network gets follows from ``initial``, ``decay`` and the length of the run.

    Between steps the network itself holds the shrunk weights, and so it ends; ``run.masks`` become its zeros at the
    end and are dense until then. The share of zeros of each tensor is noted after every epoch, as ``sparsity/NAME``; 1
    tells of a layer that is empty. By the formula's gradient a weight that is exactly 0 stays 0: those that were pruned
    before do, and so does a layer whose weights all begin at 0.

    Args:
        initial: first ``s`` of every tensor. -12 suits some thousand steps with a decay of about 5e-4; the paper's
            -3200 (ResNet-50) and -12800 (MobileNet) are for 100 ImageNet epochs.
        decay: decay of ``s``; by default the run's ``weight_decay``, as in the paper.
        function: ``g``, ``"sigmoid"`` or ``"exp"``.
        freeze_at: let the thresholds stand still once this share of the weights is zero; None: they never do. The
            share may still change a little afterwards, as weights move.

    Raises:
        UsageError: for values out of range, or thresholds that begin at 0 and have no decay, so that all stays dense.

    Cost: each step a few passes over the prunable weights; memory of one more copy of them.
    """

    paper = Paper(
        "Soft Threshold Weight Reparameterization for Learnable Sparsity",
        "Kusupati, Ramanujan, Somani, Wortsman, Jain, Kakade, Farhadi",
        2020,
        "arXiv:2002.03231",
        differs="thresholds move by SGD whatever optimizer trains the weights, and are not part of `clip`; they may be "
        "frozen at a given sparsity",
    )

    initial: float = -12.0
    decay: float | None = None
    function: Literal["sigmoid", "exp"] = "sigmoid"
    freeze_at: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.initial):
            raise UsageError(f"str: initial is {self.initial!r}; it must be a finite number, -12.0 for short runs.")
        if self.decay is not None and not 0 <= self.decay < math.inf:
            raise UsageError(f"str: decay is {self.decay!r}; it must be at least 0, for example 5e-4.")
        if self.function not in ("sigmoid", "exp"):
            raise UsageError(f"str: function is {self.function!r}; it must be 'sigmoid' or 'exp'.")
        if self.freeze_at is not None and not 0 < self.freeze_at < 1:
            raise UsageError(f"str: freeze_at is {self.freeze_at!r}; it must be in (0, 1), 0.9 means 90 % zeros.")

    def begin(self, run: Run) -> None:
        """Give every tensor its threshold."""
        state = run.state(self)
        if not lay_aside(run, state):
            return
        wide = max((w.dtype for w in run.weights().values()), key=lambda d: d.itemsize)
        s = torch.full((len(run.masks),), self.initial, dtype=torch.promote_types(wide, torch.float32))
        s = s.to(next(iter(run.weights().values())).device)
        if not self._decay(run) and float(self._alpha(s)[0]) < 1e-4:
            raise UsageError(
                f"str: the thresholds begin at {float(self._alpha(s)[0]):.2g} (initial = {self.initial:g}) and nothing "
                "moves them from there, for their decay is 0. Set `decay = 5e-4`, or `weight_decay` of the training."
            )
        state.update(thresholds=s, velocity=torch.zeros_like(s), frozen=0)
        self._show(run, state)

    @torch.no_grad()
    def before_step(self, run: Run) -> None:
        """Move the thresholds, and put ``W`` with its own gradient into the network."""
        state = run.state(self)
        s = state["thresholds"]
        slopes = torch.zeros_like(s)
        for i, (name, w) in enumerate(run.weights().items()):
            if w.grad is not None:
                signs = w.sign()  # of the weights above the threshold; 0 for the others
                slopes[i] = (w.grad * signs).sum(dtype=s.dtype)
                w.grad.mul_(signs.abs_())
            w.copy_(state[f"theta:{name}"])
        alpha = self._alpha(s)
        if not state["frozen"]:
            self._move(run, state, -slopes * (alpha * (1 - alpha) if self.function == "sigmoid" else alpha))

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Keep ``W``, and leave the shrunk weights in the network."""
        state = run.state(self)
        for name, w in run.weights().items():
            state[f"theta:{name}"].copy_(w)
        self._show(run, state)
        if run.step % run.steps_per_epoch == 0:
            for name, w in run.weights().items():
                run.note(f"sparsity/{name}", 1 - int(w.count_nonzero()) / w.numel())
        if self.freeze_at is not None and not state["frozen"]:
            kept = sum(int(w.count_nonzero()) for w in run.weights().values())
            state["frozen"] = int(kept <= (1 - self.freeze_at) * run.masks.total)

    def end(self, run: Run) -> None:
        """The zeros become the masks of the network."""
        run.masks = Masks({name: w.detach() != 0 for name, w in run.weights().items()})
        run.state(self).clear()

    def _alpha(self, s: Tensor) -> Tensor:
        return s.sigmoid() if self.function == "sigmoid" else s.exp()

    def _decay(self, run: Run) -> float:
        return float(run.optimizer.param_groups[0].get("weight_decay", 0.0)) if self.decay is None else self.decay

    def _move(self, run: Run, state: dict[str, Any], slope: Tensor) -> None:
        """A step of SGD as torch takes it, with the momentum of the run's own."""
        group, s, velocity = run.optimizer.param_groups[0], state["thresholds"], state["velocity"]
        momentum = group["momentum"] if isinstance(run.optimizer, SGD) else 0.0
        slope = slope.add(s, alpha=self._decay(run))
        velocity.mul_(momentum).add_(slope)
        slope = slope.add(velocity, alpha=momentum) if group.get("nesterov") else velocity
        s.sub_(slope, alpha=group["lr"])

    def _show(self, run: Run, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for (name, w), alpha in zip(run.weights().items(), self._alpha(state["thresholds"]), strict=True):
                w.copy_(soft_threshold(state[f"theta:{name}"], alpha.to(w.dtype)))


def soft_threshold(weight: Tensor, alpha: Tensor) -> Tensor:
    """``sign(w) * relu(|w| - alpha)``, entry by entry.

    >>> soft_threshold(torch.tensor([-2.0, 0.5, 3.0]), torch.tensor(1.0)).tolist()
    [-1.0, 0.0, 2.0]
    """
    return weight.sign() * (weight.abs() - alpha).clamp_(min=0)
