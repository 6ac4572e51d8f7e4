"""Minitron: mean size of an activation over positions, then its norm over examples."""

import pytest
import torch
from torch import nn

from secateur.core.errors import DataError, ModelError
from secateur.core.masks import Masks
from secateur.core.task import Task
from secateur.criteria.minitron import Minitron


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scored(net, *inputs, masks=None):
    task = Task(net, lambda output, target: output.mean(), [(x, 0) for x in inputs])
    return Minitron()(task, Masks.dense(net) if masks is None else masks)


def test_a_column_adds_up_to_the_norm_over_examples_of_the_mean_over_positions():
    net, x = nn.Linear(5, 4).double(), randn(6, 3, 5)
    expected = [sum((sum(abs(float(v)) for v in e[:, j]) / 3) ** 2 for e in x) ** 0.5 for j in range(5)]
    for batches in ((x,), (x[:1], x[1:4], x[4:])):
        score = scored(net, *batches)["weight"]
        torch.testing.assert_close(score.sum(0), torch.tensor(expected, dtype=torch.float64))
        assert torch.equal(score, score[:1].expand_as(score))


def test_rows_without_positions_are_examples_and_weights_play_no_part():
    net, x = nn.Linear(5, 4).double(), randn(6, 5)
    before = scored(net, x)["weight"]
    torch.testing.assert_close(before.sum(0), x.norm(dim=0))
    net.weight.data.mul_(7)
    assert torch.equal(scored(net, x)["weight"], before)


def test_places_of_an_image_are_positions_and_groups_have_channels_of_their_own():
    net, x = nn.Conv2d(6, 4, 3, groups=2).double(), randn(5, 6, 7, 7)
    score, expected = scored(net, x)["weight"], x.abs().mean((2, 3)).norm(dim=0)
    for j in range(6):
        torch.testing.assert_close(score[2 * (j // 3) : 2 * (j // 3) + 2, j % 3].sum(), expected[j])


def test_padding_does_not_count_and_an_empty_example_adds_nothing():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(4, 3).double()

        def forward(self, x, attention_mask):
            return self.part(x)

    x, real = randn(3, 5, 4), torch.ones(3, 5)
    real[1, 2:] = 0
    real[2] = 0
    found = scored(Masked(), {"x": x, "attention_mask": real})["part.weight"].sum(0)
    means = torch.stack([x[0].abs().mean(0), x[1, :2].abs().mean(0)])
    torch.testing.assert_close(found, means.norm(dim=0))


def test_pruned_weights_score_zero_and_the_others_share():
    net, x = nn.Linear(4, 3).double(), randn(8, 4)
    mask = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 0], [0, 1, 1, 0]], dtype=torch.bool)
    score = scored(net, x, masks=Masks({"weight": mask}))["weight"]
    assert not score[~mask].any()
    torch.testing.assert_close(score.sum(0)[:3], x.norm(dim=0)[:3])


def test_what_is_not_heard_or_not_finite_is_refused_by_name():
    net = nn.MultiheadAttention(4, 2, batch_first=True).double()
    task = Task(net, lambda output, target: output[0].mean(), [((randn(2, 3, 4),) * 3, 0)])
    with pytest.raises(ModelError, match="`in_proj_weight` are known"):
        Minitron()(task, Masks.dense(net))
    with pytest.raises(DataError, match="NaN or infinite"):
        scored(nn.Linear(4, 3).double(), randn(5, 4) * torch.inf)
