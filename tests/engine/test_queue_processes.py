"""Queues with real processes, killed, stopped and interrupted: each stage is published once, results are equal."""

import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import tomllib
from random import Random

import pytest
import torch

from secateur.engine.queue_leases import Leases
from secateur.engine.queue_store import Store, publications
from secateur.engine.queue_work import Worker, listed, plan, states
from secateur.engine.recipe import Recipe
from secateur.engine.runner import Runner

pytestmark = [
    pytest.mark.processes,
    pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export:UserWarning"),
]

HEAD = """
[model]
use = "mlp"
widths = [24, 12]

[data]
use = "digits"
train = 200
test = 100
batch = {batch}

[[step]]
do = "train"
epochs = {epochs}
lr = 0.05
save_every = 5

"""
PRUNED = """
[[step]]
do = "prune"
to = "sparsity {sparsity}"

[[step]]
do = "rewind"

[[step]]
do = "train"
epochs = 2
lr = 0.05
save_every = 5
"""
LAST = {
    "a": '[[step]]\ndo = "measure"\nprobes = ["calibration"]\n',
    "b": '[[step]]\ndo = "export"\nformats = ["plan", "safetensors"]\n',
    "c": '[[step]]\ndo = "train"\nepochs = 2\n',
    "d": '[[step]]\ndo = "prune"\nto = "sparsity 0.95"\n',
}
STAGES = 20


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipes(folder):
    """One training for all, five prunings of it, each set back and trained; four of these go on: 20 stages."""
    places = []
    for name, sparsity in zip("abcde", (0.5, 0.6, 0.7, 0.8, 0.9), strict=True):
        text = HEAD.format(batch=20, epochs=4) + PRUNED.format(sparsity=sparsity) + LAST.get(name, "")
        places.append(folder / f"{name}.toml")
        places[-1].write_text(text)
    return places


def recipe(path):
    return Recipe.from_table(tomllib.loads(path.read_text()))


def start(folder, places, *more):
    """The command line in a process of its own."""
    words = [sys.executable, "-m", "secateur.cli.main", "run", *map(str, places), "--queue", str(folder), *more]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet)


def until(condition, processes=(), seconds=400):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.002)
    return found


def ended(process):
    try:
        out, err = process.communicate(timeout=400)
    finally:
        process.kill()
        process.wait()
    return process.returncode, out, err


def events(folder, *kinds, pid=None):
    rows = Store(folder).events()
    return [row for row in rows if row["event"] in kinds and pid in (None, row["pid"])]


def at_work(folder, pid):
    """Whether the last word of a process is that it began a stage."""
    rows = [row for row in Store(folder).events() if row["pid"] == pid]
    return bool(rows) and rows[-1]["event"] == "begun"


def digests(run):
    """Of weights and masks of every step."""
    files = sorted(run.glob("[0-9]*/*.safetensors"))
    kept = [path for path in files if path.name in ("weights.safetensors", "masks.safetensors", "network.safetensors")]
    return {f"{p.parent.name}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


def check(folder, places, serial):
    """Every stage once in the store and in the logs, nothing left over; networks equal to those of ordinary runs."""
    store = Store.open(folder, make=False)
    stages = {stage.name for chained in listed(store).values() for stage in chained}
    assert {path.name for path in store.results.iterdir()} == stages
    assert {name: len(found) for name, found in publications(store.events(), store).items()} == dict.fromkeys(stages, 1)
    leases = Leases(store.leases)
    rows = states(store, leases, listed(store))
    assert len(rows) == len(stages) and {row["state"] for row in rows} == {"done"}
    assert not list((folder / "work").iterdir()) and not any(map(leases.seen, stages))
    for path in places:
        assert digests(store.run(path.stem)) == digests(serial / path.stem)
        assert all(row["done"] for row in json.loads((store.run(path.stem) / "run.json").read_text())["steps"])
    return stages


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    """The same recipes, one after the other, in this process."""
    folder = tmp_path_factory.mktemp("serial")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for path in recipes(folder):
        Runner(recipe(path), folder / path.stem).run()
    torch.set_num_threads(before)
    return folder


def test_twenty_stages_four_processes_two_of_them_killed(serial, tmp_path):
    """SIGKILL after random numbers of stages, at work: the two that are left finish, and nothing is there twice."""
    random, folder, places = Random(7), tmp_path / "queue", recipes(tmp_path)
    store = Store.open(folder)
    gate = Leases(store.leases).take(plan("a", recipe(places[0]), store, None).stages[0].name)
    with gate:  # nothing begins before all four are there
        four = [start(folder, places, "--lease", "20") for _ in range(4)]
        until(lambda: len(events(folder, "came")) == 4, four)
    gate.give_back()
    killed = random.sample(four, 2)
    for process, (least, most) in zip(killed, ((0, 5), (6, 12)), strict=True):
        count = random.randint(least, most)
        until(lambda count=count: len(events(folder, "published")) >= count)
        until(lambda process=process: at_work(folder, process.pid), [process])
        process.kill()
        process.communicate()
    done = [ended(process) for process in four if process not in killed]

    assert [code for code, *_ in done] == [0, 0], done
    assert len(check(folder, places, serial)) == STAGES
    assert [process.returncode for process in killed] == [-signal.SIGKILL] * 2
    begun = [row["stage"] for row in events(folder, "begun")]
    assert STAGES <= len(begun) <= STAGES + 2, "done once, unless its worker was killed"
    assert len({row["pid"] for row in events(folder, "published")}) > 1, "work was shared out"


def long(folder):
    """One long training, with checkpoints."""
    places = [folder / "long.toml"]
    places[0].write_text(HEAD.format(batch=4, epochs=5) + PRUNED.format(sparsity=0.5))
    return places


def alone(folder, places):
    Runner(recipe(places[0]), folder / "serial" / "long").run()
    return folder / "serial"


def steps(folder):
    """Whole lines of metrics written so far."""
    return sum(path.read_bytes().count(b"\n") for path in (folder / "work").glob("1-*/1-*/metrics.jsonl"))


def test_a_process_that_only_slept_finds_its_stage_taken_and_leaves_no_trace(tmp_path):
    """Stopped in the middle, thought dead, woken after another one has gone on from its checkpoint to the end."""
    folder, places = tmp_path / "queue", long(tmp_path)
    sleeper = start(folder, places, "--lease", "5")
    try:
        until(lambda: steps(folder) > 5, [sleeper])
        sleeper.send_signal(signal.SIGSTOP)
        lease = next((folder / "leases").glob("1-*"))
        os.utime(lease, (1.0, 1.0))
        store = Store.open(folder)
        Worker(store, Leases(store.leases), [plan("long", recipe(places[0]), store, None)], None).run()
        sleeper.send_signal(signal.SIGCONT)
        code, _, err = ended(sleeper)
    finally:
        sleeper.kill()
        sleeper.wait()

    assert code == 0, err
    assert len(check(folder, places, alone(tmp_path, places))) == 4
    assert events(folder, "lost", pid=sleeper.pid) and not events(folder, "published", pid=sleeper.pid)
    assert [row["resumed"] for row in events(folder, "begun", pid=os.getpid())][0] is True


def test_ctrl_c_gives_everything_back_and_the_same_command_goes_on(tmp_path):
    """Two workers of one command: exit code 130, no lease held, a checkpoint kept; then one of them is killed too."""
    folder, places = tmp_path / "queue", long(tmp_path)
    process = start(folder, places, "--workers", "2")
    until(lambda: steps(folder) > 5, [process])
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)

    assert code == 130, err
    assert "run the same command again" in err and "Traceback" not in err
    store = Store.open(folder, make=False)
    first = {row["pid"] for row in events(folder, "came")}
    leases = Leases(store.leases)
    assert all(leases.seen(stage.name) is None for stage in listed(store)["long"])
    assert len(list((folder / "work").glob("1-*/1-*/state.pt"))) == 1
    assert [row["event"] for row in store.events() if row["event"] != "came"] == ["begun", "interrupted"]

    before = len(events(folder, "begun"))
    process = start(folder, places, "--workers", "2", "--json")
    until(lambda: len(events(folder, "begun")) > before, [process])
    worker = next(row["pid"] for row in events(folder, "begun") if row["pid"] not in first)
    os.kill(worker, signal.SIGKILL)
    code, out, err = ended(process)

    assert code == 0, err
    assert len({row["pid"] for row in events(folder, "came")} - first) == 3, "another one took its place"
    assert {row["state"] for row in json.loads(out)["stages"]} == {"done"}
    assert len(check(folder, places, alone(tmp_path, places))) == 4
    resumed = [row["resumed"] for row in events(folder, "begun") if row["stage"].startswith("1-")]
    assert resumed.count(False) == 1 and resumed.count(True) in (1, 2)


def test_workers_end_with_the_process_that_started_them(tmp_path):
    """Its death closes their input: they give their stages back, and none goes on alone."""
    folder, places = tmp_path / "queue", long(tmp_path)
    process = start(folder, places, "--workers", "2")
    until(lambda: steps(folder) > 5, [process])
    worker = events(folder, "begun")[0]["pid"]
    process.kill()
    process.communicate()

    until(lambda: not pathlib.Path(f"/proc/{worker}").exists() or _ended(worker))

    assert [row["event"] for row in Store(folder).events() if row["event"] != "came"] == ["begun", "interrupted"]


def _ended(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True
