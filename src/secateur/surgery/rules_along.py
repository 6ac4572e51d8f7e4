"""Operators that reduce, pool, look up, or run along a dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from secateur.surgery.labels import Value, decide
from secateur.surgery.propagate import Made, Pass, dim_of, meet, moved, op_name, rule, shape_of, sizes_of
from secateur.surgery.rules_shape import met


@rule("tril", "triu")
def triangle(run: Pass, node: Node) -> Made:
    """The last two dimensions stay."""
    return along_dims(run, node, (-1, -2))


@rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp")
def running(run: Pass, node: Node) -> Made:
    """The dimension that is run along stays."""
    return along_dims(run, node, (dim_of(node, 1),))


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax")
def softmax(run: Pass, node: Node) -> Made:
    """All numbers along a dimension share a sum, so it stays."""
    return along_dims(run, node, (dim_of(node, 1),), "a softmax runs along it")


@rule("sort", "topk", "kthvalue")
def ordered(run: Pass, node: Node) -> Made:
    """The dimension that is put in order stays; the others hold for values and places alike."""
    d = dim_of(node, {"sort": 1, "topk": 2, "kthvalue": 2}[op_name(node)], -1)
    value = run.value(node.args[0])
    if value is None or not value.dim:
        return run.plain(node)
    d %= value.dim
    run.freeze(value, f"{op_name(node)} runs along it", [d])
    layers = [layer for layer in value.layers if layer.shape[d] == 1]
    return [Value(sizes_of(v), list(layers)) for v in node.meta["val"]]


def along_dims(run: Pass, node: Node, dims: tuple[int, ...], why: str = "") -> Made:
    """Some dimensions of a value stay, the others pass."""
    value = run.value(node.args[0])
    if value is None or not value.dim:
        return run.plain(node)
    decide(run.units, value)
    dims = tuple(d % value.dim for d in dims)
    run.freeze(value, why or f"{op_name(node)} runs along it", dims)
    layers = [layer for layer in value.layers if all(layer.shape[d] == 1 for d in dims)]
    return Value(value.shape, layers)


@rule("sum", "mean", "var", "std", "amax", "amin", "any", "all", "prod", "logsumexp", "argmax", "argmin", "max", "min",
      "norm", "linalg_vector_norm", "var_mean", "std_mean", "count_nonzero", "median", "nanmean", "nansum")  # fmt: skip
def reduced(run: Pass, node: Node) -> Made:
    """A sum over labelled elements loses theirs; a mean then is one over fewer; the rest is not known."""
    name = op_name(node)
    others = [v for v in map(run.value, node.args) if v is not None]
    if name in ("max", "min") and len(others) == 2:
        return met(run, node)
    value = others[0] if others else None
    if value is None:
        return run.plain(node)
    decide(run.units, value)
    dims, keep = _reduced(node, value.dim)
    for layer in value.layers:
        if any(layer.shape[d] > 1 for d in dims):
            if name == "mean":
                run.units.mark(layer, "a mean is taken over it")
            elif name != "sum":
                run.units.freeze(layer, f"{name} is taken over it")
    left = [layer for layer in value.layers if all(layer.shape[d] == 1 for d in dims)]

    def shrunk(layer: Tensor) -> Tensor:
        return layer if keep else layer.reshape([n for d, n in enumerate(layer.shape) if d not in dims])

    vals = node.meta["val"]
    made = []
    for v in vals if isinstance(vals, list | tuple) else [vals]:
        shape = sizes_of(v)
        made.append(Value(shape, [shrunk(layer) for layer in left]))
    return made if isinstance(vals, list | tuple) else made[0]


def _reduced(node: Node, dims: int) -> tuple[set[int], bool]:
    """Which dimensions a reduction is over, and whether they stay with size 1."""
    schema = node.target._schema  # type: ignore[union-attr]
    given: dict[str, Any] = dict(node.kwargs)
    for argument, found in zip(schema.arguments, node.args, strict=False):
        given[argument.name] = found
    over = given.get("dim", given.get("dims"))
    keep = bool(given.get("keepdim", False))
    if over is None or over == []:
        return set(range(dims)), keep
    return {int(d) % max(dims, 1) for d in (over if isinstance(over, list | tuple) else [over])}, keep


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
      "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
      "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_linear1d",
      "upsample_bicubic2d", "upsample_trilinear3d", "_adaptive_avg_pool2d", "reflection_pad1d", "reflection_pad2d",
      "replication_pad1d", "replication_pad2d", "max_pool2d_with_indices", "_upsample_nearest_exact2d",
      "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler", "grid_sampler_2d",
      "reflection_pad3d", "replication_pad3d", "adaptive_max_pool3d")  # fmt: skip
def pooled(run: Pass, node: Node) -> Made:
    """Each channel by itself; places stay."""
    value = run.value(node.args[0])
    if value is None:
        return run.plain(node)
    space = {"1d": 1, "2d": 2, "3d": 3}.get(op_name(node).replace("_with_indices", "").replace("_aa", "")[-2:], 2)
    first = value.dim - space
    decide(run.units, value, prefer=first - 1)
    run.freeze(value, "places are pooled or moved", range(first, value.dim))
    layers = [layer for layer in value.layers if all(n == 1 for n in layer.shape[first:])]
    vals = node.meta["val"]
    if isinstance(vals, list | tuple):
        return [Value(sizes_of(v), list(layers)) for v in vals]
    return Value(shape_of(node), layers)


@rule("embedding")
def embedding(run: Pass, node: Node) -> Made:
    """Rows are looked up; columns are units."""
    weight, shape = run.value(node.args[0]), shape_of(node)
    if weight is None:
        return run.plain(node)
    decide(run.units, weight)
    run.freeze(weight, "its rows are looked up", [0])
    return Value(
        shape, [layer.reshape([1] * (len(shape) - 1) + [-1]) for layer in weight.layers if layer.shape[0] == 1]
    )


@rule("index", "_unsafe_index")
def index(run: Pass, node: Node) -> Made:
    """Dimensions that are looked up stay; the others pass."""
    value, places = run.value(node.args[0]), list(node.args[1])  # type: ignore[call-overload]
    if value is None or any(v.layers for v in run.of(places)):
        return run.unknown(node, "an index that depends on labelled values")
    decide(run.units, value)
    dims, at, fake = [], 0, []
    for place in places:
        if place is None:
            fake.append(None)
            at += 1
            continue
        val = place.meta["val"]
        wide = val.dim() if val.dtype == torch.bool else 1
        if val.dtype == torch.bool:
            return run.unknown(node, "an index of truth values")
        fake.append(torch.zeros(sizes_of(val), dtype=torch.int64))
        dims.append(at)
        at += wide
    run.freeze(value, "it is looked up by number", dims)
    kept = Value(value.shape, [layer for layer in value.layers if all(layer.shape[d] == 1 for d in dims)])
    target: Any = node.target
    return moved(run, node, kept, shape_of(node), lambda t: target(t, fake))


@rule("index_select", "gather", "take_along_dim")
def picked(run: Pass, node: Node) -> Made:
    """The dimension that is looked up stays; the others pass."""
    value, shape = run.value(node.args[0]), shape_of(node)
    d = int(node.args[1]) if isinstance(node.args[1], int) else dim_of(node, 2)
    if value is None:
        return run.plain(node)
    decide(run.units, value)
    d %= max(value.dim, 1)
    run.freeze(value, "it is looked up by number", [d])
    own = Value(
        tuple(1 if i == d else n for i, n in enumerate(value.shape)),
        [layer for layer in value.layers if layer.shape[d] == 1],
    )
    if op_name(node) == "index_select":
        return Value(shape, own.layers)
    places = run.of(node.args[1:])
    others = []
    for place in places:
        run.freeze(place, "its places are looked up", [d])
        others.append(Value(own.shape, [layer for layer in place.layers if layer.shape[d] == 1]))
    made = meet(run, node, [own, *others], own.shape)
    made.shape = shape
    return made


@rule("glu")
def glu(run: Pass, node: Node) -> Made:
    """One half gates the other."""
    value = run.value(node.args[0])
    if value is None:
        return run.plain(node)
    d = dim_of(node, 1, -1) % value.dim
    decide(run.units, value, prefer=d)
    layers = []
    for layer in value.layers:
        if layer.shape[d] > 1:
            one, other = layer.chunk(2, d)
            run.units.unite(one, other)
            layers.append(one)
        else:
            layers.append(layer)
    return Value(shape_of(node), layers)


@rule("one_hot", "bucketize", "searchsorted", "nonzero_static")
def made_anew(run: Pass, node: Node) -> Made:
    """What it reads stays."""
    return run.unknown(node, f"{op_name(node)} makes a dimension of values")
