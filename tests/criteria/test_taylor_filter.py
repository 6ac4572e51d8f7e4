"""Taylor expansion of filters: the slope of each example's loss along a gate on a whole map."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from secateur.core.errors import DataError
from secateur.core.masks import Masks
from secateur.core.patterns import Unit
from secateur.core.task import Task
from secateur.criteria.taylor_filter import TaylorFilter
from secateur.testing import CASES

PARTNERS = {"cell.weight_ih_l0": "cell.bias_ih_l0", "cell.weight_hh_l0": "cell.bias_hh_l0"}


def singles(task):
    return [Task(task.model, task.loss, [(x[i : i + 1], y[i : i + 1])]) for x, y in task.data for i in range(len(x))]


def gated(task, name):
    """|dL/dg| at g = 1 for a gate on each unit's weights and bias, averaged over single examples."""
    own, total = task.params(), 0
    bias = PARTNERS.get(name, name.replace("weight", "bias"))
    for one in singles(task):
        gate = torch.ones(len(own[name]), dtype=torch.float64, requires_grad=True)
        at = {name: own[name].detach() * gate.reshape(-1, *[1] * (own[name].dim() - 1))}
        at |= {bias: own[bias].detach() * gate} if bias in own else {}
        ((x, y),) = one.data
        value = one.loss(functional_call(one.model, at, (x,)), y)
        total = total + torch.autograd.grad(value, gate)[0].abs()
    return total / len(singles(task))


@pytest.mark.parametrize("name", CASES)
def test_the_mean_over_a_unit_is_the_slope_along_its_gate(name):
    """Gates on weights and examples one by one, against hooks on whole batches; then the norm of each tensor is 1."""
    task = CASES[name]()
    masks = Masks.dense(task.model)
    raw, normal = TaylorFilter(normalize=False)(task, masks), TaylorFilter()(task, masks)
    for key in masks:
        expected = gated(task, key)
        torch.testing.assert_close(raw[key].flatten(1).mean(1), expected, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(normal[key].flatten(1).mean(1), expected / expected.norm(), rtol=1e-9, atol=1e-14)


def one_map(weights, loss, x):
    net = nn.Conv2d(1, len(weights), 1, bias=False).double()
    net.weight.data = torch.tensor(weights, dtype=torch.float64).reshape(-1, 1, 1, 1)
    return Task(net, loss, [(torch.tensor(x, dtype=torch.float64).reshape(-1, 1, 2, 1), 0)])


def test_positions_that_cancel_score_nothing_and_examples_that_cancel_do():
    """The sum over the map comes before the absolute value, the mean over examples after it."""
    slopes = torch.tensor([1.0, -1.0], dtype=torch.float64).reshape(2, 1)
    task = one_map([2.0], lambda output, target: (output * slopes).sum((1, 2, 3)).mean(), [[3.0, 3.0]])
    assert not TaylorFilter(normalize=False)(task, Masks.dense(task.model))["weight"].any()
    task = one_map([2.0], lambda output, target: output.sum((1, 2, 3)).mean(), [[3.0, 1.0], [-3.0, -1.0]])
    assert TaylorFilter(normalize=False)(task, Masks.dense(task.model))["weight"].item() == 8.0


def test_a_loss_linear_in_the_map_changes_by_exactly_the_score():
    task = one_map([2.0, -1.0, 0.5], lambda output, target: (output**1).sum((1, 2, 3)).mean(), [[3.0, 1.0]])
    scores = TaylorFilter(normalize=False)(task, Masks.dense(task.model))["weight"].flatten()
    w, before = task.params()["weight"].detach(), task.mean_loss()
    for i in range(3):
        gone = w.clone()
        gone[i] = 0
        assert abs(task.mean_loss({"weight": gone}) - before) == pytest.approx(scores[i].item(), abs=1e-10)


def test_the_map_after_relu_has_the_same_score():
    """z · dC/dz passes through ReLU unchanged, so measuring before it is measuring after it."""
    task = CASES["relu_mlp"]()
    total = 0
    for one in singles(task):
        ((x, y),) = one.data
        z = task.model[1](task.model[0](x)).detach().requires_grad_()
        total = total + (torch.autograd.grad(task.loss(task.model[3](z), y), z)[0] * z).sum(0).abs()
    score = TaylorFilter(normalize=False)(task, Masks.dense(task.model))["0.weight"].mean(1)
    torch.testing.assert_close(score, total.detach() / 6, rtol=1e-12, atol=1e-15)


def test_the_kept_weights_of_a_unit_share_its_score():
    task = CASES["conv_bn"]()
    masks = Masks({n: torch.arange(m.numel()).reshape(m.shape) % 3 > 0 for n, m in Masks.dense(task.model).items()})
    masks.apply_(task.model)
    scores, whole = TaylorFilter()(task, masks), TaylorFilter()(task, Masks.dense(task.model))
    for name, score in scores.items():
        assert not score[~masks[name]].any()
        torch.testing.assert_close(Unit().unit_scores(score), Unit().unit_scores(whole[name]), rtol=1e-12, atol=0)


def test_bad_data_is_refused():
    task = CASES["relu_mlp"]()
    with pytest.raises(DataError, match="the loss is nan"):
        TaylorFilter()(Task(task.model, task.loss, [(x * torch.nan, y) for x, y in task.data]), Masks.dense(task.model))
