"""Plan files: a graph and its weights in one safetensors file, written whole or not at all, read as untrusted input."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from secateur.core.errors import FileError
from secateur.runtime.graph import Graph, GraphError, WeightSpec, parse
from secateur.runtime.operators import LARGEST_F32
from secateur.runtime.shapes import infer
from secateur.runtime.weights import STORED_AS, TYPES, Tensor, encode, expand, matched, widen

FORMAT = "secateur-plan"
VERSION = "1"
LARGEST_HEADER = 100_000_000  # the safetensors format's own limit
_T = TypeVar("_T")
LIMIT = 2**32  # numbers in all weights together: 16 GiB as float32


class RuntimeFileError(FileError):
    """A plan file that is missing, damaged, of another version or too large."""


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies in the data."""

    type: str
    shape: tuple[int, ...]
    begin: int
    end: int


def write(path: Path, graph: Graph, weights: Mapping[str, np.ndarray]) -> Graph:
    """Write a plan, whole or not at all, and return the graph with the stores that were used.

    A weight is rounded to its ``store``; one that takes fewer bytes as a bitmask becomes one, without further loss.

    Raises:
        DataError: weights that do not belong to the graph or that their store cannot hold.
        GraphError: shapes that do not fit together, or two tensors of one name.
        RuntimeFileError: the file cannot be written; what was there is as it was.
    """
    infer(graph)
    tensors: dict[str, Tensor] = {}
    specs: dict[str, WeightSpec] = {}
    for name, array in matched(graph, weights).items():
        store, made = encode(name, graph.weights[name], array)
        specs[name] = WeightSpec(graph.weights[name].shape, store)
        for tensor in made:
            if tensor in tensors or tensor == "__metadata__":
                raise GraphError(f"weight {name!r} is stored as {tensor!r}, a name already taken; rename the weight.")
        tensors.update(made)
    stored = replace(graph, weights=specs)
    # the widest first, so that every tensor begins at a multiple of its element's size
    order = sorted(tensors, key=lambda name: (-tensors[name].array.itemsize, name))
    header = _header(stored, {name: tensors[name] for name in order})
    with _writing(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name].array).data)
    return stored


def read(path: Path, limit: int = LIMIT) -> tuple[Graph, dict[str, np.ndarray]]:
    """The graph and its weights as float32, after every check that the file alone allows.

    Args:
        path: A file that :func:`write` made, or anything: nothing in it is believed.
        limit: Most numbers that all weights together may have.

    Raises:
        RuntimeFileError: the file is missing, damaged, of another version or exceeds ``limit``.
    """
    return _opened(path, lambda reader: reader.plan(limit))


def read_graph(path: Path) -> Graph:
    """The graph alone: what the file says of itself, its weights unread.

    Raises:
        RuntimeFileError: the file is missing, is no plan, or its graph is not sound.
    """
    return _opened(path, lambda reader: reader.graph())


def _opened(path: Path, take: Callable[[_Reader], _T]) -> _T:
    try:
        if not path.is_file():
            raise RuntimeFileError(f"{path} is not a file; give the plan.safetensors that compiling wrote.")
        with open(path, "rb") as file:
            return take(_Reader(file))
    except OSError as error:
        raise RuntimeFileError(f"cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, GraphError) as error:
        text = str(error).rstrip(".")
        raise RuntimeFileError(f"{path} is not a sound plan: {text}. Compile the network again.") from error


class _Reader:
    """One open file; what it finds wrong is a ValueError or a GraphError."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(self._take(8), "little")
        if length > min(LARGEST_HEADER, size - 8):
            raise ValueError(f"its header of {length} bytes exceeds the file or {LARGEST_HEADER} bytes")
        self._data = 8 + length
        text = self._take(length).decode("utf-8")
        header = parse(text, "the header")
        if not isinstance(header, dict) or text[0] != "{":
            raise ValueError("its header is no JSON object")
        self._metadata = header.pop("__metadata__", None)
        self._entries = {name: _entry(name, found) for name, found in header.items()}
        _check_cover(self._entries, size - self._data)
        self._unclaimed = set(self._entries)

    def graph(self) -> Graph:
        return Graph.from_json(self._graph_text())

    def plan(self, limit: int) -> tuple[Graph, dict[str, np.ndarray]]:
        graph = Graph.from_json(self._graph_text())
        total = sum(spec.size for spec in graph.weights.values())
        if total > limit:
            raise ValueError(f"its weights have {total} numbers; the limit is {limit}")
        infer(graph)
        weights = {}
        for name, spec in graph.weights.items():
            try:
                weights[name] = self._weight(name, spec)
            except ValueError as error:
                raise ValueError(f"weight {name!r}: {error}") from None
        if self._unclaimed:
            raise ValueError(f"tensor {min(self._unclaimed)!r} belongs to no weight")
        return graph, weights

    def _graph_text(self) -> str:
        table = self._metadata
        if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
            raise ValueError("it has no metadata of strings")
        if table.get("format") != FORMAT:
            raise ValueError(f"its metadata does not say format {FORMAT}")
        if table.get("version") != VERSION:
            raise ValueError(f"it has version {str(table.get('version'))[:20]!r}; this release reads {VERSION}")
        if "graph" not in table:
            raise ValueError("its metadata has no graph")
        return table["graph"]

    def _weight(self, name: str, spec: WeightSpec) -> np.ndarray:
        if spec.store == "bitmask":
            bits = self._tensor(f"{name}.bits", ("U8",), (-(-spec.size // 8),))
            values = self._tensor(f"{name}.values", ("F32", "F16", "BF16"), None)
            return expand(bits.array, widen(values), spec.shape)
        dense = self._tensor(name, (STORED_AS[spec.store],), spec.shape)
        if spec.store != "i8":
            return widen(dense)
        scale = self._tensor(f"{name}.scale", ("F32",), spec.shape[:1]).array
        if not (np.abs(scale) <= LARGEST_F32 / 128).all():
            raise ValueError("a scale is not finite, or so large that its numbers would not be")
        return dense.array.astype(np.float32) * scale.astype(np.float32).reshape(-1, *(1,) * (len(spec.shape) - 1))

    def _tensor(self, name: str, types: tuple[str, ...], shape: tuple[int, ...] | None) -> Tensor:
        """One tensor that nothing has used yet; without a shape it is a list of any length."""
        if name not in self._unclaimed:
            raise ValueError(f"the file has no tensor {name!r} of its own")
        entry = self._entries[name]
        if entry.type not in types:
            raise ValueError(f"tensor {name!r} is {entry.type}; expected {' or '.join(types)}")
        if entry.shape != shape if shape is not None else len(entry.shape) != 1:
            wanted = "one dimension" if shape is None else str(list(shape))
            raise ValueError(f"tensor {name!r} has shape {list(entry.shape)}; expected {wanted}")
        self._unclaimed.remove(name)
        self._file.seek(self._data + entry.begin)
        return Tensor(
            entry.type, np.frombuffer(self._take(entry.end - entry.begin), TYPES[entry.type]).reshape(entry.shape)
        )

    def _take(self, count: int) -> bytes:
        found = self._file.read(count)
        if len(found) != count:
            raise ValueError(f"it ends {count - len(found)} bytes early")
        return found


def _header(graph: Graph, tensors: Mapping[str, Tensor]) -> bytes:
    metadata = {"format": FORMAT, "version": VERSION, "graph": graph.to_json()}
    table: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.array.nbytes
        table[name] = {"dtype": tensor.type, "shape": tensor.array.shape, "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def _entry(name: str, found: Any) -> _Entry:
    where = f"tensor {name[:256]!r}"
    if not isinstance(found, dict) or set(found) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} does not have dtype, shape and data_offsets alone")
    kind, shape, offsets = found["dtype"], found["shape"], found["data_offsets"]
    if not isinstance(kind, str) or kind not in TYPES:
        raise ValueError(f"{where} is of a type that no plan uses")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise ValueError(f"{where} has a shape or offsets that are no lists of counts")
    size = TYPES[kind].itemsize
    for length in shape:
        size *= length
    if offsets[1] - offsets[0] != size:
        raise ValueError(f"{where} of {size} bytes lies from {offsets[0]} to {offsets[1]}")
    return _Entry(kind, tuple(shape), *offsets)


def _counts(value: Any) -> bool:
    """A list of integers, none negative and none that takes more than 8 bytes."""
    return isinstance(value, list) and all(type(entry) is int and 0 <= entry < 2**63 for entry in value)


def _check_cover(entries: Mapping[str, _Entry], size: int) -> None:
    """The tensors lie end to end and fill the data: no byte is shared, none is hidden."""
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != end:
            raise ValueError(f"its tensors leave a gap or overlap at byte {end} of the data")
        end = entry.end
    if end != size:
        raise ValueError(f"its tensors take {end} bytes and the file holds {size}")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[BinaryIO]:
    """A temporary neighbour that takes the place of ``path``, flushed to the disk, when the block ends well."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise RuntimeFileError(
            f"cannot write {path}: {error.strerror or error}. Nothing was changed there; "
            "free some space or choose another folder."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
