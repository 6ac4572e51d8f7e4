"""What this machine's layers cost: measured once, kept in a file, shared by all networks and processes."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from secateur import _native
from secateur.core.errors import FileError
from secateur.core.files import write_bytes
from secateur.runtime.paths import cpu_name

__all__ = ["FORMAT", "CostTable", "Machine", "Point", "core_version", "table_path"]

FORMAT = "secateur-costs 2"
BEFORE = "secateur-costs 1"  # its layers count; its checks do not, for they were timed together with the layers
KEPT = 100  # checks of one network, the newest
LARGEST_FILE = 64 << 20  # bytes; a table of ten thousand layers takes about 20 MB


@dataclass(frozen=True)
class Machine:
    """Under which name figures are kept: they hold for nothing else."""

    cpu: str
    isa: str
    threads: int
    core: str

    @classmethod
    def here(cls, isa: str, threads: int) -> Machine:
        """This processor with the core that is installed."""
        return cls(cpu_name(), isa, threads, core_version())

    def __str__(self) -> str:
        """One line, the key in the file."""
        return " | ".join((self.cpu, self.isa, f"{self.threads} threads", f"core {self.core}"))


@dataclass(frozen=True)
class Point:
    """One measured layer.

    Attributes:
        density: Share of its weights that were not zero, exactly.
        ms: Milliseconds, as measured.
        reference: Milliseconds of a small fixed job at the same time: the speed of the machine.
        features: Of the layer, for comparing shapes.
    """

    density: float
    ms: float
    reference: float
    features: tuple[float, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether the numbers are such as a measurement gives."""
        numbers = (self.density, self.ms, self.reference, *self.features)
        return all(map(math.isfinite, numbers)) and 0 <= self.density <= 1 and min(self.ms, self.reference) > 0


@dataclass
class CostTable:
    """The file of measured layers, and of forecasts that were held against the clock.

    Figures are raw: as measured, each with the speed of the machine at that moment.

    Attributes:
        path: The file.
        points: Machine to layer to pattern to rung to point.
        checks: Machine to network to pairs of milliseconds: forecast and measured, of plans that were opened anew.
        engines: Another engine, with its version, machine and threads, to network to milliseconds as it is.
        note: Why a file that exists was not used; empty when it was.
    """

    path: Path
    points: dict[str, dict[str, dict[str, dict[str, Point]]]] = field(default_factory=dict)
    checks: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)
    engines: dict[str, dict[str, float]] = field(default_factory=dict)
    note: str = ""
    _new: list[tuple[str, str, str, str, Point]] = field(default_factory=list)
    _new_checks: list[tuple[str, str, float, float]] = field(default_factory=list)
    _new_engines: list[tuple[str, str, float]] = field(default_factory=list)
    _outdated: set[tuple[str, str]] = field(default_factory=set)

    @classmethod
    def open(cls, cache: str | PathLike[str] | None = None) -> CostTable:
        """The table of a cache folder; one that is missing or damaged is empty, and the note says so.

        Args:
            cache: None takes ``$SECATEUR_CACHE`` or ``~/.cache/secateur``.
        """
        table = cls(table_path(cache))
        table._read()
        return table

    def lookup(self, machine: Machine, key: str, pattern: str) -> dict[str, Point]:
        """Rung to point of one layer; empty when it was not measured."""
        return self.points.get(str(machine), {}).get(key, {}).get(pattern, {})

    def add(self, machine: Machine, key: str, pattern: str, rung: str, point: Point) -> None:
        """Remember a point; `save` writes it."""
        if point.sound:
            self._put(str(machine), key, pattern, rung, point)
            self._new.append((str(machine), key, pattern, rung, point))

    def check(self, machine: Machine, network: str, forecast: float, measured: float) -> None:
        """Remember a forecast of a network's plan and what the clock said; `save` writes it."""
        if _pair(forecast, measured):
            self.checks.setdefault(str(machine), {}).setdefault(network, []).append((forecast, measured))
            self._new_checks.append((str(machine), network, forecast, measured))

    def outdate(self, machine: Machine, network: str) -> None:
        """Checks of a network no longer count, since its layers were measured anew; `save` writes that."""
        self.checks.get(str(machine), {}).pop(network, None)
        self._new_checks = [entry for entry in self._new_checks if entry[:2] != (str(machine), network)]
        self._outdated.add((str(machine), network))

    def engine(self, name: str, network: str, ms: float) -> None:
        """Remember what another engine takes for a network as it is; `save` writes it."""
        if _pair(ms, ms):
            self.engines.setdefault(name, {})[network] = ms
            self._new_engines.append((name, network, ms))

    def save(self) -> None:
        """Add what is new to the file, whole or not at all; what other processes added meanwhile stays.

        A file that is no table, or one of another version, is moved aside first.

        Raises:
            FileError: when the folder cannot be written; the file is as it was.
        """
        if not (self._new or self._new_checks or self._new_engines or self._outdated):
            return
        with _locked(self.path):
            fresh = CostTable.open(self.path.parent)
            for entry in self._new:
                fresh._put(*entry)
            for machine, network in self._outdated:
                fresh.checks.get(machine, {}).pop(network, None)
            for machine, network, forecast, measured in self._new_checks:
                kept = fresh.checks.setdefault(machine, {}).setdefault(network, [])
                kept.append((forecast, measured))
                del kept[:-KEPT]
            for name, network, ms in self._new_engines:
                fresh.engines.setdefault(name, {})[network] = ms
            if fresh.note:
                os.replace(self.path, _aside(self.path))
            fresh._write()
        self.points, self.checks, self.engines = fresh.points, fresh.checks, fresh.engines
        for done in (self._new, self._new_checks, self._new_engines, self._outdated):
            done.clear()

    def _put(self, machine: str, key: str, pattern: str, rung: str, point: Point) -> None:
        self.points.setdefault(machine, {}).setdefault(key, {}).setdefault(pattern, {})[rung] = point

    def _read(self) -> None:
        try:
            if not self.path.exists():
                return
            if self.path.stat().st_size > LARGEST_FILE:
                raise ValueError(f"it has more than {LARGEST_FILE >> 20} MiB")
            self._fill(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self.points, self.checks, self.engines = {}, {}, {}
            self.note = (
                f"{self.path} is not a table of costs ({error}); it is not used, and what is measured next moves it "
                f"to {_aside(self.path).name}"
            )

    def _fill(self, found: Any) -> None:
        if found["format"] not in (FORMAT, BEFORE):
            raise ValueError(f"its format is {str(found['format'])[:40]!r}, this version writes {FORMAT!r}")
        for machine, entry in found["machines"].items():
            for key, by_pattern in entry["points"].items():
                for pattern, rungs in by_pattern.items():
                    for rung, (density, ms, reference, *features) in rungs.items():
                        point = Point(float(density), float(ms), float(reference), tuple(map(float, features)))
                        if not point.sound:
                            raise ValueError(f"a point of {key[:60]!r} is {point}")
                        self._put(machine, key, pattern, rung, point)
            for network, given in entry["checks"].items() if found["format"] == FORMAT else ():
                pairs = [(float(a), float(b)) for a, b in given]
                if not all(_pair(*pair) for pair in pairs):
                    raise ValueError("a check is no pair of milliseconds")
                self.checks.setdefault(machine, {})[network] = pairs
        for name, networks in found["engines"].items() if found["format"] == FORMAT else ():
            self.engines[name] = {network: float(ms) for network, ms in networks.items()}
            if not all(_pair(ms, ms) for ms in self.engines[name].values()):
                raise ValueError(f"a time of {name[:60]!r} is no number of milliseconds")

    def _write(self) -> None:
        write_bytes(self.path, json.dumps(self._table(), separators=(",", ":"), allow_nan=False).encode())

    def _table(self) -> Mapping[str, Any]:
        def plain(point: Point) -> list[float]:
            return [point.density, point.ms, point.reference, *point.features]

        names = sorted({*self.points, *self.checks})
        points = {
            name: {
                key: {pattern: {rung: plain(point) for rung, point in rungs.items()} for pattern, rungs in by.items()}
                for key, by in self.points.get(name, {}).items()
            }
            for name in names
        }
        return {
            "format": FORMAT,
            "machines": {name: {"points": points[name], "checks": self.checks.get(name, {})} for name in names},
            "engines": self.engines,
        }


def table_path(cache: str | PathLike[str] | None = None) -> Path:
    """The file of a cache folder."""
    return Path(cache or os.environ.get("SECATEUR_CACHE") or "~/.cache/secateur").expanduser() / "costs.json"


def core_version() -> str:
    """A short digest of the compiled core: figures of another one do not count; empty where there is none."""
    if _native.library() is None:
        return ""
    with open(_native.library_path(), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _pair(forecast: float, measured: float) -> bool:
    """Whether two numbers are milliseconds."""
    return math.isfinite(forecast) and math.isfinite(measured) and min(forecast, measured) > 0


def _aside(path: Path) -> Path:
    """The first name beside a file that is not taken."""
    names = (path.with_name(f"{path.name}.aside{f'-{n}' if n > 1 else ''}") for n in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """No other process adds to the file meanwhile."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "a+b") as file:
            _lock(file.fileno())
            yield  # closing the file gives the lock back
    except OSError as error:
        raise FileError(
            f"cannot write {path}: {error.strerror or error}. Nothing was changed there; set SECATEUR_CACHE to a "
            "folder that can be written."
        ) from error


def _lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
