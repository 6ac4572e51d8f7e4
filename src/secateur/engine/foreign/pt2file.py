"""Files of ``torch.export.save``: their weights, read from the archive without opening the program."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.core.errors import FileError
from secateur.core.files import writing
from secateur.engine.foreign.guard import (
    Open,
    bytes_of,
    check_name,
    check_shape,
    check_zip,
    count,
    limit,
    opened,
    parse_json,
    refusal,
    same,
    size_of,
    tensor_of,
)
from secateur.engine.foreign.tensorfile import check_back
from secateur.engine.foreign.torchfile import parse, ties

if TYPE_CHECKING:
    from secateur.engine.foreign.record import Foreign

_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 10: torch.complex64, 11: torch.complex128, 12: torch.bool, 13: torch.bfloat16, 28: torch.uint16,
    29: torch.float8_e4m3fn, 30: torch.float8_e5m2, 31: torch.float8_e4m3fnuz, 32: torch.float8_e5m2fnuz,
    33: torch.float8_e8m0fnu, 34: torch.uint32, 35: torch.uint64,
}  # fmt: skip
_OLD_STATE, _OLD_CONSTANTS = "serialized_state_dict.pt", "serialized_constants.pt"
_MARKS = ("archive_format", "serialized_exported_program.json", "model_weights_config.json")


@dataclass
class _Found:
    """What the archive holds, and the memory that its tensors are views on."""

    path: Path
    archive: zipfile.ZipFile
    most: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    pickled: dict[str, Tensor | None] = field(default_factory=dict)
    bytes: int = 0

    def blob(self, place: str) -> Any:
        """What a file of ``torch.save`` in the archive holds; a tensor that is listed often is read once."""
        if place in self.pickled:
            return self.pickled[place]
        value, _ = parse(self.path, io.BytesIO(self.archive.read(place)), self.most - self.bytes)
        self.pickled[place] = value.detach() if isinstance(value, Tensor) else None
        if isinstance(value, Tensor) and value.layout == torch.strided:
            self.spend(place, value.untyped_storage().nbytes())
        return value

    def spend(self, name: str, size: int) -> None:
        """Count the bytes of a tensor: many may be views on the same few.

        Raises:
            FileError: when they are more together than the file may unfold to.
        """
        self.bytes += size
        if self.bytes > self.most:
            raise refusal(self.path, f"`{name}` and others unfold to more than {self.most:,} bytes")


def is_program(names: list[str]) -> bool:
    """Whether an archive with these files is one of ``torch.export.save``."""
    return any(name.rpartition("/")[2] in _MARKS for name in names)


def load(path: Path) -> dict[str, Any]:
    """What a file holds: the fields of :class:`Foreign` besides path and kind.

    Raises:
        FileError: when it is damaged, or its weights are pickles that would run code.
    """
    with opened(path) as file:
        found = _read(path, file)
    if not found.tensors:
        raise refusal(path, "it is a program without weights", "Export the network again.")
    fields = {"tensors": found.tensors, "stored": found.stored, "ties": ties(found.tensors), "left": found.left}
    return {**fields, "facts": {"old format": not found.memory}}


def _read(path: Path, file: Open) -> _Found:
    found = _Found(path, check_zip(path, file), limit(size_of(file)))
    names = found.archive.namelist()
    tables = [name for name in names if name.endswith(("_weights_config.json", "_constants_config.json"))]
    if sum(name.endswith("_weights_config.json") for name in tables) > 1:
        raise refusal(path, "it holds several programs", "Save each in a file of its own.")
    for table in tables:
        _table(found, table, "plain" if table.endswith("_weights_config.json") else "constant")
    for name in names:
        if not tables and name.rpartition("/")[2] in (_OLD_STATE, _OLD_CONSTANTS):
            blob = found.blob(name)
            for key, value in blob.items() if isinstance(blob, Mapping) else ():
                _keep(found, key, value, "pickled" if name.endswith(_OLD_STATE) else "constant")
    return found


def _keep(found: _Found, name: Any, value: Any, how: str) -> None:
    check_name(found.path, name)
    if isinstance(value, Tensor) and value.layout == torch.strided:
        found.spend(name, count(value.shape) * value.element_size())
        found.tensors[name], found.stored[name] = value.detach(), how
    else:
        found.left[name] = "no plain tensor"


def _table(found: _Found, table: str, how: str) -> None:
    """The tensors of one list: each names a file of the archive and a view on its bytes."""
    whole = parse_json(found.path, found.archive.read(table), table)
    entries = whole.get("config") if isinstance(whole, dict) else None
    if not isinstance(entries, dict):
        raise refusal(found.path, f"{table} is no list of tensors")
    folder = table.rpartition("/")[0]
    for name, about in entries.items():
        check_name(found.path, name)
        if name in found.tensors:
            raise refusal(found.path, f"two of its tensors are called `{name}`")
        place = about.get("path_name") if isinstance(about, dict) else None
        if not isinstance(place, str) or f"{folder}/{place}" not in found.archive.NameToInfo:
            raise refusal(found.path, f"the data of `{name}` are not in its archive")
        if place.startswith(("custom_obj", "opaque_obj")):
            found.left[name] = "an object, which is code"
        elif about.get("use_pickle"):
            _keep(found, name, found.blob(f"{folder}/{place}"), "pickled")
        else:
            found.tensors[name] = _view(found, name, f"{folder}/{place}", about.get("tensor_meta"))
            found.stored[name] = how


def _view(found: _Found, name: str, place: str, meta: Any) -> Tensor:
    """A tensor as its shape, strides and offset tell, on memory that others may share."""
    if not isinstance(meta, dict) or meta.get("dtype") not in _DTYPES:
        raise refusal(found.path, f"`{name}` has no known type ({ascii(meta)[:60]})")
    shape = check_shape(found.path, name, _whole(meta.get("sizes")))
    steps = check_shape(found.path, name, _whole(meta.get("strides")))
    offset = _whole([meta.get("storage_offset")])
    dtype = _DTYPES[meta["dtype"]]
    size = found.archive.getinfo(place).file_size
    if len(steps) != len(shape) or not check_shape(found.path, name, offset):
        raise refusal(found.path, f"`{name}` does not say where its data lie")
    last = offset[0] + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
    if count(shape) and (last + 1) * dtype.itemsize > size or size % dtype.itemsize:
        raise refusal(found.path, f"`{name}` of shape {list(shape)} reaches beyond its {size:,} bytes")
    found.spend(name, count(shape) * dtype.itemsize)
    if not count(shape):
        return torch.zeros(shape, dtype=dtype)
    if place not in found.memory:
        found.memory[place] = tensor_of(found.archive.read(place), torch.uint8, (size,))
    return found.memory[place].view(dtype).as_strided(shape, steps, offset[0])


def _whole(sizes: Any) -> Any:
    """Plain numbers from the table's own form of them."""
    if not isinstance(sizes, list):
        return None
    return [entry.get("as_int") if isinstance(entry, dict) else entry for entry in sizes]


def write(source: Foreign, path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the same program with these weights."""
    odd = sorted(set(tensors) ^ set(source.tensors))
    old = source.tensors
    odd += [n for n, t in tensors.items() if n in old and (t.shape, t.dtype) != (old[n].shape, old[n].dtype)]
    if odd:
        raise FileError(
            f"{path} cannot be written: a program needs the names, shapes and types it has, and `{odd[0]}` differs. "
            "Write such tensors as safetensors."
        )
    with opened(source.path) as file:
        found = _read(source.path, file)
        new = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        for name, how in found.stored.items():
            if not found.memory or (how == "pickled" and not same(old[name], new[name])):
                raise FileError(
                    f"{path} cannot be written: `{name}` is a pickle in {source.path}. Write the tensors as "
                    "safetensors, or save the program again with torch 2.9 or later, which writes plain bytes."
                )
        for name, tensor in new.items():
            found.tensors[name].copy_(tensor)
        with writing(path) as temporary:
            with zipfile.ZipFile(temporary, "w") as made:
                for entry in found.archive.infolist():
                    memory = found.memory.get(entry.filename)
                    made.writestr(entry, found.archive.read(entry) if memory is None else bytes_of(memory))
            check_back(path, new, load(temporary)["tensors"])
