"""Network slimming: the scale of the BatchNorm behind a layer."""

import pytest
import torch
from torch import nn

from secateur.core.allocations import Global
from secateur.core.choose import choose
from secateur.core.errors import ModelError
from secateur.core.masks import Masks
from secateur.core.patterns import Unit
from secateur.core.task import Task
from secateur.criteria.bn_scale import BnScale
from secateur.testing import CASES


def scored(net, masks=None, **options):
    masks = Masks.dense(net) if masks is None else masks
    return BnScale(**options)(Task(net, lambda output, target: output.mean(), []), masks)


class Mixed(nn.Module):
    """Layers and norms registered apart from each other; ``shapes`` decides what a symbolic trace cannot follow."""

    def __init__(self, traceable):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 5, 3, bias=False)
        self.plain, self.head = nn.Conv2d(5, 5, 1), nn.Linear(5, 3)
        self.second_norm, self.first_norm = nn.BatchNorm2d(5), nn.BatchNorm2d(4)
        self.traceable = traceable
        for norm in (self.first_norm, self.second_norm):
            nn.init.uniform_(norm.weight, -1, 1)

    def forward(self, x):
        if not self.traceable and x.mean() > 100:
            x = x / 100
        x = torch.relu(self.first_norm(self.first(x)))
        return self.head(self.plain(torch.relu(self.second_norm(self.second(x)))).mean((2, 3)))


@pytest.mark.parametrize("name", ["conv_bn", "residual_bn", "depthwise"])
def test_every_weight_carries_the_size_of_the_scale_behind_it(name):
    """The names of the cases say which norm belongs to which layer."""
    net = CASES[name]().model
    own = dict(net.named_parameters())
    for key, score in scored(net).items():
        scale = own.get(key.replace(".weight", "_norm.weight"))
        expected = own[key].flatten(1).norm(dim=1) if scale is None else scale.abs()
        shape = (-1, *[1] * (score.dim() - 1))
        torch.testing.assert_close(score, expected.detach().reshape(shape).expand(score.shape), rtol=1e-12, atol=0)


def test_what_a_norm_follows_is_traced_not_guessed_from_the_order():
    net = Mixed(traceable=True)
    scores = scored(net)
    assert torch.equal(scores["first.weight"][:, 0, 0, 0], net.first_norm.weight.detach().abs())
    assert torch.equal(scores["second.weight"][:, 0, 0, 0], net.second_norm.weight.detach().abs())
    torch.testing.assert_close(scores["plain.weight"][:, 0, 0, 0], net.plain.weight.detach().flatten(1).norm(dim=1))


def test_a_network_with_control_flow_is_read_in_the_order_of_its_modules():
    """The norm goes to the last free layer of its width, so here the wrong one of two: the docstring says so."""
    net = Mixed(traceable=False)
    scores = scored(net)
    assert torch.equal(scores["first.weight"][:, 0, 0, 0], net.first_norm.weight.detach().abs())
    assert torch.equal(scores["plain.weight"][:, 0, 0, 0], net.second_norm.weight.detach().abs())


def test_one_threshold_over_layers_of_unequal_filters():
    """Global over units must keep the channels of the largest scales, though filters differ in size."""
    net = CASES["conv_bn"]().model
    names = ["first.weight", "second.weight"]
    scale = {n: net.get_parameter(n.replace(".weight", "_norm.weight")).detach().abs() for n in names}
    scale["first.weight"][:] = torch.tensor([0.9, 0.1, 0.5, 0.3, 0.05, 0.7])
    scale["second.weight"][:] = torch.tensor([0.2, 0.8, 0.6, 0.4])
    with torch.no_grad():
        for n in names:
            net.get_parameter(n.replace(".weight", "_norm.weight")).copy_(scale[n])
    masks = Masks.dense(net, only=names)
    kept = choose(scored(net, masks), 3 * 18 + 2 * 54, Unit(), Global())
    for n in names:
        assert torch.equal(kept[n].flatten(1).any(1), scale[n] > 0.45)


def test_a_channel_pruned_in_part_keeps_its_scale():
    net = CASES["conv_bn"]().model
    whole = Masks.dense(net, only=["first.weight"])
    mask = whole["first.weight"].clone()
    mask[2, 0], mask[3] = False, False
    score = scored(net, Masks({"first.weight": mask}))["first.weight"]
    expected = scored(net, whole)["first.weight"].flatten(1).sum(1) * (torch.arange(6) != 3)
    torch.testing.assert_close(Unit().unit_scores(score), expected, rtol=1e-12, atol=0)
    assert not score[~mask].any()
    keep = torch.tensor([[True, False, True, False]] * 3)
    head = scored(net, Masks({"head.weight": keep}))["head.weight"]
    torch.testing.assert_close(head.mean(1), (net.head.weight.detach() * keep).norm(dim=1), rtol=1e-12, atol=0)


def test_bad_input_is_refused_by_name():
    net = Mixed(traceable=True)
    with pytest.raises(ModelError, match="no BatchNorm follows `plain.weight`.*--skip"):
        scored(net, strict=True)
    assert scored(net, Masks.dense(net, skip=["plain.weight", "head.weight"]), strict=True)
    net.second_norm.weight.data[1] = torch.nan
    with pytest.raises(ModelError, match="BatchNorm behind second.weight"):
        scored(net)
