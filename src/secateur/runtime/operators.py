"""The table of operators: what each reads, which weights and attributes it has, and what values those may take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

LARGEST = 2**31 - 1  # every integer of a graph fits 32 bits, so that native code can multiply two of them
MAX_RANK = 8
LARGEST_F32 = 3.4028234663852886e38
LARGEST_WINDOW = 2**24  # of kernels, strides, pads, groups, heads and hidden sizes
LARGEST_LAYERS = 1024

ACTIVATIONS = (
    "none", "relu", "relu6", "gelu", "gelu_tanh", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh",
)  # fmt: skip
UNARY = (*ACTIVATIONS[1:], "exp", "log", "sqrt", "rsqrt", "neg", "abs", "square", "reciprocal")
BINARY = ("add", "sub", "mul", "div", "max", "min")
REDUCTIONS = ("mean", "sum", "max")

Check = Callable[[Any], Any]


def integer(low: int, high: int = LARGEST) -> Check:
    """A check that a value is an integer of a range; like all checks it returns the value as it is kept."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"an integer from {low} to {high}")
        return value

    return check


def integers(
    low: int, count: int | None = None, *, high: int = LARGEST, distinct: bool = False, least: int = 0
) -> Check:
    """A check for a list of integers: exactly ``count``, or from ``least`` to as many as an array may have axes."""
    each = integer(low, high)
    lengths = range(least, MAX_RANK + 1) if count is None else (count,)
    many = f"{least} to {MAX_RANK}" if count is None else str(count)
    wanted = f"a list of {many} {'different ' if distinct else ''}integers from {low} to {high}"

    def check(value: Any) -> tuple[int, ...]:
        if not isinstance(value, list | tuple) or len(value) not in lengths:
            raise ValueError(wanted)
        kept = _each(value, each, wanted)
        if distinct and len(set(kept)) != len(kept):
            raise ValueError(wanted)
        return kept

    return check


def _each(value: Iterable[Any], check: Check, wanted: str) -> tuple[int, ...]:
    """All entries checked, with the error of the whole list."""
    try:
        return tuple(check(entry) for entry in value)
    except ValueError:
        raise ValueError(wanted) from None


def number(low: float = -math.inf) -> Check:
    """A check for a finite number not below ``low``."""

    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError("a number")
        if not low <= value <= LARGEST_F32 or value < -LARGEST_F32:  # NaN fails the first comparison
            raise ValueError("a number that fits float32" + ("" if low == -math.inf else f" not below {low}"))
        return float(value)

    return check


def choice(names: tuple[str, ...]) -> Check:
    """A check for one of some words."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return value

    return check


def flag(value: Any) -> bool:
    """A check for true or false."""
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def target_shape(value: Any) -> tuple[int, ...]:
    """A check for the shape of ``reshape`` and ``expand``: 0 is the batch, and -1 may stand once."""
    wanted = f"a list of at most {MAX_RANK} sizes, 0 for the batch, at most one -1"
    if not isinstance(value, list | tuple) or len(value) > MAX_RANK:
        raise ValueError(wanted)
    kept = _each(value, integer(-1), wanted)
    if kept.count(-1) > 1:
        raise ValueError(wanted)
    return kept


def pairs(value: Any) -> tuple[tuple[int, ...], ...]:
    """A check for the pad of each axis."""
    if not isinstance(value, list | tuple) or len(value) > MAX_RANK:
        raise ValueError("a [before, after] for each axis")
    pair = integers(0, 2)
    return tuple(pair(entry) for entry in value)


@dataclass(frozen=True)
class OpSpec:
    """What a node of one operator must have.

    Attributes:
        inputs: How many values it may read; None for any number from one.
        weights: Roles that must be filled.
        optional: Roles that may be filled.
        attrs: Attributes, all required, with the check of each.
        outputs: How many values it makes.
        gates: For a recurrent layer, how many gates its weights stack; its roles follow from its attributes.
        reads: The type of the values it reads.
    """

    inputs: tuple[int, ...] | None = (1,)
    weights: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    attrs: Mapping[str, Check] = field(default_factory=dict)
    outputs: int = 1
    gates: int = 0
    reads: str = "f32"


_ACT = choice(ACTIVATIONS)
_AXIS = integer(0, MAX_RANK - 1)
_AXES = {"high": MAX_RANK - 1, "distinct": True}
_COUNT = integer(1, LARGEST_WINDOW)
_TWO = integers(1, 2, high=LARGEST_WINDOW)
_PAD = integers(0, 4, high=LARGEST_WINDOW)
_WINDOW = {"kernel": _TWO, "stride": _TWO, "pad": _PAD}
_CELL = {"hidden": _COUNT, "layers": integer(1, LARGEST_LAYERS), "bidirectional": flag, "batch_first": flag}
_NORM = {"axes": integer(1, MAX_RANK), "eps": number(0.0)}

OPS: Mapping[str, OpSpec] = {
    "conv": OpSpec((1, 2), ("weight",), ("bias",), {
        "stride": _TWO, "pad": _PAD, "dilation": _TWO, "groups": _COUNT, "act": _ACT,
    }),
    "linear": OpSpec((1, 2), ("weight",), ("bias",), {"act": _ACT}),
    "binary": OpSpec((2,), attrs={"fn": choice(BINARY), "act": _ACT}),
    "unary": OpSpec(attrs={"fn": choice(UNARY)}),
    "const": OpSpec((0,), ("value",)),
    "affine": OpSpec((1,), ("scale", "shift"), attrs={"act": _ACT}),
    "softmax": OpSpec(attrs={"axis": _AXIS}),
    "max_pool": OpSpec(attrs={**_WINDOW, "dilation": _TWO}),
    "avg_pool": OpSpec(attrs={**_WINDOW, "count_pad": flag}),
    "adaptive_avg_pool": OpSpec(attrs={"size": _TWO}),
    "reduce": OpSpec(attrs={
        "fn": choice(REDUCTIONS), "axes": integers(0, **_AXES, least=1), "keepdims": flag,
    }),
    "layer_norm": OpSpec((1,), (), ("weight", "bias"), _NORM),
    "rms_norm": OpSpec((1,), (), ("weight",), _NORM),
    "group_norm": OpSpec((1,), (), ("weight", "bias"), {"groups": _COUNT, "eps": number(0.0)}),
    "matmul": OpSpec((2,)),
    "attention": OpSpec((3, 4), attrs={"heads": _COUNT, "scale": number(), "causal": flag}),
    "embedding": OpSpec((1,), ("weight",), reads="i64"),
    "concat": OpSpec(None, attrs={"axis": _AXIS}),
    "slice": OpSpec(attrs={"axis": _AXIS, "start": integer(0), "stop": integer(1), "step": integer(1)}),
    "reshape": OpSpec(attrs={"shape": target_shape}),
    "permute": OpSpec(attrs={"dims": integers(0, **_AXES)}),
    "expand": OpSpec(attrs={"shape": target_shape}),
    "pad": OpSpec(attrs={"pad": pairs, "value": number()}),
    "lstm": OpSpec((1, 3), attrs=_CELL, outputs=3, gates=4),
    "gru": OpSpec((1, 2), attrs=_CELL, outputs=2, gates=3),
}  # fmt: skip


def cell_role(kind: str, layer: int, direction: int) -> str:
    """The role of one weight of a recurrent layer; ``kind`` is w_ih, w_hh, b_ih or b_hh."""
    return f"{kind}.{layer}.{direction}"


def roles(op: str, attrs: Mapping[str, Any], given: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The required and the optional weights of a node with ``given`` weights.

    Raises:
        ValueError: a recurrent layer has another number of weights than its layers and directions ask for.
    """
    spec = OPS[op]
    if not spec.gates:
        return spec.weights, spec.optional
    directions = 1 + attrs["bidirectional"]
    wanted = 4 * attrs["layers"] * directions
    if given != wanted:
        raise ValueError(f"it has {given} weights where {attrs['layers']} layers ask for {wanted}")
    return tuple(
        cell_role(kind, layer, direction)
        for layer in range(attrs["layers"])
        for direction in range(directions)
        for kind in ("w_ih", "w_hh", "b_ih", "b_hh")
    ), ()
