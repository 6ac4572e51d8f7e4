"""How a network is called, and a copy of it that others may take apart."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from secateur.core.errors import ModelError


def split_inputs(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call: a tensor, a tuple of them, or a mapping of keywords."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, tuple | list) else (example,)), {}


def first_line(error: Exception) -> str:
    """What an error says first; of a list of broken constraints, the first of them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Constraints violated"):
        lines = [line.removeprefix("- ").partition(". If you")[0] for line in lines if line.startswith("- ")] or lines
    return lines[0][:300] if lines else type(error).__name__


def shell(model: nn.Module, held: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> nn.Module:
    """A copy of the modules in evaluation mode, around the same tensors.

    Args:
        model: the network.
        held: what stands in the copy for each tensor; by default the tensor itself.

    Raises:
        ModelError: when something that hangs on the modules cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers, vars(module)):
            for tensor in list(table.values()):
                if isinstance(tensor, Tensor) and id(tensor) not in memo:
                    memo[id(tensor)] = held(tensor)
    try:
        made = copy.deepcopy(model, memo)
    except Exception as error:  # any object may hang on a module
        raise ModelError(
            f"this {type(model).__name__} cannot be copied ({type(error).__name__}: {first_line(error)}). "
            "Take off what hangs on its modules (open files, locks, loggers) first."
        ) from error
    for module in made.modules():
        module.training = False
    return made
