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
        places: folders of the steps up to ``step.to``.
        dense: as in :func:`secateur.engine.start.begin`.

    Raises:
        UsageError: as :func:`fresh` and :func:`set_back`.
        FileError: when files of the earlier step are missing or damaged.
    """
    if step.weights == "fresh":
        source, found = "a fresh network", fresh(state.model, recipe.seed)
    elif not step.to:
        source, found = "the network at the beginning", begin(recipe, data, Listener(), dense).net
    else:
        source, found = f"the result of step {step.to}", Artefact.open(places[-1]).build()
    state.masks = set_back(state.net, found, state.masks, source, recipe.seed if step.masks == "shuffled" else None)
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
    before = streams.global_state()
    try:
        streams.seed_global(seed, "rewind", "fresh")
        return build(use, tuple(model["input_shape"]), model["outputs"], **model["options"])
    finally:
        streams.set_global_state(before)


@torch.no_grad()
def set_back(net: nn.Module, to: nn.Module, masks: Masks, source: str, shuffle: int | None = None) -> Masks:
    """Give a network the parameters and buffers of another one, in place, and zeros where masks prune.

    Args:
        net: the network; on its device.
        to: where its state is taken from; a network of the same shapes, on any device.
        masks: which weights are kept.
        source: what ``to`` is, for messages.
        shuffle: seed for other places with the same count in each tensor; None keeps the masks.

    Returns:
        The masks that hold now.

    Raises:
        UsageError: when shapes differ, as after units were removed.
    """
    own, other = unwrap(net), unwrap(to)
    state = {name: t for name, t in other.state_dict().items() if isinstance(t, Tensor)}
    for name, tensor in own.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        if name not in state or state[name].shape != tensor.shape:
            was = tuple(state[name].shape) if name in state else "not there"
            raise UsageError(
                f"rewind: `{name}` is {tuple(tensor.shape)} now and {was} in {source}: units were removed in between. "
                "Rewind to a step after that one."
            )
    own.load_state_dict(other.state_dict())
    left = masks if shuffle is None else shuffled(masks, shuffle)
    left.apply_(net)
    return left
