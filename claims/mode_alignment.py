"""Two trainings from different beginnings: the barrier between them, before and after their units are matched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

import secateur
from claims.kit import Check, Claim, Figures, mean, run
from secateur.core.losses import CrossEntropy
from secateur.core.streams import seed_global
from secateur.core.task import Task
from secateur.data import Dataset, Loader, load
from secateur.nets import build
from secateur.probes.connectivity import Connectivity

WIDTHS, EPOCHS, POINTS, TESTS = (512, 32), 2, 11, 5_000


def trained(data: Dataset, width: int, seed: int) -> nn.Module:
    """A network with two hidden layers, whose weights and order of data are functions of the seed."""
    with torch.random.fork_rng(devices=[]):
        seed_global(seed, "init")
        net = build("mlp", (1, 28, 28), 10, widths=(width, width))
    batches = Loader(data.train, 128, shuffle=True, seed=seed, mean=data.mean, std=data.std)
    secateur.train(net, batches, epochs=EPOCHS, optimizer="adam", lr=1e-3, schedule="constant", seed=seed)
    return net.eval()


def one(seed: int, data_dir: str | None) -> Figures:
    """Barriers of loss and error along the line between two networks, as they are and matched, for two widths."""
    data = load("mnist", data_dir).subset(test=TESTS, seed=seed)
    figures: Figures = {}
    for width in WIDTHS:
        net, other = trained(data, width, seed), trained(data, width, seed + 100)
        task = Task(net, CrossEntropy(), list(Loader(data.test, 1000, mean=data.mean, std=data.std)))
        for name, aligned in (("as they are", False), ("matched", True)):
            parts = Connectivity(other, POINTS, baseline="line", aligned=aligned)(task).parts
            figures[f"loss barrier, width {width}, {name}"] = parts["loss above line"]
            figures[f"error barrier, width {width}, {name}, points"] = parts["error above line"]
    return figures


def _of(rows: Sequence[Figures], name: str) -> float:
    return mean(rows, f"loss barrier, width 512, {name}")


CLAIM = Claim(
    name="mode_alignment",
    title="Matching hidden units lowers the barrier between two trainings, the more the wider the network",
    paper="Ainsworth, Hayase & Srinivasa, Git Re-Basin: Merging Models modulo Permutation Symmetries, ICLR 2023, "
    "arXiv:2209.04836",
    states="a barrier near zero between independently trained MLPs on MNIST and, when wide, ResNet-20 on CIFAR-10; "
    "narrow or barely trained networks keep one (unverified). Here: MLPs with two hidden layers of 512 or 32 units, "
    "two epochs of Adam 1e-3 on MNIST in batches of 128, weights matched, 11 points, 5,000 test images",
    one=one,
    checks=(
        Check(
            "width 512: mean loss barrier of matched networks below half of that of the networks as they are",
            lambda rows: _of(rows, "matched") < 0.5 * _of(rows, "as they are"),
        ),
        Check(
            "matched: mean error barrier at width 512 below that at width 32",
            lambda rows: (
                mean(rows, "error barrier, width 512, matched, points")
                < mean(rows, "error barrier, width 32, matched, points")
            ),
        ),
    ),
    minutes=3.0,
    data=("mnist",),
)

if __name__ == "__main__":
    run(CLAIM)
