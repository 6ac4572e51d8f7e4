"""What runs are doing, read from their folders again and again; reads only, and only in the given folders."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.core.errors import FileError
from secateur.report.points import folders
from secateur.report.recipes import read_toml
from secateur.report.source import as_table, as_whole, cleaned, is_step_name
from secateur.report.tracing import LIMIT, Follower, finite
from secateur.report.views.curves import thin

SHOWN = 500
"""Runs listed at most, those written last first."""

LARGEST = 4 << 20
TAIL = 16 << 10
RECENT = 20.0
"""Seconds since the last write for which a run counts as running when no lock tells."""

# What files say, with the time of change, the size and the inode by which it is known to be still true.
Cache = dict[Path, tuple[tuple[int, int, int], Any]]

_STATES = ("running", "unfinished", "finished", "damaged")


@dataclass(frozen=True)
class Step:
    """A step as a live page needs it."""

    number: int
    do: str
    folder: Path
    done: bool
    epochs: int | None


@dataclass
class Watched:
    """Follows the runs in some folders.

    Args:
        roots: run folders, or folders that hold some.

    Raises:
        FileError: when one is no folder.
    """

    roots: Sequence[Path]
    _followers: dict[Path, Follower] = field(default_factory=dict)
    _tables: Cache = field(default_factory=dict)
    _tails: Cache = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        for root in self.roots:
            if Path(root).is_file():
                raise FileError(f"{root} is a file. Pass run folders, or a folder that holds some: `runs`.")
            if not Path(root).is_dir():
                raise FileError(f"there is no folder {root}. Pass run folders, or a folder that holds some: `runs`.")
            if not (Path(root) / "run.json").is_file() and (Path(root).resolve().parent / "run.json").is_file():
                raise FileError(f"{root} is a step of a run. Pass the run's folder, {Path(root).resolve().parent}.")
        self.roots = [Path(root).resolve() for root in self.roots]

    def listing(self) -> dict[str, Any]:
        """All runs: name, title, state, steps and last figures; those that run come first."""
        with self._lock:
            held = _held()
            rows = [row for folder in self._folders() if (row := self._row(folder, held)) is not None]
        rows.sort(key=lambda row: (_STATES.index(row["state"]), row["quiet"]))
        return {"runs": rows[:SHOWN], "left_out": max(0, len(rows) - SHOWN)}

    def curves(self, name: str) -> dict[str, Any] | None:
        """Curves of one run by training step; None when there is no such run any more."""
        with self._lock:
            folder = next((folder for folder in self._folders() if _id(folder) == name), None)
            row = None if folder is None else self._row(folder, _held())
            if folder is None or row is None:
                return None
            steps = [step for step in self._steps(folder) if step.do in ("train", "prune", "shrink", "rewind")]
            trains = sum(step.do == "train" for step in steps)
            made = [self._stretch(step, max(40, LIMIT // max(1, trains))) for step in steps]
        return {**row, "stretches": made}

    def _stretch(self, step: Step, limit: int) -> dict[str, Any]:
        about: dict[str, Any] = {"number": step.number, "do": step.do, "done": step.done}
        if step.do != "train":
            return about
        follower = self._follow(step)
        series = {cleaned(key): thin(list(curve.all()), limit)[0] for key, curve in follower.curves.items()}
        return about | {
            "length": follower.length, "odd": follower.odd, "behind": follower.behind, "series": series,
        }  # fmt: skip

    def _follow(self, step: Step) -> Follower:
        path = step.folder / "metrics.jsonl"
        follower = self._followers.setdefault(path, Follower(path))
        if self._inside(path):
            follower.read()
        return follower

    def _folders(self) -> list[Path]:
        found: dict[Path, None] = {}
        for root in self.roots:
            try:
                found |= dict.fromkeys(folder.resolve() for folder in folders(root))
            except OSError:  # a folder that was deleted while it was read
                continue
        for path in [path for path in self._followers if path.parent.parent not in found]:
            del self._followers[path]
        return list(found)

    def _row(self, folder: Path, held: set[int]) -> dict[str, Any] | None:
        """What the list tells of a run; None when it was deleted meanwhile."""
        try:
            written = (folder / "run.json").stat().st_mtime
        except OSError:
            return None
        table, steps = self._table(folder / "run.json"), self._steps(folder)
        now = next((step for step in steps if not step.done), None)
        if now is not None:
            written = max([written, *_times(now.folder)])
        quiet = max(0.0, time.time() - written)
        if not table:
            state = "damaged"
        elif steps and now is None:
            state = "finished"
        else:
            state = "running" if _is_held(folder, held) or quiet < RECENT else "unfinished"
        title = table.get("title")
        return {
            "id": _id(folder), "name": cleaned(self._name(folder)),
            "title": cleaned(title) if isinstance(title, str) else "",
            "state": state, "quiet": round(quiet, 1), "steps": [[s.number, s.do, s.done] for s in steps],
            "now": None if now is None else [now.number, now.do, now.epochs], "last": self._last(steps),
        }  # fmt: skip

    def _name(self, folder: Path) -> str:
        """The folder below the root it was found in, with the root's own name before it."""
        root = next((root for root in self.roots if folder.is_relative_to(root)), folder)
        return str(Path(root.name, *folder.relative_to(root).parts)) if root != folder else folder.name

    def _last(self, steps: Sequence[Step]) -> dict[str, float]:
        """The last figures of the last training step that has any."""
        for step in reversed([step for step in steps if step.do == "train"]):
            found = self._kept(self._tails, step.folder / "metrics.jsonl", _last_figures)
            if found:
                return found
        return {}

    def _steps(self, folder: Path) -> list[Step]:
        listed = self._table(folder / "run.json").get("steps")
        asked = self._table(folder / "recipe.toml").get("step")
        epochs = [as_whole(as_table(step).get("epochs")) for step in asked] if isinstance(asked, list) else []
        steps = []
        for row in map(as_table, listed if isinstance(listed, list) else []):
            number, name, do = as_whole(row.get("number")), row.get("folder"), row.get("do")
            if number is None or not is_step_name(name) or not isinstance(do, str):
                continue
            total = epochs[number - 1] if 0 < number <= len(epochs) else None
            place = folder / name
            steps.append(Step(number, cleaned(do[:40]), place, (place / "card.json").is_file(), total))
        return steps

    def _table(self, path: Path) -> dict[str, Any]:
        """A small JSON or TOML file; empty when it is missing, damaged, large or outside."""
        return self._kept(self._tables, path, _read_table) or {}

    def _kept(self, cache: Cache, path: Path, read: Callable[[Path], Any]) -> Any:
        """What a file says, read again when it has changed; None when it is missing or outside."""
        try:
            about = path.stat()
            key = (about.st_mtime_ns, about.st_size, about.st_ino)
            if path in cache and cache[path][0] == key:
                return cache[path][1]
            if not self._inside(path):
                return None
            found = read(path)
        except OSError:
            cache.pop(path, None)
            return None
        cache[path] = (key, found)
        return found

    def _inside(self, path: Path) -> bool:
        """Whether a path is a plain file in one of the folders, links followed."""
        try:
            real = path.resolve()
            return real.is_file() and any(real.is_relative_to(root) for root in self.roots)
        except (OSError, RuntimeError):  # a link that leads to itself
            return False


def _read_table(path: Path) -> dict[str, Any]:
    if path.stat().st_size > LARGEST:
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    return read_toml(text) if path.suffix == ".toml" else as_table(_parsed(text))


def _last_figures(path: Path) -> dict[str, float]:
    """The last figures of each kind in the last whole lines of a metrics file."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - TAIL))
        lines = file.read(TAIL).split(b"\n")[:-1]
    rows = [row for line in lines[-40:] if isinstance(row := _parsed(line.decode(errors="replace")), dict)]
    found = {k: finite(row.get(k)) for row in rows for k in ("epoch", "step", *_figures(row)) if k in row}
    return {cleaned(key): value for key, value in list(found.items())[:12] if value is not None}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _figures(row: dict[str, Any]) -> Iterable[str]:
    return (key for key in row if isinstance(key, str) and key.endswith(("loss", "accuracy", "sparsity")))


def _id(folder: Path) -> str:
    return hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]


def _times(folder: Path) -> list[float]:
    found = []
    for name in ("metrics.jsonl", "state.pt", ""):
        try:
            found.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return found


def _held() -> set[int]:
    """Inodes of all files that a process holds a lock on, where the system tells; taking locks would disturb runs."""
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return set()
    return {int(words[5].rpartition(":")[2]) for line in lines if len(words := line.split()) > 5 and "->" not in words}


def _is_held(folder: Path, held: set[int]) -> bool:
    try:
        return bool(held) and (folder / ".lock").stat().st_ino in held
    except OSError:
        return False
