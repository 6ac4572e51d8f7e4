"""Files of ``torch.save``, new and old, examined before torch reads them, and never with code in them run."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.core.errors import FileError
from secateur.core.files import writing
from secateur.engine.foreign.guard import Open, check_name, check_zip, limit, opened, refusal, size_of
from secateur.engine.foreign.pickles import CURE, Survey, survey
from secateur.engine.foreign.tensorfile import check_back

if TYPE_CHECKING:
    from secateur.engine.foreign.record import Foreign

UNDER = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params")
"""Entries of a checkpoint that hold the network, the first one found being taken."""
AVERAGES = (
    "ema", "model_ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "params_ema",
    "shadow_params", "shadow", "averaged_model", "swa", "swa_state_dict", "teacher", "module_ema",
)  # fmt: skip
"""Entries that hold an averaged copy."""
_OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optim", "optimizer_states", "opt")
_MAGIC = 0x1950A86A20F9469CFC6C
_DEEPEST = 4


def is_old(start: bytes) -> bool:
    """Whether a file begins as those of torch before 1.6 do."""
    return start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04")


def load(path: Path) -> dict[str, Any]:
    """What a file holds: the fields of :class:`Foreign` besides path and kind.

    Raises:
        FileError: when it is damaged, holds code, or holds no tensors by name.
    """
    whole, old = load_object(path)
    under, found, others = _choose(path, whole)
    tensors, left = _flat(path, found)
    facts: dict[str, Any] = {"under": under, "old format": old, "others": {}}
    for name, other in others.items():
        inner, _ = _flat(path, other)
        if inner:
            facts["others"][name] = inner
    if isinstance(whole, Mapping) and under:
        for name in _OPTIMIZERS:
            if name in whole:
                facts["optimizer"] = whole[name]
                break
        facts["numbers"] = {str(k): v for k, v in whole.items() if isinstance(v, int | float) or _short(v)}
        left |= {f"{k}": "no state dict" for k in whole if str(k) not in (*under.split("."), *facts["others"],
                 *facts["numbers"], *_OPTIMIZERS)}  # fmt: skip
    if not tensors:
        raise refusal(path, "it holds no tensors by name", "Save `model.state_dict()`.")
    stored = {name: "plain" for name in tensors}
    return {"tensors": tensors, "stored": stored, "ties": ties(tensors), "left": left, "facts": facts}


def load_object(path: Path) -> tuple[Any, bool]:
    """The object in a file, examined and then read with ``weights_only=True``; and whether the format is the old one.

    Raises:
        FileError: when it is damaged or holds code.
    """
    with opened(path) as file:
        return parse(path, file)


def parse(path: Path, file: Open) -> tuple[Any, bool]:
    """The same for a file that is open already, or the bytes of one.

    Raises:
        FileError: when it is damaged or holds code.
    """
    old = is_old(file.read(4))
    file.seek(0)
    if old:
        _examine_old(path, file)
    else:
        examine_zip(path, file, check_zip(path, file))
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


def _choose(path: Path, whole: Any) -> tuple[str, Mapping[Any, Any], dict[str, Mapping[Any, Any]]]:
    """The network in a checkpoint, by the entry it lies under, and the other state dicts beside it."""
    if not isinstance(whole, Mapping):
        raise refusal(path, f"it holds a {type(whole).__name__}, not tensors by name", "Save `model.state_dict()`.")
    for key in whole:
        check_name(path, str(key))
    if any(isinstance(value, Tensor) for value in whole.values()) and not any(_nested(whole.get(n)) for n in UNDER):
        return "", whole, {}
    nested = {str(k): n for k, v in whole.items() if str(k) not in _OPTIMIZERS and (n := _nested(v)) is not None}
    if not nested:
        raise refusal(path, "it holds no tensors by name", "Save `model.state_dict()`.")
    plain = [name for name in nested if name not in AVERAGES]
    chosen = next((name for name in UNDER if name in nested), None)
    if chosen is None:
        chosen = max(plain or list(nested), key=lambda name: _entries(nested[name]))
    inner, found = chosen, nested[chosen]
    if not any(isinstance(value, Tensor) for value in found.values()):
        name = next(str(k) for k in found if _nested(found[k]) is not None)
        inner, found = f"{chosen}.{name}", found[name]
    return inner, found, {name: other for name, other in nested.items() if name != chosen}


def _short(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) < 200


def _nested(value: Any) -> Mapping[Any, Any] | None:
    """A table of tensors, or one table further in; a list of tensors counts by its numbers."""
    if isinstance(value, list | tuple) and value and all(isinstance(entry, Tensor) for entry in value):
        return {str(index): entry for index, entry in enumerate(value)}
    if not isinstance(value, Mapping):
        return None
    if any(isinstance(entry, Tensor) for entry in value.values()):
        return value
    inner = [entry for entry in value.values() if isinstance(entry, Mapping)]
    return value if any(isinstance(x, Tensor) for entry in inner for x in entry.values()) else None


def _entries(found: Mapping[Any, Any]) -> int:
    return sum(value.numel() for value in found.values() if isinstance(value, Tensor))


def _flat(
    path: Path, found: Mapping[Any, Any], prefix: str = "", depth: int = 0
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name; tables in tables are joined by dots."""
    tensors: dict[str, Tensor] = {}
    left: dict[str, str] = {}
    for key, value in found.items():
        name = check_name(path, f"{prefix}{key}")
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized and not value.is_meta:
            if name in tensors:
                raise refusal(path, f"two of its tensors are called `{name}`")
            tensors[name] = value.detach()
        elif isinstance(value, Tensor):
            left[name] = "a tensor that is quantised, sparse or without data"
        elif isinstance(value, Mapping) and depth < _DEEPEST:
            inner, rest = _flat(path, value, f"{name}.", depth + 1)
            tensors |= inner
            left |= rest
        else:
            left[name] = f"no tensor but a {type(value).__name__}"
    return tensors, left


def ties(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, ...], ...]:
    """Names of tensors that begin at the same place of the same memory and are equally large."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            groups.setdefault((tensor.data_ptr(), tensor.numel()), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def write(source: Foreign, path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the checkpoint with these tensors in their place, all other entries as they were."""
    whole, old = load_object(source.path)
    tied = {name: names[0] for names in source.ties for name in names}
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        first = tied.get(name, name)
        one = made.get(first)
        shared = one is not None and one.shape == tensor.shape and bool(torch.equal(one, tensor))
        made[name] = one if shared and one is not None else tensor.detach().cpu().clone()
    place: Any = whole
    under = source.facts["under"]
    for part in [under] if under in whole else under.split("."):
        place = place[part] if part else place
    if any(_nested(value) for value in place.values()) or not all(isinstance(key, str) for key in place):
        raise FileError(
            f"{source.path} holds tables within tables, which cannot be written back. "
            "Save its `state_dict` alone, or as safetensors."
        )
    for name in [name for name, value in place.items() if isinstance(value, Tensor) and name not in made]:
        del place[name]
    place.update(made)
    with writing(path) as temporary:
        with open(temporary, "wb") as file:
            torch.save(whole, file, _use_new_zipfile_serialization=not old)
        check_back(path, made, load(temporary)["tensors"])
