"""Checkpoints of an unfinished step: all that is needed to go on bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from secateur.core.errors import FileError
from secateur.core.files import writing
from secateur.engine.binding import table_of
from secateur.engine.recipe import TrainStep

STATE = "state.pt"
_NOT = object()


@runtime_checkable
class Feed(Protocol):
    """Training batches, such as :class:`secateur.data.Loader`."""

    def __len__(self) -> int: ...

    def epoch(self, number: int, start: int = 0) -> Iterator[Any]: ...  # noqa: D102


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the state of a run, whole or not at all, with a digest of all that is in it.

    Raises:
        FileError: when the folder cannot be written or the disk is full; an older state is as it was.
    """
    content = io.BytesIO()  # torch's own writer answers a full disk with errors that tell nobody so
    torch.save({**state, "digest": _digest(state)}, content)
    with writing(folder / STATE) as temporary:
        temporary.write_bytes(content.getbuffer())


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


def asked_of(step: TrainStep, loader: Feed, **more: Any) -> dict[str, str]:
    """All that the result of a training run depends on, as far as it can be told, as text for a state to keep.

    Args:
        step: the options; how often checkpoints are written is left out, since it changes nothing.
        loader: the data; what it says of its order counts.
        **more: further facts; of functions and objects the name counts, and None is left out.
    """

    def name(thing: Any) -> str:
        kind = thing if hasattr(thing, "__qualname__") else type(thing)
        return str(kind.__qualname__)

    facts = {key: value for key, value in table_of(step, True).items() if key != "save_every"}
    facts |= {key: value for key, value in more.items() if value is not None}
    for key in ("batch", "batch_size", "shuffle", "seed", "augment", "drop_last"):
        value = getattr(getattr(loader, "data", loader), key, None)
        if isinstance(value, bool | int | str):
            facts[f"data.{key}"] = value
    facts["batches"] = len(loader)
    return {key: json.dumps(value, sort_keys=True, default=name) for key, value in facts.items()}


def check_asked(folder: Path, saved: Mapping[str, str], asked: Mapping[str, str]) -> None:
    """What a run asks for must be what its checkpoint was made with.

    Args:
        folder: where the checkpoint lies.
        saved: the facts it holds.
        asked: the facts of the run that would go on from it.

    Raises:
        FileError: naming every fact that differs, with both values. An option that the checkpoint does not know is
            younger than it and no difference at its default.
    """
    usual = {key: json.dumps(value, sort_keys=True) for key, value in table_of(TrainStep(), True).items()}
    asked = {key: fact for key, fact in asked.items() if key in saved or usual.get(key) != fact}
    tables = [{name: json.loads(fact) for name, fact in facts.items()} for facts in (asked, saved)]
    found = list(_differences("", *tables))
    if found:
        both = "; ".join(f"`{name}` is {_short(here)}, there it is {_short(there)}" for name, here, there in found)
        raise FileError(
            f"the checkpoint in {folder} belongs to another network or other options: {both}. Go on with those it was "
            f"made with, name another folder, or delete {folder / STATE} to begin again."
        )


def _differences(name: str, here: Any, there: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two plain values differ, named as ``-s`` names it, and what either holds there."""
    if isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        here, there = ({str(place): value for place, value in enumerate(each, 1)} for each in (here, there))
    if isinstance(here, dict) and isinstance(there, dict):
        for key in {**here, **there}:
            yield from _differences(f"{name}.{key}".lstrip("."), here.get(key, _NOT), there.get(key, _NOT))
    elif here != there:
        yield name, here, there


def _short(value: Any) -> str:
    text = "not given" if value is _NOT else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


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
            with contextlib.suppress(OSError):  # a part of the line may have gone through
                os.truncate(self.path, self.size)
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
