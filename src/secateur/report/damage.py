"""Reads what `measure --damage` wrote: a table of figures and a set of samples. Needs no torch; doubts become notes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from secateur.report.numbers import shorten
from secateur.report.png import shrink
from secateur.report.source import RunRecord, StepRecord, as_table, as_whole

FORMAT, SAMPLES = "secateur.damage/1", "samples.safetensors"
METRICS = {"angle": "radians", "length": "", "margin": ""}
VIEWS = ("pca", "pca_own", "tsne")
_NUMBERS = ("index", "position", "targets", "predictions", "kind", "context")
LONGEST = 512
"""Tokens of a text that are read at most."""
COPIES = "copies."
"""How the columns of corrupted copies begin."""
NAME = 60
"""Characters of a name that a sentence has room for."""
MOST = 1 << 20
"""Samples and networks beyond which a file is not read."""


@dataclass(frozen=True, eq=False)
class Samples:
    """The sample set, corrupted copies behind the clean samples.

    Args:
        path: the file.
        count: number of samples and copies n.
        clean: number of samples that are no copies; they come first.
        arrays: whole numbers as int64, the others as float32, by name: ``index``, ``targets`` ``(n,)``;
            ``context`` ``(n, k)``; ``predictions``, ``confidence`` and metrics ``(v, n)``; places ``(v, n, 2)``.
        size: height, width and channels of the pictures; None where there are none.
        kinds: what ``kind`` ``(n,)`` stands for, ``clean`` first; empty without copies.
    """

    path: Path
    count: int
    clean: int
    arrays: Mapping[str, NDArray[Any]]
    size: tuple[int, ...] | None
    kinds: tuple[str, ...] = ()

    def pictures(self, rows: NDArray[np.int64], side: int) -> NDArray[np.uint8]:
        """Pictures of some samples ``(k, H, W, C)``, made smaller until no side is longer than ``side``."""
        with safe_open(self.path, framework="numpy") as file:
            stored = [file.get_slice(name) for name in ("images", "copies.images")[: 1 + (self.clean < self.count)]]
            split = [(0, row) if row < self.clean else (1, row - self.clean) for row in map(int, rows)]
            return np.concatenate([shrink(stored[part][row : row + 1], side) for part, row in split])


@dataclass(frozen=True, eq=False)
class DamageRecord:
    """What one measure step tells of damage.

    Args:
        step: the step.
        table: ``damage.json``.
        networks: names of the networks, the dense one first.
        classes: names of the classes.
        samples: the sample set, where it could be read.
        notes: what could not be read, and what was not measured.
    """

    step: StepRecord
    table: Mapping[str, Any]
    networks: tuple[str, ...]
    classes: tuple[str, ...]
    samples: Samples | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def tokens(self) -> bool:
        """Whether decisions are tokens of sequences."""
        return as_table(self.table.get("data")).get("tokens") is True

    def title(self, text: str, name: str) -> str:
        """The title of a section; it names the pruned network where there are several."""
        return text if len(self.networks) == 2 else f"{text}: {shorten(name, NAME)}"

    def class_name(self, number: int) -> str:
        """The name of a class, or its number."""
        return self.classes[number] if 0 <= number < len(self.classes) else str(number)


def read(run: RunRecord) -> DamageRecord | str:
    """The damage of a run: of the last step that measured it; or why there is none, empty when it was not asked for."""
    found = [step for step in run.of("measure") if step.damage]
    if not found:
        return ""  # measured only when asked for
    step = found[-1]
    place, table = f"{step.folder.name}/damage.json", step.damage
    if table.get("format") != FORMAT:
        return f"No damage: {place} is not of format {FORMAT!r}. Measure again with `--damage`."
    networks = _names(table.get("variants"))
    if len(networks) < 2 or len(set(networks)) < len(networks):
        return f"No damage: {place} does not name the networks that it compares. Measure again with `--damage`."
    notes = [*_digest(step, "damage.json"), *_skipped(table)]
    samples = _samples(step, len(networks), as_table(table.get("samples")), notes)
    return DamageRecord(step, table, networks, _names(table.get("classes")), samples, tuple(notes))


def _names(entry: Any) -> tuple[str, ...]:
    return tuple(map(str, entry)) if isinstance(entry, list) and all(isinstance(name, str) for name in entry) else ()


def _digest(step: StepRecord, name: str) -> list[str]:
    wanted = as_table(step.card.get("files")).get(name)
    if wanted is None or wanted == _sum(step.folder / name):
        return []
    return [
        f"{step.folder.name}/{name} was changed after it was measured (its digest differs from the card's). "
        "Delete the folder and run the same command again to measure anew."
    ]


def _sum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _skipped(table: Mapping[str, Any]) -> list[str]:
    rows = table.get("skipped")
    told = [as_table(row) for row in rows] if isinstance(rows, list) else []
    return [f"Not measured: {row.get('what')}: {row.get('why')}" for row in told if row]


def _samples(step: StepRecord, networks: int, about: Mapping[str, Any], notes: list[str]) -> Samples | None:
    path = step.folder / SAMPLES
    place = f"{step.folder.name}/{SAMPLES}"
    try:
        if about.get("digest") != _sum(path):
            notes.append(f"{place} is not the file that damage.json was written with, and is left out.")
            return None
        made = _read(path, networks, about)
    except FileNotFoundError:
        notes.append(f"{place} is missing, so single examples and features cannot be shown.")
        return None
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        notes.append(f"{place} could not be read ({type(error).__name__}) and is left out.")
        return None
    if made is None:
        notes.append(f"{place} holds no labels and answers of {networks} networks, and is left out.")
    return made


def _read(path: Path, networks: int, about: Mapping[str, Any]) -> Samples | None:
    """The arrays that have the shapes they should; None without labels and answers."""
    with safe_open(path, framework="numpy") as file:
        arrays, size = _columns(file, networks, "")
        if arrays is None:
            return None
        n = len(arrays["targets"])
        copies, size_again = _columns(file, networks, COPIES)
        kinds = ("clean", *_kinds(about))
        if copies is None or size != size_again or not _in_order(copies.get("kind"), len(kinds) - 1):
            return Samples(path, n, n, arrays, size)
        m = len(copies["targets"])
        copies["kind"], arrays["kind"] = copies["kind"] + 1, np.zeros(n, np.int64)
        joined = {name: _joined(array, copies.get(name), m) for name, array in arrays.items()}
        return Samples(path, n + m, n, joined, size, kinds)


def _columns(file: Any, networks: int, prefix: str) -> tuple[dict[str, NDArray[Any]] | None, tuple[int, ...] | None]:
    """The arrays whose names begin so, and the size of the pictures."""
    shapes = {
        name.removeprefix(prefix): tuple(file.get_slice(name).get_shape())
        for name in file.keys()  # noqa: SIM118
        if name.startswith(prefix)
    }
    n = shapes.get("targets", (0,))[0] if len(shapes.get("targets", ())) == 1 else 0
    wanted = {name: (n,) for name in ("index", "position", "targets", "kind")}
    wanted |= {name: (networks, n) for name in ("predictions", "confidence", *METRICS)}
    wanted |= {name: (networks, n, 2) for name in VIEWS}
    context = shapes.get("context", ())
    if len(context) == 2 and context[0] == n and 0 < context[1] <= LONGEST:
        wanted["context"] = context
    good = [name for name, shape in wanted.items() if shapes.get(name) == shape]
    if not 0 < n <= MOST or not {"index", "targets", "predictions"} <= set(good):
        return None, None
    arrays = {
        name: file.get_tensor(prefix + name).astype(np.int64 if name in _NUMBERS else np.float32, copy=False)
        for name in good
    }
    size = shapes.get("images", ())
    pictured = len(size) == 4 and size[0] == n and size[3] in (1, 3) and min(size) > 0
    if not pictured or file.get_slice(f"{prefix}images").get_dtype() != "U8":
        return arrays, None
    return arrays, (size[1], size[2], size[3])


def _kinds(about: Mapping[str, Any]) -> list[str]:
    """What the copies show, with its severity."""
    severity = as_whole(about.get("severity"))
    end = f", severity {severity}" if severity is not None else ""
    return [f"{shorten(name, NAME)}{end}" for name in _names(about.get("kinds"))]


def _in_order(kind: NDArray[np.int64] | None, kinds: int) -> bool:
    return kind is not None and bool((np.diff(kind) >= 0).all()) and 0 <= int(kind[0]) and int(kind[-1]) < kinds


def _joined(array: NDArray[Any], more: NDArray[Any] | None, count: int) -> NDArray[Any]:
    """An array with the rows of the copies behind it, NaN (of whole numbers 0) where they have none."""
    axis = 0 if array.ndim == 1 else 1
    if more is None:
        shape = (*array.shape[:axis], count, *array.shape[axis + 1 :])
        more = np.full(shape, np.nan if array.dtype.kind == "f" else 0, array.dtype)
    return np.concatenate([array, more], axis)


def whole(entry: Any) -> int:
    """The entry as a count, 0 when it is none."""
    found = as_whole(entry)
    return found if found is not None and found >= 0 else 0
