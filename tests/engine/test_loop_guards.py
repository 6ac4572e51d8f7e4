"""What guards a training run: other options than a checkpoint's, zeros that are there, figures read late."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false

import copy
import importlib.util
import json
import math
import pathlib
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import nn

import secateur
from secateur.core.errors import DataError, FileError
from secateur.core.masks import Masks
from secateur.core.names import parameters
from secateur.engine.checkpoint import Metrics, asked_of, check_asked, load_state
from secateur.engine.figures import Figures
from secateur.engine.loop import Training
from secateur.engine.recipe import TrainStep
from secateur.rules.gradual import Gradual

_spec = importlib.util.spec_from_file_location("loop_kit", pathlib.Path(__file__).with_name("loop_kit.py"))
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)
loader, mlp, busy, half, same = kit.loader, kit.mlp, kit.busy, kit.half, kit.same


# The same folder with other options


def batches(count=3, size=4):
    torch.manual_seed(0)
    return [(torch.randn(size, 6, dtype=torch.float64), torch.arange(size) % 3) for _ in range(count)]


def brier(output, target):
    return (output.softmax(1) - nn.functional.one_hot(target, 3)).square().mean()


RULE = Gradual(sparsity=0.5, updates=2)
OTHERS = {
    "epochs and rules": (
        {"epochs": 10, "rules": [RULE]}, ["`epochs` is 10, there it is 3", "`rules` is [{", "there it is []"],
    ),
    "an option of a rule": (
        {"rules": [Gradual(sparsity=0.6, updates=2)]}, ["`rules.1.sparsity` is 0.6, there it is 0.5"],
    ),
    "seed": ({"seed": 8}, ["`seed` is 8, there it is 0"]),
    "loss": ({"loss": brier}, ['`loss` is "brier", there it is not given']),
    "masks": ({"masks": half}, ["`masks` is", "there it is not given"]),
    "batches": ({"data": batches(5)}, ["`batches` is 5, there it is 3"]),
    "batch size": ({"data": loader(6, 18)}, ["`data.batch` is 6, there it is 4"]),
    "order": ({"data": loader(drop_last=True)}, ["`data.drop_last` is true, there it is false"]),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_is_not_gone_on_with_under_other_options(tmp_path, name):
    """The error names what differs, with both values, and nothing else; the network is not touched."""
    more, says = OTHERS[name]
    data = loader() if name in ("batch size", "order") else batches()
    first = {"data": data, "epochs": 3, "lr": 0.1, **({"rules": [RULE]} if name == "an option of a rule" else {})}
    masks = secateur.train(mlp(), folder=tmp_path, **first)
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    if "masks" in more:
        more = {"masks": half(net)}

    with pytest.raises(FileError, match="belongs to another network or other options") as told:
        secateur.train(net, folder=tmp_path, **{**first, **more})

    for words in says:
        assert words in str(told.value)
    named = {"epochs", "rules"} if name == "epochs and rules" else {says[0].split("`")[1]}
    assert {word.split("`")[0] for word in str(told.value).split("; `")[1:]} | {says[0].split("`")[1]} == named
    assert same(net.state_dict(), before)
    assert secateur.train(net, folder=tmp_path, **first) == masks


def test_how_often_checkpoints_are_written_may_change(tmp_path):
    one, other = mlp(), mlp()
    secateur.train(one, batches(), folder=tmp_path, epochs=3, save_every=2)

    secateur.train(other, batches(), folder=tmp_path, epochs=3)

    assert same(one.state_dict(), other.state_dict())


def test_an_option_younger_than_the_checkpoint_is_no_difference_at_its_default(tmp_path):
    asked = asked_of(TrainStep(epochs=3), loader())
    saved = {name: fact for name, fact in asked.items() if name != "compact_state"}

    check_asked(tmp_path, saved, asked)
    with pytest.raises(FileError, match="`compact_state` is true, there it is not given"):
        check_asked(tmp_path, saved, asked_of(TrainStep(epochs=3, compact_state=True), loader()))
    with pytest.raises(FileError, match="`epochs` is 4"):
        check_asked(tmp_path, saved, asked_of(TrainStep(epochs=4), loader()))


# Zeros that are there


def pruned(net, to="sparsity 0.5"):
    task = secateur.Task(net, secateur.CrossEntropy(), batches())
    return secateur.prune(task, to, optimizer=torch.optim.SGD(net.parameters(), 0.1))


def test_a_pruned_network_stays_pruned_without_a_word_about_masks():
    """Pruned in Python, trained without its masks: the same zeros at the end, and a warning where it was called."""
    net = mlp()
    cut = pruned(net)

    with pytest.warns(UserWarning, match=rf"{cut.masks.total - cut.masks.kept:,} zero weights.*stay zero") as told:
        masks = secateur.train(net, batches(), epochs=2)

    assert masks == cut.masks and len(told) == 1
    cut.masks.check(net)
    given = mlp()
    pruned(given)
    secateur.train(given, batches(), epochs=2, masks=cut.masks)
    assert same(given.state_dict(), net.state_dict())


def test_the_warning_points_at_the_call(tmp_path):
    """In a program of its own: the type checks of these tests are further calls in between."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
        import torch, secateur
        net = torch.nn.Linear(4, 4)
        torch.nn.init.eye_(net.weight)
        data = [(torch.randn(2, 4), torch.tensor([0, 1]))]
        secateur.train(net, data, epochs=1)  # here
    """)
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    assert "program.py:6: UserWarning: the network holds 12 zero weights" in done.stderr
    assert "secateur.train(net, data, epochs=1)  # here" in done.stderr


def test_rules_go_on_from_the_zeros_that_are_there():
    net = mlp()
    cut = pruned(net)

    with pytest.warns(UserWarning, match="taken as pruned"):
        masks = secateur.train(net, batches(), epochs=2, rules=[Gradual(sparsity=0.8, updates=2)])

    assert masks.kept == masks.total - masks.total * 8 // 10 and (masks & cut.masks) == masks


def test_zeros_of_another_kind_are_not_taken_for_pruned():
    """A layer that starts at zero, less than one weight in a hundred, and masks that say so: all of it may grow."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = nn.Sequential(nn.Linear(6, 100, bias=False), nn.Tanh(), nn.Linear(100, 3)).double()
        with torch.no_grad():
            net[2].weight.zero_()
            net[0].weight.view(-1)[: 8 * 70 : 70] = 0
        masks = secateur.train(net, batches(), epochs=2)
        assert masks.kept == masks.total == 900 and net[2].weight.ne(0).all() and net[0].weight.ne(0).all()

        other = mlp()
        pruned(other).hold.release()
        dense = Masks.dense(other)
        assert secateur.train(other, batches(), epochs=2, masks=dense) == dense
        assert all(parameters(other)[name].ne(0).all() for name in dense)


def test_beside_a_layer_that_starts_at_zero_pruned_weights_stay_so():
    net = nn.Sequential(nn.Linear(6, 100, bias=False), nn.Tanh(), nn.Linear(100, 3)).double()
    with torch.no_grad():
        net[2].weight.zero_()
        net[0].weight.view(-1)[: 9 * 66 : 66] = 0

    with pytest.warns(UserWarning, match="holds 9 zero weights"):
        masks = secateur.train(net, batches(), epochs=2)

    assert masks.counts() == {"0.weight": 591, "2.weight": 300}
    assert int(net[0].weight.eq(0).sum()) == 9 and net[2].weight.ne(0).all()


# Figures read late


class Late(Training):
    """Reads numbers when it would on a device that the processor does not wait for."""

    def _prepare(self):
        super()._prepare()
        self._late = True


RUNS = {
    "clipped": {"clip": 1.0, "lr": 0.1},
    "accumulating, average": {"accumulate": 2, "ema": 0.9, "optimizer": "adamw", "lr": 0.01},
    "pruning": {"lr": 0.1, "rules": (Gradual(sparsity=0.8, updates=5),)},
}


def fit(kind, folder, every=0, loss=None, **options):
    said, net = [], busy(torch.float32)
    data = loader(3, 71, torch.float32)  # 24 steps an epoch
    made = kind(net, data, TrainStep(epochs=2, save_every=every, **options), folder=folder, loss=loss,
                evaluate=lambda net: {"test/loss": 1.0}, watch=lambda row: said.append(dict(row)))  # fmt: skip
    return made, said


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_figures_read_late_are_the_same(tmp_path, options):
    """Weights, metrics file and all that is watched, in the same order; checkpoints between two readings included."""
    now, early = fit(Training, tmp_path / "now", 7, **options)
    then, late = fit(Late, tmp_path / "then", 7, **options)
    now.fit()
    then.fit()

    assert same(now.model.state_dict(), then.model.state_dict())
    assert rows(tmp_path / "now") == rows(tmp_path / "then")
    assert early == late and [row["step"] for row in late if "train/loss" in row] == list(range(1, now.run.total + 1))
    assert all(type(value) in (int, float) for row in late for value in row.values())


def test_figures_read_late_come_ten_at_a_time_and_before_every_checkpoint(tmp_path):
    """When the listener hears of a step, and how long the metrics file is in the checkpoint."""
    made, said = fit(Late, tmp_path, 7, lr=0.1)
    heard, saved = [], []
    made.watch = lambda row: heard.append(made.run.step)
    checkpoint = made._checkpoint

    def watched():
        checkpoint()
        state = load_state(tmp_path)
        saved.append((state["step"], state["metrics"] == (tmp_path / "metrics.jsonl").stat().st_size, len(heard)))

    made._checkpoint = watched
    made.fit()

    # (when, how many rows): the first epoch ends at 24, the second at 48, each with a row of its own
    heard_at = [(7, 7), (10, 3), (14, 4), (20, 6), (21, 1), (24, 3 + 1)]
    heard_at += [(30, 6), (31, 1), (38, 7), (40, 2), (45, 5), (48, 3 + 1)]
    assert heard == [step for step, count in heard_at for _ in range(count)]
    assert [step for step, _, _ in saved] == [7, 14, 21, 24, 31, 38, 45, 48]
    assert all(fits for _, fits, _ in saved)
    assert [count - (step > 23) - (step > 47) for step, _, count in saved] == [step for step, _, _ in saved]


@pytest.mark.parametrize(("at", "every", "kept", "heard"), [(15, 0, 0, 10), (15, 4, 12, 12), (23, 0, 0, 20)])
def test_a_loss_that_is_not_finite_is_noticed_late_but_kept_nowhere(tmp_path, at, every, kept, heard):
    """The error names the first such step; neither checkpoint nor metrics file holds a figure from then on."""

    def explode(output, target):
        loss = nn.functional.cross_entropy(output, target)
        return loss * float("nan") if made.run.step == at else loss

    made, said = fit(Late, tmp_path, every, explode, lr=0.1)

    with pytest.raises(DataError, match=rf"the loss became nan at step {at} \(epoch 1\)\. Lower `lr` \(0\.1\)"):
        made.fit()

    assert at < made.run.step <= at + 10
    assert len(said) == heard and all(math.isfinite(row["train/loss"]) for row in said)
    state = load_state(tmp_path)
    assert (state["step"] if state else 0) == kept
    assert state is None or all(value.isfinite().all() for value in state["model"].values())
    assert all(math.isfinite(row["train/loss"]) for row in rows(tmp_path))


def test_numbers_are_read_exactly(tmp_path):
    """float32, bfloat16 and one-element tensors as Python's floats, NaN and infinity too; order and names stay."""
    tensors = [torch.tensor(1 / 3), torch.tensor(0.1).bfloat16(), torch.tensor([2.5], dtype=torch.float64)]
    tensors += [torch.tensor(math.inf), torch.tensor(math.nan)]
    seen = []
    figures = Figures(Metrics(tmp_path / "metrics.jsonl"), seen.append)
    for step, tensor in enumerate(tensors):
        figures.add({"step": step, "a": tensor, "b": 0.5}, write=step % 2 == 0)

    figures.send()
    figures.send()

    assert [row["step"] for row in seen] == [0, 1, 2, 3, 4] and all(list(row) == ["step", "a", "b"] for row in seen)
    assert [row["a"] for row in seen][:4] == [float(tensor) for tensor in tensors[:4]] and math.isnan(seen[4]["a"])
    assert [row["step"] for row in rows(tmp_path)] == [0, 2, 4]
