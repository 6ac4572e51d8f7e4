"""Each operator of the NumPy reference against torch in float64, over sizes that share no factor."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from secateur.core.errors import DataError
from secateur.runtime.graph import Graph, GraphError, InputSpec, Node, WeightSpec
from secateur.runtime.operators import ACTIVATIONS, OPS, UNARY, cell_role
from secateur.runtime.reference import Reference
from secateur.runtime.shapes import infer

CLOSE = 1e-10
ODD = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e300, -1e300, 5e-324]


def numbers(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def network(op, inputs, weights, attrs, batched=False):
    specs = tuple(
        InputSpec(f"x{at}", "i64" if x.dtype.kind == "i" else "f32", (0, *x.shape[1:]) if batched else x.shape)
        for at, x in enumerate(inputs)
    )
    made = tuple(f"y{at}" for at in range(OPS[op].outputs))
    node = Node(op, "tested", tuple(spec.name for spec in specs), made, {role: role for role in weights}, attrs)
    if not inputs:  # a graph must have an input, read or not
        specs = (InputSpec("unread", "f32", ()),)
    return Graph(specs, made, {role: WeightSpec(w.shape) for role, w in weights.items()}, (node,))


def run(op, inputs, weights, attrs, batched=False, dtype=np.float64):
    """The outputs, after checking that they have the shapes that were foreseen and the type asked for."""
    graph = network(op, inputs, weights, attrs, batched)
    results = Reference(graph, weights, dtype)(*(inputs or [np.zeros(())]))
    foreseen = infer(graph, len(inputs[0]) if batched else 1)
    assert [result.shape for result in results] == [foreseen[name] for name in graph.outputs]
    assert all(result.dtype == dtype for result in results)
    return results


def check(op, inputs, weights, attrs, *wanted, batched=False):
    """Equal to ``wanted`` in float64, NaN and infinity in the same places, and near it in float32."""
    for found, expected in zip(run(op, inputs, weights, attrs, batched), wanted, strict=True):
        expected = expected.numpy()
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=CLOSE, atol=CLOSE)
    single = run(op, inputs, weights, attrs, batched, np.float32)
    for found, expected in zip(single, wanted, strict=True):
        calm = np.abs(expected.numpy()) < 1e30
        np.testing.assert_allclose(found[calm], expected.numpy()[calm], rtol=2e-3, atol=2e-3)


def t(array):
    return torch.from_numpy(np.ascontiguousarray(array))


CONVS = [
    # (x, weight, stride, pad, dilation, groups)
    ((2, 3, 7, 11), (5, 3, 3, 3), [1, 1], [1, 1, 1, 1], [1, 1], 1),
    ((1, 3, 13, 11), (5, 3, 5, 3), [2, 3], [2, 1, 2, 1], [1, 1], 1),
    ((3, 6, 7, 5), (9, 2, 3, 1), [1, 2], [0, 1, 3, 0], [2, 1], 3),
    ((2, 7, 11, 5), (7, 1, 3, 3), [2, 1], [1, 1, 1, 1], [1, 1], 7),
    ((2, 5, 11, 13), (10, 1, 3, 3), [1, 1], [0, 0, 0, 0], [3, 2], 5),
    ((2, 5, 1, 17), (3, 5, 1, 7), [1, 2], [0, 5, 0, 3], [1, 2], 1),
    ((5, 7, 3, 5), (11, 7, 1, 1), [1, 1], [0, 0, 0, 0], [1, 1], 1),
    ((1, 2, 5, 7), (3, 2, 1, 1), [3, 2], [0, 2, 1, 0], [1, 1], 1),
]


@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize(
    ("bias", "residual", "act"), [(True, False, "none"), (False, True, "relu"), (True, True, "silu")]
)
def test_conv(case, bias, residual, act):
    shape, kernel, stride, pad, dilation, groups = case
    x, weights = numbers(*shape), {"weight": numbers(*kernel, seed=1)}
    if bias:
        weights["bias"] = numbers(kernel[0], seed=2)
    top, left, bottom, right = pad
    padded = F.pad(t(x), (left, right, top, bottom))
    wanted = F.conv2d(padded, t(weights["weight"]), None, stride, 0, dilation, groups)
    if bias:
        wanted = wanted + t(weights["bias"]).view(1, -1, 1, 1)
    inputs = [x]
    if residual:
        inputs.append(numbers(*wanted.shape, seed=3))
        wanted = wanted + t(inputs[1])
    attrs = {"stride": stride, "pad": pad, "dilation": dilation, "groups": groups, "act": act}
    check("conv", inputs, weights, attrs, activation(act, wanted), batched=True)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 5, 7)])
@pytest.mark.parametrize("residual", [False, True])
def test_linear(shape, residual):
    x, weight, bias = numbers(*shape), numbers(11, 7, seed=1), numbers(11, seed=2)
    wanted = F.linear(t(x), t(weight), t(bias))
    inputs = [x, numbers(*wanted.shape, seed=3)] if residual else [x]
    wanted = wanted + t(inputs[1]) if residual else wanted
    check("linear", inputs, {"weight": weight, "bias": bias}, {"act": "gelu"}, F.gelu(wanted))
    check("linear", [x], {"weight": weight}, {"act": "none"}, F.linear(t(x), t(weight)))


def activation(name, x):
    """What torch calls it."""
    return {
        "none": lambda x: x, "relu": F.relu, "relu6": F.relu6, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "hardswish": F.hardswish,
        "hardsigmoid": F.hardsigmoid, "sigmoid": torch.sigmoid, "exp": torch.exp, "log": torch.log,
        "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "neg": torch.neg, "abs": torch.abs, "square": torch.square,
        "reciprocal": torch.reciprocal,
    }[name](x)  # fmt: skip


@pytest.mark.parametrize("fn", UNARY)
def test_unary_and_where_it_is_not_finite(fn):
    smooth = np.concatenate([np.linspace(-9, 9, 1009), numbers(13)])
    check("unary", [smooth], {}, {"fn": fn}, activation(fn, t(smooth)))
    odd = np.array([value for value in ODD if abs(value) != 1e300])
    found = run("unary", [odd], {}, {"fn": fn})[0]
    np.testing.assert_array_equal(found, activation(fn, t(odd)).numpy())
    assert np.isnan(run("unary", [np.full(3, np.nan)], {}, {"fn": fn})[0]).all()


@pytest.mark.parametrize("fn", UNARY)
def test_unary_of_a_value_without_dimensions(fn):
    check("unary", [np.array(0.7)], {}, {"fn": fn}, activation(fn, torch.tensor(0.7, dtype=torch.float64)))


def test_signed_zeros_survive():
    for fn in ("neg", "tanh", "silu", "sqrt"):
        found = run("unary", [np.array([0.0, -0.0])], {}, {"fn": fn})[0]
        assert np.array_equal(np.signbit(found), np.signbit(activation(fn, t(np.array([0.0, -0.0]))).numpy()))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activation_comes_last(act):
    a, b = numbers(3, 5), numbers(3, 5, seed=1)
    check("binary", [a, b], {}, {"fn": "sub", "act": act}, activation(act, t(a) - t(b)))


@pytest.mark.parametrize("fn", ["add", "sub", "mul", "div", "max", "min"])
@pytest.mark.parametrize(
    "shapes", [((3, 5), (3, 5)), ((2, 3, 5), (3, 1)), ((7, 1, 3), (5, 1)), ((), (2, 3)), ((3,), ())]
)
def test_binary_broadcasts(fn, shapes):
    a, b = numbers(*shapes[0]), numbers(*shapes[1], seed=1)
    torch_fn = {"max": torch.maximum, "min": torch.minimum}.get(fn) or getattr(torch, fn)
    check("binary", [np.asarray(a), np.asarray(b)], {}, {"fn": fn, "act": "none"}, torch_fn(t(a), t(b)))


@pytest.mark.parametrize("fn", ["add", "sub", "mul", "div", "max", "min"])
def test_binary_of_values_that_are_not_finite(fn):
    a, b = np.array(list(itertools.product(ODD, ODD))).T
    torch_fn = {"max": torch.maximum, "min": torch.minimum}.get(fn) or getattr(torch, fn)
    found = run("binary", [a, b], {}, {"fn": fn, "act": "none"})[0]
    np.testing.assert_array_equal(found, torch_fn(t(a), t(b)).numpy())


def test_const_and_affine():
    value = numbers(3, 5)
    check("const", [], {"value": value}, {}, t(value))
    x, scale, shift = numbers(2, 5, 3, 7), numbers(5, seed=1), numbers(5, seed=2)
    wanted = t(x) * t(scale).view(1, 5, 1, 1) + t(shift).view(1, 5, 1, 1)
    check("affine", [x], {"scale": scale, "shift": shift}, {"act": "relu"}, F.relu(wanted), batched=True)
    check("affine", [x[:, :, 0, 0]], {"scale": scale, "shift": shift}, {"act": "none"}, wanted[:, :, 0, 0])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_softmax(axis):
    x = 50 * numbers(3, 5, 7)
    check("softmax", [x], {}, {"axis": axis}, torch.softmax(t(x), axis))
    x[1, 2, 3] = math.nan
    x[0, 0] = -math.inf
    x[2, 4, 6] = math.inf
    np.testing.assert_allclose(run("softmax", [x], {}, {"axis": axis})[0], torch.softmax(t(x), axis), atol=CLOSE)


POOLS = [
    # (x, kernel, stride, pad, dilation)
    ((2, 3, 7, 11), [2, 2], [2, 2], [0, 0, 0, 0], [1, 1]),
    ((1, 5, 13, 7), [3, 3], [2, 2], [1, 1, 1, 1], [1, 1]),
    ((3, 2, 7, 5), [3, 2], [1, 3], [1, 1, 1, 1], [1, 1]),
    ((2, 3, 11, 13), [3, 3], [1, 2], [1, 1, 1, 1], [3, 2]),
    ((2, 3, 5, 7), [5, 7], [1, 1], [0, 0, 0, 0], [1, 1]),
]


@pytest.mark.parametrize("case", POOLS)
def test_max_pool(case):
    shape, kernel, stride, pad, dilation = case
    x = numbers(*shape) - 5  # zeros from padding would win
    wanted = F.max_pool2d(t(x), kernel, stride, pad[:2], dilation)
    attrs = {"kernel": kernel, "stride": stride, "pad": pad, "dilation": dilation}
    check("max_pool", [x], {}, attrs, wanted, batched=True)
    x[0, 0, 2, 2] = math.nan
    np.testing.assert_array_equal(
        run("max_pool", [x], {}, attrs)[0], F.max_pool2d(t(x), kernel, stride, pad[:2], dilation)
    )


def test_max_pool_with_padding_at_one_side():
    """Rounding the size up, as torch's ceil mode does, is padding below and to the right."""
    x = numbers(2, 3, 8, 5)
    wanted = F.max_pool2d(t(x), 3, 2, ceil_mode=True)
    attrs = {"kernel": [3, 3], "stride": [2, 2], "pad": [0, 0, 1, 0], "dilation": [1, 1]}
    check("max_pool", [x], {}, attrs, wanted)


@pytest.mark.parametrize("case", [case for case in POOLS if case[4] == [1, 1]])
@pytest.mark.parametrize("count_pad", [False, True])
def test_avg_pool(case, count_pad):
    shape, kernel, stride, pad, _ = case
    x = numbers(*shape)
    wanted = F.avg_pool2d(t(x), kernel, stride, pad[:2], count_include_pad=count_pad)
    attrs = {"kernel": kernel, "stride": stride, "pad": pad, "count_pad": count_pad}
    check("avg_pool", [x], {}, attrs, wanted, batched=True)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 11), (13, 2)])
def test_adaptive_avg_pool(size):
    x = numbers(2, 3, 7, 11)
    check("adaptive_avg_pool", [x], {}, {"size": list(size)}, F.adaptive_avg_pool2d(t(x), size), batched=True)


@pytest.mark.parametrize("axes", [[0], [2], [3, 1], [0, 1, 2, 3]])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("fn", ["mean", "sum", "max"])
def test_reduce(axes, keepdims, fn):
    x = numbers(2, 3, 5, 7)
    torch_fn = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax}[fn]
    attrs = {"fn": fn, "axes": axes, "keepdims": keepdims}
    check("reduce", [x], {}, attrs, torch_fn(t(x), axes, keepdim=keepdims))
    x[1, 2, 3, 4] = math.nan
    np.testing.assert_allclose(run("reduce", [x], {}, attrs)[0], torch_fn(t(x), axes, keepdim=keepdims), atol=CLOSE)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_norms_over_trailing_axes(axes):
    x = 3 * numbers(3, 5, 7) + 2
    shape = x.shape[-axes:]
    weight, bias, eps = numbers(*shape, seed=1), numbers(*shape, seed=2), 1e-3
    attrs = {"axes": axes, "eps": eps}
    check("layer_norm", [x], {}, attrs, F.layer_norm(t(x), shape, None, None, eps))
    wanted = F.layer_norm(t(x), shape, t(weight), t(bias), eps)
    check("layer_norm", [x], {"weight": weight, "bias": bias}, attrs, wanted)
    check("layer_norm", [x], {"bias": bias}, attrs, F.layer_norm(t(x), shape, None, t(bias), eps))
    check("rms_norm", [x], {}, attrs, F.rms_norm(t(x), shape, None, eps))
    check("rms_norm", [x], {"weight": weight}, attrs, F.rms_norm(t(x), shape, t(weight), eps))


@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (3, 6), (1, 6, 11)])
def test_group_norm(shape):
    x, weight, bias = numbers(*shape), numbers(6, seed=1), numbers(6, seed=2)
    wanted = F.group_norm(t(x), 3, t(weight), t(bias), 1e-4)
    check("group_norm", [x], {"weight": weight, "bias": bias}, {"groups": 3, "eps": 1e-4}, wanted, batched=True)
    check("group_norm", [x], {}, {"groups": 2, "eps": 1e-4}, F.group_norm(t(x), 2, eps=1e-4))


@pytest.mark.parametrize(
    "shapes", [((3, 5), (5, 7)), ((2, 3, 5), (2, 5, 7)), ((2, 1, 3, 5), (11, 5, 7)), ((3, 5), (2, 5, 1))]
)
def test_matmul(shapes):
    a, b = numbers(*shapes[0]), numbers(*shapes[1], seed=1)
    check("matmul", [a, b], {}, {}, t(a) @ t(b))


@pytest.mark.parametrize("mask", [None, (5, 7), (2, 1, 5, 7), (2, 3, 1, 7), (7,)])
@pytest.mark.parametrize("causal", [False, True])
def test_attention(mask, causal):
    q, k, v = numbers(2, 5, 6), numbers(2, 7, 6, seed=1), numbers(2, 7, 9, seed=2)
    inputs = [q, k, v]
    scores = torch.einsum("nthe,nshe->nhts", t(q).view(2, 5, 3, 2), t(k).view(2, 7, 3, 2)) * 0.3
    if mask:
        inputs.append(np.where(numbers(*mask, seed=3) > 1.0, -math.inf, numbers(*mask, seed=4)))
        inputs[3][..., 0] = 0.5  # each query sees something
        scores = scores + t(inputs[3])
    if causal:
        later = torch.arange(7) > torch.arange(5).view(5, 1)
        scores = scores.masked_fill(later, -math.inf)
    wanted = torch.einsum("nhts,nshe->nthe", scores.softmax(-1), t(v).view(2, 7, 3, 3)).reshape(2, 5, 9)
    assert not wanted.isnan().any()
    check("attention", inputs, {}, {"heads": 3, "scale": 0.3, "causal": causal}, wanted)


def test_attention_is_torch_s():
    q, k, v = numbers(2, 7, 6), numbers(2, 7, 6, seed=1), numbers(2, 7, 6, seed=2)
    heads = [t(x).view(2, 7, 3, 2).transpose(1, 2) for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).reshape(2, 7, 6)
    check("attention", [q, k, v], {}, {"heads": 3, "scale": 2**-0.5, "causal": True}, wanted, batched=True)


def test_embedding_and_ids_outside_it():
    weight, ids = numbers(11, 5), np.array([[0, 10, 3], [7, 7, 1]])
    check("embedding", [ids], {"weight": weight}, {}, F.embedding(t(ids), t(weight)), batched=True)
    for wrong in (-1, 11):
        with pytest.raises(DataError, match=rf"'tested' \(embedding\): token id {wrong} "):
            run("embedding", [np.array([0, wrong])], {"weight": weight}, {})


def test_operators_that_move():
    x, y, z = numbers(2, 5, 7), numbers(2, 3, 7, seed=1), numbers(2, 1, 7, seed=2)
    check("concat", [x, y, z], {}, {"axis": 1}, torch.cat([t(x), t(y), t(z)], 1), batched=True)
    check("concat", [x], {}, {"axis": 0}, t(x))
    check("slice", [x], {}, {"axis": 2, "start": 1, "stop": 7, "step": 4}, t(x)[:, :, 1:7:4])
    check("slice", [x], {}, {"axis": 1, "start": 4, "stop": 5, "step": 9}, t(x)[:, 4:5])
    check("permute", [x], {}, {"dims": [2, 0, 1]}, t(x).permute(2, 0, 1))
    check("pad", [x], {}, {"pad": [[0, 1], [2, 0], [3, 1]], "value": 1.5}, F.pad(t(x), (3, 1, 2, 0, 0, 1), value=1.5))
    check("expand", [z], {}, {"shape": [0, 3, -1]}, t(z).expand(2, 3, 7), batched=True)
    check("expand", [z[:1]], {}, {"shape": [11, 1, 5, 7]}, t(z[:1]).expand(11, 1, 5, 7))


@pytest.mark.parametrize("shape", [[0, -1], [5, 0, 7], [-1, 7], [0, 7, 5], [70], [7, -1, 1, 0]])
def test_reshape(shape):
    x = numbers(2, 5, 7)
    wanted = t(x).reshape([2 if size == 0 else size for size in shape])
    check("reshape", [x], {}, {"shape": shape}, wanted, batched=True)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("batch_first", "states"), [(True, False), (False, True)])
def test_recurrent(kind, layers, bidirectional, batch_first, states):
    net = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[kind](
        5, 7, layers, batch_first=batch_first, bidirectional=bidirectional, dtype=torch.float64
    )
    weights = {}
    for name, weight in net.named_parameters():
        stem, _, tail = name.rpartition("_l")
        role = cell_role(stem.replace("weight", "w").replace("bias", "b"), int(tail[0]), int("reverse" in tail))
        weights[role] = numbers(*weight.shape, seed=len(weights))
        weight.data.copy_(t(weights[role]))
    x = numbers(3, 11, 5) if batch_first else numbers(11, 3, 5)
    count = layers * (1 + bidirectional)
    first = [numbers(count, 3, 7, seed=at) for at in range(2 if kind == "lstm" else 1)] if states else []
    given = [t(state) for state in first]
    with torch.no_grad():
        y, last = net(t(x), (tuple(given) if kind == "lstm" else given[0]) if states else None)
    attrs = {"hidden": 7, "layers": layers, "bidirectional": bidirectional, "batch_first": batch_first}
    check(kind, [x, *first], weights, attrs, y, *(last if kind == "lstm" else [last]))


def test_every_operator_has_a_shape_rule_and_a_definition():
    from secateur.runtime import ops, shapes

    assert set(OPS) == set(shapes._RULES) == set(ops._OPS)
    assert set(UNARY) == set(ops._UNARY)


WRONG = [
    ("conv", [(1, 3, 5, 5)], {"weight": (4, 2, 3, 3)}, {}, "3 channels"),
    ("conv", [(1, 3, 2, 5)], {"weight": (4, 3, 3, 3)}, {}, "does not fit in 2"),
    ("conv", [(1, 3, 5, 5)], {"weight": (4, 3, 3, 3), "bias": (3,)}, {}, "its bias"),
    ("conv", [(1, 3, 5, 5), (1, 4, 5, 5)], {"weight": (4, 3, 3, 3)}, {}, "adds a value"),
    ("conv", [(1, 4, 5, 5)], {"weight": (3, 2, 3, 3)}, {"groups": 2}, "3 outputs"),
    ("conv", [(1, 1, 1, 1)], {"weight": (1, 1, 1, 1)}, {"pad": [2**20] * 4, "stride": [2**24] * 2}, "padded input"),
    ("linear", [(2, 5)], {"weight": (3, 4)}, {}, "5 features"),
    ("linear", [()], {"weight": (3, 4)}, {}, "1 or more dimensions"),
    ("binary", [(2, 5), (2, 4)], {}, {"fn": "add"}, "do not broadcast"),
    ("softmax", [(2, 5)], {}, {"axis": 2}, "axis 2"),
    ("reduce", [(2, 5)], {}, {"axes": [1, 2]}, "axes"),
    ("layer_norm", [(2, 5)], {"weight": (2,)}, {"axes": 1}, "its weight"),
    ("layer_norm", [(2, 5)], {}, {"axes": 3}, "3 or more"),
    ("group_norm", [(2, 5)], {}, {"groups": 2}, "5 channels"),
    ("matmul", [(2, 5), (2, 5)], {}, {}, "5 columns meet 2 rows"),
    ("attention", [(1, 2, 6), (1, 3, 6), (1, 3, 5)], {}, {"heads": 2}, "2 heads"),
    ("attention", [(1, 2, 6), (1, 3, 6), (1, 2, 6)], {}, {"heads": 2}, "belong together"),
    ("attention", [(1, 2, 6), (1, 3, 6), (1, 3, 6), (2, 2, 2, 3)], {}, {"heads": 2}, "its mask"),
    ("attention", [(1, 2**16, 1), (1, 2**16, 1), (1, 2**16, 1)], {}, {"heads": 1}, "its scores"),
    ("concat", [(2, 5), (3, 5)], {}, {"axis": 1}, "differ"),
    ("slice", [(2, 5)], {}, {"stop": 6}, "no part"),
    ("slice", [(2, 5)], {}, {"start": 3, "stop": 3}, "no part"),
    ("reshape", [(2, 5)], {}, {"shape": [3, -1]}, "does not reshape"),
    ("permute", [(2, 5)], {}, {"dims": [0]}, "permute"),
    ("expand", [(2, 5)], {}, {"shape": [2, 6]}, "broadcast"),
    ("expand", [(5,)], {}, {"shape": [-1, 5]}, "no axis"),
    ("expand", [(1,)], {}, {"shape": [2**31 - 1]}, "the limit is"),
    ("pad", [(2, 5)], {}, {"pad": [[0, 0]]}, "1 pads"),
    ("lstm", [(2, 3, 5)], {"w_ih.0.0": (8, 4), "w_hh.0.0": (8, 2), "b_ih.0.0": (8,), "b_hh.0.0": (8,)}, {}, "w_ih.0.0"),
]
USUAL = {
    "stride": [1, 1], "pad": [0, 0, 0, 0], "dilation": [1, 1], "groups": 1, "act": "none", "fn": "mean", "axis": 1,
    "keepdims": False, "eps": 0.0, "scale": 1.0, "causal": False, "start": 0, "stop": 1, "step": 1, "value": 0.0,
    "hidden": 2, "layers": 1, "bidirectional": False, "batch_first": True,
}  # fmt: skip


@pytest.mark.parametrize(("op", "inputs", "weights", "attrs", "words"), WRONG)
def test_shapes_that_do_not_fit_are_named(op, inputs, weights, attrs, words):
    whole = {name: attrs.get(name, USUAL.get(name)) for name in OPS[op].attrs}
    specs = tuple(InputSpec(f"x{at}", "f32", shape) for at, shape in enumerate(inputs))
    made = tuple(f"y{at}" for at in range(OPS[op].outputs))
    node = Node(op, "wrong", tuple(spec.name for spec in specs), made, {role: role for role in weights}, whole)
    graph = Graph(specs, made, {role: WeightSpec(shape) for role, shape in weights.items()}, (node,))
    with pytest.raises(GraphError, match=rf"node 'wrong' \({op}\): .*{words}"):
        infer(graph)
