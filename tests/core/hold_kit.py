"""A network, data, optimizers and masks that the tests of Hold share."""

import torch
from torch import nn

from secateur.core.masks import Masks

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=1e-1),
    "adamw-loop": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=1e-1, foreach=False),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=1e-1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True, weight_decay=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, weight_decay=1e-2),
}


def network(seed=0, dtype=torch.float32):
    """A small network with a linear, a convolution and a normalization layer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv1d(2, 4, 3),
            nn.BatchNorm1d(4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(24, 10),
            nn.Tanh(),
            nn.Linear(10, 3),
        ).to(dtype)


def batches(count, dtype=torch.float32, seed=0):
    random = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(16, 2, 8, generator=random, dtype=torch.float32).to(dtype)
        yield x, torch.randint(0, 3, (16,), generator=random)


def half(model, seed=0):
    """Masks that keep about half of everything prunable."""
    random = torch.Generator().manual_seed(seed)
    return Masks({n: torch.rand(m.shape, generator=random) < 0.5 for n, m in Masks.dense(model).items()})


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x).float(), y)


def backward(model, x, y):
    for p in model.parameters():
        p.grad = None
    loss_of(model, x, y).backward()


def assert_zeros(model, masks):
    """Zeros exactly where the masks say, and (these networks being random) only there."""
    weights = dict(model.named_parameters())
    for name, mask in masks.items():
        assert torch.equal(weights[name] != 0, mask), name
