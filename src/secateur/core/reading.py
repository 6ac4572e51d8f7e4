"""Two records: what was measured, and which paper a method comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Reading:
    """One measured value with its unit and its error.

    ``stderr`` (or the interval ``low``..``high``) is present whenever chance was involved.

    Args:
        value: the measured value.
        unit: its unit, for example ``"%"``, ``"ms"``, ``"MAC"``; ``""`` for a pure number.
        stderr: standard error of ``value``.
        low: lower end of the 95 % interval.
        high: upper end of the 95 % interval.
        n: how many examples, draws or rounds stand behind it.
        parts: named pieces, such as one figure a layer.
        note: anything a reader must know, in one sentence.
    """

    value: float
    unit: str = ""
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 1
    parts: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; NaN and infinity become strings, which JSON lacks."""
        table = asdict(self)
        table["parts"] = {name: _out(part) for name, part in self.parts.items()}
        return {key: _out(entry) if isinstance(entry, float) else entry for key, entry in table.items()}

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Reading:
        """The inverse of :meth:`to_json`."""
        back: dict[str, Any] = {
            key: _in(entry) if key in ("value", "stderr", "low", "high") else entry for key, entry in table.items()
        }
        back["parts"] = {name: _in(part) for name, part in table.get("parts", {}).items()}
        return cls(**back)


def _out(number: float | None) -> float | str | None:
    return str(number) if number is not None and not math.isfinite(number) else number


def _in(entry: float | str | None) -> float | None:
    return float(entry) if isinstance(entry, str) else entry


@dataclass(frozen=True)
class Paper:
    """Where a method comes from and how this code departs from it.

    Args:
        title: title of the paper.
        authors: family names.
        year: year of publication.
        where: arXiv number, DOI or venue.
        differs: how this code departs from the paper; say ``"in nothing known"`` when it does not.
    """

    title: str
    authors: str
    year: int
    where: str
    differs: str
