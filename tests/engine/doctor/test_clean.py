"""Files in which nothing is wrong: the doctor must find nothing."""

import pytest
import torch
from tests.engine.doctor import clinic

from secateur.nets import names

QUICK = ("mlp", "resnet_cifar", "vit_tiny", "gpt_tiny", "lstm")


def test_the_corpus_holds_every_network():
    assert sorted(clinic.NETS) == names()


@pytest.mark.parametrize("name", clinic.NETS)
def test_fresh_and_trained_networks(name, tmp_path):
    net = clinic.fresh(name)
    assert clinic.kinds(clinic.look(clinic.state_of(net), tmp_path / "w.safetensors")) == []

    clinic.fit(net, name)

    assert clinic.kinds(clinic.look(clinic.state_of(net), tmp_path / "w.safetensors")) == []


@pytest.mark.parametrize("name", clinic.NETS)
def test_pruned_networks(name, tmp_path):
    net, masks = clinic.pruned_net(name, "90 %", steps=1)

    report = clinic.look(clinic.state_of(net), tmp_path / "w.safetensors")

    assert clinic.kinds(report) == []
    assert sum(row["zeros"] for row in report.tensors if row["name"] in masks) == masks.total - masks.kept


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("way", [way for way in clinic.WAYS if way != "90 %"])
def test_other_patterns(name, way, tmp_path):
    net, _ = clinic.pruned_net(name, way, steps=1)

    assert clinic.kinds(clinic.look(clinic.state_of(net), tmp_path / "w.safetensors")) == []


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["", "2:4"])
def test_half_precision(name, dtype, way, tmp_path):
    """Some numbers of float16 are subnormal in every network, and bfloat16 rounds many to the same."""
    net = clinic.pruned_net(name, way, steps=1)[0] if way else clinic.fresh(name)
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in clinic.state_of(net).items()}

    assert clinic.kinds(clinic.look(state, tmp_path / "w.safetensors")) == []


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("draw", [torch.randn, torch.rand])
def test_large_dense_tensors_have_no_gap(draw, seed, tmp_path):
    """A million numbers: some come near zero, but more and more of them the farther one looks."""
    state = {"fc.weight": draw(1000, 1000, generator=torch.Generator().manual_seed(seed))}

    assert clinic.kinds(clinic.look(state, tmp_path / "w.safetensors")) == []


def test_tied_weights_averages_and_optimizer_of_one_checkpoint(tmp_path):
    """A checkpoint as a careful trainer writes it: zeros held in the weights, the average and the optimizer."""
    net, masks = clinic.pruned_net("gpt_tiny", "90 %")
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    average = torch.optim.swa_utils.AveragedModel(net)
    with masks.hold(net, optimizer, also=[average]):
        clinic.fit(net, "gpt_tiny", masks)
        average.update_parameters(net)
    ema = {n: p.detach().clone() for n, p in average.module.state_dict().items()}
    whole = {"state_dict": net.state_dict(), "ema": ema, "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(whole, tmp_path / "checkpoint.pt")

    assert clinic.kinds(clinic.examine(tmp_path / "checkpoint.pt")) == []


def test_a_table_of_minus_infinity_is_no_fault(tmp_path):
    """It tells attention where not to look."""
    state = {"attention.bias": torch.full((8, 8), float("-inf")).triu(1), "attention.weight": torch.randn(8, 8)}

    assert clinic.kinds(clinic.look(state, tmp_path / "w.safetensors")) == []


def test_statistics_of_dead_channels_are_no_fault(tmp_path):
    """A channel without weights has no variance."""
    net = clinic.fresh("mlp")
    clinic.fit(net, "mlp")
    state = clinic.state_of(net)
    name = next(n for n in state if n.endswith("running_var")).removesuffix("running_var")
    weight = next(n for n, t in state.items() if t.dim() == 2 and len(t) == len(state[f"{name}running_var"]))
    state[weight][3] = 0
    state[f"{name}running_var"][3] = 0

    assert clinic.kinds(clinic.look(state, tmp_path / "w.safetensors")) == []


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_types_and_shapes_of_all_kinds(tmp_path, suffix):
    """Counted as far as it makes sense, and no reason for alarm."""
    state = {
        "a.weight": torch.randn(8, 8).to(torch.float8_e4m3fn), "b.weight": torch.randn(8, 8).to(torch.float8_e4m3fn),
        "int": torch.arange(-3, 3, dtype=torch.int8), "bool": torch.tensor([True, False]), "empty": torch.zeros(0, 4),
        "number": torch.tensor(3.0), "complex": torch.zeros(2, dtype=torch.complex64), "bytes": torch.ones(2).byte(),
        "u16": torch.tensor([0, 65535], dtype=torch.uint16), "u64": torch.tensor([0, 0, 1], dtype=torch.uint64),
    }  # fmt: skip

    report = clinic.look(state, tmp_path / f"w.{suffix}")

    zeros = {row["name"]: row["zeros"] for row in report.tensors}
    assert clinic.kinds(report) == []
    assert (zeros["int"], zeros["bool"], zeros["empty"], zeros["complex"], zeros["bytes"]) == (1, 1, 0, 2, 0)
    assert (zeros["u16"], zeros["u64"]) == (1, 2)
