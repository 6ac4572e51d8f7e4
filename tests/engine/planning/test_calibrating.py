"""Layers found in every network, zeros where they were drawn, what is measured is remembered, and held-out errors."""

import json
import math
import subprocess
import sys

import pytest
import torch

from secateur import _native
from secateur.cli.main import main
from secateur.core.names import aliases
from secateur.core.patterns import parse_pattern
from secateur.core.prunable import coverage
from secateur.engine.planning import calibrating, measuring
from secateur.engine.planning.calibrating import Subject
from secateur.engine.planning.energy import joules, why_no_energy
from secateur.engine.planning.operators import Layer, find_layers, milliseconds
from secateur.engine.planning.shapes import Known, held_out
from secateur.engine.planning.table import CostTable, Machine, Point
from secateur.engine.planning.variants import DENSE, Variants, draw, kept_units
from secateur.nets import build, names
from secateur.runtime.graph import Graph, InputSpec, Node, WeightSpec

needs_core = pytest.mark.skipif(_native.library() is None, reason=f"no compiled core: {_native.why_not()}")
BOTH = ("unstructured", "4x1")


def image(size=32, channels=3):
    return torch.randn(1, channels, size, size)


NETS = {
    "mlp": ({"inputs": 12, "outputs": 3, "widths": (8, 8)}, torch.randn(1, 12)),
    "lenet5": ({}, image(28, 1)),
    "vgg11": ({"width": 0.125}, image()),
    "resnet_cifar": ({"width": 8, "depth": 8}, image(16)),
    "wide_resnet": ({"depth": 10, "widen": 1}, image(16)),
    "resnet18": ({"width": 8}, image(32)),
    "mobilenet_v1": ({"width": 0.25}, image(32)),
    "vit_tiny": ({"dim": 24, "depth": 1}, image()),
    "bert_tiny": ({"vocab": 20, "length": 8, "dim": 16, "depth": 1}, torch.randint(0, 20, (1, 8))),
    "gpt_tiny": ({"vocab": 20, "length": 8, "dim": 16, "depth": 1, "heads": 2}, torch.randint(0, 20, (1, 8))),
    "lstm": ({"vocab": 20, "hidden": 16}, torch.randint(0, 20, (1, 8))),
}
LIKE = {"vgg13": "vgg11", "vgg16": "vgg11", "vgg19": "vgg11", "resnet20": "resnet_cifar", "resnet32": "resnet_cifar",
        "resnet56": "resnet_cifar", "lenet_300_100": "mlp", "mobilenet_v2": "mobilenet_v1",
        "resnet34": "resnet18", "resnet50": "resnet18"}  # fmt: skip


def test_every_kind_of_network_is_looked_at():
    assert set(names()) == set(NETS) | set(LIKE)


@needs_core
@pytest.mark.parametrize("name", NETS)
def test_every_prunable_tensor_has_a_layer_or_a_reason_and_no_time_is_lost(name):
    options, example = NETS[name]
    net = build(name, None, None, **options).eval()
    variants = Variants(net, example, 1)

    found = {layer.tensor for layer in variants.sharing.layers}
    assert found | set(variants.sharing.left) == set(coverage(net).prunable)
    assert not found & set(variants.sharing.left) and found
    assert all(variants.sharing.left.values())
    with variants.as_it_is() as session:
        session(*variants.arrays)
        session.profile(True)
        session(*variants.arrays)
        told = session.explain(1)
    layers, rest = milliseconds(told, variants.sharing)
    assert set(layers) == found
    assert math.isclose(sum(layers.values()) + rest, sum(row["ms"] for row in told["steps"]), rel_tol=1e-9)
    variants.close()


@needs_core
@pytest.mark.parametrize("name", ["resnet_cifar", "vit_tiny", "lenet5"])
def test_the_core_counts_the_zeros_that_were_drawn(name):
    options, example = NETS[name]
    net = build(name, None, None, **options).eval()
    net.get_parameter(next(iter(coverage(net).prunable))).data[0] = 0.0  # zeros of its own do not count
    before = {key: value.clone() for key, value in net.state_dict().items()}
    variants = Variants(net, example, 1)
    chosen = {}
    for at, (tensor, layer) in enumerate(variants.layers.items()):
        pattern = ("unstructured", "4x1", "2:4", DENSE)[at % 4]
        fits = pattern == DENSE or not parse_pattern(pattern).why_not(layer.shape)
        chosen[tensor] = (pattern if fits else "unstructured", 0.3 if pattern != DENSE else 1.0)

    with variants.session(chosen, seed=5) as session:
        steps = {row["node"]: row for row in session.explain(1)["steps"] if row.get("weights")}

    counted = 0
    for tensor, (pattern, density) in chosen.items():
        layer = variants.layers[tensor]
        if (node := tensor.removesuffix(".weight")) in steps:
            made = parse_pattern(pattern) if pattern != DENSE else None
            kept = kept_units(made, layer.shape, density) * made.unit_size(layer.shape) if made else 0
            assert steps[node]["nonzeros"] == (kept or math.prod(layer.shape)), tensor
            counted += 1
    assert counted > 3
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    variants.close()


def test_a_draw_keeps_the_units_of_its_pattern():
    generator = torch.Generator().manual_seed(0)
    for pattern, shape, density in (("unstructured", (7, 9), 0.2), ("4x1", (8, 3, 3, 3), 0.1), ("2:4", (4, 8), 0.9)):
        made = parse_pattern(pattern)

        mask = draw(made, shape, density, generator)

        units = kept_units(made, shape, density)
        assert int(mask.sum()) == units * made.unit_size(shape)
        assert torch.equal(mask, made.mask(mask.float(), units))
    assert kept_units(parse_pattern("unstructured"), (4, 4), 1e-9) == 1
    assert kept_units(parse_pattern("2:4"), (4, 8), 0.9) == 16


def told(*rows):
    return {"strips": 1, "piece": 1, "steps": list(rows)}


def row(node, ms, path="lists", reason="", op="conv", shape=(1, 4, 2, 2)):
    return {"node": node, "op": op, "path": path, "reason": reason, "ms": ms, "shape": list(shape)}


def test_a_step_that_sums_two_layers_is_shared_by_their_work():
    """Two convolutions over the same places, of 9 and 1 taps: nine tenths of the step belong to the first."""
    conv = {"stride": (1, 1), "pad": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1, "act": "none"}
    nodes = (
        Node("conv", "one", ("x",), ("y",), {"weight": "one.weight"}, conv),
        Node("conv", "two", ("x", "y"), ("z",), {"weight": "two.weight"}, {**conv, "pad": (1, 1, 1, 1)}),
    )
    weights = {"one.weight": WeightSpec((4, 4, 1, 1)), "two.weight": WeightSpec((4, 4, 3, 3))}
    graph = Graph((InputSpec("x", "f32", (0, 4, 2, 2)),), ("z",), weights, nodes)
    shapes = {name: spec.shape for name, spec in weights.items()} | {"far.weight": (2, 2)}
    tensors = {name: (name,) for name in shapes}
    apart = told(row("one", 1.0, "dense"), row("two", 4.0, "dense"))
    together = told(row("two", 2.0), row("one", 0.0, reason="summed within 'two'"), row("one", 0.5, "pack"))

    sharing = find_layers(graph, apart, together, tensors, shapes)

    assert {layer.group for layer in sharing.layers} == {0} and "far.weight" in sharing.left
    assert milliseconds(apart, sharing) == ({"one.weight": 1.0, "two.weight": 4.0}, 0.0)
    layers, rest = milliseconds(together, sharing)
    assert layers == pytest.approx({"one.weight": 0.2, "two.weight": 1.8}, abs=1e-12) and rest == 0.5


def tiny(batch=1):
    torch.manual_seed(0)
    return build("mlp", (16,), 4, widths=(16, 12)).eval(), torch.randn(batch, 16)


def cost(folder, patterns=BOTH, measure=True, subject=tiny, **options):
    return measuring.forecast(*subject(), 1, patterns, measure, folder, seconds=0.0, **options)


@needs_core
def test_what_is_measured_once_is_remembered(tmp_path):
    said = []

    first = cost(tmp_path, say=said.append)

    assert "figures to measure" in said[0] and set(first.layers) == {"fc1.weight", "fc2.weight", "head.weight"}
    for curves in first.layers.values():
        assert set(curves) == set(BOTH)
        assert {curve.source for curve in curves.values()} == {"measured"}
        assert all(curve.densities[-1] == 1.0 for curve in curves.values())
    table, machine = CostTable.open(tmp_path), Machine.here(first.isa, 1)
    assert not measuring.missing_rungs(table, machine, Variants(*tiny(), 1).layers, BOTH)
    assert len(table.checks[str(machine)]) == measuring.CHECKS and 0 <= first.error
    content = (tmp_path / "costs.json").read_bytes()
    again = cost(tmp_path, say=said.append)
    assert not any("to measure" in text for text in said[2:])
    assert (tmp_path / "costs.json").read_bytes() == content
    assert again.layers.keys() == first.layers.keys() and again.error == first.error and again.fixed >= 0


@needs_core
def test_without_measuring_curves_come_from_like_shapes_or_not_at_all(tmp_path):
    alone = cost(tmp_path, measure=False)
    assert not alone.layers and all("not measured" in why for why in alone.left.values())
    assert set(alone.dense) == set(alone.left) and alone.error == measuring.UNKNOWN
    assert not (tmp_path / "costs.json").exists()
    cost(tmp_path)

    def other():
        torch.manual_seed(0)
        return build("mlp", (24,), 4, widths=(20,)).eval(), torch.randn(1, 24)

    guessed = cost(tmp_path, measure=False, subject=other)

    assert {curve.source for by in guessed.layers.values() for curve in by.values()} == {"interpolated"}
    assert any("not measured" in note for note in guessed.notes)
    new = cost(tmp_path, ("2:4",), measure=False)
    assert not new.layers and all("no layer like it" in why for why in new.left.values())


@needs_core
def test_a_pattern_that_does_not_fit_leaves_the_tensor(tmp_path):
    made = cost(tmp_path, ("8x1",))
    assert "8x1" in made.left["fc2.weight"] and "8x1" in made.left["head.weight"]
    assert set(made.layers) == {"fc1.weight"}


def law(features, density):
    """A rule that is the same for all shapes: the share of the dense time depends on the density alone."""
    return 0.1 + 0.9 * density


def known(tmp_path, factors):
    """A table in which each shape follows the law times its own factor."""
    table, machine = CostTable.open(tmp_path), Machine("cpu", "avx2", 1, "core")
    for at, factor in enumerate(factors):
        features = (float(at), 4.0)
        table.add(machine, f"shape {at}", DENSE, "1", Point(1.0, 2.0 + at, 0.1, features))
        for density in (0.5, 0.1):
            ms = (2.0 + at) * law(features, density) * factor
            table.add(machine, f"shape {at}", "unstructured", f"{density:g}", Point(density, ms, 0.1, features))
    return table, machine


def test_shapes_of_one_law_are_forecast_exactly(tmp_path):
    table, machine = known(tmp_path, [1.0] * 4)

    found = held_out(table, machine)

    assert found.error == pytest.approx(0, abs=1e-12) and (found.shapes, found.figures) == (4, 8)
    layer = Layer("w", ("w",), (2, 2), "another shape", (1.5, 4.0), 0)
    curve = Known(table, machine).curve(layer, "unstructured", 0.1, 10.0)
    assert curve.source == "interpolated" and curve.densities == (0.1, 0.5, 1.0)
    assert curve.ms == pytest.approx((1.9, 5.5, 10.0), abs=1e-9)


def test_the_held_out_error_is_that_of_the_definition(tmp_path):
    """Two shapes forecast each other: one is twice the other, so the errors are 100 % and 50 %."""
    table, machine = known(tmp_path, [1.0, 2.0])

    found = held_out(table, machine)

    assert found.figures == 4
    assert (found.error, found.median) == pytest.approx((1.0, 0.75), abs=1e-12)  # of [0.5, 0.5, 1, 1]


def test_one_shape_alone_tells_nothing_of_others(tmp_path):
    assert math.isnan(held_out(*known(tmp_path, [1.0])).error)


def test_figures_are_brought_to_the_pace_of_the_small_job(tmp_path):
    table, machine = known(tmp_path, [1.0])
    layer = Layer("w", ("w",), (2, 2), "shape 0", (0.0, 4.0), 0)

    curve = Known(table, machine).curve(layer, "unstructured", 0.3, 99.0)

    assert curve.source == "measured"
    assert curve.ms == pytest.approx((3 * 2 * 0.19, 3 * 2 * 0.55, 3 * 2.0), abs=1e-12)


@needs_core
def test_calibrating_keeps_what_is_done_when_it_is_stopped(tmp_path):
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 3  # once before each network, then within the first

    found = calibrating.calibrate(
        [Subject("first", tiny), Subject("second", tiny)],
        threads=1,
        patterns=BOTH,
        cache=tmp_path,
        seconds=0.0,
        stop=stop,
    )

    assert found.stopped and [row["name"] for row in found.rows] == ["first"]
    assert found.rows[0]["measured"] > 0
    held = calibrating.status(tmp_path)["machines"]
    assert len(held) == 1 and held[0]["figures"] == found.rows[0]["measured"]
    again = calibrating.calibrate([Subject("first", tiny)], threads=1, patterns=BOTH, cache=tmp_path, seconds=0.0)
    assert not again.stopped and again.rows[0]["measured"] == 0
    assert any(note.startswith("energy: ") for note in again.notes)


def test_the_base_set_can_be_built():
    for subject in calibrating.base_set():
        net, example = subject.make(2)
        assert len(example) == 2 and aliases(net)


def test_energy_says_why_there_is_none(tmp_path):
    assert joules(lambda: None, counters=tmp_path).note == "not exposed by this machine"
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("not a number")
    assert why_no_energy(tmp_path) == "not exposed by this machine"
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("123456\n")
    assert why_no_energy(tmp_path) in ("", "needs `pip install zeus`")


def test_status_of_an_empty_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    assert main(["calibrate", "--status"]) == 0
    assert "nothing is measured yet" in capsys.readouterr().out
    (tmp_path / "costs.json").write_text("{")
    assert main(["calibrate", "--status", "--json"]) == 0
    assert "not a table of costs" in json.loads(capsys.readouterr().out)["note"]


@needs_core
def test_the_command_measures_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrating, "SECONDS", 0.0)
    words = ["calibrate", "lenet_300_100", "--shape", "64", "--threads", "1", "--pattern", "unstructured"]

    assert main(words) == 0
    first = capsys.readouterr()
    assert "figures to measure" in first.err and str(tmp_path / "costs.json") in first.out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["measured"] == 0
    assert main(["calibrate", "--status"]) == 0
    assert "3 layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch", "0"], "at least 1"),
        (["--threads", "0"], "at least 1"),
        (["--pattern", "columns"], "not understood"),
        (["resnet20"], "--shape 3,32,32"),
        (["resnet20", "--shape", "3,a"], "not whole numbers"),
        (["resnet20", "--shape", "3,0,1"], "below 1"),
        (["resnet21", "--shape", "3,8,8"], "Did you mean 'resnet"),
    ],
)
def test_slips_end_with_code_2(words, said, capsys):
    assert main(["calibrate", *words]) == 2
    assert said in capsys.readouterr().err


def test_without_the_compiled_core_there_is_no_clock(tmp_path):
    code = (
        "import torch\nfrom secateur.nets import build\nfrom secateur.engine.planning.costs import network_cost\n"
        "from secateur.core.errors import UsageError\n"
        "try:\n    network_cost(build('mlp', (8,), 2, widths=(4,)), torch.randn(1, 8))\n"
        "except UsageError as error:\n    print(error)\n"
    )
    environment = {"SECATEUR_NATIVE": str(tmp_path / "none.so"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)

    assert "cannot be forecast" in done.stdout and "reference" in done.stdout, done.stderr
