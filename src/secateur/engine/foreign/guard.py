"""What every reader checks before it believes a file: that it is one, and that its sizes can be true."""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from secateur.core.errors import FileError

Open = io.BufferedReader | io.BytesIO
"""A file that is open for reading, or the bytes of one."""
EXPANDS = 64
"""How many times its own bytes a file may unfold to: bits become numbers of four or eight bytes."""
_SMALL = 1 << 20
_LONGEST = 1024
_DEEPEST = "it is nested too deeply"


def refusal(path: Path, what: str, cure: str = "Get the file again, or restore a copy.") -> FileError:
    """The error for a file that is not believed: the file, what is wrong, and the cure."""
    return FileError(f"{told(path)}: {what}. {cure}")


def told(path: Path) -> str:
    """A path as it can be printed: a name may hold anything, and a terminal obeys control characters."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


@contextlib.contextmanager
def contained(path: Path, did: str = "read") -> Iterator[None]:
    """Whatever a damaged file makes a decoder raise becomes one error that names the file.

    Raises:
        FileError: in the place of errors of values, sizes, memory and the system.
    """
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        raise FileError(
            f"{told(path)} cannot be {did}: {error.strerror or error}. Check the path and its rights."
        ) from error
    except RecursionError as error:
        raise refusal(path, _DEEPEST) from error
    except MemoryError as error:
        raise refusal(path, "its tensors do not fit into memory", "Use a machine with more.") from error
    except (ValueError, RuntimeError, LookupError, TypeError, ArithmeticError, AttributeError, EOFError, struct.error,
            zipfile.BadZipFile, zlib.error) as error:  # fmt: skip
        words = (str(error).splitlines() or [""])[0][:200]
        raise refusal(path, f"it is damaged and cannot be {did} ({type(error).__name__}: {words!r})") from error


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Open]:
    """An ordinary file, opened for reading; pipes and devices are refused without waiting for them.

    Raises:
        FileError: when there is none, it is something else, is empty, or may not be read.
    """
    if not path.exists() and not path.is_symlink():
        raise FileError(f"{told(path)} does not exist{_near(path)}")
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise FileError(
            f"{told(path)} cannot be read: {error.strerror or error}. Check the path and its rights."
        ) from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise refusal(path, "it is not an ordinary file but a folder, pipe or device", "Pass a file of weights.")
    with os.fdopen(descriptor, "rb") as file:
        if not found.st_size:
            raise refusal(path, "it is empty (0 bytes)")
        yield file


def _near(path: Path) -> str:
    import difflib

    if not path.parent.is_dir():
        return f": there is no folder {told(path.parent)}. Check the path."
    close = difflib.get_close_matches(path.name, sorted(p.name for p in path.parent.iterdir()), n=1)
    return f"; did you mean {told(path.parent / close[0])}?" if close else ". Check the path."


def size_of(file: Open) -> int:
    """Bytes of an open file; it stays where it is."""
    here = file.tell()
    end = file.seek(0, os.SEEK_END)
    file.seek(here)
    return end


def limit(size: int) -> int:
    """Bytes that the contents of a file of ``size`` bytes may take in memory."""
    return max(_SMALL, EXPANDS * size)


def check_name(path: Path, name: Any) -> str:
    """A name that can be printed and is not endless.

    Raises:
        FileError: for another.
    """
    if not isinstance(name, str) or not name.isprintable() or len(name) > _LONGEST:
        raise refusal(path, f"the name of a tensor, {ascii(name)[:80]}, holds control characters or is no name")
    return name


def check_shape(path: Path, name: str, shape: Any) -> tuple[int, ...]:
    """Sizes that are whole numbers from 0 on.

    Raises:
        FileError: for others.
    """
    if not isinstance(shape, list | tuple) or len(shape) > 64 or not all(type(n) is int and n >= 0 for n in shape):
        raise refusal(path, f"`{name}` has the impossible shape {ascii(shape)[:80]}")
    return tuple(shape)


def count(shape: Iterable[int]) -> int:
    """Entries of a tensor of this shape; exact for any size."""
    product = 1
    for size in shape:
        product *= size
    return product


def tensor_of(content: bytes | bytearray | memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor with memory of its own from little-endian bytes; as many as the shape needs."""
    if not count(shape):
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape)


def bytes_of(tensor: Tensor) -> bytes:
    """The little-endian bytes of a tensor, row-major."""
    whole = tensor.detach().cpu().contiguous().reshape(-1)
    return whole.view(torch.uint8).numpy().tobytes() if whole.numel() else b""


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the bit."""
    return one.dtype == other.dtype and one.shape == other.shape and bytes_of(one) == bytes_of(other)


def parse_json(path: Path, text: bytes, what: str) -> Any:
    """JSON without NaN, and without two entries of one name.

    Raises:
        FileError: when it is not.
    """

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            often = Counter(name for name, _ in pairs)
            twice = next(name for name in often if often[name] > 1)
            raise refusal(path, f"{what} has two entries called {ascii(twice)[:80]}")
        return made

    def constant(word: str) -> Any:
        raise refusal(path, f"{what} holds {word}, which is no number of JSON")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=table, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise refusal(path, f"{what} is not UTF-8 text") from error
    except RecursionError as error:
        raise refusal(path, f"{what}: {_DEEPEST}") from error
    except ValueError as error:
        raise refusal(path, f"{what} is not JSON ({str(error)[:120]})") from error


def read_config(path: Path, most: int = 1 << 26) -> Any:
    """A JSON file of someone else's.

    Raises:
        FileError: when it is missing, no ordinary file, too large, or not JSON.
    """
    with opened(path) as file:
        if size_of(file) > most:
            raise refusal(path, f"it has {size_of(file):,} bytes, too many for a file of settings")
        return parse_json(path, file.read(), "it")


def inside(path: Path, folder: Path, name: Any, links: bool = False) -> Path:
    """The file that ``path`` names, which must lie in ``folder``, also after all links are followed.

    Args:
        path: who names it.
        folder: where it must lie.
        name: its name, with forward slashes.
        links: allow links that lead elsewhere, as in the cache of Hugging Face.

    Raises:
        FileError: when it leads elsewhere.
    """
    odd = not isinstance(name, str) or not name or not name.isprintable() or "\\" in name
    if odd or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise refusal(path, f"it names the file {ascii(name)[:80]}, which is not in its own folder")
    found = folder / name
    if not links and not found.resolve().is_relative_to(folder.resolve()):
        raise refusal(path, f"the file it names, {ascii(name)[:80]}, leads out of its own folder")
    return found


def check_zip(path: Path, file: Open, most: int | None = None) -> zipfile.ZipFile:
    """An archive whose names stay inside, occur once, do not overlap, and unfold to a believable size.

    Args:
        path: for messages.
        file: where the archive is.
        most: bytes that it may unfold to, where these are fewer than its own size allows.

    Raises:
        FileError: for another.
    """
    size = size_of(file)
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, struct.error) as error:
        raise refusal(path, f"its archive is truncated or damaged ({error})") from error
    _check_end(path, file, archive)
    entries = archive.infolist()
    seen: set[str] = set()
    for entry in entries:
        name = entry.filename
        if not name.isprintable() or "\\" in name or name.startswith("/") or ".." in name.split("/") or ":" in name:
            raise refusal(path, f"its archive names the file {ascii(name)[:80]}, which leads out of it")
        if name.lower() in seen:  # torch finds a name in any case
            raise refusal(path, f"its archive has two files called {name!r}")
        if entry.flag_bits & 1:
            raise refusal(path, f"{name!r} in its archive is encrypted", "Save it without a password.")
        seen.add(name.lower())
    whole = sum(entry.file_size for entry in entries)
    if whole > (limit(size) if most is None else min(most, limit(size))):
        raise refusal(path, f"its archive of {size:,} bytes says it unfolds to {whole:,}", "Get it from its source.")
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.header_offset < end:
            raise refusal(path, f"{entry.filename!r} in its archive overlaps another file")
        end = entry.header_offset + 30 + len(entry.filename) + entry.compress_size
    if end > size:
        raise refusal(path, "its archive is truncated: a file in it ends after the end")
    return archive


def _check_end(path: Path, file: Open, archive: zipfile.ZipFile) -> None:
    """The end of an archive must be the end of the file, and its directory where the end says.

    Otherwise two programs can find two directories in it, and what was examined is not what is read.
    """
    size = size_of(file)
    file.seek(max(0, size - 98))
    tail = file.read()
    end = tail[-22:]
    if end[:4] != b"PK\x05\x06" or end[20:] != b"\0\0":
        raise refusal(path, "its archive is truncated, or something stands behind its end")
    begin = int.from_bytes(end[16:20], "little")
    if tail[-42:-38] == b"PK\x06\x07":
        begin = int.from_bytes(tail[-50:-42], "little") if tail[-98:-94] == b"PK\x06\x06" else -1
    if archive.start_dir != begin:
        raise refusal(path, "its archive does not begin where the file does, or its directory lies elsewhere")
