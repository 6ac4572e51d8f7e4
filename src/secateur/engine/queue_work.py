"""Work on a queue: what there is to do, in what state it is, and one process that does what it can."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.core.errors import FileError, SecateurError, UsageError
from secateur.core.files import read_json
from secateur.engine.checkpoint import STATE
from secateur.engine.comparing_jobs import SharedData
from secateur.engine.exporting_step import check_packages
from secateur.engine.queue_leases import Lease, LeaseLost, Leases
from secateur.engine.queue_store import Stage, Store
from secateur.engine.recipe import LOOKING, Recipe, read_recipe
from secateur.engine.run_folder import RUN, write_run
from secateur.engine.start import Listener

DEATHS = 3
"""So many processes in a row may vanish over a stage; the next one that would take it records a failure."""

_LOOKING = frozenset(kind.do for kind in LOOKING)

Heard = Callable[[str, Stage, Mapping[str, Any]], None]
"""Called with an event (``begun``, ``published``, ``dropped``, ``lost``, ``failed``, or ``waits`` where others are at
work on all that could be done), its stage and what there is to tell: ``recipes`` and, where known, ``seconds`` and
``text``."""


@dataclass(frozen=True)
class Asked:
    """One recipe in a queue.

    Args:
        name: of its run folder.
        recipe: what to do.
        stages: its steps by what was asked.
    """

    name: str
    recipe: Recipe
    stages: tuple[Stage, ...]


def plan(name: str, recipe: Recipe, store: Store, data_dir: str | None) -> Asked:
    """A recipe with the keys of its stages; reads the data, and trains nothing.

    Raises:
        UsageError: when a package for an export is missing, or no data are named.
        FileError: when data, weights or a teacher are missing.
    """
    check_packages(recipe.steps)
    rows = SharedData(recipe, store.results, data_dir).plan()
    return Asked(name, recipe, chain((row["number"], row["do"], row["key"]) for row in rows))


def chain(rows: Iterable[tuple[int, str, str]]) -> tuple[Stage, ...]:
    """Stages from number, kind and key of each step: each needs the last one before it that makes a network."""
    stages, needs = [], ""
    for number, do, key in rows:
        stages.append(Stage(number, do, key, needs))
        if do not in _LOOKING:
            needs = stages[-1].name
    return tuple(stages)


def enqueue(store: Store, asked: Sequence[Asked]) -> None:
    """Give each recipe its run folder, with what is done of it already."""
    for one in asked:
        store.link(one.name, [stage.name for stage in one.stages])
        write_run(store.run(one.name), one.recipe, [stage.key for stage in one.stages])


def recipes_in(store: Store) -> dict[str, Recipe]:
    """The recipes that were given to a queue, by name.

    Raises:
        FileError: when one is damaged.
        UsageError: when one is not understood.
    """
    places = sorted((store.folder / "runs").glob("*/recipe.toml"))
    return {path.parent.name: Recipe.from_table(read_recipe(path)) for path in places}


def listed(store: Store) -> dict[str, tuple[Stage, ...]]:
    """The stages of all recipes of a queue, as their run folders tell; reads no data.

    Raises:
        FileError: when a run folder is damaged.
    """
    found = {}
    for path in sorted((store.folder / "runs").glob(f"*/{RUN}")):
        try:
            rows = [(int(row["number"]), str(row["do"]), str(row["key"])) for row in read_json(path)["steps"]]
        except (TypeError, KeyError, ValueError) as error:
            raise FileError(f"{path} is damaged. Run the recipe {path.parent.name} again to write it anew.") from error
        if any("/" in word for _, *words in rows for word in words):
            raise FileError(f"{path} names steps outside of the queue. Delete it, and run the recipe again.")
        found[path.parent.name] = chain(rows)
    return found


def states(store: Store, leases: Leases, stages: Mapping[str, Sequence[Stage]]) -> list[dict[str, Any]]:
    """A row for each stage, shared ones once: what it is, which recipes want it, and its state.

    Args:
        store: the queue.
        leases: its leases.
        stages: of each recipe, by name.

    Returns:
        Rows with ``stage``, ``number``, ``do``, ``key``, ``recipes``, ``state`` (``"done"``, ``"at work"``,
        ``"failed"``, ``"ready"`` or ``"waits"``), ``seconds``, ``by``, ``since`` (seconds since 1970, by the clock of
        the file system), ``text`` and ``kind`` (of a failure), and ``behind`` (the failed stage that it waits for).
    """
    rows: dict[str, dict[str, Any]] = {}
    for recipe, chained in stages.items():
        for stage in chained:
            if stage.name in rows:
                rows[stage.name]["recipes"].append(recipe)
                continue
            state = _state(store, leases, stage, rows)
            about = {"number": stage.number, "do": stage.do, "key": stage.key, "recipes": [recipe]}
            nothing = {"seconds": None, "by": "", "since": None, "text": "", "kind": "", "behind": ""}
            rows[stage.name] = {"stage": stage.name, **about, **nothing, **state}
    return list(rows.values())


def _state(store: Store, leases: Leases, stage: Stage, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    if store.done(stage.name):
        about = store.about(stage.name)
        told = about.get("seconds")
        by = f"{about['host']}:{about['pid']}" if {"host", "pid"} <= about.keys() else ""
        return {"state": "done", "seconds": told if isinstance(told, int | float) else None, "by": by}
    if failure := store.failure(stage.name):
        return {"state": "failed", "text": str(failure["text"]), "kind": str(failure["kind"])}
    if seen := leases.seen(stage.name):
        by = f"{seen.owner.host}:{seen.owner.pid}" if seen.owner else "unknown"
        since = seen.since or None
        seconds = None if since is None else round(leases.now() - since, 3)
        return {"state": "at work", "by": by, "since": since, "seconds": seconds}
    before = rows.get(stage.needs)
    if before is None or before["state"] == "done":
        return {"state": "ready"}
    failed = before["stage"] if before["state"] == "failed" else before["behind"]
    return {"state": "waits", "behind": failed, "text": f"waits for a failed one: {failed}" if failed else ""}


def outcome(rows: Iterable[Mapping[str, Any]]) -> int:
    """The exit code: 1 when a stage failed by a bug, 2 when one failed by what the user can mend, else 0."""
    kinds = {row["kind"] for row in rows if row["state"] == "failed"}
    return 1 if "bug" in kinds else 2 if kinds else 0


@dataclass
class Worker:
    """A process that takes stages until all are done, or wait for failed ones.

    Args:
        store: the queue.
        leases: its leases, with how long one is good.
        asked: the recipes.
        data_dir: where data sets are looked up.
        heard: hears what happens.
        listener: hears the figures of training.
    """

    store: Store
    leases: Leases
    asked: Sequence[Asked]
    data_dir: str | None = None
    heard: Heard = lambda event, stage, told: None
    listener: Listener = field(default_factory=Listener)
    _wanted: dict[str, list[tuple[Asked, Stage]]] = field(default_factory=dict, init=False)

    def run(self) -> None:
        """Do what there is to do; what others are at work on is waited for, and taken over when they vanish.

        Raises:
            FileError: when the queue's folder cannot be written.
            KeyboardInterrupt: after the stage at hand was given back, with its checkpoint.
        """
        for one in self.asked:
            for stage in one.stages:
                self._wanted.setdefault(stage.name, []).append((one, stage))
        self.store.sweep(self._wanted)
        enqueue(self.store, self.asked)
        self.store.log(self.leases.owner, "came", "")
        idle = False
        try:
            while todo := self._open():
                if any(self._try(stage) for stage in todo):
                    idle = False
                    continue
                if not idle:
                    self._hear("waits", todo[0])
                idle = True
                time.sleep(min(1.0, self.leases.seconds / 4))
        finally:
            self.store.sweep(self._wanted)
            enqueue(self.store, self.asked)

    def _open(self) -> list[Stage]:
        """Stages that are neither done nor failed, nor wait for a failed one; in the order of recipes and steps."""
        shut: set[str] = set()
        found = []
        for name, ((_, stage), *_) in self._wanted.items():
            if self.store.done(name):
                continue
            if stage.needs in shut or self.store.failure(name):
                shut.add(name)
            else:
                found.append(stage)
        return found

    def _try(self, stage: Stage) -> bool:
        """Take a stage and work on it; False when it is not ready, or another's."""
        if stage.needs and not self.store.done(stage.needs):
            return False
        lease = self.leases.take(stage.name, lambda: self.store.saved(stage.name))
        if lease is None:
            return False
        try:
            if self.store.done(stage.name):  # another one was quicker between two looks
                self.leases.forget(stage.name)
            elif self.store.failure(stage.name):
                pass
            elif lease.deaths > DEATHS:
                died = f"{lease.deaths} processes in a row vanished at it (out of memory, or killed)"
                cure = "Use fewer `--workers` or a longer `--lease`, then `--retry`."
                self._fail(stage, f"{died}. {cure}", "refused")
            else:
                self._work(stage, lease)
        finally:
            lease.give_back()
        return True

    def _work(self, stage: Stage, lease: Lease) -> None:
        name, began = stage.name, time.perf_counter()
        private: Path | None = None
        try:
            with lease:
                private = self.store.private(name, lease)
                lease.check()
                self._tell("begun", stage, number=lease.number, resumed=(private / name / STATE).is_file())
                self._compute(stage, lease, private)
                lease.check()
                seconds = time.perf_counter() - began
                first = self.store.publish(name, private, lease, seconds)
        except KeyboardInterrupt:
            self._leave(private, name)
            self.store.log(self.leases.owner, "interrupted", name)
            raise
        except Exception as error:  # networks and methods of somebody else's may raise anything
            # Who publishes throws away what others have of the stage, so they may fail at anything
            if isinstance(error, LeaseLost) or self.store.done(name) or _is_lost(lease):
                if private is not None:
                    self.store.discard(private)
                self._tell("lost", stage)
                return
            self._leave(private, name)
            bug = not isinstance(error, SecateurError)
            self._fail(stage, traceback.format_exc() if bug else str(error), "bug" if bug else "refused")
            return
        self.leases.forget(name)
        enqueue(self.store, [one for one, _ in self._wanted[name]])
        self._hear("published" if first else "dropped", stage, seconds=seconds)

    def _compute(self, stage: Stage, lease: Lease, private: Path) -> None:
        """Carry a stage out in a private folder."""
        runner = SharedData(
            self._wanted[stage.name][0][0].recipe, self.store.results, self.data_dir, Watched(self.listener, lease)
        )
        runner.stage(stage.number, stage.key, private)

    def _leave(self, private: Path | None, name: str) -> None:
        """Leave a checkpoint for whoever goes on, and nothing else."""
        if private is not None and not (private / name / STATE).is_file():
            self.store.discard(private)

    def _fail(self, stage: Stage, text: str, kind: str) -> None:
        self.store.fail(stage.name, text, kind, self.leases.owner)
        self._tell("failed", stage, text=text, kind=kind)

    def _tell(self, event: str, stage: Stage, **told: Any) -> None:
        self.store.log(self.leases.owner, event, stage.name, **told)
        self._hear(event, stage, **told)

    def _hear(self, event: str, stage: Stage, **told: Any) -> None:
        self.heard(event, stage, {"recipes": [one.name for one, _ in self._wanted[stage.name]], **told})


class Watched(Listener):
    """Stops a stage whose lease is another's; says nothing of the steps before it, which were only read.

    Args:
        other: hears the rest.
        lease: of the stage.
    """

    def __init__(self, other: Listener, lease: Lease) -> None:
        self.other, self.lease = other, lease

    def begin(self, number: int, step: Any, folder: Path, steps: int) -> None:
        """Pass on."""
        self.other.begin(number, step, folder, steps)

    def figures(self, figures: Mapping[str, int | float]) -> None:
        """Pass on, or stop.

        Raises:
            LeaseLost: when another process has taken over.
        """
        if self.lease.lost:
            raise LeaseLost(self.lease.name)
        self.other.figures(figures)

    def end(self, number: int, step: Any, card: Mapping[str, Any], skipped: bool) -> None:
        """Pass on what was done here."""
        if not skipped:
            self.other.end(number, step, card, skipped)

    def say(self, text: str) -> None:
        """Pass on."""
        self.other.say(text)


def _is_lost(lease: Lease) -> bool:
    try:
        lease.check()
    except LeaseLost:
        return True
    except FileError:
        return False
    return False


def retry(store: Store, asked: Sequence[Asked]) -> list[str]:
    """Forget the failures of some recipes; gives the stages that had failed."""
    return store.clear(dict.fromkeys(stage.name for one in asked for stage in one.stages))


def check_names(names: Iterable[str], places: Iterable[str]) -> None:
    """Each recipe has a run folder of its own name.

    Raises:
        UsageError: naming two that would share one.
    """
    seen: dict[str, str] = {}
    for name, place in zip(names, places, strict=True):
        if name in seen:
            raise UsageError(
                f"{seen[name]} and {place} are both called {name}, and a queue has one run folder of each name. "
                "Rename one of them."
            )
        seen[name] = place
