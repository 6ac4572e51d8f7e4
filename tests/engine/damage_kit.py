"""Small networks and data for the tests of the damage report."""

import copy

import torch
from torch import nn

from secateur.data import Dataset, Split


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def features(n=60, width=6, classes=3, seed=0, dtype=torch.float64):
    """A split of random features and labels."""
    g = random(seed)
    return Split(torch.randn(n, width, generator=g, dtype=dtype), torch.randint(classes, (n,), generator=g))


def mlp(width=6, hidden=5, classes=3, seed=0, bias=True):
    """A network of two linear layers, float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, classes, bias=bias)).double()


def pruned(net, share=0.6):
    """A copy without its smallest weights."""
    copied = copy.deepcopy(net)
    with torch.no_grad():
        for p in copied.parameters():
            if p.dim() > 1:
                p[p.abs() < p.abs().float().quantile(share)] = 0.0
    return copied


def images(n=30, channels=3, side=8, classes=3, seed=0, names=None):
    """A data set of random uint8 images, with a scale."""
    g = random(seed)
    x = torch.randint(256, (n, channels, side, side), generator=g, dtype=torch.uint8)
    split = Split(x, torch.randint(classes, (n,), generator=g))
    names = names or tuple(f"kind {k}" for k in range(classes))
    return Dataset("toy", split, split, names, "image", (0.4,) * channels, (0.3,) * channels)


def conv(channels=3, classes=3, seed=0):
    """A small convolutional network with BatchNorm and a linear head, float32, in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Dropout(0.5), nn.Linear(24, classes),
        )  # fmt: skip


class Tagger(nn.Module):
    """A label for every token: logits (N, T, classes)."""

    def __init__(self, words=7, classes=7, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed, self.head = nn.Embedding(words, 4), nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.embed(x))


class Fixed(nn.Module):
    """Gives the inputs themselves as logits."""

    def forward(self, x):
        return x


def answering(answers, classes=3):
    """Inputs for which :class:`Fixed` answers with these classes."""
    return nn.functional.one_hot(torch.tensor(answers), classes).double()
