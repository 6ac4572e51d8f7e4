"""Safetensors: one file, shards with an index, or the folder of Hugging Face that holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.core.errors import FileError
from secateur.core.files import writing
from secateur.engine.foreign.guard import (
    Open,
    bytes_of,
    check_name,
    check_shape,
    count,
    inside,
    opened,
    parse_json,
    read_config,
    refusal,
    same,
    size_of,
    tensor_of,
)

_MOST_HEADER = 100_000_000
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
INDEX = "model.safetensors.index.json"


class Entry(NamedTuple):
    """Where a tensor lies in a file: its type as the header calls it, shape, and the bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Content(NamedTuple):
    """What one file holds."""

    tensors: dict[str, Tensor]
    left: dict[str, str]
    metadata: dict[str, str]


def header(path: Path, file: Open) -> tuple[dict[str, Entry], dict[str, str], int]:
    """The entries of a file, its metadata, and where its data begin; every size is checked against the file's.

    Raises:
        FileError: when anything in it cannot be true.
    """
    size = size_of(file)
    if size < 8:
        raise refusal(path, f"it is truncated: {size} bytes are too few for a safetensors file")
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, _MOST_HEADER):
        raise refusal(
            path,
            f"it is truncated or no safetensors file: its header should have {length:,} bytes, the file has {size:,}",
        )
    table = parse_json(path, file.read(length), "its header")
    if not isinstance(table, dict):
        raise refusal(path, "its header is not a table")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise refusal(path, "its metadata are not texts")
    entries = {check_name(path, name): _entry(path, name, about) for name, about in table.items()}
    _check_places(path, entries, size - 8 - length)
    return entries, metadata, 8 + length


def _entry(path: Path, name: str, about: Any) -> Entry:
    places = about.get("data_offsets") if isinstance(about, dict) else None
    if not isinstance(places, list) or len(places) != 2 or not all(type(n) is int and n >= 0 for n in places):
        raise refusal(path, f"`{name}` does not say where its data lie")
    shape = check_shape(path, name, about.get("shape"))
    kind, (begin, end) = about.get("dtype"), places
    if not isinstance(kind, str):
        raise refusal(path, f"`{name}` has no type")
    need = count(shape) * _DTYPES[kind].itemsize if kind in _DTYPES else end - begin
    if need != end - begin:
        raise refusal(path, f"`{name}` of shape {list(shape)} needs {need:,} bytes and has {end - begin:,}")
    return Entry(kind, shape, begin, end)


def _check_places(path: Path, entries: Mapping[str, Entry], size: int) -> None:
    here = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > size:
            raise refusal(path, f"it is truncated: `{name}` ends at byte {entry.end:,} of {size:,}")
        if entry.begin != here:
            raise refusal(
                path, f"`{name}` begins at byte {entry.begin:,}, which overlaps or leaves a hole (at {here:,})"
            )
        here = entry.end
    if here != size:
        raise refusal(path, f"{size - here:,} bytes at its end belong to no tensor")


def load(path: Path) -> Content:
    """The tensors of one file.

    Raises:
        FileError: when it is missing or damaged.
    """
    with opened(path) as file:
        entries, metadata, start = header(path, file)
        tensors, left = {}, {}
        for name, entry in entries.items():
            if entry.dtype not in _DTYPES:
                left[name] = f"its type {entry.dtype} is not known here"
                continue
            file.seek(start + entry.begin)
            tensors[name] = tensor_of(file.read(entry.end - entry.begin), _DTYPES[entry.dtype], entry.shape)
    return Content(tensors, left, metadata)


def shards(index: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The file of each tensor by an index of shards, and the rest of the index.

    Raises:
        FileError: when it is damaged or names files elsewhere.
    """
    table = read_config(index)
    where = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(where, dict) or not where:
        raise refusal(index, "it is no index of shards: it has no `weight_map`", "Pass the folder or its weights.")
    for name, shard in where.items():
        check_name(index, name)
        inside(index, index.parent, shard, links=True)
    return where, {key: value for key, value in table.items() if key != "weight_map"}


def load_shards(index: Path) -> tuple[Content, dict[str, str]]:
    """The tensors of all shards, and the file each lies in.

    Raises:
        FileError: when a shard is missing or damaged, or lacks a tensor that the index puts there.
    """
    where, _ = shards(index)
    tensors: dict[str, Tensor] = {}
    left: dict[str, str] = {}
    metadata: dict[str, str] = {}
    for shard in sorted(set(where.values())):
        found = load(index.parent / shard)
        metadata |= found.metadata
        for name in (*found.tensors, *found.left):
            if where.get(name) != shard:
                raise refusal(index, f"{shard} holds `{name}`, which the index does not put there")
        tensors |= found.tensors
        left |= found.left
    if lost := [name for name in where if name not in tensors and name not in left]:
        raise refusal(index, f"`{lost[0]}` and {len(lost) - 1} more are in no shard")
    return Content(tensors, left, metadata), where


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A file with these tensors in this order, which the format's own writer would change.

    Raises:
        FileError: for a type that the format has no word for.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    parts, here = [], 0
    # Data go in order of alignment, as the format's own writer puts them; the header keeps the order of names.
    placed: dict[str, list[int]] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        if tensor.dtype not in _NAMES:
            raise FileError(f"safetensors cannot hold `{name}`, which is of type {tensor.dtype}; convert it first.")
        part = bytes_of(tensor)
        placed[name] = [here, here + len(part)]
        parts.append(part)
        here += len(part)
    for name, tensor in tensors.items():
        table[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": placed[name]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def write_one(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one file and read it back.

    Raises:
        FileError: when it cannot be written, or reads back otherwise.
    """
    with writing(path) as temporary:
        temporary.write_bytes(encode(tensors, metadata))
        check_back(path, tensors, load(temporary).tensors)


def check_back(path: Path, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Compare what was written with what reads back.

    Raises:
        FileError: when they differ.
    """
    for name, tensor in wanted.items():
        if name not in found or not same(tensor.detach().cpu(), found[name]):
            raise FileError(f"`{name}` in {path} did not read back as written. Choose another folder.")
