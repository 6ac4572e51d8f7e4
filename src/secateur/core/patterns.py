"""Which shapes zeros may take. A closed set: single weights, N:M groups, blocks, whole output units.

A pattern divides a tensor into *units* that are kept or pruned together. The first dimension of a
tensor is its output dimension, the others are its input dimensions.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.errors import UsageError
from secateur.core.select import top_mask


class Pattern(ABC):
    """Divides a tensor into units that are kept or pruned together."""

    @abstractmethod
    def unit_size(self, shape: tuple[int, ...]) -> int:
        """Weights in one unit."""

    @abstractmethod
    def unit_scores(self, score: Tensor) -> Tensor:
        """One score for each unit: the sum over its weights."""

    @abstractmethod
    def mask(self, score: Tensor, keep: int) -> Tensor:
        """A boolean mask with exactly ``keep`` units kept: those of the highest score, ties by index."""

    def why_not(self, shape: tuple[int, ...]) -> str:
        """Why a tensor of this shape cannot take the pattern; empty when it can."""
        return ""

    def fixed(self, shape: tuple[int, ...]) -> int | None:
        """The number of units the pattern itself prescribes (N:M), or None."""
        return None

    def units(self, shape: tuple[int, ...]) -> int:
        """Number of units in a tensor of this shape."""
        return _count(shape) // self.unit_size(shape)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a tensor that cannot take the pattern.

        Raises:
            UsageError: with the tensor, its shape and the cure.
        """
        why = self.why_not(tuple(shape))
        if why:
            raise UsageError(
                f"`{name}` of shape {tuple(shape)} cannot take the pattern {self}: {why}. "
                f"Leave it out with `--skip '{name}'`, or choose another pattern."
            )


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Single weights, anywhere."""

    def __str__(self) -> str:
        """As the command line takes it."""
        return "unstructured"

    def unit_size(self, shape: tuple[int, ...]) -> int:
        """One."""
        return 1

    def unit_scores(self, score: Tensor) -> Tensor:
        """The scores themselves."""
        return score

    def mask(self, score: Tensor, keep: int) -> Tensor:
        """The ``keep`` largest entries."""
        return top_mask(score, keep)


@dataclass(frozen=True)
class NM(Pattern):
    """At most ``n`` kept weights in each group of ``m`` along the input dimension.

    For convolutions the groups run along the input channels, at every position of the kernel.

    >>> NM(2, 4).mask(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), 2)
    tensor([[False,  True,  True, False]])
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 1 <= self.n < self.m):
            raise UsageError(f"an N:M pattern needs whole numbers 1 <= n < m, not {self.n}:{self.m}; 2:4 is usual.")

    def __str__(self) -> str:
        """As the command line takes it, such as ``2:4``."""
        return f"{self.n}:{self.m}"

    def unit_size(self, shape: tuple[int, ...]) -> int:
        """One."""
        return 1

    def unit_scores(self, score: Tensor) -> Tensor:
        """The scores themselves."""
        return score

    def why_not(self, shape: tuple[int, ...]) -> str:
        """The input width must be a multiple of ``m``."""
        if len(shape) < 2:
            return "it has no input dimension"
        return f"its input width {shape[1]} is not a multiple of {self.m}" if shape[1] % self.m else ""

    def fixed(self, shape: tuple[int, ...]) -> int | None:
        """``n / m`` of the weights."""
        return _count(shape) // self.m * self.n

    def mask(self, score: Tensor, keep: int) -> Tensor:
        """The ``n`` largest of each group; ``keep`` must be the number the pattern prescribes."""
        self.check("score", tuple(score.shape))
        if keep != self.fixed(tuple(score.shape)):
            raise UsageError(f"{self.n}:{self.m} keeps {self.fixed(tuple(score.shape)):,} weights here, not {keep:,}.")
        groups = score.movedim(1, -1)
        shape = groups.shape
        groups = groups.reshape(-1, self.m)
        best = torch.argsort(groups, dim=1, descending=True, stable=True)[:, : self.n]
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True)
        return mask.reshape(shape).movedim(-1, 1).contiguous()


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of ``rows`` outputs by ``cols`` inputs; convolutions are seen as (out, in * kernel) matrices.

    >>> Block(2, 1).mask(torch.tensor([[3.0, 1.0], [0.0, 1.0]]), 1)
    tensor([[ True, False],
            [ True, False]])
    """

    rows: int = 4
    cols: int = 1

    def __post_init__(self) -> None:
        if not (isinstance(self.rows, int) and isinstance(self.cols, int) and min(self.rows, self.cols) >= 1):
            raise UsageError(f"a block needs whole rows and cols of at least 1, not {self.rows}x{self.cols}.")

    def __str__(self) -> str:
        """As the command line takes it, such as ``4x1``."""
        return f"{self.rows}x{self.cols}"

    def unit_size(self, shape: tuple[int, ...]) -> int:
        """``rows * cols``."""
        return self.rows * self.cols

    def why_not(self, shape: tuple[int, ...]) -> str:
        """The matrix must divide into whole blocks."""
        if len(shape) < 2:
            return "it is not a matrix"
        out, width = shape[0], _count(shape[1:])
        if out % self.rows or width % self.cols:
            return f"a {out} x {width} matrix does not divide into {self.rows} x {self.cols} blocks"
        return ""

    def unit_scores(self, score: Tensor) -> Tensor:
        """Sums over blocks, shape ``(out / rows, in / cols)``."""
        return self._blocks(score).sum((1, 3), dtype=_wide(score))

    def mask(self, score: Tensor, keep: int) -> Tensor:
        """The ``keep`` blocks of the largest sum."""
        self.check("score", tuple(score.shape))
        chosen = top_mask(self.unit_scores(score), keep)
        return chosen[:, None, :, None].expand(self._blocks(score).shape).reshape(score.shape)

    def _blocks(self, score: Tensor) -> Tensor:
        out, width = score.shape[0], _count(tuple(score.shape[1:]))
        return score.reshape(out // self.rows, self.rows, width // self.cols, self.cols)


@dataclass(frozen=True)
class Unit(Pattern):
    """Whole output units (rows of a matrix, filters of a convolution) as zeros."""

    def __str__(self) -> str:
        """As the command line takes it."""
        return "unit"

    def unit_size(self, shape: tuple[int, ...]) -> int:
        """Weights of one output unit."""
        return _count(shape[1:])

    def why_not(self, shape: tuple[int, ...]) -> str:
        """Needs an output dimension and an input dimension."""
        return "" if len(shape) >= 2 else "it has no input dimension"

    def unit_scores(self, score: Tensor) -> Tensor:
        """Sums over each output unit, shape ``(out,)``."""
        return score.reshape(score.shape[0], -1).sum(1, dtype=_wide(score))

    def mask(self, score: Tensor, keep: int) -> Tensor:
        """The ``keep`` output units of the largest sum."""
        self.check("score", tuple(score.shape))
        chosen = top_mask(self.unit_scores(score), keep)
        return chosen.reshape(-1, *[1] * (score.dim() - 1)).expand(score.shape).clone()


def parse_pattern(text: str) -> Pattern:
    """A pattern from the word that it prints as.

    >>> parse_pattern("2:4"), parse_pattern("4x1"), parse_pattern("unstructured")
    (NM(n=2, m=4), Block(rows=4, cols=1), Unstructured())

    Raises:
        UsageError: when the word is none.
    """
    word = str(text).strip().lower()
    pair = re.fullmatch(r"(\d{1,6})([:x])(\d{1,6})", word)
    if pair:
        return (NM if pair[2] == ":" else Block)(int(pair[1]), int(pair[3]))
    if word not in ("unstructured", "nm", "block", "unit"):
        raise UsageError(f"the pattern {text!r} is not understood; write `unstructured`, `4x1`, `2:4` or `unit`.")
    return PATTERNS[word]()


PATTERNS: dict[str, type[Pattern]] = {"unstructured": Unstructured, "nm": NM, "block": Block, "unit": Unit}
"""Names of the patterns in recipes."""


def _wide(score: Tensor) -> torch.dtype:
    """Sums of half-precision scores are kept in float32: rounding them would make ties."""
    return torch.promote_types(score.dtype, torch.float32)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
