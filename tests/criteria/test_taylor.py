"""Taylor: the squared first-order change of the loss when a weight goes."""

import pytest
import torch

from secateur.core.errors import DataError, ModelError
from secateur.core.masks import Masks
from secateur.core.patterns import Unit
from secateur.core.task import Task
from secateur.criteria.snip import Snip
from secateur.criteria.taylor import Taylor
from secateur.testing import CASES
from secateur.testing.cases import conv_bn
from secateur.testing.quadratics import dense, diagonal


def test_score_is_the_square_of_the_true_change_when_the_loss_is_linear():
    """L = b·w: setting w_i to zero changes the loss by -b_i w_i, to first order and in truth."""
    task = dense(torch.zeros(4, 4), slope=[1.0, -2.0, 0.5, 0.0], at=[3.0, 0.25, -4.0, 7.0])
    before, w = task.mean_loss(), task.params()["weight"].detach()

    score = Taylor()(task, Masks.dense(task.model))["weight"]

    for i in range(4):
        gone = w.clone()
        gone[0, i] = 0.0
        assert score[0, i].item() == pytest.approx((task.mean_loss({"weight": gone}) - before) ** 2, abs=1e-10)


def test_the_estimate_misses_the_curvature_by_exactly_half_the_diagonal():
    """On a quadratic the true change is -w·g + H_ii w_i² / 2; the score is (w·g)²."""
    task = diagonal([1.0, 4.0, 9.0], slope=[0.5, -8.0, 1.0], at=[2.0, 1.0, -1.0])
    w = torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64)
    g = torch.tensor([2.5, -4.0, -8.0], dtype=torch.float64)

    score = Taylor()(task, Masks.dense(task.model))["weight"][0]

    torch.testing.assert_close(score, (w * g).square(), rtol=1e-14, atol=0)
    for i, h in enumerate((1.0, 4.0, 9.0)):
        gone = w.clone()
        gone[i] = 0.0
        change = task.mean_loss({"weight": gone[None]}) - task.mean_loss()
        assert change == pytest.approx((-w[i] * g[i] + h * w[i] ** 2 / 2).item(), abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_score_is_the_square_of_snip_for_a_trained_network(name):
    """Two files, one slope: (w·g)² against |w·g|."""
    task = CASES[name]()
    masks = Masks.dense(task.model)
    snip, taylor = Snip()(task, masks), Taylor()(task, masks)
    for key in masks:
        torch.testing.assert_close(taylor[key], snip[key].square(), rtol=1e-12, atol=0)


def test_a_unit_scores_the_sum_of_its_squares():
    """The second form of the paper: the importance of a filter is the sum of its weights' importances."""
    task = CASES["conv_bn"]()
    slopes, w = task.gradients(), task.params()["second.weight"].detach()
    expected = torch.stack([(w[i] * slopes["second.weight"][i]).square().sum() for i in range(len(w))])

    units = Unit().unit_scores(Taylor()(task, Masks.dense(task.model))["second.weight"])

    torch.testing.assert_close(units, expected, rtol=1e-12, atol=0)


def test_the_mean_gradient_is_squared_not_the_gradient_of_every_example():
    """Two examples whose slopes cancel: the loss does not change to first order, so the score is zero."""
    net = torch.nn.Linear(1, 1, bias=False).double()
    data = [(torch.tensor([[1.0]]).double(), torch.zeros(1)), (torch.tensor([[-1.0]]).double(), torch.zeros(1))]
    task = Task(net, lambda output, target: output.mean(), data)
    assert not Taylor()(task, Masks.dense(net))["weight"].any()


def test_running_statistics_are_used_even_by_untrained_norms():
    task = conv_bn(trained=False)
    masks = Masks.dense(task.model)
    taylor, running = Taylor()(task, masks), Snip("running")(task, masks)
    for name in masks:
        torch.testing.assert_close(taylor[name], running[name].square(), rtol=1e-12, atol=0)


def test_a_minimum_scores_zero_everywhere():
    task = diagonal([1.0, 2.0], slope=[-1.0, -2.0])
    assert not Taylor()(task, Masks.dense(task.model))["weight"].any()


def test_half_precision_scores_do_not_vanish_in_the_square():
    """(1e-3 · 1e-3)² = 1e-12 is zero in float16; the product is taken in float32."""
    net = torch.nn.Linear(4, 1, bias=False).half()
    with torch.no_grad():
        net.weight.fill_(1e-3)
    data = [(torch.full((2, 4), 1e-3, dtype=torch.float16), torch.zeros(2))]
    score = Taylor()(Task(net, lambda output, target: output.mean(), data), Masks.dense(net))["weight"]
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, torch.full((1, 4), 1e-12), rtol=5e-3, atol=0)


def test_bad_input_is_refused_by_name():
    task = CASES["tanh_mlp"]()
    masks = Masks.dense(task.model)
    with pytest.raises(DataError, match="no example"):
        Taylor()(Task(task.model, task.loss, []), masks)
    with pytest.raises(DataError, match="the loss is nan"):
        Taylor()(Task(task.model, task.loss, [(x * float("nan"), y) for x, y in task.data]), masks)
    with torch.no_grad():
        task.params()["4.weight"][0, 0] = float("inf")
    with pytest.raises(ModelError, match="`4.weight`"):
        Taylor()(task, masks)
