"""What a network computes without looking at its input: positions, masks, weights made of weights.

Such values are computed at capture. One that depends on the batch alone (zeros for each example) is computed for
two batch sizes; where all examples agree it is one example, repeated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor, fx
from torch.utils._pytree import tree_map

from secateur.runtime.lower_ir import Dims, Unsupported

SIZES = (2, 3)
"""The two batch sizes; every size that differs between them is the batch."""

# Their result depends on the shape of what they are given, and not on its numbers.
SHAPE_ONLY = (
    "aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::new_zeros", "aten::new_ones", "aten::new_full",
)  # fmt: skip


@dataclass(frozen=True)
class Known:
    """A tensor known at capture; ``axes`` are those along which it is repeated for each example (size 1 here)."""

    tensor: Tensor
    axes: tuple[int, ...] = ()


class Evaluator:
    """Values of nodes for the two batch sizes, the same object twice where the batch does not matter."""

    def __init__(self, given: Mapping[fx.Node, Any]) -> None:
        self._pairs: dict[fx.Node, tuple[Any, Any]] = {node: (value, value) for node, value in given.items()}
        self._known: dict[fx.Node, Known | None] = {}

    def visit(self, node: fx.Node) -> None:
        """Compute a node if what it reads is known; nodes are visited in order."""
        value = node.meta.get("val")
        if isinstance(value, SymInt | SymFloat | SymBool):
            with contextlib.suppress(Unsupported):
                self._pairs[node] = (_at(value, SIZES[0]), _at(value, SIZES[1]))
            return
        if node.op != "call_function" or not _deterministic(node.target):
            return
        reads = node.all_input_nodes
        stand_in = getattr(getattr(node.target, "_schema", None), "name", None) in SHAPE_ONLY
        if stand_in:
            reads = [read for read in reads if read is not node.args[0]]
        if any(read not in self._pairs for read in reads):
            return
        if all(self._pairs[read][0] is self._pairs[read][1] for read in reads) and not stand_in:
            made = self._compute(node, 0)
            self._pairs[node] = (made, made)
            return
        with contextlib.suppress(Unsupported):
            self._pairs[node] = (self._compute(node, 0), self._compute(node, 1))

    def known(self, node: fx.Node) -> Known | None:
        """The tensor of a node, where it is known and the same for every example."""
        if node not in self._known:
            self._known[node] = self._alike(node)
        return self._known[node]

    def _alike(self, node: fx.Node) -> Known | None:
        first, second = self._pairs.get(node, (None, None))
        if not isinstance(first, Tensor) or not isinstance(second, Tensor):
            return None
        if first is second:
            return Known(first)
        axes = tuple(axis for axis in range(first.dim()) if first.shape[axis] != second.shape[axis])
        if any((first.shape[axis], second.shape[axis]) != SIZES for axis in axes):
            return None
        one = first
        for axis in axes:
            one = one.narrow(axis, 0, 1)
        alike = all(torch.equal(one.expand_as(every), every) for every in (first, second))
        return Known(one.contiguous(), axes) if alike else None

    def has(self, node: fx.Node) -> bool:
        """Whether the node is known for every batch, as a tensor or anything else."""
        return node in self._pairs

    def fixed(self, node: fx.Node) -> Any:
        """The value of a node that does not depend on the batch, else None."""
        first, second = self._pairs.get(node, (None, None))
        return first if first is second else None

    def _compute(self, node: fx.Node, which: int) -> Any:
        def value(read: Any) -> Any:
            if not isinstance(read, fx.Node):
                return read
            if read in self._pairs:
                return self._pairs[read][which]
            fake = read.meta["val"]
            return torch.zeros((), dtype=fake.dtype).expand([_at(size, SIZES[which]) for size in fake.shape])

        args, kwargs = tree_map(value, (node.args, node.kwargs))
        with torch.no_grad():
            return node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]


def dims(node: fx.Node) -> Dims:
    """The sizes of a node's tensor; -k is k times the batch.

    Raises:
        Unsupported: when a size is anything else, or nothing.
    """
    fake = node.meta.get("val")
    if not isinstance(fake, Tensor):
        raise Unsupported("its result is not a tensor")
    return sizes(fake)


def sizes(fake: Tensor) -> Dims:
    """As :func:`dims`, of the stand-in that torch kept for a tensor."""
    made = []
    for size in fake.shape:
        one, two = _at(size, 1), _at(size, 2)
        made.append(one if one == two else -one)
        if one < 1 or (one != two and any(_at(size, n) != n * one for n in (2, 3, 7))):
            raise Unsupported(f"its result has the size {size}")
    return tuple(made)


def _at(size: Any, batch: int) -> Any:
    """A size for one batch."""
    if not isinstance(size, SymInt | SymFloat | SymBool):
        return size
    expression = size.node.expr
    symbols = expression.free_symbols
    if len(symbols) > 1 or any(str(symbol).startswith("u") for symbol in symbols):
        raise Unsupported(f"its result has the size {size}, which depends on the values of a tensor")
    number = expression.subs({symbol: batch for symbol in symbols})
    if isinstance(size, SymBool):
        return bool(number)
    return float(number) if isinstance(size, SymFloat) else int(number)


def _deterministic(target: Any) -> bool:
    if isinstance(target, torch._ops.HigherOrderOperator):
        return False
    tags = getattr(target, "tags", ())
    name = str(target)
    return torch.Tag.nondeterministic_seeded not in tags and "empty" not in name and "assert" not in name
