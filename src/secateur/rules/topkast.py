"""Top-KAST: compute with few weights, learn a few more, and let them compete."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secateur.core.allocations import Allocation, ByCost, Uniform
from secateur.core.budget import keep_for
from secateur.core.choose import keep_counts
from secateur.core.errors import BudgetError, UsageError
from secateur.core.masks import Masks
from secateur.core.patterns import Unstructured
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.run import Run
from secateur.core.select import top_mask
from secateur.core.sockets import Rule


@dataclass(frozen=True)
class Topkast(Rule):
    """Sparse from the first step: the network computes with the set A, and the larger set B learns.

    Behind every weight tensor stands a dense one, ``theta``. A holds its entries of the largest magnitude, a share
    of ``1 - sparsity``; B, which contains A, a share of ``1 - backward``. The network computes with ``theta`` on A and
    zero elsewhere; the gradient by those values moves ``theta`` on B. Outside B ``theta`` stands still to the bit,
    without momentum and weight decay, and the optimizer's state there is zero.

    Between steps the network itself holds the sparse weights, so evaluation, averages and files are those of the
    sparse network; ``run.masks`` become A at the end. The network begins dense (masks it came with are lifted).

    Args:
        sparsity: share of weights outside A, in [0, 1).
        backward: share of weights outside B, in [0, sparsity]; 0 lets all weights learn. 0.5 to 0.8 are usual.
        every: steps between two choices of A and B; 1 as in the paper. A choice costs about two sorts of the weights.
        penalty: weight of ``sum over A |theta|^p + sum over B without A |theta|^p / density``, with density
            ``1 - sparsity``: newcomers pay more. Small numbers only: 1e-4 is too much at 98 % with ``p = 1``.
        power: ``p`` of the penalty, 1 or 2.
        allocation: how the budgets of A and B are shared out over tensors.

    Raises:
        BudgetError: for sparsities out of range.
        UsageError: for other values out of range.

    Cost: each step a few passes over the prunable weights, and two selections among them when A and B are chosen;
    memory of one more copy of the weights and two masks. Gradients are computed dense, so no time is saved.
    """

    paper = Paper(
        "Top-KAST: Top-K Always Sparse Training",
        "Jayakumar, Pascanu, Rae, Osindero, Elsen",
        2020,
        "arXiv:2106.03517",
        differs="the gradient is computed dense and then cut down to B, which gives the same weights but saves no "
        "memory; A and B are chosen every 10 steps and there is no penalty by default; state of the optimizer is "
        "cleared outside B",
    )

    sparsity: float = 0.9
    backward: float = 0.5
    every: int = 10
    penalty: float = 0.0
    power: int = 2
    allocation: Allocation = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise BudgetError(f"topkast: sparsity is {self.sparsity!r}; it must be in [0, 1), 0.9 means 90 % zeros.")
        if not 0 <= self.backward <= self.sparsity:
            raise BudgetError(
                f"topkast: backward is {self.backward!r}; it must be in [0, {self.sparsity:g}], so that all weights "
                "the network computes with learn."
            )
        if self.every < 1:
            raise UsageError(f"topkast: every is {self.every!r}; it must be at least 1 step.")
        if not 0 <= self.penalty < float("inf"):
            raise UsageError(f"topkast: penalty is {self.penalty!r}; it must be at least 0, for example 1e-5.")
        if self.power not in (1, 2):
            raise UsageError(f"topkast: power is {self.power!r}; it must be 1 or 2.")
        if isinstance(self.allocation, ByCost):
            raise UsageError("topkast: allocation by-cost needs MACs, which a rule does not know; use `erk`.")

    def begin(self, run: Run) -> None:
        """Choose the first A and B, and leave only A in the network."""
        state = run.state(self)
        weights = run.weights()
        if run.resumed:
            state.update({key: value.to(weights[key.partition(":")[2]].device) for key, value in state.items()})
            return
        if run.masks.kept < run.masks.total:
            run.masks = Masks({name: torch.ones_like(mask) for name, mask in run.masks.items()})
        for name, w in weights.items():
            state[f"theta:{name}"] = w.detach().clone()
        self._choose(run, state)
        _show(run, state)

    @torch.no_grad()
    def before_step(self, run: Run) -> None:
        """Put ``theta`` into the network, and cut the gradient down to B."""
        state = run.state(self)
        for name, w in run.weights().items():
            w.copy_(state[f"theta:{name}"])
            if w.grad is None:
                continue
            w.grad.mul_(state[f"B:{name}"])
            if self.penalty:
                w.grad.add_(self._pull(w.detach(), state[f"A:{name}"], state[f"B:{name}"]), alpha=self.penalty)

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Undo whatever moved outside B, choose again when it is time, and leave only A in the network."""
        state = run.state(self)
        for name, w in run.weights().items():
            theta, learns = state[f"theta:{name}"], state[f"B:{name}"]
            theta.copy_(torch.where(learns, w, theta))
        if run.step % self.every == 0:
            self._choose(run, state)
        for name, w in run.weights().items():
            _clear(run, w, ~state[f"B:{name}"])
        _show(run, state)

    def end(self, run: Run) -> None:
        """A becomes the masks of the network."""
        state = run.state(self)
        run.masks = Masks({name: state[f"A:{name}"] for name in run.masks})
        state.clear()

    def _choose(self, run: Run, state: dict[str, Any]) -> None:
        scores = {name: state[f"theta:{name}"].abs() for name in run.masks}
        check_finite({name: state[f"theta:{name}"] for name in run.masks})
        total = run.masks.total
        few = keep_counts(scores, keep_for(self.sparsity, total), Unstructured(), self.allocation)
        more = keep_counts(scores, keep_for(self.backward, total), Unstructured(), self.allocation)
        for name, score in scores.items():
            state[f"A:{name}"] = top_mask(score, few[name])
            # Rounding shares of two budgets may give B one weight less than A in some tensor
            state[f"B:{name}"] = top_mask(score, max(few[name], more[name]))

    def _pull(self, theta: Tensor, used: Tensor, learns: Tensor) -> Tensor:
        """The gradient of the penalty."""
        slope = theta.sign() if self.power == 1 else 2 * theta
        return torch.where(used, slope, slope / (1 - self.sparsity)) * learns


@torch.no_grad()
def _show(run: Run, state: dict[str, Any]) -> None:
    for name, w in run.weights().items():
        w.copy_(state[f"theta:{name}"].masked_fill(~state[f"A:{name}"], 0))


def _clear(run: Run, w: Tensor, where: Tensor) -> None:
    """Zero the optimizer's state there: whatever has the parameter's own shape."""
    for value in run.optimizer.state.get(w, {}).values():
        if isinstance(value, Tensor) and value.shape == w.shape and value.dim():
            value.masked_fill_(where, 0)
