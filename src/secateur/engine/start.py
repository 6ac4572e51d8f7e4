"""How a run begins: its network, and what one step hands to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from secateur.core import streams
from secateur.core.errors import FileError, ModelError, UsageError
from secateur.core.files import read_tensors
from secateur.core.masks import Masks
from secateur.core.prunable import check_finite, coverage
from secateur.data import Dataset
from secateur.engine import distributed
from secateur.engine.folder import CARD, STRUCTURE, WEIGHTS, Artefact, load_state
from secateur.engine.rebuilding import resize
from secateur.engine.recipe import Recipe
from secateur.engine.trial import check_fits, check_shaped
from secateur.nets import build


class Listener:
    """Hears what a run does; progress bars and trackers derive from it."""

    def begin(self, number: int, step: Any, folder: Path, steps: int) -> None:
        """A step begins (or goes on); ``steps`` optimizer steps are in it."""

    def figures(self, figures: Mapping[str, int | float]) -> None:
        """Figures of one optimizer step or one epoch."""

    def end(self, number: int, step: Any, card: Mapping[str, Any], skipped: bool) -> None:
        """A step is finished; ``skipped`` when it had been before."""

    def say(self, text: str) -> None:
        """Something the user should know."""


@dataclass
class State:
    """What one step hands to the next: the network, its masks, and where they lie on disk.

    ``shrunk`` holds figures of the dense network and of this one, by name, where units were removed.
    """

    net: nn.Module
    masks: Masks
    model: dict[str, Any]
    left_alone: dict[str, str]
    artefact: Artefact | None = None
    dense: Artefact | None = None
    shrunk: dict[str, Any] | None = None


def begin(recipe: Recipe, data: Dataset, listener: Listener, dense: str = "") -> State:
    """The network a recipe begins with: built fresh, or loaded from a run folder or a file of weights.

    Args:
        recipe: says which.
        data: its shapes complete the network's options.
        listener: hears what was taken for granted.
        dense: folder of the dense network, when the recipe does not contain it.

    Raises:
        UsageError: when no network is named, or it was made for other data.
        FileError: when a file is missing, damaged or of another network.
        ModelError: when weights are not finite, or one batch of the data does not go through the network.
    """
    load = Path(recipe.model.load) if recipe.model.load else None
    if load is not None and not load.is_file():
        state = _from_folder(recipe, data, Artefact.open(load), dense)
    else:
        state = _fresh(recipe, data, load, listener)
    check_shaped(state.net)
    check_finite({name: p for name, p in state.net.named_parameters()})
    where = distributed.device()
    state.net.to(where)
    state.masks = state.masks.to(where)
    check_fits(recipe, data, state.net)
    return state


def _from_folder(recipe: Recipe, data: Dataset, artefact: Artefact, dense: str) -> State:
    model, net = dict(artefact.structure["model"]), None
    if recipe.model.use:
        model = _about(recipe, data)
        net = build(model["use"], tuple(data.input_shape), data.outputs, **model["options"])
        resize(net, artefact.structure, artefact.buffers(), str(artefact.folder / STRUCTURE))
        load_state(net, artefact.state(), str(artefact.folder / WEIGHTS))
    else:
        _check_same_data(model, data, artefact.folder)
    left = dict(artefact.structure.get("left_alone", {}))
    shrunk = artefact.card.get("shrunk")
    return State(net or artefact.build(), artefact.masks(), model, left, artefact, _dense_of(artefact, dense), shrunk)


def _fresh(recipe: Recipe, data: Dataset, load: Path | None, listener: Listener) -> State:
    if not recipe.model.use:
        raise UsageError("no network is named; pass `--net NAME` (such as resnet20), `module:function` or a folder.")
    streams.seed_global(recipe.seed, "init")
    model = _about(recipe, data)
    net = build(model["use"], tuple(data.input_shape), data.outputs, **model["options"])
    return State(net, _from_file(net, load, listener), model, coverage(net).left_alone)


def _about(recipe: Recipe, data: Dataset) -> dict[str, Any]:
    """How to build the network again, for ``structure.json``."""
    spec = recipe.model
    return {
        "use": spec.use,
        "options": spec.options,
        "input_shape": list(data.input_shape),
        "outputs": data.outputs,
    }


def _from_file(net: nn.Module, load: Path | None, listener: Listener) -> Masks:
    if load is None:
        return Masks.dense(net)
    if load.suffix != ".safetensors":
        raise FileError(f"{load} is not a .safetensors file or a run folder; save the weights with safetensors first.")
    load_state(net, read_tensors(load)[0], str(load))
    masks = Masks.from_zeros(net)
    if masks.kept < masks.total:
        listener.say(f"{load} holds {masks.total - masks.kept:,} zero weights; they are taken as pruned and stay zero.")
    return masks


def zeros_of(net: nn.Module) -> Masks | None:
    """The masks that the zeros of a network stand for when it plainly has been pruned; None for any other network.

    Some zeros have other reasons: a tensor of nothing else starts so (often the last one of a block), and a few come
    by chance (in bfloat16 up to one in 256). So whole tensors count as kept, and one weight in a hundred must be zero.
    """
    try:
        found = Masks.from_zeros(net)
    except ModelError:  # nothing in it is pruned unless it is named
        return None
    masks = Masks({name: mask if bool(mask.any()) else ~mask for name, mask in found.items()})
    return masks if masks.sparsity >= 0.01 else None


def _check_same_data(model: Mapping[str, Any], data: Dataset, folder: Path) -> None:
    shape, outputs = model.get("input_shape"), model.get("outputs")
    if (shape and list(shape) != list(data.input_shape)) or (outputs and outputs != data.outputs):
        raise UsageError(
            f"the network in {folder} was made for inputs {tuple(shape or ())} and {outputs} outputs; the data set "
            f"{data.name} has inputs {tuple(data.input_shape)} and {data.outputs} outputs. "
            "Pass the data it was made for."
        )


def _dense_of(artefact: Artefact, dense: str) -> Artefact | None:
    """The dense network an artefact came from: itself, the one its card names, or what the user passes."""
    if dense:
        return Artefact.open(dense)
    if artefact.card["kept"] == artefact.card["total"] and not artefact.card.get("shrunk"):
        return artefact
    named = artefact.card.get("dense")
    if not named:
        return None
    for place in (Path(named["folder"]), artefact.folder.parent / Path(named["folder"]).name):
        if (place / CARD).is_file():
            found = Artefact.open(place)
            if found.digest == named["digest"]:
                return found
    return None
