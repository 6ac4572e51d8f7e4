"""A classifier's answers: logits and labels, checked, one row a decision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.core.errors import DataError
from secateur.core.task import Task

IGNORED = -100
"""Target value of tokens that do not count."""


class Rows(NamedTuple):
    """Decisions of one batch.

    Args:
        logits: (rows, classes), without NaN and +infinity.
        labels: (rows,) int64 in ``0..classes-1``.
        example: (rows,) number of the example (sequence) each row belongs to, over all batches.
        tokens: whether there is a row a token, rather than one an example.
    """

    logits: Tensor
    labels: Tensor
    example: Tensor
    tokens: bool


def rows(task: Task) -> Iterator[Rows]:
    """Decisions batch by batch, in evaluation mode. Cost: one forward pass over the data.

    Raises:
        DataError: when the network is no classifier, a logit is NaN, or a label is out of range.
    """
    seen = 0
    for output, target, n in task.outputs():
        logits, labels, example = flat(output, target)
        kept = labels != IGNORED
        if not bool(kept.all()):
            logits, labels, example = logits[kept], labels[kept], example[kept]
        check(logits, labels)
        yield Rows(logits, labels, example + seen, output.dim() == 3)
        seen += n


def wide(logits: Tensor) -> Tensor:
    """Logits in float64 (float32 where the device has no float64)."""
    return logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)


def check(logits: Tensor, labels: Tensor) -> None:
    """Refuse logits and labels that no probability can be computed from.

    Raises:
        DataError: naming how many values are wrong, and the cure.
    """
    bad = int((logits.isnan() | (logits == torch.inf)).sum())
    if bad:
        raise DataError(
            f"{bad:,} of {logits.numel():,} logits are NaN or +infinity: the weights or the inputs hold NaN, or half "
            "precision overflows. Start from an earlier checkpoint, or measure in float32 (`model.float()`)."
        )
    wrong = (labels < 0) | (labels >= logits.shape[1])
    if bool(wrong.any()):
        raise DataError(
            f"{int(wrong.sum()):,} labels are not in 0..{logits.shape[1] - 1}, for example {int(labels[wrong][0])}: "
            f"the network has {logits.shape[1]} outputs. Number the classes from 0, or build it with more outputs."
        )


def flat(output: Any, target: Any) -> tuple[Tensor, Tensor, Tensor]:
    """One row a decision, its label and the number of its example in the batch.

    Raises:
        DataError: when these are no logits and labels of a classifier.
    """
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        raise DataError(
            f"a classifier gives one tensor of logits for a tensor of labels; this network gives "
            f"{type(output).__name__} for {type(target).__name__}. Wrap the network so that it returns its logits."
        )
    fits = output.dim() in (2, 3) and output.shape[:-1] == target.shape and output.is_floating_point()
    if not fits or target.is_floating_point() or target.is_complex():
        raise DataError(
            f"the output has shape {tuple(output.shape)} and type {output.dtype}, the target {tuple(target.shape)} and "
            f"{target.dtype}; a classifier needs logits (N, classes) with whole-number labels (N,), or "
            "(N, T, classes) with (N, T). Measure other networks by their loss."
        )
    example = torch.arange(output.shape[0], device=output.device)
    if output.dim() == 3:
        example = example.repeat_interleave(output.shape[1])
    return output.reshape(-1, output.shape[-1]), target.reshape(-1).long(), example


def none_left() -> DataError:
    """The error when every label is the one that does not count."""
    return DataError(f"no label counts: every target is {IGNORED}. Pass data with labels.")
