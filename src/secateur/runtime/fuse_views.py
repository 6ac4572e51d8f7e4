"""Views as algebra: every reshape, permute and slice becomes a sentence about one value, written anew when needed.

A view names its base and, for each dimension, which parts of the base's axes it runs through. Chains of views
become one, views that undo each other vanish, and layers that do not care how their leading axes are arranged are
computed before the rearrangement, so that it can meet its opposite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from secateur.runtime.lower_ir import Dims, ratio, times


@dataclass(frozen=True)
class Atom:
    """A part of one axis: ``length`` of ``size`` positions from ``start``, ``inner`` elements apart."""

    axis: int
    inner: int
    size: int
    start: int
    length: int

    @property
    def whole(self) -> bool:
        """Whether all positions are taken."""
        return self.length == self.size


Atoms = tuple[Atom, ...]


@dataclass(frozen=True)
class View:
    """What a value holds of its base. ``axes`` covers the base; ``dims`` are the value's own dimensions."""

    base: str
    axes: tuple[Atoms, ...]
    dims: tuple[Atoms, ...]

    @staticmethod
    def whole(base: str, shape: Dims) -> View:
        """The base itself."""
        axes = tuple((Atom(axis, 1, size, 0, size),) for axis, size in enumerate(shape))
        return View(base, axes, tuple(atoms if atoms[0].size != 1 else () for atoms in axes))

    @property
    def shape(self) -> Dims:
        """Sizes of the value."""
        return tuple(times(atom.length for atom in atoms) for atoms in self.dims)

    @property
    def complete(self) -> bool:
        """Whether every element of the base appears once."""
        return all(atom.whole for atoms in self.axes for atom in atoms)

    def after(self, op: str, attrs: Mapping[str, Any], shape: Dims) -> View | None:
        """What a step that moves numbers makes of the value, or None where parts of axes do not say it."""
        if op == "reshape":
            return self.reshape(shape)
        if op == "permute":
            return self.permute(attrs["dims"])
        return self.slice(attrs["axis"], attrs["start"], attrs["stop"]) if attrs["step"] == 1 else None

    def permute(self, order: Sequence[int]) -> View:
        """Dimensions in another order."""
        return replace(self, dims=tuple(self.dims[axis] for axis in order))

    def slice(self, dim: int, start: int, stop: int) -> View | None:
        """A part of one dimension, or None where no part of axes says it."""
        changes = _cut(self.dims[dim], start, stop - start)
        if changes is None:
            return None
        return self._changed(changes)

    def _changed(self, changes: dict[Atom, Atoms]) -> View:
        axes = tuple(_put(atoms, changes) for atoms in self.axes)
        dims = tuple(tuple(a for a in _put(atoms, changes) if a.length != 1) for atoms in self.dims)
        return replace(self, axes=axes, dims=dims)

    def reshape(self, shape: Dims) -> View | None:
        """The same elements under other sizes, or None where axes would have to be cut across."""
        queue = [atom for atoms in self.dims for atom in atoms][::-1]
        changes: dict[Atom, Atoms] = {}
        dims: list[Atoms] = []
        for size in shape:
            taken: list[Atom] = []
            while size != 1:
                if not queue:
                    return None
                atom = queue.pop()
                rest = ratio(size, atom.length)
                if rest is None:
                    parts = _split(atom, size)
                    if parts is None:
                        return None
                    changes[atom] = parts
                    queue.append(parts[1])
                    atom, rest = parts[0], 1
                taken.append(atom)
                size = rest
            dims.append(tuple(taken))
        if queue:
            return None
        axes = self.axes
        while any(atom in changes for atoms in axes for atom in atoms):  # a part may be split again
            axes = tuple(_put(atoms, changes) for atoms in axes)
        return replace(self, axes=axes, dims=tuple(dims))

    def join(self, groups: Sequence[Sequence[int]]) -> View:
        """Dimensions rearranged and merged: one for each group."""
        return replace(self, dims=tuple(tuple(a for dim in group for a in self.dims[dim]) for group in groups))

    def keeps(self, dim: int, axis: int) -> bool:
        """Whether a dimension runs through exactly one axis of the base."""
        return self.dims[dim] == tuple(atom for atom in self.axes[axis] if atom.length != 1)

    def keeps_last(self, count: int) -> bool:
        """Whether the last dimensions are the base's last axes."""
        if not self.complete or count > min(len(self.dims), len(self.axes)):
            return False
        return all(self.keeps(len(self.dims) - n, len(self.axes) - n) for n in range(1, count + 1))

    def on(self, base: str, shape: Dims, count: int = 0) -> View:
        """The same arrangement of another base; its last ``count`` axes, which this keeps, may differ in size."""
        fresh = View.whole(base, shape)
        if not count:
            return replace(self, base=base)
        axes = (*self.axes[: len(self.axes) - count], *fresh.axes[len(fresh.axes) - count :])
        dims = (*self.dims[: len(self.dims) - count], *fresh.dims[len(fresh.dims) - count :])
        return View(base, axes, dims)


def _put(atoms: Atoms, changes: dict[Atom, Atoms]) -> Atoms:
    return tuple(part for atom in atoms for part in changes.get(atom, (atom,)))


def _cut(atoms: Atoms, start: int, length: int) -> dict[Atom, Atoms] | None:
    total = times(atom.length for atom in atoms)
    if total == length:
        return {}
    if total < 0:
        return None
    head, tail = atoms[0], atoms[1:]
    inner = times(atom.length for atom in tail)
    if start % inner == 0 and length % inner == 0:
        return {head: (replace(head, start=head.start + start // inner, length=length // inner),)}
    if start // inner != (start + length - 1) // inner:
        return None
    rest = _cut(tail, start % inner, length)
    return None if rest is None else {head: (replace(head, start=head.start + start // inner, length=1),), **rest}


def _split(atom: Atom, outer: int) -> tuple[Atom, Atom] | None:
    """An atom as ``outer`` steps of the rest."""
    inner = ratio(atom.length, outer)
    if inner is None:
        return None
    if atom.whole:
        size, start = outer, 0
    elif inner > 0 and atom.size % inner == 0 and atom.start % inner == 0:
        size, start = atom.size // inner, atom.start // inner
    else:
        return None
    return (
        Atom(atom.axis, atom.inner * inner, size, start, outer),
        Atom(atom.axis, atom.inner, inner, 0, inner),
    )
