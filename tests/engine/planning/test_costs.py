"""Curves never fall and agree with NumPy; the cost of a plan is a sum; random plans are what they say."""

import dataclasses
import json

import numpy as np
import pytest

from secateur.core.errors import UsageError
from secateur.engine.planning.costs import Curve, NetworkCost, network_cost, random_plans
from secateur.engine.planning.curves import fitted, isotonic
from secateur.nets import build


def cost():
    curves = {
        "a": {"unstructured": Curve((0.1, 1.0), (1.0, 5.0)), "2:4": Curve((0.5,), (2.0,))},
        "b": {"4x1": Curve((0.01, 0.2, 1.0), (0.5, 0.5, 3.0))},
    }
    return NetworkCost(curves, {"a": 4.0, "b": 2.5, "c": 0.75}, 0.25, 0.1, left={"d": "it is cut up"})


def test_a_curve_is_linear_between_its_points_and_level_beyond_them():
    random = np.random.default_rng(0)
    for _ in range(50):
        places = np.unique(random.random(random.integers(1, 9)))
        times = np.cumsum(random.random(len(places)))
        curve = Curve(tuple(places.tolist()), tuple(times.tolist()))
        asked = np.sort(random.random(40))

        found = [curve.at(float(d)) for d in asked]

        np.testing.assert_array_equal(found, np.interp(asked, places, times))
        assert (np.diff(found) >= 0).all()


@pytest.mark.parametrize(
    ("densities", "ms", "words"),
    [
        ((), (), "0 densities"),
        ((0.1, 0.2), (1.0,), "2 densities and 1 times"),
        ((0.2, 0.1), (1.0, 2.0), "must rise"),
        ((0.1, 0.1), (1.0, 2.0), "must rise"),
        ((-0.1, 0.1), (1.0, 2.0), "must rise within"),
        ((0.5, 1.1), (1.0, 2.0), "must rise within"),
        ((float("nan"), 1.0), (1.0, 2.0), "must rise within"),
        ((0.1, 0.2), (2.0, 1.0), "never fall"),
        ((0.1, 0.2), (-1.0, 1.0), "at least 0"),
        ((0.1, 0.2), (1.0, float("inf")), "finite"),
        ((0.1, 0.2), (1.0, float("nan")), "never fall"),
    ],
)
def test_a_curve_that_is_none_is_refused(densities, ms, words):
    with pytest.raises(UsageError, match=words):
        Curve(densities, ms)


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan")])
def test_a_density_outside_of_0_to_1_is_refused(density):
    with pytest.raises(UsageError, match="within"):
        Curve((0.5,), (1.0,)).at(density)


def test_the_isotonic_fit_is_the_min_max_of_means():
    """The definition: the i-th value is the largest, over starts up to i, of the least mean over ends from i."""
    random = np.random.default_rng(1)
    for _ in range(60):
        count = int(random.integers(1, 12))
        values, weights = random.normal(size=count), random.random(count) + 0.1

        found = isotonic(values.tolist(), weights.tolist())

        def mean(a, b, values=values, weights=weights):
            return np.average(values[a : b + 1], weights=weights[a : b + 1])

        wanted = [max(min(mean(a, b) for b in range(i, count)) for a in range(i + 1)) for i in range(count)]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


def test_a_fit_pools_in_the_ratio():
    assert fitted({0.1: 1.0, 0.5: 4.0, 0.2: 8.0}).ms == pytest.approx((1.0, 32**0.5, 32**0.5), abs=1e-12)


def test_the_total_is_a_sum():
    made = cost()

    assert made.now == pytest.approx(7.5, abs=1e-12)
    assert made.total({}) == made.now
    one, other = {"a": ("unstructured", 0.55)}, {"b": ("4x1", 0.01)}
    assert made.total(one) == pytest.approx(7.5 - 4.0 + 3.0, abs=1e-12)
    both = made.total({**one, **other})
    assert both - made.now == pytest.approx((made.total(one) - made.now) + (made.total(other) - made.now), abs=1e-12)
    assert made.total({"a": ("2:4", 0.5)}) == pytest.approx(5.5, abs=1e-12)


def test_a_slower_machine_takes_so_many_times_as_long():
    made, chosen = cost(), {"a": ("unstructured", 0.55), "b": ("4x1", 0.01)}
    slow = made.times(1.75)

    assert slow.now == pytest.approx(1.75 * made.now, rel=1e-12)
    assert slow.total(chosen) == pytest.approx(1.75 * made.total(chosen), rel=1e-12)
    assert slow.factor == pytest.approx(1.75 * made.factor, rel=1e-12)
    assert (slow.error, slow.left) == (made.error, made.left)


def test_the_total_never_falls_with_a_density():
    made = cost()
    totals = [made.total({"b": ("4x1", d), "a": ("unstructured", d)}) for d in np.linspace(0, 1, 50).tolist()]
    assert (np.diff(totals) >= 0).all()


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"d": ("unstructured", 0.5)}, "'d': it is cut up"),
        ({"aa": ("unstructured", 0.5)}, "Did you mean 'a'|Known: a, b"),
        ({"a": ("unstructurd", 0.5)}, "Did you mean 'unstructured'"),
        ({"a": ("unstructured", 2.0)}, "within"),
    ],
)
def test_what_has_no_forecast_is_named(chosen, words):
    with pytest.raises(UsageError, match=words):
        cost().total(chosen)


def test_random_plans_are_a_function_of_the_seed_and_keep_to_what_there_is():
    made = cost()

    plans = random_plans(made, 200, seed=3, least=0.02)

    assert plans == random_plans(made, 200, seed=3, least=0.02)
    assert plans[:20] == random_plans(made, 20, seed=3, least=0.02)
    assert plans != random_plans(made, 200, seed=4, least=0.02)
    chosen = [(name, *choice) for plan in plans for name, choice in plan.items()]
    assert {(name, pattern) for name, pattern, _ in chosen} == {("a", "unstructured"), ("a", "2:4"), ("b", "4x1")}
    assert {d for _, pattern, d in chosen if pattern == "2:4"} == {0.5}
    free = np.array([d for _, pattern, d in chosen if pattern != "2:4"])
    assert free.min() >= 0.02 and free.max() <= 1
    assert abs(np.log(free).mean() / np.log(0.02) - 0.5) < 0.1
    assert 0.7 < len(chosen) / 400 < 0.9


def test_a_cost_is_plain_json():
    table = json.loads(json.dumps(cost().to_json(), allow_nan=False))

    assert table["layers"]["a"]["2:4"] == {"densities": [0.5], "ms": [2.0], "source": "measured"}
    assert set(table) == {field.name for field in dataclasses.fields(NetworkCost)}


def test_an_engine_that_does_not_know_zeros_has_level_curves():
    import torch

    net, example = build("mlp", (12,), 3, widths=(8, 8)), torch.randn(2, 12)
    before = {name: p.clone() for name, p in net.named_parameters()}

    made = network_cost(net, example, engine="torch", threads=1, patterns=("unstructured", "2:4"))

    assert set(made.layers) | set(made.left) == {name for name in before if name.endswith("weight")}
    assert made.engine == "torch" and made.batch == 2 and "cpu" in made.isa
    for plan in random_plans(made, 5):
        assert made.total(plan) == pytest.approx(made.now, abs=1e-12)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_onnx_runtime_is_one_figure():
    pytest.importorskip("onnxruntime")
    import torch

    made = network_cost(build("mlp", (12,), 3, widths=(8,)), torch.randn(1, 12), engine="onnxruntime", threads=1)

    assert made.now == made.fixed > 0 and not made.layers
    assert all("zeros" in why for why in made.left.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "torhc"}, "Did you mean 'torch'"),
        ({"patterns": ()}, "no pattern is given"),
        ({"patterns": ("3:2",)}, "N:M"),
        ({"patterns": ("columns",)}, "not understood"),
    ],
)
def test_what_cannot_be_costed_is_refused(options, words):
    import torch

    with pytest.raises(UsageError, match=words):
        network_cost(build("mlp", (12,), 3, widths=(8,)), torch.randn(1, 12), **options)
