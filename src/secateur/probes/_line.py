"""Loss and errors of a network at other weights, and along the line between two sets of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.core.errors import DataError
from secateur.core.names import Named, unwrap
from secateur.core.task import Batch, Task, call, check_loss, frozen
from secateur.probes._logits import IGNORED, check, flat, none_left


class Point(NamedTuple):
    """A network on the line.

    Args:
        alpha: share of the second network, 0 to 1.
        loss: mean loss.
        error: per cent of wrong answers; NaN where it is not asked for.
    """

    alpha: float
    loss: float
    error: float


class Heights(NamedTuple):
    """How far a curve rises above its ends.

    Args:
        mean: the largest value less the mean of the ends.
        line: the largest excess over the straight line between the ends.
        at: share of the second network where the value is largest.
    """

    mean: float
    line: float
    at: float


def between(first: Named, second: Named, alpha: float) -> Named:
    """``(1 - alpha) first + alpha second``; the ends are exact, and what is no real number is the first's."""
    if alpha in (0.0, 1.0):
        mixed = second if alpha else first
        return {name: mixed[name] if t.is_floating_point() else t for name, t in first.items()}
    return {
        name: torch.lerp(t.detach(), second[name].detach(), alpha) if t.is_floating_point() else t
        for name, t in first.items()
    }


def heights(points: Sequence[Point], of: Callable[[Point], float]) -> Heights:
    """The barrier of a curve, by both definitions; 0 or above, since the ends are among the points."""
    values = [of(point) for point in points]
    left, right = values[0], values[-1]
    top = max(range(len(values)), key=values.__getitem__)
    above = max(of(p) - ((1 - p.alpha) * left + p.alpha * right) for p in points)
    return Heights(values[top] - (left + right) / 2, max(0.0, above), points[top].alpha)


def judge(task: Task, at: Named, errors: bool) -> tuple[float, float]:
    """Mean loss and per cent of wrong answers with other weights, in evaluation mode.

    Raises:
        DataError: when the loss is not finite, or errors are asked of a network that is no classifier.

    Cost: one forward pass over the data.
    """
    loss, examples, wrong, answers = 0.0, 0, 0, 0
    with torch.no_grad(), frozen(task.model):
        for inputs, target, n in task.batches():
            output = call(task.model, inputs, at)
            value = task.loss(output, target)
            check_loss(value)
            loss, examples = loss + float(value) * n, examples + n
            if errors:
                logits, labels, _ = flat(output, target)
                logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]
                check(logits, labels)
                wrong, answers = wrong + int((logits.argmax(1) != labels).sum()), answers + len(labels)
    if errors and not answers:
        raise none_left()
    return loss / examples, 100 * wrong / answers if errors else float("nan")


@torch.no_grad()
def statistics(task: Task, at: Mapping[str, Tensor], data: Iterable[Batch] | None) -> Named:
    """Running statistics that BatchNorm layers have with other weights: averages over batches, by their examples.

    Every batch is normalised by its own statistics; all other layers act as in evaluation. The network stays as it is.

    Args:
        task: the network, and data to take where none is given.
        at: the weights.
        data: batches; targets are not looked at, and batches of one example are passed over.

    Returns:
        New means and variances by the names of the buffers; nothing without BatchNorm.

    Raises:
        DataError: when no batch has two examples.

    Cost: one forward pass over the data.
    """
    model = unwrap(task.model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    if not layers:
        return {}
    fresh = {
        f"{path}.{name}".lstrip("."): buffer.clone()
        for path, layer in layers.items()
        for name, buffer in layer.named_buffers(recurse=False)
    }
    momenta, seen = {path: layer.momentum for path, layer in layers.items()}, 0
    try:
        with frozen(model):
            for layer in layers.values():
                layer.training = True
            for inputs, _, n in Task(model, task.loss, task.data if data is None else data).batches():
                if n > 1:
                    seen += n
                    for layer in layers.values():
                        layer.momentum = n / seen
                    call(model, inputs, {**at, **fresh})
    finally:
        for path, layer in layers.items():
            layer.momentum = momenta[path]
    if not seen:
        raise DataError("BatchNorm has no variance over a single example; pass batches of at least two.")
    return {name: buffer for name, buffer in fresh.items() if buffer.is_floating_point()}


def along(
    task: Task,
    first: Named,
    second: Named,
    alphas: Sequence[float],
    errors: bool = True,
    estimate: bool = True,
    data: Iterable[Batch] | None = None,
) -> list[Point]:
    """Loss and errors at points of the straight line between two sets of weights.

    Args:
        task: network, loss and data.
        first: its tensors at 0.
        second: its tensors at 1.
        alphas: shares of the second.
        errors: whether wrong answers are counted.
        estimate: take the statistics of BatchNorm anew at every point, the ends too; interpolated ones otherwise.
        data: from these batches; from the task's own by default.

    Cost: one forward pass over the task's data for each point, and one over ``data`` with BatchNorm.
    """
    points = []
    for alpha in alphas:
        at: dict[str, Any] = between(first, second, alpha)
        if estimate:
            at |= statistics(task, at, data)
        points.append(Point(alpha, *judge(task, at, errors)))
    return points
