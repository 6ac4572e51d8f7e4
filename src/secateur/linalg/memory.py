"""Large allocations are announced, and refused when they cannot fit, with the cheaper way by name."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path

import torch

from secateur.core.errors import UsageError

LARGE = 1 << 30
"""Bytes (1 GB) from which an allocation is announced."""


def estimate(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    """Bytes of a tensor.

    >>> estimate((1000, 1000), torch.float64)
    8000000
    """
    return math.prod(shape) * dtype.itemsize


def available(device: torch.device | str = "cpu") -> int | None:
    """Bytes that can be allocated on a device without swapping; None where that cannot be known."""
    device = torch.device(device)
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    known = [room for room in (_machine(), _container()) if room is not None]
    return min(known) if known else None


def check(needed: int, what: str, instead: str, device: torch.device | str = "cpu") -> None:
    """Say so before a large allocation; refuse one that does not fit.

    Args:
        needed: bytes.
        what: what they are for, for example ``"the inverse of 20,000 weights"``.
        instead: the cheaper way, as an instruction, for example ``"use MFac"``.
        device: where they will be.

    Raises:
        UsageError: when less is available; below 1 GB nothing is asked.

    Warns:
        UserWarning: from 1 GB on.
    """
    if needed < LARGE:
        return
    room = available(device)
    if room is not None and needed > room:
        raise UsageError(
            f"{what} needs {needed / LARGE:,.1f} GB and {device} has {room / LARGE:,.1f} GB left. To do with less, "
            f"{instead}."
        )
    warnings.warn(f"{what} takes {needed / LARGE:,.1f} GB. To do with less, {instead}.", stacklevel=3)


def _machine() -> int | None:
    """What Linux calls available (free or given back on demand), or else all memory there is."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _container() -> int | None:
    """What the control group of this process (a container) has left."""
    try:
        folder = Path("/sys/fs/cgroup")
        return int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None
