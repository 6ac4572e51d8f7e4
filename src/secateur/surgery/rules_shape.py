"""Operators that move elements, pass them on, or make new ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from secateur.surgery.labels import Value, along, compress, decide, spread, varied
from secateur.surgery.propagate import Made, Pass, dim_of, meet, moved, op_name, plain_args, rule, shape_of, sizes_of


def _mover(node: Node) -> Callable[[Tensor], Any]:
    name, (args, kwargs) = op_name(node), plain_args(node)
    if name in ("view", "_unsafe_view", "reshape", "view_as", "reshape_as"):
        return lambda t: t.reshape(shape_of(node))
    if name in ("expand", "expand_as", "broadcast_to"):
        return lambda t: t.expand(shape_of(node))
    target: Any = node.target
    return lambda t: target(t, *args[1:], **kwargs)


@rule(
    "view", "_unsafe_view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "permute", "transpose", "t",
    "numpy_T", "mT", "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to", "repeat", "tile",
    "repeat_interleave", "slice", "select", "narrow", "movedim", "moveaxis", "swapaxes", "swapdims", "roll", "flip",
    "rot90", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "diagonal", "unfold", "ravel",
    "atleast_1d", "atleast_2d", "atleast_3d", "adjoint", "resolve_conj", "squeeze_copy", "view_copy",
)  # fmt: skip
def move(run: Pass, node: Node) -> Made:
    """Torch moves the labels."""
    value = run.value(node.args[0])
    if value is None or any(isinstance(a, Node) and run.value(a) for a in node.args[1:] if op_name(node)[-3:] != "_as"):
        return run.unknown(node, f"{op_name(node)} by a tensor of the network")
    if op_name(node) == "roll":  # what is left would have to be rolled by another number
        dims = node.args[2] if len(node.args) > 2 and node.args[2] else range(value.dim)
        dims = [int(d) % value.dim for d in dims]  # type: ignore[union-attr]
        run.freeze(value, "it is rolled along itself", dims)
        value = Value(value.shape, [layer for layer in value.layers if all(layer.shape[d] == 1 for d in dims)])
    return moved(run, node, value, shape_of(node), _mover(node))


@rule("pixel_shuffle")
def pixel_shuffle(run: Pass, node: Node) -> Made:
    """The pixels that a channel becomes go together."""
    value = run.value(node.args[0])
    if value is None:
        return run.plain(node)
    decide(run.units, value, prefer=value.dim - 3)
    square = int(node.args[1]) ** 2  # type: ignore[arg-type]
    for layer in value.layers:
        if layer.shape[-3] > 1:
            channels = layer.reshape(-1, square)
            run.units.unite(channels, channels[:, :1])
    return move(run, node)


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unbind")
def cut(run: Pass, node: Node) -> Made:
    """Parts of a value; parts of equal size stay so, since a network asks for their number, not their sizes."""
    value = run.value(node.args[0])
    if value is None:
        return run.plain(node)
    shapes = [sizes_of(v) for v in node.meta["val"]]
    target: Any = node.target
    args, kwargs = plain_args(node)
    parts: list[Value | None] = []
    for i, shape in enumerate(shapes):
        parts.append(moved(run, node, value, shape, lambda t, i=i: target(t, *args[1:], **kwargs)[i]))
    if op_name(node) in ("split", "chunk", "tensor_split") and len(set(shapes)) == 1 and len(shapes) > 1:
        d = dim_of(node, 2) % value.dim
        for layer in value.layers:
            if layer.shape[d] > 1:
                pieces = [compress(run.units.find(p)) for p in target(spread(layer, value.shape), *args[1:], **kwargs)]
                if all(p.shape == pieces[0].shape and p.shape[d] > 1 for p in pieces):
                    run.equal.append(pieces)
    return parts


@rule("cat", "concat", "concatenate")
def cat(run: Pass, node: Node) -> Made:
    """Joined along one dimension; along the others the parts must agree."""
    return _joined(run, node, list(run.of(node.args[0])), dim_of(node, 1))  # type: ignore[arg-type]


@rule("stack")
def stack(run: Pass, node: Node) -> Made:
    """Joined along a new dimension."""
    values = [run.value(a) for a in node.args[0]]  # type: ignore[union-attr]
    d = dim_of(node, 1) % len(shape_of(node))
    parts = []
    for value in values:
        if value is not None:
            thin = (*value.shape[:d], 1, *value.shape[d:])
            parts.append(Value(thin, [layer.unsqueeze(d) for layer in value.layers]))
    return _joined(run, node, parts, d)


def _joined(run: Pass, node: Node, values: list[Value], d: int) -> Made:
    shape = shape_of(node)
    d %= len(shape)
    values = [v for v in values if v.dim == len(shape)]  # an old habit of torch: empty tensors of one dimension
    for value in values:
        decide(run.units, value, prefer=d)
    parts = [
        Value(
            tuple(1 if i == d else n for i, n in enumerate(v.shape)),
            [layer for layer in v.layers if layer.shape[d] == 1],
        )
        for v in values
    ]
    made = meet(run, node, parts, tuple(1 if i == d else n for i, n in enumerate(shape)))
    made.shape = shape
    vectors = []
    for value in values:
        labels = [layer.reshape(-1) for layer in value.layers if layer.shape[d] > 1]
        if not labels:
            labels = [run.units.fresh(value.shape[d])]
            run.units.freeze(labels[0], f"it is a part of fixed size in {op_name(node)}")
        vectors.append(labels[0])
    if any(layer.shape[d] > 1 for value in values for layer in value.layers):
        made.layers.append(along(torch.cat(vectors), d, len(shape)))
    return made


@rule("constant_pad_nd", "pad")
def pad(run: Pass, node: Node) -> Made:
    """Padding of a labelled dimension brings units of its own, which are constants."""
    value = run.value(node.args[0])
    if value is None:
        return run.plain(node)
    decide(run.units, value)
    widths: Any = list(node.args[1])  # type: ignore[call-overload]
    mode = node.args[2] if op_name(node) == "pad" and len(node.args) > 2 else "constant"
    shape, layers = shape_of(node), []
    for layer in value.layers:
        (d,) = varied(layer)
        left = 2 * (value.dim - 1 - d)
        if left >= len(widths) or not (widths[left] or widths[left + 1]):
            layers.append(layer)
        elif mode != "constant" or min(widths[left : left + 2]) < 0:
            run.units.freeze(layer, f"{mode} padding or cropping of a labelled dimension")
        else:
            labels = [run.units.fresh(widths[left]), layer.reshape(-1), run.units.fresh(widths[left + 1])]
            layers.append(along(torch.cat(labels), d, value.dim))
    return Value(shape, layers)


PASSED = (
    "clone", "contiguous", "detach", "alias", "lift_fresh_copy", "lift_fresh", "to", "_to_copy", "type_as", "dropout",
    "alpha_dropout", "feature_dropout", "native_dropout", "conj", "real", "positive", "float", "double", "half",
    "requires_grad_", "relu", "relu6", "gelu", "silu", "mish", "elu", "selu", "celu", "leaky_relu", "hardtanh",
    "hardswish", "hardsigmoid", "sigmoid", "tanh", "softplus", "softsign", "log_sigmoid", "hardshrink", "softshrink",
    "tanhshrink", "threshold", "exp", "expm1", "exp2", "log", "log1p", "log2", "log10", "sqrt", "rsqrt", "abs", "neg",
    "sign", "sgn", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "erf", "erfc", "reciprocal", "square",
    "floor", "ceil", "round", "trunc", "frac", "clamp", "clamp_min", "clamp_max", "clip", "nan_to_num", "logical_not",
    "bitwise_not", "isnan", "isinf", "isfinite", "digamma", "lgamma", "rrelu",
)  # fmt: skip
"""Functions of each number by itself, with one tensor."""

MET = (
    "add", "sub", "rsub", "mul", "div", "true_divide", "floor_divide", "pow", "float_power", "remainder", "fmod",
    "maximum", "minimum", "fmax", "fmin", "eq", "ne", "lt", "le", "gt", "ge", "logical_and",
    "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor", "where", "masked_fill", "lerp",
    "addcmul", "addcdiv", "atan2", "hypot", "copysign", "__and__", "__or__", "__xor__", "heaviside", "xlogy",
    "multiply", "divide", "subtract", "greater", "less", "greater_equal", "less_equal", "not_equal",
    "copy", "polar", "complex", "logaddexp", "bernoulli",
)  # fmt: skip
"""Functions of numbers at the same place in several tensors."""


@rule(*PASSED)
def passed(run: Pass, node: Node) -> Made:
    """The labels of the only tensor."""
    value = run.value(node.args[0])
    if value is None:
        return run.plain(node)
    made = Value(value.shape, list(value.layers))
    return [made, made] if isinstance(node.meta.get("val"), list | tuple) else made


@rule(*MET)
def met(run: Pass, node: Node) -> Made:
    """Labels at the same place go together."""
    return meet(run, node, run.of(node.all_input_nodes), shape_of(node))


@rule("prelu")
def prelu(run: Pass, node: Node) -> Made:
    """A slope for each channel, the second dimension."""
    value, weight = run.value(node.args[0]), run.value(node.args[1])
    if value is None or weight is None:
        return run.plain(node)
    decide(run.units, value, prefer=min(1, value.dim - 1))
    if weight.shape == (1,) or value.dim < 2:
        return Value(value.shape, list(value.layers))
    layers = [layer.reshape([1, -1] + [1] * (value.dim - 2)) for layer in weight.layers]
    shaped = Value((1, weight.shape[0]) + (1,) * (value.dim - 2), layers)
    return meet(run, node, [value, shaped], value.shape)


@rule("zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones",
      "new_full", "new_empty", "scalar_tensor")  # fmt: skip
def filled(run: Pass, node: Node) -> Made:
    """One number everywhere: any size would do."""
    shape = shape_of(node)
    made = [along(run.units.fresh(n, soft=True), d, len(shape)) for d, n in enumerate(shape) if n > 1]
    return Value(shape, made)


@rule("arange", "linspace", "eye", "tril_indices", "triu_indices", "rand", "randn", "randint", "randperm",
      "sym_size", "_assert_tensor_metadata", "_assert_async", "_assert_scalar", "hann_window")  # fmt: skip
def made_of_nothing(run: Pass, node: Node) -> Made:
    """No labels."""
    return run.plain(node)


@rule("getitem")
def getitem(run: Pass, node: Node) -> Made:
    """One of several results."""
    whole, index = run.values.get(node.args[0]), node.args[1]  # type: ignore[arg-type]
    return whole[index] if isinstance(whole, list) and isinstance(index, int) else run.plain(node)
