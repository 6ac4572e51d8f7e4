"""Turns a PyTorch network into graphs of the runtime, and what has no counterpart into parts that stay in torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn
from torch.utils import _pytree as pytree

from secateur.runtime import lower_layers, lower_math, lower_shape  # noqa: F401  they register the rules
from secateur.runtime.fuse import fuse
from secateur.runtime.graph import Graph, InputSpec
from secateur.runtime.lower import Lowering
from secateur.runtime.lower_export import CaptureError, Exported, export
from secateur.runtime.lower_ir import Program, Step, bury, rename
from secateur.runtime.lower_split import NativeSegment, Segment, TorchSegment, split, unsupported

__all__ = ["CaptureError", "Captured", "NativeSegment", "TorchSegment", "capture"]


@dataclass(frozen=True)
class Captured:
    """A captured network: segments that run one after the other and hand on values by name.

    Attributes:
        segments: Native graphs and torch parts; one native segment where the runtime knows every operator.
        inputs: The network's inputs, in the order of its arguments.
        outputs: Names of the network's results.
        notes: What a user may want to know: a fixed batch, weights that changed their type.
    """

    segments: tuple[Segment, ...]
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def graph(self) -> Graph:
        """The graph of a network that needs no torch.

        Raises:
            CaptureError: when parts of it stay in torch.
        """
        if len(self.segments) != 1 or not isinstance(self.segments[0], NativeSegment):
            ops = [(op, where, "") for part in self.parts for op, where in part.ops]
            raise CaptureError(f"the network is not one graph: {_listed(ops)} Use its segments.")
        return self.segments[0].graph

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """The weights of all native segments."""
        native = (part for part in self.segments if isinstance(part, NativeSegment))
        return {name: array for part in native for name, array in part.weights.items()}

    @property
    def parts(self) -> tuple[TorchSegment, ...]:
        """The segments that stay in torch."""
        return tuple(part for part in self.segments if isinstance(part, TorchSegment))


def capture(model: nn.Module, example_inputs: Any, strict: bool = False) -> Captured:
    """Turn a network, as it acts in evaluation mode, into graphs of the runtime.

    The network itself stays as it is: its flags, hooks and weights. The captured weights are copies in float32.
    Where torch can trace the network for any batch, the first dimension of the inputs is free; otherwise it is that
    of the example, and a note says so.

    Args:
        model: The network.
        example_inputs: One batch as the network takes it: a tensor, a tuple of positional or a mapping of keyword
            arguments.
        strict: Refuse a network with operators that the runtime does not have.

    Raises:
        CaptureError: torch.export cannot trace the network; or, if ``strict``, an operator would stay in torch.
        DataError: the example holds no tensor.
    """
    exported = export(model, example_inputs)
    lowering = Lowering(exported)
    program = lowering.run()
    bury(program)
    missing = unsupported(program)
    if strict and missing:
        raise CaptureError(
            f"the runtime lacks operators of this network: {_listed(missing)} Replace them by operators that "
            "docs/decisions/006-runtime-graph.md lists, or leave out strict to run these parts in torch."
        )
    fuse(program)
    _name_outputs(program, _output_names(exported))
    notes = exported.notes
    if missing:
        notes.append(f"in torch: {_listed(missing)}")
    inputs = tuple(_spec(program, value) for value in program.inputs)
    segments = split(program, lowering.evaluator)
    return Captured(tuple(segments), inputs, tuple(program.outputs), tuple(notes))


def _listed(missing: list[tuple[str, str, str]]) -> str:
    lines = dict.fromkeys(
        f"{op} in {where or 'the network itself'!r}" + (f" ({why})" if why else "") for op, where, why in missing
    )
    shown = list(lines)[:8]
    more = f", and {len(lines) - 8} more" if len(lines) > 8 else ""
    return ", ".join(shown) + more + "."


def _spec(program: Program, value: str) -> InputSpec:
    shape = tuple(0 if size == -1 else size for size in program.shapes[value])
    return InputSpec(value, program.dtypes[value], shape)


def _output_names(exported: Exported) -> list[str]:
    """One name for each tensor that the network returns: its key, or its place."""
    signature = exported.program.graph_signature
    tree: Any = exported.program.call_spec.out_spec
    arguments = [spec.arg for spec in signature.output_specs if spec.kind.name == "USER_OUTPUT"]
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(len(arguments)), tree))
    kept = [
        path for (path, _), argument in zip(paths, arguments, strict=True) if getattr(argument, "value", 0) is not None
    ]
    if len(paths) == 1:
        return ["output"]
    return [".".join(["output", *map(_key, path)]) if _plain(path) else _key(path[-1]) for path in kept]


def _plain(path: Any) -> bool:
    return len(path) != 1 or not isinstance(getattr(path[0], "key", getattr(path[0], "name", None)), str)


def _key(entry: Any) -> str:
    for name in ("key", "idx", "name"):
        if hasattr(entry, name):
            return str(getattr(entry, name))
    return str(entry)


def _name_outputs(program: Program, names: list[str]) -> None:
    """Give results their names; one that is an input, or returned twice, is copied first."""
    taken = set(program.inputs)
    for at, (value, name) in enumerate(zip(list(program.outputs), names, strict=True)):
        value = program.outputs[at]
        if value in taken:
            if program.dtypes[value] != "f32":
                continue
            copy = program.value(name, program.shapes[value])
            program.steps.append(Step("reshape", "copy", [value], [copy]))
            program.outputs[at] = copy
        else:
            made = program.value(name, program.shapes[value], program.dtypes[value])
            for step in program.steps:
                step.outputs = [made if out == value else out for out in step.outputs]
            rename(program, value, made)
        taken.add(program.outputs[at])
