"""What a Gaussian for each weight predicts, and how sure it is."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.core.errors import DataError, UsageError
from secateur.core.names import Named
from secateur.core.streams import stream
from secateur.core.task import Task, call, frozen


class Prediction(NamedTuple):
    """Of ``N`` examples and ``C`` classes, in float64.

    Args:
        probabilities: ``(N, C)``, the mean over draws.
        entropy: ``(N,)``, of these, in nats.
        information: ``(N,)``, their entropy less the mean entropy of the draws, in nats: what the draws disagree about.
        target: ``(N,)``, the labels.
    """

    probabilities: Tensor
    entropy: Tensor
    information: Tensor
    target: Tensor


@torch.no_grad()
def predictive(task: Task, deviations: Named, samples: int = 200, seed: int = 0) -> Prediction:
    """The mean prediction over draws ``w + deviation * noise`` of the weights, in evaluation mode.

    Args:
        task: a classifier (logits ``(N, C)``) whose weights are the means, and the data.
        deviations: by parameter name, in its shape; other parameters stand still. 0 for pruned weights.
        samples: draws, the same for all batches.
        seed: of the draws.

    Raises:
        UsageError: for fewer than two draws, which cannot disagree, or a tensor that the network lacks.
        DataError: when the network is no classifier, or the data is empty or spent.

    Cost: a forward pass over the data for each draw; memory of one more network.
    """
    if samples < 2:
        raise UsageError(f"samples is {samples!r}; it takes 2 draws or more to tell what they disagree about.")
    own = task.params()
    odd = sorted(set(deviations) - set(own))
    if odd:
        raise UsageError(f"there are deviations for `{odd[0]}`, which is no parameter of the network.")
    mean: list[Tensor] = []
    entropy: list[Tensor] = []
    for number in range(samples):
        random = {p.device: stream(seed, "predictive", number, device=p.device) for p in own.values()}
        at = {}
        for name, deviation in deviations.items():
            noise = torch.randn(own[name].shape, generator=random[own[name].device], device=own[name].device)
            at[name] = (own[name].detach() + deviation * noise).to(own[name].dtype)
        with frozen(task.model):
            found = [_rows(call(task.model, inputs, at)) for inputs, _, _ in task.batches()]
        mean = [p + q for p, q in zip(mean, found, strict=True)] if mean else found
        spread = [_entropy(p) for p in found]
        entropy = [a + b for a, b in zip(entropy, spread, strict=True)] if entropy else spread
    p = torch.cat(mean) / samples
    total = _entropy(p)
    target = torch.cat([target.reshape(-1) for _, target, _ in task.batches()])
    return Prediction(p, total, total - torch.cat(entropy) / samples, target)


def uncertainty_error(prediction: Prediction, bins: int = 10) -> float:
    """Expected uncertainty calibration error: ``sum_b n_b / N · |error_b - mean uncertainty_b|``, a share.

    Uncertainty is the entropy over ``log C``; errors are rescaled by ``C / (C - 1)``, so that guessing gives 1. Bins
    are of equal width.

    Raises:
        UsageError: for fewer than one bin.
        DataError: for a single class, or labels out of range.

    Cost: O(N · C).
    """
    p, target = prediction.probabilities, prediction.target
    classes = p.shape[1]
    if bins < 1:
        raise UsageError(f"bins is {bins!r}; it must be at least 1.")
    if classes < 2 or bool(((target < 0) | (target >= classes)).any()):
        raise DataError(f"labels must be in 0..{classes - 1}, of two classes or more.")
    unsure = prediction.entropy / math.log(classes)
    wrong = (p.argmax(1) != target).double() * classes / (classes - 1)
    place = (unsure * bins).long().clamp(0, bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64, device=p.device).index_add_(0, place, wrong - unsure)
    return float(gaps.abs().sum() / len(p))


def _rows(logits: Tensor) -> Tensor:
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise DataError("predictions need a network that gives logits (N, classes).")
    return logits.double().softmax(1)


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(1)
