"""Planted: masks that are not carried out, belong elsewhere or close a layer; N:M patterns with holes."""

import re

import pytest
import torch
from tests.engine.doctor import clinic

from secateur.core.masks import Masks
from secateur.core.patterns import NM


@pytest.fixture
def pruned():
    return clinic.pruned_net("lenet_300_100", "50 %", steps=1)


def planted(net, masks):
    """Three pruned weights come back."""
    state = clinic.state_of(net)
    where = (~masks["fc1.weight"]).nonzero()[[1, 5, 9]]
    state["fc1.weight"][tuple(where.T)] = torch.tensor([0.5, -0.25, float("nan")])
    return state


@pytest.mark.parametrize("place", ["beside", "named", "bool", "torch"])
def test_masks_that_are_not_applied(pruned, tmp_path, place):
    """Masks beside the file, by name, of this library or mere zeros and ones."""
    net, masks = pruned
    state = planted(net, masks)
    state["fc1.weight"].nan_to_num_(1.0)
    path, given = tmp_path / "weights.safetensors", {}
    if place == "beside":
        masks.save(tmp_path / "masks.safetensors")
    elif place == "named":
        masks.save(tmp_path / "m.safetensors")
        given = {"masks": tmp_path / "m.safetensors"}
    else:
        given = {"masks": tmp_path / ("m.pt" if place == "torch" else "m.safetensors")}
        plain = {n: m if place == "bool" else m.float() for n, m in masks.items()}
        clinic.write({f"{n}_mask" if place == "torch" else n: m for n, m in plain.items()}, given["masks"])

    report = clinic.look(state, path, **given)
    tensors, done = clinic.treat(path, **given)

    assert clinic.kinds(report) == [("mask not applied", ("fc1.weight",), 3)] and report.masked
    assert clinic.same(tensors, clinic.state_of(net)) and not done.report.findings


def test_nan_under_a_mask_is_mended(pruned, tmp_path):
    net, masks = pruned
    masks.save(tmp_path / "m.safetensors")
    clinic.write(planted(net, masks), tmp_path / "w.safetensors")

    tensors, done = clinic.treat(tmp_path / "w.safetensors", masks=tmp_path / "m.safetensors")

    assert clinic.same(tensors, clinic.state_of(net)) and not done.report.findings


def test_masks_of_another_network(pruned, tmp_path):
    """A name that is not there, and another shape."""
    net, masks = pruned
    other = {"fc9.weight": torch.ones(3, 3, dtype=torch.bool), "fc2.weight": torch.ones(9, 9, dtype=torch.bool)}
    Masks({**masks, **other}).save(tmp_path / "m.safetensors")

    report = clinic.look(clinic.state_of(net), tmp_path / "w.safetensors", masks=tmp_path / "m.safetensors")

    assert sorted(clinic.kinds(report)) == [("foreign mask", ("fc2.weight",), 1), ("foreign mask", ("fc9.weight",), 1)]
    assert "[9, 9]" in report.findings[0].what and not report.fixable


def test_a_leftover_mask_of_another_shape(pruned, tmp_path):
    state = clinic.state_of(pruned[0])
    state["fc2.weight_orig"] = state.pop("fc2.weight")
    state["fc2.weight_mask"] = torch.ones(5, 5)

    report = clinic.look(state, tmp_path / "w.safetensors")

    found = {finding.kind: (finding.tensors, finding.fixable) for finding in report.findings}
    assert found == {
        "leftover": (("fc2.weight_orig", "fc2.weight_mask"), False), "foreign mask": (("fc2.weight_mask",), False)
    }  # fmt: skip


@pytest.mark.parametrize("leftover", [False, True])
def test_a_mask_that_closes_a_layer(pruned, tmp_path, leftover):
    """Told once, by the mask, not again by the weight that it makes zero."""
    net, masks = pruned
    state, given = clinic.state_of(net), {}
    gone = torch.zeros_like(masks["fc2.weight"])
    if leftover:
        state["fc2.weight_orig"], state["fc2.weight_mask"] = state.pop("fc2.weight"), gone.float()
    else:
        state["fc2.weight"].zero_()
        Masks({**masks, "fc2.weight": gone}).save(tmp_path / "m.safetensors")
        given = {"masks": tmp_path / "m.safetensors"}

    report = clinic.look(state, tmp_path / "w.safetensors", **given)

    found = [finding for finding in clinic.kinds(report) if finding[0] != "leftover"]
    assert found == [("layer collapse", ("fc2.weight",), gone.numel())]


@pytest.mark.parametrize("nm", [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("kind", ["matrix", "convolution"])
def test_groups_that_break_a_pattern(tmp_path, nm, kind):
    """Two groups of many hold one weight too many; the smallest goes, and the others stay."""
    n, m = nm
    random = torch.Generator().manual_seed(5)
    weight = torch.randn((16, 64) if kind == "matrix" else (16, 32, 3, 3), generator=random)
    mask = NM(n, m).mask(weight.abs(), weight.numel() * n // m)
    good = torch.where(mask, weight, 0.0)
    bad = good.clone()
    for row in (2, 7):
        free = (good[row].reshape(good.shape[1], -1)[:m, 0] == 0).nonzero()[0, 0]
        bad[row].reshape(good.shape[1], -1)[free, 0] = 1e-3
    state = {"fc.weight": bad, "head.weight": torch.randn(4, 16, generator=random)}

    report = clinic.look(state, tmp_path / "w.safetensors")
    tensors, done = clinic.treat(tmp_path / "w.safetensors")

    assert clinic.kinds(report) == [("broken N:M", ("fc.weight",), 2)] and f"is {n}:{m} in" in report.findings[0].what
    assert torch.equal(tensors["fc.weight"], good) and not done.report.findings


def test_the_groups_are_named(tmp_path):
    """By their number: rows first, then the groups of inputs."""
    weight = torch.ones(16, 32) * torch.tensor([1.0, 0, 0, 1] * 8)
    weight[3, 8] = 1.0
    weight[3, 9:12] = 1.0

    report = clinic.look({"fc.weight": weight}, tmp_path / "w.safetensors")

    assert clinic.kinds(report) == [("broken N:M", ("fc.weight",), 1)] and "(number 26)" in report.findings[0].what


@pytest.mark.parametrize("turned", [False, True])
def test_the_line_that_it_prints_does_what_fix_does(tmp_path, turned):
    """Pasted as it stands, also for a matrix that lies the other way round; so does the line for a mask beside."""
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(3))
    weight *= NM(2, 4).mask(weight.abs(), weight.numel() // 2)
    weight[3, :4] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    weight = weight.t().contiguous() if turned else weight
    mask = (torch.rand(9, 9, generator=torch.Generator().manual_seed(4)) > 0.5).float()
    state = {"a.weight": weight, "b.weight": torch.ones(9, 9).cumsum(0), "b.weight_mask": mask}

    report = clinic.look(state, tmp_path / "w.safetensors")
    tensors, _ = clinic.treat(tmp_path / "w.safetensors")

    place = {"w": weight.clone(), "state": {name: tensor.clone() for name, tensor in state.items()}}
    for finding in report.findings:
        exec(re.search(r"`([^`]*[*]=[^`]*)`", finding.cure)[1], place)
    assert sorted(f.kind for f in report.findings) == ["broken N:M", "mask not applied"]
    assert int((weight != 0).sum()) - int((tensors["a.weight"] != 0).sum()) == 2
    assert torch.equal(place["w"], tensors["a.weight"]) and torch.equal(place["state"]["b.weight"], tensors["b.weight"])


@pytest.mark.parametrize("given", ["dense", "masks"])
def test_pruned_biases_and_scales(tmp_path, given):
    """Zeros in vectors where the dense network has values, or a mask says so; otherwise nobody can know."""
    net = clinic.fresh("mlp")
    clinic.fit(net, "mlp")
    state = clinic.state_of(net)
    clinic.write(state, tmp_path / "dense.safetensors")
    name = next(n for n in state if n.endswith("running_var")).replace("running_var", "weight")
    keep = torch.ones_like(state[name], dtype=torch.bool)
    keep[[1, 4, 5]] = False
    state[name][~keep] = 0
    assert clinic.kinds(clinic.look(state, tmp_path / "w.safetensors")) == []
    Masks({name: keep}).save(tmp_path / "masks-too.safetensors")

    where = {"dense": tmp_path / "dense.safetensors", "masks": tmp_path / "masks-too.safetensors"}[given]
    report = clinic.look(state, tmp_path / "w.safetensors", **{given: where})

    assert clinic.kinds(report) == [("pruned vector", (name,), 3)]
