"""A network's state set back under masks: to an earlier one, or to fresh weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core import streams
from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.names import unwrap
from secateur.data import Dataset
from secateur.engine.folder import REWRITTEN, Artefact
from secateur.engine.recipe import Recipe, RewindStep
from secateur.engine.start import Listener, State, begin
from secateur.engine.studies.rewind import shuffled
from secateur.nets import build


def rewind(
    step: RewindStep, state: State, recipe: Recipe, data: Dataset, places: Sequence[Path], dense: str = ""
) -> dict[str, Any]:
    """Carry out a rewind step in place; what is worth telling of it.

    Args:
        step: what to do.
        state: what the step before handed on.
        recipe: the whole recipe.
        data: its data.
        places: folders of the recipe's steps.
        dense: as in :func:`secateur.engine.start.begin`.

    Raises:
        UsageError: as :func:`fresh` and :func:`set_back`.
        FileError: when files of the earlier step are missing or damaged.
    """
    there: Masks | None = None
    if step.weights == "fresh":
        source, found = "a fresh network", fresh(state.model, recipe.seed)
    elif not step.to:
        first = begin(recipe, data, Listener(), dense)
        source, found, there = "the network at the beginning", first.net, first.masks
    else:
        artefact = Artefact.open(places[step.to - 1])
        source, found, there = f"the result of step {step.to}", artefact.build(), artefact.masks()
    shuffle = recipe.seed if step.masks == "shuffled" else None
    state.masks = set_back(state.net, found, state.masks, source, shuffle, there)
    return {"rewound": {"to": step.to, "weights": step.weights, "masks": step.masks}}


def fresh(model: Mapping[str, Any], seed: int) -> nn.Module:
    """The network with weights drawn anew, others than a recipe of this seed begins with.

    Args:
        model: how it was built, as ``structure.json`` tells.
        seed: of the recipe.

    Raises:
        UsageError: when it was not built by a function that draws weights.
    """
    use = str(model["use"])
    if use == REWRITTEN or use.endswith(".pt2") or not use:
        raise UsageError(
            f"rewind: the network {use or 'of a folder'!r} is a captured graph, which has no weights to draw anew; "
            'name a network that is built, or leave `weights = "fresh"` out.'
        )
    with streams.seeded(seed, "rewind", "fresh"):
        return build(use, tuple(model["input_shape"]), model["outputs"], **model["options"])


@torch.no_grad()
def set_back(
    net: nn.Module, to: nn.Module, masks: Masks, source: str, shuffle: int | None = None, there: Masks | None = None
) -> Masks:
    """Give a network the parameters and buffers of another one, in place, and zeros where masks prune.

    Args:
        net: the network; on its device.
        to: where its state is taken from; a network of the same shapes, on any device.
        masks: which weights are kept.
        source: what ``to`` is, for messages.
        shuffle: seed for other places with the same count in each tensor; None keeps the masks.
        there: masks of ``to``; None when it is dense.

    Returns:
        The masks that hold now.

    Raises:
        UsageError: when tensors or shapes differ, as after units were removed, or a weight that is to be kept is pruned
            in ``to``: it would be zero and count as kept.
    """
    own, other = unwrap(net), unwrap(to)
    state = {name: t for name, t in other.state_dict().items() if isinstance(t, Tensor)}
    mine = {name: t for name, t in own.state_dict().items() if isinstance(t, Tensor)}
    for name in dict.fromkeys((*mine, *state)):
        now, was = (tuple(t[name].shape) if name in t else "not there" for t in (mine, state))
        if now != was:
            raise UsageError(
                f"rewind: `{name}` is {now} now and {was} in {source}: units were removed in between. "
                "Rewind to a step after that one."
            )
    left = masks if shuffle is None else shuffled(masks, shuffle)
    for name, mask in left.items():
        lost = 0 if there is None or name not in there else int((mask.cpu() & ~there[name].cpu()).sum())
        if lost:
            raise UsageError(
                f"rewind: {lost} weights of `{name}` that are to be kept are pruned in {source}, where they have no "
                "value to go back to. Rewind to a step before they were pruned."
            )
    own.load_state_dict(other.state_dict())
    left.apply_(net)
    return left
