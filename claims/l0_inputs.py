"""Hard-concrete gates: pixels that a dense network does not need are switched off while it trains."""

from __future__ import annotations

import secateur
from claims._common import fresh, percent
from claims.kit import Check, Claim, Figures, mean, run
from secateur.data import Loader, load
from secateur.rules.l0 import L0

EPOCHS, BATCH, LR = 15, 128, 1e-3
STRENGTHS = (0.1, 1.0)


def one(seed: int, data_dir: str | None) -> Figures:
    """Inputs of each layer that are kept, and accuracy, for two prices of a weight."""
    data = load("mnist", data_dir)
    figures: Figures = {}
    for strength in STRENGTHS:
        net = fresh("lenet_300_100", seed)
        batches = Loader(data.train, BATCH, shuffle=True, seed=seed, mean=data.mean, std=data.std)
        options = {"epochs": EPOCHS, "optimizer": "adam", "lr": LR, "schedule": "constant"}
        masks = secateur.train(net, batches, rules=[L0(strength)], seed=seed, **options)
        for number, mask in enumerate(masks.values(), 1):
            figures[f"inputs of layer {number} kept at {strength:g}"] = float(mask.any(0).sum())
        accuracy = percent(net.eval(), data.test, mean=data.mean, std=data.std)
        figures[f"accuracy at {strength:g}, %"] = accuracy
    return figures


CLAIM = Claim(
    name="l0_inputs",
    title="Hard-concrete gates switch pixels off at little loss, the more the higher the price of a weight",
    paper="Louizos, Welling & Kingma, Learning Sparse Neural Networks through L0 Regularization, ICLR 2018, "
    "arXiv:1712.01312",
    states="LeNet-300-100 on MNIST, price 0.1, 200 epochs: 219 of 784 inputs, 214 and 100 hidden units, error 1.4 % "
    "(unverified). Here 15 epochs of Adam at 1e-3, batches of 128, half of the gates closed at first in every layer; "
    "hidden units hardly fall in so short a time",
    one=one,
    checks=(
        Check("price 0.1: mean accuracy ≥ 97.3 %", lambda r: mean(r, "accuracy at 0.1, %") >= 97.3),
        Check(
            "price 0.1: on average at most 65 % of the 784 inputs are kept",
            lambda r: mean(r, "inputs of layer 1 kept at 0.1") <= 0.65 * 784,
        ),
        Check(
            "fewer inputs are kept at a price of 1 than at 0.1, in every seed",
            lambda r: all(row["inputs of layer 1 kept at 1"] < row["inputs of layer 1 kept at 0.1"] for row in r),
        ),
    ),
    seeds=(0, 1, 2),
    minutes=8.0,
    data=("mnist",),
)

if __name__ == "__main__":
    run(CLAIM)
