"""Rules for layers: products with weights, normalisation, pooling, attention, recurrence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import fx

from secateur.runtime.lower import Arguments, Lowering, Values, lowers
from secateur.runtime.lower_ir import Dims, Unsupported, broadcast
from secateur.runtime.lower_known import sizes
from secateur.runtime.lower_math import reduce
from secateur.runtime.lower_shape import expand, permute


def _turned(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.T)


def _lifted(array: np.ndarray) -> np.ndarray:
    return array[:, :, None, :]


def _row(array: np.ndarray) -> np.ndarray:
    return array[None, :]


# Products ----------------------------------------------------------------------------------------------------------


@lowers("linear")
def _linear(low: Lowering, a: Arguments) -> Values:
    if low.known(a.weight) is None or (a.bias is not None and low.known(a.bias) is None):
        made = _product(low, low.read(a.input), permute(low, low.read(a.weight), [1, 0]))
        return made if a.bias is None else low.binary("add", made, low.read(a.bias))
    weights = {"weight": low.weight(a.weight, "weight")}
    if a.bias is not None:
        weights["bias"] = low.weight(a.bias, "bias")
    return low.emit("linear", [low.read(a.input)], low.out, weights, act="none")


@lowers("matmul", "mm", "bmm", "mv", "dot")
def _matmul(low: Lowering, a: Arguments) -> Values:
    left, right = a.self, a.get("mat2", a.get("other", a.get("vec", a.get("tensor"))))
    wide = low.dims(right)
    if low.known(right) is not None and len(wide) == 2:
        weight = low.weight(right, "weight", _turned)
        return low.emit("linear", [low.read(left)], low.out, {"weight": weight}, act="none")
    x, y = low.read(left), low.read(right)
    if len(low.dims(left)) == 1:
        x = low.view("reshape", x, (1, *low.dims(left)))
    if len(wide) == 1:
        y = low.view("reshape", y, (*wide, 1))
    made = _product(low, x, y)
    return made if low.program.shapes[made] == low.out else low.view("reshape", made, low.out)


def _product(low: Lowering, left: str, right: str) -> str:
    a, b = low.program.shapes[left], low.program.shapes[right]
    return low.emit("matmul", [left, right], (*broadcast(a[:-2], b[:-2]), a[-2], b[-1]))


@lowers("addmm", "baddbmm")
def _addmm(low: Lowering, a: Arguments) -> Values:
    left, right = a.get("mat1", a.get("batch1")), a.get("mat2", a.get("batch2"))
    plain = low.number(a.beta) == 1 and low.number(a.alpha) == 1
    added = low.known(a.self)
    if plain and added is not None and added.dim() == 1 and low.known(right) is not None:
        weights = {"weight": low.weight(right, "weight", _turned), "bias": low.weight(a.self, "bias")}
        if low.program.weights[weights["bias"]].shape == low.out[-1:]:
            return low.emit("linear", [low.read(left)], low.out, weights, act="none")
    if low.known(right) is not None and len(low.dims(right)) == 2:
        weight = low.weight(right, "weight", _turned)
        made = low.emit("linear", [low.read(left)], low.out, {"weight": weight}, act="none")
    else:
        made = _product(low, low.read(left), low.read(right))
    made = made if low.number(a.alpha) == 1 else low.binary("mul", made, low.read(a.alpha))
    if low.number(a.beta) == 0:
        return made
    other = low.read(a.self)
    return low.binary("add", made, other if low.number(a.beta) == 1 else low.binary("mul", other, low.read(a.beta)))


def _two(value: Any, flat: bool) -> list[int]:
    """A setting of height and width; of a row alone, height takes the neutral place."""
    numbers = [value] if isinstance(value, int) else list(value)
    numbers = numbers * 2 if len(numbers) == 1 and not flat else numbers
    return numbers


def _lift(low: Lowering, value: str) -> str:
    n, c, length = low.program.shapes[value]
    return low.view("reshape", value, (n, c, 1, length))


@lowers("conv1d", "conv2d", "convolution")
def _conv(low: Lowering, a: Arguments) -> Values:
    rank = len(low.dims(a.input))
    if rank not in (3, 4) or len(low.dims(a.weight)) != rank:
        raise Unsupported("it convolves a single example, or more than two dimensions")
    if a.get("transposed"):
        raise Unsupported("the runtime has no transposed convolution")
    flat = rank == 3
    ones, zeros = ([1], [0]) if flat else ([], [])
    stride, dilation = ones + _two(a.stride, flat), ones + _two(a.dilation, flat)
    weights = {"weight": low.weight(a.weight, "weight", _lifted if flat else None)}
    kernel = low.program.weights[weights["weight"]].shape[2:]
    if isinstance(a.padding, str):
        total = [d * (k - 1) if a.padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        pad = [total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2]
    else:
        pad = (zeros + _two(a.padding, flat)) * 2
    if a.bias is not None:
        weights["bias"] = low.weight(a.bias, "bias")
    x = low.read(a.input)
    out = (*low.out[:2], 1, low.out[2]) if flat else low.out
    made = low.emit(
        "conv", [_lift(low, x) if flat else x], out, weights,
        stride=stride, pad=pad, dilation=dilation, groups=a.groups, act="none",
    )  # fmt: skip
    return low.view("reshape", made, low.out) if flat else made


@lowers("embedding")
def _embedding(low: Lowering, a: Arguments) -> Values:
    weight = low.weight(a.weight, "weight")
    return low.emit("embedding", [low.read(a.indices, "i64")], low.out, {"weight": weight})


# Normalisation -----------------------------------------------------------------------------------------------------


def _affine(low: Lowering, x: Any, scale: np.ndarray, shift: np.ndarray) -> str:
    weights = {"scale": low.array(scale, "scale"), "shift": low.array(shift, "shift")}
    return low.emit("affine", [low.read(x)], low.dims(x), weights, act="none")


def _statistics(low: Lowering, a: Arguments, x: Any, eps: float) -> str:
    """Normalisation by stored statistics: one factor and one summand for each channel, in float64."""
    mean, var = low.known(a.running_mean), low.known(a.running_var)
    if mean is None or var is None:
        raise Unsupported("it normalises by the statistics of the batch; track them (track_running_stats=True)")
    weight = None if a.weight is None else low.known(a.weight)
    bias = None if a.bias is None else low.known(a.bias)
    scale = 1 / np.sqrt(var.double().numpy() + eps)
    scale = scale if weight is None else scale * weight.double().numpy()
    shift = -mean.double().numpy() * scale
    return _affine(low, x, scale, shift if bias is None else shift + bias.double().numpy())


@lowers("_native_batch_norm_legit_no_training", "batch_norm", "native_batch_norm", "cudnn_batch_norm")
def _batch_norm(low: Lowering, a: Arguments) -> Values:
    if a.get("training"):
        raise Unsupported("it normalises by the statistics of the batch although the network is in evaluation mode")
    made = _statistics(low, a, a.input, a.eps)
    return made if hasattr(a.node.meta["val"], "shape") else [made, None, None]


@lowers("instance_norm")
def _instance_norm(low: Lowering, a: Arguments) -> Values:
    if not a.use_input_stats:
        return _statistics(low, a, a.input, a.eps)
    return low.emit("group_norm", [low.read(a.input)], low.out, _scaling(low, a), groups=low.out[1], eps=float(a.eps))


@lowers("group_norm")
def _group_norm(low: Lowering, a: Arguments) -> Values:
    return low.emit("group_norm", [low.read(a.input)], low.out, _scaling(low, a), groups=a.num_groups, eps=float(a.eps))


def _scaling(low: Lowering, a: Arguments) -> dict[str, str]:
    return {role: low.weight(a.get(role), role) for role in ("weight", "bias") if a.get(role) is not None}


@lowers("layer_norm", "rms_norm")
def _trailing_norm(low: Lowering, a: Arguments) -> Values:
    name = "rms_norm" if "rms_norm" in str(a.node.target) else "layer_norm"
    eps = a.eps if a.eps is not None else float(np.finfo(np.float32).eps)
    return low.emit(name, [low.read(a.input)], low.out, _scaling(low, a), axes=len(a.normalized_shape), eps=float(eps))


# Pooling -----------------------------------------------------------------------------------------------------------


def _overhang(size: int, out: int, reach: int, stride: int, pad: int) -> int:
    """Margin behind the end so that rounding down gives ``out`` windows."""
    return max(pad, (out - 1) * stride + reach - size - pad)


def _pool(low: Lowering, a: Arguments, op: str, out: Dims, **attrs: Any) -> str:
    shape = low.dims(a.self)
    flat = len(shape) == 3 and "1d" in str(a.node.target)
    if len(shape) != 4 and not flat:
        raise Unsupported("it pools a single example, or over more than height and width")
    ones, zeros = ([1], [0]) if flat else ([], [])
    kernel = ones + _two(a.kernel_size, flat)
    stride = ones + _two(a.stride, flat) if a.stride else kernel
    pad, dilation = zeros + _two(a.padding, flat), ones + _two(a.get("dilation", 1), flat)
    x = low.read(a.self)
    x = _lift(low, x) if flat else x
    out = (*out[:2], 1, out[2]) if flat else out
    ends = [
        _overhang(low.program.shapes[x][axis + 2], out[axis + 2], dilation[axis] * (kernel[axis] - 1) + 1, stride[axis],
                  pad[axis])
        for axis in range(2)
    ]  # fmt: skip
    if op == "avg_pool" and ends != pad:
        if attrs["count_pad"] and any(pad):
            raise Unsupported("it rounds up and counts its padding, but not all of it")
        attrs["count_pad"] = False  # torch divides a window that hangs over by what lies within
    if op == "max_pool":
        attrs["dilation"] = dilation
    made = low.emit(op, [x], out, kernel=kernel, stride=stride, pad=[*pad, *ends], **attrs)
    return low.view("reshape", made, (*out[:2], out[3])) if flat else made


@lowers("max_pool1d", "max_pool2d", "max_pool2d_with_indices", "max_pool1d_with_indices")
def _max_pool(low: Lowering, a: Arguments) -> Values:
    made = a.node.meta["val"]
    if hasattr(made, "shape"):
        return _pool(low, a, "max_pool", low.out)
    return [_pool(low, a, "max_pool", sizes(made[0])), None]


@lowers("avg_pool1d", "avg_pool2d")
def _avg_pool(low: Lowering, a: Arguments) -> Values:
    if a.get("divisor_override") is not None:
        raise Unsupported("it divides by a number of its own (divisor_override)")
    return _pool(low, a, "avg_pool", low.out, count_pad=bool(a.count_include_pad))


@lowers("adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d")
def _adaptive_avg_pool(low: Lowering, a: Arguments) -> Values:
    shape, flat = low.dims(a.self), "1d" in str(a.node.target)
    if len(shape) != (3 if flat else 4):
        raise Unsupported("it pools a single example")
    x = low.read(a.self)
    out = (*low.out[:2], 1, low.out[2]) if flat else low.out
    made = low.emit("adaptive_avg_pool", [_lift(low, x) if flat else x], out, size=list(out[2:]))
    return low.view("reshape", made, low.out) if flat else made


@lowers("adaptive_max_pool1d", "adaptive_max_pool2d")
def _adaptive_max_pool(low: Lowering, a: Arguments) -> Values:
    """The largest of everything, or equal windows; unequal ones stay in torch."""
    shape, out = low.dims(a.self), sizes(a.node.meta["val"][0])
    flat = len(shape) == 3
    x = low.read(a.self)
    if all(size == 1 for size in out[2:]) and len(shape) > 2:
        return [reduce(low, "max", x, list(range(2, len(shape))), True), None]
    if flat or any(size % new for size, new in zip(shape[2:], out[2:], strict=True)):
        raise Unsupported("its windows differ in size")
    kernel = [size // new for size, new in zip(shape[2:], out[2:], strict=True)]
    return [low.emit("max_pool", [x], out, kernel=kernel, stride=kernel, pad=[0] * 4, dilation=[1, 1]), None]


# Attention and recurrence ------------------------------------------------------------------------------------------


@lowers("scaled_dot_product_attention")
def _attention(low: Lowering, a: Arguments) -> Values:
    if a.dropout_p:
        raise Unsupported("it draws random numbers (dropout_p) although the network is in evaluation mode")
    q, k, v = low.dims(a.query), low.dims(a.key), low.dims(a.value)
    if len(q) not in (3, 4) or not len(q) == len(k) == len(v):
        raise Unsupported("its inputs do not have 3 or 4 dimensions")
    values = [low.read(x) for x in (a.query, a.key, a.value)]
    if a.get("enable_gqa") and len(q) == 4 and k[1] != q[1]:
        values[1:] = [_shared_heads(low, value, q[1]) for value in values[1:]]
        k, v = (low.program.shapes[value] for value in values[1:])
    if not q[:-2] == k[:-2] == v[:-2]:
        raise Unsupported("its inputs differ in batch or heads")
    if a.attn_mask is not None:
        values.append(_additive(low, a.attn_mask))
    scale = 1 / math.sqrt(q[-1]) if a.scale is None else float(a.scale)
    return low.emit("sdpa", values, low.out, scale=scale, causal=bool(a.is_causal))


def _shared_heads(low: Lowering, value: str, heads: int) -> str:
    n, own, length, width = low.program.shapes[value]
    apart = low.view("reshape", value, (n, own, 1, length, width))
    wide = expand(low, apart, (n, own, heads // own, length, width))
    return low.view("reshape", wide, (n, heads, length, width))


def _additive(low: Lowering, mask: fx.Node) -> str:
    """A mask to be added; where true and false say what may be seen, 0 and minus infinity."""
    if mask.meta["val"].is_floating_point():
        return low.read(mask)
    known = low.known(mask)
    if known is None:
        return low.additive(mask)
    return low.const(np.where(known.bool().numpy(), 0.0, -np.inf).astype(np.float32), f"{low.where()}.mask")


@lowers("lstm", "gru")
def _recurrent(low: Lowering, a: Arguments) -> Values:
    schema: Any = a.node.target
    lstm = schema._schema.name == "aten::lstm"
    if a.get("batch_first") is None:
        raise Unsupported("it reads packed sequences")
    x, made = low.dims(a.input), a.node.meta["val"]
    directions = 2 if a.bidirectional else 1
    hidden = low.dims(a.params[1])[1]
    gates = 4 if lstm else 3
    if len(x) != 3 or low.dims(a.params[1])[0] != gates * hidden or (a.train and a.dropout):
        raise Unsupported("it reads a single sequence, projects its state (proj_size) or is in training mode")
    weights = _recurrent_weights(low, a.params, a.num_layers, directions, a.has_biases, gates * hidden)
    states = list(a.hx) if isinstance(a.hx, list | tuple) else [a.hx]
    inputs = [low.read(a.input)]
    if not all(_zero(low, state) for state in states):
        inputs += [low.read(state) for state in states]
    return [
        *low.emit_all(
            "lstm" if lstm else "gru", inputs, [sizes(fake) for fake in made], weights,
            hidden=hidden, layers=a.num_layers, bidirectional=bool(a.bidirectional), batch_first=bool(a.batch_first),
        )
    ]  # fmt: skip


def _recurrent_weights(
    low: Lowering, params: Sequence[Any], layers: int, directions: int, biased: bool, rows: int
) -> dict[str, str]:
    kinds = ("w_ih", "w_hh", "b_ih", "b_hh") if biased else ("w_ih", "w_hh")
    if len(params) != layers * directions * len(kinds):
        raise Unsupported("it has more weights than layers ask for")
    left = iter(params)
    weights = {}
    for layer in range(layers):
        for direction in range(directions):
            for kind in kinds:
                weights[f"{kind}.{layer}.{direction}"] = low.weight(next(left), kind)
            if not biased:
                for kind in ("b_ih", "b_hh"):
                    weights[f"{kind}.{layer}.{direction}"] = low.array(np.zeros(rows, np.float32), kind)
    return weights


def _zero(low: Lowering, state: Any) -> bool:
    found = low.evaluator.known(state)
    return found is not None and not found.tensor.any()
