"""Hashes of inputs, names of buckets, and the numbers of the buckets that are open.

The routing of :mod:`secateur.blocks.lsh`, arXiv:2208.04461.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.core.errors import DataError, UsageError
from secateur.core.streams import stream

BITS = 63
"""What a packed key may have, so that it is a whole number of 64 bits that is not negative."""
_WORK = 1 << 22  # numbers compared at once


class Hashes(nn.Module):
    """``K`` hashes of inputs: ``[a_j·x + b_j >= 0]``, or with a width ``floor((a_j·x + b_j) / w)``.

    Directions and offsets are buffers, saved with the network and not trained. They stay in float64 when the network
    is cast, and hashes are computed in it: in half precision neighbouring buckets would run into each other. Inputs
    should have a scale that is known, since ``w`` is in their unit. No gradient flows through a hash.

    Args:
        directions: ``a``, (K, inputs).
        offsets: ``b``, (K,).
        width: ``w``, above 0; None for hyperplanes.

    Raises:
        UsageError: for a width not above 0, or shapes that do not fit.
    """

    directions: Tensor
    offsets: Tensor
    width: Tensor | None

    def __init__(self, directions: Tensor, offsets: Tensor, width: float | None = None) -> None:
        super().__init__()
        if width is not None and not 0 < width < math.inf:
            raise UsageError(f"the width of a hash is {width!r}; it must be above 0, in the unit of the inputs.")
        if directions.dim() != 2 or not directions.numel() or offsets.shape != directions.shape[:1]:
            raise UsageError(
                f"directions have shape {tuple(directions.shape)} and offsets {tuple(offsets.shape)}; give (K, inputs) "
                "and (K,)."
            )
        self.register_buffer("directions", directions.double())
        self.register_buffer("offsets", offsets.double())
        self.register_buffer("width", None if width is None else torch.tensor(width, dtype=torch.float64))

    @property
    def count(self) -> int:
        """``K``."""
        return len(self.directions)

    @property
    def inputs(self) -> int:
        """Numbers in an input."""
        return self.directions.shape[1]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The hashes of inputs ``(N, inputs)``, whole numbers ``(N, K)``. Cost: ``N K inputs`` MACs.

        Raises:
            DataError: for inputs of another shape, or that are not finite.
        """
        if x.dim() != 2 or x.shape[1] != self.inputs or not x.is_floating_point():
            raise DataError(f"inputs are {x.dtype} {tuple(x.shape)}; hashes need floating (N, {self.inputs}).")
        if not bool(x.isfinite().all()):
            raise DataError("inputs to be hashed are NaN or infinite and belong to no bucket; mend or drop them.")
        z = torch.addmm(self.offsets, x.double(), self.directions.T)
        return (z >= 0).long() if self.width is None else torch.floor(z / self.width).long()

    def _apply(self, fn: Any, recurse: bool = True) -> Hashes:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            setattr(self, name, buffer.to(getattr(self, name).device))  # moved, but not cast
        return self


def hyperplanes(inputs: int, count: int, seed: int, spread: float = 0.0) -> Hashes:
    """Sides of random hyperplanes: ``a ~ N(0, I)``, ``b ~ U[0, spread)``.

    With ``spread = 0`` two inputs at an angle θ share one hash with probability ``1 - θ/π``, whatever their length;
    with offsets that does not hold.

    Args:
        inputs: numbers in an input.
        count: ``K``; the layer needs ``keys="tuple"`` above 63.
        seed: what is drawn is a function of it.
        spread: of the offsets, 0 or more.

    Raises:
        UsageError: for numbers out of range.
    """
    if not 0 <= spread < math.inf:
        raise UsageError(f"the spread of the offsets is {spread!r}; it must be at least 0.")
    return Hashes(*_drawn(inputs, count, seed, False, spread))


def euclidean(inputs: int, count: int, width: float, seed: int, unit: bool = False) -> Hashes:
    """Numbers of random strips: ``floor((a·x + b) / w)`` with ``a ~ N(0, I)``, ``b ~ U[0, w)``.

    Args:
        inputs: numbers in an input.
        count: ``K``. With many hashes every example gets its own bucket, which then only remembers it
            (:meth:`LshLayer.occupancy` tells).
        width: ``w``, in the unit of the inputs.
        seed: what is drawn is a function of it. The directions do not depend on the width.
        unit: directions of length 1, so that ``w`` is the breadth of a strip.

    Raises:
        UsageError: for numbers out of range.
    """
    return Hashes(*_drawn(inputs, count, seed, unit, width), width)


def grid(inputs: int, width: float) -> Hashes:
    """Cells of an axis grid, cubes of side ``width`` and so of diameter ``width sqrt(inputs)``.

    Raises:
        UsageError: for a width not above 0.
    """
    return Hashes(torch.eye(inputs, dtype=torch.float64), torch.zeros(inputs, dtype=torch.float64), width)


class Packing(NamedTuple):
    """Hashes as one number, ``sum((h - low) * stride)``, with the sorted numbers of the open buckets."""

    low: Tensor
    span: Tensor
    stride: Tensor
    numbers: Tensor
    order: Tensor

    @classmethod
    def of(cls, codes: Tensor) -> Packing:
        """For the open buckets ``(M, K)``, at least one.

        Raises:
            UsageError: when their names take more than 63 bits.
        """
        low, high = codes.min(0).values, codes.max(0).values
        spans = [b - a + 1 for a, b in zip(low.tolist(), high.tolist(), strict=True)]
        check_bits(math.prod(spans), codes.shape[1])
        strides = [math.prod(spans[j + 1 :]) for j in range(len(spans))]
        span, stride = (torch.tensor(v, device=codes.device) for v in (spans, strides))
        numbers, order = ((codes - low) * stride).sum(1).sort()
        return cls(low, span, stride, numbers, order)

    def __call__(self, codes: Tensor) -> Tensor:
        """Number of each bucket, -1 where it is not open."""
        inside = ((codes >= self.low) & (codes < self.low + self.span)).all(1)
        wanted = ((codes - self.low) * self.stride).sum(1).where(inside, 0)
        at = torch.searchsorted(self.numbers, wanted).clamp(max=len(self.numbers) - 1)
        return torch.where(inside & (self.numbers[at] == wanted), self.order[at], -1)


def check_bits(names: int, count: int) -> None:
    """Refuse more names of buckets than a packed key has.

    Raises:
        UsageError: above ``2**63``.
    """
    if names > 1 << BITS:
        raise UsageError(
            f"{count} hashes name buckets with {math.log2(names):.1f} bits, and a packed key has {BITS}; use fewer or "
            'wider hashes, or keys="tuple".'
        )


def nearest(codes: Tensor, known: Tensor) -> Tensor:
    """Of each row the known row that differs in the fewest places, then in the sum of differences, then the first."""
    found = []
    places = torch.arange(len(known), device=known.device)
    for part in codes.split(max(1, _WORK // known.numel())):
        apart = (part[:, None, :] - known).abs_()
        hamming = (apart > 0).sum(2)
        amount = apart.clamp_(max=1 << 40).sum(2)
        amount = amount.where(hamming == hamming.amin(1, keepdim=True), torch.iinfo(torch.int64).max)
        found.append(places.where(amount == amount.amin(1, keepdim=True), len(known)).amin(1))
    return torch.cat(found)


def _drawn(inputs: int, count: int, seed: int, unit: bool, spread: float) -> tuple[Tensor, Tensor]:
    if inputs < 1 or count < 1:
        raise UsageError(f"{count} hashes of {inputs} inputs; both must be at least 1.")
    options: Any = {"dtype": torch.float64}
    directions = torch.randn(count, inputs, generator=stream(seed, "lsh", "directions"), **options)
    if unit:
        directions = directions / directions.norm(dim=1, keepdim=True)
    return directions, spread * torch.rand(count, generator=stream(seed, "lsh", "offsets"), **options)
