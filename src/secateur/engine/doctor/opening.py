"""From a path to what the doctor looks at: a run folder, or a file of any format that is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core import streams
from secateur.core.errors import FileError, UsageError
from secateur.core.files import read_tensors
from secateur.core.masks import Masks
from secateur.data import Dataset
from secateur.data import load as load_data
from secateur.engine.doctor.leftovers import beside as masks_beside
from secateur.engine.doctor.names import plain_names
from secateur.engine.doctor.norms import network
from secateur.engine.doctor.subject import Subject, real
from secateur.engine.folder import CARD, MASKS, STRUCTURE, WEIGHTS, Artefact, resolve
from secateur.engine.foreign import Foreign
from secateur.engine.foreign import read as read_foreign
from secateur.engine.foreign.guard import contained, told
from secateur.engine.rebuilding import resize
from secateur.engine.recipe import Recipe
from secateur.nets import build, names

_STARTS = ("ema.", "model_ema.", "ema_model.")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Beside:
    """What is given beside the file.

    Args:
        net: name of the network, ``module:function`` or a ``.pt2`` file.
        data: name of a data set.
        masks: a file of masks.
        ema: a file or folder with an averaged copy of the weights.
        dense: a file or folder with the dense network that it came from.
        data_dir: where data sets lie.
        options: tables ``model`` and ``data`` with options, as in a recipe.
    """

    net: str | None = None
    data: str | None = None
    masks: Path | None = None
    ema: Path | None = None
    dense: Path | None = None
    data_dir: str | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where a subject came from, so that a copy of the same kind can be written."""

    artefact: Artefact | None = None
    foreign: Foreign | None = None


def open_subject(path: Path, beside: Beside) -> tuple[Subject, Source]:
    """Read a file or folder, and what is given beside it.

    Raises:
        SecateurError: when something is missing, damaged or does not fit.
    """
    subject, source = _ours(path) if _is_ours(path) else _foreign(path)
    if beside.masks is not None:
        with contained(beside.masks):
            masks = _fitted(read_masks(beside.masks), subject.tensors)
        subject = replace(subject, masks=masks, masked=True)
    if beside.ema is not None:
        averages = {**subject.averages, str(beside.ema): _tensors(beside.ema)}
        subject = replace(subject, averages=averages, outside=subject.outside | {str(beside.ema)})
    if beside.dense is not None:
        dense = _tensors(beside.dense)
        new = plain_names(dense)
        subject = replace(subject, dense={new.get(name, name): tensor for name, tensor in dense.items()})
    recipe = _recipe(beside)
    if beside.data is not None:
        subject = replace(subject, data=_data(recipe, beside))
    subject = replace(subject, net=_network(recipe, subject, source.artefact))
    if subject.net is not None:
        network(subject)  # refuses a network that is not that of the file
    return subject, source


def _is_ours(path: Path) -> bool:
    if not path.is_dir():
        return False
    foreign = (path / "config.json").is_file() or any(path.glob("*.index.json"))
    return (path / CARD).is_file() or not foreign


def _ours(path: Path) -> tuple[Subject, Source]:
    artefact = Artefact.open(resolve(path), bare=True)
    tied = artefact.structure.get("tied", {})
    subject = Subject(
        artefact.folder, "folder", artefact.state(), dict(artefact.masks()), True,
        tuple((first, *others) for first, others in tied.items()),
    )  # fmt: skip
    return subject, Source(artefact)


def _foreign(path: Path) -> tuple[Subject, Source]:
    found = read_foreign(path)
    beside = path.parent / MASKS
    masked = path.name == WEIGHTS and beside.is_file()
    masks = dict(Masks.load(beside)) if masked else {}
    within = _beside(found.tensors)
    masks, masked = {**within, **masks}, masked or bool(within)
    others: dict[str, Mapping[str, Tensor]] = dict(found.facts.get("others", {}))
    averages = {
        name: _by_name(others.pop(name), found.tensors) for name in list(others) if name in found.facts["averages"]
    }
    among = _within(found.tensors)
    used = {name: str(about.get("op", "")) for name, about in found.facts.get("used", {}).items()}
    optimizer = found.facts.get("optimizer")
    subject = Subject(
        path, found.kind, found.tensors, masks, masked, found.ties, {**averages, **among}, frozenset(among),
        optimizer=optimizer if isinstance(optimizer, Mapping) else None, stored=found.stored, others=others, used=used,
        unplaced=tuple(name for name, why in found.left.items() if "the state of an optimizer" in why),
    )  # fmt: skip
    return subject, Source(None, found)


def _beside(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks that lie beside their weights in the file itself, to be applied."""
    pairs = masks_beside(tensors).items()
    return {name: real(tensors[mask]) != 0 for name, mask in pairs if tensors[name].shape == tensors[mask].shape}


def _fitted(masks: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks by the names of the file; one whose name it does not have loses what a wrapper put there."""
    new = plain_names(masks)
    return {name if name in tensors else new.get(name, name): mask for name, mask in masks.items()}


def _within(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Averaged copies that lie among the weights themselves, told by how their names begin."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        for start in _STARTS:
            rest = name.removeprefix(start)
            place = next((place for place in (rest, f"model.{rest}") if rest != name and place in tensors), None)
            if place is not None:
                found.setdefault(start, {})[place] = tensor
    return found


def _by_name(average: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An average that is a mere list of tensors, under the names of the parameters in their order where these fit."""
    return {new: average[old] for old, new in names_of(average, tensors).items()}


def names_of(average: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The name that each tensor of an average has in the network, by the one it has in the file."""
    if not all(name.isdigit() for name in average):
        return {name: name for name in average}
    parameters = [n for n, t in tensors.items() if t.is_floating_point() and not n.endswith(_STATISTICS)]
    fits = len(parameters) == len(average) and all(
        tensors[name].shape == tensor.shape for name, tensor in zip(parameters, average.values(), strict=True)
    )
    return dict(zip(average, parameters, strict=True)) if fits else {name: name for name in average}


def read_masks(path: Path) -> dict[str, Tensor]:
    """Masks (True = kept) from a file of this library, a step's folder, or tensors of zeros and ones by name.

    Raises:
        FileError: when it is damaged, or holds no masks.
    """
    if path.is_dir():
        return dict(Artefact.open(resolve(path), bare=True).masks())
    if path.suffix == ".safetensors" and read_tensors(path)[1].get("format", "").startswith("secateur.masks"):
        return dict(Masks.load(path))
    found: dict[str, Tensor] = {}
    for name, tensor in read_foreign(path).tensors.items():
        values = real(tensor)
        if tensor.dtype == torch.bool or bool(((values == 0) | (values == 1)).all()):
            found[name.removesuffix("_mask")] = values != 0
    if not found:
        raise FileError(f"{path} holds no masks: no tensor of only zeros and ones. Give masks.safetensors of a run.")
    return found


def _tensors(path: Path) -> Mapping[str, Tensor]:
    with contained(path):
        return Artefact.open(resolve(path), bare=True).state() if _is_ours(path) else read_foreign(path).tensors


def _recipe(beside: Beside) -> Recipe:
    """The network and the data as a recipe names them, so that options mean the same everywhere."""
    model = {**beside.options.get("model", {}), **({"use": beside.net} if beside.net else {})}
    data = {**beside.options.get("data", {}), **({"use": beside.data} if beside.data else {})}
    return Recipe.from_table({"model": model, "data": data, "step": [{"do": "measure"}]})


def _data(recipe: Recipe, beside: Beside) -> Dataset:
    spec = recipe.data
    data = load_data(spec.use, beside.data_dir, **spec.options)
    return data.subset(spec.train, len(data.test), 0) if spec.train else data


def _network(recipe: Recipe, subject: Subject, artefact: Artefact | None) -> nn.Module | None:
    """The network that is named, or with data the one that a folder names; weights are those it is built with."""
    data, spec = subject.data, recipe.model
    shape, outputs = (tuple(data.input_shape), data.outputs) if data is not None else (None, None)
    with streams.seeded(0, "doctor"):
        if spec.use:
            net = build(spec.use, shape, outputs, **spec.options)
        elif artefact is not None and data is not None:
            about = _trusted(artefact)
            net = build(about["use"], shape, outputs, **about["options"]) if about else None
        else:
            return None
    if net is not None and artefact is not None and artefact.structure:
        resize(net, artefact.structure, artefact.buffers(), str(artefact.folder / STRUCTURE))
    return net


def _trusted(artefact: Artefact) -> Mapping[str, Any]:
    """How to build the network that a folder names, where it is one of ours; empty where it names none.

    Raises:
        UsageError: when it names code or a graph. Whoever made the folder chose that; running it is the user's to say.
    """
    about = artefact.structure.get("model", {})
    if about and about["use"] not in names():
        raise UsageError(
            f"{told(artefact.folder)} names {ascii(about['use'])[:80]} as its network, which is code that is not run "
            "unasked. If you trust it, name it yourself with `--net`; or leave `--data` out."
        )
    options = about.get("options", {})
    if not isinstance(options, Mapping):
        raise FileError(f"{told(artefact.folder / STRUCTURE)} is damaged: the options of the network are no table.")
    return {**about, "options": options} if about else {}
