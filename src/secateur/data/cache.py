"""Where data lies on disk: the user's folders, and a cache of decoded arrays."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from secateur.core.errors import DataError, SecateurError
from secateur.data.dataset import Dataset, Split

FORMAT = 1
"""Raised whenever decoded arrays change, so that older cache files are no longer read."""


@dataclass(frozen=True)
class Where:
    """Where a data set may be looked for.

    Args:
        data_dir: the folder of data sets; None means the environment variable ``SECATEUR_DATA``.
        cache: whether decoded arrays are kept in the cache folder.
    """

    data_dir: str | os.PathLike[str] | None = None
    cache: bool = True

    def root(self) -> Path | None:
        """The folder of data sets, or None when none was named."""
        named = self.data_dir or os.environ.get("SECATEUR_DATA")
        return Path(named).expanduser() if named else None

    def folder(self, name: str, *needed: str) -> Path | None:
        """The folder of one data set when it holds all files (glob patterns) ``needed``, else None."""
        root = self.root()
        if root is None or not all(any((root / name).rglob(pattern)) for pattern in needed):
            return None
        return root / name

    def absent(self, name: str, folder: str, needed: Iterable[str], otherwise: str = "") -> DataError:
        """The error for a data set that is not there: where was looked, and what to do."""
        root, files = self.root(), " and ".join(f"{folder}/{file}" for file in needed)
        if root is None:
            looked = "Looked nowhere: no data folder is named."
        else:
            looked = f"Looked in {root / folder}{'' if root.is_dir() else f' ({root} is not a folder)'}."
        return DataError(
            f"the data set {name!r} is not here. {looked} "
            f"Set --data-dir or SECATEUR_DATA to a folder that holds {files}{otherwise}."
        )


def fingerprint(files: Iterable[Path]) -> list[list[Any]]:
    """Path, size and time of change of each file."""
    stats = [(file.resolve(), file.stat()) for file in files]
    return [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def cached(name: str, key: Any, build: Callable[[], Dataset], enabled: bool = True) -> Dataset:
    """What ``build`` returns, kept on disk under ``name`` and ``key``.

    The folder is ``$SECATEUR_CACHE`` or ``~/.cache/secateur``. A file that is damaged (its digest does not
    fit) is built anew; a folder that cannot be written is passed over without a word.

    Args:
        name: name of the data set, the first part of the file's name.
        key: anything JSON can hold; files, options and whatever else the arrays depend on.
        build: makes the data set.
        enabled: False to leave the cache alone.

    Cost of a hit: reading the file and one SHA-256 (0.3 s for CIFAR-10).
    """
    place = _place(name, key) if enabled else None
    if place is None:
        return build()
    found = _read(place)
    if found is None:
        found = build()
        _write(found, place)
    return found


def _place(name: str, key: Any) -> Path | None:
    try:
        folder = Path(os.environ.get("SECATEUR_CACHE") or "~/.cache/secateur").expanduser()
    except RuntimeError:  # no home folder
        return None
    mark = hashlib.sha256(json.dumps([FORMAT, name, key]).encode()).hexdigest()[:16]
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', name)[-40:].strip('-')}-{mark}.safetensors"


def _read(place: Path) -> Dataset | None:
    try:
        with safe_open(place, framework="pt") as file:
            table = json.loads((file.metadata() or {})["secateur"])
            digest = table.pop("digest")
            parts = table.pop("parts")
            splits = {part: Split(file.get_tensor(f"{part}.x"), file.get_tensor(f"{part}.y")) for part in parts}
        for field in ("classes", "mean", "std"):
            table[field] = None if table[field] is None else tuple(table[field])
        found = Dataset(**{**table, **splits})
    except (OSError, SafetensorError, SecateurError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return found if found.digest == digest else None


def _write(data: Dataset, place: Path) -> None:
    # as numpy arrays, because parts may share memory, which safetensors refuses for tensors
    arrays = {f"{p}.{k}": v.contiguous().numpy() for p, s in data.splits() for k, v in (("x", s.x), ("y", s.y))}
    fields = ("name", "classes", "kind", "mean", "std", "note")
    table = {field: getattr(data, field) for field in fields}
    table |= {"parts": [part for part, _ in data.splits()], "digest": data.digest}
    with contextlib.suppress(OSError, SafetensorError):
        place.parent.mkdir(parents=True, exist_ok=True)
        # a file of its own for each writer, so that two at once cannot mix
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".new-") as folder:
            fresh = Path(folder) / place.name
            save_file(arrays, fresh, metadata={"secateur": json.dumps(table)})
            os.replace(fresh, place)
