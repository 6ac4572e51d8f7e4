"""Choices that override the core's own rules give the same results: every way through the code, on small networks."""

import importlib.util
import pathlib

import pytest

from secateur.core.errors import UsageError
from secateur.runtime.session import Session

_spec = importlib.util.spec_from_file_location("native_kit", pathlib.Path(__file__).with_name("native_kit.py"))
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)
pytestmark = kit.needs_native


def image(net):
    """Strides, residuals, pools, parts of channels, a squeeze: rows cross from strip to strip in every step."""
    x = net.input(0, 5, 23, 19)
    a = net.conv(x, 13, 5, 5, 5, stride=(2, 1), pad=(2, 2, 2, 2), act="relu", density=0.4)
    b = net.conv(a, 13, 13, 3, 3, pad=(1, 1, 1, 1), residual=a, density=0.5)
    c = net.add("max_pool", b, kernel=(3, 3), stride=(2, 2), pad=(1, 1, 1, 1))
    left, right = net.add("slice", c, axis=1, start=0, stop=6), net.add("slice", c, axis=1, start=6, stop=13)
    d = net.conv(right, 6, 7, 3, 3, pad=(2, 2, 2, 2), dilation=(2, 2), residual=left, act="silu")
    e = net.add("concat", d, c, axis=1)
    gate = net.conv(net.add("adaptive_avg_pool", e, size=(1, 1)), 19, 19, 1, 1, act="sigmoid")
    f = net.add("binary", e, gate, fn="mul")
    g = net.conv(f, 19, 1, 3, 3, groups=19, pad=(1, 1, 1, 1))
    return [
        net.conv(g, 7, 19, 7, 1, pad=(3, 0, 3, 0), block=4, density=0.5),
        net.add("reduce", g, fn="mean", axes=(2, 3), keepdims=False),
    ]


def tokens(net):
    """A transformer block over 19 tokens."""
    x = net.input(0, 19, 20)
    y = net.add("layer_norm", x, weight=net.numbers(20), bias=net.numbers(20), eps=1e-3)
    q, k, v = (net.linear(y, 20, 20, density=d) for d in (1.0, 0.5, 0.1))
    z = net.linear(net.add("attention", q, k, v, heads=4, scale=0.4), 20, 20, residual=x)
    return [net.linear(net.linear(z, 37, 20, act="gelu", density=0.3), 20, 37, residual=z), q]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    made = {}
    for build in (image, tokens):
        net = kit.Net(5)
        made[build.__name__] = kit.Case(net, build(net), folder / build.__name__)
    return made


def products(case):
    return [node.name for node in case.graph.nodes if node.op in ("conv", "linear")]


def strips(isa):
    return [1 << n for n in range(5) if 1 << n <= kit.lanes(isa)]


@pytest.mark.parametrize("isa", kit.ISAS)
def test_strips(cases, isa):
    """Images over lanes in every division: from one image a lane to all lanes for one image."""
    for count in strips(isa):
        cases["image"].check(isa, kit.batches_of(isa), (1, 3), {"strips": count})
        with kit.Core(cases["image"].path, threads=1, isa=isa, tuning={"strips": count}) as session:
            assert session.explain(3)["strips"] == count


@pytest.mark.parametrize("isa", kit.ISAS)
@pytest.mark.parametrize("name", ["image", "tokens"])
@pytest.mark.parametrize("path", ["lists", "blocks"])
def test_paths(cases, name, path, isa):
    """Lists or blocks everywhere, in wide and in narrow tiles, with the weights in many chunks and in one."""
    case = cases[name]
    for p in (0, 1, 2, 5):
        for chunk in (0, 1, 700):
            layers = {layer: {"path": path, "p": p, "chunk": chunk} for layer in products(case)}
            case.check(isa, (1, 3), (1,) if p else (1, 3), {"layers": layers})
            case.check(isa, (2,), (1,), {"layers": layers, "strips": strips(isa)[-1]})
    ungrouped = [n.name for n in case.graph.nodes if n.op in ("conv", "linear") and n.attrs.get("groups", 1) == 1]
    with kit.Core(case.path, threads=1, isa=isa, tuning={"layers": layers}) as session:
        taken = kit.steps(session, 3)
        assert all(("lists" in taken[name]) == (path == "lists") for name in ungrouped)


@pytest.mark.parametrize("isa", kit.ISAS)
def test_vectors_in_a_row_of_tokens(cases, isa):
    for vectors in (1, 2, 3, 7, 1000):
        cases["tokens"].check(isa, kit.batches_of(isa), (1, 3), {"vectors": vectors})


def apart(net):
    """Examples that stay apart, through a view without the batch; one input serves all of them."""
    x, shared = net.input(0, 5, 6), net.input(6, 7)
    a = net.add("matmul", net.linear(net.add("reshape", x, shape=(-1, 6)), 6, 6, act="relu"), shared)
    b = net.add("reshape", a, shape=(0, 5, 7))
    return [net.linear(b, 3, 7), a, x]


def mixed(net):
    """A mean over the batch: no example can be run alone."""
    x = net.linear(net.input(0, 9), 7, 9)
    mean = net.add("reduce", x, fn="mean", axes=(0,), keepdims=True)
    return [net.add("binary", x, mean, fn="sub"), net.add("softmax", x, axis=0)]


@pytest.mark.parametrize("isa", kit.ISAS)
@pytest.mark.parametrize("build", [image, tokens, apart, mixed])
def test_pieces(tmp_path, build, isa):
    """A batch run in pieces, with a smaller last one, is the batch; unless its examples meet."""
    net = kit.Net(6)
    case = kit.Case(net, build(net), tmp_path / "p")
    for piece in (1, 2, 3, 9, 50):
        case.check(isa, (1, 2, 7, 9), (1, 3), {"piece": piece})
    with kit.Core(case.path, threads=1, isa=isa, tuning={"piece": 2}) as session:
        assert session.explain(7)["piece"] == (7 if build is mixed else 2)


def test_large_maps_are_cut_into_pieces(tmp_path):
    """The built-in rule cuts a batch whose maps do not fit the cache."""
    net = kit.Net()
    y = net.conv(net.input(0, 2, 96, 96), 40, 2, 3, 3, pad=(1, 1, 1, 1), density=0.3)
    case = kit.Case(net, [net.conv(y, 1, 40, 1, 1, stride=(2, 2))], tmp_path / "p")
    case.check("auto", (7,), (3,))
    with kit.Core(case.path, threads=1) as session:
        assert session.explain(7)["piece"] < 7


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        ({"strips": 3}, "strips is 3"),
        ({"strips": 32}, "strips is 32"),
        ({"strips": -1}, "strips must be a whole number"),
        ({"vectors": 1.5}, "vectors must be a whole number"),
        ({"speed": 1}, "'speed' is not one of"),
        ({"layers": {"a": {"path": "fast"}}}, "'fast', not lists or blocks"),
        ({"layers": {"a": {"path": 3}}}, "not lists or blocks"),
        ({"layers": {"a": {"rows": 3}}}, "'rows' is not one of"),
        ({"layers": {"a": 3}}, "'a' must be an object"),
        ({"layers": 3}, "'layers' is not one of"),
    ],
)
def test_wrong_tuning(cases, tuning, message):
    with pytest.raises(UsageError, match=message):
        Session(cases["image"].path, tuning=tuning)
