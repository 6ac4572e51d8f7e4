"""Checkpoints of compressed-tensors: zeros as bits, in safetensors beside a ``config.json``.

A weight ``a.weight`` lies as ``a.compressed`` (the values that are kept, row by row), ``a.bitmask`` (one bit an entry,
lowest bit first, each row filled up to whole bytes) and ``a.shape``. The format ``sparse-bitmask`` also has
``a.row_offsets``, how many values lie before each row; ``sparse-24-bitmask`` keeps two of every four entries, which may
be zero, and its values have the shape of half the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from secateur.core.errors import FileError
from secateur.engine.folder import clean
from secateur.engine.foreign import tensorfile, tensorfolder
from secateur.engine.foreign.guard import check_shape, count, refusal

if TYPE_CHECKING:
    from secateur.engine.foreign.record import Foreign

BITMASK, TWO_FOUR = "sparse-bitmask", "sparse-24-bitmask"
_STORED = {BITMASK: "bitmask", TWO_FOUR: "2:4 packed"}
_SECTIONS = ("quantization_config", "compression_config", "sparsity_config")


def settings(path: Path, config: Any) -> dict[str, Any]:
    """What a ``config.json`` says about sparsity; empty when it says nothing.

    Raises:
        FileError: when the weights are quantised, or packed in a way that is not read here.
    """
    if not isinstance(config, dict):
        raise refusal(path, "it is no table of settings")
    found: dict[str, Any] = {}
    for name in _SECTIONS:
        section: Any = config.get(name) or {}
        if not isinstance(section, dict):
            raise refusal(path, "its settings of compression are no table")
        if name != "sparsity_config":
            _refuse_quantised(path, section)
            section = section.get("sparsity_config") or {}
        if not isinstance(section, dict):
            raise refusal(path, "its settings of sparsity are no table")
        found |= section
    kind = found.get("format", "dense")
    if kind not in (BITMASK, TWO_FOUR, "dense"):
        raise refusal(path, f"its weights are packed as {ascii(kind)[:40]}, which is not read here",
                      f"Save the network dense, or as {BITMASK} or {TWO_FOUR}.")  # fmt: skip
    return found


def _refuse_quantised(path: Path, section: Mapping[str, Any]) -> None:
    method, kind = section.get("quant_method", "compressed-tensors"), section.get("format", "dense")
    groups = section.get("config_groups") or section.get("kv_cache_scheme")
    if method == "compressed-tensors" and kind in (None, "dense", BITMASK, TWO_FOUR) and not groups:
        return
    word = kind if method == "compressed-tensors" and kind not in (None, "dense") else method
    raise refusal(
        path, f"its weights are quantised ({ascii(word)[:40]}), and only plain numbers are read here",
        "Use the checkpoint from before quantisation.",
    )  # fmt: skip


def bases(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the weights, without ``.weight``, that lie as bits."""
    found = [name.removesuffix(".bitmask") for name in tensors if name.endswith(".bitmask")]
    return [base for base in found if f"{base}.compressed" in tensors and f"{base}.shape" in tensors]


def dense_name(base: str) -> str:
    """The name of a weight by that of its parts; older files wrote ``.weight`` into it."""
    return base if base.endswith(".weight") else f"{base}.weight"


def decode(
    path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors dense, and how each lay.

    Raises:
        FileError: when bits, values and shape do not agree, or parts are missing.
    """
    found: dict[str, Tensor] = {}
    stored: dict[str, str] = {}
    packed = bases(tensors)
    parts = {f"{base}.{part}": base for base in packed for part in ("compressed", "bitmask", "shape", "row_offsets")}
    for name in tensors:
        if name.endswith((".bitmask", ".compressed")) and name not in parts:
            raise refusal(path, f"`{name}` lacks the other parts of its weight (compressed, bitmask, shape)")
        base = parts.get(name)
        whole = name if base is None else dense_name(base)
        if base is not None and name != f"{base}.bitmask":
            continue
        if whole in found or (base is not None and whole in tensors):
            raise refusal(path, f"two of its tensors are called `{whole}`")
        if base is None:
            found[whole], stored[whole] = tensors[name], "plain"
            continue
        kind = BITMASK if f"{base}.row_offsets" in tensors else TWO_FOUR
        found[whole], stored[whole] = _decode(path, base, tensors, kind), _STORED[kind]
    if config.get("format", "dense") != "dense" and not packed:
        raise refusal(path, f"its settings say {config['format']}, but no tensor is packed so")
    return found, stored


def _decode(path: Path, base: str, tensors: Mapping[str, Tensor], kind: str) -> Tensor:
    values, bits, sizes = (tensors[f"{base}.{part}"] for part in ("compressed", "bitmask", "shape"))
    if sizes.dtype not in (torch.int64, torch.int32) or sizes.numel() > 64:
        raise refusal(path, f"`{base}.shape` is no shape")
    shape = check_shape(path, base, sizes.reshape(-1).tolist())
    if values.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise refusal(path, f"`{base}` is quantised to 8 bits", "Use the checkpoint from before quantisation.")
    if not shape or bits.dtype != torch.uint8 or tuple(bits.shape) != (*shape[:-1], -(-shape[-1] // 8)):
        raise refusal(path, f"the bits of `{base}`, {list(bits.shape)}, do not fit its shape {list(shape)}")
    mask = _unpack(bits, shape)
    if int(mask.sum()) != values.numel():
        raise refusal(path, f"`{base}` has {values.numel():,} values for {int(mask.sum()):,} bits that are set")
    if kind == BITMASK and len(shape) == 2:
        rows = mask.sum(1)
        if not torch.equal(tensors[f"{base}.row_offsets"].reshape(-1).long(), rows.cumsum(0) - rows):
            raise refusal(path, f"`{base}.row_offsets` do not agree with its bits")
    if kind == TWO_FOUR and (count(shape) % 4 or bool((mask.reshape(-1, 4).sum(1) != 2).any())):
        raise refusal(path, f"`{base}` does not have two of every four bits set")
    dense = torch.zeros(shape, dtype=values.dtype)
    dense[mask] = values.reshape(-1)
    return dense


def _unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not count(shape):
        return torch.zeros(shape, dtype=torch.bool)
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1, count=shape[-1], bitorder="little")).bool()


def encode(base: str, weight: Tensor, kind: str) -> dict[str, Tensor]:
    """The parts of a weight.

    Raises:
        FileError: when it is not 2:4 and should be.
    """
    mask = weight != 0
    if kind == TWO_FOUR:
        if weight.dim() != 2 or weight.numel() % 4 or bool((mask.reshape(-1, 4).sum(1) > 2).any()):
            raise FileError(
                f"`{dense_name(base)}` has more than two of four weights that are not zero, so it cannot be written as "
                f"{TWO_FOUR}. Write the tensors as safetensors."
            )
        groups = mask.reshape(-1, 4)
        # Kept are two of four whatever they are: zeros at the front make up for those that are missing.
        order = (groups.int() * 8 - torch.arange(4, dtype=torch.int32)).topk(2, dim=1).indices
        mask = torch.zeros_like(groups).scatter_(1, order, True).reshape(weight.shape)
    values = weight[mask]
    bits = torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    shape = torch.tensor(weight.shape)
    if kind == TWO_FOUR:
        values = values.reshape(weight.shape[0], -1)
        return {f"{base}.compressed": values, f"{base}.bitmask": bits, f"{base}.shape": shape.reshape(-1, 1)}
    rows = mask.sum(-1)
    offsets = rows.cumsum(0) - rows
    return {
        f"{base}.compressed": values, f"{base}.bitmask": bits, f"{base}.shape": shape, f"{base}.row_offsets": offsets,
    }  # fmt: skip


def write(source: Foreign, path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the checkpoint with these weights, packed as they were."""
    packed: dict[str, str] = source.facts["packed"]
    if lost := [name for name in packed if name not in tensors]:
        raise FileError(f"{path} cannot be written: `{lost[0]}` is missing. Write the tensors as safetensors.")
    kinds = {how: kind for kind, how in _STORED.items()}
    parts: dict[str, Tensor] = {}
    wanted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        base = packed.get(name)
        whole = wanted[name] = clean(tensor).contiguous()
        parts |= {name: whole} if base is None else encode(base, whole, kinds[source.stored[name]])
    tensorfile.check_back(path, wanted, decode(path, parts, {})[0])
    if "files" in source.facts:
        files = dict(source.facts["files"])
        for base in packed.values():
            files |= {part: files[f"{base}.bitmask"] for part in parts if part.rpartition(".")[0] == base}
        tensorfolder.write_folder(replace(source, facts={**source.facts, "files": files}), path, parts)
    else:
        tensorfolder.write(replace(source, kind="safetensors"), path, parts)
