"""Files of ``torch.save``, new and old, examined before torch reads them, and never with code in them run."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.engine.foreign.checkpoints import split
from secateur.engine.foreign.guard import Open, check_zip, limit, opened, refusal, size_of
from secateur.engine.foreign.pickles import CURE, Survey, survey

_MAGIC = 0x1950A86A20F9469CFC6C


def is_old(start: bytes) -> bool:
    """Whether a file begins as those of torch before 1.6 do."""
    return start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04")


def load(path: Path) -> dict[str, Any]:
    """What a file holds: the fields of :class:`Foreign` besides path and kind.

    Raises:
        FileError: when it is damaged, holds code, or holds no tensors by name.
    """
    whole, old = load_object(path)
    parts = split(path, whole, path.stat().st_size)
    facts: dict[str, Any] = {
        "under": ".".join(map(str, parts.under)), "joined": parts.joined, "old format": old,
        "others": {name: other.tensors for name, other in parts.others.items()}, "averages": parts.averages,
    }  # fmt: skip
    if parts.optimizer is not None:
        facts["optimizer"] = whole[parts.optimizer]
    if parts.under or parts.numbers:
        facts["numbers"] = parts.numbers
    tensors = parts.network.tensors
    stored = dict.fromkeys(tensors, "plain")
    return {"tensors": tensors, "stored": stored, "ties": ties(tensors), "left": parts.left, "facts": facts}


def load_object(path: Path) -> tuple[Any, bool]:
    """The object in a file, examined and then read with ``weights_only=True``; and whether the format is the old one.

    Raises:
        FileError: when it is damaged or holds code.
    """
    with opened(path) as file:
        return parse(path, file)


def parse(path: Path, file: Open, most: int | None = None) -> tuple[Any, bool]:
    """The same for a file that is open already, or the bytes of one.

    Args:
        path: for messages.
        file: where it is.
        most: bytes that it may unfold to, where these are fewer than its own size allows.

    Raises:
        FileError: when it is damaged or holds code.
    """
    old = is_old(file.read(4))
    file.seek(0)
    if old:
        _examine_old(path, file)
    else:
        examine_zip(path, file, check_zip(path, file, most))
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True), old
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        words = (str(error).splitlines() or [""])[0][:160]
        raise refusal(path, f"torch cannot read it without running code from it ({words})", CURE) from error


def examine_zip(path: Path, file: Open, archive: zipfile.ZipFile) -> None:
    """Check the pickle of a zip file and the size of each piece of memory it names.

    Raises:
        FileError: when something in it is not true, or would run code.
    """
    names = {entry.filename: entry for entry in archive.infolist()}
    mains = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise refusal(
            path, "it is TorchScript, which is code", "Save `torch.jit.load(path).state_dict()` with torch.save."
        )
    if len(mains) != 1:
        raise refusal(path, "it is a zip archive, but not one of torch.save", "Save the state dict with torch.save.")
    root = mains[0].removesuffix("data.pkl")
    _, found = survey(path, io.BytesIO(archive.read(mains[0])), limit(size_of(file)))
    for storage in found.storages.values():
        entry = names.get(f"{root}data/{storage.key}")
        if entry is None:
            raise refusal(path, f"it is truncated: the memory {ascii(storage.key)[:40]} is not in its archive")
        if entry.file_size != storage.size:
            raise refusal(path, f"{entry.filename} should have {storage.size:,} bytes and has {entry.file_size:,}")


def _examine_old(path: Path, file: Open) -> None:
    """The old format: five pickles, then the number of entries and the data of each piece of memory."""
    size = size_of(file)
    magic, _ = survey(path, file, 0)
    if magic != _MAGIC:
        raise refusal(path, "it is a pickle, but not one of torch.save", CURE)
    survey(path, file, 0)
    survey(path, file, 0)
    _, found = survey(path, file, limit(size))
    keys, _ = survey(path, file, 0)
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(found.storages):
        raise refusal(path, "the memory it names is not the memory it holds")
    _check_storages(path, file, size, keys, found)


def _check_storages(path: Path, file: Open, size: int, keys: list[Any], found: Survey) -> None:
    here = file.tell()
    for key in keys:
        storage = found.storages[key]
        file.seek(here)
        said = int.from_bytes(file.read(8), "little")
        if said * storage.width != storage.size:
            raise refusal(path, f"the memory {ascii(key)[:40]} has {said:,} entries, not what its tensors need")
        here += 8 + storage.size
        if here > size:
            raise refusal(path, f"it is truncated: its tensors end at byte {here:,} of {size:,}")


def ties(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, ...], ...]:
    """Names of tensors that are the same view of the same memory: a transposed one is another matrix."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            steps = [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
            groups.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape, *steps), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)
