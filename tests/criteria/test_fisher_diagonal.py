"""Diagonal Fisher: the squared slopes of single examples times the squared weight."""

import pytest
import torch

from secateur.core.errors import DataError, ModelError
from secateur.core.masks import Masks
from secateur.core.task import Task
from secateur.criteria.fisher_diagonal import FisherDiagonal
from secateur.testing import CASES


def alone(task):
    """The gradient of every example by itself, one backward pass each."""
    for x, y in task.data:
        for i in range(len(x)):
            yield Task(task.model, task.loss, [(x[i : i + 1], y[i : i + 1])]).gradients()


@pytest.mark.parametrize("name", CASES)
def test_score_is_half_the_mean_of_the_squares_of_each_examples_own_change(name):
    task = CASES[name]()
    masks = Masks.dense(task.model)
    every = list(alone(task))
    scores = FisherDiagonal()(task, masks)
    for key in masks:
        w = task.params()[key].detach()
        expected = torch.stack([(w * g[key]).square() for g in every]).mean(0) / 2
        torch.testing.assert_close(scores[key], expected, rtol=1e-11, atol=1e-18)


def test_slopes_that_cancel_still_count():
    """Two examples pull opposite ways: the mean gradient is zero, the Fisher is not."""
    net = torch.nn.Linear(1, 1, bias=False).double()
    net.weight.data.fill_(3.0)
    data = [(torch.tensor([[2.0], [-2.0]]).double(), torch.zeros(2))]
    task = Task(net, lambda output, target: output.mean(), data)
    assert not task.gradients()["weight"].any()
    assert FisherDiagonal()(task, Masks.dense(net))["weight"].item() == pytest.approx(3.0**2 * 2.0**2 / 2)


def test_it_is_the_hessian_where_the_model_is_right():
    """Linear regression with noise of variance 1: mean x² r² tends to mean x², the diagonal of the Hessian."""
    random = torch.Generator().manual_seed(0)
    net = torch.nn.Linear(3, 1, bias=False).double()
    net.weight.data = torch.tensor([[1.0, -2.0, 0.5]]).double()
    x = torch.randn(20000, 3, generator=random, dtype=torch.float64) * torch.tensor([1.0, 0.1, 3.0])
    y = x @ net.weight.detach().T + torch.randn(20000, 1, generator=random, dtype=torch.float64)
    task = Task(net, lambda output, target: (output - target).square().mean() / 2, [(x, y)])
    expected = net.weight.detach().square() * x.square().mean(0) / 2
    torch.testing.assert_close(FisherDiagonal()(task, Masks.dense(net))["weight"], expected, rtol=0.06, atol=0)


def test_pruned_weights_score_zero_and_half_precision_is_squared_in_float32():
    task = CASES["relu_mlp"](torch.bfloat16)
    masks = Masks({n: task.params()[n] > 0 for n in Masks.dense(task.model)})
    masks.apply_(task.model)
    for name, score in FisherDiagonal()(task, masks).items():
        assert score.dtype == torch.float32
        assert not score[~masks[name]].any()


def test_bad_input_is_refused_by_name():
    task = CASES["tanh_mlp"]()
    masks = Masks.dense(task.model)
    with pytest.raises(DataError, match="no example"):
        FisherDiagonal()(Task(task.model, task.loss, []), masks)
    with pytest.raises(DataError, match="gradient of example 0 is not finite"):
        FisherDiagonal()(Task(task.model, task.loss, [(x * float("nan"), y) for x, y in task.data]), masks)
    with torch.no_grad():
        task.params()["0.weight"][0, 0] = float("nan")
    with pytest.raises(ModelError, match="`0.weight`"):
        FisherDiagonal()(task, masks)
