"""Leases: who is at work on what, said by files in a folder that all see, so that nothing is done twice.

A lease is a file with a number, made by ``O_EXCL``, which one process alone can win. The highest number counts. Its
owner touches it while at work; one that was not touched for the time of the lease may be followed by the next number,
which again only one process can make. Numbers are never used again, also not when a thing is done and its leases are
forgotten: a slow process cannot break a lease that it has not looked at, nor take another's for its own.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from secateur.core.errors import FileError, UsageError

BEATS = 4
"""So often in the time of a lease its owner says that it is alive."""

_CLOCK = ".clock"


class LeaseLost(Exception):  # noqa: N818 - no error: another process has taken over, and this one stops
    """Another process has taken the work over, because this one did not show for the time of its lease."""


@dataclass(frozen=True)
class Owner:
    """A process, told apart from all others.

    Args:
        token: drawn at random.
        host: the machine's name, for people.
        machine: the machine as this process sees it; a process number means something only where this is the same.
        pid: process number.
        started: when the process began, in ticks of its machine; empty where that cannot be known.
    """

    token: str
    host: str
    machine: str
    pid: int
    started: str

    @classmethod
    def this(cls) -> Owner:
        """This process; every call draws another token."""
        pid = os.getpid()
        started = ""
        with contextlib.suppress(OSError):
            started = _started(pid)
        return cls(secrets.token_hex(8), socket.gethostname(), _machine(), pid, started)

    def dead(self) -> bool:
        """Whether it is known to have ended: only ever of a process of this machine."""
        if self.machine != _machine():
            return False
        try:
            started = _started(self.pid)
        except OSError:  # it has ended; or processes of others are hidden here, or the system does not tell
            return not _there(self.pid)
        return started != self.started if self.started else not started


@dataclass(frozen=True)
class Seen:
    """A lease as its file tells.

    Args:
        owner: who holds it; None when the file is empty, damaged or not of this library.
        seconds: for how long it is good after each sign of life.
        since: when it was taken, by the clock of the file system.
        deaths: so many owners in a row have vanished before this one, none of which got any further.
        touched: its last sign of life, by the same clock; 0 when it was given back.
    """

    owner: Owner | None
    seconds: float
    since: float
    deaths: int
    touched: float

    def alive(self, now: float) -> bool:
        """Whether nobody may take the work over."""
        # A time far ahead comes from a clock that was set back, or from a stranger: it must not block for ever.
        fresh = self.touched > 0 and abs(now - self.touched) <= self.seconds
        return fresh and not (self.owner is not None and self.owner.dead())


@dataclass
class Lease:
    """The right to work on one thing, as long as it is held; keeps itself alive inside ``with``.

    Args:
        leases: where it lies.
        name: what it is for.
        number: of its file.
        deaths: so many owners in a row have vanished before, none of which got any further.
    """

    leases: Leases
    name: str
    number: int
    deaths: int
    _lost: threading.Event = field(default_factory=threading.Event, init=False)
    _done: threading.Event = field(default_factory=threading.Event, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    @property
    def path(self) -> Path:
        """Its file."""
        return self.leases.path(self.name, self.number)

    @property
    def lost(self) -> bool:
        """Whether it was found to be another's; looks at nothing."""
        return self._lost.is_set()

    def check(self) -> None:
        """Look whether it still holds.

        Raises:
            LeaseLost: when it does not.
            FileError: when the folder is out of reach.
        """
        try:
            if self._lost.is_set() or not self._touch():
                self._lost.set()
                raise LeaseLost(self.name)
        except OSError as error:
            raise _unwritable(self.leases.folder, error) from error

    def give_back(self) -> None:
        """Let others have it at once; nothing when it is another's already."""
        with contextlib.suppress(OSError):  # then it runs out by itself
            os.utime(self.path, (0, 0))

    def __enter__(self) -> Lease:
        self._thread = threading.Thread(target=self._live, name=f"lease {self.name}", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def _live(self) -> None:
        while not self._done.wait(self.leases.seconds / BEATS):
            try:
                if not self._touch():
                    self._lost.set()
                    return
            except OSError:  # the disk may come back before the lease is over; the next check tells
                continue

    def _touch(self) -> bool:
        """A sign of life; False when the lease is another's. Its own file is gone then, or a higher one is there."""
        try:
            os.utime(self.path)  # reaches the file's server, where a listing may be some seconds old
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return False
            raise
        return self.leases.highest(self.name) == self.number


@dataclass
class Leases:
    """The leases of one folder, as one process takes and sees them.

    Args:
        folder: where they lie; made if absent.
        seconds: for how long a lease taken here is good after each sign of life.
        owner: who takes them.
    """

    folder: Path
    seconds: int | float = 60
    owner: Owner = field(default_factory=Owner.this)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise UsageError(f"the lease is {self.seconds:g} seconds; it must be more than 0, for example 60.")

    def take(self, name: str, saved: Callable[[], float] = lambda: 0.0) -> Lease | None:
        """Take the lease of ``name``; None when somebody has it, or was quicker.

        Args:
            name: what it is for.
            saved: when work on it was last saved, by the clock of the file system. An owner that vanished after it
                had saved something got further, and is not counted among the dead.

        Raises:
            FileError: when nothing can be written in the folder.
        """
        try:
            top = self.highest(name)
            seen = self._read(name, top) if top else None
            now = self.now()
            if top and (seen is None or seen.alive(now)):
                return None
            died = seen is not None and seen.touched > 0 and saved() <= seen.since
            deaths = seen.deaths + 1 if seen is not None and died else 0
            if not self._make(name, top + 1, now, deaths):
                return None
            lease = Lease(self, name, top + 1, deaths)
            if self.highest(name) != lease.number:  # what was looked at is long past
                lease.path.unlink(missing_ok=True)
                return None
            self._remove(name, lease.number - 1)
            return lease
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def seen(self, name: str) -> Seen | None:
        """The lease of ``name`` when somebody is at work on it, else None."""
        top = self.highest(name)
        found = self._read(name, top) if top else None
        return found if found is not None and found.alive(self.now()) else None

    def forget(self, name: str) -> None:
        """It is done, and nobody needs a lease of it any more: whoever still works on it finds its own lost.

        One file stays, given back, from which numbers go on. Nothing is raised: leases run out by themselves.
        """
        with contextlib.suppress(OSError):
            top = self.highest(name)
            os.utime(self.path(name, top), (0, 0))
            os.rename(self.path(name, top), self.path(name, top + 1))  # needs no space, as a new file does
            self._remove(name, top)

    def now(self) -> float:
        """The time by the clock of the file system: those of two machines differ, this one they share.

        Raises:
            FileError: when nothing can be written in the folder.
        """
        clock = self.folder / _CLOCK
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            clock.touch()
            return clock.stat().st_mtime
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def path(self, name: str, number: int) -> Path:
        """The file of one lease."""
        return self.folder / f"{name}.{number:06d}"

    def highest(self, name: str) -> int:
        """The highest number of a lease of ``name``, 0 when there is none."""
        return max(self._numbers(name), default=0)

    def _numbers(self, name: str) -> Iterator[int]:
        form = re.compile(re.escape(name) + r"\.(\d{6,9})")
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                if found := form.fullmatch(entry.name):
                    yield int(found[1])

    def _make(self, name: str, number: int, now: float, deaths: int) -> bool:
        path = self.path(name, number)
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        about = {**asdict(self.owner), "seconds": self.seconds, "since": now, "deaths": deaths}
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump(about, file)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return True

    def _read(self, name: str, number: int) -> Seen | None:
        """What a file tells; None when it is gone."""
        path = self.path(name, number)
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                touched = os.fstat(file.fileno()).st_mtime  # only opening it makes a network's client ask for the time
                table = _table(file.read(1 << 16))
        except FileNotFoundError:
            return None
        owner = _owner(table)
        numbers = [table.get(key) for key in ("seconds", "since", "deaths")]
        seconds, since, deaths = (
            n if isinstance(n, int | float) and math.isfinite(n) and n >= 0 else 0 for n in numbers
        )
        return Seen(owner, float(seconds or self.seconds), float(since), int(deaths), touched)

    def _remove(self, name: str, up_to: int) -> None:
        for number in sorted(self._numbers(name)):
            if number <= up_to:
                self.path(name, number).unlink(missing_ok=True)


def _table(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _owner(table: dict[str, Any]) -> Owner | None:
    words = [table.get(key) for key in ("token", "host", "machine", "started")]
    pid = table.get("pid")
    if not all(isinstance(word, str) for word in words) or not isinstance(pid, int) or isinstance(pid, bool) or pid < 1:
        return None
    token, host, machine, started = map(str, words)
    return Owner(token, host, machine, pid, started)


def _machine() -> str:
    """Host, boot and space of process numbers: two containers may share a name and not their processes."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return "/".join(parts)


def _started(pid: int) -> str:
    """When a process of this machine began, in clock ticks since boot; empty when it has ended but for its number.

    Raises:
        OSError: when it cannot be known: there is none, it is hidden, or the system has no such files.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


def _there(pid: int) -> bool:
    """Whether a process of this number exists, seen or hidden."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _unwritable(folder: Path, error: OSError) -> FileError:
    return FileError(f"cannot work in {folder}: {error.strerror or error}. Choose another folder with `--queue`.")
