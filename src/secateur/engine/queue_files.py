"""Files in the folders of a queue, where another process may take a folder away between any two lines."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.core.errors import FileError
from secateur.engine.checkpoint import STATE, load_state
from secateur.engine.queue_leases import LeaseLost


@contextlib.contextmanager
def reaching(path: Path) -> Iterator[None]:
    """Say what can be done where a place in a queue cannot be written.

    Raises:
        FileError: for every error of the system inside.
    """
    try:
        yield
    except OSError as error:
        raise FileError(
            f"cannot write {path}: {error.strerror or error}. Free some space or allow it, or choose another folder "
            "with `--queue`."
        ) from error


def put(path: Path, table: Mapping[str, Any], name: str) -> None:
    """Write a whole file of JSON into a folder of a stage that must be there.

    Raises:
        LeaseLost: when the folder is gone, and so another process's by now.
        FileError: when it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.new")
    with reaching(path):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(table, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                raise LeaseLost(name) from error
            raise


def number_of(private: Path, name: str) -> int:
    """The number of the lease under which a private folder was made; 0 where its name tells none."""
    found = re.match(r"\.(\d{6,9})\.", private.name[len(name) :])
    return int(found[1]) if found else 0


def sound(folder: Path) -> bool:
    """Whether training can go on from a folder that another process left; its files become this process's own."""
    try:
        if load_state(folder) is None:
            return False
    except FileError:
        return False
    for path in folder.iterdir():  # a slow process may still hold files open
        if path.is_file():
            copy = path.with_name(f".{path.name}.own")
            shutil.copyfile(path, copy)
            about = path.stat()
            os.utime(copy, ns=(about.st_atime_ns, about.st_mtime_ns))  # a copy is no later work; see `Store.saved`
            os.replace(copy, path)
    return True


def written(folder: Path) -> float:
    """When the checkpoint of a stage was written; 0 where there is none, or none any more."""
    try:
        return (folder / STATE).stat().st_mtime
    except OSError:
        return 0.0


def tolerant(path: Path) -> dict[str, Any]:
    """A table of JSON; empty when there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
