"""FLAP: the variance of an input times the squared weights that it meets."""

import pytest
import torch
from torch import nn

from secateur.core.errors import DataError, ModelError
from secateur.core.masks import Masks
from secateur.core.task import Task
from secateur.criteria.flap import Flap


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scored(net, *inputs, masks=None, **options):
    task = Task(net, lambda output, target: output.mean(), [(x, 0) for x in inputs])
    return Flap(**options)(task, Masks.dense(net) if masks is None else masks)


@pytest.mark.parametrize("kind", ["linear", "sequence", "pointwise"])
def test_a_column_adds_up_to_the_error_of_replacing_its_input_by_the_mean(kind):
    """The definition, through the layer's own forward pass: Σ squared error / (n - 1) = S_j."""
    net = (nn.Conv2d(5, 4, 1) if kind == "pointwise" else nn.Linear(5, 4)).double()
    x = {"linear": randn(9, 5), "sequence": randn(6, 3, 5), "pointwise": randn(6, 5, 4, 4)}[kind] * 2 + 30
    channel = 1 if kind == "pointwise" else x.dim() - 1
    score = scored(net, x[:1], x[1:2], x[2:])["weight"]
    for j in range(5):
        filled = x.clone()
        filled.select(channel, j).fill_(float(x.select(channel, j).mean()))
        error = (net(filled) - net(x)).square().sum() / (x.numel() // 5 - 1)
        torch.testing.assert_close(score[:, j].sum(), error.detach(), rtol=1e-10, atol=0)
        assert torch.equal(score[:, j], score[:1, j].expand_as(score[:, j]))


def test_kernels_count_every_tap_and_groups_have_channels_of_their_own():
    net, x = nn.Conv2d(6, 4, 3, padding=1, groups=2).double(), randn(5, 6, 7, 7)
    score, variance = scored(net, x)["weight"], x.transpose(0, 1).flatten(1).var(1)
    for j in range(6):
        rows, column = slice(2 * (j // 3), 2 * (j // 3) + 2), j % 3
        expected = variance[j] * net.weight.detach()[rows, column].square().sum()
        torch.testing.assert_close(score[rows, column].sum(), expected)


def test_pruned_weights_score_zero_and_leave_the_norm():
    net, x = nn.Linear(4, 3).double(), randn(8, 4)
    mask = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 0], [0, 1, 1, 0]], dtype=torch.bool)
    score = scored(net, x, masks=Masks({"weight": mask}))["weight"]
    assert not score[~mask].any()
    expected = x.var(0) * (net.weight.detach() * mask).square().sum(0)
    torch.testing.assert_close(score.sum(0), expected)


def test_a_constant_input_scores_zero_however_large():
    x = randn(8, 4)
    x[:, 2] = 1e6
    assert not scored(nn.Linear(4, 3).double(), x[:3], x[3:])["weight"][:, 2].any()


def test_standardised_columns_have_mean_zero_and_deviation_one():
    net, x = nn.Linear(7, 3).double(), randn(20, 7)
    plain, found = scored(net, x)["weight"].sum(0), scored(net, x, standardize=True)["weight"].sum(0)
    torch.testing.assert_close(found, (plain - plain.mean()) / plain.std())


def test_padding_does_not_count():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(4, 3).double()

        def forward(self, x, attention_mask):
            return self.part(x)

    net, x, real = Masked(), randn(2, 5, 4), torch.ones(2, 5)
    real[1, 2:] = 0
    found = scored(net, {"x": x, "attention_mask": real})["part.weight"].sum(0)
    expected = x[real.bool()].var(0) * net.part.weight.detach().square().sum(0)
    torch.testing.assert_close(found, expected)


def test_recurrent_columns_hear_the_states_before_each_step():
    for first in (True, False):
        net, x = nn.GRU(3, 4, batch_first=first).double(), randn(5, 6, 3)
        scores = scored(net, x)
        outputs = net(x)[0].detach()
        time = 1 if first else 0
        before = torch.cat([torch.zeros_like(outputs.narrow(time, 0, 1)), outputs.narrow(time, 0, x.shape[time] - 1)],
                           time)  # fmt: skip
        for name, heard in (("weight_ih_l0", x), ("weight_hh_l0", before)):
            expected = heard.flatten(0, 1).var(0) * net.get_parameter(name).detach().square().sum(0)
            torch.testing.assert_close(scores[name].sum(0), expected)


def test_what_is_not_heard_or_not_finite_is_refused_by_name():
    with pytest.raises(ModelError, match="`weight_ih_l1` are known.*--skip 'weight_ih_l1'"):
        net = nn.GRU(3, 4, 2).double()
        scored(net, randn(5, 2, 3), masks=Masks.dense(net, only=["weight_ih_l1"]))
    with pytest.raises(DataError, match="`weight` multiplies are NaN or infinite"):
        scored(nn.Linear(4, 3).double(), randn(5, 4) * torch.inf)
