"""Networks and methods of the user's own: what does not fit is told before anything begins, and edits count."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false

import copy
import importlib
import json
import re
import sys
import textwrap

import pytest
import torch
from torch import nn

from secateur.cli.main import main
from secateur.core.errors import ModelError
from secateur.core.masks import Masks
from secateur.data import Dataset, Loader, Split
from secateur.engine.folder import Artefact
from secateur.engine.recipe import Recipe
from secateur.engine.runner import Runner
from secateur.engine.trial import check_fits

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.layer, self.change = nn.Linear(64, 10), change

    def forward(self, x):
        return self.change(self.layer(x.flatten(1)))

def vectors(): return nn.Linear(64, 10)
def narrow(): return nn.Sequential(nn.Flatten(), nn.Linear(63, 10))
def few(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
def double(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
def lazy(): return nn.Sequential(nn.Flatten(), nn.LazyLinear(12), nn.Linear(12, 10))
def normal(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.Linear(12, 10))
def images(): return nn.Sequential(nn.Conv2d(1, 10, 1), nn.AvgPool2d(8))
def pair(): return Net(lambda y: (y, y))
def nothing(): return Net(lambda y: None)
def whole(): return Net(lambda y: y.round().long())
def flat(): return Net(lambda y: y.flatten())
def fails(): return Net(lambda y: {}["absent"])
def wide(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 12))
"""
BAD = {
    "vectors": ["RuntimeError", "(1, 8, 8)", "10 classes"],
    "narrow": ["RuntimeError", "63x10", "inputs (128, 1, 8, 8) of torch.float32", "examples of shape (1, 8, 8)"],
    "few": ["its output is (128, 5)", "5 classes; the data have 10", "shape (128, 10)"],
    "double": ["torch.float64", "inputs (128, 1, 8, 8) of torch.float32", "`.float()`"],
    "lazy": ["`1.weight`", "Lazy"],
    "images": ["its output is (128, 10, 1, 1)", "shape (128, 10)"],
    "pair": ["returns tuple of 2", "the logits"],
    "nothing": ["returns NoneType", "the logits"],
    "whole": ["targets (128,) of torch.int64", "NotImplementedError"],
    "flat": ["its output is (1280,)", "shape (128, 10)"],
    "fails": ["KeyError: 'absent'"],
}
SMALL = ["-s", "data.train=100", "-s", "data.test=100"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with networks in it; modules are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_nets.py").write_text(NETS)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            del sys.modules[name]


def train(net, out, *more):
    """One epoch on the digits."""
    return main(["train", "--net", net, "--data", "digits", "--epochs", "1", "-o", str(out), *more])


@pytest.mark.parametrize("name", BAD)
def test_a_network_that_does_not_fit_is_told_with_shapes_and_cure(here, capsys, name):
    """Exit code 2 and one error; the run folder is not even made."""
    assert train(f"own_nets:{name}", here / "out") == 2

    said = capsys.readouterr().err
    assert said.count("secateur: error:") == 1 and "Traceback" not in said
    for words in BAD[name]:
        assert words in said
    assert name == "lazy" or f"own_nets:{name}" in said
    assert not (here / "out").exists()


def test_more_outputs_than_classes_are_allowed(here):
    assert train("own_nets:wide", here / "out", *SMALL) == 0


def test_a_last_batch_of_one_example_is_told(here, capsys):
    """101 examples in batches of 50: BatchNorm cannot train on the last one; batches of 51 leave 50."""
    assert train("own_nets:normal", here / "out", "-s", "data.train=101", "-s", "data.batch=50") == 2
    said = capsys.readouterr().err
    assert "inputs (1, 1, 8, 8)" in said and "choose another `data.batch`" in said
    assert train("own_nets:normal", here / "out", "-s", "data.train=101", "-s", "data.batch=51") == 0


# Captured networks


def captured(path):
    torch.manual_seed(0)
    model, example = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), torch.randn(4, 1, 8, 8)
    torch.export.save(torch.export.export(model, (example,)), path)
    return model, example


def test_a_network_captured_for_one_batch_size_is_told_and_the_advice_works(here, capsys):
    """What the message says to type makes a file that trains, is pruned and measured."""
    path = str(here / "net.pt2")
    model, example = captured(path)
    assert train(path, here / "out") == 2
    said = capsys.readouterr().err
    assert "AssertionError" in said and "inputs (128, 1, 8, 8)" in said and "Traceback" not in said
    advice = re.search(r"torch\.export\.save\(.*path\)", said)

    exec(advice[0], {"torch": torch, "model": model, "example": example, "path": path})

    assert train(path, here / "out", *SMALL) == 0
    assert main(["prune", str(here / "out"), "--to", "sparsity 0.5", "-o", str(here / "pruned")]) == 0


def test_a_network_captured_for_the_very_size_it_meets_is_allowed(here, capsys):
    """Every batch of training and of evaluation has 4 examples; the one that is timed has not."""
    path = str(here / "net.pt2")
    captured(path)
    sizes = [*SMALL, "-s", "data.batch=4", "-s", "data.evaluation_batch=4"]
    assert train(path, here / "out", *sizes) == 0
    card = json.loads(next((here / "out").glob("1-train-*/card.json")).read_text())
    assert "a batch of one example fails" in card["training_macs"]["why"]
    assert main(["measure", str(here / "out"), "-o", str(here / "measured")]) == 2
    assert "inputs (1, 1, 8, 8)" in capsys.readouterr().err


# The trial leaves no trace


class Busy(nn.Module):
    """State of every kind: statistics, dropout, a counter, a buffer that is replaced, power iterations, odd modes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8))
        self.norm, self.still, self.drop = nn.BatchNorm1d(8), nn.BatchNorm1d(8).eval(), nn.Dropout(0.5)
        self.head, self.passes, self.seen = nn.Linear(8, 3), 0, []
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        self.last = x
        self.total = self.total + 1
        out = self.head(self.drop(self.still(self.norm(self.layer(x)))))
        self.seen.append((self.passes, self.training, len(x), self.norm.running_mean.clone(), float(torch.rand(()))))
        return out


def test_a_trial_leaves_no_trace():
    """Weights, buffers, modes, attributes and random numbers are as before, though the passes changed them."""
    torch.manual_seed(3)
    net = Busy()
    net(torch.randn(5, 6))
    net.seen.clear()
    state, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    passes, last, total = net.passes, net.last, net.total
    x = torch.randn(9, 6)
    data = Dataset("own", Split(x, torch.arange(9) % 3), Split(x, torch.arange(9) % 3), tuple("abc"), "features")
    recipe = Recipe.from_table({"model": {"use": "own:net"}, "step": [{"do": "train"}, {"do": "measure"}]})
    random = torch.get_rng_state()

    check_fits(recipe, data, net)

    assert [row[:3] for row in net.seen] == [
        (passes + 1, False, 2), (passes + 2, True, 2), (passes + 3, True, 3), (passes + 4, False, 1),
    ]  # fmt: skip
    assert not torch.equal(net.seen[1][3], state["norm.running_mean"])
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in net.modules()] == modes
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert net.passes == passes and net.last is last and net.total is total
    assert all(p.grad is None for p in net.parameters())


def test_a_trial_that_fails_leaves_no_trace_either():
    net, x = Busy(), torch.randn(9, 6)
    state, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    data = Dataset("own", Split(x, torch.arange(9) % 4), Split(x, torch.arange(9) % 4), tuple("abcd"), "features")

    with pytest.raises(ModelError, match=r"its output is \(9, 3\) .* 3 classes; the data have 4"):
        check_fits(Recipe.from_table({"step": [{"do": "train"}]}), data, net)

    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert net.passes == 0 and torch.equal(torch.get_rng_state(), random)


# Edits of own files

FILES = {
    "own_net": """
        from torch import nn
        def net():
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
        """,
    "own_data": """
        import torch
        def load():
            x = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
            return (x, torch.arange(40) % 10), (x[:20], torch.arange(20) % 10)
        """,
    "own_scores": """
        from dataclasses import dataclass
        from secateur import Criterion, Paper
        @dataclass(frozen=True)
        class Mine(Criterion):
            paper = Paper("none", "nobody", 2026, "", differs="in nothing known")
            needs = frozenset({"data-free"})
            def __call__(self, task, masks):
                return {name: task.params()[name].detach().abs() for name in masks}
        """,
}
RECIPE = {
    "model": {"use": "own_net:net"}, "data": {"use": "own_data:load"},
    "step": [{"do": "train", "epochs": 1}, {"do": "prune", "to": "sparsity 0.5", "criterion": "own_scores:Mine"},
             {"do": "measure"}],
}  # fmt: skip


def write(folder, name, text):
    """A module with this text, which Python will read anew."""
    (folder / f"{name}.py").write_text(textwrap.dedent(text))
    sys.modules.pop(name, None)
    importlib.invalidate_caches()


def keys(folder):
    return [row["key"] for row in Runner(Recipe.from_table(RECIPE), folder / "out").plan()]


@pytest.fixture
def own(here):
    """A working folder with network, data and criterion of its own."""
    for name, text in FILES.items():
        write(here, name, text)
    return here


@pytest.mark.parametrize(("name", "first"), [("own_net", 0), ("own_data", 0), ("own_scores", 1)])
def test_an_edit_counts_from_the_first_step_that_uses_the_file(own, name, first):
    """Keys before it stay, so what was done stays done; the old text gives the old keys."""
    before = keys(own)

    write(own, name, FILES[name] + "        # edited\n")
    after = keys(own)

    assert [one == other for one, other in zip(before, after, strict=True)] == [place < first for place in range(3)]
    write(own, name, FILES[name])
    assert keys(own) == before


def test_the_step_is_done_anew_with_the_edited_criterion(own):
    """The largest weights stay; after the edit the smallest do. The network is not trained again."""
    Runner(Recipe.from_table(RECIPE), own / "out").run()
    trained = Artefact.open(next((own / "out").glob("1-train-*")))
    weights = trained.state()
    first = {p.name: Artefact.open(p).masks() for p in (own / "out").glob("2-prune-*")}

    write(own, "own_scores", FILES["own_scores"].replace(".abs()", ".abs().neg().exp()"))
    Runner(Recipe.from_table(RECIPE), own / "out").run()

    both = {p.name: Artefact.open(p).masks() for p in (own / "out").glob("2-prune-*")}
    assert len(first) == 1 and len(both) == 2 and len(list((own / "out").glob("1-train-*"))) == 1
    (largest,), (smallest,) = first.values(), [masks for name, masks in both.items() if name not in first]
    assert smallest == Masks({name: ~mask for name, mask in largest.items()})
    least = min(float(weights[name][mask].abs().min()) for name, mask in largest.items())
    assert least >= max(float(weights[name][mask].abs().max()) for name, mask in smallest.items())


def test_a_captured_network_counts_by_its_content(own):
    table = {**RECIPE, "model": {"use": str(own / "net.pt2")}}
    found = []
    for content in (b"one", b"two", b"one"):
        (own / "net.pt2").write_bytes(content)
        found.append([row["key"] for row in Runner(Recipe.from_table(table), own / "out").plan()])

    assert found[0] == found[2] and not set(found[0]) & set(found[1])


def test_keys_of_what_comes_with_the_library_are_those_of_the_recipe(tmp_path):
    """Results of networks and methods of this library stay valid whatever lies in the working folder."""
    table = {"model": {"use": "mlp"}, "data": {"use": "blobs"}, "step": [{"do": "train", "rules": ["gradual"]}]}
    runner = Runner(Recipe.from_table(table), tmp_path)
    data = runner.data()

    assert [row["key"] for row in runner.plan()] == runner.recipe.keys(f"{data.digest}/")


def test_the_loader_gives_the_trial_what_training_gets(own):
    """Scaling included: the trial's first example is that of the data, normalised."""
    seen = []
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.arange(24, dtype=torch.uint8).view(6, 1, 2, 2)
    split = Split(x, torch.arange(6) % 2)
    data = Dataset("own", split, split, ("a", "b"), "image", (0.25,), (0.5,))

    check_fits(Recipe.from_table({"step": [{"do": "train"}]}), data, net)

    whole = next(iter(Loader(split, 6, mean=data.mean, std=data.std)))[0]
    assert seen and all(torch.equal(batch, whole[: len(batch)]) for batch in seen)
