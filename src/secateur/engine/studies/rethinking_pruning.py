"""What inherited weights are worth: a pruned architecture trained from scratch, against fine-tuning.

Liu, Sun, Zhou, Huang & Darrell, Rethinking the Value of Network Pruning, ICLR 2019, arXiv:1810.05270. A network is
trained, and pruned to an architecture A: smaller by surgery (:func:`secateur.engine.shrinking.shrink`, with
``scope="group"`` for a target that the user sets), or under masks for single weights. Then A is trained from new
weights for the dense schedule's epochs (Scratch-E), or for as many as cost what the dense training did (Scratch-B), and
both are set beside fine-tuning. :func:`arms` adds fine-tuning with Scratch-B's schedule: where the dense network is not
trained to its end, Scratch-B can win by its budget alone. This arm is ours.

Costs are multiply-adds as :class:`secateur.probes.cost.Cost` counts them; FLOPs are twice that, and the ratio is the
same. Under masks they are theoretical: dense kernels spend them all. The authors bound Scratch-B on ImageNet by twice
the epochs (unverified): ``most=2``. New weights of convolutions are He's normal by fan-out, with biases of zero; other
layers draw theirs as they always do. Controls for automatic methods at equal cost come from the library: ``shrink``
with the random criterion and ``scope="group"``, and :func:`secateur.engine.studies.rewind.shuffled` for masks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.core import streams
from secateur.core.errors import ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import unwrap
from secateur.core.task import Task
from secateur.engine.recipe import TrainStep
from secateur.engine.studies.rewind import Way, train_to
from secateur.engine.training_cost import forward
from secateur.nets.common import he_normal
from secateur.surgery.shrink import Shrunk
from secateur.surgery.slicing import sliced

Name = Literal["fine-tune", "scratch-e", "scratch-b", "fine-tune-b", "original-b"]


@dataclass(frozen=True)
class Sizes:
    """Multiply-adds of one example.

    Args:
        dense: of the dense network.
        pruned: of the architecture it was pruned to.
        theoretical: the pruned ones are spent by dense kernels all the same, as under masks.

    Raises:
        UsageError: when the pruned network costs more than the dense one, or nothing.
    """

    dense: int
    pruned: int
    theoretical: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.pruned <= self.dense:
            raise UsageError(
                f"the pruned network costs {self.pruned:,} multiply-adds, the dense one {self.dense:,}; it must cost "
                "something and no more. Hand the networks in the other order, or prune."
            )

    @property
    def ratio(self) -> Fraction:
        """How many times the dense network costs what the pruned one does; at least 1."""
        return Fraction(self.dense, self.pruned)


@dataclass(frozen=True)
class Arm:
    """One way to use the pruned architecture.

    Args:
        name: which.
        net: the network before training.
        way: how it is trained.
        masks: under which.
    """

    name: Name
    net: nn.Module
    way: Way
    masks: Masks


def sizes(dense: Task, pruned: Task, masks: Masks | None = None) -> Sizes:
    """What both networks cost, counted on an example of their data.

    Args:
        dense: the dense network.
        pruned: the smaller one, or again the dense one with ``masks``.
        masks: what is left of single weights; costs are theoretical then.

    Raises:
        UsageError: as :class:`Sizes`.
        SecateurError: as :func:`secateur.engine.training_cost.forward`.

    Cost: a forward pass of one example of each.
    """
    return Sizes(forward(dense).dense, forward(pruned, masks).sparse, masks is not None)


def scratch_b(step: TrainStep, ratio: Fraction, most: float = math.inf) -> TrainStep:
    """The dense schedule stretched to ``floor(epochs ratio)`` epochs, so that it costs what the dense training did.

    Warm-up and the drops of the rate keep their place in it.

    Args:
        step: the dense network's schedule; it is Scratch-E's too.
        ratio: see :attr:`Sizes.ratio`.
        most: at most so many times the epochs.

    Raises:
        UsageError: for a ratio or a bound below 1.
    """
    if ratio < 1 or not most >= 1:
        raise UsageError(f"a ratio of {float(ratio):g} and a bound of {most:g}; both must be at least 1.")
    longer = ratio if most == math.inf else min(ratio, Fraction(most))
    epochs = math.floor(step.epochs * longer)
    return replace(step, epochs=epochs, warmup=step.warmup * epochs / step.epochs)


def spent(macs: int, examples: int, epochs: int) -> int:
    """Multiply-adds of a training: three times the forward pass of every example of every epoch."""
    return 3 * macs * examples * epochs


def scratch(model: nn.Module, seed: int) -> nn.Module:
    """A network of the same architecture with new weights and new statistics; the given one stays as it is.

    Raises:
        ModelError: when weights or statistics belong to a module that cannot draw them anew.
    """
    net = copy.deepcopy(unwrap(model))
    for name, module in net.named_modules():
        own = [*module._parameters.values(), *module._buffers.values()]
        if any(tensor is not None for tensor in own) and not hasattr(module, "reset_parameters"):
            raise ModelError(
                f"`{name or 'the network'}` ({type(module).__name__}) holds tensors and has no `reset_parameters()`, "
                "so it cannot begin anew; give it one, or build the network with the smaller widths."
            )
    before = streams.global_state()
    try:
        streams.seed_global(seed, "scratch")
        for module in net.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
        he_normal(net)
    finally:
        streams.set_global_state(before)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                module.bias.zero_()
    return net


def original(small: nn.Module, initial: nn.Module, shrunk: Sequence[Shrunk]) -> nn.Module:
    """The smaller network with those of the dense network's initial weights that surgery left: a ticket by channels.

    Args:
        small: the network after surgery; it stays as it is.
        initial: the dense network before its training.
        shrunk: the records of the surgery, in their order.

    Raises:
        ModelError: when the initial network is of another architecture than that before the surgery.
    """
    count = sum(p.numel() for p in unwrap(initial).parameters())
    if shrunk and count != shrunk[0].params[0]:
        raise ModelError(
            f"the initial weights do not fit: {count:,} parameters, but the network that was pruned had "
            f"{shrunk[0].params[0]:,}; hand over the initial state of that very network."
        )
    state = {name: t for name, t in unwrap(initial).state_dict().items() if isinstance(t, Tensor)}
    net = copy.deepcopy(unwrap(small))
    try:
        for one in shrunk:
            state = {name: sliced(t, one.kept.get(name, {})) for name, t in state.items()}
        net.load_state_dict(state)
    except (RuntimeError, IndexError) as error:
        raise ModelError(
            "the initial weights do not fit the smaller network; hand over the initial state of the very network that "
            f"was pruned ({str(error).splitlines()[0]})."
        ) from error
    return net


def arms(
    pruned: nn.Module,
    dense: Way | None,
    cost: Sizes,
    tune: TrainStep,
    *,
    seed: int,
    masks: Masks | None = None,
    initial: nn.Module | None = None,
    most: float = math.inf,
) -> dict[Name, Arm]:
    """The arms of the comparison, none of them trained.

    Args:
        pruned: the pruned architecture with the weights it inherited.
        dense: how the dense network was trained; Scratch-E is trained so.
        cost: of both.
        tune: how inherited weights are fine-tuned; short, at a low rate.
        seed: of new weights.
        masks: what is left of single weights; new weights are cut by them too.
        initial: the pruned architecture with the original initial weights (:func:`original`), for another arm with
            Scratch-B's schedule.
        most: see :func:`scratch_b`.

    Raises:
        UsageError: without the dense schedule, or as :func:`scratch_b`.
        ModelError: as :func:`scratch`.
    """
    if dense is None:
        raise UsageError("no schedule of the dense training; training from scratch is measured by it, so hand it over.")
    masks = masks or Masks.dense(pruned, dense.step.only, dense.step.skip)
    new, longer = scratch(pruned, seed), replace(dense, step=scratch_b(dense.step, cost.ratio, most))
    nets: list[tuple[Name, nn.Module, Way]] = [
        ("fine-tune", pruned, replace(dense, step=tune)), ("scratch-e", new, dense), ("scratch-b", new, longer),
        ("fine-tune-b", pruned, longer),
    ]  # fmt: skip
    if initial is not None:
        nets.append(("original-b", initial, longer))
    found: dict[Name, Arm] = {}
    for name, net, way in nets:
        own = copy.deepcopy(unwrap(net))
        masks.apply_(own)
        found[name] = Arm(name, own, way, masks)
    return found


def trained(arm: Arm, folder: Path) -> nn.Module:
    """The arm's network after its training, in evaluation mode; the optimizer begins anew, the arm stays as it is.

    Args:
        arm: one of :func:`arms`.
        folder: of this training; one that was stopped goes on, a finished one is read.

    Raises:
        SecateurError: as :func:`secateur.engine.studies.rewind.train_to`.
    """
    net = copy.deepcopy(arm.net)
    train_to(net, arm.way, folder, None, arm.masks)
    return net
