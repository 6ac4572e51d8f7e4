"""Export steps of recipes: the network as files for other programs, each read back and compared before it counts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.core.errors import FileError, ModelError, UsageError
from secateur.core.files import file_digest, write_json, write_tensors, writing
from secateur.core.masks import Masks
from secateur.core.task import call, frozen
from secateur.core.task import examples as count
from secateur.data import Dataset, Loader
from secateur.engine.compiling import PLAN
from secateur.engine.exporting import LIMIT, export
from secateur.engine.exporting_files import FORMATS, flat, require
from secateur.engine.folder import CARD, WEIGHTS, Artefact, origin
from secateur.engine.recipe import ExportStep
from secateur.engine.start import State
from secateur.runtime.compiled import compile_network
from secateur.runtime.session import Session

__all__ = ["beside", "check_packages", "examples", "export_all", "normalisation"]

NAMES = {"plan": PLAN, "safetensors": "network.safetensors", **{f: f"network{end}" for f, end in FORMATS.items()}}
"""What the file of each format is called."""


def export_all(step: ExportStep, folder: Path, state: State, data: Dataset, about: Mapping[str, Any]) -> None:
    """Carry out an export step: all its files, and a card that tells of each its bytes and how far it is from torch.

    Args:
        step: what to write.
        folder: the step's folder.
        state: what the steps before handed on.
        data: its first test examples are what files are compared on.
        about: facts for the card.

    Raises:
        UsageError: when there is no network yet, a package is missing, or the batch is larger than the test data.
        ModelError: when a format cannot hold the network, or a file gives something else than the network.
        FileError: when files cannot be written.

    Cost: for each format a trace, some forward passes and about a second of timing.
    """
    artefact = state.artefact
    if artefact is None:
        raise UsageError("there is nothing to export yet; put a train or prune step before, or load a run folder.")
    check_packages((step,))
    began = time.perf_counter()
    inputs = examples(data, step.batch)
    net, masks = artefact.build(), artefact.masks()
    rows, files = [], {}
    for kind in step.formats:
        path = folder / NAMES[kind]
        if kind == "plan":
            row = _plan(net, masks, data, step.batch, path)
        elif kind == "safetensors":
            row = _weights(artefact, path)
        else:
            row = _traced(artefact, net, masks, inputs, kind, step, path, {"normalised": normalisation(data)})
            proof = f"{path.name}.json"
            files[proof] = file_digest(folder / proof)
        files[path.name] = file_digest(path)
        rows.append({"format": kind, "file": path.name, "bytes": path.stat().st_size, **row})
    card = {
        "format": "secateur.card/1",
        **about,
        "data": data.name,
        "network": {"folder": str(artefact.folder), "digest": artefact.digest},
        "seconds": round(time.perf_counter() - began, 3),
        "exports": rows,
        "files": files,
        "made_by": origin(),
    }
    write_json(folder / CARD, card)


def check_packages(steps: tuple[Any, ...]) -> None:
    """Refuse before anything is trained what could not be exported after it.

    Raises:
        UsageError: naming the package that is missing.
    """
    for step in steps:
        if isinstance(step, ExportStep):
            for kind in step.formats:
                if kind in FORMATS:
                    require(kind)


def examples(data: Dataset, batch: int) -> Any:
    """The first test examples, as the network is given them.

    Raises:
        UsageError: when there are fewer.
    """
    inputs = next(iter(Loader(data.test, batch, mean=data.mean, std=data.std)))[0]
    if (there := count(inputs)) < batch:
        raise UsageError(f"the batch to export is {batch} and {data.name} has {there} test examples; ask for fewer.")
    return inputs


def normalisation(data: Dataset) -> dict[str, Any] | None:
    """How inputs are normalised before the network sees them."""
    if data.mean is None:
        return None
    told = {"mean": data.mean, "std": data.std}
    return {
        name: None if given is None else torch.as_tensor(given, dtype=torch.float64).flatten().tolist()
        for name, given in told.items()
    }


def beside(artefact: Artefact) -> dict[str, int]:
    """Bytes of the weights in a folder and, where they are known, of the dense network it came from."""
    sizes = {"weights": (artefact.folder / WEIGHTS).stat().st_size}
    named = artefact.card.get("dense")
    if named:
        for place in (Path(named["folder"]), artefact.folder.parent / Path(named["folder"]).name):
            if (place / WEIGHTS).is_file():
                return {**sizes, "dense weights": (place / WEIGHTS).stat().st_size}
    return sizes


def _traced(
    artefact: Artefact, net: nn.Module, masks: Masks, inputs: Any, kind: str, step: ExportStep, path: Path,
    about: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    opset = (step.opset or None) if kind == "onnx" else None
    made = export(net, inputs, path, kind, opset=opset, masks=masks, beside=beside(artefact), about=about)
    parity = {str(size): error for size, error in made.parity.items()}
    return {"batch": made.batch, "parity": parity, "notes": list(made.notes), "latency": made.latency}


def _weights(artefact: Artefact, path: Path) -> dict[str, Any]:
    """The same bytes as the network's own file, under a name that no folder of a network has."""
    if write_tensors(path, artefact.state(), {"format": "pt"}) != artefact.card["files"][WEIGHTS]:
        raise FileError(f"{path} is not what {artefact.folder / WEIGHTS} holds. Make that folder again.")
    return {"parity": {}}


def _plan(net: nn.Module, masks: Masks, data: Dataset, batch: int, path: Path) -> dict[str, Any]:
    """The compiled network, opened from its file and run on two batches beside torch."""
    masks.check(net)
    with writing(path) as temporary:
        made = compile_network(net, examples(data, batch))
        made.save(temporary)
        with Session(temporary) as session, frozen(net), torch.no_grad():
            free = all(tuple(spec.shape)[:1] == (0,) for spec in session.graph.inputs)
            sizes = [batch, *([batch + 2] if free and batch + 2 <= len(data.test) else [])]
            parity = {str(size): _apart(net, session, examples(data, size)) for size in sizes}
    return {"batch": None if free else batch, "parity": parity, "notes": list(made.notes)}


def _apart(net: nn.Module, session: Session, inputs: Any) -> float:
    """Largest difference of the plan from the network, relative to the largest number of an output."""
    expected = [x.double().numpy() for x in flat(call(net, inputs))]
    found = session(*(x.numpy() for x in flat(inputs)))
    found = list(found) if isinstance(found, tuple) else [found]
    worst = max(float(np.abs(one - two).max()) / (float(np.abs(two).max()) or 1.0)
                for one, two in zip(found, expected, strict=True))  # fmt: skip
    if not worst <= LIMIT:
        raise ModelError(
            f"the compiled network is {worst:.2g} from the network (relative to the largest number of an output; "
            f'allowed is {LIMIT:g}). Nothing was written; leave "plan" out of the formats.'
        )
    return worst
