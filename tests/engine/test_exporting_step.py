"""Export steps: files of every kind beside float64, a card that tells what lies there, and what is refused early."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from secateur import runtime
from secateur.core.errors import DataError, UsageError
from secateur.core.files import file_digest
from secateur.data import load
from secateur.engine.folder import Artefact
from secateur.engine.recipe import Recipe
from secateur.engine.runner import Runner
from secateur.report.source import read_run

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export:UserWarning")
MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
KINDS = ["pt2", "plan", "safetensors", *([] if MISSING else ["onnx"])]
TABLE = {
    "model": {"use": "mlp", "widths": [16, 8]},
    "data": {"use": "digits", "train": 100, "test": 40, "batch": 50},
    "step": [
        {"do": "train", "epochs": 1},
        {"do": "prune", "to": "sparsity 0.8"},
        {"do": "export", "formats": KINDS, "batch": 3},
        {"do": "train", "epochs": 1},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run with an export in the middle."""
    return Runner(Recipe.from_table(TABLE), tmp_path_factory.mktemp("export") / "out").run()


@pytest.fixture(scope="module")
def folder(made):
    return next(made.glob("3-export-*"))


def expected(made, x):
    """The network after step 2 by its definition, in float64."""
    w = {name: value.double() for name, value in load_file(next(made.glob("2-*")) / "weights.safetensors").items()}
    x = x.double().flatten(1)
    for layer in ("fc1", "fc2"):
        x = torch.relu(x @ w[f"{layer}.weight"].T + w[f"{layer}.bias"])
    return (x @ w["head.weight"].T + w["head.bias"]).numpy()


def test_every_file_computes_what_the_network_of_the_step_before_does(made, folder):
    data = load("digits")
    x = ((data.test.x[:7].float() if data.mean is None else data.test.x[:7]) + 0.0).reshape(7, *data.input_shape)
    wanted = expected(made, x)
    found = [torch.export.load(folder / "network.pt2").module()(x).detach().numpy()]
    with runtime.load(folder) as session:
        found.append(session(x.numpy()))
    if "onnx" in KINDS:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(folder / "network.onnx"), providers=["CPUExecutionProvider"])
        found.append(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    for given in found:
        assert np.abs(given - wanted).max() <= 1e-5 * np.abs(wanted).max()
    before, after = (
        load_file(f) for f in (next(made.glob("2-*")) / "weights.safetensors", folder / "network.safetensors")
    )
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_card_tells_files_and_bytes(made, folder):
    card = json.loads((folder / "card.json").read_text())
    there = {p.name for p in folder.iterdir()} - {"card.json"}
    assert set(card["files"]) == there
    assert all(file_digest(folder / name) == digest for name, digest in card["files"].items())
    assert [row["format"] for row in card["exports"]] == KINDS
    assert all(row["bytes"] == (folder / row["file"]).stat().st_size for row in card["exports"])
    assert card["network"]["digest"] == Artefact.open(next(made.glob("2-*"))).digest
    traced = [row for row in card["exports"] if row["format"] != "safetensors"]
    assert all(set(row["parity"]) == {"3", "5"} and max(row["parity"].values()) <= 1e-4 for row in traced)


def test_a_run_with_an_export_is_read_resumed_and_its_last_network_is_that_of_the_last_train_step(made, folder):
    stamps = {p: p.stat().st_mtime_ns for p in made.glob("[0-9]*/*")}
    again = Runner(Recipe.from_table(TABLE), made)
    assert [row["state"] for row in again.plan()] == ["done"] * 4
    again.run()
    assert {p: p.stat().st_mtime_ns for p in made.glob("[0-9]*/*")} == stamps
    assert Artefact.open(made).folder.name.startswith("4-train-")
    run = read_run(made)
    assert [step.do for step in run.steps] == ["train", "prune", "export", "train"] and not run.notes


@pytest.mark.parametrize(
    ("step", "told"),
    [
        ({"formats": []}, "name one or more"),
        ({"formats": ["pt2", "pt2"]}, "each once"),
        ({"formats": ["gguf"]}, "gguf"),
        ({"formats": ["pt2"], "opset": 18}, 'add "onnx"'),
        ({"formats": ["pt2"], "batch": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_runs(step, told):
    with pytest.raises(UsageError, match=told):
        Recipe.from_table({**TABLE, "step": [TABLE["step"][0], {"do": "export", **step}]})


def test_an_export_without_a_network_or_with_too_large_a_batch_is_refused(tmp_path):
    only = Recipe.from_table({**TABLE, "step": [{"do": "export", "formats": ["plan"]}]})
    with pytest.raises(UsageError, match="nothing to export yet"):
        Runner(only, tmp_path / "one").run()
    wide = [TABLE["step"][0], {"do": "export", "formats": ["plan"], "batch": 41}]
    with pytest.raises(UsageError, match="40 test examples"):
        Runner(Recipe.from_table({**TABLE, "step": wide}), tmp_path / "two").run()
    assert not list(tmp_path.glob("two/2-*/*"))


def test_a_rewind_to_an_export_is_refused():
    with pytest.raises(UsageError, match="names no step before it that has a network"):
        Recipe.from_table({**TABLE, "step": [*TABLE["step"][:3], {"do": "rewind", "to": 3}]})


RESTLESS = """
import torch
from torch import nn

class Restless(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.passes = nn.Linear(64, 10), 0

    def forward(self, x):
        self.passes += 1
        return self.layer(x.flatten(1)) * (1 + self.passes % 7)

def restless(): return Restless()
"""


def test_the_verdict_outlives_an_error_in_flatness(tmp_path, monkeypatch):
    """A loss that changes from pass to pass is refused by flatness; what was measured before that stays on disk."""
    (tmp_path / "restless_net.py").write_text(RESTLESS)
    monkeypatch.syspath_prepend(str(tmp_path))
    steps = [*TABLE["step"][:2], {"do": "measure", "flatness": True}]
    recipe = Recipe.from_table({**TABLE, "model": {"use": "restless_net:restless"}, "step": steps})

    with pytest.raises(DataError, match="two passes over the same examples"):
        Runner(recipe, tmp_path / "out").run()

    verdict = json.loads(next(tmp_path.glob("out/3-measure-*/verdict.json")).read_text())
    assert verdict["pruned"]["accuracy"] and "flatness" not in verdict
    assert not list(tmp_path.glob("out/3-*/card.json"))
