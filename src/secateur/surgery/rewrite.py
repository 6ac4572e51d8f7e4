"""The exported graph with other sizes, for networks whose own forward writes sizes down."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from secateur.core.errors import ModelError
from secateur.runtime.lower_export import quiet
from secateur.surgery.attributes import SIZED, groups_of, kept_sizes, padding
from secateur.surgery.labels import Value
from secateur.surgery.propagate import Pass, dim_of, number, op_name
from secateur.surgery.slicing import Kept, slice_module


def rewrite(run: Pass, kept: Kept, gone: Tensor) -> nn.Module:
    """A ``GraphModule`` that computes what the shrunken network does; dropout and BatchNorm act as in evaluation mode.

    Args:
        run: the labelled graph.
        kept: what stays of each tensor.
        gone: True for the labels of units that go.
    """
    with quiet():
        whole = run.program.module(check_guards=False)
    plain = GraphModule(whole, whole.graph)
    by_name = {node.name: node for node in plain.graph.nodes}
    for node in run.program.graph.nodes:
        twin = by_name.get(node.name)
        if node.op == "call_function" and twin is not None and twin.op == "call_function":
            _resize(run, node, twin, gone)
            if op_name(node) in ("view", "_unsafe_view"):  # what has other sizes may lie otherwise in memory
                twin.target = torch.ops.aten.reshape.default
    for twin in [n for n in plain.graph.nodes if n.op == "call_function" and op_name(n) == "_assert_tensor_metadata"]:
        plain.graph.erase_node(twin)
    plain.recompile()
    slice_module(plain, _known(plain, kept))
    with quiet():
        return copy.deepcopy(plain)  # what was not sliced would still be the dense network's own


def _known(module: nn.Module, kept: Kept) -> dict[str, Mapping[int, Tensor]]:
    names = {n for n, _ in module.named_parameters(remove_duplicate=False)}
    names |= {n for n, _ in module.named_buffers(remove_duplicate=False)}
    return {name: dims for name, dims in kept.items() if name in names}


def _resize(run: Pass, node: Node, twin: Node, gone: Tensor) -> None:
    name, value = op_name(node), run.values.get(node)
    if name in SIZED and isinstance(value, Value):
        place = 0 if name in ("zeros", "ones", "full", "empty") else 1
        _set(twin, place, _mixed(twin, twin.args[place], value.shape, kept_sizes(run, value, gone)))
    elif name == "unflatten" and isinstance(value, Value):
        d = int(node.args[1]) % run.of([node.args[0]])[0].dim  # type: ignore[arg-type]
        sizes = list(node.args[2])  # type: ignore[call-overload]
        after = kept_sizes(run, value, gone)[d : d + len(sizes)]
        _set(twin, 2, _mixed(twin, sizes, value.shape[d : d + len(sizes)], after))
    elif name in ("split", "split_with_sizes", "chunk", "tensor_split") and isinstance(value, list):
        _parts(run, node, twin, value, gone)
    elif name in ("slice", "narrow", "select"):
        _bounds(run, node, twin, gone)
    elif name in ("layer_norm", "rms_norm"):
        source = run.of([node.args[0]])[0]
        count = len(node.args[1])  # type: ignore[arg-type]
        _set(twin, 1, list(kept_sizes(run, source, gone)[-count:]))
    elif name == "group_norm" and run.value(node.args[0]) is not None:
        labels = _vector(run, node.args[0], 1)
        if labels is not None and int(node.args[1]) > 1:  # type: ignore[arg-type]
            _set(twin, 1, int((~gone[labels.reshape(int(node.args[1]), -1)[:, 0]]).sum()))  # type: ignore[arg-type]
    elif node in run.groups and isinstance(value, Value):
        groups = groups_of(node)
        space = len(node.args[1].meta["val"].shape) - 2  # type: ignore[union-attr]
        labels = _vector(run, node, value.dim - space - 1)
        if labels is not None:
            _set(twin, 8 if name == "convolution" else 6, int((~gone[labels.reshape(groups, -1)[:, 0]]).sum()))
    elif name in ("constant_pad_nd", "pad") and isinstance(value, Value):
        _padding(run, node, twin, value, gone)


def _set(twin: Node, place: int, new: Any) -> None:
    if place < len(twin.args):
        twin.update_arg(place, new)


def _mixed(twin: Node, given: Any, before: tuple[int, ...], after: tuple[int, ...]) -> list[Any]:
    """Sizes as given, but for those that change; a free size that is a multiple of one that changes changes with it."""
    sizes = []
    for size, old, new in zip(given, before, after, strict=True):
        if isinstance(size, Node) and new != old:
            part = Fraction(new, old)
            with twin.graph.inserting_before(twin):
                grown = twin.graph.call_function(operator.mul, (size, part.numerator))
                size = twin.graph.call_function(operator.floordiv, (grown, part.denominator))
        elif new != old and size != -1:
            size = new
        sizes.append(size)
    return sizes


def _vector(run: Pass, node: Any, d: int) -> Tensor | None:
    value = run.value(node)
    for layer in value.layers if value else ():
        if layer.shape[d] > 1:
            return run.units.find(layer).reshape(-1)
    return None


def _parts(run: Pass, node: Node, twin: Node, parts: list[Value | None], gone: Tensor) -> None:
    d = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    found = [p for p in parts if p is not None]
    d = int(d) % found[0].dim  # type: ignore[arg-type]
    sizes = [kept_sizes(run, p, gone)[d] for p in found]
    if sizes == [p.shape[d] for p in found]:
        return
    twin.target = torch.ops.aten.split_with_sizes.default
    twin.args, twin.kwargs = (twin.args[0], sizes, d), {}


def _bounds(run: Pass, node: Node, twin: Node, gone: Tensor) -> None:
    source = run.value(node.args[0])
    if source is None:
        return
    d = dim_of(node, 1) % source.dim
    labels = _vector(run, node.args[0], d)
    if labels is None:
        return
    stays, size = ~gone[labels], source.shape[d]
    if bool(stays.all()):
        return
    before = [0, *stays.long().cumsum(0).tolist()]

    def moved(place: Any, default: int) -> int:
        found = default if place is None else number(place)
        return before[min(max(found + size if found < 0 else found, 0), size)]

    args: Any = list(node.args) + [None] * 3
    if op_name(node) == "slice" and len(node.args) > 4 and number(args[4]) != 1:
        _strided(twin, stays, before, [None if a is None else number(a) for a in args[2:5]])
    elif op_name(node) == "slice":
        _set(twin, 2, moved(args[2], 0))
        if len(twin.args) > 3:
            twin.update_arg(3, moved(args[3], size))
    elif op_name(node) == "select":
        _set(twin, 2, moved(args[2], 0))
    else:
        start = number(args[2])
        _set(twin, 2, moved(start, 0))
        _set(twin, 3, moved(start + number(args[3]), size) - moved(start, 0))


def _strided(twin: Node, stays: Tensor, before: list[int], bounds: list[int | None]) -> None:
    """A slice in steps: what stays of it, where that lies in steps of one length again."""
    places = [before[i] for i in range(*slice(*bounds).indices(len(stays))) if bool(stays[i])]
    steps = {b - a for a, b in zip(places, places[1:], strict=False)}
    if len(steps) > 1 or not places:
        raise ModelError("a slice in steps would no longer be one; remove other units, or whole periods of the slice.")
    step = steps.pop() if steps else 1
    for place, new in zip((2, 3, 4), (places[0], places[-1] + 1, step), strict=True):
        _set(twin, place, new)


def _padding(run: Pass, node: Node, twin: Node, value: Value, gone: Tensor) -> None:
    widths = padding(run, node, value, gone)
    if widths != list(node.args[1]):  # type: ignore[call-overload]
        _set(twin, 1, widths)
