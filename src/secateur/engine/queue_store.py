"""The folder of a queue: finished stages by what was asked, work in private folders, failures, and a log.

``store/STAGE`` holds finished steps as a runner writes them, ``work/STAGE.NUMBER.TOKEN`` the private folder of whoever
is at work, with the number of its lease, ``leases`` who that is, ``failed/STAGE.json`` what stopped a stage,
``log/TOKEN.jsonl`` what each process did, and ``runs/NAME`` a run folder for each recipe whose steps are links into the
store.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.core.errors import FileError, UsageError
from secateur.core.files import read_json, sync_folder, write_json
from secateur.engine.checkpoint import STATE
from secateur.engine.folder import CARD
from secateur.engine.queue_files import number_of, put, reaching, sound, tolerant, written
from secateur.engine.queue_leases import Lease, LeaseLost, Owner

QUEUE, STAGE = "queue.json", "stage.json"
FORMAT = "secateur.queue/1"
_BEGUN = "begun.json"
_GONE = ".gone."


@dataclass(frozen=True)
class Stage:
    """One step of one or more recipes, by what was asked.

    Args:
        number: its place in the recipe, from 1.
        do: what it does.
        key: hash of all that was asked up to it, of the data and of the weights it began from.
        needs: the stage whose result it begins with; empty for none.
    """

    number: int
    do: str
    key: str
    needs: str

    @property
    def name(self) -> str:
        """The name of its folder, in the store and in run folders."""
        return f"{self.number}-{self.do}-{self.key}"


@dataclass(frozen=True)
class Store:
    """A queue's folder; see this module.

    Args:
        folder: where it is.
    """

    folder: Path

    @classmethod
    def open(cls, folder: Path, make: bool = True) -> Store:
        """The queue in a folder; begins one in an empty or new folder.

        Args:
            folder: where.
            make: begin one; else a folder that is there must be a queue's, or empty.

        Raises:
            UsageError: when the folder holds something else.
            FileError: when it is a file, is missing (without ``make``), or cannot be written.
        """
        if folder.exists() and not folder.is_dir():
            raise FileError(f"{folder} is a file; name a folder with `--queue`.")
        if not make and not folder.is_dir():
            raise FileError(f"there is no queue {folder}; begin one with `secateur run RECIPE --queue {folder}`.")
        if (folder / QUEUE).is_file():
            table = read_json(folder / QUEUE)
            if not isinstance(table, dict) or table.get("format") != FORMAT:
                raise FileError(f"{folder / QUEUE} is not of a queue that this version knows ({FORMAT}).")
        elif folder.is_dir() and (other := [p.name for p in folder.iterdir() if not p.name.startswith(".")]):
            raise UsageError(
                f"{folder} is not the folder of a queue: it holds {', '.join(sorted(other)[:4])} and no {QUEUE}. "
                "Name an empty or a new folder with `--queue`."
            )
        elif make:  # the first thing written, so that another process that begins at the same time knows the folder
            write_json(folder / QUEUE, {"format": FORMAT})
        return cls(folder)

    @property
    def results(self) -> Path:
        """Where finished stages lie."""
        return self.folder / "store"

    @property
    def leases(self) -> Path:
        """Where leases lie."""
        return self.folder / "leases"

    def run(self, recipe: str) -> Path:
        """The run folder of a recipe."""
        return self.folder / "runs" / recipe

    def done(self, name: str) -> bool:
        """Whether a stage is finished."""
        return (self.results / name / CARD).is_file()

    def about(self, name: str) -> dict[str, Any]:
        """What a finished stage tells of who did it; empty where nothing does."""
        return tolerant(self.results / name / STAGE)

    def failure(self, name: str) -> dict[str, Any] | None:
        """What stopped a stage, or None."""
        path = self.folder / "failed" / f"{name}.json"
        if not path.is_file():
            return None
        return {"text": f"{path} is damaged; `--retry` takes it away.", "kind": "refused", **tolerant(path)}

    def fail(self, name: str, text: str, kind: str, owner: Owner) -> None:
        """Record what stopped a stage: ``"refused"`` for what the user can mend, ``"bug"`` for anything else."""
        told = {"stage": name, "kind": kind, "text": text, "host": owner.host, "pid": owner.pid}
        write_json(self.folder / "failed" / f"{name}.json", told)

    def clear(self, names: Iterable[str]) -> list[str]:
        """Forget failures, so that the stages are tried again; gives those that had failed."""
        there = [name for name in names if (self.folder / "failed" / f"{name}.json").is_file()]
        for name in there:
            (self.folder / "failed" / f"{name}.json").unlink(missing_ok=True)
        return there

    def private(self, name: str, lease: Lease) -> Path:
        """The private folder for a stage: what an owner before left, when a checkpoint is in it, else an empty one.

        What was left is taken by its name, so that a process that is only slow finds its folder gone, and cannot write
        where another goes on. Folders of later leases are left alone: there are some when this process was asleep.

        Raises:
            LeaseLost: when another process has taken this folder already.
            FileError: when nothing can be written.
        """
        mine = self.folder / "work" / f"{name}.{lease.number:06d}.{lease.leases.owner.token}"
        for left in self._left(name):
            if number_of(left, name) >= lease.number:
                continue
            if not (left / _BEGUN).is_file() or not (left / name / STATE).is_file() or mine.exists():
                self.discard(left)
                continue
            with contextlib.suppress(OSError):  # its owner may be throwing it away just now
                os.rename(left, mine)
                if sound(mine / name):
                    continue
            self.discard(mine)
        if not mine.exists():
            with reaching(mine):
                mine.mkdir(parents=True)
            put(mine / _BEGUN, {"stage": name}, name)
        return mine

    def saved(self, name: str) -> float:
        """When work on a stage was last saved, by the clock of the file system; 0 when nothing is there."""
        return max((written(left / name) for left in self._left(name)), default=0.0)

    def discard(self, private: Path) -> None:
        """Throw a private folder away; its name goes first, so that nobody takes over what is half gone."""
        gone = private.with_name(f"{_GONE}{private.name}.{time.time_ns()}")
        with reaching(private), contextlib.suppress(FileNotFoundError):
            os.rename(private, gone)
            shutil.rmtree(gone, ignore_errors=True)

    def publish(self, name: str, private: Path, lease: Lease, seconds: float) -> bool:
        """Give a finished stage its name in the store, in one step; False when it was there, and ours is dropped.

        However long this process sleeps between any two lines, what gets the name is whole: a process that came later
        takes the private folder by its name, and nothing here makes it anew.

        Raises:
            LeaseLost: when another process has taken the private folder.
            FileError: when it cannot be written.
        """
        owner, made, target = lease.leases.owner, private / name, self.results / name
        attempt = f"{owner.token}.{lease.number}"
        told = {"format": "secateur.stage/1", "stage": name, "attempt": attempt, "host": owner.host, "pid": owner.pid}
        if not (made / CARD).is_file():
            raise LeaseLost(name)
        put(made / STAGE, {**told, "seconds": round(seconds, 3)}, name)
        self.log(owner, "publishing", name, attempt=attempt)
        with reaching(target):
            target.parent.mkdir(exist_ok=True)
            first = self._rename(made, target, attempt)
            sync_folder(target.parent)
        if not self.done(name):  # what others have must not be thrown away for it
            raise LeaseLost(name)
        self.log(owner, "published" if first else "dropped", name, attempt=attempt)
        self.clear([name])
        for left in self._left(name):
            self.discard(left)
        return first

    def _rename(self, made: Path, target: Path, attempt: str) -> bool:
        for _ in range(3):
            try:
                os.rename(made, target)  # of two, the second finds a folder that is not empty, and fails
                return True
            except OSError as error:
                if self.done(target.name):  # ours, where a server did it and its answer was lost
                    return tolerant(target / STAGE).get("attempt") == attempt
                if not (made / CARD).is_file():
                    raise LeaseLost(target.name) from error
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                self._put_aside(target, attempt)
        raise FileError(f"{target} cannot be written: something keeps taking its place. Look who writes there.")

    def _put_aside(self, target: Path, attempt: str) -> None:
        """Move what is no result out of a result's place; nothing is deleted.

        By the time it is moved, the name may be that of another's result. So a folder is emptied by its handle, which
        no result ever gets; and a file goes onto a file, where no folder can go.
        """
        place = self.folder / "aside" / f"{target.name}.{attempt}.{time.time_ns()}"
        place.mkdir(parents=True)
        try:
            folder = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            (place / target.name).touch()
            with contextlib.suppress(OSError):
                os.rename(target, place / target.name)
            return
        try:
            there = os.listdir(folder)
            for name in () if CARD in there else there:
                with contextlib.suppress(FileNotFoundError):  # another one is at it too
                    os.rename(name, place / name, src_dir_fd=folder)
        finally:
            os.close(folder)

    def link(self, recipe: str, names: Iterable[str]) -> None:
        """Make finished stages steps of a recipe's run folder.

        Raises:
            FileError: when links cannot be made there.
        """
        run = self.run(recipe)
        try:
            run.mkdir(parents=True, exist_ok=True)
            for name in names:
                if self.done(name) and not os.path.lexists(run / name):
                    with contextlib.suppress(FileExistsError):
                        os.symlink(os.path.relpath(self.results / name, run), run / name)
        except OSError as error:
            raise FileError(
                f"cannot link in {run}: {error.strerror or error}. Put the queue on a file system with symbolic links."
            ) from error

    def log(self, owner: Owner, event: str, name: str, **more: Any) -> None:
        """Append a line to this process's own log; no two processes write in one file."""
        path = self.folder / "log" / f"{owner.token}.jsonl"
        line = json.dumps({"event": event, "stage": name, "host": owner.host, "pid": owner.pid, **more}) + "\n"
        with reaching(path):
            path.parent.mkdir(exist_ok=True)
            with open(path, "ab") as file:
                file.write(line.encode())

    def events(self) -> list[dict[str, Any]]:
        """All whole lines of all logs, each process's in order."""
        rows = []
        for path in sorted((self.folder / "log").glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    rows += [row] if isinstance(row, dict) else []
        return rows

    def sweep(self, names: Iterable[str]) -> None:
        """Throw away what processes that were killed left of stages that are finished."""
        for left in (self.folder / "work").glob(f"{_GONE}*"):
            shutil.rmtree(left, ignore_errors=True)
        for name in names:
            if self.done(name):
                for left in self._left(name):
                    self.discard(left)

    def _left(self, name: str) -> Iterator[Path]:
        """Private folders of a stage, the one that was written to last first."""
        there = [path for path in (self.folder / "work").glob(f"{name}.*") if path.is_dir() and not path.is_symlink()]
        yield from sorted(there, key=lambda private: written(private / name), reverse=True)


def publications(events: Iterable[Mapping[str, Any]], store: Store) -> dict[str, list[str]]:
    """Attempts that put each stage into the store, as logs and stages tell; there must be one of each.

    An attempt counts when its process said afterwards that it had published, or when the stage in the store bears its
    mark: a process may be killed between the two.
    """
    found: dict[str, set[str]] = {}
    for row in events:
        name, attempt = str(row.get("stage")), str(row.get("attempt"))
        there = row.get("event") == "publishing" and store.about(name).get("attempt") == attempt
        if row.get("event") == "published" or there:
            found.setdefault(name, set()).add(attempt)
    return {name: sorted(attempts) for name, attempts in found.items()}
