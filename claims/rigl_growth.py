"""RigL: growing by the gradient finds better zeros than growing at random, and both better ones than fixed zeros."""

from __future__ import annotations

from typing import Any

import torch

import secateur
from claims._common import fresh, percent
from claims.kit import Check, Claim, Figures, mean, run
from secateur.core.allocations import ErdosRenyi
from secateur.core.budget import keep_for
from secateur.core.choose import choose
from secateur.core.masks import Masks
from secateur.core.sockets import Rule
from secateur.core.streams import stream
from secateur.data import Loader, load
from secateur.rules.rigl import Rigl
from secateur.rules.set import Set

SPARSITY, EVERY, STOP = 0.98, 100, 0.75


def one(seed: int, data_dir: str | None) -> Figures:
    """Errors of one network trained from the same weights and the same first zeros in every way."""
    data = load("mnist", data_dir)
    scale: dict[str, Any] = {"mean": data.mean, "std": data.std}
    whole = Masks.dense(fresh("lenet_300_100", seed, inputs=784, outputs=10))
    scores = {name: torch.rand(m.shape, generator=stream(seed, "claim", name)) for name, m in whole.items()}
    first = choose(scores, keep_for(SPARSITY, whole.total), allocation=ErdosRenyi())
    ways: dict[str, tuple[Masks, list[Rule]]] = {
        "dense": (whole, []),
        "fixed zeros": (first, []),
        "random growth": (first, [Rigl(SPARSITY, every=EVERY, stop=STOP, grow="random")]),
        "SET each epoch": (first, [Set(SPARSITY)]),
        "RigL": (first, [Rigl(SPARSITY, every=EVERY, stop=STOP)]),
    }
    figures: Figures = {"weights kept": float(first.kept)}
    for name, (masks, rules) in ways.items():
        net = fresh("lenet_300_100", seed, inputs=784, outputs=10)
        batches = Loader(data.train, 100, shuffle=True, seed=seed, **scale)
        options: dict[str, Any] = {"epochs": 5, "lr": 0.1, "momentum": 0.9, "schedule": "cosine", "seed": seed}
        left = secateur.train(net, batches, masks=masks, rules=rules, **options)
        figures[f"accuracy {name}, %"] = percent(net.eval(), data.test, **scale)
        if name == "RigL":
            figures["zeros of RigL that were weights at first, % of weights"] = 100 * (first - left).kept / first.kept
    return figures


CLAIM = Claim(
    name="rigl_growth",
    title="RigL: zeros that move by the gradient beat zeros that move at random, and these beat fixed ones",
    paper="Evci, Gale, Menick, Castro, Elsen, Rigging the Lottery: Making All Tickets Winners, ICML 2020, "
    "arXiv:1911.11134",
    states="ResNet-50 on ImageNet, 90 % zeros, top-1 of the authors' repository: RigL 72.02 % (uniform) and 73.07 % "
    "(ERK), five times longer 75.73 % and 76.42 %, dense 76.8 %. Here: LeNet-300-100 on MNIST, 98 % zeros, ERK, "
    "5 epochs of SGD 0.1 with momentum 0.9 and a cosine, batches of 100, an update every 100 steps in the first 75 % "
    "of the run, share 0.3; every way begins with the same weights and zeros; random growth is the same rule with only "
    "the choice of places changed, and SET with its own rule of removal, once an epoch, is shown beside it",
    one=one,
    checks=(
        Check(
            "mean accuracy of RigL ≥ that of fixed zeros + 2 points",
            lambda r: mean(r, "accuracy RigL, %") >= mean(r, "accuracy fixed zeros, %") + 2,
        ),
        Check(
            "mean accuracy of RigL ≥ that of random growth + 0.5 points",
            lambda r: mean(r, "accuracy RigL, %") >= mean(r, "accuracy random growth, %") + 0.5,
        ),
    ),
    seeds=(0, 1, 2),
    minutes=4.0,
    data=("mnist",),
    analysis="The second inequality fails by a hundredth of a point: RigL is 0.49 points above random growth in the "
    "mean of three seeds, and 0.5 were asked for; in one seed it is 0.15 ahead. Random growth here is RigL's own rule "
    "with drawn places. Against SET as its authors describe it RigL is 1.6 points ahead, but that differs in more than "
    "the places: zeros move four times and not 22 times, and new weights do not begin at zero.",
)


if __name__ == "__main__":
    run(CLAIM)
