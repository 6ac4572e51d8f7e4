"""Every operator of the compiled core on every instruction set against the float64 reference, at odd sizes."""

import importlib.util
import itertools
import pathlib

import numpy as np
import pytest

from secateur.runtime.operators import ACTIVATIONS, BINARY, OPS, REDUCTIONS, UNARY

_spec = importlib.util.spec_from_file_location("native_kit", pathlib.Path(__file__).with_name("native_kit.py"))
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)
pytestmark = kit.needs_native

CASES = {}
TOKENS = (7, 8, 9, 65)


def case(*options):
    """Registers a network; with options it is one for each of them."""

    def register(build):
        for option in options or (None,):
            name = build.__name__ if option is None else f"{build.__name__}-{option}"
            CASES[name] = (lambda net, b=build, o=option: b(net, o)) if options else build
        return build

    return register


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Cases by name, each made once."""
    made, folder = {}, tmp_path_factory.mktemp("plans")

    def get(name):
        if name not in made:
            net = kit.Net(len(name))
            made[name] = kit.Case(net, CASES[name](net), folder / f"{name}.safetensors")
        return made[name]

    return get


@case(*itertools.product((1, 2, 3, 5, 7), (1, 2, 3)))
def conv(net, option):
    """Kernels and strides; each branch has other pads, other dilations, other zeros."""
    kernel, stride = option
    x = net.input(0, 5, 19, 17)
    pads = [(0, 0, 0, 0), (1, 0, 2, 1), (0, 3, 1, 2), (kernel, kernel, kernel, kernel)]
    return [
        net.conv(
            x, 13, 5, kernel, kernel, density=density, stride=(stride, stride), pad=pad, dilation=dilation, act=act
        )
        for density, pad, dilation, act in zip(
            (1.0, 0.5, 0.1, 0.0), pads, ((1, 1), (2, 1), (1, 2), (2, 2)), ("none", "relu", "silu", "none"), strict=True
        )
    ]


@case()
def conv_chain(net):
    """Maps that shrink by different steps in height and width, down to one row, then grow a residual."""
    x = net.input(0, 3, 37, 23)
    a = net.conv(x, 11, 3, 7, 7, stride=(2, 2), pad=(3, 3, 3, 3), act="relu", density=0.3)
    b = net.conv(a, 11, 11, 3, 3, pad=(1, 1, 1, 1), residual=a, act="relu", density=0.1)
    c = net.conv(b, 17, 11, 3, 3, stride=(2, 1), pad=(1, 1, 1, 1), act="hardswish", density=0.2)
    d = net.conv(c, 17, 17, 1, 5, stride=(3, 2), pad=(0, 2, 0, 2), density=0.5, bias=False)
    e = net.conv(d, 7, 17, 4, 1, pad=(2, 0, 1, 0), dilation=(1, 1), residual=net.conv(d, 7, 17, 1, 1), act="gelu")
    return [e, b]


@case()
def conv_shapes(net):
    """Kernels that are no squares, wide dilations, pads past the kernel, one output pixel."""
    x = net.input(0, 7, 11, 13)
    return [
        net.conv(x, 5, 7, 1, 3, pad=(0, 1, 0, 1), stride=(2, 1), density=0.4),
        net.conv(x, 5, 7, 3, 1, pad=(2, 0, 0, 0), dilation=(3, 1)),
        net.conv(x, 3, 7, 3, 3, dilation=(5, 6), stride=(1, 1)),
        net.conv(x, 3, 7, 2, 2, pad=(5, 4, 3, 6), stride=(3, 4), density=0.5),
        net.conv(x, 1, 7, 11, 13, density=0.3),
        net.conv(x, 9, 7, 1, 1, pad=(2, 0, 1, 3), act="sigmoid"),
    ]


@case(2, 3, 5, 15)
def conv_groups(net, groups):
    """Groups, up to one for each channel, with one and with two outputs each."""
    x = net.input(0, 30, 9, 7)
    inside = 30 // groups
    return [
        net.conv(x, 30, inside, 3, 3, groups=groups, pad=(1, 1, 1, 1), density=0.5, act="relu6"),
        net.conv(x, 2 * groups, inside, 2, 3, groups=groups, stride=(2, 1), residual=None),
    ]


@case()
def conv_depthwise(net):
    """One channel a group; strides, a multiplier, all zeros."""
    x = net.input(0, 13, 14, 11)
    a = net.conv(x, 13, 1, 3, 3, groups=13, pad=(1, 1, 1, 1), act="relu6")
    b = net.conv(a, 26, 1, 5, 5, groups=13, stride=(2, 2), pad=(2, 2, 2, 2), density=0.5)
    c = net.conv(a, 13, 1, 7, 7, groups=13, pad=(3, 3, 3, 3), residual=a, act="silu")
    return [b, net.conv(c, 13, 1, 3, 3, groups=13, stride=(3, 1), density=0.0), c]


@case()
def conv_zeros(net):
    """Rows without weights, inputs that nothing reads, and blocks of four rows with the same zeros."""
    x = net.input(0, 17, 7, 9)
    rows = net.numbers(19, 17, 3, 3, density=0.2)
    rows[[0, 4, 5, 6, 7, 18]] = 0
    reads = net.numbers(19, 17, 1, 1)
    reads[:, 3:] = 0
    outs = [net.add("conv", x, weight=w, pad=(1, 1, 1, 1)) for w in (rows, reads)]
    outs += [net.conv(x, 18, 17, k, k, block=4, density=0.2, act="relu") for k in (1, 3)]
    return outs


@case()
def conv_single(net):
    """A squeeze to one pixel and 1x1 layers there, one of which sees its padding only."""
    x = net.input(0, 9, 8, 11)
    a = net.conv(x, 9, 9, 3, 3, pad=(1, 1, 1, 1))
    pooled = net.add("adaptive_avg_pool", a, size=(1, 1))
    down = net.conv(pooled, 3, 9, 1, 1, act="relu")
    up = net.conv(down, 9, 3, 1, 1, act="sigmoid", density=0.6)
    scaled = net.add("binary", a, up, fn="mul")
    aside = net.conv(pooled, 5, 9, 1, 1, pad=(1, 1, 1, 1), stride=(3, 3))
    wide = net.conv(pooled, 5, 9, 3, 3, pad=(1, 1, 1, 1), stride=(2, 2))
    return [net.conv(scaled, 5, 9, 3, 3, pad=(1, 1, 1, 1), density=0.3), aside, wide, up]


@case()
def conv_strange_strides(net):
    """Strides far past the map."""
    x = net.input(0, 3, 5, 5)
    y = net.conv(x, 4, 3, 1, 1, stride=(2**24, 2**24))
    for _ in range(4):
        y = net.conv(y, 4, 4, 1, 1, stride=(2**24, 2**24), act="relu")
    return [y]


@case()
def squeeze_excite_by_mean(net):
    """The same by a mean that keeps its dimensions, and by linear layers between reshapes."""
    x = net.input(0, 7, 9, 5)
    a = net.conv(x, 7, 7, 3, 3, pad=(1, 1, 1, 1), act="silu", density=0.4)
    mean = net.add("reduce", a, fn="mean", axes=(2, 3), keepdims=True)
    gate = net.conv(net.conv(mean, 2, 7, 1, 1, act="relu"), 7, 2, 1, 1, act="hardsigmoid")
    b = net.conv(net.add("binary", gate, a, fn="mul", act="relu"), 7, 7, 3, 3, pad=(1, 1, 1, 1))
    flat = net.add("reduce", b, fn="mean", axes=(2, 3), keepdims=False)
    row = net.linear(net.linear(flat, 3, 7, act="relu"), 7, 3, act="sigmoid")
    again = net.add("binary", b, net.add("reshape", row, shape=(0, 7, 1, 1)), fn="mul")
    return [net.conv(again, 3, 7, 3, 3), flat]


@case(*TOKENS)
def linear_tokens(net, count):
    """Layers over tokens, through a residual and a view without the batch."""
    x = net.input(0, count, 23)
    a = net.linear(x, 29, 23, density=0.1, act="gelu")
    b = net.linear(a, 23, 29, density=0.5, residual=x)
    c = net.linear(b, 31, 23, block=4, density=0.2, act="gelu_tanh", bias=False)
    flat = net.add("reshape", c, shape=(-1, 31))
    d = net.linear(flat, 5, 31, act="relu")
    return [d, b, net.linear(b, 7, 23, density=0.0)]


@case()
def linear_rows(net):
    """One row an example: one token at batch 1; dense, sparse, empty rows, more than 65,536 inputs."""
    x = net.input(0, 67)
    a = net.linear(x, 101, 67, act="relu")
    b = net.linear(a, 103, 101, density=0.1, act="tanh")
    c = net.linear(b, 67, 103, density=0.5, residual=x)
    rows = net.numbers(10, 67, density=0.3)
    rows[[0, 3, 4, 9]] = 0
    wide = net.add(
        "reshape", net.add("expand", net.add("reshape", c, shape=(0, 67, 1)), shape=(0, 67, 1009)), shape=(0, -1)
    )
    return [
        net.add("linear", c, weight=rows),
        net.linear(c, 3, 67, density=0.0),
        net.linear(wide, 3, 67 * 1009, density=0.01),
    ]


@case("f16", "bf16", "i8")
def linear_stores(net, store):
    """Weights stored short."""
    x = net.input(0, 53)
    w, b = net.numbers(31, 53), net.numbers(31)
    return [
        net.add("linear", x, weight=w, bias=b, store=store),
        net.add("linear", x, weight=net.numbers(7, 53), store=store),
    ]


@case()
def linear_alone(net):
    """A vector without a batch, and a layer over the last axis of an image."""
    x, y = net.input(41), net.input(0, 3, 5, 11)
    return [net.linear(x, 13, 41, density=0.5, act="relu"), net.linear(y, 7, 11, act="silu")]


@case("max_pool", "avg_pool", "avg_pool_inside")
def pool(net, kind):
    """Windows with pads, strides and dilation, after a layer, before one, and wholly in the padding."""
    op = kind.replace("_inside", "")
    count = {} if op == "max_pool" else {"count_pad": kind == op}
    spread = {"dilation": (2, 3)} if op == "max_pool" else {}
    x = net.input(0, 5, 13, 11)
    a = net.conv(x, 7, 5, 3, 3, pad=(1, 1, 1, 1))
    b = net.add(op, a, kernel=(3, 3), stride=(2, 2), pad=(1, 1, 1, 1), **count)
    c = net.conv(b, 5, 7, 3, 3, pad=(1, 1, 1, 1), density=0.4)
    d = net.add(op, x, kernel=(2, 3), stride=(3, 1), pad=(0, 2, 1, 0), **count, **spread)
    e = net.add(op, a, kernel=(2, 1), stride=(1, 1), pad=(4, 3, 3, 2), **count)
    f = net.add(op, x, kernel=(13, 11), **count)
    return [c, d, e, f]


@case((1, 1), (4, 3), (5, 7), (6, 9), (12, 18))
def adaptive_avg_pool(net, size):
    """Sizes that divide the map, that do not, and that exceed it."""
    x = net.input(0, 5, 12, 9)
    a = net.conv(x, 5, 5, 3, 3, pad=(1, 1, 1, 1))
    b = net.add("adaptive_avg_pool", a, size=size)
    return [net.conv(b, 3, 5, 1, 1), net.add("adaptive_avg_pool", x, size=size)]


@case(*BINARY)
def binary(net, fn):
    """Both orders, with every way to broadcast, over images, tokens and plain arrays."""
    x, t, y = net.input(0, 7, 5, 11), net.input(0, 9, 7), net.input(0, 7, 5, 11)
    away = "sigmoid" if fn == "div" else "none"  # from zero: near it a quotient magnifies every rounding
    image, tokens = net.conv(x, 7, 7, 1, 1, act=away), net.linear(t, 7, 7, act=away)
    single = net.add("adaptive_avg_pool", image, size=(1, 1))
    act = {"act": "relu" if fn == "sub" else "none"}
    pairs = [(image, single), (image, y), (image, image), (tokens, t), (single, single), (x, y), (image, single)]
    pairs += [(image, net.const(*s)) for s in ((7, 1, 1), (1,), (1, 7, 1, 1), (11,), (5, 1), (1, 1, 5, 11), ())]
    pairs += [(tokens, net.const(*s)) for s in ((7,), (1,), (9, 1), (1, 9, 7))]
    pairs += [(x, net.const(7, 5, 11)), (single, net.const(7, 1, 1)), (single, image), (tokens, net.const(2, 1, 9, 7))]
    outs = []
    for a, b in pairs[:-1]:
        outs += [net.add("binary", a, b, fn=fn, **act), net.add("binary", b, a, fn=fn)]
    return [net.conv(outs[0], 3, 7, 3, 3, pad=(1, 1, 1, 1)) if fn in ("add", "mul") else outs[0], *outs[1:]]


@case(*UNARY)
def unary(net, fn):
    """On images, tokens, single pixels and plain arrays, followed by a layer that sees the borders."""
    x, t, z = net.input(0, 5, 7, 5), net.input(0, 9, 5), net.input(0, 3)
    image, tokens, single = net.conv(x, 5, 5, 1, 1), net.linear(t, 5, 5), net.add("adaptive_avg_pool", x, size=(1, 1))
    values = [image, tokens, single, z]
    if fn in ("log", "sqrt", "rsqrt", "reciprocal"):  # near zero nothing is well conditioned
        half = net.add("const", value=np.array([0.5], np.float32))
        values = [net.add("binary", net.add("unary", v, fn="square"), half, fn="add") for v in values]
    made = [net.add("unary", v, fn=fn) for v in values]
    return [net.conv(made[0], 3, 5, 3, 3, pad=(1, 1, 1, 1)), *made]


@case(*ACTIVATIONS)
def act(net, name):
    """As the last part of every operator that has one."""
    x, t = net.input(0, 5, 7, 5), net.input(0, 9, 5)
    image = net.conv(x, 5, 5, 3, 3, pad=(1, 1, 1, 1), act=name, residual=x)
    scale = {"scale": net.numbers(5), "shift": net.numbers(5)}
    return [
        net.conv(image, 3, 5, 3, 3, pad=(1, 1, 1, 1), act=name, density=0.2),
        net.conv(image, 5, 1, 3, 3, groups=5, act=name),
        net.linear(t, 7, 5, act=name),
        net.linear(net.add("reshape", t, shape=(0, 45)), 7, 45, act=name),
        net.add("binary", image, x, fn="mul", act=name),
        net.add("affine", image, act=name, **scale),
        net.add("affine", x, act=name, **scale),
    ]


@case()
def affine(net):
    """Over images, single pixels, tokens and rows."""
    x, t, r = net.input(0, 5, 7, 5), net.input(0, 5, 9), net.input(0, 5)
    image = net.conv(x, 5, 5, 1, 1)
    values = [image, net.add("adaptive_avg_pool", image, size=(1, 1)), net.linear(t, 9, 9), r]
    made = [net.add("affine", v, scale=net.numbers(5), shift=net.numbers(5)) for v in values]
    return [net.conv(made[0], 3, 5, 3, 3, pad=(1, 1, 1, 1)), *made]


@case(0, 1, 2)
def softmax(net, axis):
    """Along each axis of tokens, and of rows."""
    x, r = net.input(0, 9, 11), net.input(0, 5, 7, 3)
    tokens = net.linear(x, 13, 11)
    large = net.add("binary", tokens, net.add("const", value=np.array(30.0, np.float32)), fn="mul")
    return [net.add("softmax", v, axis=axis) for v in (tokens, large, r)]


@case("layer_norm", "rms_norm")
def norm(net, op):
    """Over the last axes of tokens, images and rows, with and without weights."""
    x, t, r = net.input(0, 5, 7, 11), net.input(0, 9, 13), net.input(0, 17)
    bias = op == "layer_norm"

    def apply(value, *shape, plain=False):
        given = {} if plain else {"weight": net.numbers(*shape)} | ({"bias": net.numbers(*shape)} if bias else {})
        return net.add(op, value, axes=len(shape), eps=1e-3, **given)

    image, tokens = net.conv(x, 5, 5, 3, 3, pad=(1, 1, 1, 1)), net.linear(t, 13, 13)
    outs = [apply(tokens, 13), apply(tokens, 9, 13), apply(tokens, 13, plain=True), apply(t, 13), apply(r, 17)]
    return [net.linear(outs[0], 5, 13), *outs[1:], apply(image, 11), apply(image, 7, 11), apply(image, 5, 7, 11)]


@case(1, 2, 5, 10)
def group_norm(net, groups):
    x = net.input(0, 10, 7, 5)
    image = net.conv(x, 10, 10, 3, 3, pad=(1, 1, 1, 1))
    a = net.add("group_norm", image, groups=groups, weight=net.numbers(10), bias=net.numbers(10))
    return [net.conv(a, 3, 10, 3, 3, pad=(1, 1, 1, 1)), net.add("group_norm", image, groups=groups)]


@case(*REDUCTIONS)
def reduce(net, fn):
    """Over single axes, several, the batch and all, of images, tokens and plain arrays."""
    x, t = net.input(0, 5, 7, 11), net.input(0, 9, 5)
    image, tokens = net.conv(x, 5, 5, 1, 1), net.linear(t, 7, 5)
    outs = [
        net.add("reduce", image, fn=fn, axes=axes, keepdims=keep)
        for axes, keep in (
            ((2, 3), True),
            ((2, 3), False),
            ((3, 2), False),
            ((1,), True),
            ((0, 2), False),
            ((3,), True),
        )
    ]
    outs += [net.add("reduce", tokens, fn=fn, axes=axes, keepdims=False) for axes in ((1,), (2,), (0, 1, 2))]
    return outs


@case()
def matmul(net):
    """Batches that broadcast, and rows without one."""
    a, b = net.input(0, 3, 7, 5), net.input(0, 1, 5, 11)
    rows = net.linear(net.input(0, 9, 5), 13, 5)
    return [
        net.add("matmul", a, b),
        net.add("matmul", rows, net.const(13, 7)),
        net.add("matmul", a, net.const(3, 5, 17)),
    ]


@case(*itertools.product((*TOKENS, 33), ("none", "row", "full", "heads", "hidden"), (False, True)))
def attention(net, option):
    """Self-attention with each kind of mask; ``hidden`` hides keys from everyone."""
    count, mask, causal = option
    x = net.input(0, count, 12)
    q, k, v = net.linear(x, 12, 12), net.linear(x, 12, 12), net.linear(x, 6, 12)
    shapes = {"row": (1, count), "full": (count, count), "heads": (1, 3, count, count)}
    reads = [q, k, v] + ([net.const(*shapes[mask])] if mask in shapes else [])
    if mask == "hidden":
        hidden = np.where(np.arange(count) % 3 == 1, -np.inf, 0).astype(np.float32)
        reads.append(net.add("const", value=hidden))
    y = net.add("attention", *reads, heads=3, scale=0.5, causal=causal)
    return [net.linear(y, 5, 6, residual=None), y]


@case((9, 17), (17, 9), (8, 5), (5, 8), (64, 1))
def attention_across(net, option):
    """Queries and keys of two lengths; the mask is an input with the batch."""
    queries, keys = option
    x, z, m = net.input(0, queries, 10), net.input(0, keys, 6), net.input(0, 1, 1, keys)
    q, k, v = net.linear(x, 10, 10), net.linear(z, 10, 6), net.linear(z, 15, 6)
    outs = [net.add("attention", q, k, v, m, heads=5, scale=0.3, causal=False)]
    return [
        *outs,
        net.add("attention", q, k, v, heads=1, scale=1.0, causal=True),
        net.add("attention", x, k, k, heads=2, scale=0.1),
    ]


@case()
def attention_fused(net):
    """Queries, keys and values cut from one layer, a sequence a vector of lanes fills, and a block around it."""
    x = net.input(0, 16, 12)
    y = net.add("layer_norm", x, weight=net.numbers(12), bias=net.numbers(12), eps=1e-3)
    rows = net.linear(net.add("reshape", y, shape=(-1, 12)), 36, 12, density=0.4)
    packed = net.add("reshape", rows, shape=(0, 16, 36))
    q, k, v = (net.add("slice", packed, axis=2, start=s, stop=s + 12) for s in (0, 12, 24))
    z = net.linear(net.add("attention", q, k, v, heads=4, scale=0.5), 12, 12, residual=x)
    return [net.linear(net.linear(z, 24, 12, act="gelu"), 12, 24, residual=z), net.add("softmax", k, axis=2)]


@case()
def concat(net):
    """Channels side by side before a layer that sees the borders; other axes; tokens."""
    x, t = net.input(0, 3, 11, 7), net.input(0, 9, 5)
    a = net.conv(x, 5, 3, 3, 3, pad=(1, 1, 1, 1), act="relu")
    b = net.conv(a, 7, 5, 3, 3, pad=(1, 1, 1, 1), density=0.3)
    both = net.add("concat", a, b, a, axis=1)
    c = net.conv(both, 5, 17, 3, 3, pad=(1, 1, 1, 1), density=0.3)
    pooled = net.add("max_pool", both, kernel=(3, 3), stride=(2, 2), pad=(1, 1, 1, 1))
    tokens = net.linear(t, 7, 5)
    return [
        c, net.conv(pooled, 3, 17, 3, 3, pad=(1, 1, 1, 1)), net.conv(net.add("concat", a, x, axis=1), 3, 8, 3, 3),
        net.conv(net.add("concat", a, a, axis=2), 3, 5, 3, 3), net.add("concat", a, a, axis=3),
        net.add("concat", tokens, t, axis=2), net.add("concat", tokens, tokens, axis=1), net.add("concat", c, axis=1),
    ]  # fmt: skip


@case()
def slices(net):
    """Parts of channels before layers that see the borders; other axes and steps."""
    x, t = net.input(0, 7, 11, 9), net.input(0, 9, 11)
    a = net.conv(x, 13, 7, 3, 3, pad=(1, 1, 1, 1), act="relu")
    left, right = net.add("slice", a, axis=1, start=0, stop=6), net.add("slice", a, axis=1, start=6, stop=13)
    b = net.conv(right, 6, 7, 5, 5, pad=(2, 2, 2, 2), density=0.3, residual=left)
    mixed = net.add("concat", left, b, right, axis=1)
    inner = net.add("slice", net.add("slice", mixed, axis=1, start=2, stop=17), axis=1, start=1, stop=9)
    tokens = net.linear(t, 13, 11)
    part = net.add("slice", tokens, axis=2, start=3, stop=11)
    return [
        net.conv(inner, 3, 8, 3, 3, pad=(1, 1, 1, 1)), net.conv(mixed, 3, 19, 3, 3, pad=(1, 1, 1, 1), stride=(2, 2)),
        net.add("slice", a, axis=1, start=1, stop=12, step=3), net.add("slice", a, axis=2, start=2, stop=7),
        net.conv(net.add("slice", a, axis=3, start=0, stop=9, step=2), 3, 13, 3, 3), left,
        net.linear(part, 5, 8), net.add("slice", tokens, axis=1, start=4, stop=9), part,
        net.add("binary", part, net.add("slice", tokens, axis=2, start=0, stop=8), fn="mul", act="silu"),
    ]  # fmt: skip


@case()
def moves(net):
    """Reshape, permute, expand and pad, between layers in lanes."""
    x = net.input(0, 6, 8, 5)
    a = net.conv(x, 6, 6, 3, 3, pad=(1, 1, 1, 1))
    last = net.add("permute", a, dims=(0, 2, 3, 1))
    tokens = net.linear(net.add("layer_norm", last, eps=1e-3), 11, 6, act="gelu")
    back = net.add("permute", net.linear(tokens, 6, 11), dims=(0, 3, 1, 2))
    b = net.conv(net.add("binary", a, back, fn="add"), 6, 6, 3, 3, pad=(1, 1, 1, 1), density=0.4)
    padded = net.add("pad", b, pad=((0, 0), (0, 1), (2, 0), (1, 3)), value=-0.5)
    wide = net.add("expand", net.add("reshape", b, shape=(0, 6, 1, 40)), shape=(0, 6, 3, -1))
    return [
        net.conv(padded, 3, 7, 3, 3),
        wide,
        net.add("reshape", b, shape=(0, -1)),
        net.add("reshape", tokens, shape=(-1, 8, 5, 11)),
    ]


@case()
def embedding(net):
    ids = net.input(0, 9, ids=31)
    x = net.add("embedding", ids, weight=net.numbers(31, 12))
    y = net.add("binary", x, net.const(9, 12), fn="add")
    return [net.linear(y, 7, 12, act="gelu"), x]


@case(*itertools.product(("lstm", "gru"), (1, 2), (1, 2), (False, True)))
def recurrent(net, option):
    """Layers, directions and orders of the axes, with first states and without."""
    op, layers, directions, first = option
    shape = {"hidden": 11, "layers": layers, "bidirectional": directions == 2, "batch_first": first}
    x = net.input(0, 9, 7) if first else net.add("permute", net.input(0, 9, 7), dims=(1, 0, 2))
    state = net.add("permute", net.input(0, layers * directions, 11), dims=(1, 0, 2))
    states = [state] * (2 if op == "lstm" else 1)
    outs = [*net.add(op, x, **shape, **net.cell(op, 7, 11, layers, directions))]
    outs += net.add(op, x, *states, **shape, **net.cell(op, 7, 11, layers, directions))
    return [net.linear(outs[0], 5, 11 * directions), *outs]


@case()
def outputs(net):
    """An input as an output, one value twice, a constant, a view, and what other nodes still read."""
    x, t = net.input(0, 5, 7, 3), net.input(0, 9, 5)
    a = net.conv(x, 5, 5, 3, 3, pad=(1, 1, 1, 1), act="relu")
    b = net.conv(a, 5, 5, 3, 3, pad=(1, 1, 1, 1), residual=a)
    c = net.linear(t, 5, 5)
    view = net.add("reshape", b, shape=(0, -1))
    return [
        x,
        a,
        a,
        b,
        view,
        net.add("reshape", x, shape=(0, 5, 21)),
        c,
        t,
        net.const(3),
        c,
        net.add("reshape", view, shape=(0, 35, 3)),
    ]


@pytest.mark.parametrize("isa", kit.ISAS)
@pytest.mark.parametrize("name", CASES)
def test_operator(cases, name, isa):
    cases(name).check(isa, kit.batches_of(isa))


def test_every_operator_is_here():
    """The networks above leave no operator, activation or function out."""
    nets = {name: kit.Net() for name in CASES}
    for name, net in nets.items():
        CASES[name](net)
    nodes = [node for net in nets.values() for node in net.nodes]
    assert {node.op for node in nodes} == set(OPS)
    assert {node.attrs["act"] for node in nodes if "act" in node.attrs} == set(ACTIVATIONS)
    assert {node.attrs["fn"] for node in nodes if node.op == "unary"} == set(UNARY)
