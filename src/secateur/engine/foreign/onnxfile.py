"""ONNX: the weights in a graph, without the graph being run, and the same graph with other weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.core.errors import FileError
from secateur.core.files import writing
from secateur.engine.foreign import onnxwire as wire
from secateur.engine.foreign.guard import (
    bytes_of,
    check_name,
    check_shape,
    count,
    inside,
    limit,
    opened,
    refusal,
    size_of,
    tensor_of,
)
from secateur.engine.foreign.tensorfile import check_back

if TYPE_CHECKING:
    from secateur.engine.foreign.record import Foreign

_DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16, 6: torch.int32, 7: torch.int64,
    9: torch.bool, 10: torch.float16, 11: torch.float64, 12: torch.uint32, 13: torch.uint64, 14: torch.complex64,
    15: torch.complex128, 16: torch.bfloat16, 17: torch.float8_e4m3fn, 18: torch.float8_e4m3fnuz,
    19: torch.float8_e5m2, 20: torch.float8_e5m2fnuz, 24: torch.float8_e8m0fnu,
}  # fmt: skip
_OTHER_TYPES = {
    8: "text",
    21: "4 bits",
    22: "4 bits",
    23: "4 bits",
    25: "2 bits",
    26: "2 bits",
    27: "6 bits",
    28: "6 bits",
}
_QUANTISED_ENDS = ("QuantizeLinear", "DequantizeLinear", "MatMulInteger", "ConvInteger", "MatMulNBits")
_QUANTISED = {"QAttention", "QGemm", "MatMulIntegerToFloat", "MatMulBnb4", "QMoE", "GatherBlockQuantized"}
_FIXED = {4: torch.float32, 10: torch.float64}
_DATA = (4, 5, 6, 7, 9, 10, 11, 13, 14)
_DEEPEST = 16
_MOST = 2**31 - 2**20


@dataclass
class _Found:
    """What a walk through the graph has met."""

    path: Path
    most: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    used: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    bytes: int = 0

    def add(self, name: str, view: memoryview, how: str) -> None:
        """Decode a tensor and keep it under its name."""
        check_name(self.path, name)
        if name in self.tensors or name in self.left:
            raise refusal(self.path, f"two of its tensors are called `{name}`")
        try:
            found, external = _decode(self, name, view)
        except _Unread as why:
            self.left[name] = str(why)
            return
        self.tensors[name] = found
        self.stored[name] = "external data" if external else how

    def room(self, name: str, size: int) -> None:
        """Refuse tensors that the file cannot truly hold."""
        self.bytes += size
        if self.bytes > self.most:
            raise refusal(self.path, f"`{name}` and others unfold to more than {self.most:,} bytes")


class _Unread(Exception):
    """A tensor that is left out, and why."""


def is_onnx(path: Path, start: bytes) -> bool:
    """Whether a file is meant as ONNX: by its name, or because it begins with the version of the format."""
    return path.suffix == ".onnx" or (start[:1] == b"\x08" and start[1:2] <= b"\x20")


def load(path: Path) -> dict[str, Any]:
    """What a file holds: the fields of :class:`Foreign` besides path and kind.

    Raises:
        FileError: when it is damaged, quantised, names files elsewhere, or holds no graph.
    """
    with opened(path) as file:
        found = _Found(path, limit(size_of(file)))
        view = memoryview(file.read())
    graphs = 0
    for entry in wire.fields(view):
        if entry.number == 7:
            graphs += 1
            _graph(found, entry.bytes(), 0)
        elif entry.number == 8:
            _opset(found, entry.bytes())
        elif entry.number == 2:
            found.facts["producer"] = wire.text(path, entry)
        elif entry.number == 25:
            for inner in wire.fields(entry.bytes()):
                if inner.number == 7:
                    _node(found, inner.bytes(), 1)
    if graphs != 1 or not (found.tensors or found.left):
        raise refusal(path, "it is no ONNX file, or a graph without weights", "Export the network again.")
    found.facts["used"] = {name: about for name, about in found.used.items() if name in found.tensors}
    return {"tensors": found.tensors, "stored": found.stored, "ties": (), "left": found.left, "facts": found.facts}


def _opset(found: _Found, view: memoryview) -> None:
    domain, version = "", 0
    for entry in wire.fields(view):
        if entry.number == 1:
            domain = wire.text(found.path, entry)
        elif entry.number == 2:
            version = entry.number_of()
    if domain in ("", "ai.onnx"):
        found.facts["opset"] = version


def _graph(found: _Found, view: memoryview, depth: int) -> None:
    if depth > _DEEPEST:
        raise refusal(found.path, "its graphs are nested too deeply")
    for entry in wire.fields(view):
        if entry.number == 5:
            found.add(_name_of(found.path, entry.bytes()), entry.bytes(), "plain")
        elif entry.number == 15:
            _sparse(found, entry.bytes())
        elif entry.number == 1:
            _node(found, entry.bytes(), depth)


def _name_of(path: Path, view: memoryview) -> str:
    names = [wire.text(path, entry) for entry in wire.fields(view) if entry.number == 8]
    return names[-1] if names else ""


def _node(found: _Found, view: memoryview, depth: int) -> None:
    inputs: list[str] = []
    about = {"op": "", "node": "", "out": ""}
    attributes = []
    for entry in wire.fields(view):
        if entry.number == 1:
            inputs.append(wire.text(found.path, entry))
        elif entry.number in (2, 3, 4):
            key = {2: "out", 3: "node", 4: "op"}[entry.number]
            about[key] = about[key] or wire.text(found.path, entry)
        elif entry.number == 5:
            attributes.append(entry.bytes())
    if _quantised(about["op"]):
        raise refusal(
            found.path,
            f"it is quantised (it has an operator {about['op'][:40]!r}), and its weights are no plain numbers",
            "Export the network before it was quantised.",
        )
    if about["op"] != "Constant":
        for slot, name in enumerate(inputs):
            found.used.setdefault(name, {"op": about["op"], "node": about["node"], "slot": slot})
    for attribute in attributes:
        _attribute(found, attribute, about["out"] if about["op"] == "Constant" else "", depth)


def _quantised(op: str) -> bool:
    return op.startswith("QLinear") or op.endswith(_QUANTISED_ENDS) or op in _QUANTISED


def _attribute(found: _Found, view: memoryview, constant: str, depth: int) -> None:
    name = ""
    for entry in wire.fields(view):
        if entry.number == 1:
            name = wire.text(found.path, entry)
        elif entry.number in (6, 11):
            _graph(found, entry.bytes(), depth + 1)
        elif entry.number == 5 and constant and name == "value":
            found.add(constant, entry.bytes(), "constant node")


def _decode(found: _Found, name: str, view: memoryview) -> tuple[Tensor, bool]:
    """A TensorProto as a tensor, and whether its data lie in another file."""
    dims: list[int] = []
    kind, place = 0, 0
    parts: list[wire.Field] = []
    external: dict[str, str] = {}
    for entry in wire.fields(view):
        if entry.number == 1:
            dims += wire.varints(entry)
        elif entry.number == 2:
            kind = entry.number_of()
        elif entry.number == 14:
            place = entry.number_of()
        elif entry.number == 13:
            key, value = _pair(found.path, entry.bytes())
            external[key] = value
        elif entry.number in _DATA:
            parts.append(entry)
    shape = check_shape(found.path, name, dims)
    if kind in _OTHER_TYPES:
        raise _Unread(f"its type is {_OTHER_TYPES[kind]}")
    if kind not in _DTYPES:
        raise refusal(found.path, f"`{name}` has no known type ({kind})")
    size = count(shape) * _DTYPES[kind].itemsize
    if place == 1:
        return tensor_of(_outside(found, name, external, size), _DTYPES[kind], shape), True
    content = _content(parts, _DTYPES[kind])
    if len(content) != size:
        raise refusal(found.path, f"`{name}` of shape {list(shape)} needs {size:,} bytes and has {len(content):,}")
    found.room(name, size)
    return tensor_of(content, _DTYPES[kind], shape), False


def _content(parts: list[wire.Field], dtype: torch.dtype) -> bytes | memoryview:
    """The bytes of a tensor, which lie raw or as a row of numbers."""
    raw = [entry for entry in parts if entry.number == 9]
    if raw:
        return raw[-1].bytes()
    if parts and parts[0].number in _FIXED:
        if dtype not in (_FIXED[parts[0].number], torch.complex64, torch.complex128):
            raise ValueError("the numbers of a tensor are not of its type")
        return b"".join(entry.bytes() for entry in parts)
    numbers = [value for entry in parts for value in wire.varints(entry)]
    width = dtype.itemsize
    return b"".join((value & ((1 << 8 * width) - 1)).to_bytes(width, "little") for value in numbers)


def _pair(path: Path, view: memoryview) -> tuple[str, str]:
    key = value = ""
    for entry in wire.fields(view):
        if entry.number == 1:
            key = wire.text(path, entry)
        elif entry.number == 2:
            value = wire.text(path, entry)
    return key, value


def _outside(found: _Found, name: str, external: Mapping[str, str], size: int) -> bytes:
    """Data in a file beside the graph."""
    path = inside(found.path, found.path.parent, external.get("location"))
    offset, length = external.get("offset", "0"), external.get("length", str(size))
    if not (offset.isascii() and offset.isdigit() and length.isascii() and length.isdigit()):
        raise refusal(found.path, f"`{name}` does not say where in {path.name} its data lie")
    if int(length) != size:
        raise refusal(found.path, f"`{name}` needs {size:,} bytes and has {int(length):,} in {path.name}")
    if not size:
        return b""
    with opened(path) as file:
        whole = size_of(file)
        if int(offset) + size > whole:
            raise refusal(path, f"it is truncated: `{name}` ends at byte {int(offset) + size:,} of {whole:,}")
        found.most += limit(whole) if path not in found.facts.setdefault("external", []) else 0
        if path not in found.facts["external"]:
            found.facts["external"].append(path)
        found.room(name, size)
        file.seek(int(offset))
        return file.read(size)


def _sparse(found: _Found, view: memoryview) -> None:
    """A sparse initializer: values, where they lie (one number or one row of numbers each), and the whole shape."""
    values = places = None
    dims: list[int] = []
    for entry in wire.fields(view):
        if entry.number == 1:
            values = entry.bytes()
        elif entry.number == 2:
            places = entry.bytes()
        elif entry.number == 3:
            dims += wire.varints(entry)
    if values is None or places is None:
        raise refusal(found.path, "a sparse tensor in it lacks its values or their places")
    name = check_name(found.path, _name_of(found.path, values))
    numbers, _ = _decode(found, name, values)
    where, _ = _decode(found, name, places)
    shape = check_shape(found.path, name, dims)
    found.room(name, count(shape) * numbers.dtype.itemsize)
    if name in found.tensors or where.dtype != torch.int64 or numbers.dim() != 1 or len(where) != len(numbers):
        raise refusal(found.path, f"the sparse tensor `{name}` is damaged")
    if where.dim() == 2:
        steps = torch.tensor([count(shape[i + 1 :]) for i in range(len(shape))])
        if where.shape[1] != len(shape) or bool((where < 0).any()) or bool((where >= torch.tensor(shape)).any()):
            raise refusal(found.path, f"a value of the sparse tensor `{name}` lies outside of it")
        where = (where * steps).sum(1)
    if where.dim() != 1 or bool((where < 0).any()) or bool((where >= count(shape)).any()):
        raise refusal(found.path, f"a value of the sparse tensor `{name}` lies outside of it")
    dense = torch.zeros(count(shape), dtype=numbers.dtype)
    dense[where] = numbers
    found.tensors[name], found.stored[name] = dense.reshape(shape), "sparse"


def write(source: Foreign, path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the same graph with these weights, all of them inside the file."""
    odd = sorted(set(tensors) ^ set(source.tensors))
    odd += [n for n, t in tensors.items() if n in source.tensors and (t.shape, t.dtype) != _kind(source.tensors[n])]
    if odd:
        raise FileError(
            f"{path} cannot be written: an ONNX graph needs the names, shapes and types it has, and `{odd[0]}` "
            "differs. Write such tensors as safetensors."
        )
    with opened(source.path) as file:
        view = memoryview(file.read())
    new = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    content = wire.replaced(
        view, lambda f: wire.message(7, _new_graph(source.path, f.bytes(), new)) if f.number == 7 else None
    )
    if len(content) > _MOST:
        raise FileError(
            f"{path} cannot be written: its weights take {len(content):,} bytes and an ONNX file ends at 2 GiB. "
            "Write the tensors as safetensors."
        )
    with writing(path) as temporary:
        temporary.write_bytes(content)
        check_back(path, new, load(temporary)["tensors"])


def _kind(tensor: Tensor) -> tuple[Any, Any]:
    return tensor.shape, tensor.dtype


def _new_graph(path: Path, view: memoryview, new: Mapping[str, Tensor]) -> bytes:
    def change(entry: wire.Field) -> bytes | None:
        if entry.number == 5:
            return wire.message(5, _new_tensor(entry.bytes(), new.get(_name_of(path, entry.bytes()))))
        if entry.number == 15:
            return wire.message(15, _new_sparse(path, entry.bytes(), new))
        if entry.number == 1:
            return wire.message(1, _new_node(path, entry.bytes(), new))
        return None

    return wire.replaced(view, change)


def _new_node(path: Path, view: memoryview, new: Mapping[str, Tensor]) -> bytes:
    texts = {entry.number: wire.text(path, entry) for entry in reversed(list(_few(view)))}
    constant = texts.get(2, "") if texts.get(4) == "Constant" else ""

    def inner(entry: wire.Field) -> bytes | None:
        if entry.number == 5 and constant in new:
            return wire.message(5, _new_tensor(entry.bytes(), new[constant]))
        if entry.number in (6, 11):
            return wire.message(entry.number, _new_graph(path, entry.bytes(), new))
        return None

    def change(entry: wire.Field) -> bytes | None:
        return wire.message(5, wire.replaced(entry.bytes(), inner)) if entry.number == 5 else None

    return wire.replaced(view, change)


def _few(view: memoryview) -> Iterator[wire.Field]:
    return (entry for entry in wire.fields(view) if entry.number in (2, 4))


def _new_tensor(view: memoryview, tensor: Tensor | None) -> bytes:
    if tensor is None:
        return bytes(view)
    kept = wire.replaced(view, lambda entry: b"" if entry.number in _DATA else None)
    return kept + wire.message(9, bytes_of(tensor))


def _new_sparse(path: Path, view: memoryview, new: Mapping[str, Tensor]) -> bytes:
    def change(entry: wire.Field) -> bytes | None:
        if entry.number == 1:
            inner = wire.replaced(entry.bytes(), lambda e: b"" if e.number in (1, *_DATA) else None)
            return wire.message(1, inner + wire.number(1, len(where)) + wire.message(9, bytes_of(flat[where])))
        if entry.number == 2:
            inner = wire.replaced(entry.bytes(), lambda e: b"" if e.number in (1, *_DATA) else None)
            return wire.message(2, inner + wire.number(1, len(where)) + wire.message(9, bytes_of(where)))
        return None

    names = [_name_of(path, entry.bytes()) for entry in wire.fields(view) if entry.number == 1]
    if not names or names[0] not in new:
        return bytes(view)
    flat = new[names[0]].reshape(-1)
    where = ((flat != 0) | flat.signbit()).nonzero()[:, 0]  # -0.0 is no zero to the bit
    return wire.replaced(view, change)
