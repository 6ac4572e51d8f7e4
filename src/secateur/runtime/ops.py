"""Every operator in NumPy: the plain definition that faster code is checked against.

Arrays are float32 or float64 and stay what they are; no operator stores more than a few copies of its input and output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from secateur.core.errors import DataError
from secateur.runtime.graph import Node
from secateur.runtime.operators import cell_role
from secateur.runtime.shapes import expanded, windows

Array = np.ndarray
Value = Any  # an array, or the scalar that NumPy makes of one without dimensions
Attrs = Mapping[str, Any]
Weights = Mapping[str, Array]

_erf = np.vectorize(math.erf, otypes=[np.float64])


def compute(node: Node, inputs: Sequence[Array], weights: Weights, batch: int = 1) -> list[Array]:
    """The outputs of one node.

    Args:
        node: The node, whose shapes are already known to fit.
        inputs: One array for each value that it reads, all of one floating type (token ids: int64).
        weights: One array for each role, of that type.
        batch: What 0 stands for in a shape.

    Raises:
        DataError: a token id outside the embedding.
    """
    attrs = {**node.attrs, "batch": batch}
    dtype = next((a.dtype for a in (*inputs, *weights.values()) if a.dtype.kind == "f"), np.dtype(np.float32))
    try:
        with np.errstate(all="ignore"):  # infinities and NaN are results here
            made = _OPS[node.op](list(inputs), weights, attrs)
            results = list(made) if isinstance(made, tuple) else [made]
            act = node.attrs.get("act", "none")
            if act != "none":
                results = [_UNARY[act](result) for result in results]
    except IndexError as error:
        raise DataError(f"{node.where}: {error}") from None
    return [np.asarray(result, dtype) for result in results]


def _sigmoid(x: Value) -> Value:
    return 1 / (1 + np.exp(-x))


def _relu6(x: Value) -> Value:
    return np.minimum(np.maximum(x, 0), 6)


def _gelu(x: Value) -> Value:
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def _gelu_tanh(x: Value) -> Value:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


_UNARY: dict[str, Callable[[Value], Value]] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu6": _relu6,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "hardswish": lambda x: x * _relu6(x + 3) / 6,
    "hardsigmoid": lambda x: _relu6(x + 3) / 6,
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "neg": np.negative,
    "abs": np.abs,
    "square": np.square,
    "reciprocal": lambda x: 1 / x,
}

_BINARY: dict[str, Callable[[Value, Value], Value]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
}

_REDUCTIONS: dict[str, Callable[..., Value]] = {"mean": np.mean, "sum": np.sum, "max": np.max}


def _along(values: Array, rank: int) -> Array:
    """One number for each channel, shaped to broadcast over [N, C, ...]."""
    return values.reshape(-1, *(1,) * (rank - 2))


def _taps(x: Array, kernel: tuple[int, ...], attrs: Attrs, fill: float) -> tuple[tuple[int, ...], Any]:
    """The output's height and width, and for each place in the window what all windows see there."""
    top, left, bottom, right = attrs["pad"]
    stride, dilation = attrs["stride"], attrs.get("dilation", (1, 1))
    high, wide = windows(x.shape[2:], kernel, stride, attrs["pad"], dilation)
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill)

    def see() -> Any:
        for row in range(kernel[0]):
            first = row * dilation[0]
            rows = slice(first, first + (high - 1) * stride[0] + 1, stride[0])
            for column in range(kernel[1]):
                start = column * dilation[1]
                columns = slice(start, start + (wide - 1) * stride[1] + 1, stride[1])
                yield (row, column), padded[:, :, rows, columns]

    return (high, wide), see()


def _conv(inputs: list[Array], weights: Weights, attrs: Attrs) -> Array:
    x, weight, groups = inputs[0], weights["weight"], attrs["groups"]
    count, outs, reads = len(x), len(weight), weight.shape[1]
    size, taps = _taps(x, weight.shape[2:], attrs, 0.0)
    out = np.zeros((count, groups, outs // groups, math.prod(size)), x.dtype)
    for (row, column), seen in taps:
        columns = seen.reshape(count, groups, reads, -1)
        out += weight[:, :, row, column].reshape(groups, -1, reads) @ columns
    out = out.reshape(count, outs, *size)
    if "bias" in weights:
        out += _along(weights["bias"], 4)
    return out + inputs[1] if len(inputs) == 2 else out


def _linear(inputs: list[Array], weights: Weights, attrs: Attrs) -> Array:
    out = inputs[0] @ weights["weight"].T
    if "bias" in weights:
        out = out + weights["bias"]
    return out + inputs[1] if len(inputs) == 2 else out


def _affine(inputs: list[Array], weights: Weights, attrs: Attrs) -> Array:
    (x,) = inputs
    return x * _along(weights["scale"], x.ndim) + _along(weights["shift"], x.ndim)


def _softmax(x: Array, axis: int) -> Array:
    shifted = np.exp(x - x.max(axis, keepdims=True))
    return shifted / shifted.sum(axis, keepdims=True)


def _max_pool(inputs: list[Array], weights: Weights, attrs: Attrs) -> Array:
    (x,) = inputs
    size, taps = _taps(x, attrs["kernel"], attrs, -math.inf)
    out = np.full((*x.shape[:2], *size), -math.inf, x.dtype)
    for _, seen in taps:
        np.maximum(out, seen, out=out)
    return out


def _avg_pool(inputs: list[Array], weights: Weights, attrs: Attrs) -> Array:
    (x,) = inputs
    size, taps = _taps(x, attrs["kernel"], attrs, 0.0)
    out = np.zeros((*x.shape[:2], *size), x.dtype)
    for _, seen in taps:
        out += seen
    if attrs["count_pad"]:
        return out / math.prod(attrs["kernel"])
    _, ones = _taps(np.ones((1, 1, *x.shape[2:]), x.dtype), attrs["kernel"], attrs, 0.0)
    return out / sum(seen for _, seen in ones)


def _adaptive_avg_pool(inputs: list[Array], weights: Weights, attrs: Attrs) -> Array:
    (x,) = inputs
    for axis, out in zip((2, 3), attrs["size"], strict=True):
        size = x.shape[axis]
        parts = [slice(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]
        x = np.stack([x[(slice(None),) * axis + (part,)].mean(axis) for part in parts], axis)
    return x


def _reduce(inputs: list[Array], weights: Weights, attrs: Attrs) -> Value:
    return _REDUCTIONS[attrs["fn"]](inputs[0], axis=attrs["axes"], keepdims=attrs["keepdims"])


def _normalised(x: Array, axes: tuple[int, ...], eps: float) -> Array:
    centred = x - x.mean(axes, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(axes, keepdims=True) + eps)


def _layer_norm(inputs: list[Array], weights: Weights, attrs: Attrs) -> Array:
    (x,) = inputs
    out = _normalised(x, tuple(range(x.ndim - attrs["axes"], x.ndim)), attrs["eps"])
    return out * weights.get("weight", 1) + weights.get("bias", 0)


def _rms_norm(inputs: list[Array], weights: Weights, attrs: Attrs) -> Array:
    (x,) = inputs
    axes = tuple(range(x.ndim - attrs["axes"], x.ndim))
    return x / np.sqrt(np.square(x).mean(axes, keepdims=True) + attrs["eps"]) * weights.get("weight", 1)


def _group_norm(inputs: list[Array], weights: Weights, attrs: Attrs) -> Array:
    (x,) = inputs
    out = _normalised(x.reshape(len(x), attrs["groups"], -1), (2,), attrs["eps"]).reshape(x.shape)
    if "weight" in weights:
        out = out * _along(weights["weight"], x.ndim)
    return out + _along(weights["bias"], x.ndim) if "bias" in weights else out


def _attention(inputs: list[Array], weights: Weights, attrs: Attrs) -> Array:
    def split(x: Array) -> Array:
        return x.reshape(*x.shape[:2], attrs["heads"], -1).transpose(0, 2, 1, 3)

    q, k, v = (split(x) for x in inputs[:3])
    scores = q @ k.transpose(0, 1, 3, 2) * attrs["scale"]
    if len(inputs) == 4:
        scores = scores + inputs[3]
    if attrs["causal"]:
        scores = np.where(np.tri(*scores.shape[2:], dtype=bool), scores, -math.inf)
    closed = (scores == -math.inf).all(-1, keepdims=True)  # a query that no key is open to gives zeros
    mixed = np.where(closed, 0, _softmax(np.where(closed, 0, scores), -1)).astype(v.dtype) @ v
    return mixed.transpose(0, 2, 1, 3).reshape(*inputs[0].shape[:2], -1)


def _embedding(inputs: list[Array], weights: Weights, attrs: Attrs) -> Array:
    (ids,), weight = inputs, weights["weight"]
    outside = ids[(ids < 0) | (ids >= len(weight))]
    if outside.size:
        raise IndexError(f"token id {outside.flat[0]} is not one of the {len(weight)} rows, 0 to {len(weight) - 1}.")
    return weight[ids]


def _slice(inputs: list[Array], weights: Weights, attrs: Attrs) -> Array:
    part = slice(attrs["start"], attrs["stop"], attrs["step"])
    return inputs[0][(slice(None),) * attrs["axis"] + (part,)]


def _reshape(inputs: list[Array], weights: Weights, attrs: Attrs) -> Array:
    return inputs[0].reshape([size or attrs["batch"] for size in attrs["shape"]])


def _expand(inputs: list[Array], weights: Weights, attrs: Attrs) -> Array:
    (x,) = inputs
    return np.broadcast_to(x, expanded(x.shape, attrs["shape"], attrs["batch"]))


def _pad(inputs: list[Array], weights: Weights, attrs: Attrs) -> Array:
    (x,) = inputs
    return np.pad(x, attrs["pad"], constant_values=attrs["value"]) if x.ndim else x


def _lstm_step(gates: Array, again: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
    enter, forget, new, leave = np.split(gates + again, 4, -1)
    cell = _sigmoid(forget) * state[1] + _sigmoid(enter) * np.tanh(new)
    return _sigmoid(leave) * np.tanh(cell), cell


def _gru_step(gates: Array, again: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
    reset, keep, new = np.split(gates, 3, -1)
    reset_again, keep_again, new_again = np.split(again, 3, -1)
    keep = _sigmoid(keep + keep_again)
    new = np.tanh(new + _sigmoid(reset + reset_again) * new_again)
    return ((1 - keep) * new + keep * state[0],)


_Advance = Callable[[Array, Array, tuple[Array, ...]], tuple[Array, ...]]


def _recurrent(advance: _Advance, states: int) -> Callable[[list[Array], Weights, Attrs], tuple[Array, ...]]:
    """A layer over time whose cell has so many states; what it returns is the output, then the last states."""

    def run(inputs: list[Array], weights: Weights, attrs: Attrs) -> tuple[Array, ...]:
        x = inputs[0].swapaxes(0, 1) if attrs["batch_first"] else inputs[0]
        directions = 1 + attrs["bidirectional"]
        shape = (attrs["layers"] * directions, x.shape[1], attrs["hidden"])
        first = inputs[1:] or [np.zeros(shape, x.dtype)] * states
        last = [np.empty(shape, x.dtype) for _ in range(states)]
        for layer in range(attrs["layers"]):
            sides = []
            for direction in range(directions):
                w_ih, w_hh, b_ih, b_hh = (
                    weights[cell_role(kind, layer, direction)] for kind in ("w_ih", "w_hh", "b_ih", "b_hh")
                )
                place = layer * directions + direction
                state = tuple(start[place] for start in first)
                gates = x @ w_ih.T + b_ih
                out = np.empty((*x.shape[:2], attrs["hidden"]), x.dtype)
                for time in range(len(x))[:: -1 if direction else 1]:
                    state = advance(gates[time], state[0] @ w_hh.T + b_hh, state)
                    out[time] = state[0]
                for kept, final in zip(last, state, strict=True):
                    kept[place] = final
                sides.append(out)
            x = np.concatenate(sides, -1)
        return (x.swapaxes(0, 1) if attrs["batch_first"] else x, *last)

    return run


_OPS: dict[str, Callable[[list[Array], Weights, Attrs], Value]] = {
    "conv": _conv,
    "linear": _linear,
    "binary": lambda inputs, weights, attrs: _BINARY[attrs["fn"]](*inputs),
    "unary": lambda inputs, weights, attrs: _UNARY[attrs["fn"]](*inputs),
    "const": lambda inputs, weights, attrs: weights["value"],
    "affine": _affine,
    "softmax": lambda inputs, weights, attrs: _softmax(inputs[0], attrs["axis"]),
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "adaptive_avg_pool": _adaptive_avg_pool,
    "reduce": _reduce,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "matmul": lambda inputs, weights, attrs: inputs[0] @ inputs[1],
    "attention": _attention,
    "embedding": _embedding,
    "concat": lambda inputs, weights, attrs: np.concatenate(inputs, attrs["axis"]),
    "slice": _slice,
    "reshape": _reshape,
    "permute": lambda inputs, weights, attrs: inputs[0].transpose(attrs["dims"]),
    "expand": _expand,
    "pad": _pad,
    "lstm": _recurrent(_lstm_step, 2),
    "gru": _recurrent(_gru_step, 1),
}
