"""How far forecasts of milliseconds are off: plans are opened anew and timed, and remembered for each network."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import numpy as np
from torch import nn

from secateur.core.errors import SecateurError
from secateur.core.names import parameters, unwrap
from secateur.engine.planning.clocks import QUARTILE, clocked, steady
from secateur.engine.planning.costs import NetworkCost, random_plans
from secateur.engine.planning.table import CostTable, Machine
from secateur.engine.planning.variants import Variants, arrays_of
from secateur.runtime.session import Session

__all__ = ["ENOUGH", "FLOOR", "Pair", "checked", "network_key", "off", "remember", "stated"]

Pair = tuple[float, float]
SHARE = 0.9  # of the measured plans stay within the error that is stated
FLOOR = 0.1  # least error stated of a network that few plans were held against the clock of
ENOUGH = 30  # plans of a network, timed on several occasions, that speak for themselves
SOME = 9  # plans without which nine of ten cannot be told
LIKE = 4.0  # times as long or as short a call of another network may take that speaks for this one
ROUNDS, TURN, MOST = 4, 3.0, 30  # of a check: rounds, milliseconds of calls in one, calls in one


def network_key(model: nn.Module, example: Any) -> str:
    """A short name of a network's structure and of the shapes of a batch; the weights do not count."""
    shapes = [(name, tuple(p.shape)) for name, p in parameters(model).items()]
    inputs = [(array.shape, str(array.dtype)) for array in arrays_of(example)]
    text = re.sub("0x[0-9a-fA-F]+", "", str(unwrap(model)))  # places in memory, of functions
    return hashlib.sha256(json.dumps([text, shapes, inputs]).encode()).hexdigest()[:16]


def checked(
    variants: Variants, cost: NetworkCost, begin: int, least: int, most: int, seconds: float, stop: Callable[[], bool]
) -> list[Pair]:
    """Forecast and measured milliseconds of random plans, each written and opened anew.

    Args:
        variants: Of the network.
        cost: The forecast.
        begin: Number of the first plan: others are drawn each time.
        least: Plans, however long they take.
        most: Plans at most.
        seconds: Of the clock, about.
        stop: Asked before each plan whether to end.
    """
    found: list[Pair] = []
    if most < 1 or not cost.layers:
        return found
    began = time.perf_counter()
    with variants.as_it_is() as base:
        for number, plan in enumerate(random_plans(cost, begin + most, seed=1)[begin:], begin):
            if stop() or len(found) >= least and time.perf_counter() - began > seconds:
                break
            with variants.session(plan, number) as session:
                found.append((cost.total(plan), _milliseconds(session, base, variants.arrays, cost.threads)))
    return found


def _milliseconds(session: Session, base: Session, arrays: Sequence[np.ndarray], threads: int) -> float:
    """Of a call, in turn with the network as it is: so are plans timed."""
    calls: list[tuple[float, bool]] = []
    for _ in range(ROUNDS):
        base(*arrays)
        session(*arrays)
        turn: list[tuple[float, bool]] = []
        while len(turn) < 2 or sum(ms for ms, _ in turn) < TURN and len(turn) < MOST:
            turn.append(clocked(lambda: session(*arrays), threads))
        calls += turn
    return float(np.percentile(steady(calls), QUARTILE))


def off(pair: Pair) -> float:
    """By what share forecast and measured differ, of the less: an interval of it around either holds the other."""
    forecast, measured = pair
    return max(forecast / measured, measured / forecast) - 1


def stated(table: CostTable, machine: Machine, network: str, now: float) -> float:
    """The error that nine of ten plans of a network stay within; NaN where no plan was ever timed.

    That of its own plans, where those are many; else no less than a tenth, and where they are very few those of
    networks whose calls take about as long count too.

    Args:
        table: With the plans that were timed.
        machine: Where.
        network: As of `network_key`.
        now: Milliseconds of a call.
    """
    networks = table.checks.get(str(machine), {})
    own = [off(pair) for pair in networks.get(network, [])]
    if len(own) >= ENOUGH:
        return bound(own)
    if len(own) < SOME:
        others = [pair for name, pairs in networks.items() if name != network for pair in pairs]
        like = [pair for pair in others if max(pair[0] / now, now / pair[0]) <= LIKE] if now > 0 else []
        own += [off(pair) for pair in like or ([] if own else others)]
    return max(FLOOR, bound(own)) if own else math.nan


def bound(errors: Sequence[float]) -> float:
    """What one more error stays below nine times in ten, whatever they are drawn from; their largest if they are few.

    Of n + 1 errors in any order the last is as likely the smallest as the largest, so it is among the k smallest with
    probability k / (n + 1).
    """
    rank = math.ceil(SHARE * (len(errors) + 1))
    return sorted(errors)[min(rank, len(errors)) - 1]


def remember(cost: NetworkCost, pairs: Sequence[Pair], cache: str | PathLike[str] | None = None) -> None:
    """Keep forecasts and what the clock said of them, for the errors stated from now on.

    Args:
        cost: By which they were forecast.
        pairs: Forecast and measured milliseconds.
        cache: Folder of the table.
    """
    if not (cost.network and pairs):
        return
    table, machine = CostTable.open(cache), Machine.here(cost.isa, cost.threads)
    for forecast, measured in pairs:
        table.check(machine, cost.network, forecast, measured)
    with contextlib.suppress(SecateurError):  # the notes of the cost have said that the folder cannot be written
        table.save()
