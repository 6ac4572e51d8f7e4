"""Files that are whole or absent: atomic writes, digests, safetensors, TOML out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from secateur.core.errors import FileError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary neighbour that takes the place of ``path`` when the block ends well.

    The file is flushed to the disk before the swap, so after a crash ``path`` holds the old content or
    the new, never a part.

    Raises:
        FileError: when the folder cannot be written or the disk is full; ``path`` is as it was.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        raise FileError(
            f"cannot write {path}: {error.strerror or error}. Nothing was changed there; "
            "free some space or choose another folder with `-o`."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or nothing; see :func:`writing`."""
    with writing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, table: Any) -> None:
    """Write JSON (sorted as given, two spaces), whole or not at all."""
    write_bytes(path, (json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        FileError: when the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise FileError(f"{path} is damaged: it is not JSON ({error}). Make it again, or restore a copy.") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file, read it back, compare to the bit and return its digest.

    Tensors that share memory (tied weights) are written under each of their names.

    Raises:
        FileError: when it cannot be written or does not read back equal.
    """
    flat: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        memory = whole.untyped_storage().data_ptr()
        flat[name] = whole.clone() if memory in seen else whole  # the format refuses tensors that share memory
        seen.add(memory)
    content = _in_order(to_bytes(flat, dict(metadata or {})))
    digest = hashlib.sha256(content).hexdigest()
    with writing(path) as temporary:
        temporary.write_bytes(content)
        if file_digest(temporary) != digest:
            raise FileError(f"{path} did not read back as written; the disk may be failing. Choose another folder.")
    return digest


def _in_order(content: bytes) -> bytes:
    """The same file with the header's metadata sorted: the format's writer leaves their order to chance."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + content[end:]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        FileError: when the file is missing, truncated or not safetensors.
    """
    if not path.is_file():
        raise FileError(f"{path} does not exist{_beside(path)}.")
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(
            f"{path} is damaged or not a safetensors file ({error}). Make it again, or restore a copy."
        ) from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}.") from error


def pack_bits(mask: Tensor) -> Tensor:
    """A boolean tensor as bytes, eight entries each, lowest bit first, row-major."""
    flat = mask.reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flat.device)
    return (flat * weights).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`pack_bits` for a known shape."""
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=packed.device)
    flat = (packed.unsqueeze(1) & weights).ne(0).reshape(-1)
    count = 1
    for size in shape:
        count *= size
    return flat[:count].reshape(shape)


def _beside(path: Path) -> str:
    if not path.parent.is_dir():
        return f": there is no folder {path.parent}"
    import difflib

    there = sorted(p.name for p in path.parent.iterdir())
    close = difflib.get_close_matches(path.name, there, n=1)
    return (
        f"; did you mean {path.parent / close[0]}?"
        if close
        else f"; {path.parent} holds {', '.join(there[:8]) or 'nothing'}"
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Make the new name durable where the system allows it; the file itself is already on the disk."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
