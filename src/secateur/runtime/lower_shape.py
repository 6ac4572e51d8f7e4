"""Rules for operators that move numbers: views, joins, repeats and margins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from secateur.runtime.lower import MOVES, Arguments, Lowering, Values, lowers
from secateur.runtime.lower_ir import Dims, Unsupported


def moves(*names: str) -> Any:
    """Register a rule for operators through which token ids may pass as well."""
    MOVES.update(f"aten::{name}" for name in names)
    return lowers(*names)


@moves("clone", "detach", "alias", "contiguous", "_to_copy", "to", "lift_fresh_copy", "type_as")
def _same(low: Lowering, a: Arguments) -> Values:
    before, after = a.self.meta["val"], a.node.meta["val"]
    if before.dtype != after.dtype and not (before.is_floating_point() and after.is_floating_point()):
        raise Unsupported(f"it turns {before.dtype} into {after.dtype}")
    return low.moved(a.self)


@moves(
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as",
    "_reshape_alias",
)  # fmt: skip
def _reshape(low: Lowering, a: Arguments) -> Values:
    if a.get("dtype") is not None:
        raise Unsupported("it reads the bits of numbers as another type")
    return low.view("reshape", low.moved(a.self), low.out)


def permute(low: Lowering, value: str, order: Sequence[int]) -> str:
    """A permute step."""
    shape = low.program.shapes[value]
    return low.view("permute", value, tuple(shape[axis] for axis in order), dims=list(order))


@moves("permute", "transpose", "t", "movedim", "swapaxes", "swapdims", "numpy_T", "mT", "adjoint")
def _permute(low: Lowering, a: Arguments) -> Values:
    rank = len(low.out)
    order = list(range(rank))
    if a.get("dims") is not None:
        order = [axis % rank for axis in a.dims]
    elif a.get("source") is not None:
        ends = [axis % rank for axis in ([a.source] if isinstance(a.source, int) else a.source)]
        places = [axis % rank for axis in ([a.destination] if isinstance(a.destination, int) else a.destination)]
        rest = iter(axis for axis in range(rank) if axis not in ends)
        order = [ends[places.index(place)] if place in places else next(rest) for place in range(rank)]
    elif rank > 1:
        pair = [a.get(name) for name in ("dim0", "dim1")]
        if pair[0] is None:
            pair = [a.get("axis0", -2), a.get("axis1", -1)]
        left, right = (axis % rank for axis in pair)
        order[left], order[right] = right, left
    return permute(low, low.moved(a.self), order)


def cut(low: Lowering, value: str, axis: int, start: int, stop: int, step: int = 1) -> str:
    """A slice step; ``start`` and ``stop`` lie within the axis."""
    shape = low.program.shapes[value]
    if shape[axis] < 0:
        raise Unsupported("it takes a part of the batch")
    length = -((start - stop) // step)
    if length < 1:
        raise Unsupported("it takes no element")
    out = (*shape[:axis], length, *shape[axis + 1 :])
    return low.view("slice", value, out, axis=axis, start=start, stop=stop, step=step)


@moves("slice", "narrow")
def _slice(low: Lowering, a: Arguments) -> Values:
    value, shape = low.moved(a.self), low.dims(a.self)
    axis, start, step = a.dim % len(shape), a.start, a.get("step", 1)
    stop = start + a.length if a.get("length") is not None else a.get("end")
    if shape[axis] < 0:
        if start in (0, None) and step == 1 and low.out == shape:
            return value
        raise Unsupported("it takes a part of the batch")
    if any(isinstance(bound, fx.Node) for bound in (start, stop, step)):
        raise Unsupported("its bounds depend on the batch")
    start, stop, step = slice(start, stop, step).indices(shape[axis])
    return value if (start, stop, step) == (0, shape[axis], 1) else cut(low, value, axis, start, stop, step)


def pick(low: Lowering, value: str, axis: int, index: int) -> str:
    """One index of an axis, which goes away."""
    shape = low.program.shapes[value]
    part = cut(low, value, axis, index, index + 1)
    return low.view("reshape", part, (*shape[:axis], *shape[axis + 1 :]))


@moves("select")
def _select(low: Lowering, a: Arguments) -> Values:
    shape = low.dims(a.self)
    axis = a.dim % len(shape)
    if shape[axis] < 0 or isinstance(a.index, fx.Node):
        raise Unsupported("it takes one example of the batch")
    return pick(low, low.moved(a.self), axis, a.index % shape[axis])


@lowers("unbind")
def _unbind(low: Lowering, a: Arguments) -> Values:
    value, shape = low.read(a.self), low.dims(a.self)
    axis = a.dim % len(shape)
    if shape[axis] < 0:
        raise Unsupported("it takes the batch apart")
    return [pick(low, value, axis, index) for index in range(shape[axis])]


@lowers("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes")
def _split(low: Lowering, a: Arguments) -> Values:
    value, shape = low.read(a.self), low.dims(a.self)
    axis = a.dim % len(shape)
    made, start = [], 0
    for part in a.node.meta["val"]:
        stop = start + int(part.shape[axis])
        made.append(cut(low, value, axis, start, stop))
        start = stop
    return made


@lowers("cat", "concat", "concatenate")
def _cat(low: Lowering, a: Arguments) -> Values:
    # An empty vector may be concatenated with anything; reading one is refused.
    return low.emit("concat", [low.read(x) for x in a.tensors], low.out, axis=a.dim % len(low.out))


@lowers("stack")
def _stack(low: Lowering, a: Arguments) -> Values:
    axis = a.dim % len(low.out)
    one = (*low.out[:axis], 1, *low.out[axis + 1 :])
    parts = [low.view("reshape", low.read(x), one) for x in a.tensors]
    return low.emit("concat", parts, low.out, axis=axis)


def expand(low: Lowering, value: str, shape: Dims) -> str:
    """A broadcast copy."""
    if low.program.shapes[value] == shape:
        return value
    if min(shape, default=0) < -1:
        raise Unsupported("it repeats a value for a multiple of the batch")
    return low.emit("expand", [value], shape)


@lowers("expand", "expand_as")
def _expand(low: Lowering, a: Arguments) -> Values:
    return expand(low, low.read(a.self), low.out)


@lowers("repeat", "tile")
def _repeat(low: Lowering, a: Arguments) -> Values:
    """Each axis that is repeated gets one of its own in front of it."""
    value, out = low.read(a.self), low.out
    shape = (1,) * (len(out) - len(low.dims(a.self))) + low.dims(a.self)
    apart: list[int] = []
    wide: list[int] = []
    for size, target in zip(shape, out, strict=True):
        if size in (1, target):
            apart.append(size)
            wide.append(target)
        elif size < 0:
            raise Unsupported("it repeats the batch")
        else:
            apart += [1, size]
            wide += [target // size, size]
    return low.view("reshape", expand(low, low.view("reshape", value, tuple(apart)), tuple(wide)), out)


@lowers("repeat_interleave")
def _repeat_interleave(low: Lowering, a: Arguments) -> Values:
    shape, times = low.dims(a.self), a.get("repeats")
    if not isinstance(times, int) or a.get("dim") is None:
        raise Unsupported("it repeats a different number of times, or flattens the batch")
    return interleave(low, low.read(a.self), {a.dim % len(shape): times})


def interleave(low: Lowering, value: str, times: dict[int, int]) -> str:
    """Each number of some axes repeated next to itself."""
    apart: list[int] = []
    wide: list[int] = []
    out: list[int] = []
    for axis, size in enumerate(low.program.shapes[value]):
        count = times.get(axis, 1)
        if size < 0 and count != 1:
            raise Unsupported("it repeats examples")
        apart += [size] if count == 1 else [size, 1]
        wide += [size] if count == 1 else [size, count]
        out.append(size * count)
    return low.view("reshape", expand(low, low.view("reshape", value, tuple(apart)), tuple(wide)), tuple(out))


@lowers("upsample_nearest1d", "upsample_nearest2d")
def _upsample(low: Lowering, a: Arguments) -> Values:
    shape, out = low.dims(a.get("self", a.get("input"))), low.out
    scales = [new / old for old, new in zip(shape[2:], out[2:], strict=True)]
    given = a.get("scale_factors") or [a.get("scales_h", a.get("scales")), a.get("scales_w")][: len(scales)]
    told = all(scale in (None, real) for scale, real in zip(given, scales, strict=True))
    if not told or any(scale != math.floor(scale) for scale in scales):
        raise Unsupported("it enlarges by a factor that is not a whole number")
    value = low.read(a.get("self", a.get("input")))
    return interleave(low, value, {axis + 2: int(scale) for axis, scale in enumerate(scales)})


@lowers("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def _shuffle(low: Lowering, a: Arguments) -> Values:
    (*lead, c, h, w), out = low.dims(a.self), low.out
    n = len(lead)
    front = list(range(n))
    if a.get("upscale_factor") is not None:
        r = a.upscale_factor
        apart, order = (c // (r * r), r, r, h, w), [0, 3, 1, 4, 2]
    elif a.get("downscale_factor") is not None:
        r = a.downscale_factor
        apart, order = (c, h // r, r, w // r, r), [0, 2, 4, 1, 3]
    else:
        apart, order = (a.groups, c // a.groups, h, w), [1, 0, 2, 3]
    value = low.view("reshape", low.read(a.self), (*lead, *apart))
    return low.view("reshape", permute(low, value, [*front, *(n + axis for axis in order)]), out)


@lowers("roll")
def _roll(low: Lowering, a: Arguments) -> Values:
    value, shape = low.read(a.self), low.dims(a.self)
    if not a.dims:
        raise Unsupported("it rolls over all axes at once")
    for axis, shift in zip(a.dims, a.shifts, strict=True):
        axis %= len(shape)
        if shape[axis] < 0:
            raise Unsupported("it rolls the batch")
        at = -shift % shape[axis]
        if at:
            parts = [cut(low, value, axis, at, shape[axis]), cut(low, value, axis, 0, at)]
            value = low.emit("concat", parts, shape, axis=axis)
    return value


@lowers("pad", "constant_pad_nd")
def _pad(low: Lowering, a: Arguments) -> Values:
    if a.get("mode", "constant") != "constant":
        raise Unsupported(f"it pads by the mode {a.mode}")
    fill = low.number(0 if a.value is None else a.value)
    if fill is None or not math.isfinite(fill):
        raise Unsupported(f"it pads with {a.value}")
    value, shape = low.read(a.self), low.dims(a.self)
    margins = [[0, 0] for _ in shape]
    for place in range(len(a.pad) // 2):
        axis = len(shape) - 1 - place
        before, after = a.pad[2 * place : 2 * place + 2]
        if isinstance(before, fx.Node) or isinstance(after, fx.Node) or (shape[axis] < 0 and (before or after)):
            raise Unsupported("it pads the batch")
        if min(before, after) < 0:
            value = cut(low, value, axis, max(0, -before), shape[axis] - max(0, -after))
        margins[axis] = [max(0, before), max(0, after)]
    return low.emit("pad", [value], low.out, pad=margins, value=fill) if any(map(any, margins)) else value
