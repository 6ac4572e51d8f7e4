"""Movement pruning while fine-tuning: a network of the digits 0 to 4 learns 5 to 9 and loses its weights meanwhile."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import secateur
from claims._common import fresh, percent
from claims.kit import Check, Claim, Figures, mean, run
from secateur.core.allocations import Uniform
from secateur.core.masks import Masks
from secateur.core.sockets import Rule
from secateur.data import Loader, Split, load
from secateur.rules.gradual import Gradual
from secateur.rules.movement import Movement

START, STOP = 0.1, 0.7
EPOCHS = 4


def one(seed: int, data_dir: str | None) -> Figures:
    """Accuracies on the new digits after fine-pruning by each rule."""
    data = load("mnist", data_dir)
    old, new, test = digits(data.train, 0), digits(data.train, 5), digits(data.test, 5)
    model = fresh("lenet_300_100", seed, outputs=5)
    secateur.train(model, Loader(old, 100, shuffle=True, seed=seed), epochs=3, lr=0.1, momentum=0.9, seed=seed)
    figures: Figures = {}
    for kept in (10, 3):
        share = 1 - kept / 100
        rules: dict[str, Rule] = {
            "movement": Movement(share, scores="sgd", start=START, stop=STOP),
            "magnitude": Gradual(share, allocation=Uniform(), start=START, stop=STOP, updates=200),
        }
        found: list[Masks] = []
        for name, rule in rules.items():
            net = copy.deepcopy(model)
            order = Loader(new, 100, shuffle=True, seed=seed + 100)
            found.append(secateur.train(net, order, rules=[rule], epochs=EPOCHS, lr=0.1, momentum=0.9, seed=seed))
            figures[f"accuracy {name} {kept} % kept, %"] = percent(net, test)
        figures[f"Jaccard of the kept sets {kept} % kept"] = (found[0] & found[1]).kept / (found[0] | found[1]).kept
        figures[f"weights kept by movement {kept} % kept"] = found[0].kept
        figures[f"weights kept by magnitude {kept} % kept"] = found[1].kept
    return figures


def digits(split: Split, first: int) -> Split:
    """The five digits from ``first`` on, numbered from 0."""
    part = split.take(((split.y >= first) & (split.y < first + 5)).nonzero().flatten())
    return Split(part.x, part.y - first)


def _gain(rows: Sequence[Figures], kept: int) -> float:
    return mean(rows, f"accuracy movement {kept} % kept, %") - mean(rows, f"accuracy magnitude {kept} % kept, %")


def _equal(row: Figures) -> bool:
    return all(
        row[f"weights kept by movement {n} % kept"] == row[f"weights kept by magnitude {n} % kept"] for n in (3, 10)
    )


CLAIM = Claim(
    name="movement_few_weights",
    title="Movement pruning, as a rule while fine-tuning, beats magnitude on a new task at few weights",
    paper="Sanh, Wolf & Rush, Movement Pruning: Adaptive Sparsity by Fine-Tuning, NeurIPS 2020, arXiv:2005.07683",
    states="BERT-base on SQuAD with distillation, F1 by movement and by magnitude: 84.3 and 80.1 with 10 % of the "
    "weights, 78.0 and 59.6 with 3 % (dense 88.1). Here LeNet-300-100, trained on the digits 0 to 4 and fine-pruned on "
    "5 to 9 for four epochs of SGD 0.1 with momentum 0.9 and a cosine; hard movement with plain SGD on the scores, the "
    "same share and cubic schedule for both, each layer by itself",
    one=one,
    checks=(
        Check(
            "3 % kept: mean accuracy with movement at least 0.2 points above magnitude",
            lambda rows: _gain(rows, 3) >= 0.2,
        ),
        Check(
            "10 % kept: mean accuracy with movement at least that of magnitude less 0.7 points",
            lambda rows: _gain(rows, 10) >= -0.7,
        ),
        Check(
            "at both shares, in every seed, the Jaccard index of the two kept sets is below 0.5",
            lambda rows: all(row[f"Jaccard of the kept sets {kept} % kept"] < 0.5 for row in rows for kept in (3, 10)),
        ),
        Check("both keep the same number of weights, in every seed", lambda rows: all(map(_equal, rows))),
    ),
    minutes=8.0,
    data=("mnist",),
)

if __name__ == "__main__":
    run(CLAIM)
