"""SNIP on LeNet-300-100: masks made before training, against random ones of the same count and of the same layers."""

from __future__ import annotations

import copy

from torch import nn

import secateur
from claims._common import balanced, fresh, percent
from claims.kit import Check, Claim, Figures, mean, run
from secateur.core.choose import cut
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.patterns import Unstructured
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.criteria.random import Random
from secateur.criteria.snip import Snip
from secateur.data import Dataset, Loader, load
from secateur.engine.cutting import plan


def one(seed: int, data_dir: str | None) -> Figures:
    """Test errors after five epochs under each mask, and where the kept weights of the first layer lie."""
    data = load("mnist", data_dir)
    model = glorot(seed)
    task = Task(model, CrossEntropy(), balanced(data.train, 10, seed))
    snip = {at: plan(task, f"sparsity {at}", Snip(), forecast=False).masks for at in (0.95, 0.98, 0.985)}
    chance = plan(task, "sparsity 0.98", Random(seed), forecast=False).masks
    alike = cut(Random(seed)(task, Masks.dense(model)), snip[0.985].counts(), Unstructured())
    kept = snip[0.98]["fc1.weight"].float().mean(0).view(28, 28)
    inner = kept[3:25, 3:25]
    return {
        "error dense, %": error(model, data, seed),
        "error SNIP 95 %, %": error(model, data, seed, snip[0.95]),
        "error SNIP 98 %, %": error(model, data, seed, snip[0.98]),
        "error random 98 %, %": error(model, data, seed, chance),
        "error SNIP 98.5 %, %": error(model, data, seed, snip[0.985]),
        "error random in SNIP's layer counts 98.5 %, %": error(model, data, seed, alike),
        "kept by SNIP 98 % at the centre, %": 100 * float(kept[7:21, 7:21].mean()),
        "kept by SNIP 98 % in the frame, %": 100 * float((kept.sum() - inner.sum()) / (784 - inner.numel())),
    }


def glorot(seed: int) -> nn.Module:
    """LeNet-300-100 with Glorot's normal weights and no bias, as the method asks for: variance by layer widths."""
    model, random = fresh("lenet_300_100", seed), stream(seed, "glorot")
    for tensor in model.parameters():
        if tensor.dim() > 1:
            nn.init.xavier_normal_(tensor, generator=random)
        else:
            nn.init.zeros_(tensor)
    return model


def error(model: nn.Module, data: Dataset, seed: int, masks: Masks | None = None) -> float:
    """Per cent of wrong answers on the test images after training a copy under the masks."""
    net = copy.deepcopy(model)
    if masks is not None:
        masks.apply_(net)
    order = Loader(data.train, 100, shuffle=True, seed=seed)
    secateur.train(net, order, masks=masks, epochs=5, lr=0.1, momentum=0.9, schedule="cosine")
    return 100 - percent(net, data.test)


CLAIM = Claim(
    name="snip_masks",
    title="SNIP finds trainable masks before training",
    paper="Lee, Ajanthan & Torr, SNIP: Single-shot Network Pruning based on Connection Sensitivity, ICLR 2019, "
    "arXiv:1810.02340",
    states="LeNet-300-100 on MNIST, error 1.7 % dense, 1.6 % at 95 %, 2.4 % at 98 % (unverified). Here: 5 epochs, SGD "
    "0.1 with momentum 0.9 and cosine, pixels in [0, 1], scores from ten examples of every class",
    one=one,
    checks=(
        Check(
            "98 %: mean error of SNIP at most half that of random masks of the same count",
            lambda rows: mean(rows, "error SNIP 98 %, %") <= 0.5 * mean(rows, "error random 98 %, %"),
        ),
        Check(
            "98.5 %: mean error of SNIP at least 2 points below random masks with SNIP's own count in every layer",
            lambda rows: (
                mean(rows, "error SNIP 98.5 %, %") <= mean(rows, "error random in SNIP's layer counts 98.5 %, %") - 2
            ),
        ),
        Check(
            "95 %: mean error of SNIP at most 2 points above dense",
            lambda rows: mean(rows, "error SNIP 95 %, %") <= mean(rows, "error dense, %") + 2,
        ),
        Check(
            "98 %: in every seed, weights of the central 14 x 14 pixels are kept at least 10 times as often as those "
            "of the frame of 3 pixels",
            lambda rows: all(
                row["kept by SNIP 98 % at the centre, %"] >= 10 * row["kept by SNIP 98 % in the frame, %"]
                for row in rows
            ),
        ),
    ),
    minutes=4.0,
    data=("mnist",),
)

if __name__ == "__main__":
    run(CLAIM)
