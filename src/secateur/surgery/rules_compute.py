"""Operators that compute: products, convolutions, attention, normalisations and recurrent layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from secateur.surgery.attributes import groups_of
from secateur.surgery.labels import Value, along, decide, vector
from secateur.surgery.propagate import Made, Pass, contract, meet, op_name, rule, shape_of, sizes_of

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@rule("linear")
def linear(run: Pass, node: Node) -> Made:
    """The last dimension is contracted with the columns of the weight; its rows are new units."""
    value, weight = run.value(node.args[0]), run.value(node.args[1])
    if value is None or weight is None:
        return run.plain(node)
    decide(run.units, value, prefer=value.dim - 1)
    own = _LETTERS[: value.dim]
    columns = own[-1]
    out = own[:-1] + ("Z" if weight.dim == 2 else "")
    made = contract(
        run, node, [(value, own), (weight, ("Z" if weight.dim == 2 else "") + columns)], out, shape_of(node)
    )
    return _biased(run, node, made, 2)


def _biased(run: Pass, node: Node, made: Value, place: int) -> Value:
    bias = run.value(node.args[place]) if len(node.args) > place else None
    bias = bias or run.value(node.kwargs.get("bias"))
    return made if bias is None else meet(run, node, [made, bias], made.shape)


@rule("mm", "bmm", "matmul", "dot", "mv")
def matmul(run: Pass, node: Node) -> Made:
    """The last dimension of the first meets the second to last of the second."""
    one, other = run.value(node.args[0]), run.value(node.args[1])
    if one is None or other is None:
        return run.plain(node)
    return _matmul(run, node, one, other, shape_of(node))


def _matmul(run: Pass, node: Node, one: Value, other: Value, shape: tuple[int, ...]) -> Value:
    batch = _LETTERS[: max(one.dim, other.dim, 2) - 2]
    first = (batch[len(batch) - max(one.dim - 2, 0) :] + "XY") if one.dim > 1 else "Y"
    second = (batch[len(batch) - max(other.dim - 2, 0) :] + "YZ") if other.dim > 1 else "Y"
    out = batch + ("X" if one.dim > 1 else "") + ("Z" if other.dim > 1 else "")
    return contract(run, node, [(one, first), (other, second)], out, shape)


@rule("addmm", "baddbmm", "addmv")
def addmm(run: Pass, node: Node) -> Made:
    """A product, and something added."""
    bias, one, other = (run.value(a) for a in node.args[:3])
    if bias is None or one is None or other is None:
        return run.plain(node)
    made = _matmul(run, node, one, other, shape_of(node))
    return meet(run, node, [made, bias], made.shape)


@rule("einsum")
def einsum(run: Pass, node: Node) -> Made:
    """Any sum of products."""
    equation, values = str(node.args[0]).replace(" ", ""), [run.value(a) for a in node.args[1]]  # type: ignore[union-attr]
    if any(v is None for v in values):
        return run.plain(node)
    given, _, out = equation.partition("->")
    parts = given.split(",")
    if "->" not in equation:
        letters = "".join(parts).replace(".", "")
        out = ("..." if "..." in given else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    free = [c for c in _LETTERS if c not in equation]
    wide = (
        max(v.dim - len(p.replace("...", "")) for v, p in zip(values, parts, strict=True) if v) if "..." in given else 0
    )
    dots = "".join(free[:wide])

    def spelled(part: str, dims: int) -> str:
        if "..." not in part:
            return part
        count = dims - len(part.replace("...", ""))
        return part.replace("...", dots[len(dots) - count :])

    operands = [(v, spelled(p, v.dim)) for v, p in zip(values, parts, strict=True) if v]
    return contract(run, node, operands, out.replace("...", dots), shape_of(node))


@rule("outer", "ger")
def outer(run: Pass, node: Node) -> Made:
    """All products of two vectors."""
    one, other = run.value(node.args[0]), run.value(node.args[1])
    if one is None or other is None:
        return run.plain(node)
    return contract(run, node, [(one, "a"), (other, "b")], "ab", shape_of(node))


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(run: Pass, node: Node) -> Made:
    """Input channels meet the weight's; output channels are new units; groups go as a whole where they are small."""
    name = op_name(node)
    value, weight = run.value(node.args[0]), run.value(node.args[1])
    if value is None or weight is None:
        return run.plain(node)
    transposed = bool(node.args[6]) if name == "convolution" else "transpose" in name
    groups = groups_of(node)
    shape = shape_of(node)
    channel = value.dim - (weight.dim - 2) - 1  # an unbatched input has no first dimension
    decide(run.units, value, prefer=channel)
    decide(run.units, weight)
    run.freeze(value, "places are mixed", [d for d in range(value.dim) if d > channel])
    run.freeze(weight, "it is the extent of a kernel", range(2, weight.dim))
    inputs, rows = vector(value, channel), vector(weight, 1 if not transposed else 0)
    outputs = vector(weight, 0 if not transposed else 1)
    size, out = value.shape[channel], shape[channel]
    if groups == 1:
        _joined(run, node, inputs, rows)
        labels = outputs
    else:
        labels = _grouped(run, node, (inputs, rows, outputs), (groups, size, out), transposed)
    layers = [layer for layer in value.layers if all(layer.shape[d] == 1 for d in range(channel, value.dim))]
    if labels is not None:
        layers.append(along(labels, channel, len(shape)))
    made = Value(shape, layers)
    bias = run.value(node.args[2]) if len(node.args) > 2 else None
    return made if bias is None else meet(run, node, [made, _beside(bias, channel, len(shape))], shape)


def _beside(bias: Value, channel: int, dims: int) -> Value:
    """A bias of channels as it is added to a value with ``dims`` dimensions."""
    shape = (1,) * channel + bias.shape + (1,) * (dims - channel - 1)
    return Value(shape, [along(layer.reshape(-1), channel, dims) for layer in bias.layers])


def _joined(run: Pass, node: Node, inputs: Tensor | None, rows: Tensor | None) -> None:
    if inputs is not None and rows is not None:
        run.units.unite(inputs, rows)
    elif rows is not None:
        run.units.freeze(rows, f"it meets a dimension of fixed size in {op_name(node)}")


def _grouped(
    run: Pass,
    node: Node,
    labels: tuple[Tensor | None, Tensor | None, Tensor | None],
    sizes: tuple[int, int, int],
    transposed: bool,
) -> Tensor | None:
    """Labels of the output channels of a convolution in groups."""
    inputs, rows, outputs = labels
    groups, size, out = sizes
    # a transposed weight has (inputs, outputs a group), others have (outputs, inputs a group)
    if transposed:
        if inputs is None or rows is None or size // groups > groups:
            run.units.freeze(torch.cat([v for v in labels if v is not None]), "groups of a transposed convolution")
            return None
        run.units.unite(inputs, rows)
        whole = inputs.reshape(groups, -1)
        run.units.unite(whole, whole[:, :1])
        if outputs is not None:
            run.units.freeze(outputs, "it is shared by all groups")
        run.groups.add(node)
        return whole[:, :1].expand(groups, out // groups).reshape(-1)
    if inputs is None or outputs is None:
        found = [v for v in labels if v is not None]
        if found:
            run.units.freeze(torch.cat(found), f"it meets a dimension of fixed size in {op_name(node)}")
        return None
    own, made = inputs.reshape(groups, -1), outputs.reshape(groups, -1)
    if groups >= own.shape[1]:
        run.units.unite(own, own[:, :1])
        run.units.unite(made, own[:, :1])
        if rows is not None:
            run.units.freeze(rows, "it is shared by all groups")
        run.groups.add(node)
    else:
        run.units.unite(own, own[:1])
        run.units.unite(made, made[:1])
        if rows is not None:
            run.units.unite(rows, own[0])
    return outputs


@rule("batch_norm", "_native_batch_norm_legit_no_training", "instance_norm", "native_batch_norm")
def channel_norm(run: Pass, node: Node) -> Made:
    """A statistic, scale and shift for each channel."""
    value = run.value(node.args[0])
    if value is None:
        return run.plain(node)
    decide(run.units, value, prefer=min(1, value.dim - 1))
    if op_name(node) == "instance_norm":
        run.freeze(value, "statistics are taken over places", range(2, value.dim))
    shaped = [value]
    for argument in node.args[1:5]:
        own = run.value(argument)
        if own is not None and own.dim == 1:
            shape = (1, own.shape[0]) + (1,) * (value.dim - 2)
            shaped.append(Value(shape, [layer.reshape(shape) for layer in own.layers]))
    made = meet(run, node, shaped, value.shape)
    vals = node.meta["val"]
    return [made, *[Value(sizes_of(v)) for v in vals[1:]]] if isinstance(vals, list | tuple) else made


@rule("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def layer_norm(run: Pass, node: Node) -> Made:
    """Statistics over the last dimensions, of which the labels' elements are a part."""
    value = run.value(node.args[0])
    if value is None:
        return run.plain(node)
    count = len(node.args[1])  # type: ignore[arg-type]
    decide(run.units, value)
    for layer in value.layers:
        if any(layer.shape[d] > 1 for d in range(value.dim - count, value.dim)):
            run.units.mark(layer, "the statistics of a normalisation are taken over it")
    made = meet(run, node, [value, *run.of(node.args[2:4])], value.shape)
    vals = node.meta["val"]
    return [made, *[Value(sizes_of(v)) for v in vals[1:]]] if isinstance(vals, list | tuple) else made


@rule("group_norm")
def group_norm(run: Pass, node: Node) -> Made:
    """Whole groups are units, since a group shares its statistics; of a single group, channels."""
    value, groups = run.value(node.args[0]), int(node.args[1])  # type: ignore[arg-type]
    if value is None:
        return run.plain(node)
    decide(run.units, value, prefer=1)
    labels = vector(value, 1)
    if labels is not None and groups > 1:
        whole = labels.reshape(groups, -1)
        run.units.unite(whole, whole[:, :1])
    elif labels is not None:
        run.units.mark(labels, "the statistics of a normalisation are taken over it")
    run.freeze(value, "statistics are taken over places", range(2, value.dim))
    shaped = [value]
    for argument in node.args[2:4]:
        own = run.value(argument)
        if own is not None:
            shape = (1, own.shape[0]) + (1,) * (value.dim - 2)
            shaped.append(Value(shape, [layer.reshape(shape) for layer in own.layers]))
    return meet(run, node, shaped, value.shape)


@rule("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu")
def attention(run: Pass, node: Node) -> Made:
    """Heads go with the heads of keys and values; the size of a head with that of the keys."""
    query, key, other = (run.value(a) for a in node.args[:3])
    mask = run.value(node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None))
    if query is None or key is None or other is None or query.dim < 3:
        return run.unknown(node, "attention without batch")
    inner = not run.units.heads
    for value in (query, key, other):
        decide(run.units, value, inner=inner)
    shape = shape_of(node)
    lead = _LETTERS[: query.dim - 2]
    key, other = (_grouped_heads(run, v, query) for v in (key, other))
    scores = contract(run, node, [(query, lead + "qe"), (key, lead + "ke")], lead + "qk",
                      (*query.shape[:-1], key.shape[-2]))  # fmt: skip
    if mask is not None:
        scores = meet(run, node, [scores, mask], scores.shape)
    for v in (query, key):
        labels = vector(v, v.dim - 1)
        if labels is not None and node.kwargs.get("scale") is None:
            run.units.freeze(labels, "attention is scaled by the size of its heads")
    run.freeze(scores, "a softmax runs along it", [scores.dim - 1])
    weights = Value(scores.shape, [layer for layer in scores.layers if layer.shape[-1] == 1])
    made = contract(run, node, [(weights, lead + "qk"), (other, lead + "kf")], lead + "qf", shape)
    vals = node.meta["val"]
    return [made, None] if isinstance(vals, list | tuple) else made


def _grouped_heads(run: Pass, value: Value, query: Value) -> Value:
    """Keys or values as every query head sees them, where several share one."""
    here = value.shape[-3] if value.dim > 2 else 1
    if value.dim < 4 or here == query.shape[-3] or here == 1:
        return value
    times, d = query.shape[-3] // here, value.dim - 3
    layers = [layer.repeat_interleave(times, d) if layer.shape[d] > 1 else layer for layer in value.layers]
    shape = (*value.shape[:d], query.shape[-3], *value.shape[d + 1 :])
    return Value(shape, layers)


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(run: Pass, node: Node) -> Made:
    """One hidden index is one unit in all gates, layers and directions, since a layer has one size for all."""
    name = op_name(node)
    value = run.value(node.args[0])
    states = run.of(_listed(node.args[1]) or [node.args[1]])
    weights = [run.value(a) for a in _listed(node.args[2])]
    biased, layers, both = bool(node.args[3]), int(node.args[4]), bool(node.args[7])  # type: ignore[arg-type]
    gates = {"lstm": 4, "gru": 3}.get(name, 1)
    each = (4 if biased else 2) * (1 + both) * layers
    if value is None or len(weights) != each or any(w is None for w in weights):
        return run.unknown(node, "a recurrent layer with projections or packed sequences")
    decide(run.units, value, prefer=value.dim - 1)
    hidden = weights[1].shape[1]  # type: ignore[union-attr]
    unit = run.units.fresh(hidden)
    step, labels = (4 if biased else 2), vector(value, value.dim - 1)
    for i in range(0, each, step):
        layer = i // step // (1 + both)
        if layer:
            labels = torch.cat([unit, unit]) if both else unit
        for w in weights[i : i + step]:
            decide(run.units, w)  # type: ignore[arg-type]
            rows = vector(w, 0)  # type: ignore[arg-type]
            if rows is not None:
                run.units.unite(rows.reshape(gates, hidden), unit[None])
        inputs, back = vector(weights[i], 1), vector(weights[i + 1], 1)  # type: ignore[arg-type]
        if back is not None:
            run.units.unite(back, unit)
        _joined(run, node, labels, inputs)
    run.freeze(value, "time passes along it", [d for d in range(value.dim - 1)])
    for state in states:
        decide(run.units, state)
        own = vector(state, state.dim - 1)
        if own is not None:
            run.units.unite(own, unit)
        else:
            run.units.freeze(unit, "the state it starts from is given")
    return _hidden(node, unit, both)


def _hidden(node: Node, unit: Tensor, both: bool) -> list[Value | None]:
    """Outputs and last states: hidden indices along the last dimension, of both directions one after the other."""
    made: list[Value | None] = []
    for i, v in enumerate(node.meta["val"]):
        shape, labels = sizes_of(v), torch.cat([unit, unit]) if both and i == 0 else unit
        made.append(Value(shape, [along(labels, len(shape) - 1, len(shape))] if len(unit) > 1 else []))
    return made


def _listed(thing: Any) -> list[Any]:
    return list(thing) if isinstance(thing, list | tuple) else []
