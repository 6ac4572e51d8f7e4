"""Joules of a call, where the machine exposes its counters and the library that reads them is installed."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from pathlib import Path

from secateur.core.reading import Reading

__all__ = ["COUNTERS", "joules", "why_no_energy"]

COUNTERS = Path("/sys/class/powercap")


def joules(act: Callable[[], object], seconds: float = 1.0, counters: Path = COUNTERS) -> Reading:
    """Joules that the processor's packages take for one call: everything that runs on them meanwhile counts.

    Args:
        act: What to call.
        seconds: How long to repeat it.
        counters: Where Linux shows the processor's energy counters (RAPL).

    Returns:
        A reading; without a value its note says why there is none.
    """
    if why := why_no_energy(counters):
        return _none(why)
    from zeus.monitor import ZeusMonitor

    monitor = ZeusMonitor(gpu_indices=[])
    monitor.begin_window("calls", sync_execution=False)
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or not calls:
        act()
        calls += 1
    spent = monitor.end_window("calls", sync_execution=False).cpu_energy
    if not spent:
        return _none("not exposed by this machine")
    return Reading(sum(spent.values()) / calls, "J", n=calls, note="of a call; all that ran meanwhile counts")


def why_no_energy(counters: Path = COUNTERS) -> str:
    """Why joules cannot be measured; empty when they can.

    Args:
        counters: As for `joules`.
    """
    if not any(_readable(path) for path in counters.glob("*/energy_uj")):
        return "not exposed by this machine"
    return "" if importlib.util.find_spec("zeus") is not None else "needs `pip install zeus`"


def _readable(path: Path) -> bool:
    try:
        return int(path.read_text()) >= 0
    except (OSError, ValueError):
        return False


def _none(why: str) -> Reading:
    return Reading(math.nan, "J", n=0, note=why)
