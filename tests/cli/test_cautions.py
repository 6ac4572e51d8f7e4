"""What ``secateur prune`` tells of shaky ground, on the screen and in the card, and what it refuses with a cure."""

import importlib
import re
import sys

import pytest

from secateur.cli.main import main
from secateur.engine.folder import Artefact

NETS = """
import torch
from torch import nn
from torch.nn import functional

class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 64) / 8)
        self.middle, self.last, self.kind = nn.Linear(12, 12), nn.Linear(12, 10), kind

    def forward(self, x):
        x = torch.relu(torch.einsum("oi,ni->no", self.weight, x.flatten(1)))
        if self.kind == "bursts":
            return self.last(1e30 * self.middle(x))
        x = torch.relu(functional.linear(x, self.middle.weight, self.middle.bias))
        return self.last(functional.dropout(x, 0.2) if self.kind == "noisy" else x)

def noisy(): return Net("noisy")
def plain(): return Net("plain")
def bursts(): return Net("bursts")
"""
SMALL = ["-s", "data.train=200", "-s", "data.test=100"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with networks in it; the module is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_shaky.py").write_text(NETS)
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("own_shaky", None)


@pytest.fixture
def pruned(call, tmp_path):
    """Prune a folder by half; gives the exit code, what was said in one line, and the card where there is one."""

    def run(start, *words):
        out = tmp_path / "pruned"
        code, _, err = call("prune", start, "--to", "sparsity 0.5", *words, "-o", out)
        assert "Traceback" not in err, err
        return code, " ".join(err.split()), Artefact.open(out).card if code == 0 else None

    return run


def refused(code, said):
    """One error, and no remark that says the same in other words."""
    assert code == 2 and said.count("secateur: error:") == 1 and "note" not in said, said
    return said


def test_too_few_examples_are_told_once_and_the_advice_ends_it(pruned, dense):
    code, said, card = pruned(dense, "--solver", "sparsegpt", "-s", "examples=13")
    assert code == 0
    (text,) = [text for text in card["cautions"] if "few examples" in text]
    assert "`fc1.weight` has 64 inputs and a Gram matrix of rank 13 at most; `fc2.weight` has 16 inputs" in text
    assert "head.weight" not in text and said.count("too few examples") == 1 and f"note {text}" in said
    advice = re.search(r"`-s (examples=\d+)`", text)[1]
    assert advice == "examples=64"
    code, said, card = pruned(dense, "--solver", "sparsegpt", "-s", advice)
    assert code == 0 and "few examples" not in said + " ".join(card["cautions"])


@pytest.mark.parametrize("solver", ["obs", "sparsegpt"])
def test_a_singular_matrix_is_refused_with_its_figures(pruned, dense, solver):
    said = refused(*pruned(dense, "--solver", solver, "-s", "solver.damping=0", "-s", "examples=10")[:2])
    least = float(re.search(r"smallest eigenvalue is (\S+) with damping 0 ", said)[1])
    assert abs(least) < 1e-5
    advice = re.search(r"Raise the damping, for example to ([\d.e+]+),", said)[1]
    code, said, _ = pruned(dense, "--solver", solver, "-s", f"solver.damping={advice}", "-s", "examples=10")
    assert code == 0, said


def test_an_indefinite_hessian_is_refused_and_the_damping_it_names_is_enough(pruned, dense):
    words = ["--solver", "exact_obs", "--curvature", "hessian", "--only", "head.weight"]
    said = refused(*pruned(dense, *words, "-s", "solver.damping=0")[:2])
    assert float(re.search(r"smallest eigenvalue is (\S+) with", said)[1]) < 0
    advice = re.search(r"Raise the damping, for example to ([\d.e+]+),", said)[1]
    code, said, _ = pruned(dense, *words, "-s", f"solver.damping={advice}")
    assert code == 0, said


def test_a_fisher_matrix_without_damping_is_refused_and_the_damping_it_names_is_enough(pruned, dense):
    words = ["--criterion", "woodfisher"]
    assert "damping must be above 0, not 0" in refused(*pruned(dense, *words, "-s", "criterion.damping=0")[:2])
    said = refused(*pruned(dense, *words, "-s", "criterion.damping=1e-19")[:2])
    assert re.search(r"a damping of \S+ is lost to rounding beside gradients whose squares add up to [\d.]+,", said)
    factor = float(re.search(r"by a factor of ([\d.e+]+[\de])", said)[1])
    code, said, _ = pruned(dense, *words, "-s", f"criterion.damping={1e-19 * factor}")
    assert code == 0, said


def test_negative_diagonals_are_reported(pruned, dense):
    words = ["-s", "criterion.curvature=hessian", "-s", "criterion.diagonal=hutchinson", "-s", "examples=50"]
    code, said, card = pruned(dense, "--criterion", "obd", *words, "-s", "criterion.samples=64")
    assert code == 0
    (text,) = [text for text in card["cautions"] if "curvature is negative" in text]
    assert re.match(r"the curvature is negative for [\d,]+ of 1,336 weights \(down to -\d", text) and text in said


def test_a_network_that_has_hardly_been_trained_is_told_from_one_that_has(call, pruned, dense, tmp_path):
    """The slope and curvature that are compared are those of the forecast in the card."""
    words = ["train", "--net", "mlp", "-s", "model.widths=[32, 16]", "--data", "digits", "--epochs", "20"]
    assert call(*words, "-o", tmp_path / "good")[0] == 0
    found = []
    for start in (dense, tmp_path / "good"):
        code, said, card = pruned(start, "--criterion", "obd")
        assert code == 0
        texts = [text for text in card["cautions"] if "not at a minimum" in text]
        slope, curvature = card["forecast"]["slope"], card["forecast"]["curvature"]
        assert len(texts) == (abs(slope) > curvature) == said.count("not at a minimum")
        assert not texts or f"({slope:.3g}) is larger than the second-order one ({curvature:.3g})" in texts[0]
        found.append(len(texts))
    assert found == [1, 0]


def trained(net):
    assert main(["train", "--net", f"own_shaky:{net}", "--data", "digits", "--epochs", "1", *SMALL, "-o", net]) == 0
    return net


def test_a_network_that_is_random_in_evaluation_is_told_or_refused(here, pruned):
    start = trained("noisy")
    for words in (["--solver", "sparsegpt"], ["--criterion", "obd"]):
        said = refused(*pruned(start, *words)[:2])
        assert "200 examples in evaluation mode" in said and "self.training" in said and f"{words[1]} needs" in said
    code, said, card = pruned(start, "--criterion", "snip")
    assert code == 0 and said.count("draws random numbers") == 1
    assert sum("draws random numbers" in text for text in card["cautions"]) == 1


def test_weights_used_by_functions_are_scored_and_solvers_leave_them_alone(here, pruned):
    start = trained("plain")
    code, said, card = pruned(start, "--criterion", "taylor")
    assert code == 0 and set(card["counts"]) == {"weight", "middle.weight", "last.weight"} and card["cautions"] == []
    code, said, card = pruned(start, "--solver", "sparsegpt")
    assert code == 0, said
    assert card["counts"] == {"last.weight": [60, 120]} and [layer["name"] for layer in card["layers"]] == [
        "last.weight"
    ]
    assert "never called as a module" in card["left_alone"]["middle.weight"]
    assert "only linear and convolution layers" in card["left_alone"]["weight"]


def test_inputs_of_a_layer_that_overflow_are_refused_with_its_name(here, call):
    lines = ["[model]", 'use = "own_shaky:bursts"', "[data]", 'use = "digits"', "train = 200", "test = 100"]
    lines += ["[[step]]", 'do = "prune"', 'to = "sparsity 0.5"', 'solver = "sparsegpt"']
    (here / "r.toml").write_text("\n".join(['secateur = "0.1"', *lines]))
    code, _, err = call("run", "r.toml", "-o", "out")
    said = refused(code, " ".join(err.split()))
    assert "inputs of layer `last.weight` are not finite, or their squares overflow" in said and "doctor" in said
