"""Weights kept in each tensor of many runs, for a page that draws any two of them beside one another."""

from __future__ import annotations

from dataclasses import dataclass

Number = float | int


@dataclass(frozen=True)
class Carrier:
    """One run: its name, which list of tensors it has, and the weights kept in each of them, in per cent."""

    name: str
    tensors: int
    kept: tuple[Number, ...]


@dataclass(frozen=True)
class Overlay:
    """Runs to choose two from.

    Args:
        tensors: lists of tensor names; runs of one network share theirs.
        runs: the runs.
    """

    tensors: tuple[tuple[str, ...], ...]
    runs: tuple[Carrier, ...]
