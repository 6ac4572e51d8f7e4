"""Layers found in every network, zeros where they were drawn, what is measured is remembered, and held-out errors."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.engine.planning.plan_kit import cost_of_kit, how, task_of

from secateur import _native
from secateur.cli.main import main
from secateur.core.names import aliases
from secateur.core.patterns import parse_pattern
from secateur.core.prunable import coverage
from secateur.engine.planning import calibrating, measuring
from secateur.engine.planning.calibrating import Subject
from secateur.engine.planning.checking import ENOUGH, FLOOR, checked, network_key, off, remember, stated
from secateur.engine.planning.costs import NetworkCost, random_plans
from secateur.engine.planning.energy import joules, why_no_energy
from secateur.engine.planning.engines import places
from secateur.engine.planning.operators import Layer, find_layers, milliseconds
from secateur.engine.planning.planner import plan_network
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
    held = table.checks[str(machine)]
    assert list(held) == [first.network] and len(held[first.network]) == measuring.CHECKS and first.error >= FLOOR
    again = cost(tmp_path, say=said.append)
    assert not any("to measure" in text for text in said[2:])
    after = CostTable.open(tmp_path)
    assert after.points == table.points and again.measured == 0 < first.measured
    assert again.layers.keys() == first.layers.keys() and again.error >= FLOOR and again.fixed >= 0
    pairs = after.checks[str(machine)][first.network]  # on another occasion some more plans are held against the clock
    assert pairs[: measuring.CHECKS] == held[first.network] and len(pairs) > measuring.CHECKS
    assert all(told > 0 and measured > 0 for told, measured in pairs)


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


@needs_core
def test_checks_are_sums_of_the_curves_of_random_plans(tmp_path):
    """What is forecast is the total of a plan that is a function of its number; each is another plan."""
    made = cost(tmp_path)
    variants = Variants(*tiny(), 1)

    found = checked(variants, made, 4, least=1, most=3, seconds=60.0, stop=lambda: False)

    plans = random_plans(made, 7, seed=1)
    assert [told for told, _ in found] == [made.total(plan) for plan in plans[4:]]
    assert all(measured > 0 for _, measured in found)
    assert checked(variants, made, 0, least=1, most=0, seconds=60.0, stop=lambda: False) == []
    assert checked(variants, made, 0, least=1, most=3, seconds=60.0, stop=lambda: True) == []
    variants.close()


def pairs_of(table, machine, network, errors):
    for error in errors:
        table.check(machine, network, 1.0, 1.0 + error)


def test_the_error_of_many_plans_of_a_network_covers_nine_of_ten_more(tmp_path):
    """Of every set of errors, each left out in turn: at least nine of ten of those left out lie within."""
    machine, random = Machine("cpu", "avx2", 1, "core"), np.random.default_rng(0)
    for count in (ENOUGH + 1, 41, 100):
        errors = random.exponential(0.2, count).tolist()
        held = 0
        for at, left_out in enumerate(errors):
            table = CostTable(tmp_path / "costs.json")
            pairs_of(table, machine, "mine", errors[:at] + errors[at + 1 :])
            pairs_of(table, machine, "another", [9.0] * 50)
            held += left_out <= stated(table, machine, "mine", 1.0) * (1 + 1e-12)
        assert 0.9 <= held / count <= 0.9 + 2 / count


def test_few_plans_state_no_less_than_a_tenth(tmp_path):
    table, machine = CostTable(tmp_path / "costs.json"), Machine("cpu", "avx2", 1, "core")
    assert math.isnan(stated(table, machine, "mine", 1.0))
    pairs_of(table, machine, "mine", [0.01] * (ENOUGH - 1))
    assert stated(table, machine, "mine", 1.0) == FLOOR
    pairs_of(table, machine, "mine", [0.01])
    assert stated(table, machine, "mine", 1.0) == pytest.approx(0.01, abs=1e-12)
    assert math.isnan(stated(table, Machine("cpu", "avx2", 2, "core"), "mine", 1.0))


def test_very_few_plans_are_helped_by_networks_of_like_size(tmp_path):
    table, machine = CostTable(tmp_path / "costs.json"), Machine("cpu", "avx2", 1, "core")
    pairs_of(table, machine, "like", [0.3] * 10)
    table.check(machine, "long", 1000.0, 3000.0)
    assert stated(table, machine, "new", 2.0) == pytest.approx(0.3, abs=1e-12)
    assert stated(table, machine, "new", 1e-3) == pytest.approx(2.0, abs=1e-12)  # none is like it: all count
    pairs_of(table, machine, "new", [0.05] * 9)
    assert stated(table, machine, "new", 2.0) == FLOOR  # its own are enough to tell nine of ten


@pytest.mark.parametrize("pair", [(1.0, 1.25), (1.25, 1.0), (1.0, 1.0), (0.3, 7.0)])
def test_an_interval_of_the_error_holds_what_was_measured(pair):
    forecast, measured = pair
    error = off(pair)
    assert forecast * (1 - error) <= measured * (1 + 1e-12) and measured <= forecast * (1 + error) * (1 + 1e-12)
    assert measured * (1 - error) <= forecast * (1 + 1e-12) and forecast <= measured * (1 + error) * (1 + 1e-12)


def test_forecasts_that_were_tried_are_remembered(tmp_path):
    made = NetworkCost({}, {}, 1.0, 0.1, isa="avx2", threads=2, network="mine")

    remember(made, [(1.0, 1.1), (2.0, float("nan"))], tmp_path)
    remember(made, [(3.0, 2.0)], tmp_path)
    remember(replace(made, network=""), [(1.0, 1.0)], tmp_path)

    assert CostTable.open(tmp_path).checks == {str(Machine.here("avx2", 2)): {"mine": [(1.0, 1.1), (3.0, 2.0)]}}
    (tmp_path / "file").write_text("in the way")
    remember(made, [(1.0, 1.1)], tmp_path / "file")


@needs_core
def test_what_a_plan_measured_is_held_against_its_forecast(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    options = how(cost=replace(cost_of_kit(), network="kit"), measure=True)

    made = plan_network(task_of(), "ms 1000", options)

    pairs = CostTable.open().checks[str(Machine.here("", 1))]["kit"]
    assert pairs[-1] == (pytest.approx(made.figures["ms"].forecast, abs=1e-9), made.figures["ms"].measured)


def test_a_network_is_known_by_its_structure_and_batch():
    def key(net, batch=1, size=16):
        return network_key(net, torch.randn(batch, size))

    net = tiny()[0]
    with torch.no_grad():
        other = build("mlp", (16,), 4, widths=(16, 12))
    assert key(net) == key(other) == key(other.eval())
    assert len({key(net), key(net, 2), key(build("mlp", (16,), 4, widths=(12, 16)))}) == 3
    strides = [torch.nn.Conv2d(1, 2, 3, stride=n) for n in (1, 2)]
    assert len({network_key(conv, torch.randn(1, 1, 8, 8)) for conv in strides}) == 2


@needs_core
def test_a_folder_that_cannot_be_written_is_told_and_all_else_goes_on(tmp_path):
    (tmp_path / "file").write_text("in the way")

    found = calibrating.calibrate(
        [Subject("first", tiny), Subject("other", tiny)], (1,), 1, ("unstructured",), tmp_path / "file", seconds=0.0
    )
    assert all(row["layers"] and row["measured"] > 0 for row in found.rows) and len(found.rows) == 2
    assert len([note for note in found.notes if "not remembered" in note and "SECATEUR_CACHE" in note]) == 1


@needs_core
def test_measuring_again_replaces_the_figures_of_the_named_networks_only(tmp_path):
    def other(batch=1):
        torch.manual_seed(0)
        return build("mlp", (24,), 6, widths=(20,)).eval(), torch.randn(batch, 24)

    options = {"threads": 1, "cache": tmp_path, "seconds": 0.0}
    calibrating.calibrate([Subject("first", tiny), Subject("other", other)], patterns=BOTH, **options)
    before = CostTable.open(tmp_path)
    (machine,) = before.points
    mine = {layer.key for layer in Variants(*tiny(), 1).layers.values()}

    found = calibrating.calibrate([Subject("first", tiny)], patterns=("unstructured",), again=True, **options)

    after = CostTable.open(tmp_path).points[machine]
    flat = {
        (key, pattern, rung): point
        for key, by in before.points[machine].items() for pattern, rungs in by.items() for rung, point in rungs.items()
    }  # fmt: skip
    new = {place for place, point in flat.items() if after[place[0]][place[1]][place[2]] != point}
    assert new == {place for place in flat if place[0] in mine and place[1] in (DENSE, "unstructured")}
    assert found.rows[0]["measured"] == len(new)
    assert sum(len(rungs) for by in after.values() for rungs in by.values()) == len(flat)


@needs_core
def test_measuring_again_loses_nothing_when_it_is_stopped_at_once(tmp_path):
    options = {"threads": 1, "patterns": BOTH, "cache": tmp_path, "seconds": 0.0, "again": True}
    calibrating.calibrate([Subject("first", tiny)], **options)
    content = (tmp_path / "costs.json").read_bytes()

    assert calibrating.calibrate([Subject("first", tiny)], stop=lambda: True, **options).stopped

    assert (tmp_path / "costs.json").read_bytes() == content


@needs_core
def test_other_engines_are_timed_as_they_are_remembered_and_told(tmp_path):
    pytest.importorskip("onnxruntime")
    options = {"threads": 1, "patterns": ("unstructured",), "cache": tmp_path, "seconds": 0.0}
    engines = ("torch", "onnxruntime")

    found = calibrating.calibrate([Subject("first", tiny)], others=engines, **options)

    (row,) = found.rows
    labels = [label.split()[0] for label in row["engines"]]
    assert sorted(set(labels)) == sorted(engines) and all(ms > 0 for ms in row["engines"].values())
    if not torch.cuda.is_available():
        assert any("CUDA" in note for note in found.notes)
    kept = CostTable.open(tmp_path).engines
    assert sorted(kept) == sorted(name for engine in engines for name, _ in places(engine, 1).values())
    assert calibrating.status(tmp_path)["engines"] == dict.fromkeys(kept, 1)
    told = cost(tmp_path, ("unstructured",))
    assert told.engines == row["engines"]
    assert any(all(f"{ms:.4g} ms in {label}" in note for label, ms in row["engines"].items()) for note in told.notes)
    again = calibrating.calibrate([Subject("first", tiny)], others=engines, **options)
    assert again.rows[0]["engines"] == row["engines"]
    assert measuring.forecast(*tiny(2), 1, ("unstructured",), False, tmp_path).engines == {}


@needs_core
def test_an_engine_that_cannot_run_a_network_is_told_and_the_others_go_on(tmp_path):
    class Told(torch.nn.Module):
        """A network that no exporter by tracing takes: it refuses to be traced."""

        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(8, 8)

        def forward(self, x):
            if torch.jit.is_tracing():
                raise RuntimeError("not to be traced")
            return self.fc(x)

    subject = Subject("odd", lambda batch: (Told().eval(), torch.randn(batch, 8)))

    found = calibrating.calibrate(
        [subject], threads=1, patterns=("unstructured",), cache=tmp_path, seconds=0.0, others=("onnxruntime", "torch")
    )

    assert {label.split()[0] for label in found.rows[0]["engines"]} == {"torch"}
    assert any("onnxruntime" in note and "not" in note for note in found.notes)


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
    assert main([*words, "--engine", "torch"]) == 0
    assert "times as long" in capsys.readouterr().out
    assert main(["calibrate", "--status"]) == 0
    assert "3 layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch", "0"], "at least 1"),
        (["--threads", "0"], "at least 1"),
        (["--pattern", "columns"], "not understood"),
        (["--engine", "torhc"], "Did you mean 'torch'"),
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
