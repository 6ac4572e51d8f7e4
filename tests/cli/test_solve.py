"""``secateur prune --solver``: exact counts, a record for each layer, BatchNorm taken anew, mistakes named."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from secateur.core.sockets import names
from secateur.engine.folder import Artefact

WEIGHTS = 64 * 16 + 16 * 12 + 12 * 10


@pytest.mark.parametrize("solver", [*names("solvers"), None])
@pytest.mark.parametrize("to", ["sparsity 0.75", "1:4"])
def test_every_solver_keeps_exact_counts(call, dense, tmp_path, solver, to):
    words = [] if solver is None else ["--solver", solver]
    code, _, err = call("prune", dense, "--to", to, *words, "-o", tmp_path / "out")
    assert code == 0, err
    card = Artefact.open(tmp_path / "out").card
    state = load_file(Artefact.open(tmp_path / "out").folder / "weights.safetensors")
    assert card["kept"] == WEIGHTS // 4
    assert sum(int((state[name] == 0).sum()) for name in card["counts"]) == WEIGHTS - WEIGHTS // 4
    layers = {layer["name"]: layer for layer in card["layers"]}
    assert list(layers) == ["fc1.weight", "fc2.weight", "head.weight"]
    for name, layer in layers.items():
        assert [layer["kept"], layer["total"]] == card["counts"][name]
        if solver is None:
            assert layer["error"] is None and layer["zeroed"] is None
        else:
            assert 0 <= layer["error"] <= layer["zeroed"] * (1 + 1e-6)
        (line,) = (line for line in err.splitlines() if line.strip().startswith(name))
        assert f"loss {layer['rise']:+.4g} (forecast {layer['forecast']:+.4g})" in line
        assert ("output off by" in line) == (solver is not None)
    assert card["forecast"]["loss_after"] > 0


def test_inputs_of_the_dense_network_change_what_later_layers_are_solved_on(call, dense, tmp_path):
    for inputs in ("sequential", "dense"):
        words = ["--to", "sparsity 0.9", "--solver", "sparsegpt", "--inputs", inputs, "-o", tmp_path / inputs]
        assert call("prune", dense, *words)[0] == 0
    one, two = (
        load_file(Artefact.open(tmp_path / inputs).folder / "weights.safetensors") for inputs in ("sequential", "dense")
    )
    assert torch.equal(one["fc1.weight"], two["fc1.weight"])
    assert not torch.equal(one["head.weight"], two["head.weight"])


@pytest.mark.parametrize("recover", ["batchnorm", "nothing"])
def test_batchnorm_is_taken_anew_and_told(call, tmp_path, recover):
    small = ["-s", "data.train=60", "-s", "data.test=40"]
    net = ["--net", "resnet_cifar", "-s", "model.options={depth=8, width=4}", "--data", "digits"]
    code, _, err = call("train", *net, "--epochs", "1", *small, "-o", tmp_path / "dense")
    assert code == 0, err
    words = ["--to", "sparsity 0.8", "-s", f"recover={recover}", *small, "-o", tmp_path / "out"]
    code, _, err = call("prune", tmp_path / "dense", *words)
    assert code == 0, err
    old, new = (Artefact.open(tmp_path / run) for run in ("dense", "out"))
    before, after = (load_file(one.folder / "weights.safetensors") for one in (old, new))
    same = [torch.equal(before[name], after[name]) for name in before if name.endswith("running_mean")]
    assert same and (all(same) if recover == "nothing" else not any(same))
    told = new.card.get("recovered")
    if recover == "nothing":
        assert told is None
    else:
        assert told["after"]["value"] == new.card["readings"]["accuracy"]["value"]
        assert told["batchnorm layers"] == len(same) and "statistics taken anew" in err


@pytest.mark.parametrize(
    ("recover", "steps", "says"),
    [
        ("survivors", ["survivors", "batchnorm"], "kept weights moved together: accuracy"),
        ("last-layer", ["batchnorm", "last-layer"], "fc fitted to the dense network: accuracy"),
    ],
)
def test_other_recoveries_are_told_step_by_step(call, tmp_path, recover, steps, says):
    small = ["-s", "data.train=60", "-s", "data.test=40"]
    net = ["--net", "resnet_cifar", "-s", "model.options={depth=8, width=4}", "--data", "digits"]
    assert call("train", *net, "--epochs", "1", *small, "-o", tmp_path / "dense")[0] == 0
    ways = (recover, "batchnorm")
    for way in ways:
        words = ["--to", "sparsity 0.8", "-s", f"recover={way}", *small, "-o", tmp_path / way]
        code, _, err = call("prune", tmp_path / "dense", *words)
        assert code == 0, err
        assert (says in err) == (way == recover) and "statistics taken anew: accuracy" in err
    card, plain = (Artefact.open(tmp_path / way).card for way in ways)
    told = card["recovered"]
    assert [step["step"] for step in told["steps"]] == steps
    for one, two in itertools.pairwise(told["steps"]):
        assert one["after"] == two["before"]
    assert told["before"] == plain["recovered"]["before"] == told["steps"][0]["before"]
    assert told["after"]["value"] == card["readings"]["accuracy"]["value"] == told["steps"][-1]["after"]["value"]
    assert card["counts"] == plain["counts"]
    mine, other = (load_file(Artefact.open(tmp_path / way).folder / "weights.safetensors") for way in ways)
    moved = [name for name in card["counts"] if not torch.equal(mine[name], other[name])]
    assert moved == (["fc.weight"] if recover == "last-layer" else list(card["counts"]))
    for name, (kept, total) in card["counts"].items():
        assert int((mine[name] == 0).sum()) == total - kept


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--solver", "sparsgpt"], "sparsegpt"),
        (["--solver", "sparsegpt", "--epochs", "1"], "--solver prunes once"),
        (["--inputs", "dense"], "--inputs has no effect"),
        (["--solver", "sparsegpt", "--pattern", "unit"], "unit"),
        (["--solver", "sparsegpt", "--to", "sparsity 1.5"], "1.5"),
        (["-s", "recover=everything"], "'batchnorm', 'nothing', 'survivors', 'last-layer'"),
        (["-s", "recover=last-layer", "-s", "last_layer=haed"], "no linear layer 'haed'. did you mean 'head'"),
        (["-s", "last_layer=head"], "has no effect"),
    ],
)
def test_mistakes_are_named(call, dense, tmp_path, words, says):
    code, _, err = call("prune", dense, *words, "-o", tmp_path / "out")
    assert code == 2 and says.lower() in err.lower() and "Traceback" not in err


def test_a_pruned_network_is_refused_and_the_plan_is_shown(call, dense, tmp_path):
    words = ["--to", "sparsity 0.5", "--solver", "sparsegpt"]
    code, out, err = call("prune", dense, *words, "--dry-run", "--json")
    assert code == 0, err
    assert sum(kept for kept, _ in json.loads(out)["plan"]["counts"].values()) == WEIGHTS // 2
    assert call("prune", dense, *words, "-o", tmp_path / "once")[0] == 0
    code, _, err = call("prune", tmp_path / "once", "--to", "sparsity 0.9", "--solver", "obs", "-o", tmp_path / "twice")
    assert code == 2 and "pruned already" in err


@pytest.mark.parametrize("solver", names("solvers"))
@pytest.mark.parametrize("curvature", ["fisher", "ggn"])
def test_the_whole_network_as_one_vector(call, dense, tmp_path, solver, curvature):
    """Exact counts over all tensors together; zeros stay when the result is pruned again."""
    words = ["--solver", solver, "--curvature", curvature, "-s", "examples=64", "--only", "fc2*", "--only", "head*"]
    code, _, err = call("prune", dense, "--to", "keep 100", *words, "-s", "rounds=2", "-o", tmp_path / "one")
    assert code == 0, err
    code, _, err = call("prune", tmp_path / "one", "--to", "keep 40", *words, "-o", tmp_path / "two")
    assert code == 0, err
    for run, kept in (("one", 100), ("two", 40)):
        folder = Artefact.open(tmp_path / run)
        state = load_file(folder.folder / "weights.safetensors")
        masks = folder.masks()
        assert folder.card["kept"] == kept == sum(int(mask.sum()) for mask in masks.values())
        assert all(bool((state[name][~mask] == 0).all()) for name, mask in masks.items())
        assert [entry["kept"] for entry in folder.card["rounds"]][-1] == kept
        assert folder.card["forecast"]["rise_measured"] == pytest.approx(
            sum(entry["rise"] for entry in folder.card["rounds"]), rel=1e-3, abs=1e-5
        )
    before, after = (Artefact.open(tmp_path / run).masks() for run in ("one", "two"))
    assert not any(bool((after[name] & ~before[name]).any()) for name in after)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--curvature", "fisher"], "--curvature has no effect without a solver"),
        (["--solver", "obs", "--curvature", "fisher", "--to", "2:4"], "takes single weights"),
        (["--solver", "obs", "-s", "rounds=3"], "rounds is 3, but layers are solved once"),
        (["--solver", "obs", "--curvature", "fisher", "-s", "rounds=0"], "rounds is 0"),
        (["-s", "rounds=2"], "curvature and rounds are for solvers"),
    ],
)
def test_choices_that_do_not_go_together(call, dense, tmp_path, words, says):
    code, _, err = call("prune", dense, *words, "-o", tmp_path / "out")
    assert code == 2 and says in err


def test_a_wrong_choice_names_its_option(call, dense, tmp_path):
    code, _, err = call("prune", dense, "--solver", "alps", "--curvature", "wrong", "-o", tmp_path / "out")
    assert code == 2 and "--curvature" in err and "fisher" in err and "verb" not in err
