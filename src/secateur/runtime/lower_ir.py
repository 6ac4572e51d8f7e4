"""The program between torch's graph and the runtime's: steps over named values, made to be rewritten.

A size below zero is the batch: -k stands for k times as many as there are examples, so that one integer says
all that shapes need. Besides the contract's operators a program may hold three more: ``torch`` (a node of torch's
graph that stays there), ``sdpa`` (attention with the heads as an axis) and ``masked_fill``; none of the last two
outlives fusion.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Dims = tuple[int, ...]
"""Sizes of a value; -k is k times the batch."""

VIEWS = ("reshape", "permute", "slice")
"""Operators that only move numbers."""


class Unsupported(Exception):
    """This operator stays in torch; the message says why."""


@dataclass(eq=False)
class Step:
    """One operator. ``name`` says which, and several steps may have the same; ``where`` is the path of its module."""

    op: str
    name: str
    inputs: list[str]
    outputs: list[str]
    weights: dict[str, str] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)
    where: str = ""

    @property
    def out(self) -> str:
        """The value of a step that makes one."""
        return self.outputs[0]


@dataclass
class Program:
    """Steps in an order in which every value exists before it is read; weights in their own precision."""

    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    shapes: dict[str, Dims] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    _taken: set[tuple[str, str]] = field(default_factory=set)

    def fresh(self, kind: str, stem: str) -> str:
        """A name that no other "node", "value" or "weight" has: ``stem``, else ``stem.1``, ``stem.2``, ..."""
        stem = name = stem.encode("utf-8", "replace")[:200].decode("utf-8", "ignore").replace("\0", "") or kind
        count = 0
        while (kind, name) in self._taken:
            count += 1
            name = f"{stem}.{count}"
        self._taken.add((kind, name))
        return name

    def value(self, stem: str, dims: Dims, dtype: str = "f32") -> str:
        """A new value."""
        name = self.fresh("value", stem)
        self.shapes[name], self.dtypes[name] = dims, dtype
        return name

    def weight(self, stem: str, array: np.ndarray) -> str:
        """A new weight, under ``stem`` where that is free."""
        name = self.fresh("weight", stem)
        self.weights[name] = array
        return name

    def makers(self) -> dict[str, Step]:
        """The step that makes each value."""
        return {value: step for step in self.steps for value in step.outputs}

    def readers(self) -> dict[str, int]:
        """How often each value is read; being an output of the network counts."""
        counts = dict.fromkeys(self.shapes, 0)
        for value in (*self.outputs, *(value for step in self.steps for value in step.inputs)):
            counts[value] += 1
        return counts

    def constant(self, value: str, makers: dict[str, Step]) -> np.ndarray | None:
        """The numbers of a value that a ``const`` step makes."""
        step = makers.get(value)
        return self.weights[step.weights["value"]] if step is not None and step.op == "const" else None


def rename(program: Program, old: str, new: str) -> None:
    """Let everything that reads one value read another."""
    for step in program.steps:
        step.inputs = [new if value == old else value for value in step.inputs]
    program.outputs = [new if value == old else value for value in program.outputs]


def bury(program: Program) -> None:
    """Drop the steps whose values nobody reads."""
    alive = set(program.outputs)
    kept: list[Step] = []
    for step in reversed(program.steps):
        if alive.intersection(step.outputs):
            alive.update(step.inputs)
            kept.append(step)
    program.steps = kept[::-1]


def times(sizes: Iterable[int]) -> int:
    """The product of sizes, of which one at most holds the batch.

    >>> times([2, -3, 4])
    -24

    Raises:
        Unsupported: when two hold the batch.
    """
    product = 1
    for size in sizes:
        if product < 0 and size < 0:
            raise Unsupported("a size grows with the square of the batch")
        product *= size
    return product


def ratio(whole: int, part: int) -> int | None:
    """How many times ``part`` makes ``whole``, or None where that is no size.

    >>> ratio(-12, 4), ratio(-12, -4), ratio(12, -4), ratio(12, 5)
    (-3, 3, None, None)
    """
    if part < 0 < whole or abs(whole) % abs(part):
        return None
    return whole // part


def broadcast(*shapes: Sequence[int]) -> Dims:
    """The shape of an elementwise result, by NumPy's rule.

    >>> broadcast((-1, 3, 1), (3, 4))
    (-1, 3, 4)

    Raises:
        Unsupported: when the shapes do not agree.
    """
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    sizes = []
    for column in zip(*padded, strict=True):
        wide = set(column) - {1}
        if len(wide) > 1:
            raise Unsupported(f"shapes {shapes} do not agree for every batch")
        sizes.append(wide.pop() if wide else 1)
    return tuple(sizes)
