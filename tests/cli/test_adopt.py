"""``secateur adopt``: one command from an orphaned file to a folder that every other verb takes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import prune

from secateur.nets import build

NET = ["--net", "mlp", "-s", "widths=[16, 12]", "--shape", "1,8,8", "--outputs", "10"]


@pytest.fixture
def orphan(tmp_path):
    """A network of torch's own pruning, saved with its originals and masks."""
    torch.manual_seed(2)
    net = build("mlp", (1, 8, 8), 10, widths=(16, 12))
    for layer in (net.fc1, net.fc2):
        prune.random_unstructured(layer, "weight", amount=0.5)
    torch.save({"epoch": 3, "state_dict": net.state_dict()}, tmp_path / "old.pt")
    return tmp_path / "old.pt"


def test_from_a_file_to_a_folder_that_can_be_pruned_further(orphan, tmp_path, call):
    """The counts are exact, the next verb takes the folder, and what was pruned stays zero."""
    code, shown, errors = call("adopt", orphan, *NET, "-o", tmp_path / "out")

    assert code == 0 and not errors
    assert "608 of 1,336 weights are kept" not in shown  # the head is prunable and dense
    kept = 16 * 64 // 2 + 12 * 16 // 2 + 120
    assert f"{kept:,} of 1,336 weights are kept" in shown and "torch.nn.utils.prune" in shown
    words = ["prune", tmp_path / "out", "--data", "digits", "--to", "params 30%", "-s", "data.train=100"]
    code, _, errors = call(*words, "-s", "data.test=50", "-o", tmp_path / "more")
    assert code == 0, errors
    before = load_file(tmp_path / "out" / "weights.safetensors")["fc1.weight"]
    after = load_file(next((tmp_path / "more").glob("*-prune-*")) / "weights.safetensors")["fc1.weight"]
    assert not after[before == 0].any()


def test_json_and_dry_run(orphan, tmp_path, call):
    """A dry run says the same and writes nothing."""
    code, dry, _ = call("adopt", orphan, *NET, "--dry-run", "--json")
    assert code == 0 and [p.name for p in tmp_path.iterdir()] == ["old.pt"]

    code, wet, _ = call("adopt", orphan, *NET, "--json", "-o", tmp_path / "out")

    assert code == 0
    assert {**json.loads(dry), "folder": str(tmp_path / "out")} == json.loads(wet)
    assert json.loads(wet)["kept"] == 16 * 64 // 2 + 12 * 16 // 2 + 120


def test_without_a_class(orphan, tmp_path, call):
    """Plain weights and masks, and what the folder lacks."""
    code, shown, _ = call("adopt", orphan, "-o", tmp_path / "out")

    assert code == 0 and "lacks     structure.json" in shown
    code, _, errors = call("adopt", tmp_path / "out" / "weights.safetensors", *NET, "-o", tmp_path / "whole")
    assert code == 0, errors


@pytest.mark.parametrize(("words", "message"), [
    (["-o", "out", "--net", "mlp", "-s", "widths=[9]", "--shape", "1,8,8", "--outputs", "10"], "does not fit"),
    (["-o", "out", "--net", "mpl"], "Did you mean 'mlp'"),
    (["-o", "out", "--shape", "3,8"], "name it with `--net`"),
    (["-o", "out", "--net", "mlp", "--shape", "3,x"], "--shape '3,x' is not whole numbers"),
    (["-o", "out", "--net", "mlp", "-s", "widths"], "write `-s name=value`"),
    (["-o", "out", "--entry", "ema"], "no further state dict called 'ema'"),
    ([], "name the folder to write with `-o`"),
])  # fmt: skip
def test_what_does_not_fit_is_told_in_one_line(orphan, tmp_path, call, monkeypatch, words, message):
    """Exit code 2, the reason, and nothing written."""
    monkeypatch.chdir(tmp_path)

    code, shown, errors = call("adopt", orphan, *words)

    assert code == 2 and not shown and message in errors and len(errors.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["old.pt"]


def test_files_with_code_are_refused(tmp_path, call):
    """A whole model is a pickle that would run its class."""
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")

    code, _, errors = call("adopt", tmp_path / "a.pt", "-o", tmp_path / "out")

    assert (
        code == 2
        and "would run 'torch.nn.modules.linear.Linear'" in errors
        and "torch.save(model.state_dict()" in errors
    )
