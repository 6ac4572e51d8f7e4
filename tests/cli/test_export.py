"""``secateur export`` as a newcomer uses it."""

import importlib.util
import json
import pathlib
import shutil

import pytest
import torch

import secateur
from secateur.cli.main import main
from secateur.core.files import file_digest

MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; see secateur[export]")
KINDS = [pytest.param("onnx", marks=needs_onnx), "pt2"]


@pytest.fixture(scope="module")
def half(trained, tmp_path_factory):
    """A run folder in which half of the weights were pruned."""
    out = tmp_path_factory.mktemp("half") / "run"
    assert main(["prune", str(trained), "--to", "sparsity 0.5", "-o", str(out)]) == 0
    return out


@pytest.fixture
def pruned(half, tmp_path):
    return pathlib.Path(shutil.copytree(half, tmp_path / "pruned"))


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_folder_becomes_a_file_with_its_figures(call, pruned, tmp_path, kind):
    path = tmp_path / f"small.{kind}"
    code, out, err = call("export", pruned, "--format", kind, "-o", path)

    assert code == 0, err
    assert "any batch" in out and "parity" in out and "zeros" in out and "threads" in out and f"{path}.json" in out
    figures = json.loads(path.with_name(f"{path.name}.json").read_text())
    net, masks = secateur.load(pruned)
    pruned_weights = {name: int((~mask).sum()) for name, mask in masks.items()}
    assert sum(pruned_weights.values()) == masks.total - masks.kept > 0
    assert all(row["in_file"] >= pruned_weights[row["name"]] for row in figures["zeros"])
    assert {row["name"] for row in figures["zeros"]} == {name for name, count in pruned_weights.items() if count}
    assert figures["sha256"] == file_digest(path)
    assert figures["bytes"]["dense weights"] > 0 and set(figures["parity"]) == {"limit", "1", "3"}
    assert figures["about"]["data"] == "digits"


def test_the_default_file_lies_in_the_step_folder(call, pruned):
    step = next(p for p in pruned.iterdir() if "-prune-" in p.name)
    code, out, err = call("export", step, "--format", "pt2", "--batch", "4", "--json")

    assert code == 0, err
    shown = json.loads(out)
    assert shown["path"] == str(step / "network.pt2") and list(shown["parity"]) == ["limit", "4", "6"]
    x = torch.zeros(7, 1, 8, 8)
    net, _ = secateur.load(step)
    assert torch.equal(torch.export.load(step / "network.pt2").module()(x), net(x))


@needs_onnx
def test_onnx_is_the_default_and_takes_an_opset(call, pruned):
    code, out, err = call("export", pruned, "--opset", "18", "--json")
    assert code == 0, err
    shown = json.loads(out)
    assert shown["path"].endswith("network.onnx") and shown["about"]["opset"] == 18


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--format", "tflite"], "no format 'tflite'"),
        (["--format", "pt2", "-o", "net.onnx"], "ends like a file of onnx"),
        (["-o", "net.bin"], "does not say its format"),
        (["--format", "pt2", "--opset", "18"], "opset 18 is for ONNX"),
        (["--format", "pt2", "--batch", "0"], "--batch is 0"),
        (["--format", "pt2", "--batch", "99999"], "test examples"),
        (["--format", "pt2", "-o", "."], "is a folder"),
        (["--format", "pt2", "-o", "card.json/net.pt2"], "cannot write"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(call, dense, words, says, monkeypatch):
    step = next(p for p in dense.iterdir() if p.is_dir())
    monkeypatch.chdir(step)
    before = files(dense)
    code, _, err = call("export", dense, *words)
    assert code == 2 and says in err and "Traceback" not in err, err
    assert files(dense) == before


def test_a_folder_that_is_no_run_is_refused(call, tmp_path):
    code, _, err = call("export", tmp_path / "nothing", "--format", "pt2")
    assert code == 2 and "nothing" in err
    code, _, err = call("export", tmp_path, "--format", "pt2")
    assert code == 2 and str(tmp_path) in err


def test_a_folder_without_data_says_what_to_do(call, tmp_path):
    net = torch.nn.Linear(3, 2)
    secateur.save(tmp_path / "mine", net)
    code, _, err = call("export", tmp_path / "mine", "--format", "pt2")
    assert code == 2 and "Traceback" not in err and "secateur.export(model, example, path)" in err
