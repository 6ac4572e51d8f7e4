"""A run folder as a whole: the names of its steps, what it tells of itself, and one process at a time in it."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Sequence
from pathlib import Path

from secateur.core.errors import FileError
from secateur.core.files import write_bytes, write_json
from secateur.engine import distributed
from secateur.engine.folder import CARD
from secateur.engine.recipe import Recipe

RUN = "run.json"


def step_names(recipe: Recipe, keys: Sequence[str]) -> list[str]:
    """What the folders of a recipe's steps are called."""
    return [f"{n}-{step.do}-{key}" for n, (step, key) in enumerate(zip(recipe.steps, keys, strict=True), 1)]


def write_run(folder: Path, recipe: Recipe, keys: Sequence[str]) -> None:
    """Write what a run folder tells of itself: its recipe, and which steps are done. The first process alone does it.

    Raises:
        FileError: when it cannot be written.
    """
    if distributed.rank() != 0:
        return
    rows = []
    for number, (step, key, name) in enumerate(zip(recipe.steps, keys, step_names(recipe, keys), strict=True), 1):
        done = (folder / name / CARD).is_file()
        rows.append({"number": number, "do": step.do, "key": key, "folder": name, "done": done})
    title = f"{recipe.model.use or Path(recipe.model.load).name} on {recipe.data.use}"
    write_bytes(folder / "recipe.toml", recipe.to_toml().encode())
    write_json(folder / RUN, {"format": "secateur.run/1", "title": title, "seed": recipe.seed, "steps": rows})


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time in a run folder.

    Raises:
        FileError: when another one is at work there, or nothing can be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise FileError(
            f"cannot write in {folder}: {error.strerror or error}. Choose another folder with `-o`."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FileError(
                f"another process is at work in {folder}; wait for it, or choose another folder with `-o`."
            ) from error
        yield
