"""Which removable unit each element of a tensor belongs to.

A *label* is an integer. Labels that must go together are united; what is left of one union is a *unit*. Beside every
value of a graph stand a few *layers*: integer tensors with as many dimensions as the value, of size 1 along those in
which the labels do not vary. A layer that varies along one dimension says which slices of it belong to which unit; one
that varies along several is undecided until an operator computes with it, and is then united to vary along one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Units:
    """Labels and their unions.

    Args:
        heads: where a dimension is split in two, whether whole outer indices (heads) are units, or the same inner
            index of all of them.
    """

    def __init__(self, heads: bool = True) -> None:
        self.heads = heads
        self._parent = torch.empty(0, dtype=torch.int64)
        self._hard = torch.empty(0, dtype=torch.bool)
        self.size = 0
        self.frozen: list[tuple[Tensor, str]] = []
        self.marked: list[tuple[Tensor, str]] = []

    def fresh(self, count: int, soft: bool = False) -> Tensor:
        """New labels, shape ``(count,)``; soft ones stand for elements that are all the same, in any number."""
        start, self.size = self.size, self.size + count
        if self.size > len(self._parent):
            more = max(1 << 14, self.size, 2 * len(self._parent))
            self._hard = torch.cat([self._hard, torch.zeros(more - len(self._hard), dtype=torch.bool)])
            self._parent = torch.cat([self._parent, torch.arange(len(self._parent), more)])
        self._hard[start : self.size] = not soft
        return torch.arange(start, self.size)

    def find(self, labels: Tensor) -> Tensor:
        """The label that stands for the union of each, same shape."""
        flat, roots = labels.reshape(-1), self._parent[labels.reshape(-1)]
        while True:
            above = self._parent[roots]
            if torch.equal(above, roots):
                break
            roots = above
        self._parent[flat] = roots
        return roots.reshape(labels.shape)

    def unite(self, one: Tensor, other: Tensor) -> None:
        """Labels at the same place go together; shapes broadcast."""
        one, other = torch.broadcast_tensors(one, other)
        one, other = one.reshape(-1), other.reshape(-1)
        while True:
            one, other = self.find(one), self.find(other)
            apart = one != other
            if not bool(apart.any()):
                return
            one, other = one[apart], other[apart]
            low, high = torch.minimum(one, other), torch.maximum(one, other)
            self._parent.scatter_reduce_(0, high, low, "amin")
            either = self._hard[low] | self._hard[high]
            self._hard[low[either]] = True
            self._hard[high[either]] = True

    def soft(self, labels: Tensor) -> bool:
        """Whether no label here is united with one that is not soft."""
        return not bool(self._hard[self.find(labels)].any())

    def freeze(self, labels: Tensor, why: str) -> None:
        """Say that units with these labels stay."""
        if labels.numel():
            self.frozen.append((labels.reshape(-1).unique(), why))

    def mark(self, labels: Tensor, what: str) -> None:
        """Note something about the units with these labels, such as that removing them changes a statistic."""
        if labels.numel():
            self.marked.append((labels.reshape(-1).unique(), what))

    def reasons(self, notes: Iterable[tuple[Tensor, str]]) -> dict[int, list[str]]:
        """The notes by unit, in order, each once."""
        found: dict[int, list[str]] = {}
        for labels, why in notes:
            for root in self.find(labels).unique().tolist():
                known = found.setdefault(root, [])
                if why not in known:
                    known.append(why)
        return found


@dataclass
class Value:
    """What is known of one tensor of the graph.

    Args:
        shape: its shape.
        layers: its labels; sizes are 1 along the dimensions in which they do not vary.
    """

    shape: tuple[int, ...]
    layers: list[Tensor] = field(default_factory=list)

    @property
    def dim(self) -> int:
        """How many dimensions."""
        return len(self.shape)


def varied(layer: Tensor) -> list[int]:
    """Dimensions along which a layer varies."""
    return [d for d, size in enumerate(layer.shape) if size > 1]


def compress(layer: Tensor) -> Tensor:
    """The layer with size 1 along the dimensions in which it does not vary."""
    for d, size in enumerate(layer.shape):
        if size > 1:
            first = layer.narrow(d, 0, 1)
            if layer.stride(d) == 0 or bool((layer == first).all()):
                layer = first
    return layer


def spread(layer: Tensor, shape: Sequence[int]) -> Tensor:
    """The layer with the value's own shape."""
    return layer.expand(tuple(shape))


def along(vector: Tensor, dim: int, dims: int) -> Tensor:
    """A layer of a value with ``dims`` dimensions that varies along one."""
    shape = [1] * dims
    shape[dim] = len(vector)
    return vector.reshape(shape)


def decide(units: Units, value: Value, prefer: int | None = None, inner: bool | None = None) -> None:
    """Unite labels until every layer varies along one dimension at most, and one layer along each.

    Args:
        units: where the labels come from.
        value: changed in place.
        prefer: the dimension that units are taken from if they vary along it.
        inner: else take the last of the dimensions rather than the first; by default what ``units.heads`` says.
    """
    last = not units.heads if inner is None else inner
    made: dict[int, Tensor] = {}
    for layer in value.layers:
        layer = compress(units.find(layer))
        dims = varied(layer)
        if len(dims) > 1:
            keep = prefer if prefer in dims else dims[-1 if last else 0]
            first = layer
            for d in dims:
                if d != keep:
                    first = first.narrow(d, 0, 1)
            units.unite(layer, first)
            layer = compress(units.find(layer))
        dims = varied(layer)
        if not dims:
            units.freeze(layer, "it is all there is of a dimension")
            continue
        d = dims[0]
        if d in made:
            one, other = (layer, made[d]) if units.soft(layer) else (made[d], layer)
            units.freeze(one, "two units share a dimension")
            made[d] = other
            if not units.soft(one):
                units.freeze(other, "two units share a dimension")
        else:
            made[d] = layer
    value.layers = list(made.values())


def vector(value: Value, dim: int) -> Tensor | None:
    """The labels along one dimension of a decided value; None where there are none."""
    for layer in value.layers:
        if layer.shape[dim] > 1:
            return layer.reshape(-1)
    return None
