"""Curves of layers that were never measured, from measured layers of other shapes; and how far off that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.engine.planning.curves import Curve, fitted
from secateur.engine.planning.operators import Layer
from secateur.engine.planning.table import CostTable, Machine, Point
from secateur.engine.planning.variants import DENSE

__all__ = ["HeldOut", "Known", "held_out"]

NEAREST = 4
FAR = 4.0  # doublings in all measures together beyond which a shape says nothing about another


@dataclass(frozen=True)
class HeldOut:
    """How well shapes tell of each other.

    Attributes:
        error: Relative error that nine of ten figures stay within; NaN when fewer than two shapes are known.
        median: Relative error that half of them stay within.
        shapes: How many were held out in turn.
        figures: How many figures were compared.
    """

    error: float
    median: float
    shapes: int
    figures: int


class Known:
    """What a table tells of one machine.

    Args:
        table: The file.
        machine: Whose figures count.
    """

    def __init__(self, table: CostTable, machine: Machine) -> None:
        self._of: Mapping[str, dict[str, dict[str, Point]]] = table.points.get(str(machine), {})
        self._ratios: dict[str, list[tuple[tuple[float, ...], str, dict[float, float]]]] = {}

    def dense(self, layer: Layer, job: float) -> float:
        """Milliseconds of a layer without zeros, at the pace of the small job; 0 when it was not measured."""
        return next(iter(self._measured(layer.key, DENSE, job).values()), 0.0)

    def curve(self, layer: Layer, pattern: str, job: float, dense: float) -> Curve | None:
        """The curve of a layer: measured, or interpolated from like shapes; None when there are none.

        Args:
            layer: Which.
            pattern: In words.
            job: Milliseconds of the small job now.
            dense: Milliseconds of the layer without zeros, now.
        """
        points = self._measured(layer.key, pattern, job)
        if points:
            return _whole(points, pattern, self._measured(layer.key, DENSE, job), "measured")
        ratios = self.like(layer.features, pattern)
        if not ratios:
            return None
        return _whole({d: r * dense for d, r in ratios.items()}, pattern, {1.0: dense}, "interpolated")

    def like(self, features: Sequence[float], pattern: str, without: str = "") -> dict[float, float]:
        """Density to the share of the dense time, from the shapes nearest to some features.

        Args:
            features: Of the layer.
            pattern: In words.
            without: A layer that does not count.
        """
        near = [
            (sum((a - b) ** 2 for a, b in zip(features, other, strict=False)), ratios)
            for other, key, ratios in self._shapes(pattern)
            if key != without
        ]
        near = sorted(((d, r) for d, r in near if d <= FAR**2), key=lambda pair: pair[0])[:NEAREST]
        if not near:
            return {}
        weights = [1.0 / (0.25 + distance) for distance, _ in near]
        places = sorted({round(place, 4) for _, ratios in near for place in ratios})
        found = {}
        for place in places:
            logs = [math.log(_between(ratios, place)) for _, ratios in near]
            found[place] = math.exp(float(np.average(logs, weights=weights)))
        return found

    def _shapes(self, pattern: str) -> list[tuple[tuple[float, ...], str, dict[float, float]]]:
        """Features, key and ratios to the dense time of every layer measured under a pattern."""
        if pattern not in self._ratios:
            made = []
            for key in self._of:
                dense, points = self._measured(key, DENSE, 1.0), self._measured(key, pattern, 1.0)
                if dense and points:
                    whole = next(iter(dense.values()))
                    features = next(iter(self._of[key][pattern].values())).features
                    made.append((features, key, {d: ms / whole for d, ms in points.items()}))
            self._ratios[pattern] = made
        return self._ratios[pattern]

    def keys(self, pattern: str) -> list[tuple[tuple[float, ...], str, dict[float, float]]]:
        """Every measured layer: features, key, and density to the share of its dense time."""
        return self._shapes(pattern)

    def patterns(self) -> list[str]:
        """Patterns that something was measured under."""
        return sorted({pattern for by in self._of.values() for pattern in by if pattern != DENSE})

    def _measured(self, key: str, pattern: str, job: float) -> dict[float, float]:
        rungs = self._of.get(key, {}).get(pattern, {})
        return {point.density: point.ms / point.reference * job for point in rungs.values()}


def held_out(table: CostTable, machine: Machine) -> HeldOut:
    """Each shape forecast from the others, by the same rule that serves unknown shapes.

    Args:
        table: The file.
        machine: Whose figures count.
    """
    known = Known(table, machine)
    errors: list[float] = []
    shapes: set[str] = set()
    for pattern in known.patterns():
        for features, key, ratios in known.keys(pattern):
            forecast = known.like(features, pattern, without=key)
            if forecast:
                shapes.add(key)
                errors += [abs(_between(forecast, density) / ratio - 1) for density, ratio in ratios.items()]
    high, middle = (float(np.percentile(errors, part)) if errors else math.nan for part in (90, 50))
    return HeldOut(high, middle, len(shapes), len(errors))


def _whole(points: Mapping[float, float], pattern: str, dense: Mapping[float, float], source: str) -> Curve:
    """A curve up to density 1, where all patterns but N:M meet the dense layer."""
    curve = fitted(points, source)
    if ":" in pattern or not dense or curve.densities[-1] == 1:
        return curve
    top = max(curve.ms[-1], *dense.values())
    return Curve((*curve.densities, 1.0), (*curve.ms, top), source)


def _between(ratios: Mapping[float, float], density: float) -> float:
    places = sorted(ratios)
    return max(float(np.interp(density, places, [ratios[place] for place in places])), 1e-9)
