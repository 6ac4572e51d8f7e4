"""Rules for operators that compute number by number, and for sums over axes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from secateur.runtime.lower import Arguments, Lowering, Values, lowers
from secateur.runtime.lower_ir import Unsupported, times

# torch's names for what the runtime has as it is.
_UNARY = {
    "relu": "relu", "relu6": "relu6", "silu": "silu", "hardswish": "hardswish", "hardsigmoid": "hardsigmoid",
    "sigmoid": "sigmoid", "tanh": "tanh", "exp": "exp", "log": "log", "sqrt": "sqrt", "rsqrt": "rsqrt",
    "neg": "neg", "abs": "abs", "square": "square", "reciprocal": "reciprocal",
}  # fmt: skip
_BINARY = {"mul": "mul", "maximum": "max", "minimum": "min", "multiply": "mul"}
SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


@lowers(*_UNARY)
def _unary(low: Lowering, a: Arguments) -> Values:
    return low.unary(_UNARY[_stem(a)], low.read(a.self))


@lowers(*_BINARY)
def _binary(low: Lowering, a: Arguments) -> Values:
    return low.binary(_BINARY[_stem(a)], low.read(a.self), low.read(a.other))


def _stem(a: Arguments) -> str:
    schema: Any = a.node.target
    return schema._schema.name.removeprefix("aten::")


@lowers("add", "sub", "rsub", "subtract")
def _sum(low: Lowering, a: Arguments) -> Values:
    alpha = low.number(a.get("alpha", 1))
    left, right = low.read(a.self), low.read(a.other)
    if alpha is None:
        raise Unsupported("its alpha depends on the input")
    name = _stem(a)
    if name == "rsub":
        left, right = right, left
    if alpha != 1:
        scale = low.read(alpha)
        left, right = (
            (low.binary("mul", left, scale), right) if name == "rsub" else (left, low.binary("mul", right, scale))
        )
    return low.binary("add" if name == "add" else "sub", left, right)


@lowers("div", "divide", "true_divide")
def _div(low: Lowering, a: Arguments) -> Values:
    if a.get("rounding_mode") is not None:
        raise Unsupported("it rounds its quotient")
    return low.binary("div", low.read(a.self), low.read(a.other))


@lowers("addcmul", "addcdiv")
def _addc(low: Lowering, a: Arguments) -> Values:
    fn = "mul" if _stem(a) == "addcmul" else "div"
    product = low.binary(fn, low.read(a.tensor1), low.read(a.tensor2))
    if low.number(a.value) != 1:
        product = low.binary("mul", product, low.read(a.value))
    return low.binary("add", low.read(a.self), product)


@lowers("pow")
def _pow(low: Lowering, a: Arguments) -> Values:
    power = low.number(a.exponent)
    x = low.read(a.self)
    single = {0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal", 2.0: "square"}
    if power in single:
        return low.unary(single[power], x)
    if power == 1:
        return x
    if power in (3, 4):
        square = low.unary("square", x)
        return low.binary("mul", square, x) if power == 3 else low.unary("square", square)
    raise Unsupported(f"the power {a.exponent} is not one of -1, -0.5, 0.5, 1, 2, 3, 4")


@lowers("gelu")
def _gelu(low: Lowering, a: Arguments) -> Values:
    return low.unary("gelu_tanh" if a.approximate == "tanh" else "gelu", low.read(a.self))


def _clip(low: Lowering, x: str, least: float | None, most: float | None) -> str:
    if least == 0 and most == 6:
        return low.unary("relu6", x)
    if least is not None and not math.isinf(least):
        x = low.unary("relu", x) if least == 0 else low.binary("max", x, low.read(least))
    return x if most is None or math.isinf(most) else low.binary("min", x, low.read(most))


@lowers("clamp", "clip", "clamp_min", "clamp_max", "hardtanh")
def _clamp(low: Lowering, a: Arguments) -> Values:
    x = low.read(a.self)
    least, most = a.get("min", a.get("min_val")), a.get("max", a.get("max_val"))
    least_number, most_number = low.number(least), low.number(most)
    if (least is None or least_number is not None) and (most is None or most_number is not None):
        return _clip(low, x, least_number, most_number)
    x = x if least is None else low.binary("max", x, low.read(least))
    return x if most is None else low.binary("min", x, low.read(most))


@lowers("leaky_relu")
def _leaky(low: Lowering, a: Arguments) -> Values:
    x, slope = low.read(a.self), low.number(a.negative_slope)
    if slope is None or not 0 <= slope <= 1:
        raise Unsupported(f"its slope {a.negative_slope} is not from 0 to 1")
    return low.binary("max", x, low.binary("mul", x, low.read(slope)))


@lowers("prelu")
def _prelu(low: Lowering, a: Arguments) -> Values:
    x, slope = low.read(a.self), low.known(a.weight)
    if slope is None:
        raise Unsupported("its slope depends on the input")
    shape = (slope.numel(), *(1,) * (len(low.dims(a.self)) - 2))
    wide = low.const(slope.double().reshape(shape).numpy(), f"{low.where()}.weight")
    below = low.binary("mul", low.binary("min", x, low.read(0)), wide)
    return low.binary("add", low.unary("relu", x), below)


@lowers("elu", "celu", "selu")
def _elu(low: Lowering, a: Arguments) -> Values:
    """Scale * (max(x, 0) + alpha * (exp(min(x, 0) * steep) - 1)); the smaller part cannot overflow."""
    alpha, scale = SELU if _stem(a) == "selu" else (float(a.alpha), float(a.get("scale", 1)))
    steep = 1 / alpha if _stem(a) == "celu" else float(a.get("input_scale", 1))
    x = low.read(a.self)
    below = low.binary("min", x, low.read(0))
    if steep != 1:
        below = low.binary("mul", below, low.read(steep))
    below = low.binary("sub", low.unary("exp", below), low.read(1))
    if alpha != 1:
        below = low.binary("mul", below, low.read(alpha))
    made = low.binary("add", low.unary("relu", x), below)
    return made if scale == 1 else low.binary("mul", made, low.read(scale))


def _softplus_of(low: Lowering, x: str) -> str:
    """log(1 + exp(x)) as max(x, 0) + log(1 + exp(-|x|)), which cannot overflow."""
    small = low.unary("exp", low.unary("neg", low.unary("abs", x)))
    return low.binary("add", low.unary("relu", x), low.unary("log", low.binary("add", small, low.read(1))))


@lowers("softplus")
def _softplus(low: Lowering, a: Arguments) -> Values:
    beta, x = float(a.beta), low.read(a.self)
    if beta == 1:
        return _softplus_of(low, x)
    return low.binary("div", _softplus_of(low, low.binary("mul", x, low.read(beta))), low.read(beta))


@lowers("log_sigmoid")
def _log_sigmoid(low: Lowering, a: Arguments) -> Values:
    return low.unary("neg", _softplus_of(low, low.unary("neg", low.read(a.self))))


@lowers("mish")
def _mish(low: Lowering, a: Arguments) -> Values:
    x = low.read(a.self)
    return low.binary("mul", x, low.unary("tanh", _softplus_of(low, x)))


@lowers("glu")
def _glu(low: Lowering, a: Arguments) -> Values:
    x, shape = low.read(a.self), low.dims(a.self)
    axis = a.dim % len(shape)
    half = shape[axis] // 2
    left, right = (low.emit("slice", [x], low.out, axis=axis, start=s, stop=s + half, step=1) for s in (0, half))
    return low.binary("mul", left, low.unary("sigmoid", right))


@lowers("masked_fill")
def _masked_fill(low: Lowering, a: Arguments) -> Values:
    return _filled(low, a.self, a.mask, a.value, False)


@lowers("where")
def _where(low: Lowering, a: Arguments) -> Values:
    left, right = a.get("self"), a.get("other")
    if low.number(left) is not None:
        return _filled(low, right, a.condition, left, False)
    return _filled(low, left, a.condition, right, True)


def _filled(low: Lowering, x: Any, mask: Any, value: Any, keep: bool) -> str:
    """``x`` with a number where a known mask is true, or false with ``keep``."""
    known, number = low.known(mask), low.number(value)
    if known is None or number is None or math.isnan(number):
        raise Unsupported("it chooses between values by something that depends on the input")
    place = known.bool().numpy()
    weight = low.array((~place if keep else place).astype(np.float32), "mask")
    return low.emit("masked_fill", [low.read(x)], low.out, {"mask": weight}, value=number)


# Over axes ---------------------------------------------------------------------------------------------------------


def axes_of(dim: Any, rank: int) -> list[int]:
    """Axes counted from the front; all of them for None or an empty list."""
    wanted = [dim] if isinstance(dim, int) else list(dim or range(rank))
    return sorted(axis % rank for axis in wanted)


def reduce(low: Lowering, fn: str, x: str, axes: list[int], keepdims: bool) -> str:
    """A reduction step."""
    shape = low.program.shapes[x]
    out = [1 if axis in axes else size for axis, size in enumerate(shape)]
    if not keepdims:
        out = [size for axis, size in enumerate(out) if axis not in axes]
    if not axes:
        raise Unsupported("it reduces a number")
    return low.emit("reduce", [x], tuple(out), fn=fn, axes=axes, keepdims=keepdims)


@lowers("mean", "sum", "amax")
def _reduce(low: Lowering, a: Arguments) -> Values:
    fn = {"mean": "mean", "sum": "sum", "amax": "max"}[_stem(a)]
    return reduce(low, fn, low.read(a.self), axes_of(a.get("dim"), len(low.dims(a.self))), a.get("keepdim", False))


@lowers("amin")
def _amin(low: Lowering, a: Arguments) -> Values:
    x = low.unary("neg", low.read(a.self))
    return low.unary("neg", reduce(low, "max", x, axes_of(a.get("dim"), len(low.dims(a.self))), a.keepdim))


@lowers("max", "min")
def _extreme(low: Lowering, a: Arguments) -> Values:
    """Of two tensors, of all numbers, or along an axis, where the positions must not be wanted."""
    name, x = _stem(a), low.read(a.self)
    if a.get("other") is not None:
        return low.binary(name, x, low.read(a.other))
    flip = name == "min"
    axes = axes_of(a.get("dim"), len(low.dims(a.self)))
    made = reduce(low, "max", low.unary("neg", x) if flip else x, axes, a.get("keepdim", False))
    made = low.unary("neg", made) if flip else made
    return made if a.get("dim") is None else [made, None]


@lowers("var", "std")
def _var(low: Lowering, a: Arguments) -> Values:
    x, axes = low.read(a.self), axes_of(a.get("dim"), len(low.dims(a.self)))
    correction = a.get("correction", int(bool(a.get("unbiased", True))))
    count = times(low.dims(a.self)[axis] for axis in axes)
    free = count - float(1 if correction is None else correction)
    if count < 0 or free <= 0:
        raise Unsupported("it is a variance over the batch or of a single number")
    off = low.binary("sub", x, reduce(low, "mean", x, axes, True))
    mean = reduce(low, "mean", low.unary("square", off), axes, a.get("keepdim", False))
    mean = mean if free == count else low.binary("mul", mean, low.read(count / free))
    return mean if _stem(a) == "var" else low.unary("sqrt", mean)


@lowers("linalg_vector_norm")
def _norm(low: Lowering, a: Arguments) -> Values:
    x, axes = low.read(a.self), axes_of(a.dim, len(low.dims(a.self)))
    if a.ord == 1:
        return reduce(low, "sum", low.unary("abs", x), axes, a.keepdim)
    if a.ord != 2:
        raise Unsupported(f"its order {a.ord} is not 1 or 2")
    return low.unary("sqrt", reduce(low, "sum", low.unary("square", x), axes, a.keepdim))


@lowers("softmax", "_softmax")
def _softmax(low: Lowering, a: Arguments) -> Values:
    return low.emit("softmax", [low.read(a.self)], low.out, axis=a.dim % len(low.out))


@lowers("log_softmax", "_log_softmax")
def _log_softmax(low: Lowering, a: Arguments) -> Values:
    x, axes = low.read(a.self), [a.dim % len(low.out)]
    off = low.binary("sub", x, reduce(low, "max", x, axes, True))
    return low.binary("sub", off, low.unary("log", reduce(low, "sum", low.unary("exp", off), axes, True)))


@lowers("logsumexp")
def _logsumexp(low: Lowering, a: Arguments) -> Values:
    x, axes = low.read(a.self), axes_of(a.dim, len(low.dims(a.self)))
    top = reduce(low, "max", x, axes, True)
    total = low.unary("log", reduce(low, "sum", low.unary("exp", low.binary("sub", x, top)), axes, True))
    made = low.binary("add", total, top)
    return made if a.keepdim else low.emit("reshape", [made], low.out)


@lowers("dropout", "feature_dropout", "alpha_dropout", "native_dropout")
def _dropout(low: Lowering, a: Arguments) -> Values:
    if a.train and a.p:
        raise Unsupported("it draws random numbers although the network is in evaluation mode")
    return low.read(a.input)
