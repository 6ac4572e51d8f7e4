"""Checkpoints of an unfinished step: all that is needed to go on bit for bit."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from secateur.core.errors import FileError
from secateur.core.files import writing

STATE = "state.pt"


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the state of a run, whole or not at all."""
    with writing(folder / STATE) as temporary:
        torch.save(state, temporary)


def load_state(folder: Path) -> dict[str, Any] | None:
    """The state of an unfinished run, or None.

    Raises:
        FileError: when the file is damaged.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, KeyError, ValueError) as error:
        raise FileError(f"{path} is damaged ({error}). Delete the folder {folder} to begin this step again.") from error


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
            with open(path, "ab") as file:
                file.truncate(keep)

    def write(self, **figures: Any) -> None:
        """Append one line."""
        if self.path is None:
            return
        line = (json.dumps({k: _plain(v) for k, v in figures.items()}) + "\n").encode()
        try:
            with open(self.path, "ab") as file:
                file.write(line)
        except OSError as error:
            raise FileError(f"cannot write {self.path}: {error.strerror or error}. Free some space and run again to go on.") from error
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
