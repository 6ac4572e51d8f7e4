"""COLT: tickets from the masks that networks trained on disjoint groups of classes have in common.

Hossain, Rakib, Elahi, Mohammed & Rahman, COLT: Cyclic Overlapping Lottery Tickets, arXiv:2212.12770. Classes are split
into groups; in each round one network a group is trained from the same beginning under the same masks, each prunes its
smallest weights, and only what all of them keep goes into the next round. The ticket is the beginning under the masks
of the last round, with a new head (:func:`headed`), trained on all classes or on other data.

Here the last group takes the classes that are left over (the authors' code drops them), heads are named instead of
found by their width, and a tensor of which too little is left is an error. Because every round begins at the state
before the first step, biases and the statistics of BatchNorm are set back too. The paper's figures are unverified.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import reduce
from operator import and_
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from secateur.core import streams
from secateur.core.errors import BudgetError, DataError, ModelError, UsageError, nearest
from secateur.core.masks import Masks
from secateur.core.names import unwrap
from secateur.data.dataset import Split
from secateur.engine.studies.rewind import Way, fewer, train_from, train_to


@dataclass(frozen=True)
class Cycle:
    """A finished round of :func:`cyclic`.

    Args:
        number: from 1.
        nets: the trained network of each group, in evaluation mode.
        under: the masks that they were trained under.
        own: what each group's network would keep.
        masks: what all of them keep: the masks of the next round.
        folder: where the round lies.
    """

    number: int
    nets: tuple[nn.Module, ...]
    under: Masks
    own: tuple[Masks, ...]
    masks: Masks
    folder: Path


def groups(classes: int, parts: int = 2) -> list[range]:
    """Classes in groups of equal size, in their order; the last group takes the rest too.

    >>> groups(10, 3)
    [range(0, 3), range(3, 6), range(6, 10)]

    Raises:
        UsageError: for fewer than one group, or more groups than classes.
    """
    if not 1 <= parts <= classes:
        raise UsageError(f"{parts} groups of {classes} classes; ask for 1 to {classes} groups.")
    each = classes // parts
    return [range(i * each, (i + 1) * each if i + 1 < parts else classes) for i in range(parts)]


def examples_of(split: Split, classes: range) -> Split:
    """The examples of a group of classes, with labels that count from 0 within the group.

    Raises:
        DataError: when there is none, or targets are no class numbers ``(N,)``.
    """
    if split.y.dim() != 1:
        raise DataError(f"targets have shape {tuple(split.y.shape)}; classes are split by labels of shape (N,).")
    index = ((split.y >= classes.start) & (split.y < classes.stop)).nonzero()[:, 0]
    if not len(index):
        raise DataError(
            f"no example has one of the labels {classes.start} to {classes.stop - 1}; use fewer groups, or data with "
            "all classes."
        )
    part = split.take(index)
    return Split(part.x, part.y - classes.start)


def headed(model: nn.Module, head: str, outputs: int, seed: int) -> nn.Module:
    """A copy of a network with a new linear head; all else is the same to the bit.

    Args:
        model: the network; it stays as it is.
        head: name of the linear layer.
        outputs: logits of the new one.
        seed: its weights and biases are uniform in ``±1/sqrt(inputs)``, as torch begins linear layers.

    Raises:
        UsageError: when there is no linear layer of that name, or for fewer than one output.
    """
    net = copy.deepcopy(unwrap(model))
    linear = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Linear)}
    if head not in linear:
        raise UsageError(f"{head!r} is no linear layer of this network. {nearest(head, linear)}")
    if outputs < 1:
        raise UsageError(f"a head with {outputs} outputs; give it at least 1.")
    old = linear[head]
    place, kind = old.weight.device, old.weight.dtype
    new = skip_init(nn.Linear, old.in_features, outputs, bias=old.bias is not None, device=place, dtype=kind)
    limit, random = old.in_features**-0.5, streams.stream(seed, "head", head)
    with torch.no_grad():
        for p in new.parameters():
            p.copy_((2 * torch.rand(p.shape, generator=random) - 1) * limit)
    parent, _, name = head.rpartition(".")
    setattr(net.get_submodule(parent), name, new)
    return net


def bounds(share: float, parts: int, rounds: int) -> tuple[float, float]:
    """Least and largest density after some rounds: ``(1 - parts share)^rounds`` and ``(1 - share)^rounds``.

    Counts are whole numbers, so either may be missed by the rounding of ``share`` in each round.

    Raises:
        UsageError: for a share out of range, or one that may leave nothing (``parts * share >= 1``).
    """
    _check_share(share, parts)
    return (1 - parts * share) ** rounds, (1 - share) ** rounds


def intersection(masks: Sequence[Masks], least: int = 1) -> Masks:
    """What all masks keep.

    Args:
        masks: of one network.
        least: weights that must be left of every tensor; 0 lets tensors go whole.

    Raises:
        BudgetError: when less is left of a tensor.
        MaskError: when the masks belong to different networks.
        UsageError: when there are none.
    """
    if not masks:
        raise UsageError("no masks to intersect; give at least one.")
    found = reduce(and_, masks)
    for name, count in found.counts().items():
        if count < least:
            raise BudgetError(
                f"{count} weights of `{name}` are kept by all {len(masks)} groups, fewer than {least}; prune a smaller "
                "share, fewer rounds, or leave the tensor out of the masks."
            )
    return found


def cyclic(
    models: Sequence[nn.Module],
    ways: Sequence[Way],
    folder: Path,
    *,
    head: str,
    rounds: int,
    share: float = 0.15,
    kinds: Mapping[str, float] | None = None,
    masks: Masks | None = None,
    least: int = 1,
) -> Iterator[Cycle]:
    """Train a network a group, prune each, keep what all keep, set back to the beginning, again.

    Args:
        models: one network a group at the same initial weights, all but their heads; they stay as they are.
        ways: how the network of each group is trained, on the examples of its group.
        folder: holds ``start-I``, the beginning of group I, and ``round-R/group-I``. Trainings that are finished there
            are read, not done again.
        head: name of the layer that each group has for itself; it is never pruned.
        rounds: how many; stop asking for more when the masks of one are sparse enough.
        share: of what is left that each network prunes in a round, by magnitude over all tensors together.
        kinds: globs of tensors that are ranked together, and the share of each kind; what no glob matches is not
            pruned. The authors' code: 0.15 of all convolutions, nothing else.
        masks: what may be pruned; all but the head by default.
        least: see :func:`intersection`.

    Yields:
        Every round once all groups are trained and the masks intersected.

    Raises:
        UsageError: when the numbers of networks and ways differ, the head can be pruned, ``share`` may leave nothing,
            or a glob matches nothing or what another one matches.
        ModelError: when networks differ in more than the head.
        SecateurError: as :func:`secateur.engine.studies.rewind.train_from` and :func:`intersection`.

    Cost: ``rounds`` trainings of each group: about one training on all classes a round.
    """
    _check_groups(models, ways, head)
    masks = masks or Masks.dense(models[0], skip=[f"{head}.*"])
    owned = [name for name in masks if name.startswith(f"{head}.")]
    if owned:
        raise UsageError(f"the masks cover `{owned[0]}`, but each group has its own `{head}`; leave it out of them.")
    parts = _kinds(masks, share, kinds, len(models))
    for i, (model, way) in enumerate(zip(models, ways, strict=True)):
        train_to(copy.deepcopy(model), way, folder / f"start-{i}", 0, masks)
    for number in range(1, rounds + 1):
        place = folder / f"round-{number}"
        nets = tuple(
            train_from(folder / f"start-{i}", model, way, place / f"group-{i}", masks)
            for i, (model, way) in enumerate(zip(models, ways, strict=True))
        )
        own = tuple(_fewer(net, masks, parts) for net in nets)
        left = intersection(own, least)
        yield Cycle(number, nets, masks, own, left, place)
        masks = left


def _fewer(net: nn.Module, masks: Masks, parts: Mapping[tuple[str, ...], float]) -> Masks:
    """Masks without the smallest weights of each kind."""
    kept = dict(masks)
    for names, share in parts.items():
        kept |= dict(fewer(net, Masks({name: masks[name] for name in names}), share, "global"))
    return Masks(kept)


def _kinds(
    masks: Masks, share: float, kinds: Mapping[str, float] | None, parts: int
) -> dict[tuple[str, ...], float]:  # fmt: skip
    """Names that are ranked together, and their share."""
    found: dict[tuple[str, ...], float] = {}
    for glob, value in (kinds or {"*": share}).items():
        _check_share(value, parts)
        names = tuple(name for name in masks if fnmatchcase(name, glob))
        twice = [name for name in names if any(name in other for other in found)]
        if not names:
            raise UsageError(f"no tensor matches {glob!r}. {nearest(glob, masks)}")
        if twice:
            raise UsageError(f"`{twice[0]}` matches {glob!r} and another kind; let it match one.")
        found[names] = value
    return found


def _check_share(share: float, parts: int) -> None:
    if not 0 <= share < 1:
        raise UsageError(f"share={share!r} must be at least 0 and below 1; write `share = 0.15`.")
    if parts * share >= 1:
        raise UsageError(
            f"{parts} groups that each prune {share:g} of what is left may leave nothing; take a share below 1/{parts}."
        )


def _check_groups(models: Sequence[nn.Module], ways: Sequence[Way], head: str) -> None:
    """One way a network, and the same beginning of everything but the heads."""
    if not models or len(models) != len(ways):
        raise UsageError(f"{len(models)} networks and {len(ways)} ways to train them; give one of each a group.")
    first, *others = (_body(model, head) for model in models)
    for number, other in enumerate(others, 2):
        odd = sorted(set(first) ^ set(other))
        odd += [
            n for n, t in first.items() if n in other and not (t.shape == other[n].shape and torch.equal(t, other[n]))
        ]
        if odd:
            raise ModelError(
                f"network {number} differs from the first in `{odd[0]}`; all groups begin at the same weights, only "
                f"`{head}` may differ. Make them with `headed` from one network."
            )


def _body(model: nn.Module, head: str) -> dict[str, Tensor]:
    state = {name: t for name, t in unwrap(model).state_dict().items() if isinstance(t, Tensor)}
    body = {name: t for name, t in state.items() if not name.startswith(f"{head}.")}
    if len(body) == len(state):
        raise UsageError(f"the network has no layer {head!r}. {nearest(head, {n.rpartition('.')[0] for n in state})}")
    return body
