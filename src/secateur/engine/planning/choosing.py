"""Which pattern and how many weights each tensor keeps: offers of every tensor, and the best choice among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from secateur.core.patterns import Pattern
from secateur.engine.planning.knapsack import Option, least_cost, least_loss
from secateur.engine.planning.targets import Quantity

__all__ = ["Choice", "Market", "Offer", "Seller", "ladder"]

DENSE = ""
"""The pattern of a tensor that keeps all its weights."""
NANO = 1_000_000
"""Nanoseconds of a millisecond: costs are whole numbers."""
_RUNGS, _HIGH, _LOW = 28, 0.9, 0.005
_EVEN, _FURTHER = 200, 0.9
"""Steps of one density everywhere, down to the last of the even rungs; below it, the ratio of one to the next."""
_ENTRY = 128
"""Bytes that the second tensor of a weight as bits and values takes in a plan file's header."""


@dataclass(frozen=True)
class Offer:
    """One way to prune a tensor, and what it is expected to cost.

    Args:
        pattern: in one word; empty for a tensor that is left as it is.
        kept: weights kept.
        loss: its share of the rise of the loss, before all shares are put on the true scale together.
        ms: milliseconds of the layer; None when they are not known.
        bytes: of the tensor in a plan file.
        macs: multiply-adds of one example.
    """

    pattern: str
    kept: int
    loss: float
    ms: float | None
    bytes: int
    macs: int

    def cost(self, quantity: Quantity) -> int:
        """In whole units: nanoseconds, bytes, multiply-adds, weights."""
        if quantity == "ms":
            return round((self.ms or 0.0) * NANO)
        return {"bytes": self.bytes, "macs": self.macs, "params": self.kept}[quantity]


@dataclass(frozen=True)
class Seller:
    """A tensor and all its offers.

    Args:
        name: the tensor.
        shape: its shape.
        macs: multiply-adds of one of its weights, for one example.
        patterns: the patterns it may take, by their word.
        rise: its share of the rise of the loss under a pattern at a density.
        time: milliseconds of its layer under a pattern at a density; the pattern is empty for the layer as it is.
        densities: rungs of the ladder.
        why: why it takes no pattern at all.
        item: bytes of one of its weights in a plan file.
    """

    name: str
    shape: tuple[int, ...]
    macs: int
    patterns: Mapping[str, Pattern]
    rise: Callable[[str, float], float]
    time: Callable[[str, float], float | None]
    densities: tuple[float, ...]
    why: str = ""
    item: int = 4

    @property
    def total(self) -> int:
        """All its weights."""
        return math.prod(self.shape)

    @cached_property
    def dense(self) -> Offer:
        """The tensor as it is."""
        size = stored(self.total, self.total, self.item)
        return Offer(DENSE, self.total, 0.0, self.time(DENSE, 1.0), size, self._macs(None))

    @cached_property
    def offers(self) -> tuple[Offer, ...]:
        """The tensor as it is, then every pattern from many weights to few."""
        found = [self.dense]
        for word, pattern in self.patterns.items():
            counts = {self._count(pattern, density): None for density in self.densities}
            found += [self.offer(word, kept) for kept in counts if kept < self.total]
        return tuple(found)

    def offer(self, word: str, kept: int) -> Offer:
        """The offer of so many weights under a pattern; all of them are the tensor as it is."""
        if kept >= self.total or not word:
            return self.dense
        density = kept / self.total
        rise = max(0.0, self.rise(word, density))
        size = stored(kept, self.total, self.item)
        return Offer(word, kept, rise, self.time(word, density), size, self._macs(kept))

    def near(self, word: str, density: float) -> Offer:
        """The offer of a pattern at about a density; as it is where it cannot take the pattern."""
        if density >= 1 or word not in self.patterns:
            return self.dense
        return self.offer(word, self._count(self.patterns[word], density))

    def unit(self, word: str) -> int:
        """Weights that a pattern keeps or prunes together; 0 when their number is not free."""
        pattern = self.patterns[word]
        return 0 if pattern.fixed(self.shape) is not None else pattern.unit_size(self.shape)

    def only(self, words: Iterable[str]) -> Seller:
        """The same with some of the patterns."""
        return replace(self, patterns={word: self.patterns[word] for word in words if word in self.patterns})

    def never(self, quantity: Quantity) -> str:
        """Why none of its offers takes less than it takes now; empty when one does."""
        now = self.dense.cost(quantity)
        if self.why or len(self.offers) == 1:
            return self.why or "it cannot take any of the patterns"
        best = min(self.offers[1:], key=lambda offer: offer.cost(quantity))
        if best.cost(quantity) < now:
            return ""
        if quantity == "ms" and self.dense.ms is None:
            return "its milliseconds are not known"
        return f"never pays: at best {said(best, quantity)} ({best.pattern}), as it is {said(self.dense, quantity)}"

    def _count(self, pattern: Pattern, density: float) -> int:
        fixed = pattern.fixed(self.shape)
        size = pattern.unit_size(self.shape)
        return size * (fixed if fixed is not None else max(1, round(density * self.total / size)))

    def _macs(self, kept: int | None) -> int:
        return self.macs * (self.total if kept is None else kept)


@dataclass(frozen=True)
class Choice:
    """An offer of every tensor.

    Args:
        offers: by tensor.
        bound: what the sum of losses (or the cost, where that is least) of no choice among the offers comes below.
        exact: no choice among the offers is better.
    """

    offers: Mapping[str, Offer]
    bound: float = -math.inf
    exact: bool = False

    def cost(self, quantity: Quantity) -> int:
        """Of all tensors together, in whole units."""
        return sum(offer.cost(quantity) for offer in self.offers.values())

    @property
    def loss(self) -> float:
        """Sum of the shares."""
        return math.fsum(offer.loss for offer in self.offers.values())

    @property
    def chosen(self) -> dict[str, tuple[str, float]]:
        """Pattern and density of the tensors that lose weights."""
        return {n: (o.pattern, o.kept / self.totals[n]) for n, o in self.offers.items() if o.pattern}

    totals: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Market:
    """All tensors of a network with their offers."""

    sellers: tuple[Seller, ...]
    even: dict[str, list[Choice]] = field(default_factory=dict, compare=False, repr=False)
    """One density everywhere, from many weights to few, by pattern, once it was asked for."""

    @cached_property
    def totals(self) -> dict[str, int]:
        """Weights of each tensor."""
        return {seller.name: seller.total for seller in self.sellers}

    def now(self, quantity: Quantity) -> int:
        """What all tensors cost as they are."""
        return sum(seller.dense.cost(quantity) for seller in self.sellers)

    def least(self, quantity: Quantity) -> Choice:
        """The cheapest offers, whatever they do to the loss."""
        best = {s.name: min(s.offers, key=lambda o: (o.cost(quantity), o.loss)) for s in self.sellers}
        return Choice(best, totals=self.totals)

    def most(self) -> float:
        """Sum of the losses of the sparsest offers."""
        return math.fsum(max(o.loss for o in s.offers) for s in self.sellers)

    def only(self, words: Iterable[str]) -> Market:
        """The same with some of the patterns."""
        chosen = tuple(words)
        even = {word: made for word, made in self.even.items() if word in chosen}
        return Market(tuple(seller.only(chosen) for seller in self.sellers), even)

    def best(self, quantity: Quantity, limit: int) -> Choice | None:
        """The least loss of all choices that cost at most ``limit``; what is left of it then buys weights back.

        Returns:
            None when even the cheapest offers cost more.
        """
        solved = least_loss(self._options(quantity), limit)
        if solved is None:
            return None
        chosen = {s.name: s.offers[i] for s, i in zip(self.sellers, solved.chosen, strict=True)}
        made = self._filled(Choice(chosen, solved.bound, solved.exact, self.totals), quantity, limit)
        for word in dict.fromkeys(word for s in self.sellers for word in s.patterns):
            even = self.uniform(word, quantity, limit)  # between the rungs it may be better
            if even is not None and even.loss < made.loss:
                made = replace(made, offers=even.offers)
        return made

    def cheapest(self, quantity: Quantity, loss: float) -> Choice | None:
        """The least cost of all choices whose losses sum to at most ``loss``."""
        solved = least_cost(self._options(quantity), loss)
        if solved is None:
            return None
        chosen = {s.name: s.offers[i] for s, i in zip(self.sellers, solved.chosen, strict=True)}
        return Choice(chosen, solved.bound, solved.exact, self.totals)

    def uniform(self, word: str, quantity: Quantity, limit: int) -> Choice | None:
        """The same density of one pattern in all tensors that can take it, as high as the limit allows."""
        known = self.even.setdefault(word, [])
        # step by step: a pattern may take longer at first than the tensor as it is
        for place, density in enumerate(_steps(min((d for s in self.sellers for d in s.densities), default=1.0))):
            if place == len(known):
                offers = {s.name: s.near(word, density) for s in self.sellers}
                known.append(Choice(offers, totals=self.totals))
            if known[place].cost(quantity) <= limit:
                return known[place]
        return None

    def _options(self, quantity: Quantity) -> list[list[Option]]:
        return [[Option(offer.cost(quantity), offer.loss) for offer in s.offers] for s in self.sellers]

    def _filled(self, choice: Choice, quantity: Quantity, limit: int) -> Choice:
        """Weights are bought back up to the next rung, where a unit of cost saves most loss first."""
        offers, room = dict(choice.offers), limit - choice.cost(quantity)
        while room > 0:
            steps = [step for s in self.sellers if (step := _step(s, offers[s.name], quantity, room))]
            if not steps:
                break
            _, name, offer = max(steps, key=lambda step: step[:2])
            room -= offer.cost(quantity) - offers[name].cost(quantity)
            offers[name] = offer
        return replace(choice, offers=offers)


def ladder(total: int = 1) -> tuple[float, ...]:
    """Densities from many weights to few: equal steps in the ratio, then halves down to one of ``total`` weights."""
    even = tuple(_HIGH * (_LOW / _HIGH) ** (i / (_RUNGS - 1)) for i in range(_RUNGS))
    halves = max(0, math.ceil(math.log2(_LOW * max(total, 1))))
    return even + tuple(max(_LOW / 2**i, 1 / total) for i in range(1, halves + 1))


def _steps(lowest: float) -> list[float]:
    """Densities from all weights down to the lowest, in small steps."""
    even = [max(lowest, _LOW) ** (i / _EVEN) for i in range(_EVEN + 1)]
    more = max(0, math.ceil(math.log(min(lowest / _LOW, 1.0)) / math.log(_FURTHER)))
    return even + [max(_LOW * _FURTHER**i, lowest) for i in range(1, more + 1)]


def stored(kept: int, total: int, item: int = 4) -> int:
    """Bytes of a tensor in a plan file: whole, or as a bit for each place and the values that are not zero."""
    return min(item * total, -(-total // 8) + item * kept + _ENTRY)


def said(offer: Offer, quantity: Quantity) -> str:
    """The cost of an offer with its unit."""
    if quantity == "ms":
        return f"{offer.ms or 0.0:.4g} ms"
    return f"{offer.cost(quantity):,} {dict(bytes='bytes', macs='MACs', params='weights')[quantity]}"


def _step(seller: Seller, offer: Offer, quantity: Quantity, room: int) -> tuple[float, str, Offer] | None:
    """The furthest step towards the next denser rung that the room pays for, with the loss it saves for its cost."""
    unit = seller.unit(offer.pattern) if offer.pattern else 0
    if not unit:
        return None
    above = [o.kept for o in seller.offers if o.kept > offer.kept and o.pattern in (offer.pattern, DENSE)]
    low, high = 0, (min(above) - offer.kept) // unit
    now = offer.cost(quantity)
    while low < high:
        middle = (low + high + 1) // 2
        fits = seller.offer(offer.pattern, offer.kept + middle * unit).cost(quantity) - now <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    if not low:
        return None
    found = seller.offer(offer.pattern, offer.kept + low * unit)
    paid = found.cost(quantity) - now
    return (offer.loss - found.loss) / max(paid, 0.5), seller.name, found
