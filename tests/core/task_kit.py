"""Networks, data and plain derivatives that the tests of Task share."""

import copy

import torch
from torch import nn

LOSS = nn.functional.cross_entropy


def network(dtype=torch.float64, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def points(count, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=random, dtype=torch.float64), torch.randint(0, 3, (count,), generator=random)


def cut(x, y, sizes):
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def joined_gradient(net, x, y, loss=LOSS):
    twin = copy.deepcopy(net)
    loss(twin(x), y).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in twin.named_parameters()}


def assert_close(one, two, atol=1e-12):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=atol)
