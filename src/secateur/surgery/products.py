"""What a graph multiplies: for each operator that computes, its multiply-adds as products of lengths of dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from secateur.surgery.analysis import Analysis
from secateur.surgery.attributes import groups_of
from secateur.surgery.labels import Value
from secateur.surgery.propagate import number, op_name

Lengths = tuple[int, ...]
"""Places in :class:`Sizes`, one for each dimension of a tensor."""


class Sizes:
    """Lengths of dimensions, as they follow from how many units of each group are gone.

    A length is ``size - Σ slices of a unit · units gone``, so that all of them are one small product with integers.

    Args:
        analysis: the groups, and the graph.
        batch: examples in a batch where the graph leaves them free; by default as many as it was traced with.
    """

    def __init__(self, analysis: Analysis, batch: int | None = None) -> None:
        self.run, self.batch = analysis.run, batch
        self._units = [len(group) for group in analysis.groups]
        self._owner = torch.full((self.run.units.size + 1,), -1)
        for i, group in enumerate(analysis.groups):
            self._owner[self.run.units.find(group.labels)] = i
        self._places: dict[tuple[Any, ...], int] = {}
        self._lengths: list[tuple[Any, ...]] = []
        self._nodes: dict[Node, Lengths] = {}
        self._table: tuple[Tensor, Tensor, Tensor] | None = None

    def place(self, size: int, ratio: tuple[int, int] = (1, 1), lost: tuple[tuple[int, int], ...] = ()) -> int:
        """Where a length stands: ``(size - lost) · ratio``, lost being slices of a unit by group."""
        key = size, ratio, lost
        if key not in self._places:
            self._table = None
            self._places[key] = len(self._lengths)
            self._lengths.append(key)
        return self._places[key]

    def of(self, node: Any) -> Lengths:
        """The lengths of a node's tensor; empty where it is none."""
        val = node.meta.get("val") if isinstance(node, Node) else None
        if not isinstance(val, Tensor):
            return ()
        if node not in self._nodes:
            self._nodes[node] = self.shape(self.run.value(node), tuple(val.shape))
        return self._nodes[node]

    def shape(self, value: Value | None, shape: Sequence[Any]) -> Lengths:
        """The lengths of a value."""
        lost: dict[int, tuple[tuple[int, int], ...]] = {}
        for layer in value.layers if value else ():
            d = next((d for d, size in enumerate(layer.shape) if size > 1), None)
            if d is not None:
                lost[d] = lost.get(d, ()) + self._slices(layer.reshape(-1))
        return tuple(self.place(number(n), self._ratio(n), lost.get(d, ())) for d, n in enumerate(shape))

    def _slices(self, labels: Tensor) -> tuple[tuple[int, int], ...]:
        """Slices of a unit by group; the fewest, where its units differ."""
        roots, counts = self.run.units.find(labels).unique(return_counts=True)
        owners = self._owner[roots]
        found = []
        for group in owners[owners >= 0].unique().tolist():
            own = counts[owners == group]
            if len(own) == self._units[group]:
                found.append((int(group), int(own.min())))
        return tuple(found)

    def _ratio(self, size: Any) -> tuple[int, int]:
        symbol = getattr(size, "node", None)
        if self.batch is None or isinstance(size, int) or symbol is None:
            return 1, 1
        expression = symbol.expr
        return int(expression.subs({s: self.batch for s in expression.free_symbols})), number(size)

    def at(self, gone: Tensor) -> Tensor:
        """All lengths, int64, once ``gone`` units of each group are gone (int64, in the order of the groups)."""
        if self._table is None:
            base = torch.tensor([size for size, _, _ in self._lengths], dtype=torch.int64)
            slices = torch.zeros(len(base), len(self._units), dtype=torch.int64)
            for i, (_, _, lost) in enumerate(self._lengths):
                for group, count in lost:
                    slices[i, group] += count
            self._table = base, slices, torch.tensor([ratio for _, ratio, _ in self._lengths]).reshape(-1, 2)
        base, slices, ratio = self._table
        return (base - slices @ gone) * ratio[:, 0] // ratio[:, 1]

    def fixed(self, place: int) -> int | None:
        """A length that no group changes; None for others."""
        size, ratio, lost = self._lengths[place]
        return None if lost else size * ratio[0] // ratio[1]


@dataclass(frozen=True)
class Work:
    """An operator that computes.

    Args:
        node: the operator.
        macs: its multiply-adds, a sum of products of lengths.
        shapes: the shape of each tensor it is given.
        channels: of an operator that loses whole groups of channels: where the length of its channels stands, and how
            many channels a group has.
    """

    node: Node
    macs: tuple[Lengths, ...]
    shapes: Mapping[Node, Lengths]
    channels: tuple[int, int] | None = None


def works(analysis: Analysis, sizes: Sizes, others: bool = False) -> list[Work]:
    """Every product, convolution, attention and recurrent layer of the graph.

    Args:
        analysis: the graph.
        sizes: where lengths stand.
        others: those too that have a time but no multiply-adds that count: activations, normalisations, sums, pools.
    """
    rules = {**_RULES, **_OTHERS} if others else _RULES
    found = []
    for node in analysis.run.program.graph.nodes:
        rule = rules.get(op_name(node)) if node.op == "call_function" else None
        if rule is not None and any(isinstance(n.meta.get("val"), Tensor) for n in node.all_input_nodes):
            found.append(rule(sizes, node))
    return found


_Spelled = list[tuple[Node, str]]


def _letters(sizes: Sizes, operands: _Spelled) -> dict[str, int]:
    """The length behind each letter: one that a group changes rather than one that is merely expanded."""
    found: dict[str, int] = {}
    for node, letters in operands:
        for place, letter in zip(sizes.of(node), letters, strict=True):
            known = sizes.fixed(found[letter]) if letter in found else 1
            if known == 1 or (known is not None and sizes.fixed(place) is None):
                found[letter] = place
    return found


def _product(sizes: Sizes, node: Node, operands: _Spelled, terms: Sequence[str], more: Sequence[Any] = ()) -> Work:
    """An operator whose multiply-adds are the products of the lengths behind letters."""
    lengths = _letters(sizes, operands)
    shapes = {n: sizes.of(n) for n in (*node.all_input_nodes, *more) if sizes.of(n)}
    for n, letters in operands:  # what is expanded takes the length of what it meets
        shapes[n] = tuple(
            place if sizes.fixed(place) == 1 else lengths[c] for place, c in zip(sizes.of(n), letters, strict=True)
        )
    return Work(node, tuple(tuple(lengths[c] for c in term) for term in terms), shapes)


def _linear(sizes: Sizes, node: Node) -> Work:
    x, weight = _node(node.args[0]), _node(node.args[1])
    lead = _ALPHABET[: len(sizes.of(x)) - 1]
    out = "Z" if len(sizes.of(weight)) > 1 else ""
    return _product(sizes, node, [(x, lead + "Y"), (weight, out + "Y")], [lead + out + "Y"])


def _matmul(sizes: Sizes, node: Node, first: int = 0) -> Work:
    one, two = _node(node.args[first]), _node(node.args[first + 1])
    a, b = len(sizes.of(one)), len(sizes.of(two))
    batch = _ALPHABET[: max(a, b, 2) - 2]
    left = batch[len(batch) - max(a - 2, 0) :] + "XY" if a > 1 else "Y"
    right = batch[len(batch) - max(b - 2, 0) :] + "YZ" if b > 1 else "Y"
    return _product(sizes, node, [(one, left), (two, right)], ["".join(dict.fromkeys(left + right))])


def _addmm(sizes: Sizes, node: Node) -> Work:
    return _matmul(sizes, node, 1)


def _einsum(sizes: Sizes, node: Node) -> Work:
    """Factors from left to right, each sum taken as soon as nothing else needs its letter."""
    equation, factors = str(node.args[0]).replace(" ", ""), [_node(a) for a in _listed(node.args[1])]
    given, arrow, out = equation.partition("->")
    parts = given.split(",")
    if not arrow:
        once = [c for c in sorted(set(given) - set(",.")) if given.count(c) == 1]
        out = ("..." if "..." in given else "") + "".join(once)
    free = "".join(c for c in _ALPHABET + "XYZ" if c not in equation)
    wide = [len(sizes.of(n)) - len(p.replace("...", "")) for n, p in zip(factors, parts, strict=True)]
    spelled = [p.replace("...", free[max(wide) - w : max(wide)]) for p, w in zip(parts, wide, strict=True)]
    out = out.replace("...", free[: max(wide)])
    terms, so_far = [], spelled[0]
    for i, part in enumerate(spelled[1:], 1):
        later = set("".join(spelled[i + 1 :]) + out)
        shared = set(so_far) & set(part)
        both = [c for c in dict.fromkeys(so_far + part) if c in later | shared]
        terms.append("".join(both))
        so_far = "".join(c for c in both if c in later)
    return _product(sizes, node, list(zip(factors, spelled, strict=True)), terms)


def _convolution(sizes: Sizes, node: Node) -> Work:
    """Each weight once at every place of the output; of the input, where transposed."""
    x, weight = _node(node.args[0]), _node(node.args[1])
    name = op_name(node)
    transposed = bool(node.args[6]) if name == "convolution" else "transpose" in name
    if "transpose" in name:  # (input, weight, bias, stride, padding, output_padding, groups, dilation)
        groups = int(node.kwargs.get("groups", node.args[6] if len(node.args) > 6 else 1))  # type: ignore[arg-type]
    else:
        groups = groups_of(node)
    places, out, kernel = sizes.of(x if transposed else node), sizes.of(node), sizes.of(weight)
    channel = len(out) - len(kernel) + 1
    term = (*places[:channel], *places[channel + 1 :], *kernel)
    shapes = {n: sizes.of(n) for n in node.all_input_nodes if sizes.of(n)}
    each = sizes.run.values[node]
    width = each.shape[channel] // groups if isinstance(each, Value) else 1
    return Work(node, (term,), shapes, (out[channel], width) if node in sizes.run.groups else None)


def _attention(sizes: Sizes, node: Node) -> Work:
    """Scores, then what they weigh; a causal mask saves nothing."""
    query, key, value = (_node(a) for a in node.args[:3])
    lead = _ALPHABET[: len(sizes.of(query)) - 2]
    operands = [(query, lead + "LE"), (key, lead + "SE"), (value, lead + "SF")]
    made = _product(sizes, node, operands, [lead + "LSE", lead + "LSF"])
    heads = {n: sizes.of(n)[:-2] for n in (query, key, value)}  # fewer of keys where queries share them
    return Work(node, made.macs, {n: (*heads[n], *s[-2:]) if n in heads else s for n, s in made.shapes.items()})


def _recurrent(sizes: Sizes, node: Node) -> Work:
    packed = isinstance(node.args[3], list | tuple)  # (rows, rows of each step, states, weights, ...)
    weights = _listed(node.args[3]) if packed else _listed(node.args[2])
    states = _listed(node.args[2 if packed else 1]) or [node.args[1]]
    return _steps(sizes, node, weights, states)


def _cell(sizes: Sizes, node: Node) -> Work:
    return _steps(sizes, node, list(node.args[2:4]), _listed(node.args[1]) or [node.args[1]])


def _steps(sizes: Sizes, node: Node, weights: Sequence[Any], states: Sequence[Any]) -> Work:
    """Each matrix once for every step of every sequence; states are as long as the matrices of states are wide."""
    rows = sizes.of(node.args[0])[:-1]
    matrices = [sizes.of(w) for w in weights if len(sizes.of(w)) == 2]
    shapes = {n: sizes.of(n) for n in node.all_input_nodes if sizes.of(n)}
    for state in states:
        if isinstance(state, Node) and len(matrices) > 1 and sizes.fixed(matrices[1][1]) is None:
            shapes[state] = (*sizes.of(state)[:-1], matrices[1][1])
    return Work(node, tuple((*rows, *m) for m in matrices), shapes)


def _passes(sizes: Sizes, node: Node) -> Work:
    """An operator that only passes over its inputs: it has a time, and no multiply-adds that count."""
    shapes = {n: sizes.of(n) for n in node.all_input_nodes if sizes.of(n)}
    groups = int(node.args[1]) if op_name(node) == "group_norm" else 1  # type: ignore[arg-type]
    if groups == 1:
        return Work(node, (), shapes)
    value = sizes.run.value(node.args[0])
    width = value.shape[1] // groups if value else 1
    return Work(node, (), shapes, (sizes.of(node.args[0])[1], width))


def _pointwise(sizes: Sizes, node: Node) -> Work:
    """The same where shapes broadcast: what is expanded takes the length of what it meets."""
    out = sizes.of(node)
    shapes = {}
    for n in node.all_input_nodes:
        own = sizes.of(n)
        if own:
            places = zip(own, out[len(out) - len(own) :], strict=True)
            shapes[n] = tuple(place if sizes.fixed(place) == 1 else other for place, other in places)
    return Work(node, (), shapes)


def _node(thing: Any) -> Node:
    return thing


def _listed(thing: Any) -> list[Any]:
    return list(thing) if isinstance(thing, list | tuple) else []


_ALPHABET = "abcdefghijklmnopqrstuvwxyz"


_PASSES = (
    "batch_norm", "_native_batch_norm_legit_no_training", "layer_norm", "rms_norm", "group_norm", "softmax", "_softmax",
    "log_softmax", "mean", "sum", "cat", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "pad", "constant_pad_nd",
    "clone", "contiguous", "embedding",
)  # fmt: skip
_POINTWISE = (
    "add", "sub", "mul", "div", "pow", "where", "masked_fill", "clamp", "exp", "sqrt", "rsqrt", "relu", "relu6", "gelu",
    "silu", "mish", "elu", "selu", "celu", "leaky_relu", "prelu", "_prelu_kernel", "hardtanh", "hardswish",
    "hardsigmoid", "sigmoid", "tanh", "softplus",
)  # fmt: skip


def _rules() -> Iterable[tuple[str, Callable[[Sizes, Node], Work]]]:
    yield "linear", _linear
    yield "einsum", _einsum
    yield from ((name, _matmul) for name in ("mm", "bmm", "matmul", "dot", "mv"))
    yield from ((name, _addmm) for name in ("addmm", "baddbmm", "addmv", "addbmm"))
    yield from ((f"conv{t}{d}d", _convolution) for t in ("", "_transpose") for d in (1, 2, 3))
    yield "convolution", _convolution
    yield from ((f"{a}scaled_dot_product_{b}", _attention) for a, b in (
        ("", "attention"), ("_", "flash_attention_for_cpu"), ("_", "flash_attention"), ("_", "efficient_attention"),
        ("_", "cudnn_attention"), ("_", "attention_math")))  # fmt: skip
    yield from ((name, _recurrent) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"))
    yield from ((name, _cell) for name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"))


_RULES = dict(_rules())
_OTHERS = {**dict.fromkeys(_PASSES, _passes), **dict.fromkeys(_POINTWISE, _pointwise)}
