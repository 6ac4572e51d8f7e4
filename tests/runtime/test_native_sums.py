"""Sums of two convolutions, and sums that take their residual's place, against the float64 reference."""

import importlib.util
import pathlib

import numpy as np
import pytest

_spec = importlib.util.spec_from_file_location("native_kit", pathlib.Path(__file__).with_name("native_kit.py"))
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)
pytestmark = kit.needs_native
Case, Core, Net = kit.Case, kit.Core, kit.Net
PAD = {"pad": (1, 1, 1, 1)}


def shortcut(net, x, **attrs):
    """relu(conv3x3(relu(conv3x3(x, stride 2))) + conv1x1(x, stride 2)): its values."""
    a = net.conv(x, 12, 6, 3, 3, stride=(2, 2), act="relu", density=0.4, **PAD)
    s = net.conv(x, 10, 6, 1, 1, stride=(2, 2), density=0.4, **attrs)
    return a, s, net.conv(a, 10, 12, 3, 3, residual=s, act="relu", density=0.4, **PAD)


def check(case, batches=(1, 3, 8), **options):
    """Every batch at several numbers of threads; the steps of the last."""
    for batch in batches:
        for threads in (1, 2, 3):
            with Core(case.path, threads, **options) as core:
                found = core(*case.inputs(batch))
                for name, want, have in zip(case.graph.outputs, case.wanted(batch), found, strict=True):
                    kit.assert_close(have, want, f"{name}, batch {batch}, {threads} threads")
                steps = core.explain(batch)["steps"]
    return {step["node"]: step for step in steps}


def test_a_shortcut_is_summed_within_the_convolution_that_adds_it(tmp_path):
    net = Net(1)
    *_, y = shortcut(net, net.input(0, 6, 13, 11))
    steps = check(Case(net, [y], tmp_path / "plan"))
    assert "summed within 'conv2'" in steps["conv1"]["reason"] and "summed" not in steps["conv2"]["reason"]
    assert steps["conv1"]["nonzeros"] == np.count_nonzero(net.weights["conv1.weight"]) and steps["conv1"]["ms"] == 0


@pytest.mark.parametrize("isa", ["base", "auto"])
@pytest.mark.parametrize("strips", [1, 2, 4])
def test_every_layout_sums(tmp_path, isa, strips):
    net = Net(strips)
    *_, y = shortcut(net, net.input(0, 6, 16, 9))
    check(Case(net, [y], tmp_path / "plan"), batches=(1, 5), isa=isa, tuning={"strips": strips})


@pytest.mark.parametrize("who", ["an activation", "an output", "two readers", "a residual", "dense", "told"])
def test_shortcuts_that_are_needed_themselves_are_run(tmp_path, who):
    net, options = Net(2), {}
    x = net.input(0, 6, 13, 11)
    outputs = []
    if who == "dense":
        a = net.conv(x, 10, 6, 3, 3, stride=(2, 2), density=0.4, **PAD)
        s = net.conv(x, 10, 6, 1, 1, stride=(2, 2))
        y = net.conv(a, 10, 10, residual=s, density=0.4, **PAD)
    elif who == "a residual":
        first = net.conv(x, 10, 6, 1, 1, stride=(2, 2), density=0.4)
        a = net.conv(x, 12, 6, stride=(2, 2), act="relu", density=0.4, **PAD)
        s = net.conv(x, 10, 6, 1, 1, stride=(2, 2), residual=first, density=0.4)
        y = net.conv(a, 10, 12, residual=s, density=0.4, **PAD)
    else:
        _, s, y = shortcut(net, x, **({"act": "relu"} if who == "an activation" else {}))
        outputs = {"an output": [s], "two readers": [net.add("unary", s, fn="tanh")]}.get(who, [])
        options = {"tuning": {"layers": {"conv1": {"path": "lists"}}}} if who == "told" else {}
    steps = check(Case(net, [y, *outputs], tmp_path / "plan"), **options)
    name = s.rpartition("_")[0]
    assert "summed" not in steps[name]["reason"]


def test_sums_lie_in_their_residual_only_where_nothing_else_reads_it(tmp_path):
    """Read later, read by the same node, sliced, and kept as an output: each still has its own values."""
    net = Net(3)
    x = net.input(0, 6, 12, 10)
    a = net.conv(x, 8, 6, act="relu", density=0.5, **PAD)
    b = net.conv(a, 8, 8, density=0.5, **PAD)
    kept = net.conv(b, 8, 8, residual=a, density=0.5, **PAD)  # a is read again below
    itself = net.conv(kept, 8, 8, residual=kept, density=0.5, **PAD)
    part = net.add("slice", itself, axis=1, start=2, stop=6)
    sliced = net.conv(itself, 8, 8, residual=itself, density=0.5, **PAD)
    free = net.conv(sliced, 8, 8, act="relu", density=0.5, **PAD)
    in_place = net.conv(free, 8, 8, residual=sliced, density=0.5, **PAD)
    last = net.conv(in_place, 8, 8, residual=a, density=0.5, **PAD)
    check(Case(net, [last, part, kept], tmp_path / "plan"))


def test_token_sums_in_place(tmp_path):
    net = Net(4)
    x = net.input(0, 19, 12)
    a = net.linear(x, 16, 12, density=0.5)
    b = net.linear(a, 24, 16, act="gelu", density=0.3)
    c = net.linear(b, 16, 24, residual=a, density=0.3)
    d = net.linear(net.linear(c, 24, 16, density=0.3), 16, 24, residual=c, density=0.3)
    check(Case(net, [d], tmp_path / "plan"))


def test_in_place_needs_less_memory(tmp_path):
    """A chain of residual sums holds two maps and what lies between, however long it is."""

    def chain(length):
        net = Net(5)
        x = net.conv(net.input(0, 4, 32, 32), 32, 4, 1, 1, density=0.5)
        for _ in range(length):
            x = net.conv(net.conv(x, 8, 32, 1, 1, density=0.5), 32, 8, 1, 1, residual=x, density=0.5)
        case = Case(net, [net.add("reduce", x, fn="mean", axes=(2, 3), keepdims=False)], tmp_path / f"{length}")
        with Core(case.path) as core:
            explained = core.explain(1)
        return explained["bytes"]

    big = 32 * 32 * 32 * 4
    assert chain(3) < 2.2 * big
