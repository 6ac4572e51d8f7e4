"""The one definition of sparsity, and of the targets a user types.

Vocabulary: *prunable* weights are those masks cover; *sparsity* = pruned / prunable; *keep* is an
integer count of prunable weights; *density* = kept / prunable; *compression* = all / (all - pruned).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from secateur.core.errors import BudgetError, UsageError

_FORM = "`sparsity 0.9`, `params 5%`, `macs 0.5x`, `keep 13000` or `2:4`"


@dataclass(frozen=True)
class Target:
    """What the user asked for.

    Args:
        kind: ``"sparsity"``, ``"params"`` (share of prunable weights kept), ``"keep"`` (their number),
            ``"macs"`` (share of the dense MACs left) or ``"nm"``.
        value: the number; for ``"nm"`` it is ``n`` and ``m`` is the group.
        m: group size of an N:M target.
    """

    kind: str
    value: float
    m: int = 0

    def __str__(self) -> str:
        """As the user would type it."""
        if self.kind == "nm":
            return f"{self.value:g}:{self.m}"
        if self.kind == "params":
            return f"params {100 * self.value:.12g}%"
        return f"{self.kind} {self.value:.15g}{'x' if self.kind == 'macs' else ''}"


def parse_target(text: str) -> Target:
    """A target from the words a user types.

    >>> parse_target("params 5%"), parse_target("0.9"), parse_target("2:4")
    (Target(kind='params', value=0.05, m=0), Target(kind='sparsity', value=0.9, m=0), Target(kind='nm', value=2.0, m=4))

    Raises:
        UsageError: when the phrase is not understood.
        BudgetError: when the number is out of range.
    """
    phrase = " ".join(str(text).split()).lower()
    group = re.fullmatch(r"(\d+):(\d+)", phrase)
    if group:
        if not 1 <= int(group[1]) < int(group[2]):
            raise BudgetError(f"{text!r}: an N:M target needs 1 <= N < M; write `2:4` for 2 kept of every 4.")
        return Target("nm", float(group[1]), int(group[2]))
    match = re.fullmatch(r"(?:(\w+) )?([-+]?[\d.,_]+(?:e[-+]?\d+)?)\s*(%|x)?", phrase)
    if not match:
        raise UsageError(f"the target {text!r} is not understood; write {_FORM}.")
    kind, unit = match[1] or "sparsity", match[3] or ""
    if kind in ("ms", "latency", "bytes", "loss", "accuracy"):
        raise UsageError(
            f"a target in {kind} needs a plan layer by layer: `secateur plan RUN --to {text!r} -o plan.json`, then "
            f"`secateur prune RUN --plan plan.json`. Here write {_FORM}."
        )
    if kind not in ("sparsity", "params", "macs", "keep"):
        raise UsageError(f"the target {text!r} names no known quantity ({kind!r}); write {_FORM}.")
    if unit and kind == "keep" or unit == "x" and kind == "sparsity":
        raise UsageError(f"the target {text!r}: {kind} takes no unit {unit!r}; write {_FORM}.")
    number = _number(match[2], text)
    return Target(kind, _in_range(kind, number / 100 if unit == "%" else number, text))


def _number(digits: str, text: str) -> float:
    """A number with commas between thousands only, so that ``1,5`` is not taken for 15."""
    thousands = re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", digits)
    try:
        return float(digits.replace(",", "") if thousands else digits)
    except ValueError as error:
        raise UsageError(f"{digits!r} in the target {text!r} is not a number; write {_FORM}.") from error


def _in_range(kind: str, number: float, text: str) -> float:
    if kind == "keep":
        if not 1 <= number < math.inf or number != int(number):
            raise BudgetError(f"{text!r}: the number of weights to keep must be a whole number of at least 1.")
    elif kind == "sparsity":
        if not 0 <= number < 1:
            raise BudgetError(f"{text!r}: sparsity must be in [0, 1), it is {number:g}; 0.9 means 90 % zeros.")
    elif not 0 < number <= 1:
        raise BudgetError(
            f"{text!r}: the share of {kind} to keep must be in (0, 1], it is {number:g}; write `{kind} 10%`."
        )
    return number


def keep_for(sparsity: float, prunable: int) -> int:
    """The number of weights to keep: ``prunable - floor(sparsity * prunable)``, at least one.

    Sparsity is read as a decimal number of twelve places, so that 0.9 of 1,000 is 900 and 0.58 of 12,400,000 is
    7,192,000 in spite of binary fractions.

    >>> keep_for(0.9, 1000), keep_for(0.95, 266200)
    (100, 13310)

    Raises:
        BudgetError: when sparsity is not in [0, 1).
    """
    if not (isinstance(sparsity, int | float) and 0 <= sparsity < 1):
        raise BudgetError(f"sparsity must be in [0, 1), it is {sparsity!r}; 0.9 means 90 % zeros.")
    return max(1, prunable - math.floor(Fraction(f"{sparsity:.12f}") * prunable))


def compression(total: int, pruned: int) -> float:
    """All parameters divided by those that are not zero (ShrinkBench's ratio)."""
    return math.inf if pruned >= total else total / (total - pruned)
