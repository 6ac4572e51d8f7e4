"""Channels in another order, so that an N:M pattern keeps more of the layers that read them; the function stays."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.names import unwrap
from secateur.core.patterns import NM
from secateur.core.prunable import coverage
from secateur.core.streams import stream
from secateur.linalg.alignment import Exchange, permute, tensors_of
from secateur.linalg.permutation import kept_sum, search
from secateur.surgery.symmetry import symmetries


@dataclass(frozen=True)
class Permuted:
    """A network whose channels have changed places.

    Args:
        model: the network; it computes what the given one does.
        orders: by group of units, the unit that has come to each place.
        kept: by tensor that can take the pattern, the share of its magnitude that the pattern keeps, before and after.
            It stays where the inputs cannot change places: those of the network itself, and inputs that are parts of
            units, such as positions of a flattened image.
    """

    model: nn.Module
    orders: dict[str, Tensor]
    kept: dict[str, tuple[float, float]]


def permute_for(
    model: nn.Module,
    example: Any,
    pattern: NM | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    seed: int = 0,
    escapes: int = 100,
) -> Permuted:
    """Put hidden units in an order in which an N:M pattern keeps most of the magnitude, before it is pruned.

    Each group of units (channels of a residual stream too) is ordered for all layers together that read it, and the
    layers that make it, their biases and normalisations follow.

    Args:
        model: the network; it stays as it is.
        example: one batch as it takes it, of two examples or more.
        pattern: ``n`` of ``m``; 2:4 by default.
        only: globs of tensors that will be pruned; all others are left alone.
        skip: globs of tensors that will not be.
        seed: for the escapes of the search.
        escapes: see :func:`secateur.linalg.permutation.search`.

    Raises:
        UsageError: when a glob matches nothing.
        ModelError: when the network cannot be traced, or nothing in it can be pruned.

    Cost: as :func:`secateur.surgery.symmetry.symmetries`, and a search for each group.
    """
    pattern, twin = pattern or NM(), copy.deepcopy(unwrap(model))
    prunable = coverage(twin, only, skip).prunable
    fit = {name: w.detach().abs() for name, w in prunable.items() if not pattern.why_not(tuple(w.shape))}
    groups = symmetries(twin, example)
    orders: dict[str, Tensor] = {}
    for group in groups:
        read = _read(group, fit)
        if read:
            rows = torch.cat([score.movedim(1, -1).reshape(-1, len(group)).double() for score in read])
            orders[group.name] = search(rows, pattern, stream(seed, "permute", group.name), escapes).cpu()
    moved = permute(tensors_of(twin), groups, orders)
    with torch.no_grad():
        for name, tensor in tensors_of(twin).items():
            tensor.copy_(moved[name])
    own = dict(twin.named_parameters())
    shares = {name: (_share(score, pattern), _share(own[name].detach().abs(), pattern)) for name, score in fit.items()}
    return Permuted(twin, orders, shares)


def _read(group: Exchange, fit: dict[str, Tensor]) -> list[Tensor]:
    """The tensors whose inputs are the units of a group, one by one and in their order."""
    plain = torch.arange(len(group))[:, None]
    places = [place for place in group.places if place.dim == 1 and torch.equal(place.index.cpu(), plain)]
    return [fit[p.tensor] for p in places if p.tensor in fit and fit[p.tensor].shape[1] == len(group)]


def _share(score: Tensor, pattern: NM) -> float:
    total = float(score.double().sum())
    return kept_sum(score, pattern) / total if total else 1.0
