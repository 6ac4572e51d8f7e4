"""Networks and an optimizer given back as they were, when surgery in several rounds fails halfway."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from secateur.core.names import unwrap


class Undo:
    """What it takes to give networks and their optimizer back as they are now.

    Surgery puts new tensors in the place of old ones, so the old ones need no copy; only buffers, which statistics are
    written into, do. Weights that are trained in between are not given back.

    Args:
        models: the networks.
        optimizer: the one that trains them, if any.

    Memory: the buffers; and the old weights for as long as this lives.
    """

    def __init__(self, models: Iterable[nn.Module], optimizer: Optimizer | None = None) -> None:
        every = {id(module): module for model in models for module in unwrap(model).modules()}
        self._modules = [(module, _held(vars(module))) for module in every.values()]
        buffers = {id(b): b for module in every.values() for b in module._buffers.values() if b is not None}
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in buffers.values()]
        self._groups = [(group, list(group["params"])) for group in optimizer.param_groups] if optimizer else []
        self._state = (optimizer.state, dict(optimizer.state)) if optimizer else None

    @torch.no_grad()
    def __call__(self) -> None:
        """Give everything back; tables keep their identity, since handles of hooks know them by it."""
        for module, held in self._modules:
            vars(module).clear()
            for name, (value, entries) in held.items():
                if entries is not None:
                    value.clear()
                    (value.extend if isinstance(value, list) else value.update)(entries)
                vars(module)[name] = value
        for buffer, value in self._buffers:
            buffer.copy_(value)
        for group, params in self._groups:
            group["params"] = params
        if self._state is not None:
            self._state[0].clear()
            self._state[0].update(self._state[1])


def _held(table: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Every attribute, with what it holds where it is a table itself."""
    return {name: (v, copy.copy(v) if isinstance(v, dict | list | set) else None) for name, v in table.items()}
