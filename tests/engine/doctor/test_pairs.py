"""Planted: ties that came apart, averages that were not pruned, an optimizer that revives."""

import pytest
import torch
from tests.engine.doctor import clinic


@pytest.fixture
def gpt():
    """A network with tied weights, its state with each name in memory of its own, and which weights were pruned."""
    net = clinic.fresh("gpt_tiny")
    clinic.fit(net, "gpt_tiny")
    state = clinic.state_of(net)
    names = [n for n in state if state[n].shape == (40, 32)]
    assert len(names) == 2 and torch.equal(state[names[0]], state[names[1]])
    return state, names


def options():
    return {"net": "gpt_tiny", "options": {"model": clinic.NETS["gpt_tiny"][0]}}


@pytest.mark.parametrize("given", [False, True], ids=["without the network", "with it"])
@pytest.mark.parametrize("which", [0, 1])
def test_one_of_two_tied_weights_is_pruned(gpt, tmp_path, given, which):
    """The pruned one wins."""
    state, names = gpt
    gone = state[names[which]].abs() < state[names[which]].abs().median()
    state[names[which]][gone] = 0

    beside = options() if given else {}
    report = clinic.look(state, tmp_path / "w.safetensors", **beside)
    tensors, done = clinic.treat(tmp_path / "w.safetensors", **beside)

    ((kind, found, count),) = clinic.kinds(report)
    assert (kind, sorted(found), count) == ("ties apart", sorted(names), int(gone.sum()))
    assert f"`{names[which]}` is pruned where" in report.findings[0].what and not done.report.findings
    expected = {**state, names[1 - which]: state[names[which]]}
    assert clinic.same(tensors, expected)


def test_ties_that_no_zero_decides(gpt, tmp_path):
    """Values differ: found, and left alone."""
    state, names = gpt
    state[names[0]][0, :3] += 1

    report = clinic.look(state, tmp_path / "w.safetensors")

    assert [(f.kind, f.count, f.fixable) for f in report.findings] == [("ties apart", 3, False)]
    tensors, done = clinic.treat(tmp_path / "w.safetensors")
    assert clinic.same(tensors, state) and len(done.report.findings) == 1


def test_layers_of_one_stack_are_not_ties(tmp_path):
    """Copies of one layer, each pruned to its own sparsity: they only began alike."""
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    cut = {k: torch.where(weight.abs() < k / 4, 0.0, weight) for k in range(3)}
    state = {f"layers.{k}.weight": tensor for k, tensor in cut.items()}

    assert clinic.kinds(clinic.look(state, tmp_path / "w.safetensors")) == []


def checkpoint(form):
    """A pruned network and an average that was not: under an entry, as a list, with prefixes."""
    net, masks = clinic.pruned_net("lenet_300_100", "50 %")
    state = clinic.state_of(net)
    average = {n: t + 0.01 for n, t in state.items()}
    if form == "list":
        return state, masks, {"shadow_params": list(average.values())}
    if form == "wrapped":
        return state, masks, {"model_ema": {f"module.{n}": t for n, t in average.items()}}
    return state, masks, {form: average}


def inner(entry):
    return dict(enumerate(entry)) if isinstance(entry, list) else entry


@pytest.mark.parametrize("form", ["ema", "state_dict_ema", "list", "wrapped"])
def test_an_average_that_was_not_pruned(tmp_path, form):
    """Mended where it lies in the same file; all its other values stay."""
    state, masks, ema = checkpoint(form)
    torch.save({"state_dict": state, **ema, "epoch": 4}, tmp_path / "c.pt")

    report = clinic.examine(tmp_path / "c.pt")
    clinic.treat(tmp_path / "c.pt")

    gone = {name: int((~mask).sum()) for name, mask in masks.items()}
    assert {(f.kind, f.tensors[0], f.count) for f in report.findings} == {
        ("average not pruned", name, count) for name, count in gone.items()
    }  # fmt: skip
    whole = torch.load(tmp_path / "mended-c.pt", weights_only=True)
    (key,) = ema
    assert whole["epoch"] == 4 and clinic.same(whole["state_dict"], state)
    for (_, old), (name, new) in zip(inner(ema[key]).items(), inner(whole[key]).items(), strict=True):
        place = list(state)[name] if isinstance(name, int) else name.removeprefix("module.")
        kept = masks[place] if place in masks else torch.ones_like(old, dtype=torch.bool)
        assert torch.equal(new, torch.where(kept, old, 0.0))


def test_an_average_in_another_file(tmp_path):
    """Told, and not mended: the copy is of the file that was named."""
    state, masks, ema = checkpoint("ema")
    clinic.write(ema["ema"], tmp_path / "ema.safetensors")

    report = clinic.look(state, tmp_path / "w.safetensors", ema=tmp_path / "ema.safetensors")

    assert {f[0] for f in clinic.kinds(report)} == {"average not pruned"} and len(report.findings) == len(masks)
    assert not report.fixable


@pytest.mark.parametrize("start", ["ema.", "ema_model."])
def test_an_average_among_the_weights(tmp_path, start):
    """Told by its names."""
    state, masks, ema = checkpoint("ema")
    model = "model." if start == "ema_model." else ""
    whole = {f"{model}{n}": t for n, t in state.items()} | {f"{start}{n}": t for n, t in ema["ema"].items()}

    report = clinic.look(whole, tmp_path / "w.safetensors")

    gone = {(f"{model}{name}",): int((~mask).sum()) for name, mask in masks.items()}
    assert {f[1]: f[2] for f in clinic.kinds(report) if f[0] == "average not pruned"} == gone == {
        f[1]: f[2] for f in clinic.kinds(report)
    }  # fmt: skip


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_that_revives(tmp_path, kind):
    """Momentum of before the pruning; the mended copy has none where weights are zero, and all of it elsewhere."""
    net = clinic.fresh("lenet_300_100")
    optimizer = kind(net.parameters(), lr=1e-3, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    inputs, target = clinic.batch("lenet_300_100")
    torch.nn.functional.cross_entropy(net(inputs), target).backward()
    optimizer.step()
    masks = clinic.pruned_masks(net, *clinic.WAYS["90 %"])
    masks.apply_(net)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.pt")

    report = clinic.examine(tmp_path / "c.pt")
    clinic.treat(tmp_path / "c.pt")

    place = {name: index for index, (name, _) in enumerate(net.named_parameters())}
    old = optimizer.state_dict()["state"]
    what = "momentum_buffer" if kind is torch.optim.SGD else "exp_avg"
    expected = {("optimizer revives", n, int((old[place[n]][what].ne(0) & ~m).sum())) for n, m in masks.items()}
    assert {(f.kind, f.tensors[0], f.count) for f in report.findings} == expected
    new = torch.load(tmp_path / "mended-c.pt", weights_only=True)["optimizer"]
    assert new["param_groups"] == optimizer.state_dict()["param_groups"]
    for name, index in place.items():
        for key, before in old[index].items():
            kept = masks[name] if name in masks and before.dim() else torch.ones_like(before, dtype=torch.bool)
            assert torch.equal(new["state"][index][key], torch.where(kept, before, 0.0)), (name, key)


def test_an_optimizer_that_nobody_can_place(tmp_path):
    """Two groups without names may be in any order: nothing is said."""
    net, _ = clinic.pruned_net("lenet_300_100", "90 %")
    groups = [{"params": [p for p in net.parameters() if p.dim() == k]} for k in (1, 2)]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    inputs, target = clinic.batch("lenet_300_100")
    torch.nn.functional.cross_entropy(net(inputs), target).backward()
    optimizer.step()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.pt")

    assert clinic.kinds(clinic.examine(tmp_path / "c.pt")) == []
