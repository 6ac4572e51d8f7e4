# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
"""Hash-routed constants on a target of known Lipschitz constant: the target, the bounds, both kinds of fits."""

import itertools
import math

import pytest
import torch

from secateur.blocks.hashes import euclidean, grid
from secateur.core.errors import DataError, FileError, UsageError
from secateur.data import Split
from secateur.engine.recipe import TrainStep
from secateur.engine.studies.lsh_sparse import (
    Bilinear,
    cells_needed,
    dense,
    diameters,
    mean_square,
    routed,
)


def by_hand(values, x, y):
    """Interpolation of one point from the four points of the grid around it."""
    n = len(values)
    total = 0.0
    for i, j in itertools.product(range(n), range(n)):
        near = [max(0.0, 1 - abs((p + 1) / 2 * (n - 1) - k)) for p, k in ((x, i), (y, j))]
        total += values[i][j] * near[0] * near[1]
    return total


def test_the_target_interpolates_its_values():
    target = Bilinear.drawn(5, 3)
    x = target.sample(40, 0).x.double()
    x = torch.cat([x, torch.tensor([[-1.0, -1.0], [1.0, 1.0], [1.0, -0.3], [0.5, 0.5]]).double()])
    wanted = [by_hand(target.values.tolist(), *row) for row in x.tolist()]
    assert torch.allclose(target(x)[:, 0], torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-13)
    assert torch.equal(target(torch.tensor([[7.0, 1.0]])), target(torch.tensor([[1.0, 1.0]])))


@pytest.mark.parametrize("seed", range(3))
def test_the_lipschitz_constant_is_reached_and_never_passed(seed):
    target = Bilinear.drawn(4, seed)
    side = torch.linspace(-1, 1, 601, dtype=torch.float64)[:-1] + 1 / 600
    x = torch.cartesian_prod(side, side).requires_grad_()
    target(x).sum().backward()
    steepest = float(x.grad.norm(dim=1).max())
    assert 0.99 * target.lipschitz < steepest <= target.lipschitz + 1e-12
    # both coordinates at once, by hand
    tilted = Bilinear(torch.tensor([[0.0, 1.0], [2.0, 5.0]]).double())  # edges at the last corner: 4 and 3 over 2
    assert math.isclose(tilted.lipschitz, 2.5)


def test_the_error_is_at_most_the_lipschitz_constant_times_the_diameter():
    target = Bilinear.drawn(6, 1)
    side = torch.linspace(-1, 1, 101, dtype=torch.float64)
    x = torch.cartesian_prod(side, side)
    split = Split(x, target(x))
    for hashes, (by, share) in itertools.product(
        (grid(2, 0.2), euclidean(2, 4, 0.4, 0, unit=True)), (("mean", 1.0), ("middle", 0.5))
    ):
        layer, _ = routed(split, split, hashes, by)
        where = layer.route(x)
        wide = diameters(where, x)
        worst = (layer(x) - target(x)).abs()[:, 0].detach()
        assert bool((worst <= share * target.lipschitz * wide[where] + 1e-6).all())
        assert float(worst.max()) > 0.01


def test_diameters_are_those_of_all_pairs():
    layer, _ = routed(Bilinear.drawn(4, 0).sample(90, 0), Bilinear.drawn(4, 0).sample(9, 1), euclidean(2, 2, 0.5, 0))
    x = Bilinear.drawn(4, 0).sample(90, 0).x
    where = layer.route(x)
    found = diameters(where, x)
    for bucket, wide in enumerate(found.tolist()):
        mine = x[where == bucket].tolist()
        assert math.isclose(wide, max(math.dist(a, b) for a in mine for b in mine), abs_tol=1e-7)
    assert len(found) == layer.buckets


@pytest.mark.parametrize("error", [0.5, 0.3])
def test_so_many_cells_bring_the_error_down_to_what_was_asked(error):
    target = Bilinear.drawn(3, 2)
    count = cells_needed(target.lipschitz, 2, error)
    along = math.isqrt(count)
    assert along**2 == count and 2 / along * math.sqrt(2) * target.lipschitz <= error
    assert 2 / (along - 1) * math.sqrt(2) * target.lipschitz > error
    side = torch.linspace(-1, 1, 8 * along + 1, dtype=torch.float64)[:-1]
    x = torch.cartesian_prod(side, side)
    split = Split(x, target(x))
    layer, found = routed(split, split, grid(2, 2 / along))
    assert float((layer(x) - target(x)).abs().max().detach()) <= error
    assert found.active == 2 * 2 + 2 + 1 + 1  # whatever the number of cells
    assert abs(found.occupancy.buckets - count) <= 2 * along + 1  # rounding of 2 / along at the edges


def test_the_error_of_routed_constants_is_the_mean_square(tmp_path):
    target = Bilinear.drawn(4, 0)
    train, test = target.sample(500, 0), target.sample(200, 0, "test")
    assert not torch.equal(train.x[:200], test.x)
    layer, found = routed(train, test, euclidean(2, 3, 0.4, 0, unit=True))
    wanted = sum((a[0] - b[0]) ** 2 for a, b in zip(layer(test.x).tolist(), test.y.tolist(), strict=True)) / 200
    assert math.isclose(found.error, wanted, rel_tol=1e-6) and found.macs == 6
    assert found.occupancy.examples == 500
    assert math.isclose(mean_square(layer, test, batch=7), found.error, rel_tol=1e-12)


def test_a_dense_network_trains_in_a_folder_and_is_read_from_there(tmp_path):
    target = Bilinear.drawn(3, 0)
    train, test = target.sample(400, 0), target.sample(100, 0, "test")
    step = TrainStep(epochs=8, optimizer="adam", lr=0.02)
    net, found = dense(train, test, 8, step, 50, tmp_path, 0)
    first = mean_square(dense(train, test, 8, TrainStep(epochs=1, lr=1e-9), 50, tmp_path / "b", 0)[0], test)
    assert found.error < first and found.active == 8 * 4 + 1 and found.macs == 24
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("state.pt")}
    again, same = dense(train, test, 8, step, 50, tmp_path, 0)
    assert before == {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("state.pt")} and same == found
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    with pytest.raises(FileError, match="other options"):
        dense(train, test, 8, step, 50, tmp_path, 1)


def test_what_does_not_fit_is_refused(tmp_path):
    target = Bilinear.drawn(3, 0)
    split = target.sample(20, 0)
    with pytest.raises(UsageError, match=r"\(n, n\)"):
        Bilinear(torch.zeros(3, 4))
    with pytest.raises(UsageError, match=r"\(n, n\)"):
        Bilinear.drawn(1, 0)
    with pytest.raises(DataError, match="empty"):
        target.sample(0, 0)
    with pytest.raises(UsageError, match="0 hidden units"):
        dense(split, split, 0, TrainStep(epochs=1), 5, tmp_path, 0)
    with pytest.raises(UsageError, match="one for each point"):
        diameters(torch.zeros(3, dtype=torch.int64), split.x)
    for lipschitz, inputs, error in ((0.0, 2, 0.1), (1.0, 0, 0.1), (1.0, 2, 0.0)):
        with pytest.raises(UsageError, match="above 0"):
            cells_needed(lipschitz, inputs, error)
