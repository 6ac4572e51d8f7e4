"""Distillation: the pruned network imitates the dense one while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from secateur.core.errors import UsageError
from secateur.core.reading import Paper
from secateur.core.run import Run
from secateur.core.sockets import Rule
from secateur.core.task import Batch, call

_IGNORED = -100
"""The target value that cross-entropy leaves out."""


@dataclass(frozen=True)
class Distill(Rule):
    """Mix the loss with the distance to the softened outputs of the dense network, the teacher.

    The loss becomes ``alpha * loss + (1 - alpha) * T^2 * KL(softmax(t / T) || softmax(s / T))``, the mean over
    examples, and over tokens for sequences ``(N, T, V)``; tokens whose target is -100 (padding) do not count.
    ``T^2`` keeps the size of the gradient about the same for every temperature. The teacher sees the same augmented
    batch as the student, in evaluation mode. Label smoothing in the teacher's own training makes it teach worse.

    Args:
        temperature: ``T > 0``; 1 to 4 for fine-tuning pruned networks, up to 20 for small students.
        alpha: weight of the plain loss, in [0, 1]; 1 is plain training, 0 needs no labels.

    Raises:
        UsageError: for values out of range, without a teacher, or when it has other outputs than the student.

    Cost: one forward pass of the teacher each step, and its weights in memory.
    """

    paper = Paper(
        "Distilling the Knowledge in a Neural Network",
        "Hinton, Vinyals, Dean",
        2015,
        "arXiv:1503.02531",
        differs="the teacher is by default the dense network itself; outputs only, no hidden layers",
    )
    needs = frozenset({"teacher"})

    temperature: float = 4.0
    alpha: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"distill: temperature is {self.temperature!r}; it must be positive, 4.0 is usual.")
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"distill: alpha is {self.alpha!r}; it must be in [0, 1], the weight of the plain loss.")

    def begin(self, run: Run) -> None:
        """Freeze the teacher."""
        if run.teacher is None:
            raise UsageError(
                "distill: there is no teacher. Set `teacher` of the training step to the folder of a trained network."
            )
        if {id(p) for p in run.teacher.parameters()} & {id(p) for p in run.model.parameters()}:
            raise UsageError("distill: teacher and student share weights; pass a deep copy made before pruning.")
        run.teacher.requires_grad_(False).eval()

    def loss(self, run: Run, loss: Tensor, batch: Batch, output: Any) -> Tensor:
        """The mixed loss."""
        if self.alpha == 1 or run.teacher is None:
            return loss
        inputs, target = batch
        half = output.dtype in (torch.bfloat16, torch.float16)
        with torch.no_grad(), torch.autocast(output.device.type, output.dtype if half else None, enabled=half):
            taught = call(run.teacher, inputs)
        if taught.shape != output.shape:
            raise UsageError(
                f"distill: the teacher's outputs have shape {tuple(taught.shape)}, the student's "
                f"{tuple(output.shape)}. Both need the same classes in the same order; set `teacher` to a "
                "network trained on these data."
            )
        soft = self.divergence(output, taught, target)
        return self.alpha * loss + (1 - self.alpha) * soft

    def divergence(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        """``T^2 * KL(softmax(teacher / T) || softmax(student / T))``, the mean over rows, in at least float32.

        Args:
            student: logits ``(N, C)`` or ``(N, T, C)``.
            teacher: logits of the same shape.
            target: class numbers without the last dimension; rows of -100 do not count.
        """
        classes = student.shape[-1]
        rows = student.reshape(-1, classes).to(torch.promote_types(student.dtype, torch.float32))
        taught = teacher.detach().reshape(-1, classes).to(rows.dtype)
        each = functional.kl_div(
            functional.log_softmax(rows / self.temperature, -1),
            functional.log_softmax(taught / self.temperature, -1),
            reduction="none",
            log_target=True,
        ).sum(-1)
        if target is None or target.is_floating_point() or target.shape != student.shape[:-1]:
            return self.temperature**2 * each.mean()
        counts = target.reshape(-1) != _IGNORED
        return self.temperature**2 * torch.where(counts, each, 0).sum() / counts.sum()
