"""Planted: NaN, subnormals, decayed zeros, constant weights, types."""

import pytest
import torch
from tests.engine.doctor import clinic


@pytest.fixture
def state():
    net, _ = clinic.pruned_net("lenet_300_100", "50 %", steps=1)
    return clinic.state_of(net)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_not_finite(state, tmp_path, value, suffix):
    """Told, and told again of the copy: there is nothing to mend it with."""
    state["fc2.weight"][3, 1:4] = value
    state["fc1.bias"][0] = value

    report = clinic.look(state, tmp_path / f"w.{suffix}")

    assert sorted(clinic.kinds(report)) == [("not finite", ("fc1.bias",), 1), ("not finite", ("fc2.weight",), 3)]
    assert not report.fixable
    tensors, done = clinic.treat(tmp_path / f"w.{suffix}")
    assert clinic.kinds(done.report) == clinic.kinds(report) and not done.fixed and clinic.same(tensors, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_subnormal(state, tmp_path, dtype):
    """Numbers below the smallest normal one become zero; the smallest normal one stays."""
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    tiny = torch.finfo(dtype).tiny
    state["fc1.weight"][:3, 0] = torch.tensor([tiny / 2, -tiny / 4, tiny], dtype=dtype)

    report = clinic.look(state, tmp_path / "w.safetensors")
    tensors, done = clinic.treat(tmp_path / "w.safetensors")

    found = [f for f in clinic.kinds(report) if f[0] != "float64"]
    assert found == [("subnormal", ("fc1.weight",), 2)] and [f.kind for f in done.fixed] == ["subnormal"]
    expected = {name: torch.where(tensor.abs() < tiny, 0, tensor) for name, tensor in state.items()}
    assert clinic.same(tensors, expected) and tensors["fc1.weight"][2, 0] == tiny


def test_what_casts_would_make_subnormal_is_counted_and_no_fault(state, tmp_path):
    """Float16 ends at 6.1e-5; bfloat16 reaches as low as float32."""
    state["fc1.weight"][0, :4] = torch.tensor([6.2e-5, 6.0e-5, 1e-7, -1e-6])
    state["fc1.weight"][1:] = 1.0

    report = clinic.look(state, tmp_path / "w.safetensors")

    row = next(row for row in report.tensors if row["name"] == "fc1.weight")
    few = int(((state["fc1.weight"] != 0) & (state["fc1.weight"].abs() < 2.0**-14)).sum())
    assert row["subnormal_in_float16"] == few >= 3 and row["subnormal_in_bfloat16"] == row["subnormal"] == 0
    assert clinic.kinds(report) == []


@pytest.mark.parametrize("size", [1e-9, 1e-12])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.95])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_leaked_mask(state, tmp_path, size, share, suffix):
    """Pruned weights that only decayed, in a tensor that has no true zeros."""
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(100, 300, generator=random) * 0.05
    weight += weight.sign() * 0.01
    gone = torch.rand(weight.shape, generator=random) < share
    weight[gone] *= size
    state["fc2.weight"] = weight

    report = clinic.look(state, tmp_path / f"w.{suffix}")
    tensors, _ = clinic.treat(tmp_path / f"w.{suffix}")

    assert clinic.kinds(report) == [("near zero", ("fc2.weight",), int(gone.sum()))]
    assert torch.equal(tensors["fc2.weight"], torch.where(gone, 0.0, weight))


def test_a_leak_of_subnormals_is_told_once(state, tmp_path):
    state["fc2.weight"][:50] = 1e-41

    assert [f[0] for f in clinic.kinds(clinic.look(state, tmp_path / "w.safetensors"))] == ["subnormal"]


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_constant_layer(state, tmp_path, value):
    """Never initialised, or pruned away; one like it in the dense network is meant so."""
    state["fc2.weight"].fill_(value)

    report = clinic.look(state, tmp_path / "w.safetensors")

    assert clinic.kinds(report) == [("constant", ("fc2.weight",), state["fc2.weight"].numel())]
    assert clinic.kinds(clinic.look(state, tmp_path / "w.safetensors", dense=tmp_path / "w.safetensors")) == []


def test_double_precision(state, tmp_path):
    state = {name: tensor.double() for name, tensor in state.items()}

    report = clinic.look(state, tmp_path / "w.safetensors")

    assert clinic.kinds(report) == [("float64", ("fc1.weight", "fc2.weight", "head.weight"), 3)]
    assert report.findings[0].severity == "warning"


def test_mixed_types(state, tmp_path):
    """Norms in float32 beside weights in bfloat16 are usual; weights of two types are not."""
    half = {n: t.bfloat16() if t.dim() > 1 else t for n, t in state.items()}
    assert clinic.kinds(clinic.look(half, tmp_path / "w.safetensors")) == []
    half["fc2.weight"] = half["fc2.weight"].half()

    assert clinic.kinds(clinic.look(half, tmp_path / "w.safetensors")) == [("mixed types", ("fc2.weight",), 1)]


@pytest.mark.parametrize("along", [0, 1])
@pytest.mark.parametrize("shape", [(64, 48), (64, 48, 3, 3)])
def test_units_that_weight_decay_killed(tmp_path, along, shape):
    """Whole rows or columns far below the others: a note, and --fix leaves them; one weight elsewhere makes a leak."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 3
    weight.transpose(0, along)[[3, 5, 9, 20]] *= 1e-12
    state = {"fc.weight": weight}

    report = clinic.look(state, tmp_path / "w.safetensors")
    tensors, _ = clinic.treat(tmp_path / "w.safetensors")

    assert report.findings == () and clinic.noted(report) == {"decayed units": 4 * weight.numel() // shape[along]}
    assert clinic.same(tensors, state)
    weight.flatten()[weight.flatten().abs().argmax()] = 1e-13
    assert [f[0] for f in clinic.kinds(clinic.look(state, tmp_path / "v.safetensors"))] == ["near zero"]


@pytest.mark.parametrize("name", ["q.lora_B.weight", "q.lora_B.default.weight", "te.lora_up.weight"])
def test_adapters_begin_with_zeros(tmp_path, name):
    """So that the network begins as it was; a layer of zeros that is no such half is a fault still."""
    state = {"q.lora_A.weight": torch.randn(8, 64), name: torch.zeros(64, 8)}
    assert clinic.kinds(clinic.look(state, tmp_path / "w.safetensors")) == []

    state[name] += 0.5
    assert clinic.kinds(clinic.look(state, tmp_path / "w.safetensors")) == [("constant", (name,), 512)]
