"""Networks, data and masks that the tests of the training loop share."""

import torch
from torch import nn

from secateur.core.masks import Masks
from secateur.core.names import parameters
from secateur.core.select import top_mask
from secateur.core.streams import stream
from secateur.data import Loader, Split


def loader(batch=4, count=12, dtype=torch.float64, width=6, **options):
    x = torch.randn(count, width, generator=stream(0, "x"), dtype=torch.float64)
    return Loader(Split(x.to(dtype), torch.arange(count) % 3), batch, shuffle=True, seed=2, dtype=dtype, **options)


def mlp(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def busy(dtype=torch.float64):
    """BatchNorm and dropout, so that a run has state outside its parameters."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 3)).to(dtype)


def half(net):
    return Masks({n: top_mask(parameters(net)[n].detach().abs(), m.numel() // 2) for n, m in Masks.dense(net).items()})


def same(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)
