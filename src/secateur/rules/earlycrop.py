"""EarlyCroP: prune once, as soon as the network has come to rest near the place where it will stay."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secateur.core.budget import keep_for
from secateur.core.choose import broadcast, check_not_zero, reduce_scores, scores_of
from secateur.core.errors import BudgetError, ModelError, UsageError
from secateur.core.names import Named, parameters
from secateur.core.patterns import Pattern, Unit, Unstructured
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.run import Run
from secateur.core.sockets import Rule
from secateur.criteria.earlycrop import EarlyCrop
from secateur.rules._channels import best_channels, gate_slopes
from secateur.rules._survivors import best_left


@dataclass(frozen=True)
class Earlycrop(Rule):
    """Train dense for some epochs, prune by what the flow of the gradient loses, and train on.

    After every epoch ``t`` the distance ``d_t = ||w_t - w_0||`` of all parameters from the start is measured. The
    network is pruned after the first epoch with ``|d_t - d_{t-1}| < threshold * d_1``, where ``d_0 = 0``, and at the
    latest after ``latest`` of the run's epochs.

    Single weights go by the criterion ``earlycrop``, ``|w · (Hg)|``, with one threshold for all tensors: sparsities
    ``s - (s - 1/2) / 2^i`` for i = 1, 2, ... as long as they differ by a weight, and then ``s``, scored anew each time;
    up to one half at once. With the pattern ``unit`` whole output channels become zero at once, by the slope along a
    gate on each; ``secateur shrink`` removes them afterwards. Channels that residual sums join go together, those
    of the network's outputs stay, and the count of kept weights is rounded down to whole channels.

    The learning rate should still be high when it prunes: the paper begins a new one-cycle schedule there, and a rate
    that has decayed by then costs accuracy.

    Args:
        sparsity: pruned / prunable weights after it, in (0, 1).
        threshold: change of the distance that counts as rest, as a share of the first epoch's; 0 for the paper's:
            ``1 - sparsity`` for single weights, and ``0.9 - sparsity`` for channels, which above 0.9 is never met.
            At a constant rate a short run may need 0.25 or so.
        latest: share of the epochs after which it prunes whatever the distance, at least one; 0 prunes before the
            first step (the paper's CroP).
        pattern: single weights or ``unit``.
        rounds: most scorings of single weights before the last one.
        examples: training examples to score with.

    Raises:
        BudgetError: for a sparsity out of range, one that the network has already, or one that channels cannot meet.
        UsageError: for other values out of range, another pattern, a run of one epoch, or one without a data sample.
        ModelError: when the weights have not moved in the first epoch, or all scores are zero.

    Cost: a copy of the weights until it prunes; one gradient and one Hessian product over the examples each scoring.
    """

    paper = Paper(
        "Winning the Lottery Ahead of Time: Efficient Early Network Pruning",
        "Rachwan, Zügner, Charpentier, Geisler, Ayle, Günnemann",
        2022,
        "arXiv:2206.10451",
        differs="distances are from the weights before the first step, in the authors' code from those after the first "
        "epoch; the schedule of the learning rate goes on; rounds that would remove less than one weight are left out; "
        "channels become zeros and are removed in a step of its own; every tensor keeps a weight",
    )

    sparsity: float = 0.9
    threshold: float = 0.0
    latest: float = 0.3
    pattern: Pattern = field(default_factory=Unstructured)
    rounds: int = 100
    examples: int = 1280

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise BudgetError(f"earlycrop: sparsity is {self.sparsity!r}; it must be in (0, 1), 0.9 means 90 % zeros.")
        if not 0 <= self.threshold < float("inf"):
            raise UsageError(f"earlycrop: threshold is {self.threshold!r}; it must be at least 0, 0 for the paper's.")
        if not 0 <= self.latest < 1:
            raise UsageError(f"earlycrop: latest is {self.latest!r}; it is a share of the run in [0, 1), such as 0.3.")
        if not isinstance(self.pattern, Unstructured | Unit):
            raise UsageError(f"earlycrop: the pattern is {self.pattern}; it must be `unstructured` or `unit`.")
        if self.rounds < 0 or self.examples < 1:
            raise UsageError(
                f"earlycrop: rounds is {self.rounds!r} and examples {self.examples!r}; they must be at least 0 and 1."
            )

    @property
    def rest(self) -> float:
        """The threshold in use."""
        return self.threshold or (min(0.9 - self.sparsity, 0.99) if self._whole else 1 - self.sparsity)

    @property
    def _whole(self) -> bool:
        return isinstance(self.pattern, Unit)

    def begin(self, run: Run) -> None:
        """Check the target, and remember where the weights begin; or prune at once."""
        state, own = run.state(self), parameters(run.model)
        if run.resumed:
            state.update({key: v.to(own[key[6:]].device) for key, v in state.items() if isinstance(v, Tensor)})
            return
        run.task(self.examples)
        masks, keep = run.masks, keep_for(self.sparsity, run.masks.total)
        if keep > masks.kept or (self._whole and masks.kept < masks.total):
            raise BudgetError(
                f"earlycrop: {masks.sparsity:.4g} of the network is pruned already. "
                + ("Begin from a dense network." if self._whole else "Set a higher `sparsity`.")
            )
        if not self._whole:
            best_left(masks, {name: w.detach().abs() for name, w in run.weights().items()}, keep)
        if self.latest == 0:
            self._prune(run)
        elif run.total < 2 * run.steps_per_epoch:
            raise UsageError("earlycrop: it prunes after an epoch, so train for 2 or more, or set `latest = 0`.")
        else:
            state.update({f"start:{name}": p.detach().clone() for name, p in own.items()})
            state["last"] = 0.0

    def after_step(self, run: Run) -> None:
        """After an epoch: measure the distance, and prune when it has come to rest."""
        state = run.state(self)
        if "last" not in state or run.step % run.steps_per_epoch:
            return
        epoch = run.step // run.steps_per_epoch
        distance = _distance(parameters(run.model), state)
        if distance == 0 and epoch == 1:
            raise ModelError("earlycrop: no weight has moved in the first epoch. Check `lr` and the loss.")
        change = abs(distance - state["last"])
        first = state.setdefault("first", distance)
        state["last"] = distance
        run.note("earlycrop/change", change / first)
        if change < self.rest * first or epoch >= int(self.latest * (run.total // run.steps_per_epoch)):
            state.clear()
            self._prune(run)

    def _prune(self, run: Run) -> None:
        check_finite(run.weights())
        task, keep = run.task(self.examples), keep_for(self.sparsity, run.masks.total)
        if self._whole:
            slopes = reduce_scores(gate_slopes(task, run.masks), self.examples)
            check_not_zero(slopes)
            run.masks = broadcast(best_channels(task, slopes, keep))
            return
        for few in [*self.counts(run.masks.total), keep]:
            if few < run.masks.kept:
                scores = reduce_scores(scores_of(EarlyCrop(), task, run.masks), self.examples)
                check_not_zero(scores)
                run.masks = broadcast(best_left(run.masks, scores, few))

    def counts(self, total: int) -> list[int]:
        """Weights kept after each round before the last, of ``total`` prunable ones.

        >>> Earlycrop(sparsity=0.9).counts(100)
        [30, 20, 15, 13, 12]
        """
        way, found = self.sparsity - 0.5, []
        while len(found) < self.rounds and way * 0.5 ** (len(found) + 1) * total >= 1:
            found.append(keep_for(self.sparsity - way * 0.5 ** (len(found) + 1), total))
        return found


@torch.no_grad()
def _distance(own: dict[str, Any], start: Named) -> float:
    """Euclidean distance from the start over all parameters; sums in float64."""
    parts = [(p.detach().double() - start[f"start:{name}"].double()).square().sum() for name, p in own.items()]
    return float(torch.stack([part.to(parts[0].device) for part in parts]).sum().sqrt())
