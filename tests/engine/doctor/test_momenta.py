"""An optimizer's memory beside a pruned network: brought into the order of the mended one, or told where nobody can."""

import pytest
import torch
from tests.engine.doctor import clinic
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from secateur.engine.doctor import Beside, examine, mend


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


class Own(nn.Module):
    """A module with parameters of names that tell no order, the pruned one first."""

    def __init__(self):
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return x @ self.weight.t() + self.shift


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 5))


def own():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), Own())


def by_prune(module):
    torch_prune.l1_unstructured(module, "weight", 0.5)


def by_both(module):
    torch_prune.l1_unstructured(module, "weight", 0.5)
    torch_prune.l1_unstructured(module, "bias", 2)


def by_parametrization(module):
    mask = (module.weight.detach().abs() > 0.1).float()
    parametrize.register_parametrization(module, "weight", Masked(mask))


def train(net, optimizer, x, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        net(x).pow(2).sum().backward()
        optimizer.step()


def saved(net, optimizer, path, **more):
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), **more}, path)
    return path


@pytest.mark.parametrize("named", [False, True], ids=["by order", "by names"])
@pytest.mark.parametrize("how", [by_prune, by_both, by_parametrization])
def test_training_goes_on_from_the_mended_copy(tmp_path, how, named):
    """Each parameter gets the memory that was its own, by torch's own loading, and the next step runs."""
    net = plain()
    how(net[0])
    optimizer = torch.optim.Adam(net.named_parameters() if named else net.parameters(), lr=1e-3)
    train(net, optimizer, torch.randn(8, 6))
    memory = {name: optimizer.state[p]["exp_avg"].clone() for name, p in net.named_parameters()}

    done = mend(saved(net, optimizer, tmp_path / "c.pt"), tmp_path / "d.pt")

    assert {f.kind for f in done.fixed} == {"leftover"} and not done.report.findings
    whole = torch.load(tmp_path / "d.pt", weights_only=True)
    again = plain()
    again.load_state_dict(whole["model"])
    assert list(whole["model"]) == list(again.state_dict())
    resumed = torch.optim.Adam(again.named_parameters() if named else again.parameters(), lr=1e-3)
    resumed.load_state_dict(whole["optimizer"])
    for name, p in again.named_parameters():
        before = f"{name}_orig" if f"{name}_orig" in memory else name
        path, _, last = name.rpartition(".")
        before = before if before in memory else f"{path}.parametrizations.{last}.original"
        assert torch.equal(resumed.state[p]["exp_avg"], memory[before]), name
    train(again, resumed, torch.randn(8, 6), 1)


def test_an_order_that_the_file_does_not_tell(tmp_path):
    """Weights of a class of one's own: told, also of the copy, in which nothing shows it any more."""
    net = own()
    torch_prune.l1_unstructured(net[1], "weight", 0.5)
    optimizer = torch.optim.Adam(net.parameters())
    train(net, optimizer, torch.randn(8, 4))
    path = saved(net, optimizer, tmp_path / "c.pt")

    done = mend(path, tmp_path / "d.pt")

    assert [(f.kind, f.tensors, f.fixable) for f in done.report.findings] == [("optimizer order", ("1.weight",), False)]
    assert {f.kind for f in examine(path).findings} == {"leftover", "optimizer order"}

    done = mend(path, tmp_path / "e.pt", Beside(net=f"{__name__}:own"))

    assert not done.report.findings
    again, whole = own(), torch.load(tmp_path / "e.pt", weights_only=True)
    again.load_state_dict(whole["model"])
    resumed = torch.optim.Adam(again.parameters())
    resumed.load_state_dict(whole["optimizer"])
    shapes = {name: resumed.state[p]["exp_avg"].shape for name, p in again.named_parameters()}
    assert shapes == {name: p.shape for name, p in again.named_parameters()}


@pytest.mark.parametrize("form", ["no memory", "no bias", "a list"])
def test_what_the_order_does_not_touch(tmp_path, form):
    """Plain SGD remembers nothing; alone in its module a weight stays; of several optimizers it is told."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6, bias=form != "no bias"))
    by_prune(net[0])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.0 if form == "no memory" else 0.9)
    train(net, optimizer, torch.randn(8, 6))
    states = optimizer.state_dict()
    name, value = ("optimizer_states", [states]) if form == "a list" else ("optimizer", states)
    torch.save({"state_dict": net.state_dict(), name: value}, tmp_path / "c.pt")

    done = mend(tmp_path / "c.pt", tmp_path / "d.pt")

    assert [f.kind for f in done.report.findings] == (["optimizer order"] if form == "a list" else [])


def test_momentum_that_may_be_anothers(tmp_path):
    """Three layers of one shape: only the names, or the network, tell whose memory is whose."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(6, 6, bias=False) for _ in range(3)])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    train(net, optimizer, torch.randn(8, 6), 1)
    with torch.no_grad():
        net[0].weight[:, :3] = 0
    state = net.state_dict()
    turned = {
        name: state[name] for name in ("1.weight", "2.weight", "0.weight")
    }  # as a program that sorts may write it
    torch.save({"model": turned, "optimizer": optimizer.state_dict()}, tmp_path / "c.pt")
    named = torch.optim.SGD(net.named_parameters(), lr=0.1, momentum=0.9)
    named.load_state_dict(optimizer.state_dict())
    torch.save({"model": turned, "optimizer": named.state_dict()}, tmp_path / "n.pt")

    done = mend(tmp_path / "c.pt", tmp_path / "d.pt")
    told = mend(tmp_path / "n.pt", tmp_path / "m.pt")

    assert [(f.kind, f.severity, f.fixable) for f in done.report.findings] == [("optimizer revives", "warning", False)]
    old, new = (torch.load(tmp_path / name, weights_only=True)["optimizer"]["state"] for name in ("c.pt", "d.pt"))
    assert all(torch.equal(old[k]["momentum_buffer"], new[k]["momentum_buffer"]) for k in range(3))
    assert [f.kind for f in told.fixed] == ["optimizer revives"]
    new = torch.load(tmp_path / "m.pt", weights_only=True)["optimizer"]["state"]
    for k in range(3):
        kept = state["0.weight"] != 0 if k == 0 else torch.ones(6, 6, dtype=torch.bool)
        assert torch.equal(new[k]["momentum_buffer"], torch.where(kept, old[k]["momentum_buffer"], 0.0))


def test_a_second_mending_changes_nothing(tmp_path):
    """Leftovers in a stack of equal layers, mended, and mended again: the memory of all others stays."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(6, 6, bias=False) for _ in range(3)])
    by_prune(net[0])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    train(net, optimizer, torch.randn(8, 6))

    mend(saved(net, optimizer, tmp_path / "c.pt"), tmp_path / "d.pt")
    done = mend(tmp_path / "d.pt", tmp_path / "e.pt")

    assert not done.fixed and not done.report.findings
    new = torch.load(tmp_path / "e.pt", weights_only=True)
    assert list(new["model"]) == ["0.weight", "1.weight", "2.weight"]
    for k, entry in optimizer.state_dict()["state"].items():
        assert torch.equal(new["optimizer"]["state"][k]["momentum_buffer"], entry["momentum_buffer"])


def test_what_nothing_was_wrong_with_is_as_it_was(tmp_path):
    """Kinds of tables, what hangs on them, and parameters: of the network, the average and the optimizer."""
    net, average = plain(), plain()
    with torch.no_grad():
        net[0].weight[:, :3] = 0
    optimizer = torch.optim.Adam(net.parameters())
    train(net, optimizer, torch.randn(8, 6))
    with torch.no_grad():
        net[0].weight[:, :3] = 0
    parameters = {name: nn.Parameter(t) for name, t in average.state_dict().items() if t.is_floating_point()}
    path = saved(net, optimizer, tmp_path / "c.pt", ema=average.state_dict(), teacher=parameters, epoch=3)

    done = mend(path, tmp_path / "d.pt")

    old, new = (torch.load(tmp_path / name, weights_only=True) for name in ("c.pt", "d.pt"))
    assert {"average not pruned", "optimizer revives"} <= {f.kind for f in done.fixed}
    for key in ("model", "ema"):
        assert type(new[key]) is type(old[key]) and new[key]._metadata == old[key]._metadata
        assert list(new[key]) == list(old[key])
    for name, tensor in old["teacher"].items():
        assert type(new["teacher"][name]) is nn.Parameter and new["teacher"][name].requires_grad
        assert torch.equal(new["teacher"][name], tensor) == (name != "0.weight")
    assert new["epoch"] == 3 and new["optimizer"]["param_groups"] == old["optimizer"]["param_groups"]
    assert new["optimizer"]["state"].keys() == old["optimizer"]["state"].keys()


def test_parts_that_are_no_average(tmp_path):
    """A critic is a network of its own: its NaN are found, and that is all that is looked for."""
    torch.save({"state_dict": clinic.state_of(plain()), "critic": clinic.state_of(plain())}, tmp_path / "c.pt")

    report = examine(tmp_path / "c.pt")

    assert report.findings == () and list(report.left) == ["critic"]
