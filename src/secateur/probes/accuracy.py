"""Accuracy: the share of answers that are right, with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.core.errors import DataError, UsageError
from secateur.core.masks import Masks
from secateur.core.reading import Paper, Reading
from secateur.core.sockets import Probe
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.probes._logits import none_left, rows, wide
from secateur.probes._statistics import Spread, bootstrap, paired_difference, ratio_of_sums, wilson
from secateur.probes._still import check_whole, unchanged


class Answers(NamedTuple):
    """What a network answered, one entry a decision, on the CPU.

    Args:
        right: boolean, (n,).
        labels: the classes asked for, (n,).
        example: number of the example (sequence) each belongs to, (n,).
        tokens: whether the decisions are tokens of sequences.
        loss: mean cross-entropy in nats.
    """

    right: Tensor
    labels: Tensor
    example: Tensor
    tokens: bool
    loss: float


@dataclass(frozen=True)
class Accuracy(Probe):
    """Per cent of answers whose label is among the ``top`` highest logits.

    Logits (N, classes) with labels (N,): one answer an example, ``low..high`` is Wilson's 95 % interval and
    ``stderr = sqrt(p (1 - p) / n)``. Logits (N, T, classes) with labels (N, T): one answer a token, -100 does not
    count, and because the tokens of a sequence are not independent, ``stderr`` and ``low..high`` come from a
    seeded bootstrap over whole sequences (none for a single sequence). Of equal logits the lower class ranks
    first, so a network that answers nothing gets the share of class 0, on every device.

    ``n`` is the number of examples (sequences); parts: per cent right of each class that has examples, under its
    number; the note has the mean cross-entropy. ``masks`` are not needed: pruned weights are zero.

    Args:
        top: how many of the highest logits count as an answer.

    Raises:
        UsageError: when ``top`` is not in ``1..classes``.
        DataError: when the network is no classifier, logits are NaN, labels are out of range, or the data is empty.

    Cost: one forward pass over the data; for tokens 1,000 resamples of the sequences.
    """

    top: int = 1

    paper = Paper(
        "Probable Inference, the Law of Succession, and Statistical Inference",
        "Wilson",
        1927,
        "doi:10.1080/01621459.1927.10502953",
        differs="tokens of sequences get a bootstrap over sequences instead",
    )

    def __post_init__(self) -> None:
        check_whole("top", self.top)

    def __call__(self, task: Task, masks: Masks | None = None) -> Reading:
        """Per cent right, with its interval."""
        found = answers(task, self.top)
        right, n = int(found.right.sum()), found.right.numel()
        examples = len(found.example.unique())
        parts, loss = _by_class(found), f"mean cross-entropy {found.loss:.6g}"
        if found.tokens:
            spread = _over_sequences(found, right / n)
            errors = [100 * x for x in spread] if spread else [None, None, None]
            how = "interval by bootstrap over sequences" if spread else "no interval from a single sequence"
            note = f"{loss}; {n:,} tokens of {examples:,} sequences, not independent: {how}"
            return Reading(100 * right / n, "%", *errors, n=examples, parts=parts, note=note)
        low, high = wilson(right, n)
        stderr = 100 * math.sqrt(right / n * (1 - right / n) / n)
        return Reading(100 * right / n, "%", stderr, 100 * low, 100 * high, n, parts, loss)


def answers(task: Task, top: int = 1) -> Answers:
    """Every answer of a network, in the order of the data; for paired comparisons.

    Raises:
        UsageError: when ``top`` is not in ``1..classes``.
        DataError: as for :class:`Accuracy`.

    Cost: one forward pass over the data.
    """
    check_whole("top", top)
    right, labels, example, losses, tokens = [], [], [], [], False
    with unchanged():
        for batch in rows(task):
            classes = batch.logits.shape[1]
            if top > classes:
                raise UsageError(f"top={top} is more than the {classes} classes; write `top = {classes}` or less.")
            right.append((_rank(batch.logits, batch.labels) < top).cpu())
            surprise = wide(batch.logits).log_softmax(1).gather(1, batch.labels[:, None])
            losses.append(-surprise[:, 0].cpu())
            labels.append(batch.labels.cpu())
            example.append(batch.example.cpu())
            tokens = tokens or batch.tokens
    every = torch.cat(right)
    if not every.numel():
        raise none_left()
    return Answers(every, torch.cat(labels), torch.cat(example), tokens, float(torch.cat(losses).mean()))


def difference(a: Task, b: Task, top: int = 1) -> Reading:
    """Accuracy of ``a`` minus accuracy of ``b`` on the same data, in points, with the interval of a paired test.

    Raises:
        DataError: when the two tasks ask for different labels (other data, or shuffled).

    Cost: one forward pass of each network over the data.
    """
    one, two = answers(a, top), answers(b, top)
    if not torch.equal(one.labels, two.labels):
        raise DataError("the two networks were asked different labels. Use the same data for both, unshuffled.")
    return paired_difference(one.right, two.right, one.example if one.tokens else None)


def _rank(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes rank before the label: higher logits, and equal ones of lower number."""
    own, column = logits.gather(1, labels[:, None]), torch.arange(logits.shape[1], device=logits.device)
    return ((logits > own) | ((logits == own) & (column < labels[:, None]))).sum(1)


def _by_class(found: Answers) -> dict[str, float]:
    asked = torch.bincount(found.labels)
    right = torch.bincount(found.labels[found.right], minlength=len(asked))
    return {str(k): 100 * int(right[k]) / int(asked[k]) for k in range(len(asked)) if asked[k]}


def _over_sequences(found: Answers, value: float) -> Spread | None:
    names, index = found.example.unique(return_inverse=True)
    right = torch.bincount(index, weights=found.right.double(), minlength=len(names))
    estimate = ratio_of_sums(right, torch.bincount(index, minlength=len(names)))
    return bootstrap(estimate, value, len(names), stream(0, "accuracy", "bootstrap"))
