"""What a user should know before a result is taken at its word: noise, a sum for a mean, few examples, no minimum."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from secateur.core import streams
from secateur.core.errors import ModelError
from secateur.core.sockets import Criterion, Solver, name_of
from secateur.core.task import Task, call, frozen
from secateur.linalg.grams import Gram

__all__ = ["Caution", "Seen", "caution", "check_passes", "check_ranks", "check_slope", "heard", "seen"]

AT_MINIMUM = frozenset({"obd", "woodfisher", "fisher_diagonal"})
"""Criteria whose formula leaves the slope of the loss out."""

_NAMED = 6
_SAME = 1e-3
"""Relative: two losses that differ by less are the same, but for rounding."""


class Caution(UserWarning):
    """The result stands, but there is a reason to doubt what it says."""


class Seen(NamedTuple):
    """What a layer was solved on.

    Args:
        inputs: inputs of the layer, the size of its Gram matrix.
        rank: what the rank of that matrix is at most.
        needed: examples that would give every input its own direction.
    """

    inputs: int
    rank: int
    needed: int


def seen(gram: Gram) -> Seen:
    """The figures of one Gram matrix."""
    inputs = gram.matrix.shape[-1]
    return Seen(inputs, gram.rank_bound, -(-inputs * gram.examples // max(gram.positions, 1)))


def caution(text: str) -> None:
    """Warn, at the line outside this package that asked for the work."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "secateur":
        frame, level = frame.f_back, level + 1
    warnings.warn(text, Caution, stacklevel=level - 1)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """Collects what is warned of inside the block, each text once; warnings of other kinds go on as they would.

    Yields:
        A list that is filled when the block ends. It stays empty when the block raises: the error says it all.
    """
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield texts
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            if str(warning.message) not in texts:
                texts.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def check_passes(task: Task, method: Criterion | Solver) -> None:
    """Two forward passes of the first batch must agree, and its loss must be a mean.

    The network, its modes and the random numbers are left as they were.

    Args:
        task: network, loss and data.
        method: what will be computed. Solvers and second-order criteria are refused a network that is random in
            evaluation mode, since noise does not cancel in a curvature; others get a caution.

    Raises:
        ModelError: when outputs differ and ``method`` needs a curvature.
        DataError: when the data is empty or spent.

    Cost: two forward passes of one batch, and three times the loss.
    """
    state = streams.global_state()
    try:
        inputs, target, count = next(task.batches())
        with torch.no_grad(), frozen(task.model):
            one, two = (call(task.model, inputs) for _ in range(2))
            apart = _apart(one, two)
            total = _sum(task.loss, one, target)
    finally:
        streams.set_global_state(state)
    if apart:
        _tell_noise(apart, count, method)
    if total is not None:
        whole, half = total
        caution(
            f"the loss looks like a sum over the examples, not their mean: it is {whole:.4g} for a batch and "
            f"{half:.4g} on average for its halves. Forecasts and scores grow with the size of the batches then, and "
            "batches of unlike size weigh wrongly. Give the mean, for example with `reduction='mean'`."
        )


def _tell_noise(apart: tuple[float, float], count: int, method: Criterion | Solver) -> None:
    name = name_of(method)
    text = (
        f"two passes of the same {count} examples in evaluation mode gave outputs that differ by up to {apart[0]:.3g}, "
        f"where they reach {apart[1]:.3g}: the network draws random numbers even when it does not train."
    )
    cure = "Let every random layer obey the mode, as in `functional.dropout(x, p, self.training)`."
    if isinstance(method, Solver) or "hessian" in method.needs or name in AT_MINIMUM:
        raise ModelError(f"{text} {name} needs a curvature, and this one would be noise. {cure}")
    caution(f"{text} Forecasts, and scores that look at the data, are partly noise. {cure}")


def _apart(one: Any, two: Any) -> tuple[float, float] | None:
    """How far two outputs are apart and how large they are; None for no more than rounding."""
    found = None
    for a, b in zip(tree_leaves(one), tree_leaves(two), strict=False):
        if not (isinstance(a, Tensor) and a.is_floating_point() and a.numel() and a.shape == b.shape):
            continue
        gap, size = float((a - b).abs().max()), float(a.abs().max())
        if gap > torch.finfo(a.dtype).eps ** 0.5 * size:
            found = gap, size
    return found


def _sum(loss: Callable[[Any, Any], Tensor], output: Any, target: Any) -> tuple[float, float] | None:
    """The loss of some examples and the mean of those of their halves, when the first is the sum of the others.

    A mean, however it weighs examples or tokens, is never above the larger half: so with halves of one sign and like
    size a sum cannot be taken for one.
    """
    half = len(output) // 2 if isinstance(output, Tensor) and output.dim() else 0
    if not half or any(t.dim() and len(t) != len(output) for t in tree_leaves(target) if isinstance(t, Tensor)):
        return None

    def part(start: int, stop: int) -> float:
        cut = [tree_map(lambda t: t[start:stop] if isinstance(t, Tensor) and t.dim() else t, x)
               for x in (output, target)]  # fmt: skip
        return float(loss(*cut))

    try:
        whole, one, two = part(0, 2 * half), part(0, half), part(half, 2 * half)
    except Exception:  # a loss made for batches of one size, or of several numbers, which is refused elsewhere
        return None
    least, most = sorted((abs(one), abs(two)))
    if one * two <= 0 or least < 0.1 * most or not abs(whole - (one + two)) <= _SAME * (least + most):
        return None
    return whole, (one + two) / 2


def check_ranks(layers: Mapping[str, Seen]) -> None:
    """One caution for all layers that have more inputs than their examples have directions."""
    short = {name: layer for name, layer in layers.items() if layer.rank < layer.inputs}
    if not short:
        return
    rows = [
        f"`{name}` has {s.inputs:,} inputs and a Gram matrix of rank {s.rank:,} at most" for name, s in short.items()
    ]
    more = f" and {len(rows) - _NAMED} layers more" if len(rows) > _NAMED else ""
    needed = max(layer.needed for layer in short.values())
    caution(
        f"too few examples: {'; '.join(rows[:_NAMED])}{more}. In all other directions the damping alone decides. "
        f"Use at least {needed:,} examples (`-s examples={needed}`)."
    )


def check_slope(method: Criterion | Solver, slope: float, curvature: float | None) -> None:
    """A caution when the slope outweighs the curvature, for a method that takes the network to be at a minimum.

    Args:
        method: criteria that count the slope, and methods from outside, are not judged.
        slope: first-order change of the loss along the cut of the network as it was.
        curvature: second-order change; None where it is not known.
    """
    name = name_of(method)
    if curvature is None or not abs(slope) > curvature:
        return
    if name in AT_MINIMUM or (isinstance(method, Solver) and ":" not in name):
        caution(
            f"the network is not at a minimum: the first-order part of the forecast ({slope:.3g}) is larger than the "
            f"second-order one ({curvature:.3g}), and {name} looks at the second order alone. Train on before pruning, "
            "or use a criterion that counts the slope, such as `taylor`."
        )
