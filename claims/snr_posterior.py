"""Signal to noise on a mean-field network: weights pruned by their posterior, cold against warm."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

import secateur
from claims.kit import Check, Claim, Figures, mean, run
from secateur.core.allocations import Uniform
from secateur.core.losses import CrossEntropy
from secateur.core.sockets import Criterion
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.criteria.random import Random
from secateur.criteria.snr import Snr
from secateur.data import Loader, Split, load
from secateur.engine.cutting import plan

PRIOR = 0.1
IMAGES, STEPS = 2000, 1500


class Noisy(nn.Module):
    """A linear layer with a Gaussian for each weight and bias.

    Every forward pass in training mode draws anew; in evaluation mode the means are used.
    """

    def __init__(self, inputs: int, outputs: int, random: torch.Generator) -> None:
        super().__init__()
        self.random = random
        self.weight_mu = nn.Parameter(torch.empty(outputs, inputs).uniform_(-0.1, 0.1, generator=random))
        self.weight_rho = nn.Parameter(torch.empty(outputs, inputs).uniform_(-5, -4, generator=random))
        self.bias_mu = nn.Parameter(torch.empty(outputs).uniform_(-0.1, 0.1, generator=random))
        self.bias_rho = nn.Parameter(torch.empty(outputs).uniform_(-5, -4, generator=random))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's outputs under one draw of its weights, or under their means."""
        if not self.training:
            return functional.linear(x, self.weight_mu, self.bias_mu)
        weight, bias = (
            mu + rho.exp() * torch.randn(mu.shape, generator=self.random)
            for mu, rho in ((self.weight_mu, self.weight_rho), (self.bias_mu, self.bias_rho))
        )
        return functional.linear(x, weight, bias)

    def divergence(self) -> Tensor:
        """Kullback-Leibler divergence from the prior, a Gaussian of deviation ``PRIOR`` around zero, in nats."""
        total = torch.zeros(())
        for mu, rho in ((self.weight_mu, self.weight_rho), (self.bias_mu, self.bias_rho)):
            square = (mu.square() + (2 * rho).exp()) / PRIOR**2
            total = total + (square / 2 - 0.5 - rho + math.log(PRIOR)).sum()
        return total


def one(seed: int, data_dir: str | None) -> Figures:
    """Test errors of a cold and a warm posterior, and of the cold one pruned."""
    data = load("mnist", data_dir)
    order = torch.randperm(len(data.train), generator=stream(seed, "images"))
    train, test = pair(data.train.take(order), IMAGES), pair(data.test)
    cold = fitted(train, 0.01, seed)
    return {
        "error T = 1, %": error(fitted(train, 1.0, seed), test, seed),
        "error T = 0.01, %": error(cold, test, seed),
        "error SNR 30 % gone, %": error(pruned(cold, train, Snr("exp"), 0.3), test, seed),
        "error SNR 75 % gone, %": error(pruned(cold, train, Snr("exp"), 0.75), test, seed),
        "error random 75 % gone, %": error(pruned(cold, train, Random(seed), 0.75), test, seed),
        "error SNR 90 % gone, %": error(pruned(cold, train, Snr("exp"), 0.9), test, seed),
    }


def pair(split: Split, count: int | None = None) -> Split:
    """The threes and fives, as classes 0 and 1."""
    part = split.take(((split.y == 3) | (split.y == 5)).nonzero().flatten()[:count])
    return Split(part.x, (part.y == 5).long())


def fitted(train: Split, temperature: float, seed: int) -> nn.Module:
    """A network of 400 hidden units after 1500 steps of Bayes by backprop at that temperature."""
    random = stream(seed, "draws")
    first, last = Noisy(784, 400, random), Noisy(400, 2, random)
    net = nn.Sequential(OrderedDict(flatten=nn.Flatten(), fc1=first, relu=nn.ReLU(), head=last))
    share = temperature / len(train)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target) + share * (first.divergence() + last.divergence())

    batches = Loader(train, 100, shuffle=True, seed=seed)
    epochs = STEPS // len(batches)
    secateur.train(net, batches, loss=loss, epochs=epochs, optimizer="adam", lr=1e-3, schedule="constant")
    return net


def pruned(net: nn.Module, train: Split, criterion: Criterion, sparsity: float) -> nn.Module:
    """A copy with the same share of the means of each layer gone, and their noise with them."""
    task = Task(copy.deepcopy(net), CrossEntropy(), list(Loader(train, 500)))
    masks = plan(task, f"sparsity {sparsity}", criterion, Uniform(), only=("*weight_mu",), forecast=False).masks
    masks.apply_(task.model)
    own = task.params()
    with torch.no_grad():
        for name, mask in masks.items():
            own[name.replace("mu", "rho")].masked_fill_(~mask, -torch.inf)
    return task.model


@torch.no_grad()
def error(net: nn.Module, test: Split, seed: int) -> float:
    """Per cent of wrong answers of the mean probability over 20 draws of all weights."""
    net.train()
    for layer in net.modules():
        if isinstance(layer, Noisy):
            layer.random = stream(seed, "prediction")
    x, y = next(iter(Loader(test, len(test))))
    likely = sum((net(x).softmax(1) for _ in range(20)), torch.zeros(()))
    return 100 * float((likely.argmax(1) != y).double().mean())


def _between(rows: Sequence[Figures], one: str, other: str) -> float:
    """The first mean error less the second, in points."""
    return mean(rows, f"error {one}, %") - mean(rows, f"error {other}, %")


CLAIM = Claim(
    name="snr_posterior",
    title="Weights of low signal to noise can go",
    paper="Mohan, Scaife, Porter, Walmsley & Bowles, Quantifying uncertainty in deep learning approaches to radio "
    "galaxy classification, MNRAS 511, 2022, arXiv:2201.01203",
    states="30 % of the weights of the dense layers go by signal to noise without significant loss; the posterior at "
    "temperature 1 predicts poorly. Here: threes against fives of MNIST, 2000 images, 400 hidden units, Bayes by "
    "backprop with Adam 1e-3 for 1500 steps of 100, prior deviation 0.1; the same share of every layer goes, and its "
    "noise with it; 20 draws; T = 0.01 where no other is named",
    one=one,
    checks=(
        Check(
            "30 % gone by SNR: in every seed the error changes by at most 0.5 points",
            lambda rows: all(abs(row["error SNR 30 % gone, %"] - row["error T = 0.01, %"]) <= 0.5 for row in rows),
        ),
        Check(
            "75 % gone: mean error of SNR at least 1 point below random",
            lambda rows: _between(rows, "random 75 % gone", "SNR 75 % gone") >= 1,
        ),
        Check(
            "mean error at T = 0.01 at least 1 point below that at T = 1",
            lambda rows: _between(rows, "T = 1", "T = 0.01") >= 1,
        ),
    ),
    minutes=3.0,
    data=("mnist",),
)

if __name__ == "__main__":
    run(CLAIM)
