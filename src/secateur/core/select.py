"""The exact number of largest scores among many tensors, without sorting or joining them.

Floats map to integers of the same order, and the threshold is found digit by digit from histograms
(radix selection): a few passes over the scores, memory of one chunk, and exact counts even when
millions of scores are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.core.errors import BudgetError, ModelError
from secateur.core.names import Named

_CHUNK = 1 << 17
_DIGIT = 11


class Threshold(NamedTuple):
    """The smallest kept score, how many scores lie above it, and how many equal ones are kept too."""

    value: float
    above: int
    ties: int


def threshold(scores: Sequence[Tensor], keep: int) -> Threshold:
    """The score of rank ``keep`` (1 = largest) over all tensors together.

    Args:
        scores: float tensors of any shape on any device, without NaN.
        keep: how many to keep, ``1 <= keep <= total``.

    Raises:
        BudgetError: when ``keep`` is out of range.

    Cost: three passes over float32 scores (six over float64); about 12 MB of extra memory.
    """
    total = sum(s.numel() for s in scores)
    if not 1 <= keep <= total:
        raise BudgetError(f"cannot keep {keep:,} of {total:,} scores; ask for 1 to {total:,}.")
    wide = any(s.dtype == torch.float64 for s in scores)
    bits = 64 if wide else 32
    prefix, above = 0, 0
    low = bits
    while low:
        high, low = low, max(0, low - _DIGIT)
        counts = _histogram(scores, prefix, high, low, bits)
        digit = len(counts) - 1
        while above + counts[digit] < keep:
            above += counts[digit]
            digit -= 1
        prefix = (prefix << (high - low)) | digit
    return Threshold(_from_key(prefix, bits), above, keep - above)


def _histogram(scores: Sequence[Tensor], prefix: int, high: int, low: int, bits: int) -> list[int]:
    """Counts of the next digit among the scores whose leading digits are ``prefix``."""
    size = 1 << (high - low)
    counts = torch.zeros(size, dtype=torch.int64)
    for tensor in scores:
        flat = tensor.detach().reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            keys = _keys(flat[start : start + _CHUNK], bits)
            if high < bits:
                keys = keys[(keys >> high) & ((1 << (bits - high)) - 1) == prefix]
            digits = (keys >> low) & (size - 1)
            counts += torch.bincount(digits, minlength=size).cpu()
    return counts.tolist()


def _keys(values: Tensor, bits: int) -> Tensor:
    """Integers in the order of the floats: positive ones get the top bit, negative ones are inverted."""
    values = values + 0.0  # -0.0 and 0.0 are one score
    if bits == 32:
        raw = values.float().view(torch.int32).long() & 0xFFFFFFFF
        return torch.where(raw >> 31 == 1, raw ^ 0xFFFFFFFF, raw | 0x80000000)
    raw = values.double().view(torch.int64)
    return torch.where(raw < 0, ~raw, raw | torch.iinfo(torch.int64).min)


def _from_key(key: int, bits: int) -> float:
    top = 1 << (bits - 1)
    raw = key ^ top if key & top else key ^ ((1 << bits) - 1)
    if raw & top:
        raw -= 1 << bits
    kind, real = (torch.int64, torch.float64) if bits == 64 else (torch.int32, torch.float32)
    return torch.tensor(raw, dtype=kind).view(real).item()


def top_counts(scores: Named, keep: int) -> dict[str, int]:
    """How many of the ``keep`` largest scores lie in each tensor; equal ones count in the order of the tensors."""
    cut = threshold(list(scores.values()), keep)
    mixed = len({score.dtype for score in scores.values()}) > 1
    left, counts = cut.ties, {}
    for name, score in scores.items():
        score = score.double() if mixed else score  # a comparison would round the threshold to the type of the tensor
        kept = int((score > cut.value).sum())
        equal = min(left, int((score == cut.value).sum()))
        counts[name] = kept + equal
        left -= equal
    return counts


def top_mask(score: Tensor, keep: int) -> Tensor:
    """True at exactly ``keep`` largest entries; among equal ones those with the lower index.

    Raises:
        BudgetError: when ``keep`` is not within ``0..score.numel()``.
    """
    if not 0 <= keep <= score.numel():
        raise BudgetError(f"cannot keep {keep:,} of {score.numel():,} entries.")
    if keep == 0 or keep == score.numel():
        return torch.full(score.shape, keep > 0, dtype=torch.bool, device=score.device)
    cut = threshold([score], keep)
    mask = (score > cut.value).contiguous()
    equal = (score == cut.value).reshape(-1).nonzero().reshape(-1)[: cut.ties]
    mask.view(-1)[equal] = True
    return mask


def check_scores(scores: Named) -> None:
    """Refuse scores that cannot be ranked.

    Raises:
        ModelError: naming the tensor and the number of values that are NaN.
    """
    for name, score in scores.items():
        bad = int(torch.isnan(score).sum())
        if bad:
            raise ModelError(
                f"{bad:,} of {score.numel():,} scores of `{name}` are NaN: its weights or the gradients there are not "
                "finite. Run `secateur doctor` on the network, or leave the tensor out with `--skip`."
            )


def spread(units: Tensor, kept: Tensor) -> Tensor:
    """The score of each unit on its weights, shared evenly by those that count, so that their mean is that score.

    Patterns of whole units add scores up and allocations compare them by the weight: the mean is what they rank.

    Args:
        units: one score for each row of the first dimension.
        kept: boolean, the shape of the weights; the others score 0.
    """
    share = kept.reshape(len(kept), -1).to(units.dtype)
    return (share * (units / share.mean(1).clamp(min=1e-30))[:, None]).reshape(kept.shape)
