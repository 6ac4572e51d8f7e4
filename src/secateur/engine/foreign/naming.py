"""The names that a class gives to the tensors of an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.names import unwrap
from secateur.engine.foreign.record import Foreign

_LEAVES = {
    "Conv": ("", "weight", "bias"), "ConvTranspose": ("", "weight", "bias"), "Gemm": ("", "weight", "bias"),
    "MatMul": ("", "weight"), "Add": ("bias", "bias"), "PRelu": ("", "weight"), "Gather": ("weight",),
    "BatchNormalization": ("", "weight", "bias", "running_mean", "running_var"),
    "LayerNormalization": ("", "weight", "bias"), "InstanceNormalization": ("", "weight", "bias"),
}  # fmt: skip


def renamed(found: Foreign, tensors: Mapping[str, Tensor], net: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of an ONNX file under the names of the class, matrices turned as torch keeps them.

    A tensor keeps its name where the class has it. Others are named after the node that uses them, which exporters call
    ``/layer1/conv1/Conv``. What the graph needs besides (shapes, limits, single numbers) is left out.

    Returns:
        The tensors, and the new name of each that changed.
    """
    used: Mapping[str, Mapping[str, Any]] = found.facts["used"]
    own, modules = unwrap(net).state_dict(), dict(unwrap(net).named_modules())
    made: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for name, tensor in tensors.items():
        use = used.get(name)
        better = name if name in own or use is None else _by_node(use, modules) or name
        if better not in own and (not tensor.is_floating_point() or tensor.numel() <= 1):
            continue
        holder = modules.get(better.rpartition(".")[0])
        if use is not None and use["turned"] and tensor.dim() == 2 and isinstance(holder, nn.Linear):
            tensor = tensor.t().contiguous()
        taken = better in made and better != name
        made[name if taken else better] = tensor
        if better != name and not taken:
            names[name] = better
    return made, names


def _by_node(use: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> str:
    """The name that a node's own name tells, or an empty one."""
    leaves = _LEAVES.get(use["op"], ())
    leaf = leaves[use["slot"]] if use["slot"] < len(leaves) else ""
    if scopes := [scope for scope in use["scopes"] if scope in modules]:
        return f"{scopes[-1]}.{leaf}" if leaf else ""
    path = ""
    for part in str(use["node"]).strip("/").split("/")[:-1]:
        # Children of a Sequential are written with the names of those around them: /body/body.0/body.0.1/Conv.
        head, _, last = part.rpartition(".")
        again = bool(head) and (path == head or path.endswith(f".{head}"))
        path = f"{path}.{last}" if again else f"{path}.{part}".strip(".")
    return f"{path}.{leaf}" if leaf and path and path in modules else ""


def folded(net: nn.Module, missing: list[str], found: Mapping[str, Tensor]) -> str:
    """Why a network with BatchNorm cannot be had back from a file without; empty when that is not the reason."""
    norms = [
        path for path, module in unwrap(net).named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{path}.weight" in missing
    ]  # fmt: skip
    convolutions = [
        path for path, module in unwrap(net).named_modules() if isinstance(module, nn.modules.conv._ConvNd | nn.Linear)
    ]
    there = [path for path in convolutions if f"{path}.weight" in found]
    if not norms or not there:
        return ""
    return (
        f"BatchNorm is folded into the layers before it ({len(norms)} of the class are not in the file, `{norms[0]}` "
        "the first), and its numbers cannot be had back from their products"
    )


def counters(net: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Fill in what files of other programs leave out: how many batches BatchNorm has seen."""
    filled = []
    for name, tensor in unwrap(net).state_dict().items():
        if name not in tensors and name.rpartition(".")[2] == "num_batches_tracked":
            tensors[name] = torch.zeros_like(tensor)
            filled.append(name)
    return filled
