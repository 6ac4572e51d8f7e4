"""STR: decay of the thresholds decides how sparse each layer becomes."""

from __future__ import annotations

from collections.abc import Sequence

import secateur
from claims._common import fresh, percent
from claims.kit import Check, Claim, Figures, mean, run
from secateur.data import Loader, load
from secateur.rules.str import Str

DECAYS = (1e-4, 5e-4, 1e-3)
START, EPOCHS, BATCH, LR, MOMENTUM = -12.0, 8, 128, 0.1, 0.9


def one(seed: int, data_dir: str | None) -> Figures:
    """Sparsity of every layer and accuracy for each decay."""
    data = load("mnist", data_dir)
    figures: Figures = {}
    for decay in DECAYS:
        net = fresh("lenet_300_100", seed)
        masks = secateur.train(
            net, Loader(data.train, BATCH, shuffle=True, seed=seed), rules=[Str(START)], epochs=EPOCHS, lr=LR,
            momentum=MOMENTUM, weight_decay=decay, schedule="cosine", seed=seed,
        )  # fmt: skip
        for number, mask in enumerate(masks.values(), 1):
            figures[f"zeros in layer {number} at decay {decay:g}, %"] = 100 * (1 - float(mask.double().mean()))
        figures[f"zeros at decay {decay:g}, %"] = 100 * masks.sparsity
        figures[f"accuracy at decay {decay:g}, %"] = percent(net, data.test)
    return figures


def _layers(row: Figures, decay: float) -> list[float]:
    return [float(row[f"zeros in layer {number} at decay {decay:g}, %"]) for number in (1, 2, 3)]


def _rises(rows: Sequence[Figures]) -> bool:
    found = [list(zip(*(_layers(row, decay) for decay in DECAYS), strict=True)) for row in rows]
    return all(a < b < c for layers in found for a, b, c in layers)


def _differ(rows: Sequence[Figures]) -> bool:
    found = [_layers(row, decay) for row in rows for decay in DECAYS[1:]]
    return all(max(layers) - min(layers) >= 8 and max(layers) == layers[0] for layers in found)


CLAIM = Claim(
    name="str_decay",
    title="STR: the decay of the thresholds sets the sparsity, and layers differ",
    paper="Kusupati, Ramanujan, Somani, Wortsman, Jain, Kakade & Farhadi, Soft Threshold Weight Reparameterization for "
    "Learnable Sparsity, ICML 2020, arXiv:2002.03231",
    states="ResNet-50 on ImageNet, dense 77.01 %: 76.12 % at 81.27 % zeros, 74.31 % at 90.23 %, 61.46 % at 98.05 %; "
    "the layers' sparsities are learnt and differ. Here LeNet-300-100 on MNIST, thresholds from sigmoid(-12), eight "
    "epochs of SGD 0.1 with momentum 0.9 and a cosine, decay of weights and thresholds alike",
    one=one,
    checks=(
        Check("in every seed the sparsity of every layer rises with the decay", _rises),
        Check(
            "in every seed, at decays of 5e-4 and 1e-3, layers differ by at least 8 points and the first is sparsest",
            _differ,
        ),
        Check(
            "mean accuracy at least 98 % at every decay",
            lambda rows: all(mean(rows, f"accuracy at decay {decay:g}, %") >= 98 for decay in DECAYS),
        ),
    ),
    minutes=6.0,
    data=("mnist",),
)

if __name__ == "__main__":
    run(CLAIM)
