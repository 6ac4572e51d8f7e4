"""From the sum of the layers' shares to the true rise of the loss: a few whole choices, measured, and a law through.

To second order the rise is the sum of the shares. Large changes leave the second order, and those of one layer meet
those of another, so a larger sum does more than its share; of small ones the slope of the loss, which grows with the
root of the share, is a part: ``rise = factor * sum * (sum / 0.03) ** (power - 1) * (1 + sum / bend)``. The three are
believed to lie in a wide range before anything is measured, and what is measured narrows them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.core.errors import ModelError
from secateur.core.names import Named
from secateur.core.task import Task, call, frozen
from secateur.engine.planning.pieces import part
from secateur.engine.planning.roots import counted

FACTORS = (math.log(1.3), 1.0)
"""Mean and standard deviation of the logarithm of the factor, before."""

BENDS = (math.log(0.2), 1.5)
"""Likewise of the bend."""

POWERS = (0.92, 0.1)
"""Mean and standard deviation of the power, before."""

PIVOT = math.log(0.03)
"""Logarithm of the sum at which the power has no say."""

SPREADS = (math.log(0.42), 0.25)
"""As for the factor, of the spread of single choices around the law."""

TOO_FAR = 0.7
"""Rises above this tell little about small ones: the loss ends somewhere."""

_SHARES = np.geomspace(1e-7, 1e3, 101)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Probe:
    """A whole choice, its sum of shares and what it did.

    Args:
        share: sum of the layers' shares.
        rise: measured rise of the mean loss.
        stderr: standard error of the rise over the examples.
    """

    share: float
    rise: float
    stderr: float

    def to_json(self) -> dict[str, float]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Law:
    """The rise of the loss against the sum of shares.

    Args:
        factor: rise over sum where the sum is 0.03, but for the bend.
        power: of the sum, for small sums.
        bend: the sum at which the rise is twice that.
        spread: standard deviation of the logarithm of a single choice's rise around the law.
        n: measured choices behind it.
        middle: logarithm of the rise at sums from 1e-7 to 1e3, ten for each power of ten.
        width: its standard deviation, factor, bend and spread being known no better than they are.
    """

    factor: float
    power: float
    bend: float
    spread: float
    n: int
    middle: tuple[float, ...]
    width: tuple[float, ...]

    def at(self, share: float) -> tuple[float, float, float]:
        """The rise that is forecast, and the ends of its 95 % interval; zeros where nothing is lost."""
        if share <= 0:
            return 0.0, 0.0, 0.0
        far, known = math.log(share), np.log(_SHARES)
        beyond = far - float(np.clip(far, known[0], known[-1]))  # in proportion, beyond the table
        middle = float(np.interp(far, known, self.middle)) + beyond
        width = float(np.interp(far, known, self.width))
        low, value, high = (math.exp(middle + z * width) for z in (-1.96, 0.0, 1.96))
        return value, low, high

    def inverse(self, rise: float) -> float:
        """The sum of shares at which that rise is forecast."""
        if rise <= 0:
            return 0.0
        found = float(np.interp(math.log(rise), self.middle, np.log(_SHARES)))
        below = min(0.0, math.log(rise) - self.middle[0])
        return math.exp(found + below)


def fit(probes: Sequence[Probe]) -> Law:
    """The law that measured choices tell, by Bayes' rule on a grid; without any, what is believed before."""
    factor, power, bend, spread, belief = _grid()

    def expected(share: float) -> Floats:
        far = math.log(share)
        return factor + far + (power - 1) * (far - PIVOT) + np.log1p(share / bend)

    belief = belief + sum(_likelihood(probe, expected(probe.share), spread) for probe in probes if probe.share > 0)
    weight = np.exp(belief - belief.max())
    weight /= weight.sum()

    def mean(values: Floats) -> float:
        return float((weight * values).sum())

    middle, width = [], []
    for share in _SHARES.tolist():
        rise = expected(share)
        middle.append(mean(rise))
        width.append(math.sqrt(max(0.0, mean(rise**2 + spread**2) - middle[-1] ** 2)))
    told = (math.exp(mean(factor)), mean(power), math.exp(mean(np.log(bend))), math.sqrt(mean(spread**2)))
    return Law(*told, sum(p.share > 0 for p in probes), tuple(middle), tuple(width))


@cache
def _grid() -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """Logarithm of the factor, power, bend, spread, and the logarithm of what is believed of all four before."""
    steps = np.linspace(-3, 3, 31)
    few = np.linspace(-2.5, 2.5, 7)
    made = np.meshgrid(steps, few, steps, few[1:-1], indexing="ij")
    belief = -np.sum(np.square(made), axis=0) / 2
    beliefs = (FACTORS, POWERS, BENDS, SPREADS)
    factor, power, bend, spread = (mean + deviation * z for (mean, deviation), z in zip(beliefs, made, strict=True))
    return factor, power, np.exp(bend), np.exp(spread), belief


def _likelihood(probe: Probe, expected: Floats, spread: Floats) -> Floats:
    """Logarithm, but for a constant: lognormal around the law, or normal where the examples do not tell the sign."""
    far = max(0.0, math.log(max(probe.rise, 1e-300) / TOO_FAR))
    if probe.rise > 2 * probe.stderr:
        variance = spread**2 + (probe.stderr / probe.rise) ** 2 + far**2
        return -((math.log(probe.rise) - expected) ** 2) / (2 * variance) - np.log(variance) / 2
    rise = np.exp(np.minimum(expected, 50.0))
    variance = probe.stderr**2 + (rise * spread) ** 2 + 1e-300
    return -((probe.rise - rise) ** 2) / (2 * variance) - np.log(variance) / 2


class Losses:
    """The losses of some examples, before and under a choice.

    Args:
        task: network, loss and the examples to measure on. Those that have no target that counts are left out.

    Raises:
        ModelError: when the loss of another example is not a finite number, or no target counts.
    """

    def __init__(self, task: Task) -> None:
        self.task, self._counts = task, list[bool]()
        with frozen(task.model):
            for _, target, n in task.batches():
                self._counts += [bool(counted(task.loss, part(target, n, i, i + 1)).any()) for i in range(n)]
        self.before = self._each({})
        self.examples = len(self.before)
        if not self.examples:
            raise ModelError("no target of the examples counts towards the loss; give examples with targets.")
        wrong = int((~self.before.isfinite()).sum())
        if wrong:
            raise ModelError(
                f"the loss of {wrong} of {self.examples} examples is not a finite number, so no rise of it can be "
                "forecast; look at the network with `secateur doctor`, and at the targets."
            )

    def probe(self, share: float, at: Named) -> Probe:
        """What the tensors ``at`` do to the loss. Cost: a forward pass over the examples."""
        rise = self._each(at) - self.before
        error = rise.std().item() / math.sqrt(len(rise)) if len(rise) > 1 else math.inf
        return Probe(share, rise.mean().item(), error)

    @torch.no_grad()
    def _each(self, at: Named) -> Tensor:
        found, counts = list[Tensor](), iter(self._counts)
        with frozen(self.task.model):
            for inputs, target, n in self.task.batches():
                output = call(self.task.model, inputs, at)
                found += [
                    self.task.loss(part(output, n, i, i + 1), part(target, n, i, i + 1))
                    for i in range(n)
                    if next(counts)
                ]
        return torch.stack(found).double().cpu() if found else torch.zeros(0, dtype=torch.float64)


def frontier(
    rises: Mapping[str, Mapping[str, Sequence[float]]],
    kept: Mapping[str, Mapping[str, Sequence[float]]],
    level: float,
    favour: Mapping[str, Mapping[str, float]],
    sizes: Mapping[str, float],
) -> dict[str, tuple[str, int]]:
    """The choice that keeps few weights with a sum of shares of about ``level``: pattern and rung of each tensor.

    Args:
        rises: shares, by tensor and pattern, one a rung.
        kept: densities, likewise.
        level: the sum that is wanted.
        favour: factor on the shares, by tensor and pattern, where choices are to differ.
        sizes: what a tensor's weights count together.

    Returns:
        The tensors that lose weights; the sum is the largest below the level that one price for all gives.
    """
    low, high = -60.0, 60.0
    best: dict[str, tuple[str, int]] = {}
    for _ in range(40):
        price = (low + high) / 2
        choice = {n: _cheapest(rises[n], kept[n], math.exp(price) * sizes[n], favour[n]) for n in rises}
        taken = {n: c for n, c in choice.items() if c is not None}
        if sum(rises[n][p][i] for n, (p, i) in taken.items()) <= level:
            low, best = price, taken
        else:
            high = price
    return best


def _cheapest(
    rises: Mapping[str, Sequence[float]], kept: Mapping[str, Sequence[float]], price: float, favour: Mapping[str, float]
) -> tuple[str, int] | None:
    """Pattern and rung of the least share plus price times the weights kept, from 0 to 1; None to stay dense."""
    best, least = None, price
    for pattern, shares in rises.items():
        for rung, share in enumerate(shares):
            total = share * favour[pattern] + price * kept[pattern][rung]
            if total < least:
                best, least = (pattern, rung), total
    return best
