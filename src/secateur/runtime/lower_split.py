"""Cuts a program into runs of native steps and of steps that stay in torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from secateur.runtime.graph import Graph, InputSpec, Node, WeightSpec
from secateur.runtime.lower import HELPERS, MOVES, batch_first, operator_name
from secateur.runtime.lower_ir import Dims, Program, Step
from secateur.runtime.lower_known import Evaluator


@dataclass(frozen=True)
class NativeSegment:
    """A graph of the runtime with its weights; it reads and makes values by name."""

    graph: Graph
    weights: dict[str, np.ndarray]


@dataclass(frozen=True)
class TorchSegment:
    """What stays in torch: ``module(*inputs)`` gives a tuple of ``outputs``.

    Attributes:
        module: A ``torch.fx.GraphModule``.
        inputs: Names of the values that it reads.
        outputs: Names of the values that it makes.
        ops: The operators without a counterpart, each with the path of its module.
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ops: tuple[tuple[str, str], ...]


Segment = NativeSegment | TorchSegment


@dataclass
class _Run:
    """Steps that go into one segment."""

    native: bool
    steps: list[Step] = field(default_factory=list)

    def reads(self) -> list[str]:
        """Values from elsewhere, in the order in which they are read."""
        made = self.makes()
        return list(dict.fromkeys(v for step in self.steps for v in step.inputs if v not in made))

    def makes(self) -> set[str]:
        """Values made here."""
        return {value for step in self.steps for value in step.outputs}


def unsupported(program: Program) -> list[tuple[str, str, str]]:
    """Operators that stay in torch: name, path of the module, reason.

    Those that only move or pick what another one makes are named where they are alone.
    """
    steps = [step for step in program.steps if step.op == "torch"]
    named = [(operator_name(step.attrs["node"]), step.where, step.attrs["why"]) for step in steps]
    return [entry for entry in named if entry[0] not in HELPERS | MOVES] or named


def split(program: Program, evaluator: Evaluator) -> list[Segment]:
    """The segments, in an order in which every value exists before it is read."""
    for step in program.steps:
        step.name = program.fresh("node", step.name)
    runs = min((_runs(program, first) for first in (True, False)), key=len)
    _bridge(program, runs)
    wanted = set(program.outputs)
    kept: dict[str, np.ndarray] = {}
    segments: list[Segment] = []
    for at, run in enumerate(runs):
        later = {value for other in runs[at + 1 :] for value in other.reads()} | wanted
        outputs = [value for step in run.steps for value in step.outputs if value in later]
        if run.native:
            segments.append(_native(program, run, outputs, kept, alone=len(runs) == 1))
        else:
            segments.append(_torch(program, run, outputs, evaluator))
    return segments


def _runs(program: Program, native_first: bool) -> list[_Run]:
    """Steps by how often a path to them changes sides; torch steps without a link between them are several parts."""
    levels: dict[str, int] = {}
    stages: dict[int, list[Step]] = {}
    for step in program.steps:
        side = 0 if (step.op != "torch") == native_first else 1
        level = max((levels[value] for value in step.inputs if value in levels), default=0)
        level += (level - side) % 2
        levels.update(dict.fromkeys(step.outputs, level))
        stages.setdefault(level, []).append(step)
    runs: list[_Run] = []
    for level in sorted(stages):
        native = stages[level][0].op != "torch"
        parts = [stages[level]] if native else _connected(stages[level])
        runs += [_Run(native, steps) for steps in parts]
    return runs


def _connected(steps: list[Step]) -> list[list[Step]]:
    groups: list[list[Step]] = []
    for step in steps:
        near = [group for group in groups if any(set(step.inputs) & set(other.outputs) for other in group)]
        joined = [other for group in near for other in group]
        groups = [group for group in groups if group not in near] + [[*joined, step]]
    order = {id(step): at for at, step in enumerate(steps)}
    return [sorted(group, key=lambda step: order[id(step)]) for group in groups]


def _bridge(program: Program, runs: list[_Run]) -> None:
    """A graph's input has the batch in front: values that do not cross in that form, and are turned back behind."""
    crossing: dict[str, str] = {}
    for run in runs:
        for value in run.reads() if run.native else []:
            shape = program.shapes[value]
            if min(shape, default=0) >= 0 or shape.index(min(shape)) == 0 and shape[0] == -1:
                continue
            axis, count = shape.index(min(shape)), -min(shape)
            if value not in crossing:
                maker = next(other for other in runs if value in other.makes())
                crossing[value] = _front(program, maker, value, axis, count)
            _back(program, run, value, crossing[value], axis)


def _front(program: Program, run: _Run, value: str, axis: int, count: int) -> str:
    """Let a run also make a value with the batch in front; its name."""
    shape = program.shapes[value]
    rest = tuple(size for at, size in enumerate(shape) if at != axis)
    front = program.value(value, (-1, *((count,) if count > 1 else ()), *rest), program.dtypes[value])
    if not run.native:
        maker = next(step for step in run.steps if value in step.outputs)
        node = maker.attrs["node"]
        with node.graph.inserting_after(node):
            moved = node.graph.call_function(batch_first, (node, axis, count))
        moved.meta = dict(node.meta)
        attrs = {"node": moved, "reads": [node], "why": maker.attrs["why"]}
        run.steps.append(Step("torch", front, [value], [front], {}, attrs, maker.where))
        return front
    turned = program.value(value, (-count, *rest))
    order = [axis, *(at for at in range(len(shape)) if at != axis)]
    run.steps.append(Step("permute", program.fresh("node", "front"), [value], [turned], {}, {"dims": order}))
    run.steps.append(Step("reshape", program.fresh("node", "front"), [turned], [front]))
    return front


def _back(program: Program, run: _Run, value: str, front: str, axis: int) -> None:
    """Let a run read a value in the form in which it crossed."""
    shape = program.shapes[value]
    rest = [at for at in range(len(shape)) if at != axis]
    merged = program.value(value, (shape[axis], *(shape[at] for at in rest)), program.dtypes[value])
    whole = program.value(value, shape, program.dtypes[value])
    order = [([axis, *rest]).index(at) for at in range(len(shape))]
    for step in run.steps:
        step.inputs = [whole if read == value else read for read in step.inputs]
    run.steps[:0] = [
        Step("reshape", program.fresh("node", "back"), [front], [merged]),
        Step("permute", program.fresh("node", "back"), [merged], [whole], {}, {"dims": order}),
    ]


# Native ------------------------------------------------------------------------------------------------------------


def _native(program: Program, run: _Run, outputs: list[str], kept: dict[str, np.ndarray], alone: bool) -> NativeSegment:
    reads = list(program.inputs) if alone else run.reads()
    batched = [value for value in program.inputs if program.shapes[value][:1] == (-1,)]
    grows = any(size < 0 for step in run.steps for value in step.outputs for size in program.shapes[value])
    if not reads or (grows and not any(program.shapes[value][:1] == (-1,) for value in reads)):
        reads.append((batched or program.inputs)[0])
    specs = [InputSpec(value, program.dtypes[value], _file_shape(program.shapes[value])) for value in reads]
    nodes = tuple(_node(program, step) for step in run.steps)
    names = list(dict.fromkeys(name for step in run.steps for name in step.weights.values()))
    kept.update({name: _cast(program.weights[name]) for name in names if name not in kept})
    weights = {name: kept[name] for name in names}
    spec = {name: WeightSpec(array.shape) for name, array in weights.items()}
    return NativeSegment(Graph(tuple(specs), tuple(outputs), spec, nodes), weights)


def _cast(array: np.ndarray) -> np.ndarray:
    """A copy in float32, so that training on does not change what was captured."""
    with np.errstate(over="ignore"):
        return np.array(array, dtype=np.float32, order="C")


def _file_shape(shape: Dims) -> tuple[int, ...]:
    return tuple(0 if size == -1 else size for size in shape)


def _node(program: Program, step: Step) -> Node:
    attrs = dict(step.attrs)
    if step.op == "reshape":
        attrs["shape"] = [0 if size == -1 else -1 if size < 0 else size for size in program.shapes[step.out]]
    if step.op == "expand":
        attrs["shape"] = list(_file_shape(program.shapes[step.out]))
    return Node(step.op, step.name, tuple(step.inputs), tuple(step.outputs), step.weights, attrs)


# Torch -------------------------------------------------------------------------------------------------------------


def _torch(program: Program, run: _Run, outputs: list[str], evaluator: Evaluator) -> TorchSegment:
    return _Part(program, run, evaluator).build(outputs)


class _Part:
    """A graph module from nodes of the exported graph; what they read elsewhere become inputs, or constants."""

    def __init__(self, program: Program, run: _Run, evaluator: Evaluator) -> None:
        self.program, self.run, self.evaluator = program, run, evaluator
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.copies: dict[fx.Node, fx.Node] = {}

    def build(self, outputs: list[str]) -> TorchSegment:
        reads = self.run.reads()
        holders = {value: self.graph.placeholder(f"input_{at}") for at, value in enumerate(reads)}
        made: dict[str, tuple[fx.Node, Any]] = {}
        for step in self.run.steps:
            for node, value in zip(step.attrs["reads"], step.inputs, strict=True):
                if value in holders:
                    self.copies.setdefault(node, self._entry(holders[value], node))
            node = step.attrs["node"]
            made[step.out] = self._copy(node), node.meta.get("val")
        results = tuple(self._exit(made[value][0], value, made[value][1]) for value in outputs)
        self.graph.output(results)
        self.graph.lint()
        module = fx.GraphModule(self.root, self.graph)
        module.eval()
        ops = [operator_name(step.attrs["node"]) for step in self.run.steps]
        every = [(op, step.where) for op, step in zip(ops, self.run.steps, strict=True)]
        named = [entry for entry in every if entry[0] not in HELPERS | MOVES] or every
        return TorchSegment(module, tuple(reads), tuple(outputs), tuple(dict.fromkeys(named)))

    def _entry(self, holder: fx.Node, node: fx.Node) -> fx.Node:
        """Native values are float32 and int64; the part may want another type."""
        fake = node.meta.get("val")
        if not isinstance(fake, Tensor) or fake.dtype in (torch.float32, torch.int64):
            return holder
        return self.graph.call_method("to", (holder, fake.dtype))

    def _exit(self, node: fx.Node, value: str, fake: Any) -> fx.Node:
        wanted = {"f32": torch.float32, "i64": torch.int64}.get(self.program.dtypes[value])
        made = getattr(fake, "dtype", None)
        return node if wanted in (None, made) else self.graph.call_method("to", (node, wanted))

    def _copy(self, node: fx.Node) -> Any:
        if node in self.copies:
            return self.copies[node]
        fixed = self.evaluator.fixed(node)
        if isinstance(fixed, Tensor):
            name = f"constant_{len(self.copies)}"
            self.root.register_buffer(name, fixed.detach().clone())
            self.copies[node] = self.graph.get_attr(name)
        elif fixed is not None:
            return fixed
        elif node.op == "get_attr":
            name = f"part_{len(self.copies)}"
            self.root.add_module(name, getattr(node.graph.owning_module, str(node.target)))
            self.copies[node] = self.graph.get_attr(name)
        else:
            for read in node.all_input_nodes:
                self._copy(read)
            self.copies[node] = self.graph.node_copy(node, self._copy)
        return self.copies[node]
