"""Run: what a rule sees of a training run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.core.errors import ModelError, UsageError
from secateur.core.hold import Hold
from secateur.core.masks import Masks
from secateur.core.names import Named, parameters
from secateur.core.task import Task


@dataclass
class Run:
    """The state of a training run, as rules see and change it.

    Args:
        model: the network in training.
        optimizer: its optimizer.
        hold: keeps the zeros; its masks are ``run.masks``.
        total: optimizer steps in the whole run.
        steps_per_epoch: optimizer steps in one epoch.
        seed: for streams of random numbers.
        sample: gives a :class:`Task` on a fixed sample of the training data (no augmentation).
        teacher: the network as it was before the run began (a frozen copy), when a rule asks for it.
    """

    model: nn.Module
    optimizer: Optimizer
    hold: Hold
    total: int
    steps_per_epoch: int
    seed: int = 0
    sample: Callable[[int], Task] | None = None
    teacher: nn.Module | None = None
    step: int = 0
    resumed: bool = False
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)
    rules: tuple[Any, ...] = ()

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        return self.step / self.total if self.total else 1.0

    @property
    def masks(self) -> Masks:
        """Which weights are kept; setting it zeroes the others and clears their optimizer state."""
        return self.hold.masks

    @masks.setter
    def masks(self, new: Masks) -> None:
        self.hold.swap(new)

    def state(self, rule: Any) -> dict[str, Any]:
        """What a rule remembers: tensors, numbers and strings, kept in checkpoints."""
        place = next((i for i, other in enumerate(self.rules) if other is rule), 0)
        return self.states.setdefault(f"{place}:{type(rule).__name__}", {})

    def weights(self) -> Named:
        """The parameters that masks cover, by plain name (those behind a parametrization too)."""
        every = parameters(self.model)
        return {name: every[name] for name in self.masks}

    def dense_gradient(self, name: str) -> Tensor:
        """The gradient of a tensor, pruned entries included; valid in ``before_step``.

        Raises:
            ModelError: when the tensor has no gradient.
        """
        gradient = parameters(self.model)[name].grad
        if gradient is None:
            raise ModelError(f"`{name}` has no gradient in this step; the loss does not depend on it.")
        return gradient

    def task(self, examples: int = 512) -> Task:
        """A fixed sample of the training data with the network and its loss, for criteria.

        Raises:
            UsageError: when the loop offers no sample.
        """
        if self.sample is None:
            raise UsageError("this training loop gives rules no data sample; use a data-free criterion.")
        return self.sample(examples)

    def note(self, name: str, value: float) -> None:
        """Add a figure to the metrics of this step."""
        self.notes[name] = float(value)
