"""The largest limit under which what is measured stays within a goal: a bracket that proposals narrow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

__all__ = ["Tried", "largest"]


@dataclass(frozen=True)
class Tried(Generic[T]):
    """One limit that was tried.

    Args:
        limit: the limit.
        made: what it led to.
        got: what was measured of it.
    """

    limit: float
    made: T
    got: float


def largest(
    start: float,
    make: Callable[[float], T | None],
    read: Callable[[T], float],
    goal: float,
    propose: Callable[[Tried[T]], float],
    *,
    rounds: int,
    slack: float,
    log: bool = False,
) -> tuple[Tried[T] | None, Tried[T] | None]:
    """Try limits until what is measured is at most the goal and near it, or the rounds are over.

    Args:
        start: the first limit.
        make: from a limit to a thing; None when the limit is too low for any.
        read: what is measured of it; it grows with the limit, but for noise.
        goal: the most that may be measured.
        propose: from the last one tried to the next limit; one outside of the bracket is replaced by its middle.
        rounds: how many limits are tried at most.
        slack: how far below the goal, as a share of it, is near enough.
        log: take the middle in the ratio.

    Returns:
        The best that met the goal and the nearest that did not; None where there is none.
    """
    met: Tried[T] | None = None
    missed: Tried[T] | None = None
    low, high, limit = (0.0 if log else -math.inf), math.inf, start
    for _ in range(rounds):
        made = make(limit)
        if made is None:
            low, limit = max(low, limit), _between(limit, high, max(low, limit), log)
            if not math.isfinite(limit):
                break
            continue
        tried = Tried(limit, made, read(made))
        if tried.got <= goal:
            met, low = (tried if met is None or limit > met.limit else met), max(low, limit)
            if tried.got >= goal * (1 - slack):
                break
        else:
            missed, high = (tried if missed is None or tried.got < missed.got else missed), min(high, limit)
        limit = _between(propose(tried), high, low, log)
        if limit in (low, high):
            break
    return met, missed


def _between(wanted: float, high: float, low: float, log: bool) -> float:
    """The wanted limit when it lies within the bracket, else the middle of it."""
    if low < wanted < high:
        return wanted
    if math.isinf(high):
        return 2 * low if low > 0 else high
    if math.isinf(low):
        return high / 2 if high > 0 else 2 * high
    return math.sqrt(low * high) if log and low > 0 else (low + high) / 2
