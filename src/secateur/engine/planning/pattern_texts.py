"""Patterns as a plan writes them: ``unstructured``, ``4x1``, ``2:4``, ``unit``."""

from __future__ import annotations

import re

from secateur.core.errors import UsageError
from secateur.core.patterns import NM, Block, Pattern, Unit, Unstructured

__all__ = ["pattern_text", "read_pattern"]

_FORM = "`unstructured`, `4x1` (outputs by inputs of a block), `2:4` (kept of each group) or `unit`"


def pattern_text(pattern: Pattern) -> str:
    """A pattern in one word.

    >>> pattern_text(Block(4, 1)), pattern_text(NM(2, 4)), pattern_text(Unstructured())
    ('4x1', '2:4', 'unstructured')
    """
    if isinstance(pattern, NM):
        return f"{pattern.n}:{pattern.m}"
    if isinstance(pattern, Block):
        return f"{pattern.rows}x{pattern.cols}"
    return type(pattern).__name__.lower()


def read_pattern(text: str) -> Pattern:
    """The pattern of a word.

    >>> read_pattern("4x1"), read_pattern("2:4")
    (Block(rows=4, cols=1), NM(n=2, m=4))

    Raises:
        UsageError: when the word is not understood, or its numbers are out of range.
    """
    word = text.strip().lower()
    if word in ("unstructured", "unit"):
        return Unstructured() if word == "unstructured" else Unit()
    if word in ("block", "nm"):
        return Block() if word == "block" else NM()
    found = re.fullmatch(r"(\d{1,6})(:|x)(\d{1,6})", word)
    if found is None:
        raise UsageError(f"the pattern {text!r} is not understood; write {_FORM}.")
    first, second = int(found[1]), int(found[3])
    return NM(first, second) if found[2] == ":" else Block(first, second)
