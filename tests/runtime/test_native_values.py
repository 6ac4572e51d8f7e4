"""NaN, infinity and huge numbers go where the reference takes them and nowhere else: no lane leaks into another."""

import importlib.util
import itertools
import math
import pathlib

import numpy as np
import pytest

from secateur.runtime.operators import ACTIVATIONS, BINARY, UNARY

_spec = importlib.util.spec_from_file_location("native_kit", pathlib.Path(__file__).with_name("native_kit.py"))
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)
pytestmark = [kit.needs_native, pytest.mark.parametrize("isa", kit.ISAS)]

NAN = math.nan
ODD = [NAN, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 1e-30, 3e38, -3e38, 1e20, -1e20, 1e6, -1e6, 1e4, -1e4]
ODD += [88.6, 88.73, 89.0, -87.2, -87.4, -104.0, 20.0, -20.0, 8.0, -8.0, 5.0, -5.0, 3.0, -3.0, 1.0, -1.0, 0.5]
TINY = {"gelu": 1e-6, "gelu_tanh": 1e-6, "log": 1e-6, "silu": 1e-35}  # a small rest of larger numbers may be zero


def image(net):
    """Maps, their parts, pools and a squeeze."""
    x = net.input(0, 5, 11, 7)
    a = net.conv(x, 9, 5, 3, 3, pad=(1, 1, 1, 1), act="gelu", density=0.6)
    b = net.conv(net.add("slice", a, axis=1, start=2, stop=9), 9, 7, 3, 3, pad=(1, 1, 1, 1), residual=a, act="relu")
    c = net.add("concat", net.add("max_pool", b, kernel=(3, 3), pad=(1, 1, 1, 1)), b, axis=1)
    gate = net.conv(net.add("adaptive_avg_pool", c, size=(1, 1)), 18, 18, 1, 1, act="sigmoid")
    d = net.add("binary", c, gate, fn="mul", act="hardswish")
    e = net.conv(d, 18, 1, 5, 5, groups=18, stride=(2, 2), pad=(2, 2, 2, 2))
    f = net.add("group_norm", e, groups=3, eps=1e-3)
    return [
        net.conv(f, 4, 18, 3, 3),
        net.add("avg_pool", f, kernel=(2, 2)),
        net.add("reduce", e, fn="max", axes=(2, 3), keepdims=False),
    ]


def rows(net):
    """Layers over one row an example, dense and sparse."""
    x = net.input(0, 37)
    a = net.linear(x, 41, 37, act="silu")
    b = net.linear(a, 43, 41, density=0.2, act="tanh")
    return [net.add("softmax", net.linear(b, 7, 43), axis=1), net.add("rms_norm", b, eps=1e-3)]


def sequence(net, length):
    """A transformer block."""
    x = net.input(0, length, 12)
    y = net.add("layer_norm", x, weight=net.numbers(12), bias=net.numbers(12), eps=1e-3)
    q, k, v = (net.linear(y, 12, 12, density=d) for d in (1.0, 0.5, 0.3))
    mixed = net.add("attention", q, k, v, heads=3, scale=0.5, causal=length % 2 == 0)
    z = net.linear(mixed, 12, 12, residual=x)
    return [net.linear(net.linear(z, 24, 12, act="gelu_tanh"), 12, 24, residual=z), net.add("softmax", q, axis=2)]


def recurrent(net):
    """LSTM over time, then a layer."""
    x = net.input(0, 5, 7)
    shape = {"hidden": 6, "layers": 2, "bidirectional": True, "batch_first": True}
    y, _, _ = net.add("lstm", x, **shape, **net.cell("lstm", 7, 6, 2, 2))
    return [net.linear(y, 5, 12), net.add("matmul", y, net.const(12, 3)), net.add("permute", y, dims=(0, 2, 1))]


NETS = {"image": image, "rows": rows, "recurrent": recurrent}
NETS |= {f"sequence{n}": (lambda net, n=n: sequence(net, n)) for n in (7, 8, 9, 18)}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("plans"), {}
    for name, build in NETS.items():
        net = kit.Net(3)
        made[name] = kit.Case(net, build(net), folder / name)
    return made


def same(found, wanted, but=None):
    """Equal to the bit, but for one example."""
    for got, want in zip(found, wanted, strict=True):
        kept = np.arange(len(got)) != (-1 if but is None else but)
        np.testing.assert_array_equal(got[kept].view(np.int32), want[kept].view(np.int32))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("poison", [NAN, math.inf], ids=["nan", "inf"])
def test_an_example_cannot_reach_another(cases, name, poison, isa):
    """Every other example is the same to the bit, and so is the next run: nothing stays in the buffers."""
    case = cases[name]
    for threads, batch in ((1, kit.lanes(isa) + 1), (3, 3)):
        with kit.Core(case.path, threads=threads, isa=isa) as session:
            (x,) = case.inputs(batch)
            clean = session(x)
            for bad in {0, 1, batch - 1}:
                dirty = x.copy()
                dirty[bad] = poison
                found = session(dirty)
                assert all(np.isnan(got[bad]).any() for got in found)
                same(found, clean, but=bad)
                same(session(x), clean)


@pytest.mark.parametrize("name", NETS)
def test_a_batch_cannot_reach_the_next_one(cases, name, isa):
    """Buffers are shared by nothing: any order of batch sizes, full of NaN or not, gives the same to the bit."""
    case = cases[name]
    with kit.Core(case.path, threads=1, isa=isa) as session:
        clean = {batch: session(*case.inputs(batch)) for batch in (1, 2, 3, 5, 17)}
        for batch in (3, 1, 17, 2, 5, 1, 3):
            session(*(np.full_like(x, NAN) for x in case.inputs(batch)))
            same(session(*case.inputs(batch)), clean[batch])


@pytest.mark.parametrize("length", [7, 9, 16])
def test_a_token_cannot_reach_another(tmp_path, length, isa):
    """Layers over single tokens keep a NaN in its token, also in the last one before the padding."""
    net = kit.Net()
    x = net.input(0, length, 11)
    y = net.add("layer_norm", net.linear(x, 13, 11, act="gelu"), eps=1e-3)
    z = net.add("softmax", net.linear(y, 5, 13, density=0.5, act="silu"), axis=2)
    case = kit.Case(net, [z, y], tmp_path / "p")
    with kit.Core(case.path, threads=1, isa=isa) as session:
        (x,) = case.inputs(3)
        clean = session(x)
        for example, token in itertools.product(range(3), (0, length // 2, length - 1)):
            dirty = x.copy()
            dirty[example, token] = NAN
            kept = np.ones((3, length), bool)
            kept[example, token] = False
            for got, want in zip(session(dirty), clean, strict=True):
                np.testing.assert_array_equal(got[kept].view(np.int32), want[kept].view(np.int32))
                assert np.isnan(got[~kept]).all()


def check_odd(net, outputs, path, isa, *inputs, tiny=2e-38):
    """NaN and infinity as in the reference; finite numbers near it one by one; what is tiny may be zero."""
    case = kit.Case(net, outputs, path)
    for threads in kit.THREADS:
        with kit.Core(case.path, threads=threads, isa=isa) as session, np.errstate(all="ignore"):
            for got, exact in zip(session(*inputs), case.exact(*inputs), strict=True):
                want = exact.astype(np.float32)
                calm = np.isfinite(want)
                np.testing.assert_array_equal(got[~calm], want[~calm])
                np.testing.assert_allclose(got[calm], want[calm], rtol=1e-5, atol=tiny)


def lane_image(net, *shape):
    """An input and the same numbers in lanes."""
    x = net.input(*shape)
    return x, net.add("max_pool", x, kernel=(1, 1))


@pytest.mark.parametrize("fn", UNARY)
def test_unary_at_the_edges(tmp_path, fn, isa):
    net = kit.Net()
    x, image = lane_image(net, 0, 3, len(ODD), 1)
    values = np.tile(np.array(ODD, np.float32).reshape(1, 1, -1, 1), (2, 3, 1, 1))
    outs = [net.add("unary", x, fn=fn), net.add("unary", image, fn=fn)]
    check_odd(net, outs, tmp_path / "p", isa, values, tiny=TINY.get(fn, 2e-38))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_at_the_edges(tmp_path, act, isa):
    """After a sum, as layers apply them."""
    net = kit.Net()
    x, image = lane_image(net, 0, 3, 11, 3)
    zero = net.add("const", value=np.array(0, np.float32))
    values = np.array(ODD, np.float32).reshape(1, 1, 11, 3).repeat(3, 1)
    outs = [net.add("binary", v, zero, fn="add", act=act) for v in (x, image)]
    check_odd(net, outs, tmp_path / "p", isa, values, tiny=TINY.get(act, 2e-38))


@pytest.mark.parametrize("fn", BINARY)
def test_binary_at_the_edges(tmp_path, fn, isa):
    """Every pair of odd numbers, in lanes and in plain arrays."""
    net = kit.Net()
    (x, image), (y, _) = lane_image(net, 0, 1, len(ODD), len(ODD)), lane_image(net, 0, 1, len(ODD), len(ODD))
    a, b = np.meshgrid(np.array(ODD, np.float32), np.array(ODD, np.float32))
    outs = [net.add("binary", image, y, fn=fn), net.add("binary", y, image, fn=fn), net.add("binary", x, y, fn=fn)]
    check_odd(net, outs, tmp_path / "p", isa, a[None, None], b[None, None])


def test_softmax_at_the_edges(tmp_path, isa):
    """Rows that are all -inf, hold NaN, +inf or huge numbers; only those rows suffer."""
    net = kit.Net()
    x = net.input(0, 9, 4)
    tokens = net.add("slice", net.linear(x, 5, 4), axis=2, start=0, stop=5)
    values = np.random.default_rng(1).standard_normal((2, 9, 4)).astype(np.float32)
    odd = net.add("binary", tokens, net.add("const", value=_odd_rows()), fn="add")
    outs = [net.add("softmax", odd, axis=2), net.add("softmax", odd, axis=1), net.add("layer_norm", odd, eps=1e-3)]
    check_odd(net, outs[:2], tmp_path / "p", isa, values, tiny=1e-6)


def _odd_rows():
    rows = np.zeros((9, 5), np.float32)
    rows[1], rows[3, 2], rows[4, 0], rows[6, 1], rows[7] = -np.inf, NAN, np.inf, -np.inf, 1e30
    return rows


@pytest.mark.parametrize("causal", [False, True])
def test_attention_that_sees_nothing(tmp_path, causal, isa):
    """Queries whose keys are all hidden give NaN, the others do not; a NaN key reaches those that see it."""
    net = kit.Net()
    x, m = net.input(0, 9, 8), net.input(0, 1, 9, 9)
    q, k, v = (net.linear(x, 8, 8) for _ in range(3))
    y = net.add("attention", q, k, v, m, heads=2, scale=0.5, causal=causal)
    mask = np.zeros((3, 1, 9, 9), np.float32)
    mask[0, 0, 4], mask[1, 0, :, 3:], mask[2, 0, 5, 1], mask[2, 0, 8] = -np.inf, -np.inf, NAN, 1e30
    values = np.random.default_rng(1).standard_normal((3, 9, 8)).astype(np.float32)
    check_odd(net, [y], tmp_path / "p", isa, values, mask, tiny=1e-6)


@pytest.mark.parametrize("op", ["max_pool", "avg_pool", "adaptive_avg_pool", "reduce"])
def test_windows_with_odd_numbers(tmp_path, op, isa):
    """A NaN or an infinity reaches the windows that see it; padding counts as -inf or not at all."""
    net = kit.Net()
    x, image = lane_image(net, 0, 2, 13, 11)
    options = {
        "max_pool": [
            {"kernel": (3, 2), "stride": (2, 1), "pad": (2, 1, 2, 1)},
            {"kernel": (1, 1), "pad": (2, 2, 2, 2)},
        ],
        "avg_pool": [{"kernel": (3, 2), "pad": (1, 1, 1, 0), "count_pad": c} for c in (True, False)],
        "adaptive_avg_pool": [{"size": (1, 1)}, {"size": (13, 11)}, {"size": (4, 5)}],
        "reduce": [{"fn": fn, "axes": (2, 3), "keepdims": True} for fn in ("max", "mean", "sum")],
    }[op]
    values = np.random.default_rng(2).standard_normal((9, 2, 13, 11)).astype(np.float32)
    values[0, 0, 3, 4], values[1, 1, 0, 0], values[2, 0, 12, 10], values[3, 1, 5] = NAN, np.inf, -np.inf, -np.inf
    values[4, 0, 6, 2:4], values[8, 1, 12] = (np.inf, -np.inf), NAN
    outs = [net.add(op, v, **given) for given in options for v in (x, image)]
    check_odd(net, outs, tmp_path / "p", isa, values, tiny=2e-6)


@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("path", ["lists", "blocks"])
def test_products_with_odd_numbers(tmp_path, density, path, isa):
    """A NaN reaches what has a weight for it; what the reference keeps clean stays clean."""
    net = kit.Net(4)
    x, t = net.input(0, 3, 11, 7), net.input(0, 9, 11)
    outs = [net.conv(x, 9, 3, 3, 3, pad=(1, 1, 1, 1), density=density), net.linear(t, 13, 11, density=density)]
    outs.append(net.conv(x, 6, 1, 3, 3, groups=3, stride=(2, 2), density=density))
    case = kit.Case(net, outs, tmp_path / "p")
    random = np.random.default_rng(5)
    x, t = (random.standard_normal(s).astype(np.float32) for s in ((3, 3, 11, 7), (3, 9, 11)))
    x[0, 1, 5, 3], x[2, 0, 10, 6], t[1, 8, 4], t[2, 0, 0] = NAN, np.inf, NAN, -np.inf
    net.weights = {name: (w != 0) * np.float32(name.endswith("weight")) for name, w in net.weights.items()}
    seen = kit.Case(net, outs, tmp_path / "seen").exact(*(np.where(np.isfinite(a), 0, 1.0) for a in (x, t)))
    tuning = {"layers": {node.name: {"path": path} for node in case.graph.nodes}}
    with kit.Core(case.path, threads=3, isa=isa, tuning=tuning) as session, np.errstate(all="ignore"):
        for got, want, reached in zip(session(x, t), case.exact(x, t), seen, strict=True):
            assert not np.isfinite(got[reached > 0]).any()
            calm = np.isfinite(want)
            assert not np.isfinite(want[reached > 0]).any() and (density == 1) <= (calm == (reached == 0)).all()
            np.testing.assert_allclose(got[calm], want[calm], rtol=1e-5, atol=1e-5)
