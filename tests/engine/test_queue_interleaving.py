"""Two workers over one stage, each stopped before any of its file operations: whatever the order, one publication.

Real workers run in threads. A thread stands still before the file operation that it is told, as a process does that the
system puts to sleep there; one that does not go on is what a killed process leaves on the disk. Leases of those that
stand still run out.
"""

import builtins
import io
import itertools
import json
import os
import pathlib
import shutil
import sys
import tempfile
import threading

import pytest

from secateur.core.files import write_bytes, write_json
from secateur.engine.checkpoint import STATE, Metrics, load_state, save_state
from secateur.engine.folder import CARD
from secateur.engine.queue_leases import Leases, Owner
from secateur.engine.queue_store import Stage, Store, publications
from secateur.engine.queue_work import Worker

STAGE = Stage(1, "train", "0123456789ab", "")
NAME = STAGE.name
FILES = ["card.json", "metrics.jsonl", "stage.json", "weights.safetensors"]
LINES = [1, 2]

CHANGES = [(os, name) for name in ("rename", "replace", "mkdir", "unlink", "utime", "open")]
CHANGES += [(builtins, "open"), (io, "open")]
LOOKS = [(os, "stat"), (os, "scandir")]
ALONE = frozenset((
    # what nobody else looks at, or only for the time
    "now", "log", "_sync_folder", "flush", "rmtree", "dead", "_find_and_load",
    # parts of a whole write or of one look: to sleep between them comes to the same as to sleep after them
    "mkstemp", "save_state", "is_dir", "is_symlink", "copyfile",
))  # fmt: skip

PLAYERS = {}
"""By thread."""


class Short(Worker):
    """A worker whose stages take no time: what a training does to the files of a private folder, and nothing else."""

    def _compute(self, stage, lease, private):
        folder = private / stage.name
        if not (folder / CARD).is_file():
            for left in folder.glob(".*"):
                left.unlink()
            saved = load_state(folder) or {"line": 0, "size": 0}
            metrics = Metrics(folder / "metrics.jsonl", saved["size"])
            for line in LINES[saved["line"] :]:
                metrics.write(step=line)
                if line == 1:
                    save_state(folder, {"line": line, "size": metrics.size})
            write_bytes(folder / "weights.safetensors", b"weights")
            write_json(folder / CARD, {"files": ["weights.safetensors"]})
        (folder / STATE).unlink(missing_ok=True)


class Player:
    """A worker in a thread, which goes on to a file operation by its number, or to the end."""

    def __init__(self, store, owner, looks):
        self.store, self.looks, self.limit, self.over, self.error = store, looks, 0, False, None
        self.trace = []
        self.worker = Short(store, Leases(store.leases, owner=owner), [])
        self.worker._wanted = {NAME: []}
        self.turn, self.stands = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._run, daemon=True).start()

    def go(self, to=1 << 60):
        """Go on until so many operations are done, another one is at work, or the stage is done; gives whether."""
        if not self.over:
            self.limit = to
            self.turn.release()
            self.stands.acquire()
        if self.error is not None:
            raise self.error
        return self.over

    def before(self, looks):
        """Called before each file operation."""
        if looks and not self.looks:
            return
        names, frame = [], sys._getframe(2)
        while frame.f_code is not Player._run.__code__:
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        if not ALONE.isdisjoint(names):
            return
        while len(self.trace) >= self.limit:
            self.stands.release()
            self.turn.acquire()
        self.trace.append(names)

    def _run(self):
        self.turn.acquire()
        PLAYERS[threading.get_ident()] = self
        try:
            while not self.store.done(NAME):
                if failure := self.store.failure(NAME):
                    raise RuntimeError(failure["text"])
                if not self.worker._try(STAGE):  # another one is at work: wait
                    self.stands.release()
                    self.turn.acquire()
        except BaseException as error:
            self.error = error
        del PLAYERS[threading.get_ident()]
        self.over = True
        self.stands.release()


class Scene:
    """A queue with players at one stage.

    Args:
        folder: where; a new one.
        owners: names for the players.
        looks: the first one stops before it looks at something too, not only before it changes something.
        stranger: something that is no result lies in the stage's place.
    """

    def __init__(self, folder, owners, looks=False, stranger=False):
        self.store, self.mark = Store(folder), None
        for name in ("leases", "store", "work"):
            (folder / name).mkdir(parents=True)
        if stranger:
            (self.store.results / NAME / "deep").mkdir(parents=True)
            (self.store.results / NAME / "somebody's").write_text("")
        self.players = [Player(self.store, owner, looks and owner is owners[0]) for owner in owners]

    def sleep(self):
        """So long that every lease runs out."""
        for entry in os.scandir(self.store.leases):
            if entry.name.startswith(NAME) and entry.stat().st_mtime > 0:  # else given back
                os.utime(entry.path, (1.0, 1.0))

    def check(self):
        """One whole result, published once, and never another one after it."""
        folder = self.store.results / NAME
        assert sorted(os.listdir(folder)) == FILES
        lines = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert lines == LINES
        assert (folder / "weights.safetensors").read_bytes() == b"weights"
        mark = (self.store.about(NAME)["attempt"], folder.stat().st_ino)
        assert self.mark in (None, mark)
        self.mark = mark
        assert publications(self.store.events(), self.store) == {NAME: [mark[0]]}
        assert not os.path.exists(self.store.folder / "failed")

    def end(self):
        """All that still sleep wake up, one after the other, and nothing is left of them."""
        for player in self.players:
            player.go()
        self.check()
        assert not os.listdir(self.store.folder / "work")


@pytest.fixture
def scene(monkeypatch):
    """Makes scenes in new folders; in memory where that is possible."""

    def stepped(call, looks):
        def instead(*words, **more):
            if (player := PLAYERS.get(threading.get_ident())) is not None:
                player.before(looks)
            return call(*words, **more)

        return instead

    for place, name in CHANGES + LOOKS:
        monkeypatch.setattr(place, name, stepped(getattr(place, name), (place, name) in LOOKS))
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no power is cut here
    root = pathlib.Path(tempfile.mkdtemp(prefix="secateur-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    owners, number = [Owner.this() for _ in range(3)], itertools.count()
    yield lambda **about: Scene(root / str(next(number)), owners, **about)
    shutil.rmtree(root)


def exhaust(act, first=0, second=0, step=1):
    """Play an act with all pairs of places where the first and where the second one stop.

    Args:
        act: gives whether either was over before it came there.
        first: where to begin.
        second: where to begin.
        step: 2 plays every other pair only, 3 every third one.
    """
    wrong, played = [], 0
    for one in itertools.count(first):
        for two in itertools.count(second + one % step, step):
            try:
                over = act(one, two)
            except Exception as error:
                wrong.append((one, two, repr(error)[:300]))
                over = (False, len(wrong) > 20)
            played += 1
            if any(over):
                break
        if over[0] or len(wrong) > 20:
            break
    assert not wrong, f"{len(wrong)} of {played}: {wrong}"
    return played


def publishing(scene, looks=False):
    """Where a worker whom nobody disturbs looks at its lease for the last time before it publishes."""
    for _ in range(2):  # the first time, something may be imported
        alone = scene(looks=looks)
        alone.players[0].go()
        alone.end()
    return next(at for at, names in enumerate(alone.players[0].trace) if "publish" in names) - (2 if looks else 1)


@pytest.mark.parametrize("both", [True, False], ids=["both", "one"])
def test_a_worker_sleeps_anywhere_and_so_may_the_one_that_takes_over(scene, both):
    """The first wakes and does whatever it still can; when the second has slept too, also by taking over from it."""

    def act(first, second):
        now = scene(looks=True)
        one, two, _ = now.players
        over = one.go(first)
        now.sleep()
        over = over, two.go(second)
        if both:
            now.sleep()
        over = *over, one.go()
        if over[2]:
            now.check()
        two.go()
        now.check()
        now.end()
        return over[:2]

    publishing(scene)
    assert exhaust(act, step=3 if both else 2) > 350


def test_two_workers_die_anywhere_and_a_third_one_gets_it_done(scene):
    """What they would have done next changes nothing any more, if they were only asleep."""

    def act(first, second):
        now = scene()
        one, two, three = now.players
        over = one.go(first)
        now.sleep()
        over = over, two.go(second)
        now.sleep()
        three.go()
        now.check()
        two.go()
        now.check()
        now.end()
        return over

    assert exhaust(act, step=2) > 300


def test_a_publisher_is_stopped_twice(scene):
    """Before and after the other one goes a part of its way."""

    def act(first, second):
        for more in (1, 2, 3):
            now = scene()
            one, two, _ = now.players
            over = one.go(first)
            now.sleep()
            over = over, two.go(second)
            one.go(first + more)
            now.sleep()
            two.go()
            now.check()
            now.end()
        return over

    assert exhaust(act, publishing(scene)) > 100


def test_a_stranger_in_the_way_is_put_aside_by_either_and_no_result_with_it(scene):
    def act(first, second):
        now = scene(stranger=True)
        one, two, _ = now.players
        over = one.go(first)
        now.sleep()
        over = over, two.go(second)
        now.sleep()
        one.go()
        now.check()
        now.end()
        aside = (now.store.folder / "aside").glob("*/*")
        assert sorted(path.name for path in aside) == ["deep", "somebody's"]
        return over

    begin = publishing(scene)
    assert exhaust(act, begin, begin) > 80
