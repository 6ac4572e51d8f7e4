"""Taking slices out of parameters, buffers, optimizer state and masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.core.errors import ModelError
from secateur.core.names import unwrap

Kept = Mapping[str, Mapping[int, Tensor]]
"""For each tensor of ``state_dict``, by dimension: the indices of the slices that stay."""


def sliced(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """A contiguous copy of what stays."""
    for d, index in kept.items():
        tensor = tensor.index_select(d, index.to(tensor.device))
    return tensor.contiguous()


def slice_module(model: nn.Module, kept: Kept) -> dict[nn.Parameter, tuple[nn.Parameter, Mapping[int, Tensor]]]:
    """Replace parameters and buffers of a network by what stays of them; tied ones stay tied, hooks stay on.

    Returns:
        For each old parameter the new one and what stayed.
    """
    model = unwrap(model)
    swapped: dict[nn.Parameter, tuple[nn.Parameter, Mapping[int, Tensor]]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, dims in kept.items():
        path, _, key = name.rpartition(".")
        module = modules[path]
        old = module._parameters.get(key)
        if old is not None:
            if old not in swapped:
                swapped[old] = (_renewed(old, dims), dims)
            continue
        buffer = module._buffers.get(key)
        if buffer is not None:
            module._buffers[key] = sliced(buffer, dims)
        elif isinstance(vars(module).get(key), Tensor):
            setattr(module, key, sliced(vars(module)[key], dims))
    for module in model.modules():
        for key, p in list(module._parameters.items()):
            if p is not None and p in swapped:
                setattr(module, key, swapped[p][0])
    return swapped


def _renewed(old: nn.Parameter, dims: Mapping[int, Tensor]) -> nn.Parameter:
    new = type(old)(sliced(old.detach(), dims), requires_grad=old.requires_grad)
    if old.grad is not None:
        new.grad = sliced(old.grad, dims)
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        for hook in (getattr(old, hooks, None) or {}).values():
            (new.register_hook if hooks == "_backward_hooks" else new.register_post_accumulate_grad_hook)(hook)
    for key, value in vars(old).items():
        setattr(new, key, value)
    return new


def check_optimizer(optimizer: Optimizer, shrinking: set[nn.Parameter]) -> None:
    """Refuse an optimizer of another network.

    Raises:
        ModelError: when it holds none of the parameters that shrink.
    """
    if shrinking and not any(p in shrinking for group in optimizer.param_groups for p in group["params"]):
        raise ModelError(
            "the optimizer holds none of the parameters that shrink; pass the one that trains this network, or none. "
            "Nothing was changed."
        )


def check_copy(model: nn.Module, other: nn.Module, kept: Kept) -> None:
    """Refuse an averaged copy of another network.

    Raises:
        ModelError: naming the first tensor that it lacks or has in another shape.
    """
    own, found = unwrap(model).state_dict(), unwrap(other).state_dict()
    for name in kept:
        if name in own and (name not in found or found[name].shape != own[name].shape):
            raise ModelError(f"the averaged copy has no `{name}` of the network's shape; nothing was changed.")


def slice_optimizer(
    optimizer: Optimizer, swapped: Mapping[nn.Parameter, tuple[nn.Parameter, Mapping[int, Tensor]]]
) -> list[str]:
    """Put the new parameters in the place of the old ones, and what stays of their state.

    Returns:
        What could not be sliced and begins anew.
    """
    notes = []
    for group in optimizer.param_groups:
        group["params"] = [swapped[p][0] if p in swapped else p for p in group["params"]]
    for old, (new, dims) in swapped.items():
        if old not in optimizer.state:
            continue
        state = optimizer.state.pop(old)
        made = {key: _state(value, old, dims) for key, value in state.items()}
        lost = [key for key, value in made.items() if value is _LOST]
        if lost:
            notes.append(f"optimizer state {', '.join(lost)} of a tensor {tuple(old.shape)} begins anew")
            continue
        optimizer.state[new] = made
    return notes


_LOST = object()


def _state(value: Any, old: Tensor, dims: Mapping[int, Tensor]) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0 or value.numel() == 1:
        return value
    if value.shape == old.shape:
        return sliced(value, dims)
    for left_out in range(old.dim()):  # factored moments: the shape without one dimension
        if value.shape == (*old.shape[:left_out], *old.shape[left_out + 1 :]):
            return sliced(value, {d - (d > left_out): index for d, index in dims.items() if d != left_out})
        if value.shape == (*old.shape[:left_out], 1, *old.shape[left_out + 1 :]):
            return sliced(value, {d: index for d, index in dims.items() if d != left_out})
    if old.dim() > 1 and sum(n != 1 for n in value.shape) == 1:
        d = next(i for i, n in enumerate(value.shape) if n != 1)
        if value.dim() == old.dim() and value.shape[d] == old.shape[d]:
            return sliced(value, {d: dims[d]}) if d in dims else value
    return _LOST


def kept_of(
    shapes: Mapping[str, tuple[int, ...]], gone: Iterable[tuple[str, int, Tensor]]
) -> dict[str, dict[int, Tensor]]:
    """What stays of each tensor, from the slices that go."""
    masks: dict[tuple[str, int], Tensor] = {}
    for name, d, index in gone:
        mask = masks.setdefault((name, d), torch.ones(shapes[name][d], dtype=torch.bool))
        mask[index.reshape(-1)] = False
    kept: dict[str, dict[int, Tensor]] = {}
    for (name, d), mask in masks.items():
        kept.setdefault(name, {})[d] = mask.nonzero()[:, 0]
    return kept
