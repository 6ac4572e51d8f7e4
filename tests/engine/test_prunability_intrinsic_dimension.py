"""Intrinsic dimension by maximum likelihood, data of a known one, prunability of a curve, and their regression."""

import math

import numpy as np
import pytest
import torch
from scipy import spatial, stats

from secateur.core.errors import DataError, UsageError
from secateur.core.losses import CrossEntropy
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.data import Loader
from secateur.engine.recipe import TrainStep
from secateur.engine.studies.prunability_intrinsic_dimension import (
    Curve,
    accuracy_curve,
    intrinsic_dimension,
    latent_data,
    prunability,
    relation,
)
from secateur.engine.studies.rewind import Way, prune_and_rewind
from secateur.nets import build
from secateur.probes.accuracy import Accuracy


def normal(*shape, seed=0):
    return torch.randn(shape, generator=stream(seed, "test", "dimension", len(shape)), dtype=torch.float64)


def isometry(dimension, ambient):
    return torch.linalg.qr(normal(ambient, dimension, seed=9)).Q.T


@pytest.mark.parametrize("dimension", [2, 5, 10])
def test_embedded_normals_give_their_dimension_within_a_tenth(dimension):
    x = normal(5000, dimension) @ isometry(dimension, 12)
    assert intrinsic_dimension(x, (20,))[20].value == pytest.approx(dimension, rel=0.1)


def test_a_cube_of_ten_dimensions_comes_out_low():
    x = torch.rand(5000, 10, generator=stream(0, "cube"), dtype=torch.float64)
    assert 7.8 < intrinsic_dimension(x, (20,))[20].value < 8.8


def test_estimates_are_those_of_the_formula_by_a_tree():
    x = normal(300, 3)
    far, _ = spatial.cKDTree(x.numpy()).query(x.numpy(), 11)
    for k, found in intrinsic_dimension(x, (3, 10)).items():
        inverse = np.log(far[:, k, None] / far[:, 1:k]).sum(1) / (k - 1)
        assert found.value == pytest.approx(1 / inverse.mean(), rel=1e-10)
        assert found.arithmetic == pytest.approx((1 / inverse).mean(), rel=1e-10)
        assert found.arithmetic >= found.value and (found.k, found.points, found.copies) == (k, 300, 0)


MOVED = {
    "rotation": lambda x: x @ torch.linalg.qr(normal(6, 6, seed=1)).Q,
    "shift": lambda x: x + normal(6, seed=2),
    "scale": lambda x: x * 1e-3,
    "huge": lambda x: x * 1e200,
    "tiny": lambda x: x * 1e-200,
    "padding": lambda x: torch.cat([x, torch.zeros(len(x), 5, dtype=x.dtype)], 1),
    "order": lambda x: x.flip(0),
    "shape": lambda x: x.view(-1, 2, 3),
}


@pytest.mark.parametrize("move", MOVED.values(), ids=MOVED)
def test_moving_all_points_changes_nothing(move):
    x = normal(400, 6)
    one, two = intrinsic_dimension(x), intrinsic_dimension(move(x))
    assert list(one) == list(two) == [3, 5, 10, 20]
    for k in one:
        assert two[k].value == pytest.approx(one[k].value, rel=1e-9)


def test_copies_are_left_out_or_refused_and_near_ones_keep_their_distance():
    x = normal(200, 3)
    twice = torch.cat([x, x[:50], x[:7]])
    one, two = intrinsic_dimension(x), intrinsic_dimension(twice)
    assert all(two[k].value == one[k].value and two[k].copies == 57 for k in one)
    with pytest.raises(DataError, match="57 of 257 points are copies"):
        intrinsic_dimension(twice, copies="refuse")
    far = normal(50, 3) + 1000  # where the product form would lose the distances between pairs
    close = torch.cat([far, far + 1e-7 * normal(50, 3, seed=4)])
    by_tree, _ = spatial.cKDTree(close.numpy()).query(close.numpy(), 6)
    inverse = np.log(by_tree[:, 5, None] / by_tree[:, 1:5]).sum(1) / 4
    assert intrinsic_dimension(close, (5,))[5].value == pytest.approx(1 / inverse.mean(), rel=1e-5)


def test_lattices_points_too_close_and_wrong_numbers_are_refused():
    circle = torch.arange(4, dtype=torch.float64) * math.pi / 2
    square = torch.stack([circle.cos().round(), circle.sin().round()], 1)
    simplex = torch.eye(6, dtype=torch.float64)
    with pytest.raises(DataError, match="at one distance"):
        intrinsic_dimension(simplex, (3,))
    grid = torch.cartesian_prod(torch.arange(6.0), torch.arange(6.0))
    found = intrinsic_dimension(grid, (4, 8))
    assert math.isinf(found[4].arithmetic) and all(0 < each.value < math.inf for each in found.values())
    near = torch.cat([square * 1e-300, normal(9, 2)])
    with pytest.raises(DataError, match="too little for float64"):
        intrinsic_dimension(near, (3,))
    x = normal(10, 2)
    for k in (2, 10, 11):
        with pytest.raises(UsageError, match=f"k={k} neighbours of 10"):
            intrinsic_dimension(x, (k,))
    with pytest.raises(UsageError, match="no number"):
        intrinsic_dimension(x, ())
    with pytest.raises(UsageError, match="k=3 neighbours of 1 "):
        intrinsic_dimension(torch.ones(9, 2), (3,))
    for bad in (math.nan, math.inf):
        x[4, 1] = bad
        with pytest.raises(DataError, match="1 of 10 points hold NaN"):
            intrinsic_dimension(x, (3,))
    with pytest.raises(DataError, match="one row a point"):
        intrinsic_dimension(torch.ones(9), (3,))


def test_latent_data_differ_in_their_dimension_alone():
    found = {}
    for dimension in (2, 8, 32):
        data = latent_data(dimension, 0, ambient=64, train=1000, test=200)
        assert data.train.x.shape == (1000, 64) and len(data.test) == 200
        assert torch.bincount(data.train.y).tolist() == [250] * 4
        assert data.train.x.mean(0).abs().max() < 1e-5 and float(data.train.x.square().mean()) == pytest.approx(1)
        found[dimension] = intrinsic_dimension(data.train.x, (20,))[20].value
    assert found[2] < found[8] < found[32] and found[2] == pytest.approx(2, rel=0.1)


def test_latent_data_follow_the_seed_and_test_examples_the_same_rule():
    one, same, other = (latent_data(3, seed, train=400, test=100) for seed in (0, 0, 1))
    assert torch.equal(one.train.x, same.train.x) and torch.equal(one.test.y, same.test.y)
    assert not torch.equal(one.train.x, other.train.x)
    harder = latent_data(3, 0, train=400, test=100, bend=2.0)
    assert torch.equal(one.train.x, harder.train.x) and not torch.equal(one.train.y, harder.train.y)
    longer = latent_data(3, 0, train=400, test=100, bend=1e-3)
    near = torch.cdist(longer.test.x, longer.train.x).argmin(1)
    assert float((longer.train.y[near] == longer.test.y).double().mean()) > 0.6
    for options in ({"dimension": 0}, {"dimension": 65, "ambient": 64}, {"dimension": 2, "classes": 1},
                    {"dimension": 2, "test": 0}, {"dimension": 2, "bend": 0.0}):  # fmt: skip
        with pytest.raises(UsageError):
            latent_data(**options, seed=0)


def test_curves_have_the_accuracies_of_all_rounds(tmp_path):
    data = latent_data(2, 0, ambient=8, hidden=16, train=100, test=50)
    way = Way(Loader(data.train, 25, shuffle=True), TrainStep(epochs=1, optimizer="adam", lr=0.01))
    net = build("mlp", inputs=8, outputs=4, widths=(6,))
    curve = accuracy_curve(net, way, tmp_path / "a", data.test, rounds=3, share=0.3, rewind=2, batch=20)
    rounds = list(prune_and_rewind(net, way, tmp_path / "a", rounds=3, share=0.3, rewind=2))
    assert curve.sparsities == tuple(each.masks.sparsity for each in rounds)
    for value, each in zip(curve.accuracies, rounds, strict=True):
        assert value == Accuracy()(Task(each.net, CrossEntropy(), Loader(data.test, 50))).value


def test_prunability_by_hand():
    s = (0.0, 0.2, 0.36, 0.488, 0.59)
    found = prunability(Curve(s, (90.0, 91.0, 89.0, 88.9, 50.0)), 1.0)
    assert (found.sparsity, found.place, found.loosest, found.last) == (0.36, 2, 0.36, False)
    assert found.density == pytest.approx(0.64) and found.tolerance == 1.0
    bent = prunability(Curve(s, (90.0, 89.5, 88.0, 90.5, 50.0)), 1.0)
    assert (bent.sparsity, bent.loosest) == (0.2, 0.488)
    assert prunability(Curve(s, (90.0, 90.0, 90.0, 90.0, 90.0)), 0.0).last
    none = prunability(Curve(s, (90.0, 80.0, 80.0, 80.0, 80.0)), 5.0)
    assert (none.sparsity, none.density, none.last) == (0.0, 1.0, False)
    alone = prunability(Curve((0.0,), (90.0,)), 1.0)
    assert (alone.sparsity, alone.last) == (0.0, True)


def test_broken_curves_are_refused():
    for s, a in (((0.1, 0.2), (1.0, 1.0)), ((0.0, 0.0), (1.0, 1.0)), ((0.0,), (1.0, 2.0)), ((), ()),
                 ((0.0, 0.5), (1.0, math.nan)), ((0.0, math.nan), (1.0, 1.0)), ((0.0, 1.5), (1.0, 1.0))):  # fmt: skip
        with pytest.raises(DataError, match="rise from 0"):
            prunability(Curve(s, a), 1.0)
    for tolerance in (-1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="tolerance="):
            prunability(Curve((0.0,), (1.0,)), tolerance)


def test_a_relation_without_noise_is_found_and_one_with_noise_is_that_of_scipy():
    dimensions, accuracy = [2.0, 7.0, 22.0, 2.5, 8.0, 21.0], [80.0, 82.0, 79.0, 85.0, 81.0, 84.0]
    exact = [math.exp(-3 + 0.05 * d) for d in dimensions]
    found = relation(dimensions, exact, draws=200)
    assert (found.slope, found.constant) == (pytest.approx(0.05, rel=1e-10), pytest.approx(-3, rel=1e-10))
    assert found.low == pytest.approx(0.05, rel=1e-9) and found.high == pytest.approx(0.05, rel=1e-9)
    both = [math.exp(-3 + 0.05 * d - 0.1 * a) for d, a in zip(dimensions, accuracy, strict=True)]
    found = relation(dimensions, both, {"accuracy": accuracy}, draws=50)
    assert found.slope == pytest.approx(0.05, rel=1e-8) and found.covariates["accuracy"] == pytest.approx(-0.1)
    noisy = [v * math.exp(0.3 * n) for v, n in zip(exact, normal(6).tolist(), strict=True)]
    line = stats.linregress(dimensions, [math.log(v) for v in noisy])
    found = relation(dimensions, noisy)
    assert (found.slope, found.constant) == (pytest.approx(line.slope), pytest.approx(line.intercept))
    assert found.low < found.slope < found.high and (found.runs, found.level) == (6, 0.9)
    # The last bit of a least squares solution may depend on where the columns lie in memory.
    again, other = relation(dimensions, noisy), relation(dimensions, noisy, seed=1)
    assert (again.low, again.high, again.slope) == pytest.approx((found.low, found.high, found.slope), rel=1e-12)
    assert abs(other.low - found.low) > 1e-6 and other.slope == pytest.approx(found.slope, rel=1e-12)


def test_the_interval_has_about_the_spread_of_the_slope():
    dimensions = [2.0, 8.0, 32.0] * 20
    slopes, widths = [], []
    for seed in range(40):
        noise = normal(60, seed=seed).tolist()
        found = relation(
            dimensions, [math.exp(0.02 * d + n) for d, n in zip(dimensions, noise, strict=True)], draws=100
        )
        slopes.append(found.slope)
        widths.append(found.high - found.low)
    true = 1 / math.sqrt(sum((d - 14) ** 2 for d in dimensions))
    assert np.mean(slopes) == pytest.approx(0.02, abs=4 * true / math.sqrt(40))
    assert np.mean(widths) == pytest.approx(2 * 1.645 * true, rel=0.15)


def test_runs_that_do_not_determine_the_slope_are_refused():
    with pytest.raises(DataError, match="apart"):
        relation([2.0, 2.0, 2.0], [0.1, 0.2, 0.3])
    with pytest.raises(DataError, match="dimensions, ambient apart"):
        relation([2.0, 3.0, 5.0], [0.1, 0.2, 0.3], {"ambient": [256.0, 256.0, 256.0]})
    with pytest.raises(DataError, match="positive value"):
        relation([2.0, 3.0], [0.1, 0.0])
    with pytest.raises(DataError, match="accuracy must hold"):
        relation([2.0, 3.0, 4.0], [0.1, 0.2, 0.2], {"accuracy": [1.0]})
    with pytest.raises(DataError, match="dimensions must hold"):
        relation([2.0, math.nan], [0.1, 0.2])
    with pytest.raises(UsageError, match="level="):
        relation([2.0, 3.0], [0.1, 0.2], level=1.0)
