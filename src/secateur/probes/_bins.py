"""Confidence beside accuracy, in bins."""

from __future__ import annotations

import torch
from torch import Tensor


def which_bin(confidence: Tensor, bins: int) -> Tensor:
    """Number of the bin ``(k/M, (k+1)/M]`` that holds each confidence; 0 goes to the first bin, 1 to the last.

    >>> which_bin(torch.tensor([0.0, 0.2, 0.21, 1.0], dtype=torch.float64), 5)
    tensor([0, 0, 1, 4])
    """
    inner = torch.arange(1, bins, device=confidence.device, dtype=confidence.dtype) / bins
    return torch.bucketize(confidence.contiguous(), inner)


def expected_error(count: Tensor, confidence: Tensor, right: Tensor) -> Tensor:
    """``Σ_b |right_b - confidence_b| / Σ_b count_b`` from the sums in each bin (last dimension).

    It equals the mean over examples of each bin's ``|accuracy - mean confidence|``; empty bins add nothing.
    """
    return (right - confidence).abs().sum(-1) / count.sum(-1)


def equal_count_error(confidence: Tensor, right: Tensor, bins: int) -> float:
    """Calibration error over ``bins`` runs of the sorted confidences whose lengths differ by at most one.

    Examples of equal confidence share their mean accuracy, so that the order of the data cannot matter where a
    run ends between them. Both (n,), on the CPU.
    """
    values, index = confidence.unique(sorted=True, return_inverse=True)
    size = torch.bincount(index, minlength=len(values)).double()
    share = torch.bincount(index, weights=right.double(), minlength=len(values)) / size
    order = index.sort().values
    gaps = share[order] - values.double()[order]
    return sum(abs(float(part.sum())) for part in gaps.tensor_split(bins)) / len(gaps)
