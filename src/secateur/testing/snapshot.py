"""Everything a method must leave as it was, copied, and what has changed since."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.masks import Masks
from secateur.core.names import parameters, unwrap
from secateur.core.streams import global_state
from secateur.core.task import Task

Snapshot = dict[str, Any]
"""What was there, by what to call it in a message."""


def snapshot(task: Task, masks: Masks | None = None) -> Snapshot:
    """A copy of the state of a task, its masks and the process that a method can reach.

    Holds parameters and buffers, their ``.grad`` and ``requires_grad``, modules with their training flags and
    hooks, the batches, the masks, the random state of torch, and torch's gradient mode.

    Args:
        task: its data must be a sequence of batches.
        masks: masks handed to the method.
    """
    model = unwrap(task.model)
    seen: Snapshot = {}
    for name, p in parameters(model).items():
        seen[f"parameter `{name}`"] = _copy(p)
        seen[f"`.grad` of `{name}`"] = None if p.grad is None else (id(p.grad), _copy(p.grad))
        seen[f"`requires_grad` of `{name}`"] = p.requires_grad
    for name, buffer in model.named_buffers():
        seen[f"buffer `{name}`"] = _copy(buffer)
    for name, module in model.named_modules():
        label = f"`{name}`" if name else "the network"
        seen[f"the type of {label}"] = type(module)
        seen[f"the training flag of {label}"] = module.training
        seen[f"the hooks of {label}"] = _hooks(module)
    for i, batch in enumerate(task.data):
        seen[f"batch {i}"] = _copy(batch)
    seen |= {f"the mask of `{name}`": _copy(mask) for name, mask in (masks or {}).items()}
    seen |= {f"the global random state ({where})": state for where, state in global_state().items()}
    seen["torch's gradient mode"] = torch.is_grad_enabled()
    return seen


def changes(before: Snapshot, after: Snapshot) -> list[str]:
    """What differs between two snapshots, bit by bit, in words.

    >>> changes({"a": torch.tensor(0.0)}, {"a": torch.tensor(-0.0), "b": 1})
    ['a', 'b']
    """
    every = list(dict.fromkeys((*before, *after)))
    return [name for name in every if name not in before or name not in after or not _same(before[name], after[name])]


def _hooks(module: nn.Module) -> tuple[int, ...]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return tuple(len(getattr(module, kind)) for kind in kinds)


def _copy(thing: Any) -> Any:
    if isinstance(thing, Tensor):
        return thing.detach().clone()
    if isinstance(thing, Mapping):
        return {key: _copy(value) for key, value in thing.items()}
    if isinstance(thing, tuple | list):
        return [_copy(value) for value in thing]
    return thing


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape and one.device == other.device
        return alike and torch.equal(_bytes(one), _bytes(other))
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return one is other or bool(one == other)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
