"""Makes a program small: factors and summands go into weights, sums and activations into the layers before them."""

from __future__ import annotations

from typing import Any

import numpy as np

from secateur.runtime.fuse_attention import attend
from secateur.runtime.fuse_cell import roll
from secateur.runtime.fuse_layout import arrange
from secateur.runtime.fuse_subsample import subsample
from secateur.runtime.lower_ir import Program, Step, bury
from secateur.runtime.operators import ACTIVATIONS

LAYERS = ("conv", "linear")


def fuse(program: Program) -> None:
    """Rewrite a program in place; it computes the same, apart from rounding."""
    attend(program)
    roll(program)
    arrange(program)
    subsample(program)
    _merge(program)
    bury(program)
    _swish(program)
    _narrow(program)
    bury(program)
    while _fold(program) or _close(program):
        bury(program)


def _merge(program: Program) -> None:
    """Steps that compute the same of the same are one."""
    seen: dict[Any, Step] = {}
    kept: list[Step] = []
    other: dict[str, str] = {}
    for step in program.steps:
        step.inputs = [other.get(value, value) for value in step.inputs]
        key = (step.op, tuple(step.inputs), tuple(sorted(step.weights.items())), repr(sorted(step.attrs.items())))
        if step.op == "expand":
            key = (*key, program.shapes[step.out])
        if step.op == "reshape":
            key = (*key, program.shapes[step.out])
        twin = None if step.op == "torch" else seen.setdefault(key, step)
        if twin is None or twin is step:
            kept.append(step)
        else:
            other.update(zip(step.outputs, twin.outputs, strict=True))
    program.steps = kept
    program.outputs = [other.get(value, value) for value in program.outputs]


def _swish(program: Program) -> None:
    """``x * sigmoid(x)`` is one function."""
    makers = program.makers()
    for step in program.steps:
        if step.op != "binary" or step.attrs["fn"] != "mul":
            continue
        for x, gate in (step.inputs, step.inputs[::-1]):
            maker = makers.get(gate)
            if maker is not None and maker.op == "unary" and maker.attrs["fn"] == "sigmoid" and maker.inputs == [x]:
                step.op, step.inputs, step.attrs = "unary", [x], {"fn": "silu"}
                break


def _narrow(program: Program) -> None:
    """Operators that broadcast by themselves read what was to be broadcast for them."""
    makers = program.makers()
    shapes = program.shapes
    for step in program.steps:
        places = {"binary": (0, 1), "attention": (3,)}.get(step.op, ())
        for place in places[: len(step.inputs)]:
            if place >= len(step.inputs):
                continue
            maker = makers.get(step.inputs[place])
            if maker is None or maker.op != "expand":
                continue
            beside = shapes[step.inputs[1 - place]] if step.op == "binary" else None
            if beside is None or _covers(beside, shapes[maker.inputs[0]], shapes[step.out]):
                step.inputs[place] = maker.inputs[0]


def _covers(left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]) -> bool:
    """Whether two shapes still make the same one."""
    rank = len(out)
    pairs = zip((1,) * (rank - len(left)) + left, (1,) * (rank - len(right)) + right, strict=True)
    return tuple(b if a == 1 else a for a, b in pairs) == out


# Into weights ------------------------------------------------------------------------------------------------------


def _fold(program: Program) -> bool:
    """Put one factor or summand into the layer before it; whether there was one."""
    makers, readers = program.makers(), program.readers()
    for step in program.steps:
        found = _channelwise(program, step, makers)
        if found is None:
            continue
        value, scale, shift = found
        layer = makers.get(value)
        if layer is None or layer.op not in LAYERS or readers[value] != 1 or not _open(layer):
            continue
        if not _fits(program, layer, step, scale, shift):
            continue
        _scale_weights(program, layer, scale, shift)
        layer.attrs["act"] = step.attrs["act"]
        layer.outputs = step.outputs
        program.steps.remove(step)
        return True
    return False


def _open(layer: Step) -> bool:
    return layer.attrs["act"] == "none" and len(layer.inputs) == 1


def _channelwise(program: Program, step: Step, makers: dict[str, Step]) -> tuple[str, np.ndarray, np.ndarray] | None:
    """What a step multiplies by constants and adds constants to; both with the axes of the value, in float64."""
    if step.op == "affine":
        rank = len(program.shapes[step.out])
        scale, shift = (program.weights[step.weights[role]].astype(np.float64) for role in ("scale", "shift"))
        lifted = (-1, *(1,) * (rank - 2))
        return step.inputs[0], scale.reshape(lifted), shift.reshape(lifted)
    if step.op != "binary" or step.attrs["fn"] not in ("add", "sub", "mul", "div"):
        return None
    for place in (1, 0):
        array = program.constant(step.inputs[place], makers)
        if array is None:
            continue
        number, fn = array.astype(np.float64), step.attrs["fn"]
        one, zero = np.ones(()), np.zeros(())
        if fn == "add":
            return step.inputs[1 - place], one, number
        if fn == "mul":
            return step.inputs[1 - place], number, zero
        if fn == "sub":
            value, turned = step.inputs[1 - place], place == 0
            return (value, -np.ones(1), number) if turned else (value, one, -np.atleast_1d(number))
        if place == 1:
            with np.errstate(divide="ignore"):
                return step.inputs[0], 1 / np.atleast_1d(number), zero
    return None


def _fits(program: Program, layer: Step, step: Step, scale: np.ndarray, shift: np.ndarray) -> bool:
    """Whether constants vary along the layer's outputs alone, are finite, and do not widen the value."""
    shape = program.shapes[layer.out]
    axis = 1 if layer.op == "conv" else len(shape) - 1
    if program.shapes[step.out] != shape:
        return False
    for array in (scale, shift):
        wide = (1,) * (len(shape) - array.ndim) + array.shape
        if any(size != 1 for at, size in enumerate(wide) if at != axis) or not np.isfinite(array).all():
            return False
    return True


def _scale_weights(program: Program, layer: Step, scale: np.ndarray, shift: np.ndarray) -> None:
    """New weights in float64; they are cast once, at the end. A zero stays a zero without a sign."""
    weight = program.weights[layer.weights["weight"]]
    rows = weight.shape[0]
    factor = np.broadcast_to(scale.reshape(-1), (rows,))
    bias = program.weights[layer.weights["bias"]] if "bias" in layer.weights else np.zeros(())
    if (factor != 1).any():
        made = weight.astype(np.float64) * factor.reshape(rows, *(1,) * (weight.ndim - 1)) + 0.0
        _replace(program, layer, "weight", made)
    if "bias" in layer.weights or shift.any():
        made = bias.astype(np.float64) * factor + np.broadcast_to(shift.reshape(-1), (rows,)) + 0.0
        _replace(program, layer, "bias", made)


def _replace(program: Program, layer: Step, role: str, array: np.ndarray) -> None:
    """Give a layer another weight, under the old name unless another layer has that one too."""
    name = layer.weights.get(role)
    if name is None:
        stem = layer.weights["weight"]
        name = f"{stem.removesuffix('weight').removesuffix('_').removesuffix('.')}.{role}".strip(".")
        layer.weights[role] = program.weight(name, array)
    elif sum(list(step.weights.values()).count(name) for step in program.steps) > 1:
        layer.weights[role] = program.weight(name, array)
    else:
        program.weights[name] = array


# Into layers -------------------------------------------------------------------------------------------------------


def _close(program: Program) -> bool:
    """Put one sum or activation into the layer before it; whether there was one."""
    makers, readers = program.makers(), program.readers()
    for at, step in enumerate(program.steps):
        if step.op == "unary" and step.attrs["fn"] in ACTIVATIONS:
            layer = makers.get(step.inputs[0])
            if layer is None or readers[layer.out] != 1 or layer.attrs.get("act") != "none":
                continue
            layer.attrs["act"], layer.outputs = step.attrs["fn"], step.outputs
            program.steps.remove(step)
            return True
        if step.op == "binary" and step.attrs["fn"] == "add" and _residual(program, at, makers, readers):
            return True
    return False


def _residual(program: Program, at: int, makers: dict[str, Step], readers: dict[str, int]) -> bool:
    """A sum whose summand is a layer's result; of two layers the later, which then waits for the other."""
    step = program.steps[at]
    shapes = program.shapes
    found = []
    for place, value in enumerate(step.inputs):
        layer = makers.get(value)
        if layer is None or layer.op not in LAYERS or not _open(layer) or readers[value] != 1:
            continue
        if shapes[value] == shapes[step.inputs[1 - place]] == shapes[step.out]:
            found.append((program.steps.index(layer), place))
    if not found:
        return False
    where, place = max(found)
    layer = program.steps[where]
    layer.inputs = [layer.inputs[0], step.inputs[1 - place]]
    layer.attrs["act"], layer.outputs = step.attrs["act"], step.outputs
    program.steps[at] = layer
    del program.steps[where]
    return True
