"""Damaged plan files, each with a part of the message that must refuse it."""

import json
from pathlib import Path

import numpy as np
from plan_kit import pack

DELETE = object()
BIG = 2**31 - 1

# Path into the graph (a node is called after its first value), what to put there, part of the message.
IMAGE = [
    ("surprise", 1, "unknown field 'surprise'"),
    ("outputs", DELETE, "outputs is missing"),
    ("outputs", [], "no inputs or no outputs"),
    ("outputs", {}, "wrong type"),
    ("outputs", ["nowhere"], "no value 'nowhere'"),
    ("outputs", [3], "is not a string"),
    ("inputs", [], "no inputs or no outputs"),
    ("inputs.0.dtype", "f64", "unknown dtype 'f64'"),
    ("inputs.0.dtype", "i64", "is not f32"),
    ("inputs.0.shape", [0, 3, 0, 30], "only the first dimension may be 0"),
    ("inputs.0.shape", [0, 3, -1, 30], "not an integer from 0"),
    ("inputs.0.shape", [0, 3, 32.0, 30], "not an integer from 0"),
    ("inputs.0.shape", [0, 3, 2**31, 30], "not an integer from 0"),
    ("inputs.0.shape", [1] * 9, "at most 8"),
    ("inputs.0.shape", [0, BIG, BIG, BIG], "has more than 16777216 elements"),
    ("inputs.0.shape", [0, 3, 32], "expected 4 dimensions"),
    ("inputs.0.shape", [0, 4, 32, 30], "does not fit an input of shape"),
    ("inputs.0.shape", [0, 3, 2**13, 2**13], "has more than 16777216 elements"),
    ("inputs.0.name", "", "is not 1 to 256 bytes"),
    ("inputs.0.name", "x" * 257, "is not 1 to 256 bytes"),
    ("inputs.0.name", "a\u0000b", "control character"),
    ("inputs.0.name", "a\nb", "control character"),
    ("inputs.0.more", 1, "unknown field 'more'"),
    ("nodes.c1.op", "convolve", "unknown op 'convolve'"),
    ("nodes.c1.name", "c2_node", "two nodes have the name"),
    ("nodes.c1.extra", 0, "unknown field 'extra'"),
    ("nodes.c1.attrs", DELETE, "attrs is missing"),
    ("nodes.c1.attrs.stride", DELETE, "attribute 'stride' is missing"),
    ("nodes.c1.attrs.speed", 1, "unknown attribute 'speed'"),
    ("nodes.c1.attrs.axis", 1, "unknown attribute 'axis'"),
    ("nodes.c1.attrs.stride", [0, 1], "'stride' is not an integer from 1"),
    ("nodes.c1.attrs.stride", [1], "list of 2"),
    ("nodes.c1.attrs.stride", [1, True], "'stride' is not an integer from 1"),
    ("nodes.c1.attrs.dilation", [2**24 + 1, 1], "'dilation' is not an integer from 1 to 16777216"),
    ("nodes.c1.attrs.dilation", [2**24, 2**24], "a window of"),
    ("nodes.c1.attrs.pad", [1, 1, 1], "list of 4"),
    ("nodes.c1.attrs.pad", [1, 1, 1, -1], "'pad' is not an integer from 0"),
    ("nodes.c1.attrs.pad", [2**24] * 4, "the padded input of shape"),
    ("nodes.c1.attrs.groups", 0, "'groups' is not an integer from 1"),
    ("nodes.c2.attrs.groups", 3, "in 3 groups"),
    ("nodes.c1.attrs.groups", "1", "'groups' is not an integer"),
    ("nodes.c1.attrs.act", "exp", "not an activation"),
    ("nodes.c1.attrs.act", "swish", "not a function"),
    ("nodes.c1.attrs.act", 3, "not a function"),
    ("nodes.c1.in", [], "takes 1 to 2 inputs, not 0"),
    ("nodes.c1.in", ["c2"], "no value 'c2' exists there"),
    ("nodes.c1.in", ["c1"], "no value 'c1' exists there"),
    ("nodes.c1.out", ["c1", "d"], "gives 1 values, not 2"),
    ("nodes.c1.out", ["x"], "'x' is assigned twice"),
    ("nodes.c1.weights.bias", "scale", "weight 'bias' has shape"),
    ("nodes.c1.weights.bias", "w1", "expected 1 dimensions"),
    ("nodes.c1.weights.weight", DELETE, "weight 'weight' is missing"),
    ("nodes.c1.weights.weight", "nothing", "the graph has no weight 'nothing'"),
    ("nodes.c1.weights.other", "w2", "unknown weight 'other'"),
    ("nodes.c1.weights.other", None, "unknown weight 'other'"),
    ("nodes.c1.weights.bias", None, "is not a string"),
    ("nodes.c2.in", ["c1", "x"], "input 1 has shape"),
    ("nodes.m1.attrs.kernel", [18, 2], "a window of"),
    ("nodes.m2.attrs.count_pad", 1, "not true or false"),
    ("nodes.m3.attrs.size", [2**24, 2**24], "has more than"),
    ("nodes.g.attrs.groups", 4, "6 channels do not divide into 4 groups"),
    ("nodes.g.attrs.eps", -1e-5, "'eps' is not a number in its range"),
    ("nodes.g.attrs.eps", 1e39, "'eps' is not a number in its range"),
    ("nodes.g.attrs.eps", "1", "'eps' is not a number in its range"),
    ("nodes.p.attrs.pad", [[0, 0]] * 3, "3 pairs for an input"),
    ("nodes.p.attrs.pad", [[0, 0]] * 3 + [[0]], "something else than pairs"),
    ("nodes.p.attrs.pad", [[0, 0]] * 3 + [[0, BIG]], "has more than"),
    ("nodes.r.attrs.axes", [2, 2], "names axis 2 twice"),
    ("nodes.r.attrs.axes", [], "'axes' is empty"),
    ("nodes.r.attrs.axes", [4], "axis 4 of an input"),
    ("nodes.r.attrs.fn", "min", "not a function of this operator"),
    ("nodes.l.weights.weight", "w1", "expected 2 dimensions"),
    ("nodes.l.in", ["p"], "does not fit an input of shape"),
    ("nodes.s.attrs.axis", 2, "axis 2 of an input"),
    ("nodes.s.attrs.axis", 8, "'axis' is not an integer from 0 to 7"),
    ("weights.w1.store", "f64", "unknown store 'f64'"),
    ("weights.w1.store", "f32", "the file holds no tensor 'w1'"),
    ("weights.w1.more", 1, "unknown field 'more'"),
    ("weights.w1.shape", [8, 3, 3, 4], "tensor 'w1.bits' has shape"),
    ("weights.w1.shape", [0, 3, 3, 3], "not an integer from 1"),
    ("weights.w1.shape", [BIG] * 4, "is too large"),
    ("weights.w3.store", "bf16", "wrong dtype"),
    ("weights.w3.shape", [6, 8, 2, 3], "tensor 'w3' has shape"),
    ("weights.lost", {"shape": [2], "store": "f32"}, "the file holds no tensor 'lost'"),
    ("weights.scale", DELETE, "belongs to no weight"),
]
TEXT = [
    ("outputs", ["ids"], "is not f32"),
    ("nodes.e.in", ["ids", "ids"], "takes 1 to 1 inputs, not 2"),
    ("nodes.v.in", ["ids"], "is not f32"),
    ("inputs.0.dtype", "f32", "is not i64"),
    ("nodes.h.attrs.fn", "mean", "not a function of this operator"),
    ("nodes.scaled.in", ["wide", "all"], "do not broadcast"),
    ("nodes.ln.attrs.axes", 2, "weight 'weight' has shape"),
    ("nodes.ln.attrs.axes", 4, "normalises 4 axes"),
    ("nodes.ln.attrs.axes", [2], "'axes' is not an integer"),
    ("nodes.at.attrs.heads", 3, "do not divide into 3 heads"),
    ("nodes.at.in", ["ln", "rms"], "takes 3 to 4 inputs"),
    ("nodes.at.in", ["ln", "v", "v"], "do not fit"),
    ("nodes.at.in", ["ln", "rms", "v", "pos"], "does not broadcast"),
    ("nodes.at.attrs.scale", None, "'scale' is not a number"),
    ("nodes.split.attrs.shape", [0, -1, 5, 4], "does not fill the shape"),
    ("nodes.split.attrs.shape", [0, -1, -1, 4], "more than one -1"),
    ("nodes.split.attrs.shape", [0, -2, 2, 4], "not an integer from -1"),
    ("nodes.split.attrs.shape", [0, BIG, BIG, BIG], "does not fill the shape"),
    ("nodes.split.attrs.shape", [BIG, BIG, BIG, BIG, -1], "does not fill the shape"),
    ("nodes.split.attrs.shape", [1, 6, 2, 4], "does not fill the shape"),  # holds for a batch of one only
    ("nodes.turn.attrs.dims", [0, 2, 1], "not an order of the axes"),
    ("nodes.turn.attrs.dims", [0, 2, 1, 2], "twice"),
    ("nodes.turn.attrs.dims", [0, 2, 1, 4], "axis 4 of an input"),
    ("nodes.qk.in", ["turn", "turn"], "cannot multiply"),
    ("nodes.qk.in", ["e", "pos"], "cannot multiply"),
    ("nodes.part.attrs.stop", 7, "slice 1:7:3 of axis 3"),
    ("nodes.part.attrs.stop", 1, "slice 1:1:3 of axis 3"),
    ("nodes.part.attrs.step", 0, "'step' is not an integer from 1"),
    ("nodes.part.attrs.step", -1, "'step' is not an integer from 1"),
    ("nodes.part.attrs.start", -1, "'start' is not an integer from 0"),
    ("nodes.u.attrs.fn", "none", "not a function of this operator"),
    ("nodes.all.in", [], "inputs, not 0"),
    ("nodes.all.in", ["u", "h"], "input 1, joined on axis 1, has shape"),
    ("nodes.all.in", ["h", "e", "split"], "input 2, joined on axis 1, has shape"),
    ("nodes.wide.attrs.shape", [0, 3, 7], "does not broadcast to"),
    ("nodes.wide.attrs.shape", [-1, 0, 3, 8], "does not broadcast to"),
    ("nodes.wide.attrs.shape", [8], "does not broadcast to"),
    ("nodes.wide.attrs.shape", [BIG, 3, 8], "has more than"),
    ("nodes.scaled.attrs.act", "abs", "not an activation"),
]
RECURRENT = [
    ("nodes.y.in", ["x", "h0"], "h0 and c0 together"),
    ("nodes.y.in", ["x", "h", "h"], "input 1 has shape"),
    ("nodes.y.attrs.hidden", 7, "weight 'w_ih.0.0' has shape"),
    ("nodes.y.attrs.layers", 3, "weight 'w_ih.2.0' is missing"),
    ("nodes.y.attrs.layers", 1, "unknown weight 'b_hh.1.0'"),
    ("nodes.y.attrs.layers", 1025, "'layers' is not an integer from 1 to 1024"),
    ("nodes.y.attrs.bidirectional", False, "unknown weight 'b_hh.0.1'"),
    ("nodes.y.attrs.batch_first", False, "input 1 has shape"),
    ("nodes.y.out", ["y", "hn"], "gives 3 values, not 2"),
    ("nodes.z.out", ["z", "zn", "zc"], "gives 2 values, not 3"),
    ("nodes.z.op", "lstm", "gives 3 values, not 2"),
    ("nodes.z.in", ["hn"], "weight 'w_ih.0.0' has shape"),
    ("nodes.y.weights.w_hh.1.1", "l.b_hh.1.1", "expected 2 dimensions"),
    ("nodes.y.weights.w_ih.1.0", "l.w_ih.0.0", "weight 'w_ih.1.0' has shape"),
]
STORES = [
    ("nodes.y.op", "reshape", "attribute 'shape' is missing"),
    ("nodes.z.in", ["y", "v.f32.8"], "do not broadcast"),
]

# What stands in the place of the graph's text, part of the message.
GRAPHS = [
    ("", "not valid JSON"), ("[]", "is not an object"), ("{}", "inputs is missing"), ("{} {}", "text after the value"),
    ("[" * 40 + "]" * 40, "more than 32 levels"), ('{"a":1,"a":2}', "two equal keys"), ('{"a":NaN}', "not valid JSON"),
    ('{"a":01}', "expected , or }"), ('{"a":1e999}', "past the range"), ('{"a":"\\ud800"}', "expected \\u"),
    ('{"a":"\\u00g0"}', "hexadecimal"), ('{"a":"\n"}', "control character"), ("{'a':1}", "expected a key"),
]  # fmt: skip


def edited(plan, path, value):
    """The plan with one entry of its graph replaced or deleted."""
    place, parts = plan.graph, path.split(".", 3)
    if parts[0] == "nodes":
        place = next(n for n in plan.graph["nodes"] if n["name"] == f"{parts[1]}_node")
        parts = parts[2:] if len(parts) < 4 else [parts[2], parts[3]]
    for part in parts[:-1]:
        place = place[int(part)] if isinstance(place, list) else place[part]
    if value is DELETE:
        del place[parts[-1]]
    else:
        place[parts[-1]] = value
    return plan


def tensor_cases(make):
    """Files whose tensors are not what the weights say."""

    def case(change):
        plan = make()
        change(plan.tensors)
        return plan.bytes()

    def put(name, array):
        return case(lambda t: t.update({name: array}))

    base = make().tensors
    bits, values = base["bitmask.9.bits"], base["bitmask.9.values"]
    past = bits | np.array([0, 2], np.uint8)
    more = bits ^ np.array([1, 0], np.uint8)
    yield put("bitmask.9.bits", past), "bits past the last of its 9 weights are set"
    yield put("bitmask.9.bits", more), "tensor 'bitmask.9.values' has shape"
    yield put("bitmask.9.bits", bits[:1]), "tensor 'bitmask.9.bits' has shape"
    yield put("bitmask.9.bits", bits.view(np.int8)), "wrong dtype"
    yield put("bitmask.9.values", values.astype(np.int8)), "wrong dtype"
    yield put("bitmask.9.values", values[:, None]), "tensor 'bitmask.9.values' has shape"
    yield put("i8.9.scale", np.full(9, np.nan, np.float32)), "a scale is not finite"
    yield put("i8.9.scale", np.ones(8, np.float32)), "tensor 'i8.9.scale' has shape"
    yield put("i8.9.scale", np.ones(9, np.float16)), "wrong dtype"
    yield put("stranger", np.ones(1, np.float32)), "tensor 'stranger' belongs to no weight"
    yield case(lambda t: t.pop("i8.9.scale")), "the file holds no tensor 'i8.9.scale'"
    plan = make()
    plan.graph["weights"]["i8.9.scale"] = {"shape": [9], "store": "f32"}
    yield plan.bytes(), "belongs to another weight"
    plan = edited(make(), "weights.single", {"shape": [], "store": "i8"})
    plan.tensors["single"] = np.ones((), np.int8)
    yield plan.bytes(), "i8 needs at least one dimension"


def file_cases(plan):
    """Files whose container is damaged."""
    sound = plan.bytes()
    size = int.from_bytes(sound[:8], "little")
    text, data = sound[8 : 8 + size], sound[8 + size :]

    def header(**entries):
        return pack(json.dumps(json.loads(text) | entries), data)

    one = json.loads(text)["w3"]
    begin, end = one["data_offsets"]
    yield b"", "is empty"
    yield sound[:7], "too short"
    yield sound[:100], "exceeds the file"
    yield sound[:-1], "not a range of the file's"
    yield sound + b"\0", "the tensors take"
    yield (2**63).to_bytes(8, "little") + sound[8:], "exceeds the file or 100 MB"
    yield (0).to_bytes(8, "little") + sound[8:], "does not begin with {"
    yield pack(b" " + text, data), "does not begin with {"
    yield pack(text[:-1], data), "not valid JSON"
    yield pack(text.replace(b'"w3"', b'"w\xff"'), data), "not UTF-8"
    yield header(w3=one | {"dtype": "F64"}), "no plan uses dtype 'F64'"
    yield header(w3=one | {"dtype": "F32"}), "does not take the"
    yield header(w3=one | {"shape": [2**40, 2**40]}), "does not take the"
    yield header(w3=one | {"shape": [-6, 8, 3, -2]}), "is not an integer from 0"
    yield header(w3=one | {"data_offsets": [end, begin]}), "not a range"
    yield header(w3=one | {"data_offsets": [begin + 2, end + 2]}), "tensor 'w"
    yield header(w3=one | {"data_offsets": [begin, 2**62]}), "is not an integer from 0"
    yield header(w3=one | {"data_offsets": [0, end - begin]}), "overlaps"
    yield header(w3=one | {"more": 1}), "expected exactly"
    yield header(w3=3), "expected exactly"
    yield header(__metadata__={"format": 1}), "is not a string"
    yield header(__metadata__=[]), "is not an object"
    yield header(__metadata__={}), "no format"
    yield header(__metadata__={"format": "pt"}), "not a plan: the file's format is 'pt'"
    yield header(__metadata__={"format": "secateur-plan", "version": "2"}), "the plan has version '2'"
    yield header(__metadata__={"format": "secateur-plan", "version": "1"}), "no graph"
    gap = json.loads(text)
    shifted = {k: v | {"data_offsets": [n + 4 for n in v["data_offsets"]]} for k, v in gap.items() if k[0] != "_"}
    yield pack(json.dumps(gap | shifted), b"1234" + data), "bytes of no tensor lie before"


def write_bad(folder: Path, image, text, recurrent, stores):
    """One file and one .expect for each case."""
    cases = []
    for name, make, table in (
        ("image", image, IMAGE), ("text", text, TEXT), ("recurrent", recurrent, RECURRENT), ("stores", stores, STORES)
    ):  # fmt: skip
        cases += [(f"{name}_{i}", edited(make(), p, v).bytes(), m) for i, (p, v, m) in enumerate(table)]
    cases += [(f"graph_{i}", image().bytes(graph), m) for i, (graph, m) in enumerate(GRAPHS)]
    cases += [(f"tensor_{i}", data, m) for i, (data, m) in enumerate(tensor_cases(stores))]
    cases += [(f"file_{i}", data, m) for i, (data, m) in enumerate(file_cases(image()))]
    for name, data, message in cases:
        (folder / f"{name}.safetensors").write_bytes(data)
        (folder / f"{name}.safetensors.expect").write_text(message, encoding="utf-8")
