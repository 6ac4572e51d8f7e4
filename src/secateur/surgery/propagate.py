"""Labels for every value of an exported graph: one rule for each operator, and none removes what no rule knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx.node import map_arg

from secateur.surgery.labels import Units, Value, along, compress, decide, spread, varied, vector

Made = Value | list[Value | None] | None
Rule = Callable[["Pass", Node], Made]

RULES: dict[str, Rule] = {}
"""By the name of the operator, without its overload."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def op_name(node: Node) -> str:
    """``conv2d`` for ``aten.conv2d.default``."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet is not None:
        return str(packet).rpartition(".")[2]
    return getattr(node.target, "__name__", str(node.target))


def dim_of(node: Node, place: int, default: int = 0) -> int:
    """The dimension that an operator is given."""
    found: Any = node.kwargs.get("dim", node.args[place] if len(node.args) > place else default)
    return int(found)


def number(size: Any) -> int:
    """A size as a number: that of the example where it is free."""
    symbol = getattr(size, "node", None)
    return int(symbol.hint) if symbol is not None and not isinstance(size, int) else int(size)


def sizes_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor of the trace."""
    return tuple(number(size) for size in tensor.shape)


def shape_of(node: Node) -> tuple[int, ...]:
    """The shape of a node's tensor."""
    return sizes_of(node.meta["val"])


def plain_args(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments in which free sizes are numbers."""

    def settle(argument: Node) -> Any:
        val = argument.meta.get("val")
        return number(val) if isinstance(val, int | torch.SymInt) else argument

    return map_arg(node.args, settle), map_arg(node.kwargs, settle)


@dataclass
class Pass:
    """One pass over a graph.

    Args:
        program: the exported network, with sizes that are numbers.
        units: where labels come from.
        values: what is known of each node so far.
        parameters: the value of each parameter and buffer, under the name in ``state_dict``.
        names: the node of each parameter and buffer.
        constants: tensors that the graph knows, by node.
        left: operators without a rule, and where.
        groups: convolutions of which whole groups are units.
        equal: labels of parts that must stay as large as each other.
    """

    program: ExportedProgram
    units: Units
    values: dict[Node, Made] = field(default_factory=dict)
    parameters: dict[str, Value] = field(default_factory=dict)
    names: dict[Node, str] = field(default_factory=dict)
    constants: dict[Node, Tensor] = field(default_factory=dict)
    left: dict[Node, str] = field(default_factory=dict)
    groups: set[Node] = field(default_factory=set)
    equal: list[list[Tensor]] = field(default_factory=list)

    def run(self) -> None:
        """Label every value; what leaves the network stays."""
        self._inputs()
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self.values[node] = self._apply(node)
            elif node.op == "output":
                for value in self.of(node.all_input_nodes):
                    self.freeze(value, "it is an output of the network")
        for node, name in self.names.items():
            if not node.users and not any(
                n.users for n, other in self.names.items() if self.values[n] is self.values[node]
            ):
                self.freeze(self.parameters[name], "the network does not read it in evaluation mode")
        for parts in self.equal:
            for part in parts[1:]:
                self.units.unite(part, parts[0])
        self._settle()

    def _inputs(self) -> None:
        held = {**self.program.state_dict, **self.program.constants}
        kinds = (InputKind.PARAMETER, InputKind.BUFFER)
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        by_tensor: dict[int, Value] = {}
        for node in self.program.graph.nodes:
            if node.op != "placeholder":
                continue
            spec = specs[node.name]
            val = node.meta.get("val")
            if not isinstance(val, Tensor):
                self.values[node] = None
                continue
            value = Value(shape_of(node))
            tensor = held.get(str(spec.target))
            if spec.kind in kinds:
                if tensor is not None and id(tensor) in by_tensor:
                    value = by_tensor[id(tensor)]
                elif val.is_floating_point() or val.is_complex():  # numbers of places have no units
                    value = self.own(value.shape)
                    if tensor is not None:
                        by_tensor[id(tensor)] = value
                self.parameters[str(spec.target)] = value
                self.names[node] = str(spec.target)
            if tensor is not None and isinstance(tensor, Tensor):
                self.constants[node] = tensor
            self.values[node] = value

    def own(self, shape: Sequence[int]) -> Value:
        """A value with labels of its own along every dimension."""
        made = [along(self.units.fresh(n), d, len(shape)) for d, n in enumerate(shape) if n > 1]
        return Value(tuple(shape), made)

    def _apply(self, node: Node) -> Made:
        name, val = op_name(node), node.meta.get("val")
        if not isinstance(val, Tensor | list | tuple):
            return None  # a size, or nothing
        found = RULES.get(name)
        if found is None and name.endswith("_") and not name.startswith("_"):
            found = RULES.get(name[:-1])
        if found is not None:
            return found(self, node)
        return self.unknown(node, f"no rule for {name}")

    def unknown(self, node: Node, why: str) -> Made:
        """Freeze what flows into an operator; what comes out has no labels."""
        labelled = False
        for value in self.of(node.all_input_nodes):
            labelled = labelled or not all(self.units.soft(layer) for layer in value.layers)
            self.freeze(value, why)
        if labelled:
            self.left[node] = why
        return self.plain(node)

    def plain(self, node: Node) -> Made:
        """Values without labels for what a node gives."""
        val = node.meta.get("val")
        if isinstance(val, Tensor):
            return Value(sizes_of(val))
        if isinstance(val, list | tuple):
            return [Value(sizes_of(v)) if isinstance(v, Tensor) else None for v in val]
        return None

    def freeze(self, value: Value, why: str, dims: Iterable[int] | None = None) -> None:
        """Units with labels of this value stay; with ``dims`` only those that vary along one of them."""
        for layer in value.layers:
            if dims is None or any(layer.shape[d] > 1 for d in dims):
                self.units.freeze(layer, why)

    def of(self, nodes: Iterable[Any]) -> list[Value]:
        """The values of nodes that are tensors."""
        found: list[Value] = []
        for node in nodes:
            value = self.values.get(node) if isinstance(node, Node) else None
            found += [v for v in value if v] if isinstance(value, list) else [value] if value else []
        return found

    def value(self, thing: Any) -> Value | None:
        """The value of an argument; None for what is no tensor."""
        found = self.values.get(thing) if isinstance(thing, Node) else None
        return found if isinstance(found, Value) else None

    def join(
        self, node: Node, labelled: Sequence[Tensor], fixed: bool, dim: int, dims: int, why: str = ""
    ) -> list[Tensor]:
        """Unite the labels that meet along a dimension, or freeze them where something of fixed size is there too."""
        if fixed:
            for labels in labelled:
                self.units.freeze(labels, why or f"it meets a dimension of fixed size in {op_name(node)}")
            return []
        for labels in labelled[1:]:
            self.units.unite(labels, labelled[0])
        return [along(labelled[0], dim, dims)] if labelled else []

    def _settle(self) -> None:
        """Unite labels until what is left of every value is a box again, however units are chosen."""
        for _ in range(8):
            changed = False
            for made in self.values.values():
                for value in made if isinstance(made, list) else [made]:
                    if value is None:
                        continue
                    before = [varied(compress(self.units.find(layer))) for layer in value.layers]
                    if any(len(dims) != 1 for dims in before) or len({tuple(d) for d in before}) < len(before):
                        sizes = {d: value.shape[d] for dims in before for d in dims}
                        wide = max(sizes, key=lambda d: sizes[d]) if sizes else None
                        decide(self.units, value, prefer=wide)
                        changed = True
            if not changed:
                break
        for made in self.values.values():
            for value in made if isinstance(made, list) else [made]:
                if value is not None:
                    value.layers = [x for x in (compress(self.units.find(v)) for v in value.layers) if varied(x)]


def meet(run: Pass, node: Node, values: Sequence[Value], shape: tuple[int, ...], why: str = "") -> Value:
    """Element by element: labels at the same place go together; the result has them too.

    Along a dimension where one value has labels and another has none, nothing can go.
    """
    made = Value(shape)
    for value in values:
        decide(run.units, value)
    for d in range(len(shape)):
        labelled: list[Tensor] = []
        fixed = False
        for value in values:
            own = d - (len(shape) - value.dim)
            if own < 0 or value.shape[own] != shape[d] or shape[d] == 1:
                continue
            labels = vector(value, own)
            if labels is not None:
                labelled.append(labels)
            else:
                fixed = True
        made.layers += run.join(node, labelled, fixed, d, len(shape), why)
    return made


def contract(run: Pass, node: Node, operands: Sequence[tuple[Value, str]], out: str, shape: tuple[int, ...]) -> Value:
    """A sum of products in Einstein's notation: indices with one letter go together."""
    made = Value(shape)
    for value, _ in operands:
        decide(run.units, value)
    for letter in dict.fromkeys("".join(letters for _, letters in operands)):
        labelled, fixed = [], False
        for value, letters in operands:
            if letter not in letters:
                continue
            d = letters.index(letter)
            if letters.count(letter) > 1:
                run.freeze(value, "a diagonal is taken of it", [i for i, c in enumerate(letters) if c == letter])
                fixed = True
                continue
            if value.shape[d] == 1:
                continue
            labels = vector(value, d)
            if labels is not None:
                labelled.append(labels)
            else:
                fixed = True
        place = out.find(letter)
        found = run.join(node, labelled, fixed, max(place, 0), len(shape))
        made.layers += found if place >= 0 else []
    return made


def moved(run: Pass, node: Node, value: Value, shape: tuple[int, ...], move: Callable[[Tensor], Tensor]) -> Value:
    """What a movement of elements makes of the labels: torch moves the labels as it moves the elements."""
    layers = []
    for layer in value.layers:
        done = compress(move(spread(layer, value.shape)))
        if varied(done):
            layers.append(done)
        elif done.numel():
            run.units.freeze(done, f"it is picked out by itself in {op_name(node)}")
    if op_name(node) in ("expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave"):
        before = (1,) * (len(shape) - value.dim) + value.shape
        grown = [d for d, (one, other) in enumerate(zip(before, shape, strict=True)) if one == 1 < other]
        layers += [along(run.units.fresh(shape[d], soft=True), d, len(shape)) for d in grown]
    return Value(shape, layers)
