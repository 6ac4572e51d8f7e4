"""Planted: units that do nothing, zeros that take room. Notes, so that the exit code stays 0."""

import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from tests.engine.doctor import clinic

from secateur.core.files import write_json, write_tensors
from secateur.core.masks import Masks
from secateur.engine.folder import card_digest

WIDTHS = {"model": {"widths": [24, 16]}}


def fresh():
    from secateur.nets import build

    torch.manual_seed(0)
    return clinic.state_of(build("mlp", (1, 8, 8), 10, widths=(24, 16)))


def test_dead_units(tmp_path):
    """Rows of zeros; those whose bias is not zero are told apart."""
    state = fresh()
    state["fc1.weight"][[3, 4, 9]] = 0
    state["fc1.bias"][[3, 4]] = 0

    report = clinic.look(state, tmp_path / "w.safetensors")

    assert report.findings == () and clinic.noted(report) == {"dead units": 3}
    assert "3 of 24 outputs of `fc1.weight` (3)" in report.notes[0].what and "1 of them" in report.notes[0].what


def test_inputs_that_nobody_reads(tmp_path):
    state = fresh()
    state["fc2.weight"][:, [0, 7]] = 0

    assert clinic.noted(clinic.look(state, tmp_path / "w.safetensors")) == {"unread inputs": 2}


def test_channels_times_zero(tmp_path):
    net = clinic.fresh("resnet_cifar")
    state = clinic.state_of(net)
    name = next(n for n in state if n.endswith("running_var")).replace("running_var", "weight")
    state[name][:2] = 0

    assert clinic.noted(clinic.look(state, tmp_path / "w.safetensors")) == {"closed channels": 2}


def test_units_that_can_be_removed_are_counted_on_the_graph(tmp_path):
    """With network and data: a row of zeros, and a column that the next layer does not read, are one unit each."""
    state = fresh()
    state["fc1.weight"][[3, 4]] = 0
    state["fc2.weight"][:, [4, 5]] = 0

    report = clinic.look(state, tmp_path / "w.safetensors", net="mlp", data="digits", options=WIDTHS)

    assert report.findings == () and clinic.noted(report)["removable units"] == 3


def test_zeros_that_are_stored(tmp_path):
    """More than half of the file, and enough to care."""
    state = {"fc.weight": torch.randn(400, 400, generator=torch.Generator().manual_seed(0))}
    state["fc.weight"][state["fc.weight"].abs() < 1] = 0

    report = clinic.look(state, tmp_path / "w.safetensors")

    assert report.findings == () and clinic.noted(report) == {"zeros stored": 1}
    zeros = int((state["fc.weight"] == 0).sum()) * 4 / 1e6
    assert f"{zeros:,.1f} of 0.6 MB" in report.notes[0].what
    assert clinic.noted(clinic.look({"fc.weight": state["fc.weight"][:50]}, tmp_path / "w.safetensors")) == {}


def test_a_layer_that_was_forgotten(tmp_path):
    state = fresh()
    for name in ("fc1.weight", "head.weight"):
        state[name][state[name].abs() < state[name].abs().quantile(0.9)] = 0

    assert clinic.noted(clinic.look(state, tmp_path / "w.safetensors"))["left dense"] == 1


@pytest.mark.parametrize("kind", ["file", "hub", "index", "run"])
def test_commands_go_by_the_kind_of_path(tmp_path, monkeypatch, kind):
    """Run by a shell they pack the weights and nothing else happens, whatever the name of the file holds."""
    monkeypatch.chdir(tmp_path)
    state = {"fc.weight": torch.randn(400, 400, generator=torch.Generator().manual_seed(0))}
    state["fc.weight"][state["fc.weight"].abs() < 1] = 0
    state["fc.weight"][:5] = 0
    odd = Path("my $(touch ran) `touch ran`; touch ran")
    odd.mkdir()
    if kind == "run":
        Masks({}).save(odd / "masks.safetensors")
        files = {"weights.safetensors": write_tensors(odd / "weights.safetensors", state)}
        write_json(odd / "card.json", {"files": files, "digest": card_digest({"files": files})})
        path, packed = odd, "weights.safetensors.gz"
    else:
        path, packed = clinic.write(state, odd / "model.safetensors"), "model.safetensors.gz"
    if kind == "hub":
        (odd / "config.json").write_text("{}")
        path = odd
    elif kind == "index":
        path = odd / "model.safetensors.index.json"
        path.write_text('{"weight_map": {"fc.weight": "model.safetensors"}}')

    notes = {note.kind: note for note in clinic.examine(path).notes}

    command = notes["zeros stored"].cure.partition("`")[2].partition("`; to run it")[0].removesuffix("`")
    subprocess.run(command, shell=True, check=True)
    assert (odd / packed).is_file() and not Path("ran").exists()
    assert "shrink_dead(" in notes["dead units"].cure and "secateur shrink" not in notes["dead units"].cure
    assert ("secateur.compile(" in notes["zeros stored"].cure) == (kind == "run")


def test_names_of_tensors_are_quoted_too(tmp_path):
    """A name may hold what a shell would run."""
    name = "a'$(touch ran)'.bias"
    state = {name: torch.tensor([0.0, 1.0, 2.0]), "a.weight": torch.randn(3, 3)}
    clinic.write({**state, name: torch.ones(3)}, tmp_path / "dense.pt")

    (finding,) = clinic.look(state, tmp_path / "w.pt", dense=tmp_path / "dense.pt").findings

    assert shlex.split(finding.cure.partition("`")[2].partition("`")[0]) == ["--skip", name]
