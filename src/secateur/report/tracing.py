"""Follows ``metrics.jsonl`` while it grows: bounded memory, whole lines only, and files that shrink or vanish."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMIT = 400
"""Points kept of a curve; beyond twice as many, neighbours are averaged."""

KEYS = 16
CHUNK = 4 << 20
"""Bytes read at once, so that a page never waits for a huge file; the rest follows with the next calls."""

Pair = tuple[float, float]


@dataclass
class Curve:
    """A curve of any length in bounded memory: each point is the mean of equally many neighbours."""

    every: int = 1
    points: list[Pair] = field(default_factory=list)
    _x: float = 0.0
    _y: float = 0.0
    _n: int = 0

    def add(self, x: float, y: float) -> None:
        """Append a point."""
        self._x, self._y, self._n = self._x + x, self._y + y, self._n + 1
        if self._n == self.every:
            self.points.append((self._x / self._n, self._y / self._n))
            self._x, self._y, self._n = 0.0, 0.0, 0
        if len(self.points) >= 2 * LIMIT:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [((a[0] + b[0]) / 2, (a[1] + b[1]) / 2) for a, b in pairs]
            self.every *= 2

    def all(self) -> list[Pair]:
        """The points; the last one may be the mean of fewer."""
        return [*self.points, *([(self._x / self._n, self._y / self._n)] if self._n else [])]


@dataclass
class Follower:
    """Reads on in a metrics file from where it stopped.

    Args:
        path: the file.
        last: the last whole row.
        length: the highest optimizer step seen.
        odd: figures that were not finite.
        behind: whether more of the file waits to be read.
    """

    path: Path
    curves: dict[str, Curve] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    length: float = 0.0
    odd: int = 0
    behind: bool = False
    _at: int = 0
    _file: tuple[int, int] = (0, 0)
    _skipping: bool = False

    def read(self) -> None:
        """Take in what was written since; begins anew when the file shrank, was replaced or is gone."""
        try:
            with open(self.path, "rb") as file:
                about = os.fstat(file.fileno())
                if about.st_size < self._at or (about.st_dev, about.st_ino) != self._file:
                    self._anew((about.st_dev, about.st_ino))
                file.seek(self._at)
                block = file.read(CHUNK)
        except OSError:
            self._anew((0, 0))
            return
        end = block.rfind(b"\n") + 1
        if not end and len(block) == CHUNK:  # no line of ours is that long
            self._at, self._skipping = self._at + len(block), True
        self._at += end
        self.behind = self._at < about.st_size and len(block) == CHUNK
        lines = block[:end].split(b"\n")
        for line in lines[1:] if self._skipping and end else lines:
            self._take(line)
        self._skipping = self._skipping and not end

    def _anew(self, file: tuple[int, int]) -> None:
        self.curves, self.last, self.length, self.odd = {}, {}, 0.0, 0
        self._at, self._file, self._skipping, self.behind = 0, file, False, False

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            return
        if not isinstance(row, dict):
            return
        x = finite(row.get("step"))
        if x is None:
            return
        self.last |= {key: value for key, value in list(row.items())[: 4 * KEYS] if isinstance(key, str)}
        self.length = max(self.length, x)
        for key, value in row.items():
            if not key.endswith(("loss", "accuracy", "sparsity")):
                continue
            y = finite(value)
            if y is None:
                self.odd += 1
            elif key in self.curves or len(self.curves) < KEYS:
                self.curves.setdefault(key, Curve()).add(x, y)


def finite(entry: Any) -> float | None:
    """The entry as a finite number that a float can hold, else None."""
    if isinstance(entry, bool) or not isinstance(entry, int | float) or abs(entry) > 1e300 or not math.isfinite(entry):
        return None
    return float(entry)
