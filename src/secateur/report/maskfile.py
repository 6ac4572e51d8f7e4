"""Reads ``masks.safetensors`` without torch: the bits of each tensor, unpacked a few rows at a time."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from secateur.report.source import as_table, as_whole, cleaned

NAME = "masks.safetensors"
_UNITS = {"rows": (1, 2), "columns": (0, 2), "kernels": (2,)}
_BLOCKS = {
    f"{tall} × {wide} blocks": (tall, wide)
    for tall, wide in (
        (16, 16),
        (8, 8),
        (4, 4),
        (2, 2),
        (1, 16),
        (16, 1),
        (1, 8),
        (8, 1),
        (1, 4),
        (4, 1),
        (1, 2),
        (2, 1),
    )
}
_GROUPS = {f"{n}:{m}": (n, m) for n, m in ((1, 2), (1, 4), (2, 4), (1, 8), (2, 8), (4, 8), (4, 16), (8, 16))}
_NAMES = (*_UNITS, *_BLOCKS, *_GROUPS)
_FIRST = 64
"""Rows at which a pattern is tried before all are."""
_EXAMINED = 1 << 26
"""Weights up to which a pattern is looked for; each try looks at every weight of a tensor."""


class Damaged(ValueError):
    """A file that is no mask file, or does not hold what its header says."""


@dataclass(frozen=True)
class TensorMask:
    """The mask of one tensor as a matrix of kernels: ``height`` rows and ``width`` columns of ``depth`` weights.

    Rows are the first dimension of the weight (the outputs of most layers), columns the second; what is left of a
    convolution's shape is the kernel. A vector is one row.

    Args:
        name: the tensor, safe to show.
        shape: of the tensor.
        packed: bytes of eight weights each, lowest bit first, row-major.
    """

    name: str
    shape: tuple[int, ...]
    packed: np.ndarray

    @property
    def height(self) -> int:
        """Rows."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def width(self) -> int:
        """Columns."""
        return self.shape[1] if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def depth(self) -> int:
        """Weights at one row and column."""
        return math.prod(self.shape[2:])

    @property
    def total(self) -> int:
        """All weights."""
        return math.prod(self.shape)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Bits of some rows, shape ``(stop - start, width, depth)``, 1 = kept."""
        line = self.width * self.depth
        first, last = start * line, stop * line
        bits = np.unpackbits(self.packed[first // 8 : -(-last // 8)], bitorder="little")
        return bits[first % 8 : first % 8 + last - first].reshape(stop - start, self.width, self.depth)

    def counts(self, tall: int, wide: int) -> np.ndarray:
        """Kept weights in cells of ``tall`` rows and ``wide`` columns, int64; the last cells may be smaller.

        Cost: one byte of memory for each weight of one row of cells.
        """
        starts = np.arange(0, self.width, wide)
        found = np.empty((-(-self.height // tall), len(starts)), dtype=np.int64)
        for i, start in enumerate(range(0, self.height, tall)):
            bits = self.rows(start, min(start + tall, self.height))
            found[i] = np.add.reduceat(bits.sum((0, 2), dtype=np.int64), starts)
        return found

    def pattern(self) -> str:
        """Which shape the zeros take, read off the bits; empty for tensors too large to look through.

        A mask may fit several; the coarsest is told. Blocks are those of (outputs, inputs times kernel).
        """
        if self.total > _EXAMINED:
            return ""
        bits = self.rows(0, self.height)
        kept = int(bits.sum(dtype=np.int64))
        if kept in (0, self.total):
            return "dense" if kept else "empty"
        return next((name for name in _NAMES if _fits(bits[:_FIRST], name) and _fits(bits, name)), "unstructured")


def _fits(bits: np.ndarray, name: str) -> bool:
    """Whether bits of shape (height, width, depth) have a pattern."""
    height, width, depth = bits.shape
    if name in _UNITS:
        axes = _UNITS[name]
        several = math.prod(bits.shape[axis] for axis in axes) > 1 and (name != "kernels" or depth > 1)
        return several and _all(bits, axes)
    if name in _BLOCKS:
        tall, wide = _BLOCKS[name]
        if height % tall or width * depth % wide:
            return False
        return _all(bits.reshape(height // tall, tall, width * depth // wide, wide), (1, 3))
    n, m = _GROUPS[name]
    return width % m == 0 and bool((bits.reshape(height, width // m, m, depth).sum(2) == n).all())


def _all(bits: np.ndarray, axes: tuple[int, ...]) -> bool:
    """Whether every unit over some axes is kept or pruned as a whole."""
    return bool((bits.min(axes) == bits.max(axes)).all())


def read_masks(path: Path) -> list[TensorMask]:
    """The masks in a file, in the order in which they were written, checked against the file's digest.

    Raises:
        FileNotFoundError: when there is no such file.
        Damaged: when it is not whole, or not of this library.

    Cost: the file is read into memory, one bit a weight.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        with safe_open(str(path), framework="numpy") as file:
            about: dict[str, str] = dict(file.metadata() or {})
            shapes = as_table(json.loads(about["shapes"]))
            packed = {name: file.get_tensor(name) for name in shapes}
        found = {name: (_shape(shape), packed[name]) for name, shape in shapes.items()}
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, RecursionError) as error:
        raise Damaged(type(error).__name__) from error
    for shape, bits in found.values():
        if bits.dtype != np.uint8 or bits.ndim != 1 or len(bits) != -(-math.prod(shape) // 8):
            raise Damaged("a mask of another size than its shape")
    if _digest(found) != about.get("digest"):
        raise Damaged("its bits do not match its digest")
    return [TensorMask(cleaned(name), shape, bits) for name, (shape, bits) in found.items() if math.prod(shape)]


def _shape(entry: Any) -> tuple[int, ...]:
    sizes = [as_whole(size) for size in entry] if isinstance(entry, list) else [None]
    if not sizes or any(size is None or size < 0 for size in sizes):
        raise ValueError("a shape is a list of whole numbers")
    return tuple(size for size in sizes if size is not None)


def _digest(found: dict[str, tuple[tuple[int, ...], np.ndarray]]) -> str:
    sha = hashlib.sha256()
    for name in sorted(found):
        shape, bits = found[name]
        sha.update(f"{name}{shape}".encode())
        sha.update(bits.tobytes())
    return sha.hexdigest()
