"""Shapes of every value of a graph for one batch size, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from secateur.runtime.graph import Graph, GraphError, Node
from secateur.runtime.operators import LARGEST, MAX_RANK, OPS, cell_role

Shape = tuple[int, ...]

LIMIT = 2**30  # elements of one value or of one working array: 4 GiB of float32


@dataclass(frozen=True)
class _Step:
    """What the rule of one operator may look at."""

    attrs: dict[str, Any]
    inputs: list[Shape]
    weights: dict[str, Shape]
    batch: int
    limit: int


def infer(graph: Graph, batch: int = 1, limit: int = LIMIT) -> dict[str, Shape]:
    """The shape of every value.

    Args:
        graph: A sound graph.
        batch: What the 0 of the inputs stands for; without effect when no input has one.
        limit: Most elements that one value, or one array needed to compute it, may have.

    Raises:
        GraphError: shapes do not fit together or exceed ``limit``; the message names the node.
    """
    if not 1 <= batch <= LARGEST:
        raise GraphError(f"a batch of {batch} was asked for; expected 1 to {LARGEST}.")
    shapes: dict[str, Shape] = {}
    for spec in graph.inputs:
        shapes[spec.name] = (batch, *spec.shape[1:]) if spec.batched else spec.shape
        try:
            _fits(shapes[spec.name], limit, "it")
        except ValueError as error:
            raise GraphError(f"input {spec.name!r}: {error}.") from None
    for node in graph.nodes:
        shapes.update(zip(node.outputs, _outputs(graph, node, shapes, batch, limit), strict=True))
    return shapes


def _outputs(graph: Graph, node: Node, shapes: dict[str, Shape], batch: int, limit: int) -> list[Shape]:
    weights = {role: graph.weights[name].shape for role, name in node.weights.items()}
    step = _Step(dict(node.attrs), [shapes[name] for name in node.inputs], weights, batch, limit)
    try:
        made = _RULES[node.op](step)
        outputs = [made] * OPS[node.op].outputs if isinstance(made, tuple) else made
        for name, shape in zip(node.outputs, outputs, strict=True):
            if len(shape) > MAX_RANK:
                raise ValueError(f"{name!r} would have {len(shape)} dimensions; at most {MAX_RANK} are possible")
            _fits(shape, limit, repr(name))
    except ValueError as error:
        raise GraphError(f"{node.where}: {error}.") from None
    return outputs


def _fits(shape: Shape, limit: int, what: str) -> None:
    if math.prod(shape) > limit:
        raise ValueError(f"{what} would have {math.prod(shape)} elements {list(shape)}; the limit is {limit}")


def _demand(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _rank(shape: Shape, least: int, most: int = MAX_RANK, what: str = "its input") -> None:
    wanted = str(least) if least == most else f"{least} or more"
    _demand(least <= len(shape) <= most, f"{what} has shape {list(shape)}; expected {wanted} dimensions")


def _weight(step: _Step, role: str, wanted: Shape) -> None:
    """A weight, if the node has it, has the shape that the rest asks for."""
    found = step.weights.get(role, wanted)
    _demand(found == wanted, f"its {role} has shape {list(found)}; expected {list(wanted)}")


def _residual(step: _Step, out: Shape) -> Shape:
    if len(step.inputs) == 2:
        added = step.inputs[1]
        _demand(added == out, f"it adds a value of shape {list(added)} to its result of shape {list(out)}")
    return out


def broadcast(left: Shape, right: Shape) -> Shape:
    """NumPy's common shape of two.

    Raises:
        ValueError: there is none.
    """
    long = max(len(left), len(right))
    pairs = list(zip((1,) * (long - len(left)) + left, (1,) * (long - len(right)) + right, strict=True))
    _demand(all(a == b or 1 in (a, b) for a, b in pairs), f"{list(left)} and {list(right)} do not broadcast")
    return tuple(b if a == 1 else a for a, b in pairs)


def _spread(shape: Shape, target: Shape, what: str) -> None:
    """``shape`` broadcasts to ``target`` without changing it."""
    tail = target[len(target) - len(shape) :] if len(shape) <= len(target) else ()
    fits = len(shape) <= len(target) and all(a in (1, b) for a, b in zip(shape, tail, strict=True))
    _demand(fits, f"{what} of shape {list(shape)} does not broadcast to {list(target)}")


def expanded(shape: Shape, target: Shape, batch: int) -> Shape:
    """The target of ``expand``: 0 is the batch, and -1 keeps the size that ``shape`` has in that place from the right.

    Raises:
        ValueError: -1 stands where ``shape`` has no axis.
    """
    own = (-1,) * (len(target) - len(shape)) + shape
    sizes = tuple(mine if size == -1 else size or batch for size, mine in zip(target, own, strict=False))
    _demand(-1 not in sizes, f"{list(target)} has -1 where a value of shape {list(shape)} has no axis")
    return sizes


def windows(size: Shape, kernel: Shape, stride: Shape, pad: Shape, dilation: Shape) -> Shape:
    """How many windows fit along height and width; ``pad`` is top, left, bottom, right.

    Raises:
        ValueError: not one fits.
    """
    out = []
    for axis in range(2):
        room = size[axis] + pad[axis] + pad[axis + 2]
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        _demand(reach <= room, f"a window of {reach} does not fit in {room}, the padded {('height', 'width')[axis]}")
        out.append((room - reach) // stride[axis] + 1)
    return tuple(out)


def _slide(step: _Step, kernel: Shape, dilation: Shape) -> Shape:
    """Checks an image and its padded copy; the number of windows."""
    (x, *_), pad = step.inputs, step.attrs["pad"]
    _rank(x, 4, 4)
    _fits((*x[:2], x[2] + pad[0] + pad[2], x[3] + pad[1] + pad[3]), step.limit, "its padded input")
    return windows(x[2:], kernel, step.attrs["stride"], pad, dilation)


def _conv(step: _Step) -> Shape:
    x, weight, groups = step.inputs[0], step.weights["weight"], step.attrs["groups"]
    _rank(weight, 4, 4, "its weight")
    out = _slide(step, weight[2:], step.attrs["dilation"])
    reads = weight[1] * groups
    _demand(x[1] == reads, f"its input has {x[1]} channels; its weight {list(weight)} reads {reads}")
    _demand(weight[0] % groups == 0, f"{weight[0]} outputs do not divide into {groups} groups")
    _weight(step, "bias", weight[:1])
    return _residual(step, (x[0], weight[0], *out))


def _linear(step: _Step) -> Shape:
    x, weight = step.inputs[0], step.weights["weight"]
    _rank(weight, 2, 2, "its weight")
    _rank(x, 1)
    _demand(x[-1] == weight[1], f"its input has {x[-1]} features; its weight {list(weight)} reads {weight[1]}")
    _weight(step, "bias", weight[:1])
    return _residual(step, (*x[:-1], weight[0]))


def _affine(step: _Step) -> Shape:
    (x,) = step.inputs
    _rank(x, 2)
    _weight(step, "scale", x[1:2])
    _weight(step, "shift", x[1:2])
    return x


def _axis(step: _Step) -> int:
    axis, x = step.attrs["axis"], step.inputs[0]
    _demand(axis < len(x), f"axis {axis} of a value of shape {list(x)}")
    return axis


def _softmax(step: _Step) -> Shape:
    _axis(step)
    return step.inputs[0]


def _pool(step: _Step) -> Shape:
    kernel = step.attrs["kernel"]
    dilation = step.attrs.get("dilation", (1, 1))
    return (*step.inputs[0][:2], *_slide(step, kernel, dilation))


def _adaptive(step: _Step) -> Shape:
    _rank(step.inputs[0], 4, 4)
    return (*step.inputs[0][:2], *step.attrs["size"])


def _reduce(step: _Step) -> Shape:
    (x,), axes = step.inputs, step.attrs["axes"]
    _demand(max(axes) < len(x), f"axes {list(axes)} of a value of shape {list(x)}")
    kept = [1 if axis in axes else size for axis, size in enumerate(x)]
    return tuple(kept if step.attrs["keepdims"] else [n for axis, n in enumerate(kept) if axis not in axes])


def _trailing_norm(step: _Step) -> Shape:
    (x,), axes = step.inputs, step.attrs["axes"]
    _rank(x, axes)
    _weight(step, "weight", x[-axes:])
    _weight(step, "bias", x[-axes:])
    return x


def _group_norm(step: _Step) -> Shape:
    (x,), groups = step.inputs, step.attrs["groups"]
    _rank(x, 2)
    _demand(x[1] % groups == 0, f"{x[1]} channels do not divide into {groups} groups")
    _weight(step, "weight", x[1:2])
    _weight(step, "bias", x[1:2])
    return x


def _matmul(step: _Step) -> Shape:
    a, b = step.inputs
    _rank(a, 2, what="its first input")
    _rank(b, 2, what="its second input")
    _demand(a[-1] == b[-2], f"{list(a)} times {list(b)}: {a[-1]} columns meet {b[-2]} rows")
    return (*broadcast(a[:-2], b[:-2]), a[-2], b[-1])


def _attention(step: _Step) -> Shape:
    q, k, v = step.inputs[:3]
    for shape, what in ((q, "q"), (k, "k"), (v, "v")):
        _rank(shape, 3, 3, what)
    heads = step.attrs["heads"]
    together = q[0] == k[0] == v[0] and k[1] == v[1] and q[2] == k[2]
    _demand(together, f"q {list(q)}, k {list(k)} and v {list(v)} do not belong together")
    _demand(q[2] % heads == 0 and v[2] % heads == 0, f"{q[2]} and {v[2]} columns do not divide into {heads} heads")
    scores = (q[0], heads, q[1], k[1])
    _fits(scores, step.limit, "its scores")
    if len(step.inputs) == 4:
        _spread(step.inputs[3], scores, "its mask")
    return (*q[:2], v[2])


def _embedding(step: _Step) -> Shape:
    weight = step.weights["weight"]
    _rank(weight, 2, 2, "its weight")
    return (*step.inputs[0], weight[1])


def _concat(step: _Step) -> Shape:
    axis, first = _axis(step), step.inputs[0]
    for shape in step.inputs[1:]:
        alike = len(shape) == len(first) and all(
            a == b for place, (a, b) in enumerate(zip(shape, first, strict=True)) if place != axis
        )
        _demand(alike, f"{list(first)} and {list(shape)} differ in more than axis {axis}")
    return (*first[:axis], sum(shape[axis] for shape in step.inputs), *first[axis + 1 :])


def _slice(step: _Step) -> Shape:
    (x,), axis = step.inputs, _axis(step)
    start, stop = step.attrs["start"], step.attrs["stop"]
    _demand(start < stop <= x[axis], f"{start} to {stop} is no part of axis {axis} of {list(x)}")
    return (*x[:axis], -((start - stop) // step.attrs["step"]), *x[axis + 1 :])


def _reshape(step: _Step) -> Shape:
    (x,) = step.inputs
    target = [step.batch if size == 0 else size for size in step.attrs["shape"]]
    if -1 in target:
        known = math.prod(size for size in target if size != -1)
        target[target.index(-1)] = math.prod(x) // known
    _demand(math.prod(target) == math.prod(x), f"{list(x)} does not reshape to {list(step.attrs['shape'])}")
    return tuple(target)


def _permute(step: _Step) -> Shape:
    (x,), dims = step.inputs, step.attrs["dims"]
    _demand(sorted(dims) == list(range(len(x))), f"{list(dims)} does not permute the axes of {list(x)}")
    return tuple(x[axis] for axis in dims)


def _expand(step: _Step) -> Shape:
    (x,) = step.inputs
    target = expanded(x, step.attrs["shape"], step.batch)
    _spread(x, target, "its input")
    return target


def _pad(step: _Step) -> Shape:
    (x,), pad = step.inputs, step.attrs["pad"]
    _demand(len(pad) == len(x), f"{len(pad)} pads for a value of shape {list(x)}")
    return tuple(size + before + after for size, (before, after) in zip(x, pad, strict=True))


def _recurrent(gates: int) -> Callable[[_Step], list[Shape]]:
    def rule(step: _Step) -> list[Shape]:
        x, *states = step.inputs
        _rank(x, 3, 3)
        hidden, layers = step.attrs["hidden"], step.attrs["layers"]
        directions = 1 + step.attrs["bidirectional"]
        for layer in range(layers):
            reads = x[2] if layer == 0 else directions * hidden
            for direction in range(directions):
                for kind, shape in (("w_ih", (reads,)), ("w_hh", (hidden,)), ("b_ih", ()), ("b_hh", ())):
                    _weight(step, cell_role(kind, layer, direction), (gates * hidden, *shape))
        batch = x[0] if step.attrs["batch_first"] else x[1]
        state = (layers * directions, batch, hidden)
        _fits((x[0], x[1], gates * hidden), step.limit, "its gates")
        for given in states:
            _demand(given == state, f"a first state has shape {list(given)}; expected {list(state)}")
        return [(*x[:2], directions * hidden)] + [state] * (2 if gates == 4 else 1)

    return rule


_RULES: dict[str, Callable[[_Step], Shape | list[Shape]]] = {
    "conv": _conv,
    "linear": _linear,
    "binary": lambda step: broadcast(*step.inputs),
    "unary": lambda step: step.inputs[0],
    "const": lambda step: step.weights["value"],
    "affine": _affine,
    "softmax": _softmax,
    "max_pool": _pool,
    "avg_pool": _pool,
    "adaptive_avg_pool": _adaptive,
    "reduce": _reduce,
    "layer_norm": _trailing_norm,
    "rms_norm": _trailing_norm,
    "group_norm": _group_norm,
    "matmul": _matmul,
    "attention": _attention,
    "embedding": _embedding,
    "concat": _concat,
    "slice": _slice,
    "reshape": _reshape,
    "permute": _permute,
    "expand": _expand,
    "pad": _pad,
    "lstm": _recurrent(4),
    "gru": _recurrent(3),
}
