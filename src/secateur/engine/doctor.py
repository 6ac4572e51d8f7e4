"""Doctor, version 0: what is wrong with this machine, or with a file of weights."""

from __future__ import annotations

import importlib.util
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur import _native
from secateur.core.errors import FileError, SecateurError
from secateur.core.files import read_tensors
from secateur.core.masks import Masks
from secateur.data import load as load_data
from secateur.engine.folder import MASKS, WEIGHTS, Artefact, origin, resolve


def environment(data_dir: str | None = None) -> dict[str, Any]:
    """Versions, machine, extras that are installed and data sets that are found."""
    facts: dict[str, Any] = dict(origin())
    core = _native.library()
    facts["compiled core"] = (
        core.sec_isas().decode() if core else f"none: {_native.why_not()}; plans run on NumPy, slowly"
    )
    for extra in ("sklearn", "pyarrow", "PIL", "datasets", "onnxruntime", "tensorboard", "mlflow", "trackio"):
        facts[extra] = "installed" if importlib.util.find_spec(extra) else "not installed"
    facts["data folder"] = data_dir or os.environ.get("SECATEUR_DATA") or "none ($SECATEUR_DATA is not set)"
    for name in ("digits", "mnist", "cifar10", "monks1", "nettalk", "tinyshakespeare"):
        try:
            data = load_data(name, data_dir)
            facts[f"data {name}"] = f"{len(data.train):,} for training, {len(data.test):,} for tests"
        except SecateurError as error:
            facts[f"data {name}"] = f"not found: {str(error).splitlines()[0][:100]}"
    return facts


def examine(path: Path) -> dict[str, Any]:
    """Zeros of every tensor of a file, and findings with the command that mends each.

    Reads safetensors, run folders, and state dicts saved by ``torch.save`` (with ``weights_only=True``:
    no code in them is run).

    Raises:
        FileError: when the file is missing, damaged or of another kind.
    """
    masks: Masks | None = None
    if path.is_dir():
        folder = resolve(path)
        artefact = Artefact.open(folder)
        state, masks = artefact.state(), artefact.masks()
        path = folder / WEIGHTS
    else:
        state = _state(path)
        beside = path.parent / MASKS
        masks = Masks.load(beside) if path.name == WEIGHTS and beside.is_file() else None
    rows = [_row(name, tensor) for name, tensor in state.items()]
    findings = [finding for row in rows for finding in _findings(row)]
    findings += _leftovers(state) + _leaks(state, masks)
    return {"file": str(path), "tensors": rows, "findings": findings, "masked": masks is not None}


def _state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors" or not path.exists():
        return read_tensors(path)[0]
    if not zipfile.is_zipfile(path):
        raise FileError(f"{path} is neither safetensors nor a file of `torch.save`; save the state dict again.")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise FileError(
            f"{path} could not be read without running code from it ({str(error).splitlines()[0]}). "
            "Save the state dict alone: `torch.save(model.state_dict(), path)`."
        ) from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not any(isinstance(v, Tensor) for v in loaded.values()):
        raise FileError(f"{path} holds no state dict; save `model.state_dict()`.")
    return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}


def _row(name: str, tensor: Tensor) -> dict[str, Any]:
    real = tensor.is_floating_point()
    zeros = int((tensor == 0).sum())
    tiny = torch.finfo(tensor.dtype).tiny if real else 0
    return {
        "name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype), "numel": tensor.numel(), "zeros": zeros,
        "share": zeros / max(1, tensor.numel()),
        "not_finite": int((~tensor.isfinite()).sum()) if real else 0,
        "subnormal": int(((tensor != 0) & (tensor.abs() < tiny)).sum()) if real else 0,
    }  # fmt: skip


def _findings(row: dict[str, Any]) -> list[dict[str, str]]:
    found = []
    if row["not_finite"]:
        found.append({
            "what": f"`{row['name']}`: {row['not_finite']:,} of {row['numel']:,} values are NaN or infinite",
            "cure": "take an earlier checkpoint, or train again with a lower rate (`--lr`) or `-s clip=1.0`",
        })  # fmt: skip
    if row["subnormal"]:
        found.append({
            "what": f"`{row['name']}`: {row['subnormal']:,} values are subnormal, which makes many processors slow",
            "cure": "set them to zero: `tensor[tensor.abs() < torch.finfo(tensor.dtype).tiny] = 0`",
        })  # fmt: skip
    return found


def _leftovers(state: dict[str, Tensor]) -> list[dict[str, str]]:
    """``torch.nn.utils.prune`` keeps ``weight_orig`` and ``weight_mask`` until ``prune.remove`` is called."""
    found = []
    for name in state:
        if name.endswith("_orig") and f"{name.removesuffix('_orig')}_mask" in state:
            plain = name.removesuffix("_orig")
            found.append({
                "what": f"`{name}` and `{plain}_mask` are leftovers of torch.nn.utils.prune: the weights hold no zeros",
                "cure": f"call `prune.remove(module, {plain.rpartition('.')[2]!r})` before saving",
            })  # fmt: skip
    return found


def _leaks(state: dict[str, Tensor], masks: Masks | None) -> list[dict[str, str]]:
    found = []
    for name, mask in (masks or {}).items():
        if name not in state or state[name].shape != mask.shape:
            found.append({"what": f"the masks name `{name}` {list(mask.shape)}, which the weights do not hold",
                          "cure": "the two files belong to different networks; restore the pair"})  # fmt: skip
            continue
        alive = int((state[name].ne(0) & ~mask).sum())
        if alive:
            found.append({"what": f"{alive:,} of {int((~mask).sum()):,} pruned weights of `{name}` are not zero",
                          "cure": "call `secateur.Masks.load(path).apply_(model)` and save again"})  # fmt: skip
    return found
