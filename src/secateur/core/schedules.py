"""When: how far along the way from the first to the final sparsity a run is. A closed set.

A schedule maps progress in [0, 1] to a fraction in [0, 1] of the way; 0 gives 0 (except one-shot)
and 1 gives 1 exactly.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from secateur.core.errors import UsageError


class Schedule(ABC):
    """Maps progress in [0, 1] to the fraction of the way to the target."""

    def __call__(self, progress: float) -> float:
        """The fraction of the way; ``progress`` is cut to [0, 1]."""
        progress = min(1.0, max(0.0, progress))
        return 1.0 if progress == 1.0 else self.fraction(progress)

    @abstractmethod
    def fraction(self, progress: float) -> float:
        """The fraction for a progress below 1."""


@dataclass(frozen=True)
class OneShot(Schedule):
    """All at once, at the start."""

    def fraction(self, progress: float) -> float:
        """Always 1."""
        return 1.0


@dataclass(frozen=True)
class Linear(Schedule):
    """In equal steps."""

    def fraction(self, progress: float) -> float:
        """``p``."""
        return progress


@dataclass(frozen=True)
class Cubic(Schedule):
    """Fast at first, slow near the target (Zhu & Gupta 2017).

    >>> [round(0.9 * Cubic()(p), 4) for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
    [0.0, 0.5203, 0.7875, 0.8859, 0.9]
    """

    def fraction(self, progress: float) -> float:
        """``1 - (1 - p)^3``."""
        return 1 - (1 - progress) ** 3


@dataclass(frozen=True)
class Cosine(Schedule):
    """Slow at both ends."""

    def fraction(self, progress: float) -> float:
        """``(1 - cos(pi p)) / 2``."""
        return (1 - math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Levels(Schedule):
    """In ``count`` jumps at equal distances, each removing the same share of what is left (iterative pruning).

    The share is such that the last level is the target itself; ``final`` is the sparsity it leads to.

    >>> [round(0.875 * Levels(3, 0.875)(p), 3) for p in (0.0, 0.34, 0.67, 1.0)]
    [0.0, 0.5, 0.75, 0.875]
    """

    count: int = 5
    final: float = 0.9

    def __post_init__(self) -> None:
        if not (isinstance(self.count, int) and self.count >= 1 and 0 < self.final < 1):
            raise UsageError(f"levels need count >= 1 and 0 < final < 1, not count={self.count}, final={self.final}.")

    def fraction(self, progress: float) -> float:
        """Level ``k`` of ``count`` keeps ``(1 - final)^(k / count)`` of the weights."""
        level = math.floor(progress * self.count + 1e-9)
        return (1 - (1 - self.final) ** (level / self.count)) / self.final


SCHEDULES: dict[str, type[Schedule]] = {
    "one-shot": OneShot,
    "linear": Linear,
    "cubic": Cubic,
    "cosine": Cosine,
    "levels": Levels,
}
"""Names of the schedules in recipes."""
