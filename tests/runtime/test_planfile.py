"""Plan files: every bit comes back, and whatever a file holds is loaded soundly or refused clearly."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from secateur.core.errors import DataError, SecateurError
from secateur.runtime.graph import Graph, GraphError, InputSpec, Node, WeightSpec
from secateur.runtime.planfile import RuntimeFileError, read, write
from secateur.runtime.reference import Reference
from secateur.runtime.shapes import infer

ODD = np.array(
    [0x00000000, 0x80000001, 0x00000001, 0x7F800000, 0xFF800000, 0x7FC00001, 0x3F800001, 0x7F7FFFFF, 0x7FFFFFFF],
    dtype=np.uint32,
).view(np.float32)  # zero, subnormals, infinities, NaN with payloads, and numbers that need all their bits


def sparse(shape, density, seed=0):
    source = np.random.default_rng(seed)
    dense = source.standard_normal(shape).astype(np.float32)
    return np.where(source.random(shape) < density, dense, np.float32(0))


def network(**stores):
    """x [batch, 7] through two linear layers, an added constant and a convolution over one row."""
    shapes = {"first": (13, 7), "second": (11, 13), "bias": (11,), "added": (11,), "kernel": (3, 11, 1, 1)}
    act = {"act": "none"}
    conv = {"stride": [1, 1], "pad": [0, 0, 0, 0], "dilation": [1, 1], "groups": 1}
    nodes = (
        Node("linear", "a", ("x",), ("t0",), {"weight": "first"}, {"act": "relu"}),
        Node("linear", "b", ("t0",), ("t1",), {"weight": "second", "bias": "bias"}, act),
        Node("const", "c", (), ("t2",), {"value": "added"}),
        Node("binary", "d", ("t1", "t2"), ("t3",), attrs={"fn": "add"} | act),
        Node("reshape", "e", ("t3",), ("t4",), attrs={"shape": [0, 11, 1, 1]}),
        Node("conv", "f", ("t4",), ("y",), {"weight": "kernel"}, conv | act),
    )
    weights = {name: WeightSpec(shape, stores.get(name, "f32")) for name, shape in shapes.items()}
    return Graph((InputSpec("x", "f32", (0, 7)),), ("y",), weights, nodes)


def numbers():
    density = {"first": 0.1, "second": 0.5, "bias": 1.0, "added": 1.0, "kernel": 1.0}
    specs = network().weights
    return {name: sparse(spec.shape, density[name], at) for at, (name, spec) in enumerate(specs.items())}


def one_weight(shape, store):
    node = Node("const", "c", (), ("y",), {"value": "w"})
    return Graph((InputSpec("x", "f32", (0, 1)),), ("y",), {"w": WeightSpec(shape, store)}, (node,))


def bits(array):
    assert array.dtype == np.float32
    return array.view(np.uint32)


def after(path, array, store):
    """The weight, its store and the file's tensors, by the format's own library, after a round trip."""
    stored = write(path, one_weight(array.shape, store), {"w": array})
    graph, weights = read(path)
    assert graph == stored
    return weights["w"], graph.weights["w"].store, load_tensors(path.read_bytes())


def test_a_network_comes_back_and_computes_the_same(tmp_path):
    path, graph, weights = tmp_path / "plan.safetensors", network(second="bitmask"), numbers()
    stored = write(path, graph, weights)
    again, found = read(path)
    assert again == stored
    assert (again.nodes, again.inputs, again.outputs) == (graph.nodes, graph.inputs, graph.outputs)
    for name, array in weights.items():
        assert np.array_equal(bits(found[name]), bits(array))
    x = np.random.default_rng(5).standard_normal((3, 7)).astype(np.float32)
    assert np.array_equal(Reference(again, found)(x)[0], Reference(graph, weights)(x)[0])
    content = path.read_bytes()
    write(path, again, found)
    assert path.read_bytes() == content
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (9,), (3, 5, 2), (1, 1, 1, 1, 1, 1, 1, 17)])
@pytest.mark.parametrize("store", ["f32", "bitmask"])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_float32_comes_back_to_the_bit(tmp_path, shape, store, density):
    array = np.asarray(sparse(shape, density), np.float32)
    found, _, _ = after(tmp_path / "p", array, store)
    assert found.shape == shape
    assert np.array_equal(bits(found), bits(array))


@pytest.mark.parametrize("store", ["f32", "bitmask"])
def test_odd_numbers_come_back_to_the_bit(tmp_path, store):
    array = np.concatenate([ODD, np.zeros(3000, np.float32), ODD])
    found, kept, _ = after(tmp_path / "p", array, store)
    assert kept == "bitmask"
    assert np.array_equal(bits(found), bits(array))


def test_minus_zero_is_a_zero_that_was_cut(tmp_path):
    """Weights times a mask hold minus zeros; a bitmask that kept them would not be smaller."""
    dense = sparse((256, 256), 1.0)
    array = dense * (np.abs(dense) > 1.6)
    assert np.signbit(array[array == 0]).any()
    found, store, tensors = after(tmp_path / "p", array, "f32")
    assert store == "bitmask"
    assert len(tensors["w.values"]) == np.count_nonzero(array)
    assert np.array_equal(bits(found), bits(array + np.float32(0)))
    small = np.array([-0.0, 1.0], np.float32)
    assert np.array_equal(bits(after(tmp_path / "p", small, "f32")[0]), bits(small))  # as it is where it is kept whole


def test_bitmask_as_the_page_defines_it(tmp_path):
    array = sparse((37, 29), 0.1)
    _, _, tensors = after(tmp_path / "p", array, "f32")
    assert set(tensors) == {"w.bits", "w.values"}
    assert tensors["w.bits"].dtype == torch.uint8
    assert len(tensors["w.bits"]) == -(-37 * 29 // 8)
    for at, number in enumerate(array.reshape(-1)):
        assert (int(tensors["w.bits"][at // 8]) >> (at % 8) & 1) == (number != 0)
    assert tensors["w.values"].tolist() == array[array != 0].tolist()


@pytest.mark.parametrize(("store", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("density", [0.05, 1.0])
def test_short_types_round_as_torch_does(tmp_path, store, dtype, density):
    array = sparse((61, 53), density)
    array[3, :4] = [65519.0 if store == "f16" else 3.38e38, -1e-7, 1e-7, np.inf]
    array[5, :2] = [1.0 + 2.0**-9 + 2.0**-23, 1.0 + 2.0**-11]  # just above, and on, the middle of two neighbours
    found, kept, tensors = after(tmp_path / "p", array, store)
    wanted = torch.from_numpy(array).to(dtype)
    assert np.array_equal(bits(found), bits(wanted.float().numpy()))
    assert kept == (store if density == 1.0 else "bitmask")
    if kept == store:
        assert torch.equal(tensors["w"].view(torch.int16), wanted.view(torch.int16))


def test_nan_stays_nan_in_short_types(tmp_path):
    array = np.concatenate([bits(ODD), np.array([0x7F800001, 0xFFFFFFFF], np.uint32)]).view(np.float32)
    finite = np.where(np.abs(array) < 3e38, array, np.float32(1))
    for store in ("f16", "bf16"):
        found, _, _ = after(tmp_path / "p", np.where(np.isfinite(array), finite, array), store)
        assert np.array_equal(np.isnan(found), np.isnan(array))
        assert np.array_equal(np.isinf(found), np.isinf(array))


def test_values_are_of_the_shortest_exact_type(tmp_path):
    whole = sparse((64, 64), 0.1)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        array = torch.from_numpy(whole).to(dtype).float().numpy()
        found, _, tensors = after(tmp_path / "p", array, "f32")
        assert tensors["w.values"].dtype == dtype
        assert np.array_equal(bits(found), bits(array))


def test_i8_is_near_keeps_zeros_and_does_not_drift(tmp_path):
    path = tmp_path / "p"
    array = sparse((31, 17, 3), 0.4) * np.logspace(-30, 30, 31, dtype=np.float32).reshape(31, 1, 1)
    array[7] = 0
    array[8] = 1e-44
    found, kept, tensors = after(path, array, "i8")
    assert kept == "i8"
    assert tensors["w"].dtype == torch.int8
    scale = tensors["w.scale"].numpy()
    wanted = tensors["w"].numpy().astype(np.float32) * scale.reshape(31, 1, 1)
    assert np.array_equal(bits(found), bits(wanted))
    assert np.all(np.abs(found - array) <= 0.5001 * scale.reshape(31, 1, 1))
    assert np.all(np.delete(scale, [7, 8]) <= np.abs(np.delete(array, [7, 8], 0)).max((1, 2)) / 126.9)
    assert not found[array == 0].any()
    content = path.read_bytes()
    write(path, one_weight(array.shape, "i8"), {"w": found})
    assert path.read_bytes() == content


def test_ninety_percent_zeros_take_a_seventh(tmp_path):
    array = sparse((512, 1024), 0.1) * np.float32(1 / 3)  # needs all the bits of a float32
    _, store, _ = after(tmp_path / "p", array, "f32")
    assert store == "bitmask"
    assert (tmp_path / "p").stat().st_size <= 0.14 * array.nbytes


def test_bitmask_only_where_it_is_smaller(tmp_path):
    for density, wanted in ((0.9, "bitmask"), (1.0, "f32")):
        assert after(tmp_path / "p", sparse((256, 256), density), "f32")[1] == wanted
    assert after(tmp_path / "p", np.zeros(20, np.float32), "f32")[1] == "f32"  # the second tensor's entry costs more


@pytest.mark.parametrize(("number", "store"), [(65520.0, "f16"), (3.4e38, "bf16"), (np.inf, "i8"), (np.nan, "i8")])
def test_numbers_that_a_store_cannot_hold_are_refused(tmp_path, number, store):
    with pytest.raises(DataError, match=f"weight 'w' .*{store}.*store it as f32"):
        write(tmp_path / "p", one_weight((2,), store), {"w": np.array([1.0, number], np.float32)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({}, "'w' is missing"),
        ({"w": np.zeros(3, np.float32)}, "shape \\[3\\]"),
        ({"w": np.zeros(2, np.int64)}, "int64"),
        ({"w": np.zeros(2, np.float32), "v": np.zeros(2, np.float32)}, "'v' does not belong"),
        ({"w": np.array([1.0, 1e300])}, "1e\\+300"),
    ],
)
def test_weights_that_do_not_belong_are_refused(tmp_path, weights, words):
    with pytest.raises(DataError, match=words):
        write(tmp_path / "p", one_weight((2,), "f32"), weights)


def test_a_write_that_fails_leaves_nothing(tmp_path):
    graph, weights = one_weight((2,), "f32"), {"w": np.ones(2, np.float32)}
    (tmp_path / "folder").mkdir()
    with pytest.raises(RuntimeFileError, match="cannot write"):
        write(tmp_path / "folder", graph, weights)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(RuntimeFileError, match="cannot write"):
        write(tmp_path / "file" / "p", graph, weights)
    with pytest.raises(DataError):
        write(tmp_path / "file", one_weight((2,), "i8"), {"w": np.array([1.0, np.nan], np.float32)})
    assert (tmp_path / "file").read_bytes() == b"kept"


@pytest.mark.parametrize("name", ["__metadata__", "w.scale"])
def test_names_that_the_file_needs_are_refused(tmp_path, name):
    nodes = (Node("const", "c", (), ("y",), {"value": "w"}), Node("const", "d", (), ("z",), {"value": name}))
    specs = {"w": WeightSpec((2,), "i8"), name: WeightSpec((2,))}
    graph = Graph((InputSpec("x", "f32", (0, 1)),), ("y",), specs, nodes)
    with pytest.raises(GraphError, match="already taken"):
        write(tmp_path / "p", graph, {key: np.ones(2, np.float32) for key in specs})


# --- files that somebody else made ---


def forged(path, graph, tensors, metadata):
    """A file that is sound as safetensors, whatever it says."""
    said = {"format": "secateur-plan", "version": "1", "graph": graph if isinstance(graph, str) else graph.to_json()}
    content = save_tensors(tensors, {key: value for key, value in (said | metadata).items() if value is not None})
    path.write_bytes(content)
    return path


def packed(*places, size=2):
    return torch.tensor(np.packbits(np.isin(np.arange(8 * size), places), bitorder="little"))


BITMASK, F32 = one_weight((11,), "bitmask"), one_weight((11,), "f32")
I8, EIGHT = one_weight((2, 2), "i8"), torch.ones(2, 2, dtype=torch.int8)
FORGED = [
    (BITMASK, {"w.bits": packed(1, 5), "w.values": torch.ones(3)}, {}, "2 bits are set and 3 values"),
    (BITMASK, {"w.bits": packed(1, 11), "w.values": torch.ones(2)}, {}, "a bit past the last of its 11"),
    (BITMASK, {"w.bits": packed(1, size=1), "w.values": torch.ones(1)}, {}, "has shape \\[1\\]; expected \\[2\\]"),
    (BITMASK, {"w.bits": packed(1), "w.values": torch.ones(1, 1)}, {}, "expected one dimension"),
    (BITMASK, {"w.bits": packed(1).to(torch.int8), "w.values": torch.ones(1)}, {}, "is I8; expected U8"),
    (BITMASK, {"w.bits": packed(1), "w.values": torch.ones(1, dtype=torch.int8)}, {}, "expected F32 or F16 or BF16"),
    (BITMASK, {"w.bits": packed(1)}, {}, "no tensor 'w.values'"),
    (BITMASK, {"w": torch.ones(11)}, {}, "no tensor 'w.bits'"),
    (F32, {"w": torch.ones(12)}, {}, "has shape \\[12\\]"),
    (F32, {"w": torch.ones(11).half()}, {}, "is F16; expected F32"),
    (F32, {"w": torch.ones(11).double()}, {}, "of a type that no plan uses"),
    (F32, {"w": torch.ones(11), "v": torch.ones(1)}, {}, "tensor 'v' belongs to no weight"),
    (F32, {}, {}, "no tensor 'w'"),
    (
        one_weight((2, 2), "i8"),
        {"w": torch.ones(2, 2, dtype=torch.int8), "w.scale": torch.ones(3)},
        {},
        "'w.scale' has",
    ),
    (
        one_weight((1, 2), "i8"),
        {"w": torch.ones(1, 2, dtype=torch.int8), "w.scale": torch.tensor([float("inf")])},
        {},
        "not finite",
    ),
    (F32, {"w": torch.ones(11)}, {"format": "other"}, "format secateur-plan"),
    (F32, {"w": torch.ones(11)}, {"version": "2"}, "version '2'; this release reads 1"),
    (F32, {"w": torch.ones(11)}, {"graph": None}, "no graph"),
    ("{}", {}, {}, "lacks the field 'inputs'"),
    (one_weight((2**31 - 1, 2**10), "bitmask"), {"w.bits": packed(1), "w.values": torch.ones(1)}, {}, "the limit is"),
    (one_weight((2**30,), "f32"), {"w": torch.ones(11)}, {}, "has shape \\[11\\]"),
]


@pytest.mark.parametrize(("graph", "tensors", "metadata", "words"), FORGED)
def test_forged_files_are_refused(tmp_path, graph, tensors, metadata, words):
    path = forged(tmp_path / "p", graph, tensors, metadata)
    with pytest.raises(RuntimeFileError, match=f"{path} is not a sound plan: .*{words}"):
        read(path)


def test_what_the_forger_writes_soundly_is_read(tmp_path):
    values = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    path = forged(tmp_path / "p", BITMASK, {"w.bits": packed(1, 9), "w.values": values}, {"made_by": "somebody"})
    expected = [0, 1.5, 0, 0, 0, 0, 0, 0, 0, -2.0, 0]
    assert read(path)[1]["w"].tolist() == expected
    with pytest.raises(RuntimeFileError, match="11 numbers; the limit is 10"):
        read(path, limit=10)


def test_two_weights_cannot_share_a_tensor(tmp_path):
    graph = json.loads(one_weight((1,), "bitmask").to_json())
    graph["weights"]["w.bits"] = {"shape": [1], "store": "f32"}
    path = forged(tmp_path / "p", json.dumps(graph), {"w.bits": packed(0, size=1), "w.values": torch.ones(1)}, {})
    with pytest.raises(RuntimeFileError, match="no tensor 'w.bits' of its own"):
        read(path)


def test_data_that_overlap_leave_a_gap_or_are_left_over_are_refused(tmp_path):
    path = tmp_path / "p"
    write(path, network(), numbers())
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    names = sorted((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    for edit in (-4, 4):
        changed = json.loads(json.dumps(header))
        for name in names[1:]:
            changed[name]["data_offsets"] = [offset + edit for offset in header[name]["data_offsets"]]
        text = json.dumps(changed).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:] + b"\0" * 4)
        with pytest.raises(RuntimeFileError, match="gap or overlap"):
            read(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(RuntimeFileError, match="the file holds"):
        read(path)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 7, b"\0" * 8, b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{}", b"PK\x03\x04" * 9]
)
def test_files_of_other_kinds_are_refused(tmp_path, content):
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(RuntimeFileError, match="is not a sound plan"):
        read(tmp_path / "p")


def test_no_file_is_refused(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(RuntimeFileError, match="is not a file"):
            read(path)


# --- files that were damaged ---


def flip(content, source):
    changed = bytearray(content)
    for _ in range(source.choice([1, 1, 2, 8])):
        changed[source.randrange(len(changed))] ^= 1 << source.randrange(8)
    return bytes(changed)


def cut(content, source):
    at, width = source.randrange(len(content)), source.choice([1, 4, 40, len(content)])
    return content[:at] + source.choice([b"", content[:width]]) + content[at + width :]


def retype(content, source):
    """Another character somewhere in the header, whose length stays right."""
    end = 8 + int.from_bytes(content[:8], "little")
    at = source.randrange(8, end)
    return content[:at] + source.choice('0123456789-.e"[]{},:x').encode() + content[at + 1 :]


def rewrite(content, source):
    """Another value somewhere in the header or the graph within it, as sound JSON."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    graph = json.loads(header["__metadata__"]["graph"])
    _edit(source.choice([header, graph, graph, graph]), source)
    if isinstance(header.get("__metadata__"), dict) and "graph" in header["__metadata__"]:
        header["__metadata__"]["graph"] = json.dumps(graph)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[end:]


NUMBERS = [-1, 0, 1, 2, 3, 7, 2**20, 2**31 - 1, 2**63, 1e30]
ODD_VALUES = [*NUMBERS, True, None, "", "x", "t1", "f32", "bitmask", [], {}, [1, 1]]


def _edit(entry, source):
    while True:
        keys = list(entry) if isinstance(entry, dict) else range(len(entry))
        if not keys:
            return
        key = source.choice(keys)
        if isinstance(entry[key], dict | list) and source.random() < 0.8:
            entry = entry[key]
            continue
        if source.random() < 0.2:
            del entry[key]
        else:
            entry[key] = source.choice(ODD_VALUES)
        return


@pytest.mark.parametrize("damage", [flip, cut, retype, rewrite])
def test_damaged_files_load_soundly_or_are_refused(tmp_path, damage):
    path, source = tmp_path / "p", random.Random(damage.__name__)
    write(path, network(second="bf16", bias="f16", kernel="i8"), numbers())
    content = path.read_bytes()
    assert read(path)[0].weights["first"].store == "bitmask"
    x = np.ones((2, 7), np.float32)
    loaded = refused = 0
    for _ in range(500):
        path.write_bytes(damage(content, source))
        try:
            graph, weights = read(path)
        except RuntimeFileError as error:
            refused += 1
            assert str(error).startswith(f"{path} is not a sound plan: ") and len(str(error)) < 2000
            continue
        loaded += 1
        assert Graph.from_json(graph.to_json()) == graph
        assert {name: array.shape for name, array in weights.items()} == {n: s.shape for n, s in graph.weights.items()}
        infer(graph)
        try:
            results = Reference(graph, weights, limit=2**12)(*[x] * len(graph.inputs))
            assert len(results) == len(graph.outputs)
        except SecateurError:
            pass  # another input, or a network too large for this limit
    assert loaded + refused == 500
    assert refused > 100
    assert loaded > 5 or damage is cut
