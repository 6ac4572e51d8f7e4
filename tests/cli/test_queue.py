"""``secateur run --queue`` from the command line: what it says, its exit codes, and what it refuses."""

import json
import os
import signal
import threading
import time

import pytest

RECIPE = """
[model]
use = "mlp"
widths = [8]

[data]
use = "digits"
train = 60
test = 30
batch = 10

[[step]]
do = "train"
epochs = 1
lr = {lr}

[[step]]
do = "prune"
to = "sparsity {sparsity}"
"""


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe and gives its path."""

    def write(name, sparsity=0.5, lr=0.05):
        path = tmp_path / f"{name}.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(RECIPE.format(sparsity=sparsity, lr=lr))
        return path

    return write


@pytest.fixture
def queue(tmp_path):
    return tmp_path / "queue"


def lines(text):
    """The rows of the table: step, state and recipes."""
    rows = [line.split() for line in text.splitlines()[1:]]
    return [(" ".join(row[:2]), row[3], " ".join(row[-2:]).replace(row[3], "").strip()) for row in rows]


def test_two_recipes_share_their_first_step_and_the_table_says_so(call, recipe, queue):
    words = ["run", recipe("half"), recipe("most", 0.8), "--queue", queue]
    code, out, err = call(*words, "--dry-run")
    assert code == 0, err
    assert not queue.exists()
    assert [row[:2] for row in lines(out)] == [("1 train", "ready"), ("2 prune", "waits"), ("2 prune", "waits")]

    code, out, err = call(*words)

    assert code == 0, err
    assert [row[:2] for row in lines(out)] == [("1 train", "done"), ("2 prune", "done"), ("2 prune", "done")]
    assert out.splitlines()[1].endswith("half, most") and out.splitlines()[3].endswith("most")
    assert err.count("begins") == 3 and "1-train-" in err
    before = {p: p.stat().st_mtime_ns for p in queue.glob("store/*/*")}
    code, shown, err = call("run", "--queue", queue, "--status")
    assert code == 0 and shown == out and not err
    code, shown, err = call("run", "--queue", queue, "--json")  # without names: all recipes that it holds
    assert code == 0, err
    assert [(row["do"], row["state"], row["recipes"]) for row in json.loads(shown)["stages"]] == [
        ("train", "done", ["half", "most"]), ("prune", "done", ["half"]), ("prune", "done", ["most"]),
    ]  # fmt: skip
    assert {p: p.stat().st_mtime_ns for p in queue.glob("store/*/*")} == before
    code, out, err = call("report", queue / "runs" / "most")
    assert code == 0, err


def test_a_scheduler_that_ends_the_command_finds_it_gone_with_everything_kept(call, recipe, queue):
    """SIGTERM in the middle of a training: 130, its state saved, its lease given back."""
    path = recipe("a")
    path.write_text(path.read_text().replace("epochs = 1", "epochs = 100000"))
    heard = []  # here when the command itself does not listen
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("nobody minds"))

    def end():
        deadline = time.monotonic() + 200
        while not list(queue.glob("work/*/*/metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)
        if heard:
            os.kill(os.getpid(), signal.SIGINT)

    scheduler = threading.Thread(target=end)
    scheduler.start()
    try:
        code, _, err = call("run", path, "--queue", queue)
    finally:
        scheduler.join()
        signal.signal(signal.SIGTERM, before)

    assert code == 130 and "run the same command again" in err
    assert not heard
    assert len(list(queue.glob("work/*/1-train-*/state.pt"))) == 1
    assert [path.stat().st_mtime for path in queue.glob("leases/1-*")] == [0.0]


def test_a_failed_stage_ends_with_2_names_itself_and_is_tried_again_when_asked(call, recipe, queue):
    words = ["run", recipe("good"), recipe("bad", lr=1e12), "--queue", queue]

    code, out, err = call(*words)

    assert code == 2
    assert [row[1] for row in lines(out)] == ["done", "done", "failed", "waits"]
    assert "waits for a failed one (1)" in out
    assert "secateur: error: 1-train-" in err and "(bad): " in err and "--retry" in err and "Traceback" not in err
    again, shown, _ = call(*words)
    assert again == 2 and shown == out
    code, _, err = call(*words, "--retry")
    assert code == 2 and err.count("begins") == 1
    code, shown, _ = call("run", "--queue", queue, "--status", "--json")
    failed = [row for row in json.loads(shown)["stages"] if row["state"] == "failed"]
    assert code == 0 and len(failed) == 1 and failed[0]["kind"] == "refused" and failed[0]["text"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lease", "0"], "--lease is 0"),
        (["--lease", "-5"], "--lease is -5"),
        (["--lease", "nan"], "--lease is nan"),
        (["--workers", "0"], "--workers is 0"),
        (["-o", "somewhere"], "--out goes with one recipe"),
        (["--print-config"], "leave --queue out"),
        (["-s", "nothing=1"], "begin with model, data, seed or step.N"),
    ],
)
def test_flags_that_mean_nothing_are_refused_and_nothing_is_made(call, recipe, queue, words, told):
    code, _, err = call("run", recipe("a"), "--queue", queue, *words)
    assert code == 2 and told in err, err
    assert not queue.exists()


@pytest.mark.parametrize("flag", [["--status"], ["--retry"], ["--workers", "2"], ["--lease", "5"]])
def test_flags_of_queues_need_one(call, recipe, flag):
    code, _, err = call("run", recipe("a"), *flag)
    assert code == 2 and "--queue FOLDER" in err and flag[0] in err


def test_a_wrong_folder_is_told_by_name(call, recipe, queue, tmp_path):
    path = recipe("a")
    code, _, err = call("run", path, "--queue", path)
    assert code == 2 and "is a file" in err
    code, _, err = call("run", path, "--queue", tmp_path)
    assert code == 2 and "is not the folder of a queue" in err and "a.toml" in err
    code, _, err = call("run", "--queue", queue, "--status")
    assert code == 2 and "there is no queue" in err
    (tmp_path / "file").write_text("")
    code, _, err = call("run", path, "--queue", tmp_path / "file" / "below")
    assert code == 2 and "below" in err
    assert not queue.exists()


def test_an_empty_folder_has_an_empty_status_and_no_recipes(call, queue):
    queue.mkdir()
    code, out, err = call("run", "--queue", queue, "--status")
    assert code == 0 and "is empty" in out and not err
    code, out, _ = call("run", "--queue", queue, "--status", "--json")
    assert code == 0 and json.loads(out) == {"queue": str(queue), "stages": []}
    assert not list(queue.iterdir())
    code, _, err = call("run", "--queue", queue)
    assert code == 2 and "holds no recipes yet" in err


def test_recipes_that_are_missing_wrong_or_of_one_name_are_refused_before_anything_runs(call, recipe, queue, tmp_path):
    good = recipe("a")
    code, _, err = call("run", good, tmp_path / "absent.toml", "--queue", queue)
    assert code == 2 and "absent.toml" in err
    other = tmp_path / "other" / "a.toml"
    other.parent.mkdir()
    other.write_text(good.read_text())
    code, _, err = call("run", good, other, "--queue", queue)
    assert code == 2 and str(other) in err and "both called a" in err
    code, _, err = call("run", good, good, "--queue", queue)
    assert code == 2 and "both called a" in err
    broken = tmp_path / "broken.toml"
    broken.write_text(good.read_text().replace("epochs = 1", "epoch = 1"))
    code, _, err = call("run", good, broken, "--queue", queue)
    assert code == 2 and "epochs" in err
    assert not queue.exists()
    code, _, err = call("run", good, recipe("b"))
    assert code == 2 and "2 recipes are named" in err
    code, _, err = call("run")
    assert code == 2 and "no recipe is named" in err
