"""ONNX: the weights in a graph, without the graph being run, and the same graph with other weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.engine.foreign import onnxwire as wire
from secateur.engine.foreign.guard import (
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

if TYPE_CHECKING:
    pass

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
_SCOPE = re.compile(r"'([\w.]+)'")
"""A module's path among those that torch's exporter writes down beside a node."""
_FIXED = {4: torch.float32, 10: torch.float64}
DATA = (4, 5, 6, 7, 9, 10, 11, 13, 14)
_DEEPEST = 16


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
            found.facts["producer"] = check_name(path, wire.text(path, entry))
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
            found.add(name_of(found.path, entry.bytes()), entry.bytes(), "plain")
        elif entry.number == 15:
            _sparse(found, entry.bytes())
        elif entry.number == 1:
            _node(found, entry.bytes(), depth)
        elif entry.number == 11 and not depth:
            name, shape = _input(found.path, entry.bytes())
            check_name(found.path, name)
            found.facts.setdefault("inputs", {})[name] = shape


def _input(path: Path, view: memoryview) -> tuple[str, list[int | None] | None]:
    """Name and shape of an input; None for what is free."""
    name, shape = "", None
    for entry in wire.fields(view):
        if entry.number == 1:
            name = wire.text(path, entry)
        elif entry.number == 2:
            dims = [d for t in _parts(entry.bytes(), 1) for s in _parts(t, 2) for d in _parts(s, 1)]
            sizes = [[entry.number_of() for entry in wire.fields(dim) if entry.number == 1] for dim in dims]
            shape = [size[0] if size and size[0] > 0 else None for size in sizes]
    return name, shape


def _parts(view: memoryview, number: int) -> list[memoryview]:
    return [entry.bytes() for entry in wire.fields(view) if entry.number == number]


def name_of(path: Path, view: memoryview) -> str:
    """The name of a TensorProto."""
    names = [wire.text(path, entry) for entry in wire.fields(view) if entry.number == 8]
    return names[-1] if names else ""


def _node(found: _Found, view: memoryview, depth: int) -> None:
    inputs: list[str] = []
    about = {"op": "", "node": "", "out": ""}
    attributes: list[memoryview] = []
    scopes: list[str] = []
    for entry in wire.fields(view):
        if entry.number == 1:
            inputs.append(wire.text(found.path, entry))
        elif entry.number in (2, 3, 4):
            key = {2: "out", 3: "node", 4: "op"}[entry.number]
            about[key] = about[key] or wire.text(found.path, entry)
        elif entry.number == 5:
            attributes.append(entry.bytes())
        elif entry.number == 9:
            key, value = _pair(found.path, entry.bytes())
            scopes += _SCOPE.findall(value) if key == "pkg.torch.onnx.name_scopes" else []
    if _quantised(about["op"]):
        raise refusal(
            found.path,
            f"it is quantised (it has an operator {about['op'][:40]!r}), and its weights are no plain numbers",
            "Export the network before it was quantised.",
        )
    if about["op"] != "Constant":
        for slot, name in enumerate(inputs):
            use = {"op": about["op"], "node": about["node"], "slot": slot, "scopes": scopes}
            found.used.setdefault(name, {**use, "turned": _turned(found.path, about["op"], slot, attributes)})
    for attribute in attributes:
        _attribute(found, attribute, about["out"] if about["op"] == "Constant" else "", depth)


def _turned(path: Path, op: str, slot: int, attributes: list[memoryview]) -> bool:
    """Whether a matrix lies with inputs before outputs, other than torch keeps it."""
    if op == "Gemm":
        numbers: dict[str, int] = {}
        for attribute in attributes:
            name = next((wire.text(path, entry) for entry in wire.fields(attribute) if entry.number == 1), "")
            numbers[name] = next((entry.number_of() for entry in wire.fields(attribute) if entry.number == 3), 0)
        return slot == 1 and not numbers.get("transB", 0)
    return op == "MatMul" and slot == 1


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
        elif entry.number in DATA:
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
    name = check_name(found.path, name_of(found.path, values))
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
