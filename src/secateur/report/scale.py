"""Axes: from values to places, and round numbers to label them with."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from secateur.report.sections import Number


@dataclass(frozen=True)
class Scale:
    """Maps values ``low..high`` to places ``start..end``, linearly or by logarithm."""

    low: Number
    high: Number
    start: Number
    end: Number
    log: bool = False

    @classmethod
    def over(
        cls, values: Iterable[Number], start: Number, end: Number, low: Number | None = None, high: Number | None = None
    ) -> Scale:
        """A scale on which all finite values have room; logarithmic when a few of them dwarf the rest."""
        found = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
        least, most = min(found), max(found)
        middle = sorted(found)[len(found) // 2]
        if low is None and high is None and least > 0 and most > 50 * middle:
            top = math.ceil(math.log10(most))
            # Twelve powers of ten are all that an eye can tell apart; what is smaller lies on the edge.
            return cls(10.0 ** max(math.floor(math.log10(least)), top - 12), 10.0**top, start, end, True)
        spread = (most - least) or abs(most) or 1.0
        bottom = 0.0 if 0 <= least < 0.35 * most else least - 0.05 * spread
        return cls(bottom if low is None else low, most + 0.05 * spread if high is None else high, start, end)

    def __call__(self, value: Number) -> Number:
        """The place of a value."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / (math.log(self.high / self.low) or 1.0)
        else:
            share = value / self.span - self.low / self.span
        return self.start + share * (self.end - self.start)

    @property
    def span(self) -> Number:
        """Width of the interval; 1 for an empty one, so that all values fall on its start."""
        return self.high - self.low or 1.0

    def ticks(self, wanted: int = 5) -> list[Number]:
        """Round values inside the scale: steps of 1, 2 or 5 times a power of ten."""
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            every = max(1, -(-(last - first) // wanted))
            return [10.0**power for power in range(first, last + 1, every)]
        rough = self.span / wanted
        power = 10.0 ** math.floor(math.log10(rough))
        step = next((factor * power for factor in (1, 2, 5) if factor * power >= rough * 0.999), 10 * power)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [float(f"{i * step:.12g}") for i in range(first, min(last, first + 4 * wanted) + 1)]
