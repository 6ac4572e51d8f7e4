"""A run that is killed or interrupted anywhere ends as one that was left alone: same weights, masks and figures."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from random import Random

import pytest
from safetensors.torch import load_file

RECIPE = """
seed = 4

[model]
use    = "mlp"
widths = [32, 16]

[data]
use   = "digits"
batch = 5
train = 400
test  = 200

[[step]]
do         = "train"
epochs     = 3
lr         = 0.05
save_every = 3

[[step]]
do         = "train"
epochs     = 3
lr         = 0.05
save_every = 3
rules      = [{ use = "gradual", sparsity = 0.9, updates = 40 }]

[[step]]
do = "measure"
"""


def start(folder):
    """The command line in a process of its own."""
    words = [sys.executable, "-m", "secateur.cli.main", "run", str(folder.parent / "recipe.toml"), "-o", str(folder)]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet)


def lines(folder, name=""):
    """Whole lines in the metrics of all steps, or of those whose folder begins with ``name``."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(f"{name}*/metrics.jsonl"))


def send_when(process, number, ready):
    """Send a signal as soon as ``ready()``; gives exit code, standard output and standard error."""
    deadline = time.monotonic() + 120
    try:
        while process.poll() is None and not ready():
            if time.monotonic() > deadline:
                raise AssertionError("the run got nowhere in two minutes")
            time.sleep(0.002)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    return process.returncode, out, err


def finish(folder):
    """Run to the end."""
    process = start(folder)
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err


def step(folder, number):
    """The folder of one step."""
    return next(folder.glob(f"{number}-*"))


def figures(folder):
    """The metrics of a step, wall-clock seconds left out."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def same_run(one, other):
    """Weights and masks of every step equal to the byte; metrics equal but for the clock; nothing left over."""
    assert sorted(p.name for p in one.glob("[0-9]*")) == sorted(p.name for p in other.glob("[0-9]*"))
    for number in (1, 2):
        first, second = step(one, number), step(other, number)
        for name in ("weights.safetensors", "masks.safetensors", "structure.json", "recipe.toml"):
            assert (first / name).read_bytes() == (second / name).read_bytes(), (number, name)
        assert figures(first) == figures(second)
        assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
    verdicts = [json.loads((step(folder, 3) / "verdict.json").read_text()) for folder in (one, other)]
    assert verdicts[0].keys() == verdicts[1].keys()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run that nobody touched."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    (folder.parent / "recipe.toml").write_text(RECIPE)
    finish(folder)
    return folder


@pytest.fixture
def out(tmp_path):
    """A run folder yet to be made, beside its recipe."""
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path / "out"


@pytest.mark.processes
def test_a_run_killed_again_and_again_ends_as_the_undisturbed_one(undisturbed, out):
    """SIGKILL early, between epochs, while pruning, and again in the run that goes on from there."""
    whole = lines(undisturbed)
    for share in (0.01, 0.15, 0.3, 0.5, 0.7):
        code, _, err = send_when(start(out), signal.SIGKILL, lambda share=share: lines(out) >= share * whole)
        assert code == -signal.SIGKILL, err
    assert not list(out.glob("3-*/card.json"))

    finish(out)

    same_run(undisturbed, out)


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_at_twenty_random_moments_ends_as_the_undisturbed_one(undisturbed, out, seed):
    """SIGKILL after random numbers of lines, in start-up where that is reached already: each goes on from the last."""
    random, whole = Random(seed), lines(undisturbed)
    for share in sorted(random.random() * 0.95 for _ in range(20)):
        code, _, err = send_when(start(out), signal.SIGKILL, lambda share=share: lines(out) >= share * whole)
        assert code == -signal.SIGKILL, err

    finish(out)

    same_run(undisturbed, out)


@pytest.mark.processes
def test_a_run_killed_between_two_steps_ends_as_the_undisturbed_one(undisturbed, out):
    """SIGKILL at the moment the first step is whole: it is not trained again."""
    code, _, err = send_when(start(out), signal.SIGKILL, lambda: bool(list(out.glob("1-*/card.json"))))
    assert code == -signal.SIGKILL, err
    made = step(out, 1) / "weights.safetensors"
    before = made.stat().st_mtime_ns

    finish(out)

    assert made.stat().st_mtime_ns == before
    same_run(undisturbed, out)


@pytest.mark.processes
def test_ctrl_c_keeps_what_was_done_and_says_how_to_go_on(undisturbed, out):
    """SIGINT while pruning: exit code 130, a checkpoint, no artefact; the next run ends as the undisturbed one."""
    code, shown, err = send_when(start(out), signal.SIGINT, lambda: lines(out, "2-") >= 5)

    assert code == 130, err
    assert "run the same command again" in err and "Traceback" not in err
    assert (step(out, 2) / "state.pt").is_file()
    assert not (step(out, 2) / "card.json").exists()
    assert not shown

    finish(out)
    same_run(undisturbed, out)


@pytest.mark.parametrize("further", [(), ("--json",)])
def test_finished_steps_are_skipped(call, undisturbed, tmp_path, further):
    """Running a finished recipe again writes no file of any step."""
    out = shutil.copytree(undisturbed, tmp_path / "out")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    before = {p: p.stat().st_mtime_ns for p in out.glob("[0-9]*/*")}
    assert len(before) >= 12

    code, _, err = call("run", tmp_path / "recipe.toml", "-o", out, *further)

    assert code == 0, err
    assert {p: p.stat().st_mtime_ns for p in out.glob("[0-9]*/*")} == before


def test_a_changed_step_is_run_anew_and_those_before_it_are_not(call, undisturbed, tmp_path):
    """Another target for step 2: step 1 is taken as it is, the old step 2 stays beside the new one."""
    out = shutil.copytree(undisturbed, tmp_path / "out")
    (tmp_path / "recipe.toml").write_text(
        RECIPE.replace("sparsity = 0.9", "sparsity = 0.8").replace("epochs     = 3", "epochs = 3")
    )
    before = {p: p.stat().st_mtime_ns for p in out.glob("[0-9]*/*")}

    code, _, err = call("run", tmp_path / "recipe.toml", "-o", out)

    assert code == 0, err
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert len(list(out.glob("1-*"))) == 1 and len(list(out.glob("2-*"))) == 2 and len(list(out.glob("3-*"))) == 2


def test_a_damaged_checkpoint_is_refused_by_name(call, undisturbed, tmp_path):
    """One changed byte of ``state.pt``: exit code 2 and what to delete, not a run from garbage."""
    out = shutil.copytree(undisturbed, tmp_path / "out")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    second = step(out, 2)
    (second / "card.json").unlink()
    (second / "state.pt").write_bytes(b"PK\x03\x04 not a checkpoint")

    code, _, err = call("run", tmp_path / "recipe.toml", "-o", out)

    assert code == 2, err
    assert "state.pt" in err and "Delete the folder" in err
    assert load_file(second / "weights.safetensors")
