"""Planted: statistics of BatchNorm that are stale, were never taken, or cannot be."""

import pytest
import torch
from tests.engine.doctor import clinic

from secateur.core.errors import SecateurError
from secateur.data import load
from secateur.engine.doctor import Beside, examine

WIDTHS = {"model": {"widths": [24, 16], "batch_norm": True}}
GIVEN = {"net": "mlp", "data": "digits", "options": WIDTHS}
LAYERS = ("norm1", "norm2")


@pytest.fixture(scope="module")
def trained():
    """A network on the digits whose statistics are those of the whole training data, by plain formulas."""
    from secateur.nets import build

    torch.manual_seed(0)
    net = build("mlp", (1, 8, 8), 10, widths=(24, 16), batch_norm=True)
    data = load("digits")
    x = (data.train.x.float() / 255 - torch.tensor(data.mean)) / torch.tensor(data.std)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    net.train()
    for step in range(30):
        index = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:100]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x[index]), data.train.y[index]).backward()
        optimizer.step()
    settle(net, x)
    return clinic.state_of(net.eval()), x


@torch.no_grad()
def settle(net, x):
    """Mean and variance of what comes into each normalisation, layer after layer."""
    net.eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            seen = []
            handle = module.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
            net(x)
            handle.remove()
            module.running_mean.copy_(seen[0].mean(0))
            module.running_var.copy_(seen[0].var(0))


def means(state):
    return [n for n in state if n.endswith("running_mean")]


def test_statistics_of_the_data_are_fine(trained, tmp_path):
    assert clinic.kinds(clinic.look(trained[0], tmp_path / "w.safetensors", **GIVEN)) == []


def test_stale_statistics(trained, tmp_path):
    """Of another network: found with data alone, and mended to those of the data."""
    state = {n: t.clone() for n, t in trained[0].items()}
    names = means(state)
    for name in names:
        state[name] += 3 * state[name.replace("mean", "var")].sqrt()

    assert clinic.kinds(clinic.look(state, tmp_path / "w.safetensors")) == []
    report = examine(tmp_path / "w.safetensors", Beside(**GIVEN))
    tensors, done = clinic.treat(tmp_path / "w.safetensors", **GIVEN)

    assert clinic.kinds(report) == [("stale statistics", tuple(names), 24 + 16)] and not done.report.findings
    for name, tensor in tensors.items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(tensor, state[name])
    for name in names:  # those of 512 examples against those of all
        spread = trained[0][name.replace("mean", "var")].sqrt()
        assert float(((tensors[name] - trained[0][name]) / spread).abs().max()) < 0.5
        ratio = tensors[name.replace("mean", "var")] / trained[0][name.replace("mean", "var")]
        assert 0.4 < float(ratio.min()) and float(ratio.max()) < 2.5


def test_statistics_that_were_never_taken(trained, tmp_path):
    """Means of 0 and variances of 1 beside trained scales: seen without data, mended with."""
    state = {n: t.clone() for n, t in trained[0].items()}
    for name in means(state):
        state[name].zero_()
        state[name.replace("mean", "var")].fill_(1)
        state[name.replace("running_mean", "num_batches_tracked")].zero_()

    report = clinic.look(state, tmp_path / "w.safetensors")
    _, done = clinic.treat(tmp_path / "w.safetensors", **GIVEN)

    assert clinic.kinds(report) == [("statistics never taken", tuple(means(state)), 2)] and not report.fixable
    assert not done.report.findings


@pytest.mark.parametrize("value", [-0.5, 0.0])
def test_impossible_variances(trained, tmp_path, value):
    """Negative, or zero although the channel has a mean and weights."""
    state = {n: t.clone() for n, t in trained[0].items()}
    name = means(state)[1].replace("mean", "var")
    state[name][[2, 5]] = value

    report = clinic.look(state, tmp_path / "w.safetensors")
    tensors, done = clinic.treat(tmp_path / "w.safetensors", **GIVEN)

    assert clinic.kinds(report) == [("bad variance", (name,), 2)]
    assert not done.report.findings and bool((tensors[name] > 0).all())


def test_statistics_go_by_the_mended_weights(trained, tmp_path):
    """Prefixes and stale statistics at once."""
    state = {f"module.{n}": t.clone() for n, t in trained[0].items()}
    for name in means(state):
        state[name] += 5
    clinic.write(state, tmp_path / "w.pt")

    tensors, done = clinic.treat(tmp_path / "w.pt", **GIVEN)

    assert {f.kind for f in done.fixed} == {"prefix", "stale statistics"} and not done.report.findings
    assert sorted(tensors) == sorted(trained[0])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"net": "lenet_300_100", "data": "digits"}, "does not fit the network"),
        ({"net": "mlp", "data": "digits"}, "does not fit the network"),
        ({"net": "mlpp", "data": "digits"}, "mlp"),
        ({"net": "mlp", "data": "absent"}, "absent"),
    ],
)
def test_a_network_that_does_not_fit(trained, tmp_path, given, says):
    with pytest.raises(SecateurError, match=says):
        clinic.look(trained[0], tmp_path / "w.safetensors", **given)


def test_statistics_with_which_the_loss_does_not_fall(trained, tmp_path):
    """Weights that fit other statistics than those of this data: noted, and left alone with everything else."""
    state = {n: t.clone() for n, t in trained[0].items()}
    for name in means(state):  # what a scale and a shift undo, so that the network computes what it did
        stem, spread = name.removesuffix("running_mean"), trained[0][name.replace("mean", "var")].sqrt()
        state[name] += 3 * spread
        state[f"{stem}bias"] += 3 * spread * state[f"{stem}weight"] / (spread**2 + 1e-5).sqrt()
    clinic.write(state, tmp_path / "w.safetensors")

    report = examine(tmp_path / "w.safetensors", Beside(**GIVEN))
    tensors, done = clinic.treat(tmp_path / "w.safetensors", **GIVEN)

    assert report.findings == () and clinic.noted(report)["stale statistics"] == 24 + 16
    assert not done.fixed and clinic.same(tensors, state)
