"""Channels reordered for N:M: the same function, and never less kept."""

import pytest
import torch
from torch import nn

from secateur.core.patterns import NM
from secateur.core.task import call
from secateur.linalg.permutation import kept_sum
from secateur.surgery.permuting import permute_for
from secateur.testing.cases import CASES


class Residual(nn.Module):
    """A stem, two blocks on one stream, a dense head; widths divide by four."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.a_norm = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.b = nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.b(torch.relu(self.a_norm(self.a(x))))
        return self.head(torch.relu(x).mean((2, 3)))


def residual():
    torch.manual_seed(0)
    net, x = Residual().double(), torch.randn(6, 3, 8, 8, dtype=torch.float64)
    for _ in range(3):
        net(x)  # BatchNorm's statistics differ from channel to channel
    return net.eval(), x


def test_the_network_computes_the_same():
    """Card test (d), in float64."""
    net, x = residual()
    done = permute_for(net, x, escapes=5)

    assert (net(x) - done.model(x)).abs().max() <= 1e-12
    assert len(done.orders) == 2
    assert any(not torch.equal(order, torch.arange(len(order))) for order in done.orders.values())
    assert all(torch.equal(order.sort().values, torch.arange(len(order))) for order in done.orders.values())


def test_more_is_kept_where_the_inputs_can_change_places():
    net, x = residual()
    done = permute_for(net, x, escapes=20)
    before, after = dict(net.named_parameters()), dict(done.model.named_parameters())

    assert set(done.kept) == {"a.weight", "b.weight", "head.weight"}
    for name, (plain, found) in done.kept.items():
        for share, tensors in ((plain, before), (found, after)):
            score = tensors[name].detach().abs()
            mask = NM(2, 4).mask(score, score.numel() // 2)
            assert share == pytest.approx(float(score[mask].sum() / score.sum()), rel=1e-12)
    assert done.kept["b.weight"][1] > done.kept["b.weight"][0]
    # two layers read the stream: their sum does not fall
    own = [sum(kept_sum(t[n].detach().abs(), NM()) for n in ("a.weight", "head.weight")) for t in (before, after)]
    assert own[1] > own[0]


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("pattern", [NM(1, 2), NM(2, 4)])
def test_ordinary_networks_compute_the_same(name, pattern):
    """BatchNorm, residual streams, depthwise filters, attention, tied weights, recurrent layers."""
    task = CASES[name]()
    x = next(iter(task.data))[0]
    state = {key: value.clone() for key, value in task.model.state_dict().items()}

    done = permute_for(task.model, x, pattern, escapes=3)

    torch.testing.assert_close(call(done.model, x), call(task.model, x), rtol=1e-10, atol=1e-12)
    assert all(torch.equal(value, task.model.state_dict()[key]) for key, value in state.items())


def test_units_of_a_flattened_image_move_along():
    """Each channel owns nine columns of the dense layer: it cannot be grouped by channels, but must follow."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3)
    ).double()
    x = torch.randn(4, 1, 7, 7, dtype=torch.float64)

    done = permute_for(net, x, escapes=5)

    assert (net(x) - done.model(x)).abs().max() <= 1e-12
    assert set(done.orders) == {"0.weight", "4.weight"}


def test_tensors_that_are_skipped_do_not_count():
    net, x = residual()
    done = permute_for(net, x, skip=["a.weight", "head.weight"], escapes=0)

    assert set(done.kept) == {"b.weight"} and list(done.orders) == ["a.weight"]
