"""DepGraph: any network loses a random third of its units, still runs, computes what it must, and is no slower."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence

import torch
from tests.surgery import zoo
from tests.surgery.proofs import apart, outputs, zeroed_by_hand
from torch import Tensor, nn

from claims._common import fresh
from claims.kit import Check, Claim, Figures, run
from secateur.core.streams import seed_global, stream
from secateur.probes.latency import dense_and_pruned
from secateur.surgery import Analysis, analyse, shrink
from secateur.surgery.proof import difference, expected_outputs

SHARE = 0.3
BATCH = 8
CLOSE = 1e-5
SLOWER = 1.05
Built = tuple[nn.Module, tuple[int, ...], int]
"""A network, the shape of an example, and how many different tokens it takes; 0 for images."""


def shufflenet() -> nn.Module:
    """ShuffleNet V2 units of 116 and 232 channels."""
    units = [zoo.ShuffleV2Unit(24, 116, 2), zoo.ShuffleV2Unit(116, 116), zoo.ShuffleV2Unit(116, 116)]
    units += [zoo.ShuffleV2Unit(116, 232, 2), zoo.ShuffleV2Unit(232, 232), zoo.ShuffleV2Unit(232, 232)]
    return zoo.ResNet(zoo.conv_bn(3, 24), units, 232)


def gqa() -> nn.Module:
    """Two decoder blocks with rotary positions, RMSNorm, a gated MLP and eight heads that share four keys."""
    blocks = [zoo.LMBlock(256, zoo.RotaryAttention(256, 8, 4, 32), zoo.SwiGLU(256, 768)) for _ in range(2)]
    return zoo.LanguageModel(256, blocks, vocabulary=200)


def own(build: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    """A network of the tests, its initial weights a function of the seed."""

    def make(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            seed_global(seed, "init")
            return build()

    return make


NETWORKS: dict[str, Callable[[int], Built]] = {
    "ResNet-18": lambda seed: (fresh("resnet18", seed, outputs=100), (3, 64, 64), 0),
    "DenseNet": lambda seed: (own(zoo.DenseNet)(seed), (3, 64, 64), 0),
    "MobileNetV2": lambda seed: (fresh("mobilenet_v2", seed, outputs=100), (3, 96, 96), 0),
    "ShuffleNetV2": lambda seed: (own(shufflenet)(seed), (3, 64, 64), 0),
    "ViT": lambda seed: (fresh("vit_tiny", seed), (3, 32, 32), 0),
    "GQA decoder": lambda seed: (own(gqa)(seed), (64,), 200),
    "LSTM": lambda seed: (fresh("lstm", seed, vocab=65, hidden=256, layers=2), (32,), 65),
}


def batch(shape: tuple[int, ...], tokens: int, seed: int, name: str) -> Tensor:
    """Random inputs."""
    random = stream(seed, "inputs", name)
    if tokens:
        return torch.randint(tokens, (BATCH, *shape), generator=random)
    return torch.randn(BATCH, *shape, generator=random)


def drawn(found: Analysis, seed: int) -> dict[str, list[int]]:
    """30 % of the units of every group of two or more, at least one."""
    picked = {}
    for group in found.groups:
        if len(group) > 1:
            order = torch.randperm(len(group), generator=stream(seed, "random", group.name))
            picked[group.name] = sorted(order[: max(1, round(SHARE * len(group)))].tolist())
    return picked


def error(dense: nn.Module, small: nn.Module, found: Analysis, picked: dict[str, list[int]], x: Tensor) -> float:
    """Largest difference from the zeroed dense network on inputs that the surgery has not seen, of the largest output.

    Zeroed by hand, weight by weight; where statistics of a norm change with its width, from the labelled graph, which
    takes them over the units that stay.
    """
    if not any(found.group(name).inexact for name in picked):
        wanted = outputs(zeroed_by_hand(dense, found, picked), (x,), torch.float64)
        return apart(outputs(small, (x,), torch.float64), wanted)
    labels = torch.cat([found.group(name).labels[units] for name, units in picked.items()])
    wanted, dtype = expected_outputs(found, labels, x)
    return difference(outputs(small, (x,), dtype), wanted)


def one(seed: int, data_dir: str | None) -> Figures:
    """Errors, parameters left, and the ratio of the median times, network by network."""
    figures: Figures = {}
    for name, build in NETWORKS.items():
        dense, shape, tokens = build(seed)
        zoo.stir(dense)
        dense.eval()
        x = batch(shape, tokens, seed, "example")
        found = analyse(dense, x)
        picked = drawn(found, seed)
        done = shrink(copy.deepcopy(dense), x, picked, analysis=found)
        small = done.model.eval()
        other = batch(shape, tokens, seed, "other")
        figures[f"error, {name}"] = max(done.error, error(dense, small, found, picked, other))
        figures[f"moved by the removal, {name}"] = apart(outputs(small, (other,)), outputs(dense, (other,)))
        figures[f"parameters left, {name}, %"] = 100 * done.params[1] / done.params[0]
        before, _, ratio = dense_and_pruned(dense, small, other, rounds=40, warmup=5, threads=1)
        figures[f"ms dense, {name}"], figures[f"times as fast, {name}"] = before.value, ratio.value
    return figures


def _proved(rows: Sequence[Figures]) -> bool:
    return all(row[f"error, {name}"] <= CLOSE for row in rows for name in NETWORKS)


def _no_slower(rows: Sequence[Figures]) -> bool:
    return all(statistics.median(row[f"times as fast, {name}"] for row in rows) >= 1 / SLOWER for name in NETWORKS)


CLAIM = Claim(
    name="depgraph_random",
    title="DepGraph: seven kinds of networks lose a random 30 % of their units",
    paper="Fang, Ma, Song, Mi, Wang, DepGraph: Towards Any Structural Pruning, CVPR 2023, arXiv:2301.12900",
    states="ResNet-56 on CIFAR-10 at 2.13 times fewer multiply-adds: 93.53 → 93.77 %; networks of all kinds, from "
    "convolutions to transformers, LSTM and graphs. Here: no accuracy; untrained networks with noise on vectors and "
    "statistics lose a random 30 % of the units of every group, the residual stream included; batch 8, one thread, "
    "40 rounds in which the dense and the smaller network take turns; the widths are not rounded",
    one=one,
    checks=(
        Check("every network runs, and differs from the zeroed dense one by ≤ 1e-5 of its outputs", _proved),
        Check("no network takes more than 1.05 times as long as the dense one (medians of 40, then of the seeds)",
              _no_slower),
    ),
    seeds=(0, 1, 2),
    minutes=2.0,
    analysis="All seven are faster. DenseNet gains least: its small layers spend much of their time outside of "
    "products. Convolutions, and ViT, agree to float64; the decoder and the LSTM compute in float32, since their "
    "graphs name that type. Other jobs ran on the machine, so the milliseconds are those of a busy one; the ratios are "
    "from calls in turn.",
)  # fmt: skip


if __name__ == "__main__":
    run(CLAIM)
