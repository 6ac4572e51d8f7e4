"""N:M groups of columns: the order that lets an N:M pattern keep most, and matrices packed with their indices.

Columns may be put in another order before they are grouped by M. Which N of M survive then changes, and their sum
with it; a good order wins back much of what the pattern loses against the free choice of weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from secateur.core.errors import UsageError
from secateur.core.files import pack_bits, unpack_bits
from secateur.core.patterns import NM

_BYTES = 1 << 27  # of the groups that are compared at once
_CACHE = 1 << 16  # of one column of the pairs that are compared at once, 2:4
_EXHAUSTIVE = 4  # pairs of wider groups have too many splits
_SMALL = 1e-12


def groupings(columns: int, m: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """All ways to part the columns 0, 1, ... into groups of ``m``, each once, whatever the order.

    >>> len(list(groupings(8, 4)))
    35
    """

    def parted(left: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
        if not left:
            yield ()
            return
        for others in itertools.combinations(left[1:], m - 1):
            for rest in parted(tuple(c for c in left[1:] if c not in others)):
                yield ((left[0], *others), *rest)

    if columns % m:
        raise UsageError(f"{columns} columns do not divide into groups of {m}.")
    return parted(tuple(range(columns)))


def count_groupings(columns: int, m: int) -> int:
    """The number of :func:`groupings`: ``C! / (m!^(C/m) (C/m)!)``.

    >>> [count_groupings(columns, 4) for columns in (4, 8, 12, 16)]
    [1, 35, 5775, 2627625]
    """
    return math.factorial(columns) // (math.factorial(m) ** (columns // m) * math.factorial(columns // m))


def kept_sum(score: Tensor, pattern: NM, order: Tensor | None = None) -> float:
    """What an N:M pattern keeps of scores >= 0: the sum of the largest of each group, in float64.

    Args:
        score: ``(out, in, ...)``; groups run along the second dimension.
        pattern: ``n`` of ``m``.
        order: the column that comes to each place, ``(in,)``; as they are by default.
    """
    rows = _rows(score, pattern)
    rows = rows if order is None else rows[:, order.to(rows.device)]
    return float(rows.unflatten(1, (-1, pattern.m)).topk(pattern.n, dim=2).values.sum())


def efficacy(score: Tensor, pattern: NM, order: Tensor) -> float:
    """The share that an order wins back of what the pattern loses against a free choice within each row.

    ``(kept in that order - kept as they are) / (kept by the best N/M of each row - kept as they are)``; 1 where
    nothing is lost.
    """
    rows = _rows(score, pattern)
    plain = kept_sum(score, pattern)
    free = float(rows.topk(rows.shape[1] // pattern.m * pattern.n, dim=1).values.sum())
    return (kept_sum(score, pattern, order) - plain) / (free - plain) if free > plain else 1.0


def search(score: Tensor, pattern: NM, random: Generator | None = None, escapes: int = 100) -> Tensor:
    """An order of the columns in which an N:M pattern keeps more (Pool & Yu 2021).

    Two groups at a time are parted anew in the best of all ways (35 for groups of 4); the pairs of largest gain go
    first, those they touch are looked at again, until none gains. Then a column of each of three groups changes places
    at random, and all begins again from there, ``escapes`` times; the best order counts. Groups wider than 4 have too
    many ways: of those only exchanges of two columns are tried. The result is a local optimum and never worse than no
    change.

    Args:
        score: scores >= 0, such as magnitudes, ``(out, in, ...)``; groups run along the second dimension.
        pattern: ``n`` of ``m``.
        random: draws the escapes; none are made without.
        escapes: how many.

    Returns:
        The column that comes to each place, ``(in,)``; groups stand in the order of their first columns, and columns
        within them too, which changes nothing.

    Raises:
        UsageError: when the columns do not divide into groups.

    Cost: with G groups and R rows, first about ``G² R`` times some hundred operations, then ``G R`` times that for
    each change; memory of 128 MB.
    """
    rows = _rows(score, pattern)
    groups = torch.arange(rows.shape[1], device=rows.device).view(-1, pattern.m)
    if len(groups) < 2:
        return groups.flatten()
    hunt = _Hunt(rows, pattern)
    gains, ways = hunt.table(groups)
    groups, gains, ways = _climb(hunt, groups, gains, ways)
    best, kept = groups, hunt.kept(groups).sum()
    for _ in range(escapes if random is not None else 0):
        trial = best.clone()
        some = torch.randperm(len(best), generator=random)[:3]
        at = torch.randint(pattern.m, (len(some),), generator=random)
        trial[some, at] = best[some.roll(1), at.roll(1)]  # of two groups alone the next step would undo it
        near, their = hunt.refresh(trial, gains.clone(), ways.clone(), some.tolist())
        trial, near, their = _climb(hunt, trial, near, their)
        found = hunt.kept(trial).sum()
        if found > kept * (1 + _SMALL):
            best, kept, gains, ways = trial, found, near, their
    best = best.sort(1).values
    return best[best[:, 0].argsort()].flatten()


class _Hunt:
    """Gains of parting two groups anew, for the columns of one matrix."""

    def __init__(self, rows: Tensor, pattern: NM) -> None:
        self.columns, self.n, self.m = rows.T.contiguous(), pattern.n, pattern.m
        self.splits = _splits(pattern.m).to(rows.device)

    def kept(self, groups: Tensor) -> Tensor:
        """The sum that each group of columns keeps, ``(..., m)`` to ``(...)``."""
        flat = groups.reshape(-1, self.m)
        each = max(1, _BYTES // (self.columns[:1].nbytes * self.m))
        sums = [self._largest(part).sum(1) for part in flat.split(each)]
        return torch.cat(sums).view(groups.shape[:-1])

    def _largest(self, groups: Tensor) -> Tensor:
        """The sum of the N largest of each row: N rounds of comparing neighbours bring them to the end."""
        values = [self.columns[groups[:, i]] for i in range(self.m)]
        for done in range(self.n):
            for i in range(self.m - 1 - done):
                low, high = torch.minimum(values[i], values[i + 1]), torch.maximum(values[i], values[i + 1])
                values[i], values[i + 1] = low, high
        return torch.stack(values[self.m - self.n :]).sum(0)

    def pairs(self, groups: Tensor, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """The largest gain for each pair of groups, and which way of parting them brings it."""
        both = torch.cat([groups[one], groups[other]], 1)
        if (self.n, self.m) == (2, 4):
            each = max(1, _CACHE // self.columns[:1].nbytes)
            sums = torch.cat([self._two_of_four(part) for part in both.split(each)])
        else:
            sums = self.kept(both[:, self.splits]).sum(2)  # of (pairs, ways, 2, m)
        return (sums - sums[:, :1]).max(1)

    def _two_of_four(self, both: Tensor) -> Tensor:
        """The sums of all ways, ``(pairs, ways)``: the larger of a two and their sum serve every group they are in."""
        eight = self.columns[both.T]  # (8, pairs, rows)
        twos = list(itertools.combinations(range(8), 2))
        larger = {duo: torch.maximum(eight[duo[0]], eight[duo[1]]) for duo in twos}
        added = {duo: eight[duo[0]] + eight[duo[1]] for duo in twos}
        sums = []
        for way in self.splits.tolist():
            total = 0.0
            for a, b, c, d in way:  # the two largest are one of each two, or both of one
                found = larger[a, b] + larger[c, d]
                torch.maximum(found, added[a, b], out=found)
                torch.maximum(found, added[c, d], out=found)
                total = total + found.sum(1)
            sums.append(total)
        return torch.stack(sums, 1)

    def table(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Gains and ways of all pairs, in the upper triangle."""
        count = len(groups)
        gains = torch.zeros(count, count, dtype=self.columns.dtype, device=groups.device)
        return self.refresh(groups, gains, torch.zeros_like(gains, dtype=torch.long), list(range(count)))

    def refresh(self, groups: Tensor, gains: Tensor, ways: Tensor, touched: list[int]) -> tuple[Tensor, Tensor]:
        """The same table after some groups have changed; it is written to."""
        stale = torch.zeros_like(gains, dtype=torch.bool)
        stale[touched] = True
        one, other = (stale | stale.T).triu(1).nonzero().T
        each = max(1, _BYTES // (8 * self.splits.numel()))
        for some, more in zip(one.split(each), other.split(each), strict=True):
            gains[some, more], ways[some, more] = self.pairs(groups, some, more)
        return gains, ways


def _climb(hunt: _Hunt, groups: Tensor, gains: Tensor, ways: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Part pairs anew, the largest gain first and no group twice, until no pair gains."""
    groups, least = groups.clone(), _SMALL * float(hunt.columns.sum())
    while True:
        touched: list[int] = []
        order = gains.flatten().sort(descending=True, stable=True)
        for gain, place in zip(order.values.tolist(), order.indices.tolist(), strict=True):
            one, other = divmod(place, len(groups))
            if gain <= least or len(touched) >= len(groups) - 1:
                break
            if one in touched or other in touched:
                continue
            split = torch.cat([groups[one], groups[other]])[hunt.splits[ways[one, other]]]
            groups[one], groups[other] = split[0], split[1]
            touched += [one, other]
        if not touched:
            return groups, gains, ways
        hunt.refresh(groups, gains, ways, touched)


def _splits(m: int) -> Tensor:
    """Ways to part 2m columns into two groups, ``(ways, 2, m)``; the first leaves them as they are."""
    if m <= _EXHAUSTIVE:
        return torch.tensor(list(groupings(2 * m, m)))
    ways = torch.arange(2 * m).view(2, m).repeat(m * m + 1, 1, 1)
    for number, (i, j) in enumerate(itertools.product(range(m), range(m)), 1):
        ways[number, 0, i], ways[number, 1, j] = m + j, i
    return ways


def pack(weight: Tensor, mask: Tensor, pattern: NM) -> tuple[Tensor, Tensor]:
    """The kept values of an N:M matrix and where they stand, with ``ceil(log2 m)`` bits for each.

    2:4 in float16 takes 9/16 of the dense bytes, in int8 10/16.

    Args:
        weight: ``(out, in)``.
        mask: boolean, True = kept, exactly ``n`` in each group of ``m`` columns.
        pattern: ``n`` of ``m``.

    Returns:
        Values ``(out, in / m * n)``, and the places within the groups as packed bytes.

    Raises:
        UsageError: when a group keeps more or fewer.
    """
    pattern.check("weight", tuple(weight.shape))
    groups = mask.reshape(-1, pattern.m)
    if weight.dim() != 2 or not bool((groups.sum(1) == pattern.n).all()):
        raise UsageError(f"only a matrix with exactly {pattern.n} kept of every {pattern.m} inputs can be packed.")
    places = groups.nonzero()[:, 1]
    bits = torch.stack([(places >> b) & 1 for b in range(_bits(pattern))], 1).bool()
    return weight[mask].view(len(weight), -1), pack_bits(bits)


def unpack(values: Tensor, places: Tensor, pattern: NM) -> Tensor:
    """The matrix of which :func:`pack` has made values and places; zeros elsewhere."""
    bits = unpack_bits(places, (values.numel(), _bits(pattern))).long()
    at = sum((bits[:, b] << b for b in range(_bits(pattern))), torch.zeros_like(bits[:, 0]))
    groups = values.new_zeros(values.numel() // pattern.n, pattern.m)
    groups.scatter_(1, at.view(-1, pattern.n), values.reshape(-1, pattern.n))
    return groups.view(len(values), -1)


def _bits(pattern: NM) -> int:
    return (pattern.m - 1).bit_length()


def _rows(score: Tensor, pattern: NM) -> Tensor:
    """Scores as ``(everything else, in)`` in float64."""
    pattern.check("score", tuple(score.shape))
    return score.detach().movedim(1, -1).reshape(-1, score.shape[1]).double()
