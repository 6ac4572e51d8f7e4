"""Writes a program anew with as few views as its layers need; see :mod:`secateur.runtime.fuse_views`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from secateur.runtime.fuse_views import Atom, Atoms, View
from secateur.runtime.lower_ir import Dims, Program, Step, times


def arrange(program: Program) -> None:
    """Replace the program's views, and attention on heads, by what is left of them."""
    _Layout(program).run()


class _Layout:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.steps: list[Step] = []
        self.views: dict[str, View] = {}
        self._written: dict[Any, str] = {}
        self._makers: dict[str, str] = {}

    def run(self) -> None:
        program = self.program
        for value in program.inputs:
            self.views[value] = View.whole(value, program.shapes[value])
        for step in program.steps:
            rule = _RULES.get(step.op)
            if rule is None or not rule(self, step):
                self._plain(step)
        program.outputs = [self.read(value) for value in program.outputs]
        program.steps = self.steps

    def _plain(self, step: Step) -> None:
        step.inputs = [self.read(value) for value in step.inputs]
        self.append(step)

    def append(self, step: Step) -> None:
        """A step whose inputs are written."""
        self.steps.append(step)
        for value in step.outputs:
            self._makers[value] = step.op
            self.views.setdefault(value, View.whole(value, self.program.shapes[value]))

    def moved(self, step: Step, inputs: list[str], shape: Dims, view: Callable[[str], View]) -> bool:
        """A step on bases instead of views; its own value becomes a view of what it makes now."""
        old = step.out
        made = self.program.value(old, shape, self.program.dtypes[old])
        step.inputs, step.outputs = inputs, [made]
        self.views[old] = view(made)
        self.append(step)
        return True

    def maker(self, value: str) -> str:
        """The operator that makes a base."""
        return self._makers.get(value, "input")

    # Writing -------------------------------------------------------------------------------------------------------

    def read(self, value: str) -> str:
        """The value as an array, written if need be."""
        view = self.views[value]
        return self.write(view, value)

    def write(self, view: View, like: str) -> str:
        """A view as an array: parts of axes first, then one reshape, one permute and one reshape at most."""
        shape = view.shape
        value, cells = self._sliced(view, like)
        flat = [atom for atoms in view.dims for atom in atoms]
        if [atom for atoms in cells for atom in atoms if atom.length != 1] != flat:
            units = [unit for atoms in cells for unit in _units(atoms, view.dims)]
            if any(len(_units(atoms, view.dims)) > 1 for atoms in cells):
                units = [unit for unit in units if unit]
                value = self._step("reshape", value, tuple(_length(unit) for unit in units), like)
            order = _order(units, view.dims)
            value = self._step("permute", value, tuple(_length(units[at]) for at in order), like, dims=order)
        return self._step("reshape", value, shape, like)

    def _sliced(self, view: View, like: str) -> tuple[str, list[Atoms]]:
        """The base with the parts of its axes that the view keeps, and the atoms of each axis."""
        value, cells = view.base, list(view.axes)
        shape = [times(atom.size for atom in atoms) for atoms in cells]
        ragged = [_span(atoms) is None for atoms in cells]
        if any(ragged):
            apart = [((atom,) if odd else atoms) for atoms, odd in zip(cells, ragged, strict=True)
                     for atom in (atoms if odd else atoms[:1])]  # fmt: skip
            cells, shape = apart, [times(atom.size for atom in atoms) for atoms in apart]
            value = self._step("reshape", value, tuple(shape), like)
        for axis, atoms in enumerate(cells):
            start, length = _span(atoms) or (0, shape[axis])
            if length != shape[axis]:
                shape[axis] = length
                value = self._step(
                    "slice", value, tuple(shape), like, axis=axis, start=start, stop=start + length, step=1
                )
        return value, cells

    def _step(self, op: str, value: str, shape: Dims, like: str, **attrs: Any) -> str:
        """A view step, written once; nothing where it changes nothing."""
        before = self.program.shapes[value]
        if (op == "reshape" and before == shape) or attrs.get("dims") == list(range(len(before))):
            return value
        key = (op, value, shape, str(attrs))
        if key not in self._written:
            made = self.program.value(like, shape, self.program.dtypes[value])
            where = next((step.where for step in reversed(self.steps) if value in step.outputs), "")
            self.append(Step(op, f"{where}.{op}".strip("."), [value], [made], {}, attrs, where))
            self._written[key] = made
        return self._written[key]


def _length(atoms: Sequence[Atom]) -> int:
    return times(atom.length for atom in atoms)


def _span(atoms: Atoms) -> tuple[int, int] | None:
    """Start and length of the part of an axis that its atoms cover, or None where that has gaps."""
    at = next((n for n, atom in enumerate(atoms) if atom.length != 1), len(atoms))
    if not all(atom.whole for atom in atoms[at + 1 :]):
        return None
    if all(atom.whole for atom in atoms):
        return 0, _length(atoms)
    if any(atom.size < 0 for atom in atoms):  # the part would begin or end at a multiple of the batch
        return None
    inner, start = 1, 0
    for atom in reversed(atoms):
        start += atom.start * inner
        inner *= atom.size
    return start, _length(atoms)


def _units(atoms: Atoms, dims: Sequence[Atoms]) -> list[Atoms]:
    """Runs of an axis's atoms that stand together in one dimension; one empty run for an axis of size 1."""
    units: list[list[Atom]] = []
    for atom in atoms:
        if atom.length == 1:
            continue
        last = units[-1][-1] if units else None
        follows = last is not None and any(
            (last, atom) == pair for dim in dims for pair in zip(dim, dim[1:], strict=False)
        )
        if follows:
            units[-1].append(atom)
        else:
            units.append([atom])
    return [tuple(unit) for unit in units] or [()]


def _order(units: list[Atoms], dims: Sequence[Atoms]) -> list[int]:
    """Which unit comes where; sizes of 1 go where a dimension has that size, so that no reshape need follow."""
    first = {unit[0]: at for at, unit in enumerate(units) if unit}
    spare = [at for at, unit in enumerate(units) if not unit]
    order: list[int] = []
    for dim in dims:
        if not dim and spare:
            order.append(spare.pop(0))
        order += [first[atom] for atom in dim if atom in first]
    return [*order, *spare]


# Rules: whether a step could be moved ------------------------------------------------------------------------------


def _view(layout: _Layout, step: Step) -> bool:
    view = layout.views[step.inputs[0]]
    shape = layout.program.shapes[step.out]
    for again in (False, True):
        if again:  # the view of a view cannot be said: write the first, look at it anew
            base = layout.read(step.inputs[0])
            view = View.whole(base, layout.program.shapes[base])
        made = view.after(step.op, step.attrs, shape)
        if made is not None:
            layout.views[step.out] = made
            return True
    return False


def _unary(layout: _Layout, step: Step) -> bool:
    view = layout.views[step.inputs[0]]
    shape = layout.program.shapes[view.base]
    return view.complete and layout.moved(step, [view.base], shape, lambda made: view.on(made, shape))


def _trailing(layout: _Layout, step: Step) -> bool:
    """Layers that see only the last axes: linear and the norms over them."""
    view = layout.views[step.inputs[0]]
    count = step.attrs.get("axes", 1)
    if len(step.inputs) != 1 or not view.keeps_last(count):
        return False
    before, out = layout.program.shapes[view.base], layout.program.shapes[step.out]
    shape = (*before[: len(before) - count], *out[len(out) - count :])
    return layout.moved(step, [view.base], shape, lambda made: view.on(made, shape, count))


def _embedding(layout: _Layout, step: Step) -> bool:
    view = layout.views[step.inputs[0]]
    width = layout.program.shapes[step.out][-1]
    shape = (*layout.program.shapes[view.base], width)

    def seen(made: str) -> View:
        last = View.whole(made, shape)
        return View(made, (*view.axes, last.axes[-1]), (*view.dims, last.dims[-1]))

    return layout.moved(step, [view.base], shape, seen)


def _affine(layout: _Layout, step: Step) -> bool:
    view = layout.views[step.inputs[0]]
    shape = layout.program.shapes[view.base]
    if not view.complete or len(view.axes) < 2 or not view.keeps(1, 1):
        return False
    return layout.moved(step, [view.base], shape, lambda made: view.on(made, shape))


def _binary(layout: _Layout, step: Step) -> bool:
    """Two values arranged alike, or one beside numbers that do not mind the arrangement."""
    left, right = (layout.views[value] for value in step.inputs)
    shapes = layout.program.shapes
    if left.complete and right.complete and left.axes == right.axes and left.dims == right.dims:
        shape = shapes[left.base]
        return layout.moved(step, [left.base, right.base], shape, lambda made: left.on(made, shape))
    for at, (view, other) in enumerate(((left, right), (right, left))):
        wide = shapes[step.inputs[at]]
        if not view.complete or view == View.whole(view.base, shapes[view.base]) or wide != shapes[step.out]:
            continue
        beside = _beside(layout, view, other, step.inputs[1 - at])
        if beside is None:
            continue
        shape = shapes[view.base]
        inputs = [view.base, beside] if at == 0 else [beside, view.base]
        return layout.moved(step, inputs, shape, lambda made, view=view, shape=shape: view.on(made, shape))
    return False


def _beside(layout: _Layout, view: View, other: View, value: str) -> str | None:
    """The other operand where a view is computed on its base, or None where it would have to be rearranged."""
    small = other.shape
    ranks = [len(small) - at for at, size in enumerate(small) if size != 1]
    if view.keeps_last(max(ranks, default=0)):
        tail = small[len(small) - max(ranks, default=0) :]
        written = layout.read(value)
        return written if small == tail else layout.write(other.reshape(tail) or other, value)
    # A convolution over one dimension takes its summand in its own shape.
    flat = [atom for dim in view.dims for atom in dim] == [a for axis in view.axes for a in axis if a.length != 1]
    if flat and layout.maker(view.base) == "conv" and small == view.shape:
        lifted = other.reshape(layout.program.shapes[view.base])
        return None if lifted is None else layout.write(lifted, value)
    return None


def _attention(layout: _Layout, step: Step) -> bool:
    """Attention on heads as an axis becomes attention whose heads are columns."""
    views = [layout.views[value] for value in step.inputs[:3]]
    masks = [layout.views[value] for value in step.inputs[3:]]
    heads, apart = _heads(views)
    shapes = [view.shape for view in apart]
    groups = ((0,), (2,), (1, 3)) if len(shapes[0]) == 4 else ((0,), (1,), (2,))
    inputs = [layout.write(view.join(groups), value) for view, value in zip(apart, step.inputs[:3], strict=True)]
    for mask, value in zip(masks, step.inputs[3:], strict=True):
        if len(views[0].shape) == 3 and len(mask.shape) == 3:
            base = layout.write(mask, value)
            lead = (1, 1) if mask.shape[0] == 1 else (shapes[0][0], heads)
            mask = View.whole(base, mask.shape).reshape((*lead, *mask.shape[1:])) or mask
        inputs.append(layout.write(mask, value))
    n, t, width = shapes[0][0], shapes[0][-2], shapes[2][-1]
    step.op, step.attrs = "attention", {**step.attrs, "heads": heads}
    step.name = step.name.removesuffix("sdpa") + "attention" if step.name.endswith("sdpa") else step.name
    out = (n, t, heads * width)
    asked = layout.program.shapes[step.out]

    def seen(made: str) -> View:
        whole = View.whole(made, out)
        split = whole.reshape((n, t, heads, width)) if len(shapes[0]) == 4 else None
        turned = whole if split is None else split.permute((0, 2, 1, 3))
        return turned.reshape(asked) or turned

    return layout.moved(step, inputs, out, seen)


def _heads(views: list[View]) -> tuple[int, list[View]]:
    """How many heads, and the inputs with an axis for them; a batch that is examples times heads is taken apart."""
    first = views[0].shape
    if len(first) == 4:
        return first[1], views
    lead: Sequence[Atom] = views[0].dims[0]
    if len(lead) > 1:
        heads = _length(lead[1:])
        apart = [view.reshape((lead[0].length, heads, *view.shape[1:])) for view in views]
        if all(view is not None for view in apart):
            return heads, [view for view in apart if view is not None]
    return 1, views


_RULES: dict[str, Callable[[_Layout, Step], bool]] = {
    "reshape": _view,
    "permute": _view,
    "slice": _view,
    "unary": _unary,
    "linear": _trailing,
    "layer_norm": _trailing,
    "rms_norm": _trailing,
    "embedding": _embedding,
    "affine": _affine,
    "binary": _binary,
    "sdpa": _attention,
}
