"""Folders with weights in safetensors, as those of Hugging Face, written anew."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from secateur.core.errors import FileError
from secateur.engine.cautions import caution
from secateur.engine.foreign.beside import copy_beside
from secateur.engine.foreign.guard import told
from secateur.engine.foreign.tensorfile import shards, write_one

if TYPE_CHECKING:
    from secateur.engine.foreign.record import Foreign

_SHOWN = 6


def write(source: Foreign, path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file, or a folder of shards with everything that lay beside them; see :meth:`Foreign.write`."""
    if source.left:
        names = ", ".join(f"`{name}`" for name in list(source.left)[:3])
        raise FileError(f"{path} cannot be written: {names} of {source.path} could not be read and would be lost.")
    if "files" not in source.facts:
        write_one(path, tensors, source.facts["metadata"])
        return
    write_folder(source, path, tensors)


def write_folder(source: Foreign, path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A copy of the folder with these tensors; of tensors that are new, all go into the last shard.

    What is not copied along, such as older files of the same weights, is told in a warning.

    Raises:
        FileError: when the path is taken, or a file cannot be written.
    """
    folder = source.path if source.path.is_dir() else source.path.parent
    if path.exists():
        raise FileError(f"{path} is there already; name a new folder.")
    if path.resolve().is_relative_to(folder.resolve()):
        raise FileError(f"{path} lies in {folder} itself; name a folder elsewhere.")
    files: dict[str, str] = source.facts["files"]
    last = sorted(set(files.values()))[-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temporary.chmod(0o755)
        own = {*files.values(), *([source.facts["index"]] if "index" in source.facts else [])}
        left = copy_beside(folder, temporary, own, tensors.keys() | files.keys())
        where = {name: files.get(name, last) for name in tensors}
        for shard in sorted(set(where.values())):
            some = {name: tensor for name, tensor in tensors.items() if where[name] == shard}
            write_one(temporary / shard, some, source.facts["metadata"])
        if "index" in source.facts:
            _write_index(temporary / source.facts["index"], folder / source.facts["index"], where, tensors)
        temporary.replace(path)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}. Choose another folder.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if left:
        some = "; ".join(f"{told(Path(name))} ({why})" for name, why in list(left.items())[:_SHOWN])
        more = f"; and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        caution(f"not everything in {told(folder)} was copied to {told(path)}: {some}{more}.")


def _write_index(path: Path, old: Path, where: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    _, rest = shards(old)
    if isinstance(rest.get("metadata"), dict):
        rest["metadata"]["total_size"] = sum(t.numel() * t.element_size() for t in tensors.values())
    path.write_text(json.dumps({**rest, "weight_map": dict(where)}, indent=2) + "\n", encoding="utf-8")
