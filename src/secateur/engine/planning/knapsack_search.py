"""The search behind the knapsack: partial choices that no other beats, cut off by the bound of Lagrange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SLACK = 2.0**-40
"""Bounds are floats and are trusted to this share; whole numbers decide the rest."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Layer:
    """The options of a layer that no other beats in both figures, the lightest first.

    Args:
        index: which of the options given they are.
        weights: ascending, from 0 on.
        values: descending, down to 0.
        corners: those on the lower convex hull, which are the best at some price of a unit of weight.
    """

    index: tuple[int, ...]
    weights: Ints
    values: Ints
    corners: tuple[int, ...]

    @classmethod
    def of(cls, weights: Sequence[int], values: Sequence[int]) -> Layer:
        """From the options as they were given."""
        front: list[int] = []
        for i in sorted(range(len(weights)), key=lambda i: (weights[i], values[i], i)):
            if not front or values[i] < values[front[-1]]:
                front.append(i)
        corners: list[int] = []
        for place, i in enumerate(front):
            while len(corners) > 1 and _above(weights, values, front[corners[-2]], front[corners[-1]], i):
                corners.pop()
            corners.append(place)
        own = np.array([weights[i] for i in front], np.int64), np.array([values[i] for i in front], np.int64)
        return cls(tuple(front), *own, tuple(corners))

    def only(self, kept: Sequence[int]) -> Layer:
        """The layer with some of its options, which must include the corners."""
        place = {old: new for new, old in enumerate(kept)}
        index = tuple(self.index[i] for i in kept)
        return Layer(index, self.weights[list(kept)], self.values[list(kept)], tuple(place[c] for c in self.corners))


def _above(weights: Sequence[int], values: Sequence[int], left: int, middle: int, right: int) -> bool:
    """Whether the middle option lies on or above the line between the others."""
    rise, run = values[right] - values[left], weights[right] - weights[left]
    return (values[middle] - values[left]) * run >= rise * (weights[middle] - weights[left])


@dataclass(frozen=True)
class Tail:
    """What some layers can reach together where an option may be mixed with the next: the bound of Lagrange.

    Args:
        layers: the layers.
        weights: total weight after each of the steps, the most profitable first.
        values: total value then.
        steps: the layer that takes each step to its next corner.
    """

    layers: tuple[Layer, ...]
    weights: Ints
    values: Ints
    steps: NDArray[np.int64]

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> Tail:
        """All steps from corner to corner, in the order of their profit."""
        heavier: list[Ints] = []
        lower: list[Ints] = []
        profit: list[Floats] = []
        for layer in layers:
            at = list(layer.corners)
            heavier.append(np.diff(layer.weights[at]))
            lower.append(np.diff(layer.values[at]))
            profit.append(np.maximum.accumulate(lower[-1] / heavier[-1]))  # rounding must not turn two steps round
        order = np.argsort(_joined(profit, np.float64), kind="stable")
        owner = np.repeat(np.arange(len(layers)), [len(h) for h in heavier]).astype(np.int64)[order]
        first = sum(int(layer.values[0]) for layer in layers)
        weights = np.concatenate([[0], np.cumsum(_joined(heavier, np.int64)[order])]).astype(np.int64)
        values = first + np.concatenate([[0], np.cumsum(_joined(lower, np.int64)[order])]).astype(np.int64)
        return cls(tuple(layers), weights, values, owner)

    def bounds(self, room: Ints) -> Floats:
        """No choice of these layers within ``room`` has a smaller value, but for the rounding of floats."""
        return np.interp(room.astype(np.float64), self.weights.astype(np.float64), self.values.astype(np.float64))

    def reach(self, room: Ints) -> Ints:
        """Values that whole steps reach within ``room``."""
        return self.values[np.searchsorted(self.weights, room, side="right") - 1]

    def choice(self, room: int) -> list[int]:
        """The options that :meth:`reach` means."""
        done = int(np.searchsorted(self.weights, room, side="right")) - 1
        taken = np.bincount(self.steps[:done], minlength=len(self.layers))
        return [layer.corners[n] for layer, n in zip(self.layers, taken.tolist(), strict=True)]

    def price(self, room: int) -> float:
        """Value that one more unit of weight saves at ``room``."""
        done = int(np.searchsorted(self.weights, room, side="right")) - 1
        if done >= len(self.steps):
            return 0.0
        return float(self.values[done] - self.values[done + 1]) / float(self.weights[done + 1] - self.weights[done])


def _joined(parts: Sequence[NDArray], kind: type) -> NDArray:
    return np.concatenate([np.empty(0, kind), *parts])


def search(
    layers: Sequence[Layer], room: int, states: int, fits: Callable[[Sequence[int]], bool], lightest: Sequence[int]
) -> tuple[tuple[int, ...], int] | None:
    """The least sum of values with a sum of weights within ``room``, and a bound that no choice comes below.

    Args:
        layers: what there is to choose from.
        room: at least 0.
        states: partial choices kept at most.
        fits: whether a choice (indices of the options as given) is truly allowed.
        lightest: the choice to fall back on.

    Returns:
        None when that is not allowed either.
    """
    run = _Run(_worthwhile(layers, room), room, states)
    run.go()
    for chosen in (*run.answers(), tuple(lightest)):
        if fits(chosen):
            return chosen, run.bound
    return None


def _worthwhile(layers: Sequence[Layer], room: int) -> list[Layer]:
    """Without the options that cannot be part of a choice better than the first one found."""
    tail = Tail.of(layers)
    price, best = tail.price(room), float(tail.reach(np.array([room]))[0])
    floor = float(tail.bounds(np.array([room]))[0])
    slack = _SLACK * float(tail.values[0])
    kept = []
    for layer in layers:
        priced = layer.values + price * layer.weights
        spare = floor + (priced - priced.min()) <= best + slack
        kept.append(layer.only([i for i in range(len(layer.index)) if spare[i] or i in layer.corners]))
    return kept


class _Run:
    """One search: the layers with the most at stake first."""

    def __init__(self, layers: Sequence[Layer], room: int, states: int) -> None:
        self.order = sorted(range(len(layers)), key=lambda i: (-int(layers[i].values[0]), i))
        self.layers = [layers[i] for i in self.order]
        self.room, self.states = room, states
        self.tails = [Tail.of(self.layers[done:]) for done in range(len(layers) + 1)]
        self.slack = _SLACK * float(self.tails[0].values[0])
        self.weights, self.values = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self.trail: list[tuple[Ints, Ints]] = []
        self.best = int(self.tails[0].reach(np.array([room]))[0])
        self.from_best: list[int] = self.tails[0].choice(room)
        self.lost: int | None = None
        self.floor = self._least(self.tails[0].bounds(np.array([room])))

    @property
    def bound(self) -> int:
        return self.best if self.lost is None else max(self.floor, min(self.best, self.lost))

    def go(self) -> None:
        for layer, tail in zip(self.layers, self.tails[1:], strict=True):
            if self.best <= self.floor:
                return
            self._extend(layer, tail)

    def answers(self) -> list[tuple[int, ...]]:
        """Choices to try, the best first."""
        found = [self.from_best]
        if len(self.trail) == len(self.layers):
            found += [self._back(i) for i in np.argsort(self.values, kind="stable").tolist()]
        return [self._named(choice) for choice in found]

    def _extend(self, layer: Layer, tail: Tail) -> None:
        count = len(self.weights)
        weights = (layer.weights[:, None] + self.weights[None, :]).reshape(-1)
        values = (layer.values[:, None] + self.values[None, :]).reshape(-1)
        alive = np.flatnonzero(weights <= self.room)
        weights, values = weights[alive], values[alive]
        bounds = values + tail.bounds(self.room - weights)
        ends = values + tail.reach(self.room - weights)
        here = int(ends.argmin())
        if int(ends[here]) < self.best:
            self.best = int(ends[here])
            option, parent = divmod(int(alive[here]), count)
            self.from_best = [*self._back(parent), option, *tail.choice(self.room - int(weights[here]))]
        near = np.flatnonzero(bounds - self.slack <= self.best)
        near = near[_front(weights[near], values[near])]
        if len(near) > self.states:
            rank = np.argsort(bounds[near], kind="stable")
            beyond = self._least(bounds[near[rank[self.states :]]])
            self.lost = beyond if self.lost is None else min(self.lost, beyond)
            near = near[np.sort(rank[: self.states])]
        self.weights, self.values = weights[near], values[near]
        options, parents = np.divmod(alive[near], count)
        self.trail.append((options, parents))

    def _least(self, bounds: Floats) -> int:
        """Values are whole, so a bound may be rounded up."""
        return int(np.ceil(bounds.min() - self.slack))

    def _back(self, state: int) -> list[int]:
        chosen = []
        for options, parents in reversed(self.trail):
            chosen.append(int(options[state]))
            state = int(parents[state])
        return chosen[::-1]

    def _named(self, choice: Sequence[int]) -> tuple[int, ...]:
        named = [0] * len(choice)
        for place, layer, option in zip(self.order, self.layers, choice, strict=True):
            named[place] = layer.index[option]
        return tuple(named)


def _front(weights: Ints, values: Ints) -> NDArray[np.int64]:
    """Where the choices stand that no other beats, by ascending weight."""
    order = np.argsort(weights, kind="stable")
    sorted_values = values[order]
    least = np.minimum.accumulate(sorted_values)
    falls = np.ones(len(order), bool)
    falls[1:] = sorted_values[1:] < least[:-1]
    order = order[falls]
    last = np.ones(len(order), bool)
    last[:-1] = weights[order][1:] != weights[order][:-1]
    return order[last]
