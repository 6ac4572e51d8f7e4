"""Hash-routed constants against a dense network on a rough target whose Lipschitz constant is known.

Baykal, Dikkala, Panigrahy, Rashtchian, Wang, A Theoretical View on Sparsely Activated Networks, NeurIPS 2022,
arXiv:2208.04461: a Lipschitz function is learnt to an error of ε with about ``(2 L sqrt(d) / ε)^d`` buckets on
``[-1, 1]^d``, of which every example uses one. The target here is bilinear interpolation of random values on a grid of
the square, for which L is exact.

Unverified: the constants of the paper's theorems, and its experiments, whose settings are not known; the target and
the sizes are ours. The routed layer is fitted in closed form; only the dense network has a training and a folder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.blocks.hashes import Hashes
from secateur.blocks.lsh import LshLayer, Occupancy
from secateur.core import streams
from secateur.core.errors import UsageError
from secateur.core.task import device_of, frozen
from secateur.data import Loader, Split
from secateur.engine.recipe import TrainStep
from secateur.engine.studies.rewind import Way, train_to


@dataclass(frozen=True, eq=False)
class Bilinear:
    """A function on the square ``[-1, 1]^2``: bilinear interpolation of values at the points of a grid.

    Args:
        values: (n, n), float64, n at least 2; the first index goes along the first coordinate.

    Raises:
        UsageError: for values of another shape.
    """

    values: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.values.shape)
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 2 or not self.values.is_floating_point():
            raise UsageError(f"the values are {self.values.dtype} {shape}; give floating (n, n) with n at least 2.")

    @classmethod
    def drawn(cls, side: int, seed: int) -> Bilinear:
        """Values that are uniform in [-1, 1), ``side`` times ``side`` of them."""
        random = streams.stream(seed, "bilinear")
        return cls(2 * torch.rand(side, side, generator=random, dtype=torch.float64) - 1)

    @property
    def lipschitz(self) -> float:
        """The least L with ``|f(x) - f(y)| <= L |x - y|``, exactly.

        In a cell either part of the gradient is affine in the other coordinate, so its length is greatest at a corner.
        """
        v, step = self.values, 2 / (len(self.values) - 1)
        along, across = v.diff(dim=0) / step, v.diff(dim=1) / step  # of the edges of the cells
        corners = [along[:, a : a + len(along)] ** 2 + across[b : b + len(along)] ** 2 for a in (0, 1) for b in (0, 1)]
        return float(torch.stack(corners).max().sqrt())

    def __call__(self, x: Tensor) -> Tensor:
        """Values (N, 1) at points (N, 2), which are moved to the edge of the square when they lie outside."""
        values = self.values.to(x.device)
        place = (x.double().clamp(-1, 1) + 1) / 2 * (len(values) - 1)
        cell = place.floor().clamp(max=len(values) - 2).long()
        (u, v), (i, j) = (place - cell).unbind(1), cell.unbind(1)
        low = values[i, j] * (1 - v) + values[i, j + 1] * v
        high = values[i + 1, j] * (1 - v) + values[i + 1, j + 1] * v
        return (low * (1 - u) + high * u)[:, None].to(x.dtype)

    def sample(self, count: int, seed: int, part: str = "train") -> Split:
        """Points drawn evenly from the square, float32, and the values there.

        Raises:
            DataError: for a count below 1.
        """
        random = streams.stream(seed, "points", part)
        x = 2 * torch.rand(max(0, count), 2, generator=random, dtype=torch.float64) - 1
        return Split(x.float(), self(x).float())


@dataclass(frozen=True)
class Routed:
    """What a hash-routed layer reached.

    Args:
        error: mean squared error on the test part.
        occupancy: how the training part lies in the buckets; many single ones are memorisation.
        active: numbers that one example reads, routing included.
        macs: multiply-adds of one example, routing included.
    """

    error: float
    occupancy: Occupancy
    active: int
    macs: int


@dataclass(frozen=True)
class Dense:
    """What a dense network reached.

    Args:
        error: mean squared error on the test part.
        active: its parameters, all of which every example reads.
        macs: multiply-adds of one example.
    """

    error: float
    active: int
    macs: int


def routed(
    train: Split, test: Split, hashes: Hashes, by: Literal["mean", "middle"] = "mean"
) -> tuple[LshLayer, Routed]:
    """A layer with one constant a bucket, fitted in closed form, and what it reaches.

    Args:
        train: points and values.
        test: others, to be judged by.
        hashes: the routing.
        by: what the constants are, see :meth:`secateur.blocks.lsh.LshLayer.fit_`.

    Raises:
        SecateurError: as the layer does.

    Cost: one pass over either part.
    """
    layer = LshLayer(hashes, train.y.shape[1]).to(train.x.device)
    found = layer.fit_(train.x, train.y, by)
    cost = layer.active()
    return layer.eval(), Routed(mean_square(layer, test), found, cost.parameters, cost.macs)


def dense(
    train: Split, test: Split, units: int, step: TrainStep, batch: int, folder: Path, seed: int
) -> tuple[nn.Module, Dense]:
    """A network with one hidden layer of ReLUs, trained by squared error, and what it reaches.

    Args:
        train: points and values.
        test: others, to be judged by.
        units: hidden units.
        step: the options of the training.
        batch: examples in a batch.
        folder: of the training, which goes on there when it was stopped.
        seed: of initial weights and order.

    Raises:
        UsageError: for fewer than one unit.
        SecateurError: as the training does.
    """
    if units < 1:
        raise UsageError(f"the dense network has {units} hidden units; it needs at least 1.")
    inputs, outputs = train.x.shape[1], train.y.shape[1]
    with streams.seeded(seed, "init", units):
        net = nn.Sequential(nn.Linear(inputs, units), nn.ReLU(), nn.Linear(units, outputs)).to(train.x.device)
    loader = Loader(train, batch, shuffle=True, seed=seed)
    train_to(net, Way(loader, step, seed, functional.mse_loss), folder)
    active = sum(p.numel() for p in net.parameters())
    return net, Dense(mean_square(net, test), active, units * (inputs + outputs))


@torch.no_grad()
def mean_square(model: nn.Module, split: Split, batch: int = 10_000) -> float:
    """Mean squared error over a split, in evaluation mode, added up in float64."""
    total, where = 0.0, device_of(model)
    with frozen(model):
        for x, y in zip(split.x.split(batch), split.y.split(batch), strict=True):
            total += float((model(x.to(where)).double() - y.to(where).double()).square().sum())
    return total / split.y.numel()


def diameters(where: Tensor, x: Tensor) -> Tensor:
    """The greatest distance between two points of each bucket, 0 for single ones.

    Args:
        where: the bucket of each point (N,), as :meth:`secateur.blocks.lsh.LshLayer.route` gives it.
        x: points (N, inputs).

    Returns:
        (buckets,), float64; buckets without a point have 0. L times it bounds the error of a constant within the range
        that the target has on the bucket's points.

    Raises:
        UsageError: when ``where`` and ``x`` are not of one length.

    Cost: the square of the points of a bucket, for each bucket.
    """
    if where.shape != x.shape[:1]:
        raise UsageError(f"{tuple(where.shape)} buckets for points of shape {tuple(x.shape)}; give one for each point.")
    order = where.argsort(stable=True)
    counts = torch.bincount(where)
    parts = x.double()[order].split(counts.tolist())
    exact = "donot_use_mm_for_euclid_dist"  # products cancel where points are near each other
    return torch.stack([
        torch.cdist(part, part, compute_mode=exact).max() if len(part) else x.new_zeros((), dtype=torch.float64)
        for part in parts
    ])  # fmt: skip


def cells_needed(lipschitz: float, inputs: int, error: float) -> int:
    """Cubes of an axis grid on ``[-1, 1]^inputs`` with which a constant each errs by at most ``error``.

    ``ceil(2 L sqrt(d) / ε)^d``: a cube of side s has the diameter ``s sqrt(d)``, and L times it is the error of any
    constant within the target's range there; the middle of the range needs half of the cubes along a side.

    >>> cells_needed(1.0, 2, 0.5)
    36

    Raises:
        UsageError: for numbers that are not above 0.
    """
    if inputs < 1 or not lipschitz > 0 or not error > 0:
        raise UsageError(f"L = {lipschitz!r}, {inputs} inputs, error {error!r}: all must be above 0.")
    return math.ceil(2 * lipschitz * math.sqrt(inputs) / error) ** inputs
