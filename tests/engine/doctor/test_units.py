"""Planted: units that do nothing, zeros that take room. Notes, so that the exit code stays 0."""

import torch
from tests.engine.doctor import clinic

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
