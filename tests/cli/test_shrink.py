"""``secateur shrink`` and the step of its name: smaller files that load, resume, and say what they are."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import json
import pathlib
import shutil
import tomllib

import pytest
import torch
from safetensors.torch import load_file

import secateur
from secateur.core.masks import Masks
from secateur.core.task import Task
from secateur.data import Loader
from secateur.engine.folder import Artefact
from secateur.engine.recipe import Recipe
from secateur.engine.runner import Runner
from secateur.engine.start import Listener

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export:UserWarning")

MACS = 64 * 16 + 16 * 12 + 12 * 10
PARAMS = MACS + 16 + 12 + 10


def step(folder, number):
    return next(folder.glob(f"{number}-*"))


def card(folder, number):
    return json.loads((step(folder, number) / "card.json").read_text())


def macs(state):
    return sum(state[f"{name}.weight"].numel() for name in ("fc1", "fc2", "head"))


def params(state):
    return sum(tensor.numel() for tensor in state.values())


@pytest.fixture(scope="module")
def small(trained, tmp_path_factory):
    """Half the MACs by taylor_filter in two rounds, trained for an epoch and measured, from the command line."""
    from secateur.cli.main import main

    out = tmp_path_factory.mktemp("shrunk") / "out"
    words = ["shrink", str(trained), "--to", "macs 0.5x", "--criterion", "taylor_filter", "--rounds", "2"]
    assert main([*words, "--epochs", "1", "--lr", "0.05", "-o", str(out)]) == 0
    return out


def test_the_file_is_smaller_and_every_figure_agrees_with_it(small):
    state = load_file(step(small, 1) / "weights.safetensors")
    told = card(small, 1)
    assert macs(state) <= MACS / 2 and told["figures"]["macs"] == [MACS, macs(state)]
    assert told["figures"]["params"] == [PARAMS, params(state)] and told["target"] == "macs 0.5x"
    assert {g["name"]: g["kept"] for g in told["groups"]} == {
        "fc1.weight": len(state["fc1.weight"]), "fc2.weight": len(state["fc2.weight"])
    }  # fmt: skip
    assert [row["tensor"] for row in told["coverage"] if row["why"]].count("head.bias") == 1
    assert len(told["rounds"]) == 2 and all(r["error"] < 1e-5 and r["cost"] <= r["limit"] for r in told["rounds"])
    trained = load_file(step(small, 2) / "weights.safetensors")
    assert {n: t.shape for n, t in trained.items()} == {n: t.shape for n, t in state.items()}
    assert any(not torch.equal(trained[n], state[n]) for n in state)
    assert card(small, 2)["shrunk"] == told["figures"] == told["shrunk"]


def test_the_verdict_is_against_the_dense_network(small, trained):
    verdict = json.loads((step(small, 3) / "verdict.json").read_text())
    dense, pruned = (verdict[which]["cost"]["parts"] for which in ("dense", "pruned"))
    state = load_file(step(small, 2) / "weights.safetensors")
    assert (dense["macs_dense"], pruned["macs_dense"]) == (MACS, macs(state))
    assert (dense["params"], pruned["params"]) == (PARAMS, params(state))
    assert verdict["pruned"]["disk"]["value"] < verdict["dense"]["disk"]["value"]
    assert verdict["change"]["latency"]["value"] > 0 and verdict["baselines"] == {}
    assert card(small, 3)["dense"] == str(Artefact.open(trained).folder)
    report = (small / "report.json").read_text()
    assert "of the parameters are gone" in report and "units are gone, from 2 groups" in report
    assert "Nothing is pruned" not in report


def test_the_folder_loads_and_computes_what_was_measured(small):
    """By ``secateur.load``, into a fresh dense network too, and as the network of the next command."""
    net, masks = secateur.load(small)
    artefact = Artefact.open(small)
    other, _ = secateur.load(small, secateur.load(small.parent / "out")[0])
    about = artefact.structure["model"]
    from secateur.nets import build

    wide = build(about["use"], tuple(about["input_shape"]), about["outputs"], **about["options"])
    assert wide.fc1.out_features == 16
    refilled, _ = secateur.load(small, wide)
    data = Runner(Recipe.from_table(tomllib.loads((small / "recipe.toml").read_text())), small).data()
    x = next(iter(Loader(data.test, 50, mean=data.mean, std=data.std)))[0]
    assert torch.equal(net(x), refilled(x)) and torch.equal(net(x), other.eval()(x))
    right = sum(int((net(a).argmax(1) == b).sum()) for a, b in Loader(data.test, 50, mean=data.mean, std=data.std))
    assert right == round(artefact.card["readings"]["accuracy"]["value"] * len(data.test) / 100)
    assert masks.kept == masks.total == macs(load_file(artefact.folder / "weights.safetensors"))
    assert wide.fc1.out_features == len(wide.fc1.weight) < 16


def test_shares_are_of_the_dense_network_in_a_chain_of_commands(call, small, tmp_path):
    before = macs(load_file(step(small, 2) / "weights.safetensors"))
    code, _, err = call("shrink", small, "--to", "macs 0.4x", "-o", tmp_path / "out")
    assert code == 0, err
    after = macs(load_file(step(tmp_path / "out", 1) / "weights.safetensors"))
    assert 0.4 * before < after <= 0.4 * MACS
    assert card(tmp_path / "out", 1)["shrunk"]["macs"] == [MACS, after]
    assert card(tmp_path / "out", 1)["figures"]["macs"] == [before, after]
    assert card(tmp_path / "out", 2)["dense"] == card(small, 3)["dense"]


def test_a_sparse_network_keeps_its_zeros_and_a_smaller_one_can_be_pruned(call, dense, small, tmp_path):
    assert call("prune", dense, "--to", "sparsity 0.5", "-o", tmp_path / "sparse")[0] == 0
    code, _, err = call("shrink", tmp_path / "sparse", "--to", "macs 0.6x", "-o", tmp_path / "out")
    assert code == 0, err
    artefact = Artefact.open(tmp_path / "out")
    state, masks = artefact.state(), artefact.masks()
    assert 0 < masks.kept < masks.total == macs(state)
    assert all(not state[name][~mask].any() for name, mask in masks.items())
    code, _, err = call("prune", small, "--to", "params 10%", "-o", tmp_path / "both")
    assert code == 0, err
    told = card(tmp_path / "both", 1)
    assert told["total"] == macs(load_file(step(small, 2) / "weights.safetensors"))
    assert told["kept"] == told["total"] - int(told["total"] * 0.9) and "shrunk" in told
    assert json.loads((step(tmp_path / "both", 2) / "verdict.json").read_text())["baselines"] == {}


def test_a_dry_run_prints_the_plan_and_makes_nothing(call, dense, tmp_path):
    code, out, err = call("shrink", dense, "--to", "params 50%", "--dry-run", "-o", tmp_path / "out")
    assert code == 0, err
    assert "28 units in 2 groups can go" in out and "head.bias" in out and f"params: {PARAMS:,} -> " in out
    assert not (tmp_path / "out").exists()
    code, out, err = call("shrink", dense, "--to", "params 50%", "--dry-run", "--json", "-o", tmp_path / "out")
    plan = json.loads(out)["plan"]
    assert plan["figures"]["params"] <= PARAMS / 2 and set(plan["groups"]) == {"fc1.weight", "fc2.weight"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--to", "params 1"], "without all units that may go 87 are left"),
        (["--to", "macs 1.5x"], "a share must be in (0, 1]"),
        (["--to", "sparsity 1.5"], "names no known quantity"),
        (["--criterion", "taylor_filtre"], "taylor_filter"),
        (["--only", "layer1*"], "no group matches 'layer1*'"),
        (["--skip", "*"], "all groups stay whole"),
        (["--rounds", "0"], "rounds is 0"),
        (["--rounds", "2", "--minimum", "0.5"], "give a whole number"),
        (["--lr", "0.1"], "--lr has no effect"),
        (["-s", "recover=survivors"], "recover"),
        (["-s", "example=3"], "examples"),
    ],
)
def test_bad_input_is_told_and_leaves_no_step(call, dense, tmp_path, words, says):
    code, _, err = call("shrink", dense, *words, "-o", tmp_path / "out")
    assert code == 2 and says in err and "Traceback" not in err
    assert not list(tmp_path.glob("out/*/card.json"))


RECIPE = """
seed = 3

[model]
use    = "{use}"

[data]
use   = "digits"
batch = 50
train = 200
test  = 100

[[step]]
do     = "train"
epochs = 1
lr     = 0.05

[[step]]
do       = "shrink"
to       = "macs 0.7x"
examples = 100

[[step]]
do     = "train"
epochs = 1
lr     = 0.05

[[step]]
do        = "shrink"
to        = "macs 0.5x"
examples  = 100

[[step]]
do     = "train"
epochs = 1
lr     = 0.05

[[step]]
do = "measure"
"""
NET = """
import torch
from torch import nn

class Written(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.one(x.flatten(1))))
        return self.two({written})

def build():
    return Written()
"""


class Stop(Listener):
    """Ends a run as Ctrl-C would, when a step has begun or ended."""

    def __init__(self, at, when="begin"):
        self.at, self.when = at, when

    def begin(self, number, step, folder, steps):
        if (number, self.when) == (self.at, "begin"):
            raise KeyboardInterrupt

    def end(self, number, step, card, skipped):
        if (number, self.when) == (self.at, "end"):
            raise KeyboardInterrupt


@pytest.fixture(params=["x", "x.view(-1, 4, 4).reshape(-1, 16)"], ids=["own", "graph"])
def recipe(request, tmp_path, monkeypatch):
    """A recipe with a network of the user's own; the second writes its width down and becomes a graph."""
    name = f"written_{request.param_index}"
    (tmp_path / f"{name}.py").write_text(NET.format(written=request.param))
    monkeypatch.syspath_prepend(str(tmp_path))
    return Recipe.from_table(tomllib.loads(RECIPE.format(use=f"{name}:build")))


def weights(folder):
    return {p.parent.name: p.read_bytes() for p in sorted(folder.glob("*/weights.safetensors"))}


def test_a_run_interrupted_between_steps_ends_as_the_undisturbed_one(recipe, tmp_path):
    """Also where the network has become a graph: it loads without its class, and goes on training."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    Runner(recipe, whole).run()
    for stop in (Stop(2), Stop(2, "end"), Stop(3), Stop(5), Stop(6)):
        with pytest.raises(KeyboardInterrupt):
            Runner(recipe, out, listener=stop).run()
    assert len(weights(out)) == 5
    Runner(recipe, out).run()
    assert weights(out) == weights(whole) and len(weights(whole)) == 5

    told = card(whole, 4)
    graph = told["rewritten"] or card(whole, 2)["rewritten"]
    assert graph == ("view" in (tmp_path / f"{recipe.model.use.partition(':')[0]}.py").read_text())
    assert (step(whole, 5) / "program.pt2").is_file() == graph
    assert told["shrunk"]["macs"][0] == 64 * 16 + 160 and told["shrunk"]["macs"][1] <= (64 * 16 + 160) / 2
    net, masks = secateur.load(whole)
    data = Runner(recipe, whole).data()
    task = Task(net, secateur.CrossEntropy(), list(Loader(data.test, 50, mean=data.mean, std=data.std)))
    right = sum(int((y.argmax(1) == t).sum()) for y, t, _ in task.outputs())
    assert right == round(card(whole, 5)["readings"]["accuracy"]["value"])
    assert masks.total == told["shrunk"]["macs"][1] and isinstance(masks, Masks)
    verdict = json.loads((step(whole, 6) / "verdict.json").read_text())
    assert verdict["pruned"]["cost"]["parts"]["macs_dense"] == told["shrunk"]["macs"][1]


def test_another_target_runs_anew_from_there(recipe, tmp_path):
    out = tmp_path / "out"
    table = recipe.to_table()
    table["step"] = table["step"][:2]
    Runner(Recipe.from_table(table), out).run()
    shutil.copytree(out, tmp_path / "copy")
    table["step"][1]["to"] = "macs 0.6x"
    Runner(Recipe.from_table(table), out).run()
    assert len(list(out.glob("1-*"))) == 1 and len(list(out.glob("2-*"))) == 2
    for path in (tmp_path / "copy").glob("*/weights.safetensors"):
        assert path.read_bytes() == (out / pathlib.Path(path.parent.name) / path.name).read_bytes()
