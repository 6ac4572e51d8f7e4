"""Sparse variational dropout: one training run without a target prunes nearly all weights of a dense network."""

from __future__ import annotations

import secateur
from claims._common import fresh, percent
from claims.kit import Check, Claim, Figures, mean, run
from secateur.data import Loader, load
from secateur.rules.variational_dropout import VariationalDropout

EPOCHS, BATCH, LR = 20, 256, 1e-3
RULE = VariationalDropout(start=0.05, stop=0.3)


def one(seed: int, data_dir: str | None) -> Figures:
    """Sparsity of all weights and of each layer, and the test error of the pruned network."""
    data = load("mnist", data_dir)
    net = fresh("lenet_300_100", seed)
    batches = Loader(data.train, BATCH, shuffle=True, seed=seed, mean=data.mean, std=data.std)
    masks = secateur.train(net, batches, rules=[RULE], epochs=EPOCHS, optimizer="adam", lr=LR, seed=seed)
    figures: Figures = {"sparsity, %": 100 * masks.sparsity}
    for number, mask in enumerate(masks.values(), 1):
        figures[f"sparsity of layer {number}, %"] = 100 * (1 - float(mask.double().mean()))
    figures["error, %"] = 100 - percent(net.eval(), data.test, mean=data.mean, std=data.std)
    return figures


CLAIM = Claim(
    name="variational_dropout_lenet",
    title="Variational dropout prunes a dense network by 95 % in one run, without a target",
    paper="Molchanov, Ashukha & Vetrov, Variational Dropout Sparsifies Deep Neural Networks, ICML 2017, "
    "arXiv:1701.05369",
    states="LeNet-300-100 on MNIST, 200 epochs: 98.9, 97.2 and 62.0 % of the three layers pruned (68 times fewer "
    "weights), error 1.92 %, dense 1.64 %. Here 20 epochs of Adam at 1e-3 with cosine decay, batches of 256; the "
    "weight of the divergence rises from 0 after epoch 1 to 1 after epoch 6",
    one=one,
    checks=(
        Check("mean sparsity ≥ 95 %", lambda r: mean(r, "sparsity, %") >= 95),
        Check("mean error of the pruned network ≤ 2.6 %", lambda r: mean(r, "error, %") <= 2.6),
    ),
    seeds=(0, 1, 2),
    minutes=5.0,
    data=("mnist",),
)

if __name__ == "__main__":
    run(CLAIM)
