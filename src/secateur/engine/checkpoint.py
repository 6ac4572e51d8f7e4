"""Checkpoints of an unfinished step: all that is needed to go on bit for bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.core.errors import FileError
from secateur.core.files import writing

STATE = "state.pt"


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the state of a run, whole or not at all, with a digest of all that is in it."""
    with writing(folder / STATE) as temporary:
        torch.save({**state, "digest": _digest(state)}, temporary)


def load_state(folder: Path) -> dict[str, Any] | None:
    """The state of an unfinished run, or None.

    Raises:
        FileError: when the file is damaged.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state.pop("digest", None) != _digest(state):
            raise ValueError("its digest does not fit")
        return state
    except PermissionError as error:
        raise FileError(
            f"cannot read {path}: {error.strerror}. Allow it, or choose another folder with `-o`."
        ) from error
    except Exception as error:  # unpickling damaged bytes can raise anything
        raise FileError(
            f"{path} is damaged ({str(error).splitlines()[0] if str(error) else type(error).__name__}). "
            f"Delete the folder {folder} to begin this step again."
        ) from error


def _digest(state: Any) -> str:
    """SHA-256 of nested dicts and lists of tensors and plain values; torch's format does not notice flipped bits."""
    sha = hashlib.sha256()

    def add(thing: Any) -> None:
        if isinstance(thing, Tensor):
            sha.update(f"{thing.dtype}{tuple(thing.shape)}".encode())
            sha.update(thing.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(thing, dict):
            for key, value in thing.items():
                sha.update(repr(key).encode())
                add(value)
        elif isinstance(thing, list | tuple):
            for value in thing:
                add(value)
        else:
            sha.update(repr(thing).encode())

    add(state)
    return sha.hexdigest()


class Metrics:
    """``metrics.jsonl``: one JSON object a line; a resumed run drops what came after its checkpoint.

    Args:
        path: the file.
        keep: bytes to keep of what is there (0 to begin anew); None writes nothing.
    """

    def __init__(self, path: Path | None, keep: int = 0) -> None:
        self.path = path
        self.size = keep
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(path, "a+b") as file:
                    file.seek(0)
                    # After a power cut the file may be shorter than the checkpoint says; cut it to whole lines then
                    there = file.read(keep)
                    self.size = there.rfind(b"\n") + 1
                    file.truncate(self.size)
            except OSError as error:
                raise FileError(
                    f"cannot write {path}: {error.strerror or error}. Choose another folder with `-o`."
                ) from error

    def write(self, **figures: Any) -> None:
        """Append one line."""
        if self.path is None:
            return
        line = (json.dumps({k: _plain(v) for k, v in figures.items()}) + "\n").encode()
        try:
            with open(self.path, "ab") as file:
                file.write(line)
        except OSError as error:
            raise FileError(
                f"cannot write {self.path}: {error.strerror or error}. Free some space and run again to go on."
            ) from error
        self.size += len(line)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; a half-written last line is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
