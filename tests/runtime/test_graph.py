"""Graphs: what round-trips, and that nothing outside the contract is let in."""

import copy
import json
import random

import pytest

from secateur.runtime.graph import Graph, GraphError, InputSpec, Node, WeightSpec
from secateur.runtime.operators import OPS, roles
from secateur.runtime.shapes import infer

SOUND = {
    "act": "relu", "stride": [1, 2], "pad": [0, 1, 2, 3], "dilation": [1, 1], "groups": 1, "axis": 0, "kernel": [2, 3],
    "count_pad": True, "size": [3, 5], "axes": [0], "keepdims": False, "eps": 1e-5, "heads": 2, "scale": -0.5,
    "causal": True, "start": 0, "stop": 3, "step": 2, "shape": [0, -1], "dims": [1, 0], "value": -1.5, "hidden": 3,
    "layers": 2, "bidirectional": True, "batch_first": False,
}  # fmt: skip
FUNCTIONS = {"binary": "sub", "unary": "gelu", "reduce": "mean"}
NORMS = ("layer_norm", "rms_norm")

# Values that an attribute never takes, by the kind of its sound value; the integer ranges differ, so only their ends.
NEVER = [
    None, "", "no such word", {}, float("nan"), float("inf"), 1e39, -(2**200), [[]], ["1"], [True, False], [-2, 1],
    [1.5, 1],
]  # fmt: skip


def sound_attrs(op):
    attrs = {name: SOUND.get(name) for name in OPS[op].attrs}
    if op in FUNCTIONS:
        attrs["fn"] = FUNCTIONS[op]
    if op in NORMS:
        attrs["axes"] = 1
    if op == "pad":
        attrs["pad"] = [[0, 1], [2, 0]]
    return attrs


def one_node(op):
    """A graph of one node; its weights have no sensible shapes, which nothing here looks at."""
    attrs, spec = sound_attrs(op), OPS[op]
    given = 4 * attrs["layers"] * 2 if spec.gates else 0
    required, optional = roles(op, attrs, given)
    weights = {role: WeightSpec((1,)) for role in (*required, *optional)}
    inputs = tuple(InputSpec(f"x{at}", spec.reads, (0, 5)) for at in range(max(spec.inputs or (2,))))
    made = tuple(f"y{at}" for at in range(spec.outputs))
    node = Node(op, "n", tuple(i.name for i in inputs), made, {role: role for role in weights}, attrs)
    return Graph(inputs or (InputSpec("unread", "f32", (0, 5)),), made, weights, (node,))


def network():
    """Two nodes, two inputs, three weights."""
    conv = Node(
        "conv", "conv1", ("x",), ("t0",), {"weight": "conv1.weight", "bias": "conv1.bias"},
        {"stride": [1, 1], "pad": [1, 1, 1, 1], "dilation": [1, 1], "groups": 1, "act": "relu"},
    )  # fmt: skip
    return Graph(
        (InputSpec("x", "f32", (0, 3, 7, 5)), InputSpec("ids", "i64", (0, 2))),
        ("y", "t1"),
        {
            "conv1.weight": WeightSpec((5, 3, 3, 3), "bitmask"),
            "conv1.bias": WeightSpec((5,)),
            "table": WeightSpec((11, 4), "i8"),
        },
        (
            conv,
            Node("embedding", "words", ("ids",), ("t1",), {"weight": "table"}),
            Node("reshape", "flat", ("t0",), ("y",), attrs={"shape": [0, -1]}),
        ),
    )


def table():
    return json.loads(network().to_json())


def test_json_gives_the_graph_back():
    graph = network()
    assert Graph.from_json(graph.to_json()) == graph
    assert Graph.from_json(graph.to_json()).to_json() == graph.to_json()
    assert infer(graph, 7)["y"] == (7, 5 * 7 * 5)
    assert infer(graph, 7)["t1"] == (7, 2, 4)


def test_json_is_what_the_contract_says():
    first = table()["nodes"][0]
    assert first == {
        "op": "conv", "name": "conv1", "in": ["x"], "out": ["t0"],
        "weights": {"weight": "conv1.weight", "bias": "conv1.bias"},
        "attrs": {"stride": [1, 1], "pad": [1, 1, 1, 1], "dilation": [1, 1], "groups": 1, "act": "relu"},
    }  # fmt: skip
    assert table()["inputs"][0] == {"name": "x", "dtype": "f32", "shape": [0, 3, 7, 5]}
    assert table()["weights"]["conv1.weight"] == {"shape": [5, 3, 3, 3], "store": "bitmask"}
    assert table()["outputs"] == ["y", "t1"]


@pytest.mark.parametrize("op", OPS)
def test_each_operator_round_trips_and_keeps_its_types(op):
    graph = one_node(op)
    again = Graph.from_json(graph.to_json())
    assert again == graph
    for name, value in again.nodes[0].attrs.items():
        assert type(value) is type(graph.nodes[0].attrs[name])


@pytest.mark.parametrize("op", OPS)
def test_each_attribute_is_needed_and_checked(op):
    text = one_node(op).to_json()
    for name in OPS[op].attrs:
        for value in NEVER:
            changed = json.loads(text)
            changed["nodes"][0]["attrs"][name] = value
            with pytest.raises(GraphError, match=f"node 'n' \\({op}\\): {name} is|not sound JSON"):
                Graph.from_json(json.dumps(changed))
        changed = json.loads(text)
        del changed["nodes"][0]["attrs"][name]
        with pytest.raises(GraphError, match=f"lacks the attribute '{name}'"):
            Graph.from_json(json.dumps(changed))
    changed = json.loads(text)
    changed["nodes"][0]["attrs"]["other"] = 1
    with pytest.raises(GraphError, match="unknown attribute 'other'"):
        Graph.from_json(json.dumps(changed))


@pytest.mark.parametrize("op", OPS)
def test_each_weight_is_known_and_needed(op):
    text, spec = one_node(op).to_json(), OPS[op]
    changed = json.loads(text)
    roles_there = list(changed["nodes"][0]["weights"])
    for role in roles_there:
        changed = json.loads(text)
        del changed["nodes"][0]["weights"][role]
        if role in spec.optional:
            Graph.from_json(json.dumps(changed))
        else:
            with pytest.raises(GraphError, match="lacks the weight|weights where"):
                Graph.from_json(json.dumps(changed))
    changed = json.loads(text)
    changed["weights"]["more"] = {"shape": [1], "store": "f32"}
    changed["nodes"][0]["weights"]["more"] = "more"
    with pytest.raises(GraphError, match="unknown weight 'more'|weights where"):
        Graph.from_json(json.dumps(changed))


@pytest.mark.parametrize("op", OPS)
def test_each_operator_counts_what_it_reads_and_makes(op):
    spec = OPS[op]
    for count in range(6):
        changed = json.loads(one_node(op).to_json())
        node = changed["nodes"][0]
        node["in"] = [changed["inputs"][0]["name"]] * count
        if count in spec.inputs if spec.inputs is not None else count:
            Graph.from_json(json.dumps(changed))
        else:
            with pytest.raises(GraphError, match=f"reads {count} values"):
                Graph.from_json(json.dumps(changed))
    changed = json.loads(one_node(op).to_json())
    changed["nodes"][0]["out"].append("extra")
    with pytest.raises(GraphError, match=f"makes {spec.outputs + 1} values"):
        Graph.from_json(json.dumps(changed))


def places(entry, path=()):
    """Every place in a JSON table, but not the open-ended tables' own names."""
    yield path
    for key, value in entry.items() if isinstance(entry, dict) else enumerate(entry) if isinstance(entry, list) else ():
        yield from places(value, (*path, key))


def put(table, path, value):
    table = copy.deepcopy(table)
    entry = table
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    return table


@pytest.mark.parametrize("value", [None, 0.5, -1, "", [[[]]], {"a": {}}, 2**63, "\ud800", "a\0b", "x" * 257])
def test_nothing_can_be_replaced_by_nonsense(value):
    whole = table()
    for path in places(whole):
        if path and put(whole, path, value) != whole:
            with pytest.raises(GraphError):
                Graph.from_json(json.dumps(put(whole, path, value)))


@pytest.mark.parametrize("path", [(), ("inputs", 0), ("nodes", 0), ("weights", "table")])
def test_fields_are_all_known_and_all_there(path):
    whole = table()
    entry = whole
    for key in path:
        entry = entry[key]
    for name in list(entry):
        kept = entry.pop(name)
        with pytest.raises(GraphError, match=f"lacks the field '{name}'"):
            Graph.from_json(json.dumps(whole))
        entry[name] = kept
    entry["colour"] = 1
    with pytest.raises(GraphError, match="unknown field 'colour'"):
        Graph.from_json(json.dumps(whole))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("nodes", 0, "op"), "convolution", "unknown operator 'convolution'"),
        (("nodes", 0, "in", 0), "y", "no input or earlier node"),
        (("nodes", 0, "in", 0), "ids", "of type i64"),
        (("nodes", 1, "in", 0), "x", "embedding reads i64"),
        (("nodes", 0, "out", 0), "x", "exists already"),
        (("nodes", 2, "out", 0), "t1", "exists already"),
        (("nodes", 1, "name"), "conv1", "two nodes"),
        (("inputs", 1, "name"), "x", "exists already"),
        (("inputs", 0, "shape"), [0, 0, 7], "input 'x' has shape"),
        (("inputs", 0, "shape"), [1] * 9, "input 'x' has shape"),
        (("inputs", 0, "dtype"), "f64", "dtype 'f64'"),
        (("weights", "table", "shape"), [0, 4], "weight 'table' has shape"),
        (("weights", "table", "shape"), [], "store i8"),
        (("weights", "table", "store"), "f8", "weight 'table': .* store 'f8'"),
        (("nodes", 1, "weights", "weight"), "tables", "no weight of the graph"),
        (("outputs", 0), "z", "output 'z'"),
        (("outputs", 0), "ids", "output 'ids'"),
        (("outputs",), [], "at least one input and one output"),
        (("inputs",), [], "at least one input and one output"),
    ],
)
def test_links_that_do_not_hold_are_named(path, value, words):
    with pytest.raises(GraphError, match=words):
        Graph.from_json(json.dumps(put(table(), path, value)))


def test_zero_is_the_batch_only_where_there_is_one():
    fixed = [{"name": "x", "dtype": "f32", "shape": [2, 3, 7, 5]}, {"name": "ids", "dtype": "i64", "shape": [2, 2]}]
    with pytest.raises(GraphError, match="'flat' \\(reshape\\) writes 0 for the batch"):
        Graph.from_json(json.dumps(put(table(), ("inputs",), fixed)))
    changed = put(put(table(), ("inputs",), fixed), ("nodes", 2, "attrs", "shape"), [2, -1])
    graph = Graph.from_json(json.dumps(changed))
    assert infer(graph, 1) == infer(graph, 9)
    assert infer(graph)["y"] == (2, 5 * 7 * 5)


@pytest.mark.parametrize(
    "text",
    [
        "", "[", "null", "[]", "1", "nan", '{"a": 1, "a": 2}', '{"inputs": NaN}', '{"inputs": -Infinity}',
        "[" * 100_000, '{"a":' * 100_000, "1" * 5000, '"\ud800"',
    ],
)  # fmt: skip
def test_json_that_takes_liberties_is_refused(text):
    with pytest.raises(GraphError):
        Graph.from_json(text)


def test_many_layers_cost_nothing():
    changed = json.loads(one_node("lstm").to_json())
    changed["nodes"][0]["attrs"]["layers"] = 1024
    with pytest.raises(GraphError, match="1024 layers ask for 8192"):
        Graph.from_json(json.dumps(changed))


def test_the_limit_counts_elements():
    graph = network()
    padded = 3 * 3 * 9 * 7
    assert infer(graph, 3, limit=padded)
    with pytest.raises(GraphError, match=f"padded input .* limit is {padded - 1}"):
        infer(graph, 3, limit=padded - 1)
    for batch in (0, -1, 2**31):
        with pytest.raises(GraphError, match="batch of"):
            infer(graph, batch)


def test_edited_text_gives_a_graph_or_the_error():
    text, source = network().to_json(), random.Random(7)
    tokens = ["0", "-1", "1e400", "true", "null", '"', "[", "]", "{", "}", ",", ":", "x", "\\u0000", "9" * 20]
    loaded = 0
    for _ in range(600):
        at, width = source.randrange(len(text)), source.choice([0, 1, 1, 2, 9])
        changed = text[:at] + source.choice(tokens) + text[at + width :]
        try:
            loaded += Graph.from_json(changed).to_json() != text
        except GraphError as error:
            assert len(str(error)) < 2000
    assert loaded > 0
