"""Widths of a smaller network put back on a fresh instance of its class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import FileError
from secateur.core.names import unwrap
from secateur.surgery.attention import ThinAttention


def sizes_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Every whole number, and row of them, that a module holds, by the path of the module."""
    found: dict[str, dict[str, Any]] = {}
    for path, module in unwrap(model).named_modules(remove_duplicate=False):
        held = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(module).items() if _is_size(name, v)}
        if held:
            found[path] = held
    return found


def classes_of(model: nn.Module) -> list[str]:
    """Paths of the attention modules that surgery has given a class of its own."""
    return [path for path, module in unwrap(model).named_modules() if type(module) is ThinAttention]


def _is_size(name: str, value: Any) -> bool:
    row = value if isinstance(value, tuple | list) else (value,)
    return not name.startswith("_") and bool(row) and all(type(v) is int for v in row)


def resize(model: nn.Module, structure: Mapping[str, Any], buffers: Mapping[str, Tensor], origin: str) -> None:
    """Give a fresh network the widths that ``structure.json`` tells: shapes of tensors, and sizes in attributes.

    Tensors whose shapes agree are left alone; the others are made anew and hold zeros until weights are loaded.

    Args:
        model: an instance of the class that was saved.
        structure: what ``structure.json`` holds.
        buffers: those that ``state_dict`` leaves out; they are taken where their shape differs.
        origin: where it is from, for messages.

    Raises:
        FileError: when the network has other tensors, or other dimensions, than were saved.
    """
    model = unwrap(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in structure.get("thin_attention", ()):
        if type(modules.get(path)) is nn.MultiheadAttention:
            ThinAttention.adopt(modules[path])  # type: ignore[arg-type]
    tied = {other: first for first, others in structure.get("tied", {}).items() for other in others}
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {**structure.get("parameters", {}), **structure.get("buffers", {})}
    made: dict[int, nn.Parameter] = {}
    for name, told in shapes.items():
        tensor = own.get(name)
        if tensor is None or tuple(tensor.shape) == tuple(told["shape"]):
            continue
        if tensor.dim() != len(told["shape"]):
            raise FileError(
                f"{origin} does not fit the network: `{name}` has {len(told['shape'])} dimensions there and "
                f"{tensor.dim()} in this network. Pass a fresh instance of the class that was saved."
            )
        path, _, key = name.rpartition(".")
        fresh = torch.zeros(told["shape"], dtype=tensor.dtype, device=tensor.device)
        if isinstance(tensor, nn.Parameter):
            made[id(tensor)] = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
        else:
            modules[path]._buffers[key] = buffers[name].to(fresh) if name in buffers else fresh
    for module in model.modules():
        for key, p in list(module._parameters.items()):
            if p is not None and id(p) in made:
                setattr(module, key, made[id(p)])
    _untied(model, tied, origin)
    for path, sizes in structure.get("sizes", {}).items():
        for name, value in sizes.items():
            _set(modules.get(path), name, value)


def _untied(model: nn.Module, tied: Mapping[str, str], origin: str) -> None:
    names = dict(model.named_parameters(remove_duplicate=False))
    for other, first in tied.items():
        if other in names and first in names and names[other] is not names[first]:
            raise FileError(
                f"{origin} does not fit the network: `{other}` and `{first}` were one tensor when it was saved and are "
                "two in this network. Tie them before loading."
            )


def _set(module: nn.Module | None, name: str, value: Any) -> None:
    now = None if module is None else vars(module).get(name)
    if module is None or now is None or not _is_size(name, now):
        return
    new = tuple(value) if isinstance(now, tuple) else value
    if new != now:
        setattr(module, name, new)
