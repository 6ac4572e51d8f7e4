"""The proof that a smaller network computes what it must: on the example, and on numbers that nobody has trained."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.core.calls import first_line, split_inputs
from secateur.core.errors import ModelError
from secateur.core.streams import stream
from secateur.surgery.analysis import Analysis
from secateur.surgery.reference import Zeroed, casts

CLOSE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative difference that rounding explains, by type."""

Build = Callable[[nn.Module], nn.Module]
"""Makes the small network from a dense one; the dense one may be taken apart."""


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        dense: the network with the weights of this case.
        example: the inputs of this case.
        expected: what the small network must give, flat.
        dtype: type of the computation; None for that of the weights.
        slack: how much more than rounding is allowed.
    """

    dense: nn.Module
    example: Any
    expected: list[Any]
    dtype: torch.dtype | None
    slack: float = 1.0

    def error(self, build: Build) -> float:
        """The largest difference of the small network from what it must give."""
        return difference(run(build(copied(self.dense)), self.example, self.dtype), self.expected)

    @property
    def bound(self) -> float:
        """The largest difference that is taken for rounding."""
        kinds = [x.dtype for x in self.expected if isinstance(x, Tensor) and x.is_floating_point()]
        widest = max((CLOSE.get(kind, 1e-5) for kind in kinds), default=1e-5)
        return self.slack * (CLOSE[self.dtype] if self.dtype is not None else widest)


def cases(found: Analysis, labels: Tensor, own: nn.Module, example: Any) -> list[Case]:
    """The example with the network's own weights; and noise in the place of inputs and weights.

    The second shows what the first may hide: an example of zeros, dead activations, weights that happen to vanish.
    It is left out where the dense network itself cannot run on noise.

    Raises:
        ModelError: when the dense network cannot be run from its graph.
    """
    expected, dtype = expected_outputs(found, labels, example)
    floating = [x for x in expected if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
    if floating and not any(bool(x.isfinite().any()) for x in floating):
        raise ModelError(
            "the network's outputs are nowhere finite on the example, so nothing can be proved; nothing was changed. "
            "Run `secateur doctor` on it: weights or inputs hold NaN or infinity."
        )
    made = [Case(own, example, expected, dtype)]
    dense, noise = _drawn(own), _noise(example)
    state = {**dict(dense.named_parameters(remove_duplicate=False))}
    try:
        with torch.no_grad():
            other = Zeroed(found.run, labels, dtype, state)(*split_inputs(noise))
    except Exception:  # inputs may have to be what they are
        return made
    if any(isinstance(x, Tensor) and x.is_floating_point() and bool(x.isfinite().any()) for x in other):
        made.append(Case(dense, noise, other, dtype, slack=10.0))
    return made


def copied(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode; what torch has to say about copying graphs is not for the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return copy.deepcopy(model).eval()


def _drawn(own: nn.Module) -> nn.Module:
    dense, random = copied(own), stream(0, "surgery", "weights")
    with torch.no_grad():
        for p in dense.parameters():
            if p.is_floating_point() and p.numel():
                drawn = torch.randn(p.shape, generator=random)
                if p.dim() > 1:
                    drawn *= (len(p) / p.numel()) ** 0.5
                else:  # scales stay about 1, shifts about 0, whatever they have become
                    drawn = 0.1 * drawn + (1.0 if float(p.detach().float().mean()) > 0.5 else 0.0)
                p.copy_(drawn.to(p.device, p.dtype))
    return dense


def _noise(example: Any) -> Any:
    random = stream(0, "surgery", "inputs")

    def anew(x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.numel()):
            return x
        size = float(x.detach().float().std()) if x.numel() > 1 else 0.0
        return (torch.randn(x.shape, generator=random) * (size or 1.0)).to(x.device, x.dtype)

    return pytree.tree_map(anew, example)


def expected_outputs(found: Analysis, labels: Tensor, example: Any) -> tuple[list[Any], torch.dtype | None]:
    """What the shrunken network must give, and the type in which both are computed."""
    problem: Exception | None = None
    for dtype in (None,) if casts(found.run) else (torch.float64, None):
        try:
            with torch.no_grad():
                return Zeroed(found.run, labels, dtype)(*split_inputs(example)), dtype
        except Exception as error:  # an operator that does not take float64
            problem = error
    raise ModelError(
        f"the dense network cannot be run from its graph ({type(problem).__name__}: "
        f"{first_line(problem) if problem else ''}); nothing was changed."
    ) from problem


@torch.no_grad()
def run(model: nn.Module, example: Any, dtype: torch.dtype | None = None) -> list[Any]:
    """The outputs of a network, flat; with ``dtype`` its floating numbers are of that type (of a copy)."""
    args, kwargs = split_inputs(example)
    if dtype is not None:
        model = copied(model).to(dtype)
        args, kwargs = pytree.tree_map(
            lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, (args, kwargs)
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytree.tree_leaves(model(*args, **kwargs))


def difference(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest difference, relative to the largest number of each output; infinite where shapes differ.

    Where a number is not finite, the other must not be either.
    """
    found = [x for x in found if isinstance(x, Tensor)]
    expected = [x for x in expected if isinstance(x, Tensor)]
    if len(found) != len(expected):
        return math.inf
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape:
            return math.inf
        if not one.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(one, other.to(one)) else math.inf)
            continue
        sure = other.isfinite()
        if bool((one.isfinite() != sure).any()):
            return math.inf
        if bool(sure.any()):
            size = float(other[sure].abs().max()) or 1.0
            apart = float((one[sure].double() - other[sure].double()).abs().max()) / size
            worst = max(worst, apart if apart == apart else math.inf)
    return worst


def trains(model: nn.Module, example: Any) -> str:
    """Why a copy of a network cannot run in training mode; empty where it can."""
    args, kwargs = split_inputs(example)
    trial = copied(model).train()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial(*args, **kwargs)
    except Exception as error:  # any forward may fail in any way
        return f"in training mode, {type(error).__name__}: {first_line(error)}"
    return ""


def more_rows(model: nn.Module, example: Any, dtype: torch.dtype | None = None) -> float:
    """How far the outputs of a batch move when its first example comes once more; infinite where that does not run."""
    n = next((len(x) for x in pytree.tree_leaves(example) if isinstance(x, Tensor) and x.dim()), 0)

    def longer(x: Any) -> Any:
        return torch.cat([x, x[:1]]) if isinstance(x, Tensor) and x.dim() and len(x) == n else x

    small = copied(model)
    try:
        before, after = (run(small, x, dtype) for x in (example, pytree.tree_map(longer, example)))
    except Exception:  # any forward may fail in any way
        return math.inf
    grown = [y[:n] if isinstance(y, Tensor) and y.dim() and len(y) == n + 1 else y for y in after]
    return difference(grown, before)
