"""The graph that capture makes, a plan file carries and the native core or the NumPy reference runs.

The contract is docs/decisions/006-runtime-graph.md. A graph that exists is sound in all but its
shapes: every name is known before it is read, every operator has its attributes and weights, and nothing else.
Shapes depend on the batch; see :func:`secateur.runtime.shapes.infer`.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.core.errors import ModelError, nearest
from secateur.runtime.operators import LARGEST, MAX_RANK, OPS, integers, roles

DTYPES = ("f32", "i64")
STORES = ("f32", "f16", "bf16", "i8", "bitmask")
NAME_BYTES = 256
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


class GraphError(ModelError):
    """A graph that breaks the contract: the message names the node, input or weight."""


@dataclass(frozen=True)
class InputSpec:
    """One input of the network; a first dimension of 0 is the batch."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        _name(self.name, "an input")
        where = f"input {self.name!r}"
        if self.dtype not in DTYPES:
            raise GraphError(f"{where} has dtype {_short(self.dtype)}; write one of {', '.join(DTYPES)}.")
        object.__setattr__(self, "shape", _shape(self.shape, where, batch=True))

    @property
    def batched(self) -> bool:
        """Whether the first dimension is the batch."""
        return self.shape[:1] == (0,)


@dataclass(frozen=True)
class WeightSpec:
    """Shape of a weight and how a file stores it; its numbers live in a dict beside the graph."""

    shape: tuple[int, ...]
    store: str = "f32"

    def __post_init__(self) -> None:
        if self.store not in STORES:
            raise GraphError(f"a weight has store {_short(self.store)}; write one of {', '.join(STORES)}.")
        object.__setattr__(self, "shape", _shape(self.shape, "a weight", batch=False))
        if self.store == "i8" and not self.shape:
            raise GraphError(
                "a weight without dimensions has store i8, which has a scale for each row; store it as f32."
            )

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True)
class Node:
    """One operator: reads values and weights, makes values. Lists in ``attrs`` are kept as tuples.

    Attributes:
        op: A name of :data:`secateur.runtime.operators.OPS`.
        name: Unique in the graph; errors and measurements use it.
        inputs: Names of values, in the operator's order.
        outputs: Names of the values it makes.
        weights: Role to name of a weight of the graph.
        attrs: Every attribute of the operator.
    """

    op: str
    name: str
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    weights: Mapping[str, str] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _name(self.name, "a node")
        if self.op not in OPS:
            raise GraphError(f"node {self.name!r} has the unknown operator {_short(self.op)}. {_near(self.op, OPS)}")
        spec = OPS[self.op]
        count = len(self.inputs)
        if count not in spec.inputs if spec.inputs is not None else not count:
            wanted = "at least 1" if spec.inputs is None else " or ".join(map(str, spec.inputs))
            raise GraphError(f"{self.where} reads {count} values; {self.op} reads {wanted}.")
        if len(self.outputs) != spec.outputs:
            raise GraphError(f"{self.where} makes {len(self.outputs)} values; {self.op} makes {spec.outputs}.")
        for name in (*self.inputs, *self.outputs):
            _name(name, f"a value of {self.where}")
        object.__setattr__(self, "attrs", _attributes(self))
        object.__setattr__(self, "weights", dict(self.weights))
        _check_roles(self)

    @property
    def where(self) -> str:
        """The node as errors name it."""
        return f"node {self.name!r} ({self.op})"


@dataclass(frozen=True)
class Graph:
    """A whole network.

    Attributes:
        inputs: At least one.
        outputs: Names of values of type f32.
        weights: Name to shape and store.
        nodes: In an order in which every value exists before it is read.
    """

    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, WeightSpec]
    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", dict(self.weights))
        if not self.inputs or not self.outputs:
            raise GraphError("a graph needs at least one input and one output.")
        for name in self.weights:
            _name(name, "a weight")
        dtypes: dict[str, str] = {}
        for spec in self.inputs:
            _assign(dtypes, spec.name, spec.dtype, "input")
        names: set[str] = set()
        for node in self.nodes:
            if node.name in names:
                raise GraphError(f"two nodes are called {node.name!r}; rename one.")
            names.add(node.name)
            _check_links(self, node, dtypes)
        for name in self.outputs:
            if dtypes.get(name) != "f32":
                raise GraphError(f"output {_short(name)} is not a value of type f32 that the graph makes.")

    @property
    def batched(self) -> bool:
        """Whether some input has the batch as its first dimension."""
        return any(spec.batched for spec in self.inputs)

    def to_json(self) -> str:
        """The graph as one line of JSON, the same for equal graphs."""
        table = {
            "inputs": [{"name": i.name, "dtype": i.dtype, "shape": i.shape} for i in self.inputs],
            "outputs": self.outputs,
            "weights": {name: {"shape": w.shape, "store": w.store} for name, w in sorted(self.weights.items())},
            "nodes": [_node_table(node) for node in self.nodes],
        }
        return json.dumps(table, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Graph:
        """Read what :meth:`to_json` wrote.

        Raises:
            GraphError: not JSON, an unknown or missing field, or anything that breaks the contract.
        """
        table = _fields(parse(text, "the graph"), "the graph", "inputs", "outputs", "weights", "nodes")
        weights = _table(table["weights"], "the graph's weights")
        return Graph(
            tuple(_read_input(entry) for entry in _list(table["inputs"], "the graph's inputs")),
            _names(table["outputs"], "the graph's outputs"),
            {name: _read_weight(entry, f"weight {_short(name)}") for name, entry in weights.items()},
            tuple(_read_node(entry) for entry in _list(table["nodes"], "the graph's nodes")),
        )


def parse(text: str, what: str) -> Any:
    """JSON with every liberty refused: no key twice, no NaN, no depth that exhausts the stack.

    Raises:
        GraphError: ``text`` is anything else.
    """

    def once(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(entries)
        if len(table) != len(entries):
            raise ValueError("a key occurs twice")
        return table

    def constant(word: str) -> Any:
        raise ValueError(f"{word} is no number of JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise GraphError(f"{what} is not sound JSON ({error or 'nested too deeply'}).") from error


def _attributes(node: Node) -> dict[str, Any]:
    wanted = OPS[node.op].attrs
    for name in node.attrs:
        if name not in wanted:
            raise GraphError(f"{node.where} has the unknown attribute {_short(name)}. {_near(name, wanted)}")
    kept = {}
    for name, check in wanted.items():
        if name not in node.attrs:
            raise GraphError(f"{node.where} lacks the attribute {name!r}.")
        try:
            kept[name] = check(node.attrs[name])
        except ValueError as error:
            raise GraphError(f"{node.where}: {name} is {_short(node.attrs[name])}; expected {error}.") from None
    return kept


def _check_roles(node: Node) -> None:
    try:
        required, optional = roles(node.op, node.attrs, len(node.weights))
    except ValueError as error:
        raise GraphError(f"{node.where}: {error}.") from None
    for role in required:
        if role not in node.weights:
            raise GraphError(f"{node.where} lacks the weight {role!r}.")
    for role in node.weights:
        if role not in required and role not in optional:
            raise GraphError(
                f"{node.where} has the unknown weight {_short(role)}. {_near(role, (*required, *optional))}"
            )


def _check_links(graph: Graph, node: Node, dtypes: dict[str, str]) -> None:
    """Check what ties a node to the rest of the graph, and add its values to ``dtypes``."""
    reads = OPS[node.op].reads
    for name in node.inputs:
        if name not in dtypes:
            raise GraphError(f"{node.where} reads {_short(name)}, which no input or earlier node makes.")
        if dtypes[name] != reads:
            raise GraphError(f"{node.where} reads {_short(name)} of type {dtypes[name]}; {node.op} reads {reads}.")
    for role, name in node.weights.items():
        if name not in graph.weights:
            raise GraphError(f"{node.where}: its {role} is {_short(name)}, which is no weight of the graph.")
    if node.op in ("reshape", "expand") and 0 in node.attrs["shape"] and not graph.batched:
        raise GraphError(f"{node.where} writes 0 for the batch, and no input has one.")
    for name in node.outputs:
        _assign(dtypes, name, "f32", node.where)


def _assign(dtypes: dict[str, str], name: str, dtype: str, where: str) -> None:
    if name in dtypes:
        raise GraphError(f"{where} makes {_short(name)}, which exists already; each value is made once.")
    dtypes[name] = dtype


def _node_table(node: Node) -> dict[str, Any]:
    table: dict[str, Any] = {"op": node.op, "name": node.name, "in": node.inputs, "out": node.outputs}
    return table | {"weights": dict(sorted(node.weights.items())), "attrs": dict(sorted(node.attrs.items()))}


def _read_input(entry: Any) -> InputSpec:
    table = _fields(entry, "an input", "name", "dtype", "shape")
    name = _text(table["name"], "the name of an input")
    where = f"input {_short(name)}"
    return InputSpec(name, _text(table["dtype"], f"the dtype of {where}"), _shape(table["shape"], where, batch=True))


def _read_weight(entry: Any, where: str) -> WeightSpec:
    table = _fields(entry, where, "shape", "store")
    shape = _shape(table["shape"], where, batch=False)
    try:
        return WeightSpec(shape, _text(table["store"], f"the store of {where}"))
    except GraphError as error:
        raise GraphError(f"{where}: {error}") from None


def _read_node(entry: Any) -> Node:
    table = _fields(entry, "a node", "op", "name", "in", "out", "weights", "attrs")
    name = _text(table["name"], "the name of a node")
    where = f"node {_short(name)}"
    weights = _table(table["weights"], f"the weights of {where}")
    return Node(
        _text(table["op"], f"the operator of {where}"),
        name,
        _names(table["in"], f"what {where} reads"),
        _names(table["out"], f"what {where} makes"),
        {role: _text(weight, f"{_short(role)} of {where}") for role, weight in weights.items()},
        _table(table["attrs"], f"the attributes of {where}"),
    )


def _fields(entry: Any, what: str, *wanted: str) -> dict[str, Any]:
    table = _table(entry, what)
    for name in table:
        if name not in wanted:
            raise GraphError(f"{what} has the unknown field {_short(name)}. {_near(name, wanted)}")
    for name in wanted:
        if name not in table:
            raise GraphError(f"{what} lacks the field {name!r}.")
    return table


def _table(entry: Any, what: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise GraphError(f"{what} is {_short(entry)}; expected a JSON object.")
    return entry


def _list(entry: Any, what: str) -> list[Any]:
    if not isinstance(entry, list):
        raise GraphError(f"{what} is {_short(entry)}; expected a list.")
    return entry


def _text(entry: Any, what: str) -> str:
    if not isinstance(entry, str):
        raise GraphError(f"{what} is {_short(entry)}; expected a string.")
    return entry


def _names(entry: Any, what: str) -> tuple[str, ...]:
    return tuple(_text(name, f"an entry of {what}") for name in _list(entry, what))


def _name(name: str, what: str) -> None:
    """A name must survive as UTF-8, as a C string and in a line of an error."""
    size = len(name.encode("utf-8", "surrogatepass"))
    odd = any(letter < " " or letter == "\x7f" or "\ud800" <= letter <= "\udfff" for letter in name)
    if not 0 < size <= NAME_BYTES or odd:
        raise GraphError(
            f"{what} is called {_short(name)}; a name is 1 to {NAME_BYTES} bytes of UTF-8 without control characters."
        )


def _shape(shape: Any, where: str, batch: bool) -> tuple[int, ...]:
    try:
        kept = integers(0)(shape)
    except ValueError:
        kept = (-1,)
    if min(kept[1 if batch else 0 :], default=1) < 1 or kept[:1] == (-1,):
        first = ", the first 0 for the batch" if batch else ""
        raise GraphError(
            f"{where} has shape {_short(shape)}; expected at most {MAX_RANK} sizes from 1 to {LARGEST}{first}."
        )
    return kept


def _short(value: Any) -> str:
    """A value as an error shows it, never longer than a line."""
    return _SHORT.repr(value)


def _near(name: str, known: Any) -> str:
    return nearest(str(name)[:NAME_BYTES], known)
