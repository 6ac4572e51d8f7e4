"""Trackers: what TensorBoard's own reader finds is what the run said; the run itself does not depend on them."""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false

import copy
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest

from secateur.core.errors import SecateurError
from secateur.engine.loop import Training
from secateur.engine.recipe import Recipe, TrainStep
from secateur.engine.runner import Runner
from secateur.engine.start import Listener
from secateur.engine.trackers import tracker

_spec = importlib.util.spec_from_file_location("loop_kit", pathlib.Path(__file__).with_name("loop_kit.py"))
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

needs_board = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None,
    reason="tensorboard is not installed: pip install 'secateur[tensorboard]'",
)


def points(out):
    """Every scalar under ``out/tensorboard`` by its name: pairs of step and value, read by TensorBoard's reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return {name: [(e.step, e.value) for e in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def expected(rows, offset=0):
    """The same from rows of figures; event files hold float32."""
    made = {}
    for row in rows:
        for name, value in row.items():
            if name != "step":
                made.setdefault(name, []).append((row["step"] + offset, float(np.float32(value))))
    return made


def recipe(*epochs):
    """Training steps of so many epochs, four optimizer steps each."""
    steps = [{"do": "train", "epochs": count, "lr": 0.05} for count in epochs]
    data = {"use": "digits", "batch": 10, "train": 40, "test": 20}
    return Recipe.from_table({"seed": 3, "model": {"use": "mlp", "widths": [8]}, "data": data, "step": steps})


@needs_board
def test_every_logged_value_is_in_the_event_file_and_training_is_the_same_without(tmp_path):
    said, made = [], tracker("tensorboard", tmp_path)

    def watch(figures):
        said.append(copy.deepcopy(figures))
        made.figures(figures)

    step = TrainStep(epochs=4, lr=0.1, clip=1.0)
    mirrored, alone = kit.mlp(), kit.mlp()
    Training(mirrored, kit.loader(), step, evaluate=lambda net: {"test/loss": 1 / 3}, watch=watch).fit()
    made.close()
    Training(alone, kit.loader(), step, evaluate=lambda net: {"test/loss": 1 / 3}).fit()

    found = points(tmp_path)
    assert found == expected(said)
    assert [step for step, _ in found["train/loss"]] == list(range(1, 13))
    assert found["test/loss"] == [(step, float(np.float32(1 / 3))) for step in (3, 6, 9, 12)]
    assert {"gradient_norm", "lr", "kept", "sparsity", "epoch"} <= found.keys()
    assert kit.same(mirrored.state_dict(), alone.state_dict())


@needs_board
def test_figures_that_are_no_number_arrive_as_such(tmp_path):
    made = tracker("tensorboard", tmp_path)
    made.figures({"step": 5, "a": math.nan, "b": math.inf, "c": 2**40})
    made.close()

    found = points(tmp_path)
    assert math.isnan(found["a"][0][1]) and found["b"] == [(5, math.inf)] and found["c"] == [(5, 2.0**40)]


@needs_board
@pytest.mark.parametrize("between", [False, True], ids=["one run", "the first step was done before"])
def test_later_training_steps_go_on_counting(tmp_path, between):
    """The second step's points come after those of the first, whether that was trained now or is found finished."""
    for steps in [(2,), (2, 3)] if between else [(2, 3)]:
        made = tracker("tensorboard", tmp_path)
        Runner(recipe(*steps), tmp_path, listener=made).run()
        made.close()

    rows = []
    for number, offset in ((1, 0), (2, 8)):
        lines = next(tmp_path.glob(f"{number}-train-*/metrics.jsonl")).read_text().splitlines()
        rows += [row | {"step": row["step"] + offset} for row in map(json.loads, lines) if "test/loss" in row]
    found = points(tmp_path)
    for name in ("test/loss", "test/accuracy"):
        assert found[name] == expected(rows)[name]
    assert [step for step, _ in found["train/loss"]] == list(range(1, 21))


@needs_board
def test_points_that_come_again_after_a_cut_replace_those_before_it(tmp_path):
    """Steps 1 to 7, cut; the checkpoint is of step 4, so 5 to 9 follow."""
    for value, steps in ((1.0, range(1, 8)), (2.0, range(5, 10))):
        made = tracker("tensorboard", tmp_path)
        for step in steps:
            made.figures({"step": step, "train/loss": value})
        made.close()

    assert points(tmp_path) == {"train/loss": [(s, 1.0) for s in range(1, 5)] + [(s, 2.0) for s in range(5, 10)]}


@needs_board
def test_without_a_figure_nothing_is_written(tmp_path):
    """As for plans, and runs whose steps are all done."""
    made = tracker("tensorboard", tmp_path / "out")
    made.begin(1, None, tmp_path, 10)
    made.end(1, None, {"steps": 10}, True)
    made.close()

    assert not (tmp_path / "out").exists()


@needs_board
def test_a_tracker_that_cannot_be_opened_is_one_clear_error(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")

    with pytest.raises(SecateurError, match=r"tensorboard cannot be opened for .*leave `--log` out"):
        tracker("tensorboard", tmp_path).figures({"step": 1, "train/loss": 1.0})


RANKS = """
import sys
from pathlib import Path
from secateur.engine import distributed
from secateur.engine.trackers import tracker

distributed.start()
made = tracker("tensorboard", Path(sys.argv[1]))
made.figures({"step": 1, "rank": distributed.rank()})
made.close()
distributed.barrier()
distributed.stop()
"""


@needs_board
@pytest.mark.processes
def test_of_two_processes_the_first_one_writes(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=120, env=quiet)

    assert done.returncode == 0, done.stderr[-6000:]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert points(tmp_path) == {"rank": [(1, 0.0)]}


def test_a_run_needs_no_tracker(tmp_path):
    """A listener that does nothing is the default."""
    runner = Runner(recipe(1), tmp_path / "out")

    assert type(runner.listener) is Listener
    assert (next(runner.run().glob("1-train-*")) / "card.json").is_file()
    assert not list(tmp_path.rglob("tensorboard"))


def test_an_unknown_name_is_told_the_known_ones(tmp_path):
    with pytest.raises(SecateurError) as told:
        tracker("wandb", tmp_path)

    assert "'wandb'" in str(told.value) and "`--log`" in str(told.value)
    known = re.search(r"known: ([^)]*)\)", str(told.value))
    assert known is not None and known[1].split(", ") == ["mlflow", "tensorboard", "trackio"]


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "trackio"])
def test_a_missing_package_is_told_with_the_extra_that_brings_it(tmp_path, monkeypatch, name):
    """Python itself refuses to import what is None in ``sys.modules``, installed or not."""
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)

    with pytest.raises(SecateurError, match=f"^{name} is not installed") as told:
        tracker(name, tmp_path)

    extra = re.search(r"pip install 'secateur\[(\w+)\]'", str(told.value))[1]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(wanted.startswith(name) for wanted in extras[extra])
    assert not list(tmp_path.iterdir())
