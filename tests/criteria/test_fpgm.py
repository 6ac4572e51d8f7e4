"""FPGM: how far each filter lies from the others of its layer."""

import pytest
import torch
from torch import nn

from secateur.core.errors import ModelError
from secateur.core.masks import Masks
from secateur.core.patterns import Unit
from secateur.core.task import Task
from secateur.criteria.fpgm import Fpgm


def scored(net, masks=None):
    masks = Masks.dense(net) if masks is None else masks
    return Fpgm()(Task(net, lambda output, target: output.mean(), []), masks)["weight"]


def filters(rows, **options):
    rows = torch.as_tensor(rows, dtype=torch.float64)
    net = nn.Conv2d(rows.shape[1] * options.get("groups", 1), len(rows), rows.shape[2:], **options).double()
    net.weight.data = rows
    return net


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_every_weight_carries_the_sum_of_distances_of_its_filter():
    """One distance at a time."""
    rows = randn(7, 3, 2, 2)
    score = scored(filters(rows))
    for i in range(7):
        expected = sum((rows[i] - rows[j]).square().sum().sqrt() for j in range(7))
        torch.testing.assert_close(score[i], expected.expand(3, 2, 2), rtol=1e-13, atol=0)
    assert torch.equal(Unit().unit_scores(score).argsort(), score[:, 0, 0, 0].argsort())


def test_the_geometric_median_goes_first_not_the_smallest_filter():
    """Pairs m + v, m - v and m itself: by the triangle inequality m has the smallest sum, whatever its norm."""
    v, m = randn(4, 2, 3, 3), torch.full((2, 3, 3), 10.0, dtype=torch.float64)
    rows = torch.cat([m + v, m[None], m - v])
    rows[0] *= 1e-3
    rows[5] = 2 * m - rows[0]
    score = Unit().unit_scores(scored(filters(rows)))
    assert score.argmin() == 4
    assert rows.flatten(1).norm(dim=1).argmin() == 0


def test_one_vector_added_to_all_filters_changes_nothing():
    rows = randn(6, 2, 3, 3)
    moved = scored(filters(rows + 3 * randn(1, 2, 3, 3)))
    torch.testing.assert_close(moved, scored(filters(rows)), rtol=1e-12, atol=0)


def test_groups_are_compared_within_and_a_depthwise_layer_as_a_whole():
    rows = randn(6, 2, 3, 3)
    score = scored(filters(rows, groups=3))
    for start in (0, 2, 4):
        torch.testing.assert_close(score[start : start + 2], scored(filters(rows[start : start + 2])))
    depthwise = filters(rows[:, :1], groups=6)
    torch.testing.assert_close(scored(depthwise), scored(filters(rows[:, :1])))


def test_pruned_filters_are_no_neighbours_and_a_filter_pruned_in_part_keeps_its_score():
    rows = randn(6, 2, 2, 2)
    mask = torch.ones(6, 2, 2, 2, dtype=torch.bool)
    mask[1], mask[4, 0] = False, False
    score = scored(filters(rows), Masks({"weight": mask}))
    rest = scored(filters((rows * mask)[[0, 2, 3, 4, 5]]))
    assert not score[~mask].any()
    torch.testing.assert_close(Unit().unit_scores(score)[[0, 2, 3, 4, 5]], Unit().unit_scores(rest))
    torch.testing.assert_close(score[4, 1], 2 * rest[3, 1])


def test_near_filters_in_single_precision_are_told_apart():
    """Squared norms of 1e6 leave nothing of distances of 1e-2 when distances come from products."""
    rows = torch.full((40, 1, 10, 10), 100.0)
    rows[:, 0, 0, 0] += torch.arange(40) * 0.01
    net = nn.Conv2d(1, 40, 10)
    net.weight.data = rows
    exact = scored(filters(rows.double()))
    torch.testing.assert_close(scored(net).double(), exact, rtol=1e-5, atol=0)


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(ModelError, match="`weight` are NaN"):
        scored(filters(randn(3, 1, 2, 2) * torch.nan))
