"""SynFlow in many rounds against single cuts by SynFlow and SNIP: which layers are left empty."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from claims._common import balanced
from claims.kit import Check, Claim, Figures, run
from secateur.core.choose import cut, scores_of
from secateur.core.errors import ModelError
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.patterns import Unstructured
from secateur.core.select import top_counts
from secateur.core.sockets import Criterion
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.criteria.snip import Snip
from secateur.criteria.synflow import Synflow
from secateur.data import load

ROUNDS = 100


def one(seed: int, data_dir: str | None) -> Figures:
    """Empty layers, of six, and the flow R that is left, at each compression."""
    data = load("mnist", data_dir)
    task = Task(network(seed), CrossEntropy(), balanced(data.train, 10, seed))
    figures: Figures = {}
    for factor in (100, 1000, 3000):
        for name, criterion, rounds in (
            (f"SynFlow in {ROUNDS} rounds", Synflow(), ROUNDS),
            ("SynFlow in one round", Synflow(), 1),
            ("SNIP in one round", Snip(), 1),
        ):
            masks = compressed(task, criterion, factor, rounds)
            empty = sum(count == 0 for count in masks.counts().values())
            figures[f"empty layers, {name} {factor}x"] = float(empty)
            if rounds > 1:
                figures[f"flow R, {name} {factor}x"] = flow(task, masks)
    return figures


def network(seed: int) -> nn.Sequential:
    """Five convolutions and a linear layer without biases, 32,720 weights: eleven are left at 3000x."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    wide, random = 1, stream(seed, "init")
    for number, width in enumerate((16, 32, 32, 32, 32), 1):
        layers[f"conv{number}"] = nn.Conv2d(wide, width, 3, padding=1, bias=False)
        layers[f"relu{number}"] = nn.ReLU()
        if number % 2 == 0:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
        wide = width
    layers["pool"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    layers["head"] = nn.Linear(wide, 10, bias=False)
    net = nn.Sequential(layers)
    for tensor in net.parameters():
        nn.init.kaiming_normal_(tensor, generator=random)
    return net


def compressed(task: Task, criterion: Criterion, factor: int, rounds: int) -> Masks:
    """Masks under one threshold for all layers, without a floor; each round keeps the same share of the last."""
    masks = Masks.dense(task.model)
    for number in range(1, rounds + 1):
        keep = round(masks.total * factor ** (-number / rounds))
        scores = scores_of(criterion, task, masks)
        masks = cut(scores, top_counts(scores, keep), Unstructured())
    return masks


def flow(task: Task, masks: Masks) -> float:
    """R, which is what the scores of the last layer sum to; 0 when no path is left."""
    try:
        return float(Synflow()(task, masks)["head.weight"].sum())
    except ModelError:
        return 0.0


CLAIM = Claim(
    name="synflow_collapse",
    title="SynFlow in many rounds empties no layer",
    paper="Tanaka, Kunin, Yamins & Ganguli, Pruning neural networks without any data by iteratively conserving "
    "synaptic flow, NeurIPS 2020, arXiv:2006.05467",
    states="no layer collapses before the theoretical limit, on VGG and ResNet up to 99.99 %. Here: a network of six "
    "layers without biases, as initialised; one threshold for all layers without the floor of one weight that the "
    "library's allocations have; SNIP scores from 100 MNIST images",
    one=one,
    checks=(
        Check(
            "in every seed, SynFlow in 100 rounds leaves no layer empty and R > 0 at 100x and 3000x",
            lambda rows: all(
                row[f"empty layers, SynFlow in 100 rounds {factor}x"] == 0
                and row[f"flow R, SynFlow in 100 rounds {factor}x"] > 0
                for row in rows
                for factor in (100, 3000)
            ),
        ),
        Check(
            "in every seed, SynFlow in one round empties a layer at 100x",
            lambda rows: all(row["empty layers, SynFlow in one round 100x"] > 0 for row in rows),
        ),
        Check(
            "in every seed, SNIP in one round empties a layer at 1000x",
            lambda rows: all(row["empty layers, SNIP in one round 1000x"] > 0 for row in rows),
        ),
    ),
    minutes=0.2,
    data=("mnist",),
)

if __name__ == "__main__":
    run(CLAIM)
