"""Several faults at once: all found, all that can be mended mended, and nothing else touched."""

import pytest
import torch
from tests.engine.doctor import clinic

from secateur.core.masks import Masks
from secateur.core.patterns import NM


def subnormal(state, random):
    state["fc1.bias"][:5] = 1e-41
    return {"subnormal"}


def decayed(state, random):
    gone = torch.rand(state["fc1.weight"].shape, generator=random) < 0.3
    state["fc1.weight"][gone] *= 1e-11
    return {"near zero"}


def broken(state, random):
    weight = state["fc2.weight"]
    mask = NM(2, 4).mask(weight.abs(), weight.numel() // 2)
    mask[3, :4] = True
    weight[~mask] = 0
    weight[3, :4] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    return {"broken N:M"}


def leftover(state, random):
    state["head.weight_orig"] = state.pop("head.weight")
    mask = torch.rand(state["head.weight_orig"].shape, generator=random) < 0.5
    state["head.weight_mask"] = mask.float()
    return {"leftover"}


def tied(state, random):
    state["decoder.weight"] = torch.randn(40, 24, generator=random)
    state["encoder.table.weight"] = state["decoder.weight"].clone()
    state["decoder.weight"][torch.rand(40, 24, generator=random) < 0.5] = 0
    return {"ties apart"}


def wrapped(state, random):
    renamed = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    state.clear()
    state.update(renamed)
    return {"prefix"}


FAULTS = (subnormal, decayed, broken, leftover, tied)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("seed", range(10))
def test_any_of_them(tmp_path, seed, suffix):
    random = torch.Generator().manual_seed(seed)
    state = clinic.state_of(clinic.fresh("lenet_300_100", seed))
    chosen = [fault for fault in FAULTS if torch.rand((), generator=random) < 0.6]
    expected = set().union(*(fault(state, random) for fault in chosen))
    untouched = {name: tensor.clone() for name, tensor in state.items()}
    given = {}
    if seed % 2:
        Masks({"fc2.weight": torch.rand(100, 300, generator=random) < 0.9}).save(tmp_path / "m.safetensors")
        given, expected = {"masks": tmp_path / "m.safetensors"}, {*expected, "mask not applied"}
    if seed % 3 == 0:
        expected |= wrapped(state, random)

    report = clinic.look(state, tmp_path / f"w.{suffix}", **given)
    tensors, done = clinic.treat(tmp_path / f"w.{suffix}", **given)

    assert {finding.kind for finding in report.findings} == expected
    assert done.report.findings == ()
    changed = {"head.weight", "encoder.table.weight", "fc1.weight", "fc1.bias", "fc2.weight"}
    for name, tensor in tensors.items():
        if name in untouched and name not in changed:
            assert torch.equal(tensor, untouched[name]), name
    for name in changed & tensors.keys() & untouched.keys():  # weights are zeroed, never moved
        kept = tensors[name] != 0
        assert torch.equal(tensors[name][kept], untouched[name][kept]), name
