"""SOSP: the layer that a cut over all layers spares is the one to widen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import secateur
from claims import _cnn
from claims._common import percent
from claims.kit import Check, Claim, Figures, mean, run
from secateur.core import streams
from secateur.core.allocations import Global
from secateur.criteria.sosp_h import SospH
from secateur.data import Dataset, Loader, load
from secateur.probes.cost import Cost

WIDTHS = (16, 4, 64)
NARROW = 1
"""Place of the layer that is made too narrow on purpose; between 16 and 64 channels there would be 32."""
SHARE = 0.4
EXAMPLES = 1000
FACTOR = 2
"""By how much the paper widens a bottleneck."""
DRAWS = 3
"""Trainings of every network, from initial weights and an order of the images of their own."""
EPOCHS, LR, MOMENTUM = 5, 0.02, 0.9
Widths = tuple[int, ...]


def network(widths: Sequence[int], seed: int, draw: int = 0) -> nn.Sequential:
    """3x3 convolutions without bias, each with ReLU and pooling, and a dense head; weights from the two numbers."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with torch.random.fork_rng(devices=[]):
        streams.seed_global(seed, "init", draw)
        wide = 1
        for number, width in enumerate(widths, 1):
            layers[f"conv{number}"] = nn.Conv2d(wide, width, 3, padding=1, bias=False)
            layers[f"relu{number}"] = nn.ReLU()
            layers[f"pool{number}"] = nn.MaxPool2d(2)
            wide = width
        layers["flatten"], layers["head"] = nn.Flatten(), nn.Linear(wide * 9, 10)
    return nn.Sequential(layers)


def trained(widths: Sequence[int], data: Dataset, seed: int, draw: int = 0) -> nn.Sequential:
    """A network of these widths after the same number of epochs as any other."""
    net, order = network(widths, seed, draw), 100 * seed + draw
    batches = Loader(data.train, 64, shuffle=True, seed=order, mean=data.mean, std=data.std)
    secateur.train(net, batches, epochs=EPOCHS, lr=LR, momentum=MOMENTUM, schedule="cosine", seed=order)
    return net.eval()


def shares(scores: Mapping[str, Tensor]) -> list[float]:
    """The share of each layer's channels among the lowest of all layers together; every layer keeps its best one."""
    total = sum(map(len, scores.values()))
    kept = Global()(dict(scores), total - round(SHARE * total))
    return [1 - kept[name] / len(score) for name, score in scores.items()]


def widened(cut: Sequence[float]) -> Widths:
    """The layers that lose the smallest share, doubled."""
    return tuple(width * FACTOR if lost == min(cut) else width for width, lost in zip(WIDTHS, cut, strict=True))


def price(widths: Sequence[int], data: Dataset) -> tuple[float, float]:
    """Multiply-adds of one image, and parameters."""
    parts = Cost()(_cnn.task(network(widths, 0), data, data.test, 1)).parts
    return parts["macs_dense"], parts["params"]


def uniform(other: Sequence[int], data: Dataset) -> Widths:
    """All layers wider by one factor: the smallest, in steps of 1/100, that saves nothing beside ``other``.

    Widths are whole numbers, so the two cannot cost the same; what is left over is on this network's side, in
    multiply-adds and in parameters.
    """
    aim, hundredths, found = price(other, data), 100, WIDTHS
    while any(have < need for have, need in zip(price(found, data), aim, strict=True)):
        hundredths += 1
        found = tuple(round(width * hundredths / 100) for width in WIDTHS)
    return found


def quality(nets: Sequence[nn.Module], data: Dataset) -> tuple[float, float]:
    """Mean test loss, and mean per cent of test images named rightly."""
    losses = [_cnn.task(net, data, data.test).mean_loss() for net in nets]
    rights = [percent(net, data.test, mean=data.mean, std=data.std) for net in nets]
    return sum(losses) / len(nets), sum(rights) / len(nets)


def one(seed: int, data_dir: str | None) -> Figures:
    """What of each layer is cut, and the test losses of the networks widened where little is cut and everywhere."""
    data = load("mnist", data_dir).subset(train=12_000, seed=seed)
    dense = [trained(WIDTHS, data, seed, draw) for draw in range(DRAWS)]
    seen = _cnn.task(dense[0], data, data.train, EXAMPLES)
    cut = shares(_cnn.per_channel(SospH()(seen, _cnn.channels(dense[0]))))
    figures: Figures = {f"cut of layer {number}, %": 100 * lost for number, lost in enumerate(cut, 1)}
    aimed = widened(cut)
    plans = {"as it was": WIDTHS, "bottleneck widened": aimed, "all widened": uniform(aimed, data)}
    for name, widths in plans.items():
        nets = dense if name == "as it was" else [trained(widths, data, seed, draw) for draw in range(DRAWS)]
        figures[f"widths, {name}"] = list(widths)
        figures[f"MACs, {name}"], figures[f"parameters, {name}"] = price(widths, data)
        figures[f"test loss, {name}"], figures[f"accuracy, {name}, %"] = quality(nets, data)
    return figures


def _spared(rows: Sequence[Figures]) -> bool:
    cuts = [[row[f"cut of layer {number}, %"] for number in range(1, len(WIDTHS) + 1)] for row in rows]
    return all(cut[NARROW] == min(cut) and cut[NARROW] <= 100 * SHARE / 2 for cut in cuts)


CLAIM = Claim(
    name="sosp_bottleneck",
    title="SOSP: the bottleneck of a network",
    paper="Nonnenmacher, Pfeil, Steinwart, Reeb, SOSP: Efficiently Capturing Global Correlations by Second-Order "
    "Structured Pruning, ICLR 2022, arXiv:2110.11395",
    states="layers that lose far less than the average are bottlenecks; widening them by 2 and training anew is better "
    "than widening all layers a little, by 1.1 (from notes, unverified). Here: a network of 16, 4 and 64 channels, the "
    "second layer too narrow on purpose, 12,000 MNIST images, 40 % of the channels marked by SOSP-H from 1,000 images; "
    "layers of the smallest share doubled, or all layers widened by one factor to at least as many multiply-adds and "
    "parameters; each trained anew for five epochs from three draws, loss and accuracy on 10,000 test images",
    one=one,
    checks=(
        Check(
            "of the narrow layer at most half the share of all channels is cut, and of no layer less, in every seed",
            _spared,
        ),
        Check(
            "mean test loss: bottleneck widened < all widened",
            lambda r: mean(r, "test loss, bottleneck widened") < mean(r, "test loss, all widened"),
        ),
        Check(
            "mean accuracy: bottleneck widened > all widened",
            lambda r: mean(r, "accuracy, bottleneck widened, %") > mean(r, "accuracy, all widened, %"),
        ),
    ),
    seeds=(0, 1, 2),
    minutes=7.7,
    data=("mnist",),
    analysis="The ranking is taken from the first draw of each seed. In seed 0 two of the four narrow channels are "
    "dead in that draw and a third has a score of 1.6e-6 (accuracy 93.7 %), so SOSP-H calls the narrow layer "
    "superfluous, cuts three of its channels, and the first layer is doubled instead: what training has killed looks "
    "the same as what is not needed. In the other two draws of seed 0 nothing of the narrow layer would be cut, as in "
    "seeds 1 and 2. The wrong layer is not the whole reason: with 16, 8 and 64 channels seed 0 reaches a mean loss of "
    "0.0570 (0.0643 with the first layer doubled), still above the 0.0530 of the network widened everywhere. In seed "
    "1 the bottleneck network has the lower loss, in seed 2 the other by 0.001. The terms favour the uniform network: "
    "four channels cannot grow by 1.375, so it has 22, 6 and 88 channels, half as many again in the narrow layer too, "
    "10 % more multiply-adds, and a fifth more parameters than 16, 8 and 64 channels have. Whether it wins by that "
    "is open: tried after the figures were seen, as no check, 22, 5 and 87 channels (4 % fewer multiply-adds than the "
    "bottleneck network) have a mean loss of 0.0579 in seed 1 (bottleneck 0.0541, 22, 6 and 88 channels 0.0564), and "
    "0.0661 in the one draw of seed 2 that was made.",
)


if __name__ == "__main__":
    run(CLAIM)
