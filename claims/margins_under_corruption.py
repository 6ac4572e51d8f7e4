"""Mean margin of the last features against accuracy, over pruned networks and corrupted images; and who flips."""

from __future__ import annotations

import copy
import statistics

from scipy import stats
from torch import nn

import secateur
from claims._common import fresh
from claims.kit import Check, Claim, Figures, mean, run
from secateur.core.allocations import Uniform
from secateur.core.losses import CrossEntropy
from secateur.core.sockets import Criterion
from secateur.core.task import Task
from secateur.criteria.magnitude import Magnitude
from secateur.criteria.random import Random
from secateur.data import Dataset, Loader, Split, load
from secateur.engine.damage.corruptions import corrupt
from secateur.engine.damage.geometry import of_outputs
from secateur.engine.damage.outputs import Outputs, outputs

EPOCHS, TESTS = 3, 2_000
RATIOS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.98)
INPUTS = (("clean", 0), *((name, level) for name in ("gaussian noise", "gaussian blur") for level in (1, 3, 5)))
FLIPS = (0.5, 0.8, 0.9)


def pruned(net: nn.Module, data: Dataset, criterion: Criterion, ratio: float) -> nn.Module:
    """A copy in which each layer has lost the same share, without training afterwards."""
    copied = copy.deepcopy(net)
    if ratio:
        task = Task(copied, CrossEntropy(), list(Loader(data.train, 128, mean=data.mean, std=data.std))[:1])
        secateur.prune(task, secateur.plan(task, f"sparsity {ratio}", criterion, Uniform(), forecast=False))
    return copied.eval()


def views(data: Dataset, seed: int) -> dict[tuple[str, int], Split]:
    """The test images as they are and corrupted, scaled as for training."""
    clean = data.test.x.float() / 255
    mean_, std = data.mean or (0.0,), data.std or (1.0,)
    spoilt = {(name, level): corrupt(clean, name, level, seed) if level else clean for name, level in INPUTS}
    return {key: Split((x - mean_[0]) / std[0], data.test.y) for key, x in spoilt.items()}


def margin(found: Outputs) -> list[float]:
    """Signed distances of the last features from the nearest boundary of the right class."""
    metrics = of_outputs(found)
    return [] if metrics is None else metrics.margin.tolist()


def one(seed: int, data_dir: str | None) -> Figures:
    """Spearman's rank correlation over 49 cells for two criteria, and the dense margin of answers that flip or stay."""
    data = load("mnist", data_dir).subset(test=TESTS, seed=seed)
    net = fresh("lenet_300_100", seed)
    batches = Loader(data.train, 128, shuffle=True, seed=seed, mean=data.mean, std=data.std)
    secateur.train(net, batches, epochs=EPOCHS, lr=0.1, seed=seed)
    splits = views(data, seed)
    before = outputs(net.eval(), splits["clean", 0])
    dense, figures = margin(before), {}
    for name, criterion in (("magnitude", Magnitude()), ("random", Random(seed))):
        margins, accuracies = [], []
        for ratio in RATIOS:
            smaller = pruned(net, data, criterion, ratio)
            found = {key: outputs(smaller, split) for key, split in splits.items()}
            margins += [statistics.fmean(margin(each)) for each in found.values()]
            accuracies += [float(each.right.double().mean()) for each in found.values()]
            if name == "magnitude" and ratio in FLIPS:
                flips = (found["clean", 0].answers != before.answers).tolist()
                for word, wanted in (("flip", True), ("stay", False)):
                    some = [m for m, flip in zip(dense, flips, strict=True) if flip is wanted]
                    figures[f"median dense margin of answers that {word} at {ratio:g}"] = statistics.median(some)
        ranks = [stats.rankdata(values).tolist() for values in (margins, accuracies)]
        figures[f"Spearman of mean margin and accuracy, {name}"] = statistics.correlation(*ranks)
    return figures


def _smaller(ratio: float, factor: float) -> Check:
    names = [f"median dense margin of answers that {word} at {ratio:g}" for word in ("flip", "stay")]
    of = "half of " if factor == 0.5 else ""
    says = f"sparsity {ratio:g}, magnitude: median dense margin of flipped answers below {of}that of the others"
    return Check(f"{says}, in every seed", lambda rows: all(row[names[0]] < factor * row[names[1]] for row in rows))


CLAIM = Claim(
    name="margins_under_corruption",
    title="Mean margin follows accuracy over pruned networks and corrupted images; close answers flip first",
    paper="Li, Liu, Yu, Bhavya, Cao, Diffenderfer, Bremer & Pascucci, Understanding Robustness Lottery, 2022, "
    "arXiv:2206.07918",
    states="views of angle, length and margin for pruned CIFAR networks under corruptions (read through a summary; no "
    "such correlation is reported). Here: LeNet-300-100 on MNIST, three epochs, every layer pruned alike to 0, 30, 50, "
    "70, 80, 90 and 98 % without training afterwards; 2,000 test images clean, with Gaussian noise and with blur at "
    "severities 1, 3 and 5: 49 cells a criterion",
    one=one,
    checks=(
        Check(
            "magnitude: mean rank correlation of mean margin and accuracy > 0.85",
            lambda rows: mean(rows, "Spearman of mean margin and accuracy, magnitude") > 0.85,
        ),
        Check(
            "random: mean rank correlation of mean margin and accuracy > 0.7",
            lambda rows: mean(rows, "Spearman of mean margin and accuracy, random") > 0.7,
        ),
        _smaller(0.5, 0.5),
        _smaller(0.8, 0.5),
        _smaller(0.9, 1.0),
    ),
    minutes=3.0,
    data=("mnist",),
)

if __name__ == "__main__":
    run(CLAIM)
