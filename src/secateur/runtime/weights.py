"""How a file keeps one weight: whole, in fewer bits, or as a bit for each place and the values that are not zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from secateur.core.errors import DataError
from secateur.runtime.graph import Graph, WeightSpec

# The types of a safetensors file that a plan uses, as they lie on disk. A bfloat16 is the upper half of a float32.
TYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
STORED_AS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "i8": "I8"}
_ENTRY = 128  # bytes that one more tensor costs in the header


@dataclass(frozen=True)
class Tensor:
    """A tensor as a file holds it."""

    type: str
    array: np.ndarray


def matched(
    graph: Graph, weights: Mapping[str, np.ndarray], dtype: type[np.floating] = np.float32
) -> dict[str, np.ndarray]:
    """The graph's weights as contiguous arrays of one type.

    Raises:
        DataError: one is missing, unknown, of another shape or not of floating point.
    """
    for name in weights:
        if name not in graph.weights:
            raise DataError(f"weight {name!r} does not belong to the graph.")
    kept = {}
    for name, spec in graph.weights.items():
        if name not in weights:
            raise DataError(f"weight {name!r} is missing: pass an array of shape {list(spec.shape)}.")
        array = weights[name]
        if array.shape != spec.shape or array.dtype.kind != "f":
            raise DataError(
                f"weight {name!r} is a {array.dtype} array of shape {list(array.shape)}; "
                f"the graph has floating point of shape {list(spec.shape)}."
            )
        kept[name] = _cast(name, array, np.dtype(dtype))
    return kept


def encode(name: str, spec: WeightSpec, array: np.ndarray) -> tuple[str, dict[str, Tensor]]:
    """The store that is used in the end and the tensors of one weight.

    The numbers are first rounded to what ``spec.store`` can hold. If a bitmask holds the same in fewer bytes it is
    taken instead; its values are of the shortest type that is exact, and minus zero becomes zero. ``i8`` stays as
    asked.

    Raises:
        DataError: a number that the store cannot hold.
    """
    if spec.store == "i8":
        return "i8", _quantised(name, array)
    if spec.store == "bitmask":
        return "bitmask", _bitmask(name, array)
    kind = STORED_AS[spec.store]
    dense = Tensor(kind, narrow(name, array, kind))
    sparse = _bitmask(name, widen(dense))
    if sum(tensor.array.nbytes for tensor in sparse.values()) + _ENTRY < dense.array.nbytes:
        return "bitmask", sparse
    return spec.store, {name: dense}


def narrow(name: str, array: np.ndarray, kind: str) -> np.ndarray:
    """Float32 numbers in the given type, rounded to nearest, ties to even.

    Raises:
        DataError: a finite number that the type would make infinite.
    """
    if kind == "F32":
        return array.astype(TYPES["F32"], copy=False)
    if kind == "F16":
        return _cast(name, array, TYPES["F16"])
    bits = array.view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16  # unsigned: only a NaN could wrap
    nan = bits >> 16 | np.where(bits & 0xFFFF, 0x40, 0).astype(
        np.uint32
    )  # must not lose its last bit and become infinite
    result = np.where(np.isnan(array), nan, rounded).astype(TYPES["BF16"])
    if np.any((result & 0x7FFF == 0x7F80) & np.isfinite(array)):
        raise DataError(_too_large(name, array, TYPES["BF16"]))
    return result


def widen(tensor: Tensor) -> np.ndarray:
    """The float32 numbers of an F32, F16 or BF16 tensor; exact."""
    if tensor.type == "BF16":
        return (tensor.array.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):
        return tensor.array.astype(np.float32)


def expand(bits: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The weight whose stored places are set in ``bits``, lowest bit first.

    Raises:
        ValueError: another number of bits is set than there are values, or one is set past the end.
    """
    size = int(np.prod(shape, dtype=np.int64))
    mask = np.unpackbits(bits, bitorder="little").view(bool)
    if mask[size:].any():
        raise ValueError(f"a bit past the last of its {size} numbers is set")
    count = int(np.count_nonzero(mask))
    if count != len(values):
        raise ValueError(f"{count} bits are set and {len(values)} values are stored")
    out = np.zeros(size, np.float32)
    out[mask[:size]] = values
    return out.reshape(shape)


def _bitmask(name: str, array: np.ndarray) -> dict[str, Tensor]:
    """Zeros of either sign are left out: a weight times a mask leaves minus zero where a negative one was cut."""
    flat = array.reshape(-1)
    mask = flat != 0
    packed = np.packbits(mask, bitorder="little")
    return {f"{name}.bits": Tensor("U8", packed), f"{name}.values": _shortest(name, flat[mask])}


def _shortest(name: str, values: np.ndarray) -> Tensor:
    """The values in the shortest type that gives every bit back."""
    for kind in ("BF16", "F16"):
        try:
            short = Tensor(kind, narrow(name, values, kind))
        except DataError:
            continue
        if np.array_equal(widen(short).view(np.uint32), values.view(np.uint32)):
            return short
    return Tensor("F32", narrow(name, values, "F32"))


def _quantised(name: str, array: np.ndarray) -> dict[str, Tensor]:
    """Eight bits and a scale for each row, chosen so that encoding what was read gives the same file."""
    rows = array.reshape(len(array), -1)
    if not np.isfinite(rows).all():
        raise DataError(f"weight {name!r} has NaN or infinity, which i8 cannot hold; store it as f32.")
    largest = np.abs(rows).max(1)
    scale = largest / np.float32(127)
    for _ in range(4):  # the rounded largest number has to give the scale back
        scale = scale * np.float32(127) / np.float32(127)
    tiny = scale < np.finfo(np.float32).tiny  # too small to divide by: such a row is kept as zeros
    scale = np.where(tiny, np.float32(1), scale)
    codes = np.where(tiny[:, None], 0, np.rint(rows / scale[:, None]).clip(-127, 127)).astype(np.int8)
    return {
        name: Tensor("I8", codes.reshape(array.shape)),
        f"{name}.scale": Tensor("F32", scale.astype(TYPES["F32"])),
    }


def _cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(all="ignore"):
        made = np.ascontiguousarray(array, dtype).reshape(array.shape)
    if np.any(np.isinf(made) & np.isfinite(array)):
        raise DataError(_too_large(name, array, dtype))
    return made


def _too_large(name: str, array: np.ndarray, dtype: np.dtype) -> str:
    largest = np.abs(array[np.isfinite(array)]).max()
    store = {"F16": "f16", "BF16": "bf16"}.get(next((kind for kind in TYPES if TYPES[kind] == dtype), ""), "float32")
    cure = "scale it down" if store == "float32" else "store it as f32"
    return f"weight {name!r} has {largest:.6g}, which {store} cannot hold; {cure}."
