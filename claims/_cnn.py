"""The small MNIST network of the claims about channels: trained, and cut by a score for each channel."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping

import torch
from scipy import stats
from torch import Tensor, nn

import secateur
from secateur.core import streams
from secateur.core.allocations import Global
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.patterns import Unit
from secateur.core.select import top_mask
from secateur.core.task import Task
from secateur.data import Dataset, Loader, Split, load

WIDTHS = (16, 32, 64)


def network() -> nn.Sequential:
    """Three 3x3 convolutions of 16, 32 and 64 channels, each with ReLU and pooling, and a dense head.

    The convolutions have no bias, so that a filter of zeros is a channel that is gone.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    wide = 1
    for number, width in enumerate(WIDTHS, 1):
        layers[f"conv{number}"] = nn.Conv2d(wide, width, 3, padding=1, bias=False)
        layers[f"relu{number}"] = nn.ReLU()
        layers[f"pool{number}"] = nn.MaxPool2d(2)
        wide = width
    layers["flatten"], layers["head"] = nn.Flatten(), nn.Linear(wide * 9, 10)
    return nn.Sequential(layers)


def trained(seed: int, data_dir: str | None, lr: float = 0.05) -> tuple[nn.Sequential, Dataset]:
    """A network trained for two epochs on 12,000 images that the seed draws, and these with 4,000 to test on."""
    data = load("mnist", data_dir).subset(train=12_000, test=4_000, seed=seed)
    with torch.random.fork_rng():
        streams.seed_global(seed, "init")
        net = network()
    batches = Loader(data.train, 64, shuffle=True, seed=seed, mean=data.mean, std=data.std)
    secateur.train(net, batches, epochs=2, lr=lr, momentum=0.9, schedule="cosine", seed=seed)
    return net.eval(), data


def task(net: nn.Module, data: Dataset, split: Split, count: int | None = None) -> Task:
    """The network, cross-entropy, and the first examples of a split."""
    part = split if count is None else Split(split.x[:count], split.y[:count])
    return Task(net, CrossEntropy(), list(Loader(part, 500, mean=data.mean, std=data.std)))


def channels(net: nn.Module) -> Masks:
    """All filters of the convolutions; the head is not pruned."""
    return Masks.dense(net, only=["conv*.weight"])


def per_channel(scores: Named) -> dict[str, Tensor]:
    """The sum of the scores of each filter."""
    return {name: Unit().unit_scores(score).double() for name, score in scores.items()}


def cut(net: nn.Module, scores: Mapping[str, Tensor], share: float) -> nn.Module:
    """A copy without the channels of the lowest scores of all layers together; every layer keeps its best one."""
    keep = sum(map(len, scores.values())) - round(share * sum(map(len, scores.values())))
    counts, own = Global()(dict(scores), keep), channels(net)
    chosen = {name: top_mask(scores[name], counts[name]) for name in own}
    smaller = copy.deepcopy(net)
    Masks({name: chosen[name][:, None, None, None].expand_as(mask) for name, mask in own.items()}).apply_(smaller)
    return smaller


def drawn(net: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random scores of the channels."""
    return {
        name: torch.rand(len(mask), generator=streams.stream(seed, "random", name), dtype=torch.float64)
        for name, mask in channels(net).items()
    }


def spearman(one: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation of two vectors."""
    return float(stats.spearmanr(one.numpy(), other.numpy())[0])
