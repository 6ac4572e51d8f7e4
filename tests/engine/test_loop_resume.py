"""The training loop resumes to the bit from anywhere, and from nothing but its own whole checkpoint."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false

import copy
import importlib.util
import json
import pathlib

import pytest
import torch
from torch import nn

from secateur.core.errors import FileError, MaskError
from secateur.core.reading import Paper
from secateur.core.sockets import Rule
from secateur.core.streams import global_state
from secateur.engine.checkpoint import Metrics, load_state, read_metrics, save_state
from secateur.engine.loop import Training
from secateur.engine.recipe import TrainStep
from secateur.rules.gradual import Gradual

_spec = importlib.util.spec_from_file_location("loop_kit", pathlib.Path(__file__).with_name("loop_kit.py"))
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)
loader, busy, same = kit.loader, kit.busy, kit.same


class Stop(Exception):
    """A power cut."""


RUNS = {
    "momentum, dropout, BatchNorm": {"nesterov": True, "weight_decay": 1e-3, "clip": 1.0},
    "average": {"ema": 0.9},
    "adam, accumulating": {"optimizer": "adamw", "lr": 0.01, "accumulate": 2, "warmup": 1.0},
    "rmsprop, gradual pruning": {"optimizer": "rmsprop", "lr": 0.01, "rules": (Gradual(sparsity=0.8, updates=5),)},
    "mixed precision": {"amp": True, "schedule": "one-cycle"},
}


def run(folder, options, stop=None, every=0, net=None):
    """A run of 3 epochs of 4 batches (the last one smaller); cut after ``stop`` steps."""
    net = net or busy(torch.float32)

    def watch(figures):
        if stop is not None and figures["step"] > stop:
            raise Stop

    step = TrainStep(epochs=3, **{"lr": 0.1, **options}, save_every=every)
    training = Training(
        net, loader(3, 11, torch.float32), step, folder=folder, watch=watch,
        evaluate=lambda net: {"test/loss": 1.0},
        validate=lambda net: float(net.state_dict()["0.weight"].double().sum()),
    )  # fmt: skip
    masks = training.fit()
    return training, masks


def everything(training, folder):
    saved = load_state(folder)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(folder / "metrics.jsonl")]
    last = {k: v for k, v in saved.items() if k not in ("seconds", "metrics")}
    best = {"best": dict(sorted(training.best_state.items())), "best masks": dict(training.best_masks or {})}
    return {**last, **best, "result": training.model.state_dict(), "rows": rows, "random now": global_state()}


def alike(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(alike(a, b) for a, b in zip(one, other, strict=True))
    return one == other


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_run_resumes_to_the_bit_from_every_step(tmp_path, options):
    """Weights, averages, statistics, optimizer, masks, best checkpoint, metrics and random state, after any cut."""
    whole = everything(run(tmp_path / "whole", options)[0], tmp_path / "whole")
    per_epoch = 4 // options.get("accumulate", 1)

    for stop in range(1, 3 * per_epoch + 1):
        folder = tmp_path / str(stop)
        try:
            run(folder, options, stop, stop % per_epoch)
        except Stop:
            pass
        torch.manual_seed(99)
        other = busy(torch.float32)
        for tensor in other.state_dict().values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 7)
        again = everything(run(folder, options, net=other)[0], folder)
        for key in whole:
            assert alike(whole[key], again[key]), (stop, key)


def test_a_finished_run_is_not_trained_again(tmp_path):
    first, masks = run(tmp_path, RUNS["average"])
    state = copy.deepcopy(first.model.state_dict())

    second, again = run(tmp_path, RUNS["average"])

    assert again == masks and same(state, second.model.state_dict()) and second.run.step == 12


def test_the_best_checkpoint_is_one_of_the_sparsest(tmp_path):
    """Pruning at step 4 of 12: a better value of the dense network before it does not count."""
    values = iter([9.0, 1.0, 3.0])
    net = busy(torch.float32)
    step = TrainStep(epochs=3, lr=0.1, rules=(Gradual(sparsity=0.5, start=0.4, stop=0.5, updates=1),))
    training = Training(net, loader(3, 11, torch.float32), step, folder=tmp_path, validate=lambda net: next(values))
    masks = training.fit()

    assert training.best_masks == masks and masks.kept == masks.total // 2
    other = busy(torch.float32)
    other.load_state_dict(training.best_state)
    training.best_masks.check(other)
    assert same(training.best_state, net.state_dict())


def test_metrics_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    """Lines written after the checkpoint go, a torn one too; nothing comes twice."""
    try:
        run(tmp_path, {"clip": 1.0, "rules": (Chatty(),)}, stop=7, every=2)
    except Stop:
        pass
    path = tmp_path / "metrics.jsonl"
    steps = [row["step"] for row in read_metrics(path)]
    assert max(steps) == 8
    with open(path, "ab") as file:
        file.write(b'{"step": 999, "torn')

    run(tmp_path, {"clip": 1.0, "rules": (Chatty(),)})

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    per_step = [row["step"] for row in rows if "train/loss" in row]
    assert per_step == list(range(1, 13))
    assert [row["step"] for row in rows if "test/loss" in row] == [4, 8, 12]
    assert all("gradient_norm" in row and row["chatty"] == 1.0 for row in rows if "train/loss" in row)

    path.write_bytes(b'{"a": 1}\n{"b"')
    Metrics(path, keep=500).write(c=3)
    assert path.read_text() == '{"a": 1}\n{"c": 3}\n'


class Chatty(Rule):
    """Notes a figure in every step. Cost: none."""

    paper = Paper("none", "nobody", 2026, "", differs="in nothing known")

    def after_step(self, run):
        run.note("chatty", 1.0)


# Damaged and foreign checkpoints


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "flipped", "folder"])
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path, damage):
    """Any cut length and any flipped byte of the numbers is noticed, with what to do."""
    run(tmp_path, {"ema": 0.9})
    path = tmp_path / "state.pt"
    content = path.read_bytes()
    weight = load_state(tmp_path)["model"]["4.weight"].numpy().tobytes()
    place = content.index(weight)
    broken = {
        "empty": [b""],
        "cut": [content[: len(content) * k // 8] for k in range(1, 8)],
        "text": [b"not a checkpoint at all\n" * 50],
        "flipped": [
            content[:i] + bytes([content[i] ^ 16]) + content[i + 1 :] for i in (place, place + 30, place + 100)
        ],
        "folder": [],
    }[damage]
    if damage == "folder":
        path.unlink()
        path.mkdir()
        assert load_state(tmp_path) is None
    for text in broken:
        path.write_bytes(text)
        with pytest.raises(FileError, match=r"state\.pt is damaged .*Delete the folder .* to begin this step again"):
            run(tmp_path, {"ema": 0.9})


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    """Other options, same shapes: the message says that the checkpoint does not belong."""
    run(tmp_path, {})
    with pytest.raises(FileError, match="belongs to another network or other options"):
        run(tmp_path, {"ema": 0.5})
    wider = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 3))
    with pytest.raises((FileError, MaskError), match="another network"):
        run(tmp_path, {}, net=wider)


def test_states_come_back_as_they_were(tmp_path):
    """Every kind of entry, bfloat16, empty and scalar tensors included."""
    state = {
        "a": torch.randn(3, 2).bfloat16(), "b": {"c": torch.tensor(3), "d": [1, 2.5, None, "x", float("-inf")]},
        "e": torch.zeros(0), "f": (0.9, 0.999), "g": torch.ones(2, 3).bool(), 7: torch.randn(4, 4).T,
    }  # fmt: skip

    save_state(tmp_path, state)

    assert alike(load_state(tmp_path), state)
