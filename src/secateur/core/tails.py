"""LAMP's one threshold over many tensors, found without sorting them.

Within a tensor LAMP scores rise with the scores themselves, so it is enough to know how many scores of each tensor
are kept. Histograms of counts and of sums of squares over narrow cells of values bound the LAMP score of every
weight; only cells that the threshold may fall into are read again, value by value. Memory is that of the
histograms, not that of the scores.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from secateur.core.names import Named

_CHUNK = 1 << 19
_SHIFT = 14
"""Bits of a float32 that a cell leaves open: 512 cells between a number and its double."""
_CELLS = (0x3F800000 >> _SHIFT) + 1
"""Scaled scores are at most 1."""
_READ = 1 << 22
"""So many scores are read value by value at a time."""
_SLACK = 1e-5
"""Bounds of cells are wider by this share than rounding of values and sums could ask for."""


@dataclass(frozen=True)
class _Source:
    """The scores of one tensor, and the power of two that brings the largest of them below 1."""

    flat: Tensor
    factor: float

    @classmethod
    def of(cls, score: Tensor) -> _Source:
        """Scores are finite and at least 0."""
        exponent = math.frexp(float(score.max()))[1]
        return cls(score.detach().reshape(-1), math.ldexp(1.0, -max(-1000, exponent)))

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Scaled scores in float64 on the CPU, where sums have one order, and the cell of each."""
        for start in range(0, self.flat.numel(), _CHUNK):
            values = self.flat[start : start + _CHUNK].cpu().double() * self.factor
            yield values, _key(values)


@dataclass(frozen=True)
class _Cells:
    """Scores of a tensor that lie together: neighbours, or equal ones whose LAMP scores are then known one by one.

    Args:
        owner: number of the tensor.
        key: number of the cell in its tensor.
        count: scores in it.
        above: sum of the squares of all larger scores of the tensor.
        square: the square of equal scores; -1 for neighbours.
        low: no LAMP score in it is lower.
        high: no LAMP score in it is higher.
    """

    owner: Tensor
    key: Tensor
    count: Tensor
    above: Tensor
    square: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def equal(cls, owner: Tensor, key: Tensor, count: Tensor, above: Tensor, square: Tensor) -> _Cells:
        """Cells of equal scores: the k-th from above has the LAMP score ``square / (above + k * square)``."""
        low, high = (square / (above + k * square).clamp(min=5e-324) for k in (count, 1))
        return cls(owner, key, count, above, square, low, high)

    @classmethod
    def join(cls, parts: list[_Cells]) -> _Cells:
        """All cells of several lists."""
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    def pick(self, where: Tensor) -> _Cells:
        """Some of the cells."""
        return _Cells(*(getattr(self, f.name)[where] for f in fields(self)))

    def at_least(self, level: float, bound: Tensor) -> Tensor:
        """Scores of each cell that reach a LAMP score of ``level``; of neighbours all do whose ``bound`` does."""
        known = self.square > 0
        square = torch.where(known, self.square, 1.0)
        k = ((square / max(level, 5e-324) - self.above) / square).floor().clamp(min=0).minimum(self.count.double())
        k = torch.where(square / (self.above + (k + 1) * square) >= level, k + 1, k)  # the division may have rounded
        k = torch.where((k > 0) & (square / (self.above + k * square) < level), k - 1, k)
        return torch.where(known, k.long().minimum(self.count), torch.where(bound >= level, self.count, 0))


def lamp_counts(scores: Named, keep: int) -> dict[str, int]:
    """How many scores of each tensor are among the ``keep`` highest LAMP scores; at least one of each tensor.

    Equal LAMP scores count in the order of the tensors.

    Args:
        scores: scores by name, finite and at least 0.
        keep: how many to keep, from the number of tensors to the number of scores.

    Cost: about two passes over the scores. Memory of the histograms, at most 4 MB for each tensor, and about 100 MB.
    Float64 scores that agree to seven digits by the million are sorted, which takes more of both.
    """
    sources = [_Source.of(score) for score in scores.values()]
    # A tensor of zeros would vanish: one of its scores is kept, whatever the others have
    sure = torch.tensor([not bool(source.flat.any()) for source in sources]).long()
    make = (_histogram, _zeros)
    cells = _Cells.join([make[int(sure[i])](i, source) for i, source in enumerate(sources)])
    low = high = 0.0
    while int(sure.sum()) < keep:
        low, high = (_rank(bound, cells.count, keep - int(sure.sum())) for bound in (cells.low, cells.high))
        cells = _settle(cells, low, high, sure)
        if bool((cells.square >= 0).any()):
            low, high = (_exact(cells, bound, keep - int(sure.sum())) for bound in (cells.low, cells.high))
            cells = _settle(cells, low, high, sure)
        if bool((cells.square >= 0).all()):
            break
        cells = _read(sources, cells)
    return dict(zip(scores, _share(cells, keep, low, sure), strict=True))


def _zeros(number: int, source: _Source) -> _Cells:
    """A tensor of zeros, without the one that is kept."""
    none = torch.zeros(1, dtype=torch.float64)
    owner, count = torch.tensor([number]), torch.tensor([source.flat.numel() - 1])
    return _Cells.equal(owner, torch.zeros_like(owner), count, none, none)


def _histogram(number: int, source: _Source) -> _Cells:
    """The cells of one tensor."""
    count = torch.zeros(_CELLS, dtype=torch.int64)
    squares = torch.zeros(_CELLS, dtype=torch.float64)
    for values, keys in source.chunks():
        count += torch.bincount(keys, minlength=_CELLS)
        squares += torch.bincount(keys, weights=values.square_(), minlength=_CELLS)
    key = count.nonzero().reshape(-1)
    count, squares = count[key], squares[key]
    tails = _from_above(squares)
    above = torch.cat([tails[1:], tails.new_zeros(1)])
    smallest = ((key - 1).clamp(min=0) << _SHIFT).int().view(torch.float32).double() - 1e-44
    largest = (key << _SHIFT).int().view(torch.float32).double() + 1e-44
    low = smallest.clamp(min=0).square() / tails.clamp(min=5e-324)
    high = largest.square() / (above + largest.square())
    owner, unknown = torch.full_like(key, number), torch.full_like(above, -1.0)
    return _Cells(owner, key, count, above, unknown, low * (1 - _SLACK), high * (1 + _SLACK))


def _rank(levels: Tensor, count: Tensor, wanted: int) -> float:
    """The highest level that ``wanted`` scores reach when all of a cell have the same level."""
    ordered, order = torch.sort(levels, descending=True)
    return float(ordered[int((count[order].cumsum(0) < wanted).sum())])


def _exact(cells: _Cells, bound: Tensor, wanted: int) -> float:
    """The highest level that ``wanted`` scores reach, by halving the floats between 0 and 2."""
    low, high = 0, _bits(2.0)
    while high - low > 1:
        middle = (low + high) // 2
        enough = int(cells.at_least(_float(middle), bound).sum()) >= wanted
        low, high = (middle, high) if enough else (low, middle)
    return _float(low)


def _settle(cells: _Cells, low: float, high: float, sure: Tensor) -> _Cells:
    """Cells that the threshold, between ``low`` and ``high``, may fall into; those above it are added to ``sure``."""
    inside = cells.low > high
    sure.index_add_(0, cells.owner[inside], cells.count[inside])
    return cells.pick(~inside & (cells.high >= low))


def _read(sources: list[_Source], cells: _Cells) -> _Cells:
    """The cells with neighbours taken apart into equal scores: all of them, or the largest when they hold many."""
    open_ = cells.square < 0
    if int(cells.count[open_].sum()) > _READ:
        open_ &= cells.count * 4 >= cells.count[open_].max()
    parts = [cells.pick(~open_)]
    for number in cells.owner[open_].unique().tolist():
        parts.append(_values(sources[number], cells.pick(open_ & (cells.owner == number))))
    return _Cells.join(parts)


def _values(source: _Source, cells: _Cells) -> _Cells:
    """The scores in some cells of one tensor, as cells of equal ones."""
    place = torch.full((_CELLS,), -1)
    place[cells.key] = torch.arange(len(cells.key))
    found, counts = [], []
    for values, keys in source.chunks():
        value, count = values[place[keys] >= 0].unique(return_counts=True)
        found.append(value)
        counts.append(count)
    value, which = torch.cat(found).unique(return_inverse=True)
    count = torch.zeros(len(value), dtype=torch.int64).index_add_(0, which, torch.cat(counts))
    cell = place[_key(value)]
    sums = count * value.square()
    of_cells = torch.zeros(len(cells.key), dtype=torch.float64).index_add_(0, cell, sums)
    larger = _from_above(sums) - sums - (_from_above(of_cells) - of_cells)[cell]
    owner = cells.owner[cell]
    return _Cells.equal(owner, cells.key[cell], count, cells.above[cell] + larger.clamp(min=0), value.square())


def _from_above(sums: Tensor) -> Tensor:
    """Of each entry: the sum of itself and all later ones."""
    return sums.flip(0).cumsum(0).flip(0)


def _key(values: Tensor) -> Tensor:
    """The cell of each scaled score; cell 0 holds what is 0 in float32."""
    bits = values.float().abs().view(torch.int32)  # abs: -0.0 is 0.0
    return (bits + ((1 << _SHIFT) - 1)) >> _SHIFT


def _share(cells: _Cells, keep: int, level: float, sure: Tensor) -> list[int]:
    """Counts above the threshold, and what is left for those equal to it in the order of the tensors."""
    above, reach = (
        sure.index_add(0, cells.owner, cells.at_least(at, cells.low)) for at in (math.nextafter(level, 2.0), level)
    )
    left, counts = keep - int(above.sum()), []
    for count, more in zip(above.tolist(), (reach - above).tolist(), strict=True):
        counts.append(count + min(left, more))
        left -= min(left, more)
    return counts


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _float(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]
