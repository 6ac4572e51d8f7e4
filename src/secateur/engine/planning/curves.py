"""Milliseconds of one layer against its density: a line that never falls, fitted to measured points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.core.errors import UsageError

__all__ = ["Curve", "fitted", "isotonic"]


@dataclass(frozen=True)
class Curve:
    """Milliseconds of one layer under one pattern.

    Attributes:
        densities: Shares of the weights that are kept, rising, within [0, 1].
        ms: Milliseconds at each of them, never falling.
        source: ``"measured"``, or ``"interpolated"`` from layers of other shapes.

    >>> Curve((0.1, 0.5), (1.0, 3.0), "measured").at(0.3)
    2.0
    """

    densities: tuple[float, ...]
    ms: tuple[float, ...]
    source: str = "measured"

    def __post_init__(self) -> None:
        places, times = self.densities, self.ms
        if not places or len(places) != len(times):
            raise UsageError(f"a curve has {len(places)} densities and {len(times)} times; give one time for each.")
        rising = all(a < b for a, b in zip(places, places[1:], strict=False))
        if not (rising and places[0] >= 0 and places[-1] <= 1):
            raise UsageError(f"the densities of a curve must rise within [0, 1]; they are {places}.")
        never_falls = all(a <= b for a, b in zip(times, times[1:], strict=False))
        if not (never_falls and times[0] >= 0 and math.isfinite(times[-1])):
            raise UsageError(f"the times of a curve must be finite, at least 0, and never fall; they are {times}.")

    def at(self, density: float) -> float:
        """Milliseconds at a density: linear between the points, level beyond the first and the last.

        Raises:
            UsageError: when the density is not within [0, 1].
        """
        if not 0 <= density <= 1:
            raise UsageError(f"a density is {density}; it must be within [0, 1], the share of weights that are kept.")
        return float(np.interp(density, self.densities, self.ms))

    def times(self, factor: float) -> Curve:
        """The curve of a machine that takes so many times as long."""
        return Curve(self.densities, tuple(factor * ms for ms in self.ms), self.source)

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {"densities": list(self.densities), "ms": list(self.ms), "source": self.source}


def isotonic(values: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, ...]:
    """The sequence that never falls and is nearest in weighted squares: neighbours that violate are pooled.

    Args:
        values: As measured.
        weights: How much each counts; 1 by default.

    >>> isotonic([1.0, 3.0, 2.0])
    (1.0, 2.5, 2.5)

    Cost: linear in their number.
    """
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many
    for value, weight in zip(values, weights or [1.0] * len(values), strict=True):
        mean, mass, count = float(value), float(weight), 1
        while pools and pools[-1][0] > mean:
            before, heavy, many = pools.pop()
            mean = (before * heavy + mean * mass) / (heavy + mass)
            mass, count = mass + heavy, count + many
        pools.append((mean, mass, count))
    return tuple(mean for mean, _, count in pools for _ in range(count))


def fitted(points: Mapping[float, float], source: str = "measured") -> Curve:
    """The curve nearest to measured points, in the ratio: relative errors count, not milliseconds.

    Args:
        points: Density to milliseconds, all above 0.
        source: As for `Curve`.
    """
    places = tuple(sorted(points))
    level = isotonic([math.log(max(points[place], 1e-9)) for place in places])
    return Curve(places, tuple(math.exp(value) for value in level), source)
