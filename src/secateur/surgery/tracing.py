"""The graph of a network as torch.export sees it, from a shell around the user's own numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from secateur.core.calls import shell, split_inputs
from secateur.core.names import unwrap
from secateur.runtime.lower_export import functional, quiet, trace_export


@dataclass(frozen=True)
class Traced:
    """A functional graph.

    Args:
        program: the exported network.
        note: why the batch is not free; empty where it is.
    """

    program: ExportedProgram
    note: str


def trace(model: nn.Module, example: Any) -> Traced:
    """The graph of a network in evaluation mode; the network stays as it is, and no number is copied.

    Args:
        model: the network.
        example: one batch as the network takes it.

    Raises:
        ModelError: when torch.export cannot trace the network, with the place and the cure.
    """
    args, kwargs = split_inputs(example)
    with quiet():
        program, why = trace_export(shell(unwrap(model)), args, kwargs)
        program = functional(program)
    return Traced(program, why or "")
