"""What the scores of a pruning looked like: exact counts of kept and pruned weights by the size of their score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from secateur.core.masks import Masks
from secateur.core.names import Named

__all__ = ["count_scores"]

BINS, DECADES = 40, 12
_DROPPED = 13
"""Lowest bits of a float32 that a bin does not look at: 1,024 numbers are told apart within a factor of two."""
MOST = 200
"""Tensors with counts of their own; of more there are only those of all together."""
_CHUNK = 1 << 17


def count_scores(scores: Named, masks: Mapping[str, Tensor], old: Masks | None = None) -> dict[str, Any]:
    """Counts of weights in bins of ``log10 |score|``, those that are kept and those that go.

    Weights that were pruned before are left out.

    Args:
        scores: a score for each weight, by parameter name.
        masks: what is kept of them.
        old: what was still there before.

    Returns:
        ``edges``: 41 ends of 40 bins, equally far apart by their logarithm (to a thousandth), the same for all tensors;
        a bin holds its lower end and not its upper one. The last lies just above the largest finite ``|score|``; the
        bins span one to twelve powers of ten. Scores are seen in float32. No ends when all scores are zero or infinite.
        ``all``, and ``tensors`` by name, each with ``kept`` and ``pruned`` (lists of 40 counts), ``below`` (pairs kept,
        pruned: smaller than the bins, zero too), ``infinite``, ``negative`` (also counted by their size elsewhere),
        ``lowest_kept`` and ``highest_pruned`` (None where there is none, or it is infinite).

    Cost: about ten passes over the scores, in pieces.
    """
    pieces: dict[str, list[tuple[Tensor, Tensor]]] = {name: _pieces(name, scores, masks, old) for name in scores}
    edges = _edges([score for every in pieces.values() for score, _ in every])
    rows = {name: _count(every, edges) for name, every in pieces.items()}
    whole = _sum(list(rows.values()))
    ends = [_value(key) for key in edges]
    return {"edges": ends if edges[0] < edges[-1] else [], "all": whole, "tensors": rows if len(rows) <= MOST else {}}


def _pieces(name: str, scores: Named, masks: Mapping[str, Tensor], old: Masks | None) -> list[tuple[Tensor, Tensor]]:
    """Scores and masks of the weights that are still there, in parts."""
    score, mask = scores[name].reshape(-1), masks[name].to(scores[name].device).reshape(-1)
    if old is not None and name in old and not bool(old[name].all()):
        there = old[name].to(score.device).reshape(-1)
        score, mask = score[there], mask[there]
    return list(zip(score.split(_CHUNK), mask.split(_CHUNK), strict=True))


def _edges(pieces: list[Tensor]) -> list[int]:
    """Keys of the ends of the bins; those of zero when no score is finite and not zero."""
    least, most = math.inf, 0.0
    for piece in pieces:
        size = piece.float().abs()
        finite = size.masked_fill(size == math.inf, 0)
        least = min(least, float(finite.masked_fill(finite == 0, math.inf).amin()))
        most = max(most, float(finite.amax()))
    if not most:
        return [_key(math.inf)] * (BINS + 1)
    high = math.log10(most)
    low = max(min(math.log10(least), high - 1), high - DECADES, -37)
    between = [_key(10.0 ** (low + (high - low) * i / BINS)) for i in range(BINS)]
    return [*between, _key(most) + 1]


def _key(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32)) >> _DROPPED


def _value(key: int) -> float:
    """The smallest number of a key."""
    number = torch.tensor(key << _DROPPED, dtype=torch.int32).view(torch.float32)
    return min(float(number), torch.finfo(torch.float32).max)


def _count(pieces: list[tuple[Tensor, Tensor]], edges: list[int]) -> dict[str, Any]:
    """Counts of one tensor."""
    keys = edges[-1] - edges[0]
    pairs = torch.zeros(keys + 3, 2, dtype=torch.int64)  # below, the keys, infinite, negative
    kept, pruned = math.inf, -math.inf
    for score, mask in pieces:
        place = (score.float().abs().view(torch.int32) >> _DROPPED) - (edges[0] - 1)
        place = place.clamp_(0, keys + 1).mul_(2).add_(mask)
        counts = torch.bincount(place, minlength=2 * (keys + 2)).view(-1, 2)
        negative = torch.bincount(mask[score < 0].int(), minlength=2)
        pairs += torch.cat([counts, negative[None]]).flip(1).cpu()
        kept = min(kept, float(score.masked_fill(~mask, math.inf).amin()))
        pruned = max(pruned, float(score.masked_fill(mask, -math.inf).amax()))
    bins = [pairs[1 + a - edges[0] : 1 + b - edges[0]].sum(0).tolist() for a, b in pairwise(edges)]
    return {
        "kept": [pair[0] for pair in bins], "pruned": [pair[1] for pair in bins], "below": pairs[0].tolist(),
        "infinite": pairs[-2].tolist(), "negative": pairs[-1].tolist(),
        "lowest_kept": kept if math.isfinite(kept) else None,
        "highest_pruned": pruned if math.isfinite(pruned) else None,
    }  # fmt: skip


def _sum(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts of all tensors together."""
    added = ("kept", "pruned", "below", "infinite", "negative")
    whole: dict[str, Any] = {
        key: [sum(some) for some in zip(*(row[key] for row in rows), strict=True)] for key in added
    }
    kept = [row["lowest_kept"] for row in rows if row["lowest_kept"] is not None]
    pruned = [row["highest_pruned"] for row in rows if row["highest_pruned"] is not None]
    return {**whole, "lowest_kept": min(kept, default=None), "highest_pruned": max(pruned, default=None)}
