"""The same ONNX graph with other weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from secateur.core.errors import FileError
from secateur.core.files import writing
from secateur.engine.foreign import onnxwire as wire
from secateur.engine.foreign.guard import bytes_of, opened
from secateur.engine.foreign.onnxfile import DATA, load, name_of
from secateur.engine.foreign.tensorfile import check_back

if TYPE_CHECKING:
    from secateur.engine.foreign.record import Foreign

_MOST = 2**31 - 2**20


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
            return wire.message(5, _new_tensor(entry.bytes(), new.get(name_of(path, entry.bytes()))))
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
    kept = wire.replaced(view, lambda entry: b"" if entry.number in DATA else None)
    return kept + wire.message(9, bytes_of(tensor))


def _new_sparse(path: Path, view: memoryview, new: Mapping[str, Tensor]) -> bytes:
    def change(entry: wire.Field) -> bytes | None:
        if entry.number == 1:
            inner = wire.replaced(entry.bytes(), lambda e: b"" if e.number in (1, *DATA) else None)
            return wire.message(1, inner + wire.number(1, len(where)) + wire.message(9, bytes_of(flat[where])))
        if entry.number == 2:
            inner = wire.replaced(entry.bytes(), lambda e: b"" if e.number in (1, *DATA) else None)
            return wire.message(2, inner + wire.number(1, len(where)) + wire.message(9, bytes_of(where)))
        return None

    names = [name_of(path, entry.bytes()) for entry in wire.fields(view) if entry.number == 1]
    if not names or names[0] not in new:
        return bytes(view)
    flat = new[names[0]].reshape(-1)
    where = ((flat != 0) | flat.signbit()).nonzero()[:, 0]  # -0.0 is no zero to the bit
    return wire.replaced(view, change)
