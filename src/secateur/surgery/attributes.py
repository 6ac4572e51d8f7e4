"""Sizes that modules remember: known attributes of layers, and the numbers that a forward pass writes down."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from secateur.surgery.attention import ThinAttention
from secateur.surgery.labels import Value, vector
from secateur.surgery.propagate import Pass, op_name, shape_of

_ROWS = ("out_features", "out_channels", "num_features", "num_channels", "num_parameters", "nf", "num_embeddings")
SIZED = (
    "view", "reshape", "expand", "_unsafe_view", "new_zeros", "new_ones", "new_full", "new_empty", "zeros", "ones",
    "full", "empty", "broadcast_to",
)  # fmt: skip
"""Operators that are told the size of what they give."""

_RESIZED = (*SIZED, "unflatten", "repeat")
_WIDTHS = ("d_model", "embed_dim", "hidden_size", "hidden_dim", "dim", "width", "n_embd", "channels", "num_features")
_COLUMNS = ("in_features", "in_channels", "embedding_dim", "nx")


@dataclass(frozen=True)
class Change:
    """An attribute of a module that takes another value.

    Args:
        path: of the module.
        name: of the attribute.
        old: its value.
        new: the value it takes.
    """

    path: str
    name: str
    old: Any
    new: Any


def known(dense: nn.Module, small: nn.Module) -> list[Change]:
    """Attributes of layers that follow from the shapes of their weights.

    Args:
        dense: the network as it was.
        small: its copy with sliced parameters.
    """
    changes: list[Change] = []
    for (path, before), after in zip(dense.named_modules(), small.modules(), strict=True):
        changes += _of_layer(path, before, after)
    return changes


def _of_layer(path: str, before: nn.Module, after: nn.Module) -> Iterable[Change]:
    old, new = before._parameters.get("weight"), after._parameters.get("weight")
    stats = before._buffers.get("running_mean"), after._buffers.get("running_mean")
    if old is None and stats[0] is not None:
        old, new = stats
    if isinstance(before, nn.RNNBase):
        for name, key in (("input_size", "weight_ih_l0"), ("hidden_size", "weight_hh_l0")):
            one, other = before.get_parameter(key), after.get_parameter(key)
            yield from _changed(path, before, name, one.shape[1], other.shape[1])
        return
    if type(before) in (nn.MultiheadAttention, ThinAttention):
        yield from _of_attention(path, before, after)
    if old is None or new is None or old.shape == new.shape:
        return
    transposed = bool(getattr(before, "transposed", False))
    first, second = (_COLUMNS, _ROWS) if transposed or isinstance(before, nn.Embedding) else (_ROWS, _COLUMNS)
    if type(before).__name__ == "Conv1D":  # transformers keeps (in, out)
        first, second = _COLUMNS, _ROWS
    if isinstance(before, nn.Embedding):
        first, second = ("num_embeddings",), ("embedding_dim",)
    groups = int(getattr(before, "groups", 1))
    for names, d, times in ((first, 0, 1), (second, 1, groups)):
        if d < old.dim():
            for name in names:
                yield from _changed(path, before, name, old.shape[d] * times, new.shape[d] * times)
    shape = getattr(before, "normalized_shape", None)
    if isinstance(shape, tuple) and shape == tuple(old.shape):
        yield Change(path, "normalized_shape", shape, tuple(new.shape))


def _of_attention(path: str, before: Any, after: Any) -> Iterable[Change]:
    """Torch's own attention cannot have heads that are narrower than its width; ours, with the same parameters, can."""
    rows = [m.in_proj_weight if m.in_proj_weight is not None else m.q_proj_weight for m in (before, after)]
    times = 3 if before.in_proj_weight is not None else 1
    if rows[0].shape == rows[1].shape and before.out_proj.weight.shape == after.out_proj.weight.shape:
        return
    if before.bias_k is not None or before.add_zero_attn:
        return
    inner = [w.shape[0] // times for w in rows]
    head = inner[0] // before.num_heads
    if type(before) is nn.MultiheadAttention:
        yield Change(path, "__class__", nn.MultiheadAttention, ThinAttention)
    yield from _changed(path, before, "num_heads", before.num_heads, inner[1] // head)
    yield from _changed(path, before, "embed_dim", before.out_proj.weight.shape[0], after.out_proj.weight.shape[0])
    for name, weight in (("kdim", "k_proj_weight"), ("vdim", "v_proj_weight")):
        one, other = (getattr(m, weight) if times == 1 else m.in_proj_weight for m in (before, after))
        yield from _changed(path, before, name, one.shape[1], other.shape[1])


def around(model: nn.Module, changes: Sequence[Change]) -> list[Change]:
    """Widths that modules around a changed layer remember under a usual name, where they had the layer's old value."""
    modules = dict(model.named_modules(remove_duplicate=False))
    pairs: dict[tuple[str, int], set[int]] = {}
    for change in changes:
        parts = change.path.split(".")
        for old, new in _numbers_of(change):
            for i in range(len(parts)):
                pairs.setdefault((".".join(parts[:i]), old), set()).add(new)
    found = []
    for (path, old), news in pairs.items():
        held = vars(modules[path]) if path in modules else {}
        names = [name for name in _WIDTHS if type(held.get(name)) is int and held[name] == old]
        found += [Change(path, name, old, next(iter(news))) for name in names if len(news) == 1]
    return found


def _numbers_of(change: Change) -> Iterable[tuple[int, int]]:
    olds, news = ((v if isinstance(v, tuple) else (v,)) for v in (change.old, change.new))
    for old, new in zip(olds, news, strict=False):
        if type(old) is int and type(new) is int and old != new:
            yield old, new


def _changed(path: str, module: nn.Module, name: str, old: int, new: int) -> Iterable[Change]:
    if old != new and vars(module).get(name) == old:
        yield Change(path, name, old, new)


def kept_sizes(run: Pass, value: Value, gone: torch.Tensor) -> tuple[int, ...]:
    """The shape of a value once units are gone; ``gone`` is True for their labels."""
    shape = list(value.shape)
    for layer in value.layers:
        lost = gone[run.units.find(layer)]
        for d, size in enumerate(layer.shape):
            if size > 1:
                shape[d] -= int(lost.reshape(-1).sum())
                break
    return tuple(shape)


def padding(run: Pass, node: Node, value: Value, gone: torch.Tensor) -> list[int]:
    """What is padded on either side of each dimension, the last first, once units are gone."""
    widths: list[int] = list(node.args[1])  # type: ignore[call-overload]
    for d in range(max(0, value.dim - len(widths) // 2), value.dim):
        labels = vector(value, d)
        if labels is None:
            continue
        stays, left = ~gone[run.units.find(labels)], 2 * (value.dim - 1 - d)
        front, back = widths[left : left + 2]
        widths[left : left + 2] = int(stays[:front].sum()), int(stays[len(stays) - back :].sum()) if back else 0
    return widths


def where(node: Node) -> list[str]:
    """The modules that a node was traced in, the innermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [path for path, _ in reversed(list(stack.values()))]


def written(run: Pass, model: nn.Module, gone: torch.Tensor) -> list[Change]:
    """Attributes that a forward pass takes sizes from, by their values: those of the module at work, and around it.

    A size in a view, an expansion or a split that must change is looked for among the whole numbers that the module
    holds, then those of the modules around it. The network is compared afterwards, so a wrong guess is found out.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[tuple[str, str], Change] = {}
    for node in run.program.graph.nodes:
        numbers: dict[int, list[int]] = {}
        for old, new in _numbers(run, node, gone):
            numbers.setdefault(old, []).append(new)
        for old, news in numbers.items():
            for depth, path in enumerate(where(node) if set(news) != {old} else ()):
                module = modules.get(_clean(path))
                names = _holding(module, old) if module else []
                own = news if len(news) == len(names) else news[:1] * len(names)  # one for each, in their order
                for name, new in zip(names, own, strict=True):
                    held = found[_clean(path), name].new if (_clean(path), name) in found else getattr(module, name)
                    change = Change(_clean(path), name, getattr(module, name), _replaced(held, old, new))
                    found[_clean(path), name] = change
                if names and depth == 0:
                    break
    return list(found.values())


def _holding(module: nn.Module, size: int) -> list[str]:
    """Attributes that are a number, or numbers in a row with it."""
    found = []
    for name, value in vars(module).items():
        row = value if isinstance(value, tuple | list) else (value,)
        if row and all(type(v) is int for v in row) and size in row and name != "_flat_weights_names":
            found.append(name)
    return found


def _replaced(value: Any, old: int, new: int) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(new if v == old else v for v in value)
    return new if value == old else value


def _clean(path: str) -> str:
    path = path.removeprefix("L['self']").removeprefix(".")
    return path.partition("@")[0]


def _numbers(run: Pass, node: Node, gone: torch.Tensor) -> Iterable[tuple[int, int]]:
    """Numbers that an operator is given and that become others."""
    value = run.values.get(node)
    name = op_name(node)
    if name in _RESIZED and isinstance(value, Value):
        before, after = shape_of(node), kept_sizes(run, value, gone)
        yield from ((o, n) for o, n in zip(before, after, strict=True) if o != n)
    elif name in ("constant_pad_nd", "pad") and isinstance(value, Value):
        yield from zip(node.args[1], padding(run, node, value, gone), strict=True)  # type: ignore[arg-type]
    elif name in ("split", "split_with_sizes") and isinstance(value, list):
        for part in value:
            if part is not None:
                after = kept_sizes(run, part, gone)
                yield from ((o, n) for o, n in zip(part.shape, after, strict=True) if o != n)
    elif node in run.groups:
        yield from _groups(run, node, gone)
    elif name == "group_norm":
        source = run.value(node.args[0])
        labels = next((x.reshape(-1) for x in source.layers if x.shape[1] > 1), None) if source else None
        groups = int(node.args[1])  # type: ignore[arg-type]
        if labels is not None and groups > 1:
            lost = int(gone[run.units.find(labels.reshape(groups, -1)[:, 0])].sum())
            if lost:
                yield groups, groups - lost


def _groups(run: Pass, node: Node, gone: torch.Tensor) -> Iterable[tuple[int, int]]:
    groups = groups_of(node)
    value = run.values.get(node)
    if isinstance(value, Value):
        for layer in value.layers:
            if layer.numel() == shape_of(node)[value.dim - _space(node) - 1]:
                lost = int(gone[run.units.find(layer.reshape(groups, -1)[:, 0])].sum())
                if lost:
                    yield groups, groups - lost


def _space(node: Node) -> int:
    return len(node.args[1].meta["val"].shape) - 2  # type: ignore[union-attr]


def groups_of(node: Node) -> int:
    """The groups of a convolution."""
    name = op_name(node)
    place = 8 if name == "convolution" else 6
    found = node.kwargs.get("groups", node.args[place] if len(node.args) > place else 1)
    return int(found)  # type: ignore[arg-type]
