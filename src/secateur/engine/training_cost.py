"""What training costs in multiply-adds (MACs): dense, with fixed zeros, with SET, with RigL; whole numbers.

The convention is the one of the RigL paper (arXiv:1911.11134, appendix): the backward pass costs twice the forward
pass, once for the gradient of activations and once for that of weights, and either leaves out what pruned weights would
cost. Where the dense gradient is asked for, the part for weights costs as much as the dense forward pass. This is
arithmetic: torch computes with dense tensors, so no time is saved here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.sockets import Rule, name_of
from secateur.core.task import Task
from secateur.engine.recipe import TrainStep
from secateur.probes.cost import Cost
from secateur.rules.distill import Distill
from secateur.rules.rigl import Rigl
from secateur.rules.set import Set
from secateur.rules.slimming import Slimming


@dataclass(frozen=True)
class Forward:
    """MACs of the forward pass of one example: what inference costs.

    Args:
        dense: with all weights.
        sparse: without the pruned ones.
    """

    dense: int
    sparse: int

    @property
    def dense_step(self) -> int:
        """Training on one example without zeros: ``3 dense``."""
        return 3 * self.dense

    @property
    def sparse_step(self) -> int:
        """Training on one example with zeros that stand still, and with SET: ``3 sparse``."""
        return 3 * self.sparse

    @property
    def update_step(self) -> int:
        """One example of a step that asks for the dense gradient, as RigL's updates do: ``2 sparse + dense``."""
        return 2 * self.sparse + self.dense

    def rigl_step(self, every: int) -> Fraction:
        """RigL's mean step on one example as the paper counts it: one update after each ``every`` other steps.

        Raises:
            UsageError: for an interval below 1.
        """
        if every < 1:
            raise UsageError(f"the interval between updates is {every!r}; it must be at least 1 step.")
        return Fraction(self.sparse_step * every + self.update_step, every + 1)


@dataclass(frozen=True)
class TrainingMacs:
    """MACs of a whole training run.

    Args:
        dense: of the same run without zeros.
        sparse: of the run.
        examples: examples it trained on, those of each epoch anew.
    """

    dense: int
    sparse: int
    examples: int

    @property
    def share(self) -> Fraction:
        """Of the dense run's MACs."""
        return Fraction(self.sparse, self.dense) if self.dense else Fraction(1)

    def __add__(self, other: TrainingMacs) -> TrainingMacs:
        """One run after the other."""
        return TrainingMacs(self.dense + other.dense, self.sparse + other.sparse, self.examples + other.examples)


def forward(task: Task, masks: Masks | None = None) -> Forward:
    """MACs of one example of the task's data, counted as :class:`secateur.probes.cost.Cost` does.

    Raises:
        MaskError: when ``masks`` belong to another network.
        DataError: when the data is empty or spent.

    Cost: one forward pass of one example.
    """
    parts = Cost()(task, masks).parts
    return Forward(int(parts["macs_dense"]), int(parts["macs_effective"]))


def step_sizes(examples: int, batch: int, accumulate: int = 1) -> list[int]:
    """Examples in each optimizer step of one epoch.

    >>> step_sizes(10, 3), step_sizes(10, 3, 2)
    ([3, 3, 3, 1], [6, 4])

    Raises:
        UsageError: for numbers below 1.
    """
    if min(examples, batch, accumulate) < 1:
        raise UsageError(f"{examples} examples in batches of {batch}, {accumulate} a step: all must be at least 1.")
    each = batch * accumulate
    return [min(each, examples - begin) for begin in range(0, examples, each)]


def moving(rules: Sequence[Rule]) -> list[str]:
    """Names of the rules under which the counts of tensors may change, so that costs must be added up step by step."""
    return [name_of(rule) for rule in rules if not isinstance(rule, Set | Rigl | Distill | Slimming)]


def of_run(
    cost: Forward, sizes: Sequence[int], epochs: int, rules: Sequence[Rule] = (), teacher: int = 0
) -> TrainingMacs:
    """What a run costs whose tensors keep their counts: no rule, SET or RigL, and rules that move no zeros.

    Args:
        cost: of one example, with the run's masks (SET and RigL move zeros within tensors, so any of its masks do).
        sizes: examples in each optimizer step of an epoch, see :func:`step_sizes`.
        epochs: how often they are gone through.
        rules: the run's rules.
        teacher: MACs of the teacher's forward pass of one example, where there is one (distillation).

    Raises:
        UsageError: for a rule under which counts change; see :func:`of_phases`.
    """
    total = len(sizes) * epochs
    odd = moving(rules)
    if odd:
        raise UsageError(
            f"the cost of training with {', '.join(odd)} depends on how its masks changed; add up the phases with "
            "`of_phases`."
        )
    seeking = [rule for rule in rules if isinstance(rule, Rigl) and rule.grow == "gradient"]
    updates = sum(sizes[step % len(sizes)] for step in range(total) if any(r.due(step, total) for r in seeking))
    examples = sum(sizes) * epochs
    sparse = cost.sparse_step * (examples - updates) + cost.update_step * updates
    taught = teacher * examples
    return TrainingMacs(cost.dense_step * examples + taught, sparse + taught, examples)


def of_step(
    step: TrainStep, one: Task, masks: Masks, sizes: Sequence[int], teacher: nn.Module | None = None
) -> dict[str, Any]:
    """What a card tells of the cost of a train step, as plain values.

    Args:
        step: the step.
        one: the trained network with a batch of one example.
        masks: of the trained network.
        sizes: examples in each optimizer step of an epoch, see :func:`step_sizes`.
        teacher: of distillation.

    Returns:
        The fields of :class:`TrainingMacs`; or ``uncounted``, the rules under which counts change; or ``why``, for a
        network that does not take one example by itself, such as one captured for one size of batch.

    Cost: two forward passes of one example, and one of the teacher.
    """
    if changing := moving(step.rules):
        return {"uncounted": changing}
    try:
        for _ in one.outputs():
            pass
    except Exception as error:  # somebody else's network may raise anything; it is trained all the same
        return {"why": f"a batch of one example fails: {type(error).__name__}"}
    taught = 0 if teacher is None else forward(Task(teacher, one.loss, one.data)).dense
    return asdict(of_run(forward(one, masks), sizes, step.epochs, step.rules, taught))


def of_phases(task: Task, phases: Iterable[tuple[Masks, int]]) -> TrainingMacs:
    """What a run costs whose masks change: ``3 sparse`` for each example, with the masks it was trained with.

    Args:
        task: the network and its data.
        phases: masks, and how many examples were trained on with them.

    Raises:
        MaskError: when masks belong to another network.
        UsageError: for a number of examples below 0.

    Cost: one forward pass of one example for each phase.
    """
    whole = TrainingMacs(0, 0, 0)
    for masks, examples in phases:
        if examples < 0:
            raise UsageError(f"a phase has {examples} examples; it must be at least 0.")
        cost = forward(task, masks)
        whole += TrainingMacs(cost.dense_step * examples, cost.sparse_step * examples, examples)
    return whole
