"""Movement: whether the loss pushes a weight away from zero or towards it."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from secateur.core.errors import ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.task import Task
from secateur.criteria.movement import Movement
from secateur.testing import CASES
from secateur.testing.quadratics import diagonal


@pytest.mark.parametrize("name", CASES)
def test_score_is_minus_the_slope_along_the_mask(name):
    """Autograd through an explicit mask at 1, against the product of weight and gradient in the file."""
    task = CASES[name]()
    gates = {n: torch.ones_like(p, requires_grad=True) for n, p in task.params().items()}
    masked = {n: gates[n] * p.detach() for n, p in task.params().items()}
    total = sum(len(x) for x, _ in task.data)
    sum(task.loss(functional_call(task.model, masked, (x,)), y) * len(x) for x, y in task.data).div(total).backward()
    scores = Movement()(task, Masks.dense(task.model))
    for key, score in scores.items():
        torch.testing.assert_close(score, -gates[key].grad, rtol=0, atol=1e-12)


def test_weights_pushed_away_from_zero_score_above_weights_pulled_to_it():
    """On (h/2) w² + b w the gradient is h w + b: at 1 with slopes -3, -1, 2 the products are -2, 0, 3."""
    task = diagonal([1.0, 1.0, 1.0], slope=[-3.0, -1.0, 2.0])
    assert Movement()(task, Masks.dense(task.model))["weight"].tolist() == [[2.0, 0.0, -3.0]]


def test_steps_add_up_along_gradient_descent():
    """w_t = w* + (1 - rate h)^t (w_0 - w*) in closed form."""
    h, b, w, rate = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([2.0, -1.0, 3.0]).double(), 1.0, 0.05
    task = diagonal(h.tolist(), slope=b.tolist())
    expected = torch.zeros(3, dtype=torch.float64)
    for t in range(7):
        at = -b / h + (1 - rate * h) ** t * (w + b / h)
        expected -= at * (h * at + b)
    score = Movement(steps=7, rate=rate)(task, Masks.dense(task.model))["weight"][0]
    torch.testing.assert_close(score, expected, rtol=1e-12, atol=1e-12)
    assert task.params()["weight"].tolist() == [[1.0, 1.0, 1.0]]


def test_all_parameters_take_part_in_the_steps_and_pruned_ones_stay_zero():
    """Against torch's own SGD on a copy, biases included."""
    task, twin = CASES["conv_bn"](), CASES["conv_bn"]()
    masks = Masks({n: torch.arange(m.numel()).reshape(m.shape) % 3 > 0 for n, m in Masks.dense(task.model).items()})
    masks.apply_(task.model)
    masks.apply_(twin.model)
    expected, optimizer = dict.fromkeys(masks, 0), torch.optim.SGD(twin.model.parameters(), lr=0.1)
    for _ in range(3):
        for name, g in twin.gradients().items():
            p = twin.params()[name]
            p.grad = g * masks.get(name, 1)
            if name in masks:
                expected[name] = expected[name] - g * p.detach()
        optimizer.step()
    for name, score in Movement(steps=3, rate=0.1)(task, masks).items():
        torch.testing.assert_close(score, expected[name], rtol=1e-12, atol=1e-14)


def test_flipping_the_sign_of_a_hidden_unit_changes_nothing():
    """tanh is odd: the unit computes the same after its two sides change sign."""
    task, masks = CASES["tanh_mlp"](), Masks.dense(CASES["tanh_mlp"]().model)
    before = Movement(steps=2)(task, masks)
    with torch.no_grad():
        own = task.params()
        for part in (own["0.weight"][3], own["0.bias"][3], own["2.weight"][:, 3]):
            part.neg_()
    after = Movement(steps=2)(task, masks)
    for name in masks:
        torch.testing.assert_close(before[name], after[name], rtol=1e-12, atol=1e-14)


def test_half_precision_is_accumulated_in_float32():
    net = nn.Linear(2, 1, bias=False).half()
    nn.init.constant_(net.weight, 1e-4)
    task = Task(net, lambda output, target: output.mean(), [(torch.full((2, 2), 1e-4).half(), None)])
    score = Movement(steps=2, rate=1e-3)(task, Masks.dense(net))["weight"]
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, torch.full((1, 2), -2e-8), rtol=5e-3, atol=0)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"rate": 0.0}, {"rate": float("nan")}])
def test_bad_arguments_are_refused(wrong):
    with pytest.raises(UsageError, match="must be"):
        Movement(**wrong)


def test_a_rate_that_diverges_is_named():
    task = diagonal([1.0, 4.0])
    with pytest.raises(ModelError, match=r"after \d steps with rate 1e\+200 the network has diverged"):
        Movement(steps=5, rate=1e200)(task, Masks.dense(task.model))
