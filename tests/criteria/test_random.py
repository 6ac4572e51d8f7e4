"""Random: uniform, seeded, independent of device, type and neighbours."""

import pytest
import torch
from torch import nn

from secateur.core.choose import choose
from secateur.core.errors import MaskError
from secateur.core.masks import Masks
from secateur.core.task import Task
from secateur.criteria.random import Random
from secateur.testing import CASES


def wide(rows=200, cols=500):
    net = nn.Sequential(nn.Linear(cols, rows))
    return Task(net, nn.functional.mse_loss, [])


def test_another_seed_gives_other_scores_and_the_same_seed_the_same():
    task = CASES["tanh_mlp"]()
    masks = Masks.dense(task.model)
    one, again, other = Random(3)(task, masks), Random(3)(task, masks), Random(4)(task, masks)
    assert all(torch.equal(one[n], again[n]) for n in masks)
    assert not any(torch.equal(one[n], other[n]) for n in masks)


def test_tensors_of_the_same_shape_get_different_scores():
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    scores = Random()(Task(net, nn.functional.mse_loss, []), Masks.dense(net))
    assert not torch.equal(scores["0.weight"], scores["1.weight"])


def test_scores_of_a_tensor_do_not_depend_on_the_others():
    task = CASES["conv_bn"]()
    masks = Masks.dense(task.model)
    alone = Masks({"second.weight": masks["second.weight"]})
    assert torch.equal(Random()(task, masks)["second.weight"], Random()(task, alone)["second.weight"])


def test_scores_are_uniform():
    """Kolmogorov-Smirnov distance to the uniform law: above 1.95 / sqrt(n) once in a thousand; the seed is fixed."""
    task = wide()
    ordered = Random()(task, Masks.dense(task.model))["0.weight"].flatten().double().sort().values
    expected = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    assert (ordered - expected).abs().max() < 1.95 / len(ordered) ** 0.5


def test_each_row_keeps_its_binomial_share():
    """Kept per row: mean n·p, and every row within five standard deviations."""
    task = wide()
    masks = choose(Random()(task, Masks.dense(task.model)), 20_000)
    per_row = masks["0.weight"].sum(1).double()
    assert per_row.sum() == 20_000
    assert (per_row - 100).abs().max() < 5 * (500 * 0.2 * 0.8) ** 0.5


def test_weights_pruned_already_score_zero_so_masks_nest():
    task = CASES["tanh_mlp"]()
    first = choose(Random(0)(task, Masks.dense(task.model)), 50)

    second = choose(Random(1)(task, first), 20)

    assert second - first == second & ~second
    assert second.kept == 20


def test_scores_do_not_depend_on_the_type_of_the_weights():
    """float32 in every case, so that bfloat16 networks have no ties."""
    half, double = CASES["conv_bn"](torch.bfloat16), CASES["conv_bn"](torch.float64)
    one, other = (Random()(task, Masks.dense(task.model)) for task in (half, double))
    assert all(torch.equal(one[n], other[n]) and one[n].dtype == torch.float32 for n in one)


def test_masks_of_another_network_are_refused():
    with pytest.raises(MaskError, match="another network"):
        Random()(CASES["tanh_mlp"](), Masks.dense(CASES["lstm"]().model))
