"""What a plan is to reach: milliseconds, bytes, multiply-adds, weights, or how much worse the network may become."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from secateur.core.errors import BudgetError, UsageError

__all__ = ["Aim", "is_aim", "parse_aim"]

Quantity = Literal["ms", "bytes", "macs", "params", "loss", "accuracy"]
RESOURCES: tuple[Quantity, ...] = ("ms", "bytes", "macs", "params")
"""Quantities of which a network takes less after pruning; of the others it gets worse."""

FORM = (
    "`ms 3.5`, `latency 0.5x`, `bytes 200kB`, `macs 0.5x`, `params 10%`, `loss +0.05` or `accuracy -0.5` "
    "(points of per cent)"
)
_MANY = {"k": 10**3, "m": 10**6, "g": 10**9}
_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SHARE = {"%": Fraction(1, 100), "x": Fraction(1)}
_UNITS: dict[str, dict[str, Fraction | int]] = {
    "ms": {"us": Fraction(1, 1000), "ms": 1, "s": 1000}, "bytes": {**_BYTES}, "macs": {**_MANY}, "params": {**_MANY},
    "loss": {}, "accuracy": {},
}  # fmt: skip


@dataclass(frozen=True)
class Aim:
    """A target of a plan.

    Args:
        quantity: ``"ms"`` of a call of the compiled network, ``"bytes"`` of its plan file, ``"macs"`` and ``"params"``
            of the prunable weights that are kept, or the rise of the ``"loss"``, the fall of the ``"accuracy"``.
        value: the number: at most so much; a rise or a fall is above 0.
        relative: whether it is a share of what the network takes as it is.
    """

    quantity: Quantity
    value: float
    relative: bool = False

    @property
    def resource(self) -> bool:
        """Whether the network is to take less, and not to get at most so much worse."""
        return self.quantity in RESOURCES

    def limit(self, now: float | int) -> float:
        """The most that the network may take, given what it takes now; shares are read as decimal numbers."""
        return float(Fraction(f"{self.value:.12f}") * Fraction(now)) if self.relative else self.value

    def __str__(self) -> str:
        """As the user would type it."""
        if not self.resource:
            return f"loss +{self.value:.12g}" if self.quantity == "loss" else f"accuracy -{self.value:.12g}"
        if self.relative and self.quantity == "params":
            return f"params {100 * self.value:.12g}%"
        word = "latency" if self.relative and self.quantity == "ms" else self.quantity
        return f"{word} {self.value:.12g}{'x' if self.relative else ''}"


def is_aim(text: str) -> bool:
    """Whether a target asks for something that only a plan layer by layer can forecast.

    >>> is_aim("ms 3.5"), is_aim("params 10%")
    (True, False)
    """
    return str(text).strip().lower().partition(" ")[0] in ("ms", "latency", "bytes", "loss", "accuracy")


def parse_aim(text: str) -> Aim:
    """An aim from the words a user types; a share is written with ``x`` or ``%``.

    >>> str(parse_aim("latency 50%")), str(parse_aim("bytes 200kB")), str(parse_aim("accuracy -0.5"))
    ('latency 0.5x', 'bytes 200000', 'accuracy -0.5')

    Raises:
        UsageError: when the phrase is not understood.
        BudgetError: when the number is out of range.
    """
    phrase = " ".join(str(text).split()).lower()
    match = re.fullmatch(r"(\w+) ?([-+]?(?:\d+(?:,\d{3})*(?:\.\d*)?|\.\d+)(?:e[-+]?\d{1,3})?)\s*(%|[a-z]*)", phrase)
    if not match:
        raise UsageError(f"the target {text!r} is not understood; write {FORM}.")
    word, digits, unit = match.groups()
    number = Fraction(digits.replace(",", ""))
    if word in ("sparsity", "keep"):
        return _weights(word, number, unit, text)
    quantity: Quantity | None = "ms" if word == "latency" else next((q for q in _quantities() if q == word), None)
    if quantity is None:
        raise UsageError(f"the target {text!r} names no known quantity ({word!r}); write {FORM}.")
    known = _UNITS[quantity]
    if unit and unit not in known and (unit not in _SHARE or not known):
        takes = f"no unit {unit!r} but x, %, {', '.join(known)}" if known else f"no unit, not {unit!r}"
        raise UsageError(f"the target {text!r}: {word} takes {takes}; write {FORM}.")
    if word == "latency" and not unit and 0 < number <= 1:  # a share as of other quantities, or milliseconds?
        raise UsageError(f"the target {text!r} has two meanings; write `latency {digits}x`, or `ms {digits}`.")
    if quantity in ("macs", "params") and not unit and 0 < number <= 1:
        unit = "x"  # as everywhere: `params 0.1` is a share, one weight is `keep 1`
    if unit in _SHARE:
        return _aim(quantity, number * _SHARE[unit], True, text)
    if quantity == "accuracy":
        if not digits.startswith("-"):
            raise UsageError(f"the target {text!r}: say how many points may be lost, such as `accuracy -0.5`.")
        number = -number
    return _aim(quantity, number * (known[unit] if unit else 1), False, text)


def _weights(word: str, number: Fraction, unit: str, text: str) -> Aim:
    """Targets of pruning with one budget: the share of weights that go, or how many stay."""
    takes = ("", "%") if word == "sparsity" else ("",)
    if unit not in takes:
        form = "`sparsity 0.9` or `sparsity 90%`" if word == "sparsity" else "`keep 13000`, or `params 10%` for a share"
        raise UsageError(f"the target {text!r}: {word} takes no unit {unit!r}; write {form}.")
    if word == "keep":
        return _aim("params", number, False, text)
    gone = number / 100 if unit else number
    if not 0 <= gone < 1:
        raise BudgetError(f"{text!r}: the share of zeros must be in [0, 1), it is {float(gone):g}; 0.9 means 90 %.")
    return _aim("params", 1 - gone, True, text)


def _quantities() -> tuple[Quantity, ...]:
    return (*RESOURCES, "loss", "accuracy")


def _aim(quantity: Quantity, number: Fraction, relative: bool, text: str) -> Aim:
    value = float(number) if abs(number) < Fraction(10) ** 300 else math.inf
    if relative and not 0 < number <= 1:
        raise BudgetError(f"{text!r}: a share must be in (0, 1], it is {value:g}; write {FORM}.")
    if not 0 < value < math.inf:
        raise BudgetError(f"{text!r}: the number must be above 0 and finite, it is {value:g}; write {FORM}.")
    if quantity == "accuracy" and value >= 100:
        raise BudgetError(f"{text!r}: at most 100 points of accuracy can be lost; write `accuracy -0.5`.")
    return Aim(quantity, value, relative)
