"""How sure a network is, and whether it may be: reliability bins and histograms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from secateur.engine.damage.outputs import BINS, Outputs
from secateur.probes._bins import which_bin

CONFIDENCES, LEADS = 20, 40
"""Bins of the two histograms; those of margins are as many as those of leads."""


def certainty(found: Outputs) -> dict[str, Any]:
    """Calibration of one network.

    Args:
        found: its answers.

    Returns:
        ``ece``: the expected calibration error with its 95 % interval, a reading of the calibration probe, and its
        parts ``mce``, ``nll``, ``brier``, ``accuracy`` and ``confidence``. ``bins``: the probe's 15 bins of equal
        width ``(low, high]``, each with ``count``, mean ``confidence`` and ``accuracy`` (None for an empty bin).
        ``confidences`` and ``leads``: histograms with ``edges`` and counts of ``right`` and ``wrong`` answers; a lead
        is the probability of the right class less the highest other one, in [-1, 1].
    """
    parts = found.calibration.parts
    return {
        "ece": replace(found.calibration, parts={}),
        **{key: parts[key] for key in ("mce", "nll", "brier", "accuracy", "confidence")},
        "bins": [_bin(parts, i) for i in range(BINS)],
        "confidences": histogram(found.confidence, found.right, 0.0, 1.0, CONFIDENCES),
        "leads": histogram(found.lead, found.right, -1.0, 1.0, LEADS),
    }


def _bin(parts: Mapping[str, float], i: int) -> dict[str, Any]:
    inside = {key: parts.get(f"bin:{i}:{key}") for key in ("confidence", "accuracy")}
    return {"low": i / BINS, "high": (i + 1) / BINS, "count": int(parts.get(f"bin:{i}:count", 0)), **inside}


def histogram(shares: Tensor, right: Tensor, low: float, high: float, bins: int) -> dict[str, Any]:
    """Counts of right and of wrong answers in ``bins`` bins ``(a, b]`` of equal width between ``low`` and ``high``."""
    place = which_bin((shares - low) / (high - low), bins)
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    return {
        "edges": edges.tolist(),
        "right": torch.bincount(place[right], minlength=bins).tolist(),
        "wrong": torch.bincount(place[~right], minlength=bins).tolist(),
    }
