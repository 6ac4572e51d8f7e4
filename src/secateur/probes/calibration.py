"""Calibration: whether a classifier is right as often as it is sure; and the temperature that mends it."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.core.errors import DataError
from secateur.core.masks import Masks
from secateur.core.reading import Paper, Reading
from secateur.core.sockets import Probe
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.probes._bins import equal_count_error, expected_error, which_bin
from secateur.probes._logits import Rows, check, none_left, rows, wide
from secateur.probes._statistics import Spread, bootstrap
from secateur.probes._still import check_whole, unchanged

_LOWEST, _HIGHEST = 1e-3, 1e3


@dataclass(frozen=True)
class Calibration(Probe):
    """Expected calibration error: how far accuracy and confidence lie apart, a share in [0, 1].

    With softmax probabilities p in float64, confidence ``c = max p`` and bins ``((k-1)/M, k/M]`` of equal width:
    ``ECE = Σ_b n_b / N · |accuracy_b - mean c_b|``; empty bins are skipped. Parts:

    - ``mce``: the largest gap of a bin. ``adaptive_ece``: ECE over M bins of equally many examples.
    - ``classwise_ece``: ECE of every ``p_k`` against ``y = k`` (equal width), mean over all classes.
    - ``nll``: mean ``-log p_y`` in nats. ``brier``: mean ``Σ_k (p_k - 1[y = k])²``, in [0, 2].
    - ``accuracy`` and ``confidence``: their means, as shares.
    - ``bin:i:count``, ``bin:i:confidence``, ``bin:i:accuracy`` of each bin i = 0..M-1 that is not empty.

    ``stderr`` and ``low..high`` are a seeded bootstrap over examples (over sequences, for tokens). ECE is biased
    upwards for few examples and depends on M: compare it only at the same M and N. ``masks`` are not needed.

    Args:
        bins: M.

    Raises:
        UsageError: when ``bins`` is below 1.
        DataError: when the network is no classifier, logits are NaN, labels are out of range, or the data is empty.

    Cost: one forward pass over the data, 1,000 resamples of its examples.
    """

    bins: int = 15

    paper = Paper(
        "On Calibration of Modern Neural Networks",
        "Guo, Pleiss, Sun, Weinberger",
        2017,
        "arXiv:1706.04599",
        differs="adds bins of equal counts (Nguyen and O'Connor 2015), in which examples of equal confidence share "
        "their mean accuracy, and classwise errors (Nixon et al. 2019)",
    )

    def __post_init__(self) -> None:
        check_whole("bins", self.bins)

    def __call__(self, task: Task, masks: Masks | None = None) -> Reading:
        """The expected calibration error."""
        seen = _Sums(self.bins)
        with unchanged():
            for batch in rows(task):
                seen.add(batch)
        confidence, right, example, nll, brier = seen.columns()
        n = confidence.numel()
        if not n:
            raise none_left()
        table = _table(confidence, right, self.bins)
        ece = float(expected_error(*table))
        groups, index = example.unique(return_inverse=True)
        spread = _spread(confidence, right, self.bins, index, len(groups), ece)
        parts = {
            **_overall(table),
            "adaptive_ece": equal_count_error(confidence, right, self.bins),
            "classwise_ece": seen.classwise(),
            **{"nll": float(nll.mean()), "brier": float(brier.mean())},
            **_rows_of(table),
        }
        return Reading(ece, "", *(spread or (None, None, None)), n=len(groups), parts=parts, note=self._note(seen, n))

    def _note(self, seen: _Sums, n: int) -> str:
        of = f"; {n:,} tokens, interval by bootstrap over sequences" if seen.tokens else ""
        return f"{self.bins} bins; biased upwards for few examples, compare at the same number of bins only{of}"


class _Sums:
    """What is kept of each batch: a few numbers a decision, and sums in each bin of each class."""

    def __init__(self, bins: int) -> None:
        self.bins, self.tokens = bins, False
        self.parts: list[tuple[Tensor, ...]] = []
        self.sums: Tensor | None = None

    def add(self, batch: Rows) -> None:
        logs = wide(batch.logits).log_softmax(1)
        p, labels = logs.exp(), batch.labels[:, None]
        hit = torch.zeros_like(p).scatter_(1, labels, 1.0)
        confidence, answer = p.max(1)
        nll, brier = -logs.gather(1, labels)[:, 0], (p - hit).square().sum(1)
        self.parts.append(tuple(x.cpu() for x in (confidence, answer == batch.labels, batch.example, nll, brier)))
        place = which_bin(p, self.bins)
        # Whole numbers (2^-40 steps) add up to the same in any order, as accelerators add in any.
        whole = torch.stack([torch.ones_like(p), p, hit]).mul(2**40).round().long()
        sums = whole.new_zeros(3, self.bins, p.shape[1]).scatter_add_(1, place.expand_as(whole), whole)
        found = sums.cpu().double() / 2**40
        self.sums = found if self.sums is None else self.sums + found
        self.tokens = self.tokens or batch.tokens

    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Confidence, right, number of the example, -log p_y and Brier score of every decision, on the CPU."""
        one, two, three, four, five = (torch.cat(column) for column in zip(*self.parts, strict=True))
        return one, two, three, four, five

    def classwise(self) -> float:
        """The error of each class's probability, mean over classes."""
        if self.sums is None:
            raise none_left()
        count, p, hit = self.sums.transpose(1, 2)
        return float(expected_error(count, p, hit).mean())


class Reliability(NamedTuple):
    """One bin of a reliability diagram: ``low < confidence <= high``; means are NaN in an empty bin."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def reliability(logits: Tensor, labels: Tensor, bins: int = 15) -> list[Reliability]:
    """Mean confidence and accuracy in ``bins`` bins of equal width, from logits (N, classes) and labels (N,).

    Raises:
        UsageError: when ``bins`` is below 1.
        DataError: for shapes that do not fit, NaN logits or labels out of range.

    Cost: O(N · classes).
    """
    check_whole("bins", bins)
    _check_pair(logits, labels)
    confidence, answer = wide(logits.detach()).softmax(1).max(1)
    count, sure, right = _table(confidence.cpu(), (answer == labels).cpu(), bins)
    return [
        Reliability(i / bins, (i + 1) / bins, int(n), float(sure[i] / n), float(right[i] / n))
        for i, n in enumerate(count)
    ]


def temperature(logits: Tensor, labels: Tensor) -> Reading:
    """The T > 0 for which ``softmax(logits / T)`` has the lowest mean cross-entropy, with its error.

    Fit it on validation data: neither on those the network learned from nor on those it is judged by. It changes
    no answer, as the order of the logits stays. With ``β = 1 / T`` the loss is convex; a safeguarded Newton search
    in ``1e-3 <= β <= 1e3`` ends where ``|mean_i (Σ_k p_k z_ik - z_iy)| < 1e-6``. ``stderr`` is from the curvature
    of the likelihood.

    Args:
        logits: (N, classes), not probabilities.
        labels: (N,) whole numbers.

    Returns:
        T; at a bound of the search (the labels are told apart perfectly, or worse than by chance) or without a
        unique answer (constant logits: T = 1), the note says so and there is no error.

    Raises:
        DataError: for shapes that do not fit, NaN logits, labels out of range or of a logit of -infinity.

    Cost: O(N · classes) for each of about ten steps.
    """
    _check_pair(logits, labels)
    z, y = wide(logits.detach()), labels[:, None].long()
    if bool(z.gather(1, y).isinf().any()):
        raise DataError("a label has a logit of -infinity, so no temperature makes it possible. Leave such rows out.")
    n = len(z)
    if bool((z == z[:, :1]).all()):
        return Reading(1.0, n=n, note="the logits of every example are equal: any temperature does as well")

    slope = functools.partial(_slope, z, y)
    beta, note = _root(slope)
    if note:
        return Reading(1 / beta, n=n, note=note)
    curvature = slope(beta)[1]
    stderr = 1 / math.sqrt(n * curvature) / beta**2 if curvature > 0 else None
    return Reading(1 / beta, stderr=stderr, n=n)


def _slope(z: Tensor, y: Tensor, beta: float) -> tuple[float, float]:
    """First and second derivative by beta of the mean cross-entropy of ``beta * z``."""
    p = (beta * z).softmax(1)
    mean = torch.where(p > 0, p * z, 0.0).sum(1, keepdim=True)  # 0 * -infinity is 0 here
    spread = torch.where(p > 0, p * (z - mean).square(), 0.0).sum(1)
    return float((mean - z.gather(1, y)).mean()), float(spread.mean())


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """T alone, see :func:`temperature`; warns where that has a note.

    Raises:
        DataError: as there.

    Cost: as there.
    """
    found = temperature(logits, labels)
    if found.note:
        warnings.warn(f"temperature {found.value:g}: {found.note}", stacklevel=2)
    return found.value


def _root(slope: Callable[[float], tuple[float, float]]) -> tuple[float, str]:
    """Where the rising ``slope`` (and its derivative) crosses zero, or the bound and why."""
    low, high, beta = 1 / _HIGHEST, 1 / _LOWEST, 1.0
    if slope(low)[0] >= 0:
        return low, f"the labels fit the logits no better than chance; T would be {_HIGHEST:g}, its bound, or more"
    if slope(high)[0] <= 0:
        return high, f"the logits tell all labels apart perfectly; T would be {_LOWEST:g}, its bound, or less"
    for _ in range(200):
        value, rise = slope(beta)
        if value == 0 or high / low < 1 + 1e-14:
            break
        low, high = (low, beta) if value > 0 else (beta, high)
        newton = beta - value / rise if rise > 0 else 0.0
        step = newton if low < newton < high else math.sqrt(low * high)
        if abs(step - beta) <= 1e-15 * beta:
            break
        beta = step
    return beta, ""


def _table(confidence: Tensor, right: Tensor, bins: int, weights: Tensor | None = None) -> tuple[Tensor, ...]:
    """Count, sum of confidence and number right in each bin, float64; each decision counts ``weights`` times."""
    place = which_bin(confidence, bins)
    weigh = torch.ones(len(confidence), dtype=torch.float64) if weights is None else weights
    columns = (weigh, weigh * confidence.double(), weigh * right.double())
    return tuple(torch.bincount(place, weights=column, minlength=bins) for column in columns)


def _spread(c: Tensor, right: Tensor, bins: int, group: Tensor, groups: int, ece: float) -> Spread | None:
    place, gap = which_bin(c, bins), right.double() - c.double()

    def estimate(weights: Tensor) -> float:
        weigh = weights[group]
        return float(torch.bincount(place, weights=weigh * gap, minlength=bins).abs().sum() / weigh.sum())

    return bootstrap(estimate, ece, groups, stream(0, "calibration", "bootstrap"))


def _overall(table: tuple[Tensor, ...]) -> dict[str, float]:
    count, sure, right = table
    full, n = count > 0, float(count.sum())
    gap = (right[full] - sure[full]).abs() / count[full]
    return {"mce": float(gap.max()), "accuracy": float(right.sum()) / n, "confidence": float(sure.sum()) / n}


def _rows_of(table: tuple[Tensor, ...]) -> dict[str, float]:
    found: dict[str, float] = {}
    for i, (n, sure, right) in enumerate(zip(*(column.tolist() for column in table), strict=True)):
        if n:
            found |= {f"bin:{i}:count": n, f"bin:{i}:confidence": sure / n, f"bin:{i}:accuracy": right / n}
    return found


def _check_pair(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise DataError(
            f"logits of shape {tuple(logits.shape)} with labels of shape {tuple(labels.shape)}; pass at least one row: "
            "logits (N, classes) and labels (N,). Flatten sequences first."
        )
    if labels.is_floating_point() or not logits.is_floating_point():
        raise DataError(f"logits must be real numbers and labels whole ones, not {logits.dtype} and {labels.dtype}.")
    check(logits, labels)
