"""The largest limit under which what is measured stays within a goal: a bracket that proposals narrow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

T = TypeVar("T")

__all__ = ["Tried", "largest", "lasting", "next_limit", "patience", "read_twice", "scaled_limit"]


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
    patience: Callable[[int], float] = lambda tries: 1.0,
    high: float = math.inf,
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
        patience: from the number of tries to what the slack is multiplied by; infinite takes any that meets the goal.
        high: limits after the first stay below it.

    Returns:
        The best that met the goal and the nearest that did not; None where there is none.
    """
    met: Tried[T] | None = None
    missed: Tried[T] | None = None
    low, limit = (0.0 if log else -math.inf), start
    for tries in range(rounds):
        made = make(limit)
        if made is None:
            low, limit = max(low, limit), _between(limit, high, max(low, limit), log)
            if not math.isfinite(limit):
                break
            continue
        tried = Tried(limit, made, read(made))
        if tried.got <= goal:
            met, low = (tried if met is None or limit > met.limit else met), max(low, limit)
            if tried.got >= goal * (1 - slack * patience(tries + 1)):
                break
        else:
            missed, high = (tried if missed is None or tried.got < missed.got else missed), min(high, limit)
        limit = _between(propose(tried), high, low, log)
        if limit in (low, high) or (met is not None and math.isinf(patience(tries + 1))):
            break
    return met, missed


def read_twice(
    search: Callable[[float, float], tuple[Tried[T] | None, Tried[T] | None]],
    again: Callable[[T], float],
    start: float,
    goal: float,
    *,
    turns: int = 4,
) -> tuple[Tried[T] | None, Tried[T] | None]:
    """What a search ends at, once a second reading meets the goal too.

    Where readings vary, the one that ends a search was taken because it is low, so it is too low on the average; the
    second is taken whatever it says. Where that one misses, limits below are searched.

    Args:
        search: from a first limit, and one that none after it is above, to the best that met the goal and the nearest
            that did not.
        again: a second reading, apart from those of the search.
        start: the first limit.
        goal: the most that may be measured.
        turns: how many second readings are taken at most.

    Returns:
        The one that met the goal twice, with its second reading, and the nearest that did not; None where there is
        none.
    """
    limit, high, nearest = start, math.inf, None
    for turn in range(turns):
        met, missed = search(limit, high)
        nearest = min((one for one in (nearest, missed) if one is not None), key=lambda one: one.got, default=None)
        if met is None:
            return None, nearest
        second = replace(met, got=again(met.made))
        if second.got <= goal:
            return second, nearest
        nearest = second if nearest is None or second.got < nearest.got else nearest
        limit = high = met.limit * min(1.0, goal / second.got) * (0.98 - 0.03 * turn)
    return None, nearest


def _between(wanted: float, high: float, low: float, log: bool) -> float:
    """The wanted limit when it lies within the bracket, else the middle of it."""
    if low < wanted < high:
        return wanted
    if math.isinf(high):
        return 2 * low if low > 0 else high
    if math.isinf(low):
        return high / 2 if high > 0 else 2 * high
    return math.sqrt(low * high) if log and low > 0 else (low + high) / 2


def lasting(weights: int, ms: float) -> float:
    """Whether trying a choice takes long: 0 up to about a second, 1 from two; by rule, not by the clock."""
    return min(1.0, max(0.0, 0.1 * weights / 1e6 + 12 * ms / 1e3 - 1.0))


def patience(tries: int, long: float) -> float:
    """By what the slack grows: where trying takes long, the last per cents are not worth another round."""
    return math.inf if long >= 1 and tries > 1 else 1 + 3 * long


def next_limit(tried: Tried[Any], goal: float, quantity: str, less: float) -> float:
    """Of bytes a limit off by as much as the figure was; of milliseconds, by the same ratio and a little less."""
    if quantity == "bytes":
        return tried.limit + (goal - tried.got)
    return tried.limit * less * goal / max(tried.got, 1e-9)


def scaled_limit(tried: Tried[Any], goal: float) -> float:
    """The loss grows about in proportion to the sum of its shares."""
    return tried.limit * min(8.0, max(0.125, goal / tried.got)) if tried.got > 0 else 4 * tried.limit
