"""From a target to a choice: by forecast where figures are counted, else by what is measured on a copy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from secateur.core.errors import BudgetError, SecateurError, UsageError
from secateur.engine.planning.choosing import Choice, Market
from secateur.engine.planning.searching import (
    Tried,
    largest,
    lasting,
    next_limit,
    patience,
    read_twice,
    scaled_limit,
)

if TYPE_CHECKING:
    from secateur.engine.planning.planner import Planner

__all__ = ["reach"]

USUAL = ("unstructured", "4x1", "2:4")
"""Patterns that are told of when a target cannot be met."""
_ROUNDS = {"ms": 6, "bytes": 6, "loss": 6, "accuracy": 9}
_SLACK = {"ms": 0.03, "bytes": 0.002, "loss": 0.05, "accuracy": 0.05}
_MOVED = 2e-3
"""By how much, as a share, a limit has to be moved to be told of."""


def reach(planner: Planner) -> tuple[Choice, float | None]:
    """The best choice for the target, and what was measured of it in the quantity of the target.

    Args:
        planner: with its trial open.

    Raises:
        BudgetError: when the target cannot be met.
        UsageError: for a target of accuracy without measuring.
        SecateurError: as measuring does.
    """
    if not planner.aim.resource:
        return _quality(planner)
    if planner.quantity in ("macs", "params") or not planner.how.measure:
        made = planner.market.best(planner.quantity, planner.units(planner.goal))
        if made is None:
            raise _unreachable(planner, planner.figure(planner.market.least(planner.quantity)))
        if planner.quantity in ("ms", "bytes"):
            planner.notes.append(f"{planner.aim} is met by forecast only: nothing was measured on a copy")
        return made, None
    met, best = _search(planner)
    if met is not None:
        _say_moved(planner, met.limit)
        return met.made, met.got
    for words in (planner.how.patterns, *((word,) for word in planner.how.patterns)):  # a forecast may be wrong of one
        last = planner.market.only(words).least(planner.quantity)
        got = planner.read(last)
        if got <= planner.goal and planner.quantity == "ms":
            got = planner.read(last, again=True)
        if got <= planner.goal:
            return last, got
        best = min(best, got)
    raise _unreachable(planner, best, measured=True)


def _search(planner: Planner) -> tuple[Tried[Choice] | None, float]:
    """The choice with the least loss whose measured figure meets the goal, and the least that missed it."""
    quantity, goal = planner.quantity, planner.goal
    start, long = goal, 0.0
    if quantity == "ms" and planner.cost is not None:
        long = lasting(sum(p.numel() for p in planner.prunable.values()), planner.cost.now)
        start = goal * (1 - long * min(planner.cost.error, 0.08) / 2)

    def make(limit: float) -> Choice | None:
        return planner.market.best(quantity, planner.units(limit))

    def search(first: float, high: float) -> tuple[Tried[Choice] | None, Tried[Choice] | None]:
        return largest(
            first, make, planner.read, goal, lambda tried: next_limit(tried, goal, quantity, 0.99 - 0.02 * long),
            rounds=_ROUNDS[quantity], slack=_SLACK[quantity], patience=lambda tries: patience(tries, long), high=high,
        )  # fmt: skip

    if quantity == "ms":
        met, missed = read_twice(search, lambda made: planner.read(made, again=True), start, goal)
    else:
        met, missed = search(start, math.inf)
    return met, missed.got if missed is not None else math.inf


def _say_moved(planner: Planner, limit: float) -> None:
    """Between which offers was chosen, where that is not what the target says: the forecast may be off."""
    by, unit = planner.goal, "ms" if planner.quantity == "ms" else "bytes"
    if abs(limit - by) <= _MOVED * by:
        return
    told = [f"{number:.4g}" if unit == "ms" else f"{math.floor(number):,}" for number in (limit, by)]
    way = "lowered" if limit < by else "raised"
    planner.notes.append(
        f"chosen among offers of at most {told[0]} {unit} by forecast: that limit was {way} from {told[1]} so that the "
        "measured figure meets the target"
    )


def _quality(planner: Planner) -> tuple[Choice, float | None]:
    """The least cost of all choices that make the network no worse than the target."""
    goal, quantity = planner.aim.value, planner.quantity

    def make(limit: float) -> Choice | None:
        return planner.market.cheapest(quantity, limit)

    start = planner.rises.limit(goal if planner.aim.quantity == "loss" else 0.02 * goal)
    if not planner.how.measure:
        if planner.aim.quantity == "accuracy":
            raise UsageError("accuracy is only known by measuring; leave `measure` on, or ask for `loss +0.05`.")
        planner.notes.append(f"{planner.aim} is met by forecast only: nothing was measured on a copy")
        made = make(start)
        return (made if made is not None else planner.market.cheapest(quantity, 0.0)) or _untouched(planner), None
    rounds, slack = _ROUNDS[planner.aim.quantity], _SLACK[planner.aim.quantity]
    met, _ = largest(
        start, make, planner.read, goal, lambda tried: scaled_limit(tried, goal), rounds=rounds, slack=slack, log=True
    )
    if met is None:
        return _untouched(planner), 0.0
    return met.made, met.got


def _untouched(planner: Planner) -> Choice:
    planner.notes.append(f"nothing can be pruned within {planner.aim}: every choice that was tried does more harm")
    return Choice({s.name: s.dense for s in planner.market.sellers}, totals=planner.market.totals)


def _unreachable(planner: Planner, best: float, measured: bool = False) -> BudgetError:
    """That the target cannot be met, and the best that can."""
    unit = {"ms": "ms", "bytes": "bytes", "macs": "MACs", "params": "weights"}[planner.quantity]
    shown = f"{best:.4g}" if planner.quantity == "ms" else f"{math.ceil(best):,}"
    text = (
        f"{planner.aim} cannot be met with {', '.join(planner.how.patterns)}: the best reachable is {shown} {unit} "
        f"({'measured' if measured else 'forecast'})"
    )
    offset = planner.offset(planner.quantity)
    if offset > 0:
        rest = f"{offset:.4g}" if planner.quantity == "ms" else f"{round(offset):,}"
        text += f", of which {rest} {unit} lie outside of the tensors that can be pruned"
    return BudgetError(f"{text}. {_better(planner, unit)}")


def _better(planner: Planner, unit: str) -> str:
    """Which other pattern would do better, and what to do."""
    found: list[tuple[float, str]] = []
    own = planner.figure(planner.market.least(planner.quantity))  # forecast beside forecast
    for word in (word for word in USUAL if word not in planner.how.patterns):
        try:
            priced = planner.how.cost is None and planner.quantity == "ms"
            cost = planner.priced((word,)) if priced else planner.cost
            sellers = tuple(planner.seller(name, (word,), cost, free=True) for name in planner.prunable)
        except SecateurError:
            continue
        found.append((planner.figure(Market(sellers).least(planner.quantity)), word))
    if planner.quantity == "ms" and planner.cost is not None:
        own *= 1 - min(planner.cost.error, 1.0)  # less of a gain is none that a forecast can tell
    better = [f"{word} reaches {figure:.4g} {unit} by forecast" for figure, word in sorted(found) if figure < own]
    told = f"Other patterns: {'; '.join(better)}. " if better else "No other pattern does clearly better. "
    return f"{told}Ask for more, or remove units first (`secateur shrink`)."
