"""Queues: one owner of a lease at a time, one publication of a stage, results equal to those of ordinary runs."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from random import Random

import pytest
import torch

from secateur.core.errors import FileError, UsageError
from secateur.data import load
from secateur.engine.checkpoint import save_state
from secateur.engine.folder import Artefact
from secateur.engine.queue_leases import Lease, LeaseLost, Leases, Owner
from secateur.engine.queue_stopping import stoppable
from secateur.engine.queue_store import Store, publications
from secateur.engine.queue_work import DEATHS, Worker, enqueue, listed, outcome, plan, recipes_in, retry, states
from secateur.engine.recipe import Recipe
from secateur.engine.runner import Runner
from secateur.engine.start import Listener, begin
from secateur.report.source import read_run

DATA = {"use": "digits", "train": 60, "test": 30, "batch": 10}
TRAIN = {"do": "train", "epochs": 2, "lr": 0.05, "save_every": 1}


def table(sparsity="0.5", *more, train=TRAIN):
    """Train, prune, train on."""
    steps = [train, {"do": "prune", "to": f"sparsity {sparsity}"}, {"do": "train", "epochs": 1}, *more]
    return {"model": {"use": "mlp", "widths": [8]}, "data": DATA, "step": steps}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def leases(tmp_path):
    """As two processes see one folder."""
    return Leases(tmp_path / "leases"), Leases(tmp_path / "leases")


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "queue")


def worker(store, listener=None, **tables):
    """A worker on recipes by name; keeps all events it tells."""
    asked = [plan(name, Recipe.from_table(each), store, None) for name, each in tables.items()]
    made = Worker(store, Leases(store.leases, 30), asked, None, listener=listener or Listener())
    made.events = []
    made.heard = lambda event, stage, told: made.events.append((event, stage.name, dict(told)))
    return made


def rows(made):
    return states(made.store, made.leases, {one.name: one.stages for one in made.asked})


def age(lease, seconds):
    """Let the last sign of life be so long ago."""
    now = lease.leases.now()
    os.utime(lease.path, (now - seconds, now - seconds))


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def race(work, count=12):
    """Results of threads that begin together."""
    gate, found = threading.Barrier(count), []

    def run(number):
        gate.wait()
        found.append(work(number))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == count
    return found


# leases


def test_of_two_takers_one_wins_and_the_other_gets_it_when_it_is_given_back(leases):
    one, two = leases
    mine = one.take("stage")
    assert two.take("stage") is None and one.take("stage") is None
    assert two.take("another") is not None
    mine.check()
    mine.give_back()
    theirs = two.take("stage")
    assert theirs.deaths == 0
    theirs.check()
    with pytest.raises(LeaseLost):
        mine.check()
    mine.give_back()  # of no effect on what is another's
    theirs.check()


@pytest.mark.parametrize("left", ["nothing", "expired", "given back", "damaged"])
def test_many_at_once_get_it_for_one_of_them(tmp_path, left):
    """Whatever was left by the owner before, exactly one breaks it and takes it."""
    for turn in range(8):
        name = f"stage-{turn}"
        first = Leases(tmp_path)
        if left != "nothing":
            old = first.take(name)
            if left == "given back":
                old.give_back()
            else:
                if left == "damaged":
                    old.path.write_bytes(b"\xff{")
                age(old, 1000)
        them = [Leases(tmp_path) for _ in range(12)]

        won = [lease for lease in race(lambda n, name=name, them=them: them[n].take(name)) if lease is not None]

        assert len(won) == 1
        won[0].check()
        assert won[0].deaths == (left in ("expired", "damaged"))
        assert [path.name for path in tmp_path.glob(f"{name}.*")] == [won[0].path.name]


def test_no_number_is_ever_used_twice(tmp_path):
    """Owners that come, go and vanish, in eight threads at once: each lease that anybody got has its own number."""
    won = []

    def live(number):
        random, mine = Random(number), Leases(tmp_path)
        for _ in range(30):
            if lease := mine.take("stage"):
                won.append(lease.number)
                with contextlib.suppress(FileNotFoundError):  # lost already, as this test breaks leases at will
                    lease.give_back() if random.random() < 0.5 else age(lease, 1000)

    race(live, 8)
    assert len(won) >= 8 and len(set(won)) == len(won)
    assert len(list(tmp_path.glob("stage.*"))) == 1


def test_a_lease_ends_by_the_clock_of_the_file_system_and_by_its_own_length(tmp_path):
    long, short = Leases(tmp_path, 100), Leases(tmp_path, 10)
    mine = long.take("stage")
    for seconds, free in ((0, False), (50, False), (99, False), (-99, False), (101, True)):
        age(mine, seconds)
        taken = short.take("stage")
        assert (taken is not None) == free, seconds
    assert taken.deaths == 1
    with pytest.raises(LeaseLost):
        mine.check()
    age(taken, 11)
    assert long.take("stage").deaths == 2


def test_a_time_far_ahead_blocks_nobody(leases):
    mine = leases[0].take("stage")
    age(mine, -1e6)
    assert leases[1].take("stage") is not None


def test_a_lease_lives_as_long_as_its_owner_works_and_is_found_lost_by_itself(tmp_path):
    one, two = Leases(tmp_path, 0.4), Leases(tmp_path, 0.4)
    with one.take("stage") as mine:
        age(mine, 1000)
        until(lambda: one.now() - mine.path.stat().st_mtime < 100)
        assert not mine.lost
        mine.path.rename(mine.path.with_name("stage.000002"))  # what it looks like when another one has taken over
        until(lambda: mine.lost)
    with pytest.raises(LeaseLost):
        mine.check()
    assert two.take("stage") is None or two.highest("stage") == 3


def dying(folder, name):
    """A process that takes a lease and vanishes."""
    code = (
        "import os, sys, pathlib; from secateur.engine.queue_leases import Leases;"
        "print(Leases(pathlib.Path(sys.argv[1]), 1e6).take(sys.argv[2]).path, flush=True); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder), name], capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    return done.stdout.strip()


def test_a_process_of_this_machine_that_is_dead_holds_nothing(tmp_path):
    """At once, although its lease is good for days; not so where its number may be one of another machine."""
    path = dying(tmp_path, "stage")
    about = json.loads(pathlib.Path(path).read_text())
    (tmp_path / "elsewhere.000001").write_text(json.dumps({**about, "machine": "another"}))
    (tmp_path / "reused.000001").write_text(json.dumps({**about, "pid": os.getpid(), "started": "1"}))
    (tmp_path / "alive.000001").write_text(json.dumps({**about, "pid": os.getpid(), "started": Owner.this().started}))
    here = Leases(tmp_path)
    taken = {name: here.take(name) is not None for name in ("stage", "elsewhere", "reused", "alive")}
    assert taken == {"stage": True, "elsewhere": False, "reused": True, "alive": False}
    assert here.highest("stage") == 2


def test_where_processes_are_hidden_none_counts_as_dead_that_is_not_known_to_be(tmp_path, monkeypatch):
    """As under ``hidepid``: there is nothing below /proc of a process of somebody else, dead or alive."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    for name, pid in (("gone", ended.pid), ("mine", os.getpid()), ("others", 1)):
        (tmp_path / f"{name}.000001").write_text(json.dumps({**asdict(Owner.this()), "pid": pid}))
    read, kill = pathlib.Path.read_text, os.kill

    def hidden(path, *words, **more):
        if path.name == "stat" and path.parts[1] == "proc":
            raise FileNotFoundError(path)
        return read(path, *words, **more)

    def forbidden(pid, number):
        if pid == 1:
            raise PermissionError
        kill(pid, number)

    monkeypatch.setattr(pathlib.Path, "read_text", hidden)
    monkeypatch.setattr(os, "kill", forbidden)
    here = Leases(tmp_path)
    taken = {name: here.take(name) is not None for name in ("gone", "mine", "others")}
    assert taken == {"gone": True, "mine": False, "others": False}


def test_numbers_go_on_when_a_thing_is_done(leases):
    """Who slept through it all finds nothing that it could take for its own."""
    one, two = leases
    slow = one.take("stage")
    age(slow, 1000)
    two.take("stage")
    two.forget("stage")
    again = two.take("stage")
    assert again.number > 2 and again.deaths == 0
    with pytest.raises(LeaseLost):
        slow.check()
    slow.give_back()
    again.check()
    two.forget("stage")
    with pytest.raises(LeaseLost):
        again.check()
    two.forget("nothing")
    assert len(list(one.folder.glob("[!.]*"))) == 1


def test_who_vanished_after_saving_something_is_not_counted(leases):
    """Before, at the time and after it: only work that was saved under the lease itself is progress."""
    one, two = leases
    deaths = []
    for later in (-10.0, 0.0, -10.0, 10.0, 0.0):
        mine = one.take("stage")
        since = json.loads(mine.path.read_text())["since"]
        age(mine, 1000)
        theirs = two.take("stage", lambda since=since, later=later: since + later)
        deaths.append(theirs.deaths)
        age(theirs, 1000)
    assert deaths == [1, 3, 5, 0, 2]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\x00\xff" * 50, b"[]", b"null", b"[" * 60000, b'{"pid": "x", "seconds": "long"}',
     b'{"token": 1, "host": [], "seconds": -5, "since": NaN, "deaths": 1e999}', b'{"seconds": Infinity, "pid": 0}'],
    ids=["empty", "cut", "bytes", "list", "null", "deep", "words", "wrong", "infinite"],
)  # fmt: skip
def test_a_damaged_lease_holds_until_it_is_old(tmp_path, content):
    here = Leases(tmp_path, 50)
    path = tmp_path / "stage.000007"
    path.write_bytes(content)
    assert here.take("stage") is None
    assert here.seen("stage").owner is None
    age(Lease(here, "stage", 7, 0), 51)
    assert here.seen("stage") is None
    assert here.take("stage").path.name == "stage.000008"
    (tmp_path / "stage.x").write_bytes(content)
    (tmp_path / "stage.12").write_bytes(content)
    assert here.highest("stage") == 8


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_lease_has_a_length(tmp_path, seconds):
    with pytest.raises(UsageError, match="more than 0"):
        Leases(tmp_path, seconds)


def test_a_folder_that_is_a_file_is_refused_by_name(tmp_path):
    (tmp_path / "leases").write_text("")
    with pytest.raises(FileError, match="leases"):
        Leases(tmp_path / "leases").take("stage")


# the store


def finished(private, name, text="{}"):
    """What looks like a finished step."""
    (private / name).mkdir(parents=True, exist_ok=True)
    (private / name / "card.json").write_text(text)


def test_of_two_that_finish_a_stage_one_publishes(store):
    """Also when both believe that they hold the lease: the second finds the name taken and drops its own."""
    one, two = Leases(store.leases), Leases(store.leases)
    first = one.take("s")
    age(first, 1000)
    second = two.take("s")
    folders = store.private("s", second), store.folder / "work" / f"s.{one.owner.token}"
    for folder, told in zip(folders, ('{"by": 2}', '{"by": 1}'), strict=True):
        finished(folder, "s", told)

    assert store.publish("s", folders[0], second, 1.0) is True
    finished(folders[1], "s", '{"by": 1}')
    assert store.publish("s", folders[1], first, 1.0) is False

    assert (store.results / "s" / "card.json").read_text() == '{"by": 2}'
    assert store.about("s")["attempt"] == f"{two.owner.token}.2"
    assert publications(store.events(), store) == {"s": [f"{two.owner.token}.2"]}
    assert [row["event"] for row in store.events()].count("dropped") == 1
    assert not list((store.folder / "work").iterdir())


def test_many_at_once_publish_a_stage_once(store):
    def publish(_):
        mine = Leases(store.leases)
        private = store.folder / "work" / f"s.{mine.owner.token}"
        finished(private, "s")
        with contextlib.suppress(LeaseLost, FileNotFoundError):  # another one that published swept this one's away
            return store.publish("s", private, Lease(mine, "s", 1, 0), 1.0)
        return False

    assert race(publish).count(True) == 1
    assert [len(attempts) for attempts in publications(store.events(), store).values()] == [1]


def test_who_sleeps_over_publishing_neither_publishes_a_husk_nor_disturbs_who_took_over(store):
    slow, quick = Leases(store.leases), Leases(store.leases)
    late = slow.take("s")
    folder = store.private("s", late)
    finished(folder, "s")
    late.check()
    age(late, 1000)
    lease = quick.take("s")
    private = store.private("s", lease)
    (private / "s").mkdir()
    (private / "s" / "state.pt").write_text("hours of work")

    with pytest.raises(LeaseLost):
        store.publish("s", folder, late, 1.0)

    assert not store.done("s") and not (store.results / "s").exists()
    assert (private / "s" / "state.pt").read_text() == "hours of work"
    lease.check()
    finished(private, "s")
    assert store.publish("s", private, lease, 1.0) is True
    assert publications(store.events(), store) == {"s": [f"{quick.owner.token}.2"]}


def test_who_sleeps_over_taking_a_private_folder_leaves_that_of_a_later_one_alone(store):
    slow, quick = Leases(store.leases), Leases(store.leases)
    late = slow.take("s")
    age(late, 1000)
    private = store.private("s", quick.take("s"))
    finished(private, "s")
    (private / "s" / "state.pt").write_text("")

    mine = store.private("s", late)

    assert mine != private and sorted(path.name for path in (private / "s").iterdir()) == ["card.json", "state.pt"]
    assert [path.name for path in mine.iterdir()] == ["begun.json"]


@pytest.mark.parametrize("kind", ["folder", "file", "link", "empty"])
def test_what_stands_in_the_way_of_a_result_is_put_aside(store, kind):
    target = store.results / "s"
    store.results.mkdir()
    if kind == "file":
        target.write_text("somebody's")
    elif kind == "link":
        target.symlink_to(store.folder / "nowhere")
    else:
        target.mkdir()
        if kind == "folder":
            (target / "weights.safetensors").write_text("half")
    lease = Leases(store.leases).take("s")
    private = store.private("s", lease)
    finished(private, "s")

    assert store.publish("s", private, lease, 1.0) is True

    assert store.done("s")
    assert len(list((store.folder / "aside").glob("*"))) == (kind != "empty")


def test_a_folder_of_something_else_is_no_queue(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="is a file"):
        Store.open(tmp_path / "file")
    with pytest.raises(UsageError, match="not the folder of a queue: it holds file"):
        Store.open(tmp_path)
    with pytest.raises(FileError, match="there is no queue"):
        Store.open(tmp_path / "absent", make=False)
    assert not (tmp_path / "absent").exists()
    (tmp_path / "queue").mkdir()
    (tmp_path / "queue" / "queue.json").write_text('{"format": "secateur.queue/9"}')
    with pytest.raises(FileError, match="not of a queue that this version knows"):
        Store.open(tmp_path / "queue")


# work


def weights(folder):
    return (folder / "weights.safetensors").read_bytes()


def test_recipes_share_what_they_have_in_common_and_end_as_ordinary_runs(store, tmp_path):
    """Trained once for three recipes; every run folder reads as that of a run by itself, weights equal to the byte."""
    tables = {"half": table("0.5"), "most": table("0.8"), "more": table("0.8", {"do": "measure"})}

    made = worker(store, **tables)
    assert [row["state"] for row in rows(made)] == ["ready", *["waits"] * 5]
    made.run()

    events = [(event, name) for event, name, _ in made.events]
    assert len(events) == len(set(events)) == 2 * 6
    assert all(len(attempts) == 1 for attempts in publications(store.events(), store).values())
    assert [row["recipes"] for row in rows(made)] == [[*tables], ["half"], ["half"], *[["most", "more"]] * 2, ["more"]]
    assert {row["state"] for row in rows(made)} == {"done"} and outcome(rows(made)) == 0
    for name, each in tables.items():
        alone = Runner(Recipe.from_table(each), tmp_path / name).run()
        run = store.run(name)
        assert sorted(p.name for p in alone.glob("[0-9]*")) == sorted(p.name for p in run.glob("[0-9]*"))
        for step in alone.glob("[0-9]*-[tp]*"):
            assert weights(step) == weights(run / step.name)
        assert json.loads((alone / "run.json").read_text()) == json.loads((run / "run.json").read_text())
        told = read_run(run)
        assert not told.notes and all(step.done for step in told.steps)
        assert Artefact.open(run).folder.name.startswith("3-train-")
        begun = begin(Recipe.from_table({**each, "model": {"load": str(run)}}), load("digits"), Listener())
        assert begun.dense.digest == Artefact.open(next(alone.glob("1-*"))).digest
        assert [r["state"] for r in Runner(Recipe.from_table(each), run).plan()] == ["done"] * len(each["step"])
    assert not list((store.folder / "work").iterdir())
    assert listed(store) == {one.name: one.stages for one in sorted(made.asked, key=lambda one: one.name)}
    assert {name: recipe.to_table() for name, recipe in recipes_in(store).items()} == {
        name: Recipe.from_table(each).to_table() for name, each in tables.items()
    }


def test_a_finished_queue_does_nothing_and_a_changed_recipe_only_what_is_new(store):
    worker(store, a=table("0.5")).run()
    before = {p: p.stat().st_mtime_ns for p in store.results.glob("*/*")}
    again = worker(store, a=table("0.5"))
    again.run()
    assert not again.events
    changed = worker(store, a=table("0.6"))
    changed.run()
    assert [name.partition("-")[0] for event, name, _ in changed.events if event == "published"] == ["2", "3"]
    assert {p: p.stat().st_mtime_ns for p in before} == before


class Meddler(Listener):
    """Does something once, at the given optimizer step of the first training that is heard of."""

    def __init__(self, step, act):
        self.step, self.act, self.folder = step, act, None

    def begin(self, number, step, folder, steps):
        self.folder = folder

    def figures(self, figures):
        if self.act and figures.get("step") == self.step:
            act, self.act = self.act, None
            act(self.folder)


def test_a_worker_that_lost_its_lease_publishes_nothing(store):
    """Another takes over while it trains; it goes its way without a trace, and does the stage when it is given back."""
    other = Leases(store.leases)

    def take_over(folder):
        name = folder.name
        theirs = store.leases / f"{name}.000001"
        os.utime(theirs, (1.0, 1.0))
        lease = other.take(name)
        assert lease is not None and lease.deaths == 1
        lease.give_back()

    made = worker(store, Meddler(3, take_over), a={**table(), "step": [TRAIN]})
    made.run()

    assert [event for event, *_ in made.events] == ["begun", "lost", "begun", "published"]
    assert made.events[2][2]["number"] == 3
    assert [row["event"] for row in store.events()].count("publishing") == 1
    assert not list((store.folder / "work").iterdir())


def interrupted(store, **tables):
    """A worker that was stopped by Ctrl-C at step 5 of its first training."""

    def stop(folder):
        raise KeyboardInterrupt

    made = worker(store, Meddler(5, stop), **tables)
    with pytest.raises(KeyboardInterrupt):
        made.run()
    return made


def test_an_interrupted_worker_gives_its_stage_back_and_another_goes_on_from_its_checkpoint(store, tmp_path):
    made = interrupted(store, a=table())
    left = list((store.folder / "work").iterdir())
    assert len(left) == 1 and left[0].name.endswith(made.leases.owner.token)
    assert rows(made)[0]["state"] == "ready"

    again = worker(store, a=table())
    again.run()

    begun = [told for event, _, told in again.events if event == "begun"]
    assert begun[0]["resumed"] and not begun[1]["resumed"]
    alone = Runner(Recipe.from_table(table()), tmp_path / "alone").run()
    for step in alone.glob("[0-9]*"):
        assert weights(step) == weights(store.run("a") / step.name)
    steps = [json.loads(line) for line in (next(store.run("a").glob("1-*")) / "metrics.jsonl").read_text().splitlines()]
    trained = [row["step"] for row in steps if "train/loss" in row]
    assert trained == sorted(set(trained)), "no line twice"
    assert not list((store.folder / "work").iterdir())


def test_a_worker_that_failed_goes_on_from_its_own_checkpoint(store):
    """Such as when the disk was full, and ``--retry`` came from somewhere else."""

    def fail(folder):
        raise FileError("the disk is full")

    made = worker(store, Meddler(5, fail), a={**table(), "step": [TRAIN]})
    made.run()
    assert [event for event, *_ in made.events] == ["begun", "failed"]

    assert retry(store, made.asked)
    made.run()

    assert [event for event, *_ in made.events] == ["begun", "failed", "begun", "published"]
    assert made.events[2][2]["resumed"]
    assert not list((store.folder / "work").iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_scheduler_that_ends_a_worker_is_no_death(store, number):
    """Told twice, as by a scheduler and by the command that started it: the step is made whole and saved."""

    def end(folder):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    saved = []
    try:
        signal.signal(number, lambda *_: None)  # else this process would end where nobody hears it
        for turn in range(3):
            made = worker(store, Meddler(3 * turn + 2, end), a={**table(), "step": [{**TRAIN, "save_every": 0}]})
            with pytest.raises(KeyboardInterrupt), stoppable():
                made.run()
            assert [(event, told.get("resumed")) for event, _, told in made.events] == [("begun", turn > 0)]
            state = next((store.folder / "work").glob("*/*/state.pt"))
            saved.append(torch.load(state, weights_only=True)["step"])
    finally:
        signal.signal(number, before)
    assert saved == sorted(set(saved))
    assert made.leases.take(made.asked[0].stages[0].name).deaths == 0


def test_a_stage_whose_processes_vanish_but_get_further_goes_on(store):
    """Killed without a word more often than a stage may be that gets nowhere; each had saved some steps."""
    name, folder, mine = worker(store, a=table()).asked[0].stages[0].name, None, []
    for step in range(1, DEATHS + 3):
        lease = Leases(store.leases).take(name, lambda: store.saved(name))
        mine.append(lease.deaths)
        folder = store.private(name, lease) / name
        about = json.loads(lease.path.read_text())
        lease.path.write_text(json.dumps({**about, "since": about["since"] - 20}))
        save_state(folder, {"step": step})
        os.utime(folder / "state.pt", (about["since"] - 10, about["since"] - 10))
        age(lease, 1000)
    assert mine == [0] * len(mine)
    for deaths in range(4):  # from here on none gets further; that its folder was handed on is no later work
        lease = Leases(store.leases).take(name, lambda: store.saved(name))
        assert lease.deaths == deaths
        assert (store.private(name, lease) / name / "state.pt").is_file()
        age(lease, 1000)


@pytest.mark.parametrize("damage", ["cut", "flipped", "no mark", "link"])
def test_what_is_left_half_written_is_thrown_away_and_the_stage_begun_anew(store, tmp_path, damage):
    interrupted(store, a={**table(), "step": [TRAIN]})
    left = next((store.folder / "work").iterdir())
    state = next(left.glob("*/state.pt"))
    content = state.read_bytes()
    if damage == "cut":
        state.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        state.write_bytes(content[:-2000] + b"\x01" * 20 + content[-1980:])
    elif damage == "no mark":
        (left / "begun.json").unlink()
    else:
        shutil.rmtree(left)
        left.symlink_to(tmp_path)

    again = worker(store, a={**table(), "step": [TRAIN]})
    again.run()

    assert not again.events[0][2]["resumed"] and again.events[1][0] == "published"
    assert tmp_path.is_dir()


def test_a_failure_is_told_its_followers_wait_others_go_on_and_retry_tries_again(store, tmp_path):
    """Measured beside a folder that is not there yet; and a training that blows up."""
    beside = tmp_path / "beside"
    measure = {"do": "measure", "damage": True, "samples": 10, "beside": [str(beside)]}
    tables = {
        "good": table("0.5"),
        "early": {**table(), "step": [{**TRAIN, "lr": 1e12}, *table()["step"][1:]]},
        "late": {**table(), "step": [TRAIN, measure, {"do": "prune", "to": "sparsity 0.5"}]},
    }
    made = worker(store, **tables)
    made.run()

    found = {(row["recipes"][0], row["number"]): row for row in rows(made)}
    assert {key: row["state"] for key, row in found.items()} == {
        ("good", 1): "done", ("good", 2): "done", ("good", 3): "done",
        ("early", 1): "failed", ("early", 2): "waits", ("early", 3): "waits",
        ("late", 2): "failed", ("late", 3): "done",
    }  # fmt: skip
    assert "Lower `lr`" in found["early", 1]["text"] and "beside" in found["late", 2]["text"]
    first = found["early", 1]["stage"]
    assert found["early", 3]["behind"] == first and found["early", 3]["text"] == f"waits for a failed one: {first}"
    assert outcome(rows(made)) == 2
    assert outcome([*rows(made), {"state": "failed", "kind": "bug"}]) == 1

    again = worker(store, **tables)
    again.run()
    assert not again.events, "what failed is not tried again by itself"

    shutil.copytree(store.run("good"), beside)
    last = worker(store, **tables)
    assert set(retry(store, last.asked)) == {first, found["late", 2]["stage"]}
    last.run()
    ends = {name: event for event, name, _ in last.events}
    assert ends == {first: "failed", found["late", 2]["stage"]: "published"}


def test_the_state_tells_who_is_at_work_since_when(store):
    made = worker(store, a=table())
    other = Leases(store.leases)
    before = other.now()
    lease = other.take(made.asked[0].stages[0].name)

    first, second, _ = rows(made)

    assert first["state"] == "at work" and first["by"] == f"{other.owner.host}:{os.getpid()}"
    assert before <= first["since"] <= other.now() and first["seconds"] >= 0
    assert second["state"] == "waits" and not second["behind"]
    lease.path.write_text("{")
    assert rows(made)[0]["by"] == "unknown"
    lease.give_back()
    assert rows(made)[0]["state"] == "ready"


def test_a_stage_that_takes_its_processes_with_it_fails_in_the_end(store):
    made = worker(store, a=table())
    name = made.asked[0].stages[0].name
    lease = Leases(store.leases).take(name)
    about = json.loads(lease.path.read_text())
    lease.path.write_text(json.dumps({**about, "deaths": DEATHS}))
    age(lease, 1000)

    made.run()

    assert [event for event, *_ in made.events] == ["failed"]
    assert f"{DEATHS + 1} processes in a row vanished" in rows(made)[0]["text"]
    again = worker(store, a=table())
    retry(store, again.asked)
    again.run()
    assert {row["state"] for row in rows(again)} == {"done"}


def test_strangers_in_the_folder_do_no_harm(store):
    """Half-written and hostile files wherever the queue looks."""
    made = worker(store, a=table())
    enqueue(store, made.asked)
    stages = made.asked[0].stages
    for place in ("failed", "log", "work", "aside", "leases", "store"):
        (store.folder / place).mkdir(exist_ok=True)
        (store.folder / place / "stray").write_bytes(b"\xff\x00")
    (store.folder / "log" / "x.jsonl").write_bytes(b'{"event": "published", "stage"\n[1]\n\xff\n"text"\n')
    (store.folder / "work" / f"{stages[0].name}.stranger").write_text("a file")
    (store.folder / "work" / f"{stages[0].name}.other").mkdir()
    (store.results / stages[1].name).mkdir()
    (store.results / stages[1].name / "stage.json").write_text("{")
    (store.folder / "runs" / "stray").write_text("")
    (store.folder / "failed" / f"{stages[2].name}.json").write_text("[")

    assert [row["state"] for row in rows(made)] == ["ready", "waits", "failed"]
    assert "`--retry`" in rows(made)[2]["text"]
    retry(store, made.asked)
    made.run()

    assert {row["state"] for row in rows(made)} == {"done"}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"steps": [{"number": 1}]}', '{"steps": [{"number": "x", "do": 1, "key": 2}]}']
)
def test_a_damaged_run_folder_is_told_by_name(store, text):
    store.run("a").mkdir(parents=True)
    (store.run("a") / "run.json").write_text(text)
    with pytest.raises(FileError, match=r"a/run\.json"):
        listed(store)


def test_no_step_leads_out_of_the_queue(store):
    store.run("a").mkdir(parents=True)
    (store.run("a") / "run.json").write_text('{"steps": [{"number": 1, "do": "../../x", "key": "k"}]}')
    with pytest.raises(FileError, match="outside of the queue"):
        listed(store)


def test_changed_data_or_code_are_noticed_before_anything_is_done_under_an_old_key(store):
    made = worker(store, a=table())
    runner = Runner(made.asked[0].recipe, store.results)
    with pytest.raises(UsageError, match="changed since it was planned"):
        runner.stage(1, "000000000000", store.folder / "work" / "x")
    with pytest.raises(FileError, match="is not finished, and step 3 needs it"):
        runner.stage(3, made.asked[0].stages[2].key, store.folder / "work" / "x")
