"""What each option would do to a weight: the pattern's zeros at every density, as columns of a matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.errors import UsageError
from secateur.core.patterns import NM, Block, Pattern, Unit, Unstructured

_SAMPLE = 1 << 16
"""Scores that a threshold is taken from: enough for a density to half a percent."""


def units_kept(pattern: Pattern, shape: tuple[int, ...], density: float) -> int:
    """How many units of a tensor a density means: rounded, at least one; N:M prescribes its own.

    Raises:
        UsageError: for a density outside (0, 1].
    """
    if not 0 < density <= 1:
        raise UsageError(f"the density {density!r} of a layer must be above 0 and at most 1.")
    fixed = pattern.fixed(shape)
    return max(1, round(density * pattern.units(shape))) if fixed is None else fixed


def mask_of(score: Tensor, pattern: Pattern, density: float) -> Tensor:
    """The mask of a layer; at density 1 everything is kept, whatever the pattern."""
    if density == 1:
        return torch.ones_like(score, dtype=torch.bool)
    return pattern.mask(score, units_kept(pattern, tuple(score.shape), density))


@dataclass(frozen=True)
class Zeros:
    """Which weights of a tensor go at each density, for some patterns.

    Args:
        weight: the tensor, its first dimension the outputs.
        goes: for each pattern, from which rung on (0 = the densest) each weight is pruned, uint8 in the tensor's
            shape; the number of rungs for weights that never are.
        rungs: how many rungs each pattern has; N:M has one.
    """

    weight: Tensor
    goes: Mapping[str, Tensor]
    rungs: Mapping[str, int]

    @property
    def width(self) -> int:
        """Number of columns."""
        return sum(self.rungs.values())

    def columns(self, rows: slice) -> Tensor:
        """Change of some outputs' weights under every option: ``(weights, options)``, pattern by pattern."""
        gone = -self.weight[rows].detach().reshape(-1, 1)
        columns = gone.new_empty(len(gone), self.width)
        start = 0
        for name, goes in self.goes.items():
            steps = torch.arange(self.rungs[name], device=gone.device, dtype=torch.uint8)
            pruned = goes[rows].reshape(-1, 1) <= steps
            torch.mul(gone, pruned, out=columns[:, start : start + len(steps)])
            start += len(steps)
        return columns

    def change(self, pattern: str, rung: int) -> Tensor:
        """Change of the whole tensor under one option."""
        return torch.where(self.goes[pattern] <= rung, -self.weight.detach(), torch.zeros_like(self.weight))


@dataclass(frozen=True)
class Solved:
    """Changes that a solver made: the same as :class:`Zeros`, every column held.

    Args:
        weight: the tensor.
        changes: for each pattern one change of the tensor for every rung.
    """

    weight: Tensor
    changes: Mapping[str, Sequence[Tensor]]

    @property
    def rungs(self) -> dict[str, int]:
        """How many rungs each pattern has."""
        return {name: len(every) for name, every in self.changes.items()}

    @property
    def width(self) -> int:
        """Number of columns."""
        return sum(self.rungs.values())

    def columns(self, rows: slice) -> Tensor:
        """As :meth:`Zeros.columns`."""
        return torch.stack([change[rows].reshape(-1) for every in self.changes.values() for change in every], 1)

    def change(self, pattern: str, rung: int) -> Tensor:
        """As :meth:`Zeros.change`."""
        return self.changes[pattern][rung]


def zeros(weight: Tensor, score: Tensor, patterns: Sequence[Pattern], densities: Sequence[float]) -> Zeros:
    """The options of a tensor.

    Densities are met to about half a percent: thresholds come from a sample of the scores.

    Args:
        weight: the tensor.
        score: higher = keep.
        patterns: those that the tensor can take.
        densities: falling, below 1.

    Cost: a pass over the scores for each pattern; a byte for each weight and pattern.
    """
    goes, rungs = {}, {}
    for pattern in patterns:
        if isinstance(pattern, Unstructured | Block | Unit):
            units = pattern.unit_scores(score)
            flat = units.reshape(-1)
            sample = flat[:: max(1, flat.numel() // _SAMPLE)].sort().values
            places = [min(len(sample) - 1, round((1 - d) * len(sample))) for d in densities]
            kept_from = sample[places]  # rising, since densities fall
            first = torch.bucketize(units, kept_from.contiguous(), right=True).to(torch.uint8)
            goes[str(pattern)], rungs[str(pattern)] = _spread(first, pattern, score), len(densities)
        else:
            counts = [None] if pattern.fixed(tuple(score.shape)) is not None else list(densities)
            kept = [pattern.mask(score, units_kept(pattern, tuple(score.shape), d or 0.5)) for d in counts]
            goes[str(pattern)] = torch.stack(kept).sum(0, dtype=torch.uint8)
            rungs[str(pattern)] = len(counts)
    return Zeros(weight, goes, rungs)


def _spread(units: Tensor, pattern: Pattern, score: Tensor) -> Tensor:
    """A value for each unit, at each of its weights."""
    if isinstance(pattern, Block):
        wide = units.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.cols, 1)
        return wide.reshape(score.shape)
    if isinstance(pattern, Unit):
        return units.reshape(-1, *[1] * (score.dim() - 1)).expand(score.shape)
    return units


def fits(pattern: Pattern, shape: tuple[int, ...]) -> bool:
    """Whether a tensor can take a pattern."""
    return not pattern.why_not(shape)


def is_fixed(pattern: Pattern) -> bool:
    """Whether the pattern itself prescribes the density."""
    return isinstance(pattern, NM)
