"""One option of every layer: the least loss within a cost, or the least cost within a loss, with a proof.

Both are a knapsack with choices. Costs and losses are turned into whole numbers without rounding (a float is a
fraction), so sums are exact; only where they would need more than 61 bits are they rounded down, which can only lower
the bound. Layer after layer the choices that no other beats in both figures are kept; those that cannot come below the
best choice found so far, by the bound of Lagrange on the layers to come, are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from secateur.core.errors import UsageError
from secateur.engine.planning.knapsack_search import Layer, search

_BITS = 61


@dataclass(frozen=True)
class Option:
    """One way to prune a layer.

    Args:
        cost: what the layer costs then, in whole units: nanoseconds, bytes, MACs, weights.
        loss: its share of the rise of the loss; any finite number.
    """

    cost: int
    loss: float


@dataclass(frozen=True)
class Solution:
    """One option of every layer.

    Args:
        chosen: the index of the option of each layer.
        cost: sum of the costs.
        loss: sum of the losses (rounded once, as ``math.fsum``).
        bound: what no choice within the limit can come below: of the loss, or of the cost for :func:`least_cost`.
        exact: no choice is better, but for the rounding of sums that need more than 61 bits.
    """

    chosen: tuple[int, ...]
    cost: int
    loss: float
    bound: float
    exact: bool


def least_loss(options: Sequence[Sequence[Option]], limit: int, states: int = 50_000) -> Solution | None:
    """The choice of the least total loss whose total cost is at most ``limit``; of equal ones any.

    Args:
        options: the options of each layer.
        limit: the most that all may cost together.
        states: partial choices that are kept at most; where they do not suffice, the answer may lack proof (``exact``
            says so) and ``bound`` says how far from the best it can be.

    Returns:
        None when even the cheapest options cost more.

    Raises:
        UsageError: for a layer without options, a cost that is no whole number, a loss that is not finite.

    Cost: up to ``states`` times the options, for each layer; far less where the bound is tight.
    """
    _check(options, states)
    costs, losses = _whole_costs(options), _whole_losses(options)
    room = math.floor((limit - costs.base) / costs.unit)
    return _solution(options, losses, _search(costs, losses, room, states, lambda chosen: True))


def least_cost(options: Sequence[Sequence[Option]], limit: float, states: int = 50_000) -> Solution | None:
    """The choice of the least total cost whose total loss is at most ``limit``; of equal ones any.

    Args:
        options: the options of each layer.
        limit: the most that the losses may be together, their sum rounded once as ``math.fsum`` does.
        states: as for :func:`least_loss`.

    Returns:
        None when even the options of the least loss lose more. ``bound`` is that of the cost.

    Raises:
        UsageError: as :func:`least_loss`, and for a limit that is not a number.

    Cost: as :func:`least_loss`.
    """
    _check(options, states)
    if math.isnan(limit):
        raise UsageError("the limit of the loss is not a number; give the rise that may be lost, such as 0.05.")
    costs, losses = _whole_costs(options), _whole_losses(options)
    room = _room(limit, losses)
    return _solution(options, costs, _search(losses, costs, room, states, lambda c: _loss(options, c) <= limit))


@dataclass(frozen=True)
class _Whole:
    """A figure of every option in whole numbers from 0 on: the true sum of some is ``base + unit * their sum``."""

    numbers: list[list[int]]
    base: Fraction
    unit: Fraction

    @property
    def most(self) -> int:
        return sum(max(every) for every in self.numbers)


@dataclass(frozen=True)
class _Found:
    chosen: tuple[int, ...]
    bound: int
    exact: bool


def _check(options: Sequence[Sequence[Option]], states: int) -> None:
    if states < 1:
        raise UsageError(f"states is {states}; at least one partial choice must be kept; 50000 is usual.")
    for layer, every in enumerate(options):
        if not every:
            raise UsageError(f"layer {layer} has no option; give at least one, such as the dense layer.")
        for option in every:
            if not isinstance(option.cost, int) or not math.isfinite(option.loss):
                raise UsageError(
                    f"layer {layer} has the option {option}; a cost is a whole number and a loss is finite. "
                    "Leave out options that cannot be had."
                )


def _loss(options: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    return math.fsum(every[i].loss for every, i in zip(options, chosen, strict=True))


def _solution(options: Sequence[Sequence[Option]], value: _Whole, found: _Found | None) -> Solution | None:
    if found is None:
        return None
    cost = sum(every[i].cost for every, i in zip(options, found.chosen, strict=True))
    bound = _below(value.base + value.unit * found.bound)
    return Solution(found.chosen, cost, _loss(options, found.chosen), bound, found.exact)


def _below(number: Fraction) -> float:
    """The largest float that is not above it."""
    try:
        near = float(number)
    except OverflowError:
        return -math.inf if number < 0 else float(np.finfo(np.float64).max)
    return near if Fraction(near) <= number else math.nextafter(near, -math.inf)


def _whole_costs(options: Sequence[Sequence[Option]]) -> _Whole:
    return _based([[option.cost for option in every] for every in options], 1)


def _whole_losses(options: Sequence[Sequence[Option]]) -> _Whole:
    """A float is a whole number over a power of two, so the largest of these powers makes all of them whole."""
    ratios = [[float(option.loss).as_integer_ratio() for option in every] for every in options]
    most = max((below for every in ratios for _, below in every), default=1)
    return _based([[above * (most // below) for above, below in every] for every in ratios], most)


def _based(numbers: list[list[int]], below: int) -> _Whole:
    """Each layer's least number becomes 0; a common factor goes into the unit."""
    least = [min(every) for every in numbers]
    rest = [[n - low for n in every] for every, low in zip(numbers, least, strict=True)]
    common = math.gcd(*(n for every in rest for n in every)) or 1
    shared = [[n // common for n in every] for every in rest]
    return _Whole(shared, Fraction(sum(least), below), Fraction(common, below))


def _room(limit: float, losses: _Whole) -> int:
    """The largest sum whose true value, rounded to a float, may be at most ``limit``."""
    if math.isinf(limit):
        return losses.most if limit > 0 else -1
    after = math.nextafter(limit, math.inf)
    middle = Fraction(limit) if math.isinf(after) else (Fraction(limit) + Fraction(after)) / 2
    return math.floor((middle - losses.base) / losses.unit)


def _search(
    weight: _Whole, value: _Whole, room: int, states: int, fits: Callable[[Sequence[int]], bool]
) -> _Found | None:
    """The least sum of ``value`` with a sum of ``weight`` of at most ``room``."""
    if room < 0:
        return None
    shift = max(0, weight.most.bit_length() - _BITS), max(0, value.most.bit_length() - _BITS)
    layers = [
        Layer.of([w >> shift[0] for w in weights], [v >> shift[1] for v in values])
        for weights, values in zip(weight.numbers, value.numbers, strict=True)
    ]

    def whole(chosen: Sequence[int]) -> bool:
        return sum(every[i] for every, i in zip(weight.numbers, chosen, strict=True)) <= room and fits(chosen)

    lightest = [every.index(0) for every in weight.numbers]
    found = search(layers, min(room, weight.most) >> shift[0], states, whole, lightest)
    if found is None:
        return None
    chosen, bound = found
    reached = sum(every[i] >> shift[1] for every, i in zip(value.numbers, chosen, strict=True))
    return _Found(chosen, bound << shift[1], reached <= bound)
