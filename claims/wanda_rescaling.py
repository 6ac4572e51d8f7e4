"""Wanda and features of another scale: a network that computes the same gets the same masks."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

import secateur
from claims._common import fresh, percent
from claims.kit import Check, Claim, Figures, run
from secateur.core.allocations import Uniform
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.sockets import Criterion
from secateur.core.streams import stream
from secateur.core.task import Batch, Task
from secateur.criteria.magnitude import Magnitude
from secateur.criteria.wanda import Wanda
from secateur.data import Loader, load
from secateur.engine.cutting import plan, prune


def one(seed: int, data_dir: str | None) -> Figures:
    """Accuracies before and after, with features as trained and rescaled."""
    data = load("mnist", data_dir)
    model = fresh("lenet_300_100", seed)
    secateur.train(model, Loader(data.train, 100, shuffle=True, seed=seed), epochs=3, lr=0.1, momentum=0.9)
    other = rescaled(model, seed)
    inputs = list(Loader(data.subset(train=1024, seed=seed).train, 512))
    figures: Figures = {
        "accuracy dense, %": percent(model, data.test),
        "accuracy dense, rescaled, %": percent(other, data.test),
    }
    wanda, magnitude = Wanda(rows=True), Magnitude()
    found: dict[str, Masks] = {}
    for name, net in (("", model), (", rescaled", other)):
        for kind, criterion in (("Wanda", wanda), ("magnitude", magnitude)):
            pruned, masks = cut(net, inputs, criterion, 0.7)
            figures[f"accuracy {kind} 70 %{name}, %"] = percent(pruned, data.test)
            found[kind + name] = masks
    for kind in ("Wanda", "magnitude"):
        same, rest = found[kind], found[f"{kind}, rescaled"]
        figures[f"masks of {kind} that differ, weights"] = float((same - rest).kept + (rest - same).kept)
    for name, criterion in (("Wanda by row", wanda), ("Wanda by layer", Wanda()), ("magnitude by layer", magnitude)):
        figures[f"accuracy {name} 90 %, %"] = percent(cut(model, inputs, criterion, 0.9)[0], data.test)
    return figures


def rescaled(model: nn.Module, seed: int) -> nn.Module:
    """The same function with hidden features of scales spread log-normally (sigma 2), rounded to powers of two.

    Powers of two are exact in floating point, so that nothing but the scale differs.
    """
    net, random = copy.deepcopy(model), stream(seed, "rescaling")
    layers = [net.get_submodule(name) for name in ("fc1", "fc2", "head")]
    with torch.no_grad():
        for layer, after in zip(layers, layers[1:], strict=False):
            weight, bias, onward = (_tensor(t) for t in (layer.weight, layer.bias, after.weight))
            scale = (2 / math.log(2) * torch.randn(len(weight), generator=random)).round().exp2()
            weight *= scale[:, None]
            bias *= scale
            onward /= scale
    return net


def _tensor(thing: object) -> Tensor:
    if not isinstance(thing, Tensor):
        raise TypeError(f"a linear layer holds tensors, not {type(thing).__name__}")
    return thing


def cut(model: nn.Module, inputs: list[Batch], criterion: Criterion, sparsity: float) -> tuple[nn.Module, Masks]:
    """A pruned copy and its masks; the last layer stays dense, as in the paper."""
    task = Task(copy.deepcopy(model), CrossEntropy(), inputs)
    made = plan(task, f"sparsity {sparsity}", criterion, Uniform(), skip=("head.weight",), forecast=False)
    return prune(task, made).model, made.masks


CLAIM = Claim(
    name="wanda_rescaling",
    title="Wanda is blind to the scale of features, magnitude is not",
    paper="Sun, Liu, Bair & Kolter, A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024, "
    "arXiv:2306.11695",
    states="LLaMA-2 7B at 50 %: perplexity 6.42 with Wanda against 14.89 with magnitude, dense 5.12; large language "
    "models have a few features far larger than the others. Here: LeNet-300-100 trained for 3 epochs, its hidden "
    "features rescaled by powers of two (log-normal, sigma 2) so that the network computes the same; the same sparsity "
    "in both hidden layers, 1024 training images",
    one=one,
    checks=(
        Check(
            "70 %: in every seed, with rescaled features magnitude loses at least 10 points against dense",
            lambda rows: all(
                row["accuracy magnitude 70 %, rescaled, %"] <= row["accuracy dense, %"] - 10 for row in rows
            ),
        ),
        Check(
            "70 %: in every seed, Wanda's masks are the same with and without rescaling",
            lambda rows: all(row["masks of Wanda that differ, weights"] == 0 for row in rows),
        ),
        Check(
            "70 %: in every seed, Wanda's accuracy is the same with and without rescaling",
            lambda rows: all(row["accuracy Wanda 70 %, rescaled, %"] == row["accuracy Wanda 70 %, %"] for row in rows),
        ),
    ),
    minutes=1.0,
    data=("mnist",),
    analysis="Without rescaling Wanda is not better than magnitude on such a network: at 90 % magnitude is the best, "
    "Wanda compared within layers comes next and within rows last.",
)

if __name__ == "__main__":
    run(CLAIM)
