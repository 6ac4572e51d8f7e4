"""Bernoulli gates: the size of the network that is left hardly depends on the size it began with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

import secateur
from claims._common import percent
from claims.kit import Check, Claim, Figures, mean, run
from secateur.core.run import Run
from secateur.core.streams import seed_global
from secateur.data import Dataset, Loader, load
from secateur.nets import build
from secateur.rules import _behind
from secateur.rules.variational_bernoulli import Switch, VariationalBernoulli

EXAMPLES, EPOCHS, BATCH = 20_000, 26, 128
STARTS = {"300-100": (300, 100), "600-200": (600, 200)}
OPTIONS = {"epochs": EPOCHS, "lr": 0.05, "momentum": 0.0, "weight_decay": 2e-4, "schedule": "constant"}


class Watched(VariationalBernoulli):
    """Lays the network with its expected gates aside before they are rounded."""

    soft: ClassVar[dict[str, torch.Tensor]] = {}
    chances: ClassVar[list[torch.Tensor]] = []

    def end(self, run: Run) -> None:
        """Weights times the chances of their inputs, by name."""
        every = _behind.standing(run, Switch)
        self.chances[:] = [switch.theta.detach().clone() for _, switch in every.values()]
        weights = {name: _behind.weight(module).detach() * switch.theta for name, (module, switch) in every.items()}
        self.soft.clear()
        self.soft.update({name: w.detach().clone() for name, w in weights.items()})
        super().end(run)


def network(seed: int, widths: Sequence[int]) -> nn.Module:
    """A dense network with two hidden layers."""
    with torch.random.fork_rng(devices=[]):
        seed_global(seed, "init")
        return build("mlp", (1, 28, 28), 10, widths=tuple(widths))


def error(net: nn.Module, data: Dataset) -> float:
    """Test images named wrongly, %."""
    return 100 - percent(net.eval(), data.test, mean=data.mean, std=data.std)


def one(seed: int, data_dir: str | None) -> Figures:
    """Hidden units left and errors, from two widths."""
    data = load("mnist", data_dir).subset(train=EXAMPLES, seed=seed)
    figures: Figures = {}
    for name, widths in STARTS.items():
        net = network(seed, widths)
        first = next(key for key, p in net.named_parameters() if p.dim() == 2)
        batches = Loader(data.train, BATCH, shuffle=True, seed=seed, mean=data.mean, std=data.std)
        secateur.train(net, batches, rules=[Watched()], skip=[first], seed=seed, **OPTIONS)
        for layer, theta in enumerate(Watched.chances, 1):
            figures[f"units of layer {layer} left from {name}"] = float((theta > 0.5).sum())
            undecided = ((theta > 0.01) & (theta < 0.99)).double().mean()
            figures[f"chances of layer {layer} within 0.01 to 0.99 from {name}, %"] = 100 * float(undecided)
        soft = copy.deepcopy(net)
        soft.load_state_dict({**net.state_dict(), **Watched.soft})
        figures[f"error from {name}, %"] = error(net, data)
        figures[f"error with expected gates from {name}, %"] = error(soft, data)
    return figures


def _apart(rows: Sequence[Figures], layer: int) -> float:
    """The larger mean count of a layer by the smaller one."""
    counts = [mean(rows, f"units of layer {layer} left from {name}") for name in STARTS]
    return max(counts) / min(counts)


def _rounding(rows: Sequence[Figures], name: str) -> float:
    return abs(mean(rows, f"error from {name}, %") - mean(rows, f"error with expected gates from {name}, %"))


CLAIM = Claim(
    name="bernoulli_width",
    title="With Bernoulli gates the width that is left does not depend on the width at the start",
    paper="Guenter & Sideris, Robust Learning of Parsimonious Deep Neural Networks, 2022, arXiv:2205.04650",
    states="on MNIST and CIFAR-10 the size of the network after training is robust to its initial width (abstract; no "
    "figures verified). Here 20,000 images of MNIST, 26 epochs of plain SGD at 0.05 in batches of 128, weight decay "
    "2e-4, log gamma -20, theta from 0.9 at a rate of 1.5 with cosine decay",
    one=one,
    checks=(
        *(
            Check(
                f"layer {layer}: the mean numbers of units left from the two widths are within 25 %",
                lambda rows, layer=layer: _apart(rows, layer) <= 1.25,
            )
            for layer in (1, 2)
        ),
        Check(
            "mean errors from the two widths are within 0.4 points",
            lambda rows: abs(mean(rows, "error from 300-100, %") - mean(rows, "error from 600-200, %")) <= 0.4,
        ),
        Check(
            "rounding the chances changes the mean error by at most 0.2 points, from either width",
            lambda rows: all(_rounding(rows, name) <= 0.2 for name in STARTS),
        ),
    ),
    seeds=(0, 1, 2),
    minutes=2.5,
    data=("mnist",),
)

if __name__ == "__main__":
    run(CLAIM)
