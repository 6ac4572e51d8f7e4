"""The graph of a network as torch.export sees it, from a shell around the user's own numbers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from secateur.core.errors import ModelError
from secateur.core.names import unwrap
from secateur.runtime.lower_export import first_line, functional, quiet, trace_export


@dataclass(frozen=True)
class Traced:
    """A functional graph.

    Args:
        program: the exported network.
        note: why the batch is not free; empty where it is.
    """

    program: ExportedProgram
    note: str


def split_inputs(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call: a tensor, a tuple of them, or a mapping of keywords."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, tuple | list) else (example,)), {}


def trace(model: nn.Module, example: Any) -> Traced:
    """The graph of a network in evaluation mode; the network stays as it is, and no number is copied.

    Args:
        model: the network.
        example: one batch as the network takes it.

    Raises:
        ModelError: when torch.export cannot trace the network, with the place and the cure.
    """
    args, kwargs = split_inputs(example)
    shell = hull(unwrap(model))
    with quiet():
        program, why = trace_export(shell, args, kwargs)
        program = functional(program)
    return Traced(program, why or "")


def hull(model: nn.Module) -> nn.Module:
    """A copy of the modules in evaluation mode around the same parameters and buffers.

    Raises:
        ModelError: when something that hangs on the modules cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers, vars(module)):
            memo |= {id(tensor): tensor for tensor in table.values() if isinstance(tensor, Tensor)}
    try:
        shell = copy.deepcopy(model, memo)
    except Exception as error:  # any object may hang on a module
        raise ModelError(
            f"this {type(model).__name__} cannot be copied ({type(error).__name__}: {first_line(error)}). "
            "Take off what hangs on its modules (open files, locks, loggers) first."
        ) from error
    for module in shell.modules():
        module.training = False
    return shell
