"""From torch's functional graph to a :class:`Program`: one rule for each operator, in the ``lower_*`` files.

A node whose rule raises :class:`Unsupported`, or that has none, stays in torch as one ``torch`` step.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind, OutputKind

from secateur.core.names import aliases, plain
from secateur.runtime.fuse_views import View
from secateur.runtime.lower_export import CaptureError, Exported
from secateur.runtime.lower_ir import Dims, Program, Step, Unsupported, broadcast
from secateur.runtime.lower_known import Evaluator, Known, dims, sizes

Values = str | list[str | None]
Rule = Callable[["Lowering", "Arguments"], Values]
RULES: dict[str, Rule] = {}
"""From the name of a torch operator, without its overload, to what makes steps of it."""

MOVES: set[str] = set()
"""Operators that only move numbers; rules add theirs."""

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""Types that cross as int64; a part that wants another turns them back."""

HELPERS = frozenset(("getitem", "additive_mask", "batch_first"))
"""What errors and reports leave out: it belongs to the operator before."""


def lowers(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators of ``torch.ops.aten``."""

    def register(rule: Rule) -> Rule:
        RULES.update({f"aten::{name}": rule for name in names})
        return rule

    return register


def operator_name(node: fx.Node) -> str:
    """The operator as errors name it, such as ``aten::cumsum``."""
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None else getattr(node.target, "__name__", str(node.target))


class Arguments:
    """The arguments of a node under the names of the operator's schema, with its defaults."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        target: Any = node.target
        schema = target._schema.arguments
        self._values = {arg.name: arg.default_value for arg in schema if arg.has_default_value()}
        self._values.update((arg.name, value) for arg, value in zip(schema, node.args, strict=False))
        self._values.update(node.kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(f"{self.node.target} has no argument {name!r}") from None

    def get(self, name: str, default: Any = None) -> Any:
        """An argument that some overloads lack."""
        return self._values.get(name, default)


class Lowering:
    """One pass over a graph; rules call its methods to make steps."""

    def __init__(self, exported: Exported) -> None:
        self.exported = exported
        self.program = Program()
        self.evaluator = Evaluator(_constants(exported))
        self.node: fx.Node = next(iter(exported.program.graph.nodes))
        self._values: dict[fx.Node, Values] = {}
        self._names = _names(exported)
        self._consts: list[Step] = []
        self._shared: dict[Any, str] = {}
        self._ids: dict[str, View] = {}
        self._leaves = {name for name, module in exported.model.named_modules() if not any(module.children())}

    def run(self) -> Program:
        """The whole graph, dead steps included; outputs are those of the network, in order."""
        for node in self.exported.program.graph.nodes:
            self.node = node
            if node.op == "placeholder" and node not in self._names:
                self._input(node)
            self.evaluator.visit(node)
            if node.op == "call_function" and self._data(node):
                self._node(node)
        for spec in self.exported.program.graph_signature.output_specs:
            if spec.kind == OutputKind.USER_OUTPUT:
                self._output(spec.arg)
        self._ids_in_torch()
        self.program.steps[:0] = self._consts
        return self.program

    def _ids_in_torch(self) -> None:
        """Moved ids that torch reads after all are moved in torch: native steps hand on no ids but inputs."""
        nodes = {value: node for node, value in self._values.items() if isinstance(value, str) and value in self._ids}
        wanted: set[str] = set()
        for step in reversed(self.program.steps):
            if step.op != "torch" and wanted.intersection(step.outputs):
                node = nodes[step.out]
                reads = self._sources(node)
                step.op, step.inputs, step.weights = "torch", list(reads.values()), {}
                step.attrs = {"node": node, "reads": list(reads), "why": "torch reads these ids"}
            if step.op == "torch":
                wanted.update(value for value in step.inputs if value in self._ids)

    def _data(self, node: fx.Node) -> bool:
        """Whether a node needs steps: it is no size, and not known at capture."""
        if isinstance(node.meta.get("val"), Tensor):
            return self.evaluator.known(node) is None
        return not self.evaluator.has(node)

    def _input(self, node: fx.Node) -> None:
        fake = node.meta.get("val")
        if not isinstance(fake, Tensor):
            return
        if fake.is_complex():
            raise CaptureError(f"input {node.name!r} is complex; pass its real and imaginary parts as two inputs.")
        try:
            shape = sizes(fake)
        except Unsupported as error:
            raise CaptureError(f"input {node.name!r} cannot be captured: {error}.") from error
        value = self.program.value(str(node.target), shape, "f32" if fake.is_floating_point() else "i64")
        self._values[node] = value
        self.program.inputs.append(value)

    def _output(self, argument: Any) -> None:
        if getattr(argument, "value", 0) is None:  # None among the results
            return
        found = [node for node in self.exported.program.graph.nodes if node.name == getattr(argument, "name", "")]
        if not found or not isinstance(found[0].meta.get("val"), Tensor):
            raise CaptureError(f"the network returns {argument!r}, which is not a tensor; return tensors only.")
        self.node = found[0]
        value = self._values.get(self.node)
        self.program.outputs.append(value if isinstance(value, str) else self.read(self.node))

    def _node(self, node: fx.Node) -> None:
        kept = len(self.program.steps)
        try:
            self._values[node] = self._apply(node)
        except Unsupported as error:
            del self.program.steps[kept:]
            self._values[node] = self.torch(node, str(error))

    def _apply(self, node: fx.Node) -> Values:
        if node.target is operator.getitem:
            source, index = node.args
            made = self._values.get(source) if isinstance(source, fx.Node) else None
            chosen = made[index] if isinstance(made, list) and isinstance(index, int) else None
            if not isinstance(chosen, str):
                raise Unsupported("it belongs to the operator before it")
            return chosen
        rule = RULES.get(operator_name(node))
        if rule is None:
            raise Unsupported("the runtime has no such operator")
        return rule(self, Arguments(node))

    def torch(self, node: fx.Node, why: str) -> str:
        """A step that stays in torch; its inputs are the values of the network that it reads."""
        reads = self._sources(node)
        shape, dtype = (), "other"
        fake = node.meta.get("val")
        if isinstance(fake, Tensor):
            dtype = "f32" if fake.is_floating_point() else "i64" if fake.dtype in WHOLE else "other"
            try:
                shape = sizes(fake)
            except Unsupported:
                dtype = "other"  # no native step can read it
        value = self.program.value(node.name, shape, dtype)
        attrs = {"node": node, "reads": list(reads), "why": why}
        self.program.steps.append(Step("torch", value, list(reads.values()), [value], {}, attrs, self.where(node)))
        return value

    def _sources(self, node: fx.Node) -> dict[fx.Node, str]:
        """The nodes that have a value, reached from ``node`` backwards through those (sizes, zeros) that have none."""
        found: dict[fx.Node, str] = {}
        for read in node.all_input_nodes:
            value = self._values.get(read)
            if isinstance(value, str):
                found[read] = value
            elif self.evaluator.fixed(read) is None:
                found.update(self._sources(read))
        return found

    def where(self, node: fx.Node | None = None) -> str:
        """The path of the module that a node comes from."""
        stack = (node or self.node).meta.get("nn_module_stack") or {"": ("", None)}
        path = list(stack.values())[-1][0]
        return plain(str(path))

    # What rules read -----------------------------------------------------------------------------------------------

    def known(self, argument: Any) -> Tensor | None:
        """The tensor behind an argument that is the same for every input and batch."""
        found = self.evaluator.known(argument) if isinstance(argument, fx.Node) else None
        return found.tensor if found is not None and not found.axes else None

    def number(self, argument: Any) -> float | None:
        """The number behind an argument that is one, also where it is a known tensor of one element."""
        if isinstance(argument, int | float):
            return float(argument)
        tensor = self.known(argument)
        return float(tensor) if tensor is not None and tensor.numel() == 1 else None

    def dims(self, argument: Any) -> Dims:
        """The sizes of an argument; of a number, none."""
        return dims(argument) if isinstance(argument, fx.Node) else ()

    @property
    def out(self) -> Dims:
        """The sizes of what the node makes."""
        return dims(self.node)

    def read(self, argument: Any, dtype: str = "f32") -> str:
        """The value of an argument; a known one becomes a constant.

        Raises:
            Unsupported: when it is of another type, or its numbers cannot be constants.
        """
        if isinstance(argument, int | float):
            return self.const(np.asarray(argument, dtype=np.float64))
        if not isinstance(argument, fx.Node):
            raise Unsupported(f"{argument!r} is not a tensor")
        value = self._values.get(argument)
        if isinstance(value, str):
            if self.program.dtypes[value] != dtype:
                raise Unsupported(
                    "it reads numbers that are not floating point" if dtype == "f32" else "it reads no ids"
                )
            return value
        found = self.evaluator.known(argument)
        if found is None or dtype != "f32" or found.tensor.is_complex():
            raise Unsupported("it reads something that is no array of numbers")
        return self._constant(argument, found)

    def moved(self, argument: Any) -> str:
        """The value of an argument that is only moved: numbers, or token ids on their way to an embedding.

        Raises:
            Unsupported: when the ids go anywhere else.
        """
        value = self._values.get(argument)
        if isinstance(value, str) and self.program.dtypes[value] == "i64" and _embedded(self.node):
            return value
        return self.read(argument)

    def additive(self, mask: fx.Node) -> str:
        """A mask of true and false as numbers to be added, computed in torch."""
        graph = self.exported.program.graph
        with graph.inserting_after(mask):
            made = graph.call_function(additive_mask, (mask,))
        made.meta = {**mask.meta, "val": mask.meta["val"].float()}
        return self.torch(made, "the runtime has no true and false")

    def _constant(self, node: fx.Node, found: Known) -> str:
        made = self.const(numbers(found.tensor), self._names.get(node) or f"{self.where(node)}.{node.name}".strip("."))
        if not found.axes:
            return made
        if sum(size < 0 for size in dims(node)) != 1 or min(dims(node)) != -1:
            raise Unsupported("it reads a constant with several batches in it")
        return self.emit("expand", [made], dims(node))

    # What rules make -----------------------------------------------------------------------------------------------

    def weight(self, argument: Any, role: str, change: Callable[[np.ndarray], np.ndarray] | None = None) -> str:
        """A weight of the program from a known argument; a tensor that several layers share is one weight.

        Raises:
            Unsupported: when it is not known.
        """
        tensor = self.known(argument)
        if tensor is None or tensor.is_complex():
            raise Unsupported(f"its {role} depends on the input")
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), getattr(change, "__name__", ""))
        if key not in self._shared:
            array = numbers(tensor)
            name = self._names.get(argument) or f"{self.where()}.{role}".strip(".")
            self._shared[key] = self.program.weight(name, array if change is None else change(array))
        return self._shared[key]

    def array(self, array: np.ndarray, role: str) -> str:
        """A weight made at capture, named after the module."""
        return self.program.weight(f"{self.where()}.{role}".strip("."), array)

    def const(self, array: np.ndarray, name: str = "constant") -> str:
        """A value with these numbers, the same value for the same numbers."""
        key = (array.shape, array.dtype.str, hashlib.sha256(array.tobytes()).digest())
        if key not in self._shared:
            if not all(array.shape):
                raise Unsupported("it reads an array without elements")
            value = self.program.value(name, array.shape)
            weight = self.program.weight(name, array)
            self._shared[key] = value
            self._consts.append(Step("const", name, [], [value], {"value": weight}))
        return self._shared[key]

    def emit(
        self, op: str, inputs: Sequence[str], shape: Dims, weights: dict[str, str] | None = None, **attrs: Any
    ) -> str:
        """Append a step; the value it makes."""
        return self.emit_all(op, inputs, [shape], weights, **attrs)[0]

    def view(self, op: str, value: str, shape: Dims, **attrs: Any) -> str:
        """Append a step that only moves numbers, or ids that can be looked up first and moved afterwards.

        Raises:
            Unsupported: for ids where the algebra of views cannot say it.
        """
        dtype = self.program.dtypes[value]
        seen = None
        if dtype == "i64":
            base = self._ids.get(value) or View.whole(value, self.program.shapes[value])
            seen = base.after(op, attrs, shape)
            if seen is None:
                raise Unsupported("it rearranges ids in a way that no view of an embedding does")
        made = self.emit(op, [value], shape, **attrs)
        self.program.dtypes[made] = dtype
        if seen is not None:
            self._ids[made] = seen
        return made

    def emit_all(
        self,
        op: str,
        inputs: Sequence[str],
        shapes: Sequence[Dims],
        weights: dict[str, str] | None = None,
        **attrs: Any,
    ) -> list[str]:
        """Append a step that makes several values."""
        outputs = [self.program.value(self.node.name, shape) for shape in shapes]
        where = self.where()
        name = self._name(op, where, (weights or {}).get("weight"))
        self.program.steps.append(Step(op, name, list(inputs), outputs, weights or {}, attrs, where))
        return outputs

    def _name(self, op: str, where: str, weight: str | None) -> str:
        if where and where in self._leaves:
            return where
        if weight is not None and weight.startswith(where) and weight.endswith(("_weight", ".weight")):
            return weight[: -len(".weight")]
        return f"{where}.{op}".strip(".")

    def binary(self, fn: str, left: str, right: str) -> str:
        """An elementwise operator on two values."""
        shapes = self.program.shapes
        return self.emit("binary", [left, right], broadcast(shapes[left], shapes[right]), fn=fn, act="none")

    def unary(self, fn: str, value: str) -> str:
        """An elementwise function of a value."""
        return self.emit("unary", [value], self.program.shapes[value], fn=fn)


def additive_mask(mask: Tensor) -> Tensor:
    """0 where ``mask`` is true, minus infinity elsewhere."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask.bool(), -torch.inf)


def batch_first(value: Tensor, axis: int, count: int) -> Tensor:
    """A value with its batch in front; ``axis`` holds ``count`` numbers for each example."""
    front = value.movedim(axis, 0)
    return front.reshape(-1, count, *front.shape[1:]) if count > 1 else front.contiguous()


def _embedded(node: fx.Node) -> bool:
    """Whether embeddings are all that reads a node, through views."""
    for user in node.users:
        name = operator_name(user)
        if name != "aten::embedding" and not (name in MOVES and user.op == "call_function" and _embedded(user)):
            return False
    return True


def numbers(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor as floating point, without a copy where it has them."""
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    return tensor.detach().cpu().numpy()


def _names(exported: Exported) -> dict[fx.Node, str]:
    """Placeholders of weights, and their names in the network."""
    first = {name: every[0] for every in aliases(exported.model).values() for name in every}
    targets = {
        spec.arg.name: first.get(plain(str(spec.target)), plain(str(spec.target)))
        for spec in exported.program.graph_signature.input_specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    }
    return {node: targets[node.name] for node in exported.program.graph.nodes if node.name in targets}


def _constants(exported: Exported) -> dict[fx.Node, Tensor]:
    """Placeholders of weights, and their tensors."""
    program, found = exported.program, {}
    stores = {**program.constants, **program.state_dict}
    for spec in program.graph_signature.input_specs:
        if spec.kind != InputKind.USER_INPUT and isinstance(stores.get(str(spec.target)), Tensor):
            found[spec.arg.name] = stores[str(spec.target)].detach()
    return {node: found[node.name] for node in program.graph.nodes if node.name in found}
