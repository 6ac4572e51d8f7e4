"""Activate-while-Pruning: some negative weights go beside the smallest ones, so that more units stay awake."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from secateur.core.budget import keep_for
from secateur.core.choose import broadcast, reduce_scores, scores_of
from secateur.core.errors import BudgetError, UsageError
from secateur.core.losses import CrossEntropy
from secateur.core.names import parameters, unwrap
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.run import Run
from secateur.core.sockets import Criterion, Rule
from secateur.core.task import Task
from secateur.criteria.magnitude import Magnitude
from secateur.rules._activation import awaken, dead_rate
from secateur.rules._survivors import best_left


@dataclass(frozen=True)
class ActivatingWhilePruning(Rule):
    """Prune in cycles of training, pruning and rewinding; each cycle also removes negative weights that hardly moved.

    A cycle ends with ``rate`` of the weights that are left removed: ``rate - extra`` by the criterion, with one
    threshold for all tensors, and then, among the *negative* ones that are left, those with the smallest
    ``|w - w_begin|`` over the cycle. Where inputs are not negative, a unit without a negative weight fires on all
    examples on which it fired before, and on more. Then all parameters and buffers go back to their first values, the
    optimizer's state is cleared, and the next cycle begins. All cycles, and the training after the last, are equally
    long; the last removes what is missing to ``sparsity``.

    Inputs that are normalised, or BatchNorm before ReLU, void the argument; the rule works there, but promises
    nothing. Metrics: after each cycle ``dead`` is the share of outputs of ``nn.ReLU`` modules (each channel and
    position) that were 0 on all examples, and ``dead/static`` that share after the pruning and rewinding, before any
    training. ReLU as a function is not seen; the probe ``dead_units`` sees it.

    Args:
        sparsity: pruned / prunable weights at the end, in [0, 1).
        rate: share of the weights left that each cycle removes, in (0, 1).
        extra: the part of ``rate`` that takes negative weights, in [0, rate); 0 is the criterion alone.
        criterion: which of the other weights go.
        after: cycles in which the criterion works alone before ``extra`` sets in.
        rewind: go back to the first values; without it every cycle goes on from the last.
        anneal: in every cycle the learning rate falls from the run's ``lr`` to 0 along half a cosine, for each is a
            training of its own. Without it the run's own schedule spans all cycles.
        examples: training examples for criteria that need data and for the count of dead units.

    Raises:
        BudgetError: for a sparsity out of range, one that the network has already, or one that would empty layers.
        UsageError: for other values out of range, or a run with fewer steps than cycles.
        ModelError: when there are too few negative weights in a cycle.

    Cost: one copy of parameters and buffers; for each cycle two selections over the weights and two forward passes
    over the examples.
    """

    paper = Paper(
        "AP: Selective Activation for De-sparsifying Pruned Neural Networks",
        "Liu, Ghosh, Tan, Motani",
        2023,
        "arXiv:2212.06145",
        differs="the score is that of the authors' code, which removes one weight more than its share and counts "
        "biases and BatchNorm scales among the weights; dead units at the beginning of a cycle are called static, all "
        "at its end dead, a split that the paper may draw otherwise; every cycle's rate falls along a cosine",
    )

    sparsity: float = 0.9
    rate: float = 0.2
    extra: float = 0.02
    criterion: Criterion = field(default_factory=Magnitude)
    after: int = 0
    rewind: bool = True
    anneal: bool = True
    examples: int = 512

    def __post_init__(self) -> None:
        name = "activating_while_pruning"
        if not 0 <= self.sparsity < 1:
            raise BudgetError(f"{name}: sparsity is {self.sparsity!r}; it must be in [0, 1), 0.9 means 90 % zeros.")
        if not 0 < self.rate < 1 or not 0 <= self.extra < self.rate:
            raise UsageError(
                f"{name}: rate is {self.rate!r} and extra {self.extra!r}; they are shares with 0 <= extra < rate < 1, "
                "for example `rate = 0.2`, `extra = 0.02`."
            )
        if self.after < 0 or self.examples < 1:
            raise UsageError(f"{name}: after is {self.after!r} and examples {self.examples!r}; at least 0 and 1.")

    def levels(self, kept: int, total: int) -> list[int]:
        """Weights kept before the first cycle's pruning, after it, and so on to the last.

        >>> ActivatingWhilePruning(sparsity=0.5).levels(100, 100)
        [100, 80, 64, 52, 50]
        """
        last, found = keep_for(self.sparsity, total), [kept]
        while found[-1] > last:
            found.append(max(last, min(found[-1] - 1, keep_for(self.rate, found[-1]))))
        return found

    def begin(self, run: Run) -> None:
        """Check that the target and the cycles fit, and remember the first values."""
        state, own = run.state(self), _tensors(run)
        if run.resumed:
            state.update({key: v.to(own[key[6:]].device) for key, v in state.items() if isinstance(v, Tensor)})
            return
        masks, last = run.masks, keep_for(self.sparsity, run.masks.total)
        if last > masks.kept:
            found = f"{masks.sparsity:.4g} of the network is pruned already"
            raise BudgetError(f"activating_while_pruning: {found}. Set a higher `sparsity`.")
        cycles = len(self.levels(masks.kept, masks.total)) - 1
        if run.total <= cycles:
            raise UsageError(
                f"activating_while_pruning: {cycles} cycles and the training after them do not fit into {run.total} "
                "steps. Train longer, or set a higher `rate`."
            )
        best_left(masks, {name: w.detach().abs() for name, w in run.weights().items()}, last)
        if "data-free" not in self.criterion.needs:
            run.task(self.examples)
        state["kept"] = masks.kept
        state.update({f"start:{name}": t.detach().clone() for name, t in own.items()})

    def before_step(self, run: Run) -> None:
        """Set the rate of the cycle."""
        if self.anneal:
            first, last = next((a, b) for a, b in pairwise(self._edges(run)) if a <= run.step < b)
            share = (1 + math.cos(math.pi * (run.step - first) / (last - first))) / 2
            for group in run.optimizer.param_groups:
                group["lr"] = run.optimizer.defaults["lr"] * share

    def after_step(self, run: Run) -> None:
        """At the end of a cycle: prune, awaken and rewind."""
        edges = self._edges(run)
        if run.step in edges[1:-1]:
            self._measure(run, "dead")
            self._prune(run, edges.index(run.step))
            self._rewind(run)
            self._measure(run, "dead/static")

    def end(self, run: Run) -> None:
        """Forget the first values."""
        run.state(self).clear()

    def _edges(self, run: Run) -> list[int]:
        """The steps between which cycles lie, the first and the last step included."""
        parts = len(self.levels(run.state(self)["kept"], run.masks.total))
        return [number * run.total // parts for number in range(parts + 1)]

    def _prune(self, run: Run, number: int) -> None:
        before, after = self.levels(run.state(self)["kept"], run.masks.total)[number - 1 : number + 1]
        weights, state = {name: w.detach() for name, w in run.weights().items()}, run.state(self)
        check_finite(weights)
        full = before - min(before - 1, keep_for(self.rate, before))  # the last cycle takes less, in proportion
        count = (before - keep_for(self.extra, before)) * (before - after) // full if number > self.after else 0
        free = "data-free" in self.criterion.needs
        task = Task(run.model, CrossEntropy(), ()) if free else run.task(self.examples)
        scores = reduce_scores(scores_of(self.criterion, task, run.masks), self.examples)
        masks = best_left(run.masks, scores, after + count)
        run.masks = broadcast(awaken(masks, weights, {n: state[f"start:{n}"] for n in weights}, after))

    @torch.no_grad()
    def _rewind(self, run: Run) -> None:
        state = run.state(self)
        for name, tensor in _tensors(run).items():
            if self.rewind:
                tensor.copy_(state[f"start:{name}"])
            else:
                state[f"start:{name}"].copy_(tensor)
        if self.rewind:
            run.hold.mask_weights_()
            run.optimizer.state.clear()

    def _measure(self, run: Run, name: str) -> None:
        rate = None if run.sample is None else dead_rate(run.task(self.examples))
        if rate is not None:
            run.note(name, rate)


def _tensors(run: Run) -> dict[str, Tensor]:
    """Parameters and buffers, by name."""
    return {**parameters(run.model), **dict(unwrap(run.model).named_buffers())}
