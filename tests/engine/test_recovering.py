"""Statistics of BatchNorm taken anew: those of the data, everything else as it was."""

import pytest
import torch
from torch import nn

from secateur.core.errors import DataError
from secateur.core.task import Task
from secateur.engine.recovering import normed, reestimate


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.one = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=0.3)
        self.drop = nn.Dropout(0.9)
        self.fc, self.two = nn.Linear(4, 3), nn.BatchNorm1d(3)
        self.free = nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x):
        x = self.drop(torch.relu(self.one(self.conv(x)))).mean((2, 3))
        return self.free(self.two(self.fc(x)))


def made(*sizes):
    torch.manual_seed(0)
    data = [(torch.randn(n, 2, 6, 5, dtype=torch.float64), torch.zeros(n, dtype=torch.long)) for n in sizes]
    torch.manual_seed(1)
    return Task(Small().double(), nn.functional.cross_entropy, data)


def test_one_batch_gives_its_own_mean_and_unbiased_variance():
    task = made(16)
    net, x = task.model, task.data[0][0]
    assert reestimate(task) == 2 and len(normed(net)) == 2
    with torch.no_grad():
        seen = net.conv(x)
        torch.testing.assert_close(net.one.running_mean, seen.mean((0, 2, 3)))
        torch.testing.assert_close(net.one.running_var, seen.var((0, 2, 3)))
        normal = (seen - seen.mean((0, 2, 3), True)) / (seen.var((0, 2, 3), False, True) + net.one.eps).sqrt()
        hidden = net.fc(torch.relu(normal).mean((2, 3)))  # dropout is off
        torch.testing.assert_close(net.two.running_mean, hidden.mean(0))
        torch.testing.assert_close(net.two.running_var, hidden.var(0))


def test_several_batches_are_averaged_and_old_statistics_forgotten():
    task = made(8, 5)
    net = task.model
    net.one.running_mean.fill_(100.0)
    reestimate(task)
    with torch.no_grad():
        each = [net.conv(x) for x, _ in task.data]
    torch.testing.assert_close(net.one.running_mean, sum(len(s) * s.mean((0, 2, 3)) for s in each) / 13)
    torch.testing.assert_close(net.one.running_var, sum(len(s) * s.var((0, 2, 3)) for s in each) / 13)
    assert net.one.num_batches_tracked == 2


@pytest.mark.parametrize("training", [True, False])
def test_modes_momentum_and_weights_stay(training):
    task = made(8)
    net = task.model.train(training)
    net.two.eval()
    weights = {name: p.clone() for name, p in net.named_parameters()}
    modes = [m.training for m in net.modules()]
    reestimate(task)
    assert [m.training for m in net.modules()] == modes and (net.one.momentum, net.two.momentum) == (0.3, 0.1)
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in net.named_parameters())


def test_what_fails_leaves_the_old_statistics():
    task = made(8)
    reestimate(task)
    old = {name: b.clone() for name, b in task.model.named_buffers()}
    broken = Task(task.model, task.loss, [*task.data, (torch.randn(4, 3, 6, 5).double(), torch.zeros(4))])
    with pytest.raises(RuntimeError):
        reestimate(broken)
    for sizes, says in (((), "no example"), ((1, 1), "at least two")):
        with pytest.raises(DataError, match=says):
            reestimate(Task(task.model, task.loss, made(*sizes).data))
    assert all(torch.equal(b, old[name]) for name, b in task.model.named_buffers())
    assert task.model.one.training and task.model.one.momentum == 0.3


def test_a_single_example_among_batches_is_passed_over():
    one, two = made(8), made(8, 1)
    reestimate(one), reestimate(two)
    for (name, a), (_, b) in zip(one.model.named_buffers(), two.model.named_buffers(), strict=True):
        assert torch.equal(a, b), name


def test_networks_without_statistics():
    net = nn.Linear(2, 2)
    assert reestimate(Task(net, nn.functional.mse_loss, [])) == 0
