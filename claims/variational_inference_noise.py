"""Variational inference as a rule: weights of low signal to noise can go, and a cold posterior predicts better."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from claims.kit import Check, Claim, Figures, mean, run
from claims.snr_posterior import IMAGES, PRIOR, STEPS, pair
from secateur.core.allocations import Uniform
from secateur.core.budget import keep_for
from secateur.core.choose import choose
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.criteria.random import Random
from secateur.data import Loader, Split, load
from secateur.engine.loop import Training
from secateur.engine.recipe import TrainStep
from secateur.linalg.diagonals import fisher_diagonal
from secateur.rules._posterior import predictive, uncertainty_error
from secateur.rules.variational_inference import VariationalInference

SAMPLES = 20


def fitted(train: Split, temperature: float, seed: int) -> tuple[nn.Module, Named]:
    """The means of a network of 400 hidden units after 1500 steps, and the deviations of its weights."""
    random = stream(seed, "means")
    net = nn.Sequential(
        OrderedDict(flatten=nn.Flatten(), fc1=nn.Linear(784, 400), relu=nn.ReLU(), head=nn.Linear(400, 2))
    )
    with torch.no_grad():
        for p in net.parameters():
            p.uniform_(-0.1, 0.1, generator=random)
    rule = VariationalInference(sparsity=0.0, temperature=temperature, scale=PRIOR)
    batches = Loader(train, 100, shuffle=True, seed=seed)
    step = TrainStep(epochs=STEPS // len(batches), optimizer="adam", lr=1e-3, schedule="constant", rules=(rule,))
    training = Training(net, batches, step, seed=seed)
    training.fit()
    state = training.run.state(rule)
    return net, {name: state[f"rho:{name}"].exp() for name in training.run.masks}


def figures_of(net: nn.Module, deviations: Named, test: Split, seed: int) -> tuple[float, float]:
    """Per cent of wrong answers of the mean probability over draws, and the calibration error of its entropy."""
    found = predictive(Task(net, CrossEntropy(), list(Loader(test, 1000))), deviations, SAMPLES, seed)
    wrong = 100 * float((found.probabilities.argmax(1) != found.target).double().mean())
    return wrong, 100 * uncertainty_error(found)


def pruned(net: nn.Module, deviations: Named, scores: Named, sparsity: float) -> tuple[nn.Module, Named]:
    """Without the same share of each layer, its means and their deviations."""
    masks = choose(scores, keep_for(sparsity, sum(map(torch.Tensor.numel, scores.values()))), allocation=Uniform())
    small = copy.deepcopy(net)
    masks.apply_(small)
    return small, {name: deviation * masks[name] for name, deviation in deviations.items()}


def one(seed: int, data_dir: str | None) -> Figures:
    """Test errors of a cold and a warm posterior, and of the cold one pruned by three rankings."""
    data = load("mnist", data_dir)
    order = torch.randperm(len(data.train), generator=stream(seed, "images"))
    train, test = pair(data.train.take(order), IMAGES), pair(data.test)
    figures: Figures = {}
    for temperature in (1.0, 0.01):
        net, deviations = fitted(train, temperature, seed)
        wrong, off = figures_of(net, deviations, test, seed)
        figures |= {f"error T = {temperature:g}, %": wrong, f"calibration error T = {temperature:g}, %": off}
    dense = Masks.dense(net)
    task = Task(net, CrossEntropy(), list(Loader(train, 500)))
    rankings = {
        "SNR": {name: dict(net.named_parameters())[name].detach().abs() / sigma for name, sigma in deviations.items()},
        "Fisher": fisher_diagonal(task, dense),
        "random": Random(seed)(task, dense),
    }
    for sparsity in (0.3, 0.75, 0.9):
        for name, scores in rankings.items():
            small = pruned(net, deviations, scores, sparsity)
            figures[f"error {name} {100 * sparsity:g} % gone, %"] = figures_of(*small, test, seed)[0]
    return figures


def _between(rows: Sequence[Figures], one: str, other: str) -> float:
    """The first mean error less the second, in points."""
    return mean(rows, f"error {one}, %") - mean(rows, f"error {other}, %")


CLAIM = Claim(
    name="variational_inference_noise",
    title="A network trained by variational inference loses its noisy weights unharmed",
    paper="Mohan, Scaife, Porter, Walmsley & Bowles, Quantifying uncertainty in deep learning approaches to radio "
    "galaxy classification, MNRAS 511, 2022, arXiv:2201.01203",
    states="30 % of the weights of the dense layers go by signal to noise without significant loss, and more by Fisher "
    "information; the posterior at temperature 1 predicts poorly. Here: threes against fives of MNIST, 2000 images, "
    "400 hidden units, the rule with Adam 1e-3 for 1500 steps of 100, prior deviation 0.1, biases without noise; the "
    "same share of every layer goes, and its noise with it; 20 draws; T = 0.01 where no other is named",
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
