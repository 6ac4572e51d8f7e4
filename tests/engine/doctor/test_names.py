"""Planted: what wrappers and torch's own pruning leave in a file."""

import pytest
import torch
from tests.engine.doctor import clinic
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from secateur.core.masks import Masks


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_leftovers_of_torch_prune(tmp_path, suffix):
    """The mended copy is what ``prune.remove`` gives."""
    net = clinic.fresh("lenet_300_100")
    torch_prune.l1_unstructured(net.fc1, "weight", amount=0.5)
    torch_prune.random_unstructured(net.head, "bias", amount=2)

    report = clinic.look(clinic.state_of(net), tmp_path / f"w.{suffix}")
    tensors, done = clinic.treat(tmp_path / f"w.{suffix}")

    fc1, head = ("fc1.weight_orig", "fc1.weight_mask"), ("head.bias_orig", "head.bias_mask")
    assert sorted(clinic.kinds(report)) == [("leftover", fc1, 300 * 24), ("leftover", head, 2)]
    torch_prune.remove(net.fc1, "weight")
    torch_prune.remove(net.head, "bias")
    assert clinic.same(tensors, clinic.state_of(net)) and not done.report.findings
    net.load_state_dict(tensors)


def test_leftovers_of_parametrizations(tmp_path):
    """The mended copy is what ``remove_parametrizations`` gives."""
    net = clinic.fresh("lenet_300_100")
    mask = (torch.rand(net.fc1.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    parametrize.register_parametrization(net.fc1, "weight", Masked(mask))

    report = clinic.look(clinic.state_of(net), tmp_path / "w.pt")
    tensors, _ = clinic.treat(tmp_path / "w.pt")

    names = ("fc1.parametrizations.weight.original", "fc1.parametrizations.weight.0.mask")
    assert clinic.kinds(report) == [("leftover", names, int((mask == 0).sum()))]
    parametrize.remove_parametrizations(net.fc1, "weight")
    assert clinic.same(tensors, clinic.state_of(net))


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrizations_that_belong_to_a_network_are_left(tmp_path, norm):
    net = norm(nn.Linear(16, 16))

    assert clinic.kinds(clinic.look(clinic.state_of(net), tmp_path / "w.pt")) == []


def test_nan_under_a_mask_is_gone_with_it(tmp_path):
    """Zero times NaN is NaN; a pruned weight is zero."""
    net = clinic.fresh("lenet_300_100")
    torch_prune.l1_unstructured(net.fc1, "weight", amount=0.5)
    state = clinic.state_of(net)
    state["fc1.weight_orig"][state["fc1.weight_mask"] == 0] = float("nan")
    clinic.write(state, tmp_path / "w.pt")

    tensors, done = clinic.treat(tmp_path / "w.pt")

    assert not done.report.findings
    assert torch.equal(tensors["fc1.weight"] == 0, state["fc1.weight_mask"] == 0)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda net: torch.compile(net, backend="eager"),
        lambda net: torch.compile(nn.DataParallel(net), backend="eager"),
        torch.optim.swa_utils.AveragedModel,
    ],
    ids=["parallel", "compile", "both", "average"],
)
def test_prefixes_of_wrappers(tmp_path, wrap):
    """The mended copy has the names of the network itself, which tells that ``module.`` is none of them."""
    net, given = clinic.fresh("mlp"), {"net": "mlp", "options": {"model": clinic.NETS["mlp"][0]}}
    state = dict(wrap(net).state_dict())

    report = clinic.look({n: t.clone() for n, t in state.items()}, tmp_path / "w.pt", **given)
    tensors, done = clinic.treat(tmp_path / "w.pt", **given)

    wrapped = [n for n in state if n != "n_averaged"]
    assert clinic.kinds(report) == [("prefix", tuple(wrapped), len(wrapped))]
    assert clinic.same(tensors, clinic.state_of(net)) and not done.report.findings


class Holder(nn.Module):
    """A class whose only child is called as DataParallel calls it."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(40, 40)


def test_a_prefix_that_may_be_the_networks_own(tmp_path):
    """Without the network nobody knows: it stays, and other faults are mended under the names of the file."""
    state = clinic.state_of(Holder())
    state["module.bias"][0] = 1e-41

    report = clinic.look(state, tmp_path / "w.pt")
    clinic.examine(tmp_path / "w.pt")
    done = clinic.mend(tmp_path / "w.pt", tmp_path / "v.pt")

    assert [(f.kind, f.severity, f.fixable) for f in report.findings] == [
        ("module prefix", "warning", False), ("subnormal", "warning", True)
    ]  # fmt: skip
    assert "--net" in report.findings[0].cure
    assert [f.kind for f in done.fixed] == ["subnormal"] and [f.kind for f in done.report.findings] == ["module prefix"]
    Holder().load_state_dict(torch.load(tmp_path / "v.pt", weights_only=True))
    known = clinic.examine(tmp_path / "v.pt", clinic.Beside(net=f"{__name__}:Holder"))
    assert known.findings == ()


@pytest.mark.parametrize("last", [[], ["x.weight_u", "x.weight_v"], ["x.weight_g"]])
def test_an_original_without_its_mask(tmp_path, last):
    """Half of what torch.nn.utils.prune keeps; beside the vectors of a norm it is no pruning."""
    state = {"x.weight_orig": torch.randn(8, 8), "x.bias": torch.randn(8), **{n: torch.randn(8) for n in last}}

    report = clinic.look(state, tmp_path / "w.pt")

    expected = [] if last else [("mask lost", ("x.weight_orig",), 1)]
    assert clinic.kinds(report) == expected and not report.fixable


def test_a_mask_without_its_weight(tmp_path):
    """A file of nothing but masks lacks nothing, and other masks are none of pruning."""
    mask = (torch.rand(8, 8) > 0.5).float()
    state = {"x.weight_mask": mask, "y.weight": torch.randn(8, 8), "attention.causal_mask": mask}

    assert clinic.kinds(clinic.look(state, tmp_path / "w.pt")) == [("weight lost", ("x.weight_mask",), 1)]
    assert clinic.kinds(clinic.look({"x.weight_mask": mask}, tmp_path / "masks.pt")) == []


@pytest.mark.parametrize("start", ["", "module.", "_orig_mod."])
def test_a_mask_beside_its_weight(tmp_path, start):
    """It is applied; modules that multiply on the way find both again."""
    weight, mask = torch.randn(8, 8), (torch.rand(8, 8) > 0.5).float()
    state = {f"{start}x.weight": weight, f"{start}x.weight_mask": mask, f"{start}y.weight": torch.randn(8, 8)}

    report = clinic.look(state, tmp_path / "w.pt")
    tensors, done = clinic.treat(tmp_path / "w.pt")

    count = int((mask == 0).sum())
    assert ("mask not applied", ("x.weight",), count) in clinic.kinds(report)
    assert "mask not applied" not in {f.kind for f in done.report.findings}
    end = start.removeprefix("_orig_mod.")
    expected = {"x.weight": weight * mask, "x.weight_mask": mask, "y.weight": state[f"{start}y.weight"]}
    assert clinic.same(tensors, {f"{end}{name}": tensor for name, tensor in expected.items()})


def test_a_part_that_was_compiled(tmp_path):
    """The prefix is in the middle of some names."""
    net = clinic.fresh("mlp")
    state = {n.replace("fc1.", "fc1._orig_mod."): t for n, t in clinic.state_of(net).items()}

    report = clinic.look(state, tmp_path / "w.safetensors")
    tensors, _ = clinic.treat(tmp_path / "w.safetensors")

    assert clinic.kinds(report) == [("prefix", ("fc1._orig_mod.weight",), 1)]
    assert clinic.same(tensors, clinic.state_of(net))


def test_a_module_that_is_called_module(tmp_path):
    """Only if all names begin so it is a wrapper."""
    state = {"module.weight": torch.randn(8, 8), "head.weight": torch.randn(4, 8)}

    assert clinic.kinds(clinic.look(state, tmp_path / "w.safetensors")) == []


def test_names_that_would_collide_are_left(tmp_path):
    state = {"a._orig_mod.weight": torch.randn(8, 8), "a.weight": torch.randn(8, 8)}

    assert clinic.kinds(clinic.look(state, tmp_path / "w.safetensors")) == []


def test_all_at_once(tmp_path):
    """Leftovers in a wrapped network, one mask beside them that is not carried out: found in one go, mended in one."""
    net = clinic.fresh("lenet_300_100")
    torch_prune.l1_unstructured(net.fc1, "weight", amount=0.5)
    state = {f"module.{n}": t for n, t in clinic.state_of(net).items()}
    mask = torch.rand(100, 300, generator=torch.Generator().manual_seed(0)) < 0.5
    Masks({"fc2.weight": mask}).save(tmp_path / "masks.safetensors")

    report = clinic.look(state, tmp_path / "w.pt", masks=tmp_path / "masks.safetensors")
    tensors, done = clinic.treat(tmp_path / "w.pt", masks=tmp_path / "masks.safetensors")

    count = int((~mask).sum())
    assert {f[0]: f[2] for f in clinic.kinds(report)} == {
        "leftover": 7200, "prefix": len(state), "mask not applied": count
    }  # fmt: skip
    torch_prune.remove(net.fc1, "weight")
    with torch.no_grad():
        net.fc2.weight[~mask] = 0
    assert clinic.same(tensors, clinic.state_of(net)) and not done.report.findings


def test_equal_tensors_are_noted(tmp_path):
    """Tied weights stored twice are no fault; where they are known to be tied they are not mentioned."""
    net = clinic.fresh("gpt_tiny")
    clinic.fit(net, "gpt_tiny")

    assert clinic.noted(clinic.look(clinic.state_of(net), tmp_path / "w.safetensors")) == {"stored twice": 1}
    assert clinic.noted(clinic.look(dict(net.state_dict()), tmp_path / "w.pt")) == {}
