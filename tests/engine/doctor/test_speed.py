"""What the network should take on this machine: from the table of costs alone."""

import pytest
import torch
from tests.engine.doctor import clinic

from secateur import _native
from secateur.engine.doctor import Beside, examine
from secateur.engine.planning.costs import network_cost
from secateur.nets import build

GIVEN = {"net": "mlp", "data": "digits", "options": {"model": {"widths": [24, 16]}}}


@pytest.fixture
def pruned(tmp_path, monkeypatch):
    """A pruned network behind a prefix, its share of weights by layer, and a memory of its own."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    net = build("mlp", (1, 8, 8), 10, widths=(24, 16))
    with torch.no_grad():
        net.fc1.weight[net.fc1.weight.abs() < 0.1] = 0
    share = {n: float((p != 0).double().mean()) for n, p in net.named_parameters() if p.dim() == 2}
    path = clinic.write({f"module.{n}": t for n, t in clinic.state_of(net).items()}, tmp_path / "w.pt")
    return net, share, path


def test_without_network_or_table_it_is_not_known(pruned):
    _, _, path = pruned

    assert "--net NAME --data NAME" in examine(path, speed=True).speed["why"]
    assert examine(path, Beside(**GIVEN), speed=True).speed["why"].startswith("not known")
    assert examine(path, Beside(**GIVEN)).speed == {}


@pytest.mark.skipif(_native.library() is None, reason="needs the compiled core")
def test_with_a_table_it_is_told(pruned):
    """Layers with their own shares of weights; never slower than dense."""
    net, share, path = pruned
    network_cost(net.eval(), torch.zeros(1, 1, 8, 8), threads=1)

    speed = examine(path, Beside(**GIVEN), speed=True).speed

    assert {name: layer["density"] for name, layer in speed["layers"].items()} == pytest.approx(share)
    assert 0 < speed["ms"] <= speed["dense_ms"] and speed["threads"] == 1
    assert all(0 <= layer["ms"] <= layer["dense_ms"] for layer in speed["layers"].values())
