"""Signal to noise: weights over the deviations of their posterior."""

import pytest
import torch
from torch import nn

from secateur.core.errors import ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.task import Task
from secateur.criteria.snr import Snr
from secateur.testing import CASES


class Bayes(nn.Module):
    """A mean-field layer as a variational trainer leaves it."""

    def __init__(self, mean, rho, names=("w_mu", "w_rho")):
        super().__init__()
        for name, value in zip(names, (mean, rho), strict=True):
            self.register_parameter(name, nn.Parameter(torch.as_tensor(value, dtype=torch.float64)))

    def forward(self, x):
        return x @ next(iter(self.parameters())).T


def scored(net, only, **options):
    masks = Masks.dense(net, only=[only])
    return Snr(**options)(Task(net, lambda output, target: output.mean(), []), masks)[only]


@pytest.mark.parametrize("names", [("w_mu", "w_rho"), ("mu_weight", "rho_weight"), ("weight", "weight_rho")])
def test_mean_over_deviation_of_a_variational_layer(names):
    """ρ = log σ with exp, ρ = log(e^σ - 1) with softplus; no data is read."""
    mean, sigma = torch.tensor([[1.0, -4.0], [0.0, 0.5]]).double(), torch.tensor([[0.5, 2.0], [1.0, 0.125]]).double()
    expected = torch.tensor([[2.0, 2.0], [0.0, 4.0]]).double()
    for deviation, rho in (("exp", sigma.log()), ("softplus", sigma.expm1().log())):
        net = Bayes(mean, rho, names)
        torch.testing.assert_close(scored(net, names[0], deviation=deviation), expected, rtol=1e-12, atol=0)
        scaled = Bayes(8 * mean, (8 * sigma).log() if deviation == "exp" else (8 * sigma).expm1().log(), names)
        torch.testing.assert_close(scored(scaled, names[0], deviation=deviation), expected, rtol=1e-12, atol=0)


def test_bayesian_linear_regression_has_the_deviations_of_its_posterior():
    """Unit noise: precision_jj = Σ x_j² + prior, when residuals are ±1 as the noise model says."""
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net = nn.Linear(3, 1, bias=False).double()
    y = net(x).detach() + torch.tensor([1.0, -1.0] * 4).double()[:, None]
    task = Task(net, lambda output, target: (output - target).square().mean() / 2, [(x[:5], y[:5]), (x[5:], y[5:])])
    for prior in (0.0, 2.5):
        sigma = (x.square().sum(0) + prior).rsqrt()
        score = Snr(prior=prior)(task, Masks.dense(net))["weight"]
        torch.testing.assert_close(score, net.weight.detach().abs() / sigma, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_precision_adds_up_squared_slopes_of_single_examples(name):
    """One example at a time through Task.gradients."""
    task = CASES[name]()
    masks = Masks.dense(task.model)
    precision = {n: torch.zeros(m.shape, dtype=torch.float64) for n, m in masks.items()}
    for x, y in task.data:
        for i in range(len(x)):
            slopes = Task(task.model, task.loss, [(x[i : i + 1], y[i : i + 1])]).gradients()
            precision = {n: p + slopes[n].square() for n, p in precision.items()}
    scores = Snr()(task, masks)
    for n, w in masks.match(task.model).items():
        torch.testing.assert_close(scores[n], w.detach().abs() * precision[n].sqrt(), rtol=1e-9, atol=1e-12)


def test_pruned_weights_score_nothing_even_with_a_value():
    task = CASES["tanh_mlp"]()
    masks = Masks({n: torch.arange(m.numel()).reshape(m.shape) % 2 > 0 for n, m in Masks.dense(task.model).items()})
    for score, mask in zip(Snr(prior=1.0)(task, masks).values(), masks.values(), strict=True):
        assert not score[~mask].any()
        assert score[mask].all()


def test_bad_input_is_refused_by_name():
    odd = Snr()
    object.__setattr__(odd, "deviation", "std")
    with pytest.raises(UsageError, match="deviation must be"):
        odd.__post_init__()
    for prior in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="precision of at least 0"):
            Snr(prior=prior)
    with pytest.raises(ModelError, match="`w_mu` has no `w_rho`"):
        scored(Bayes([[1.0]], [[1.0, 2.0]]), "w_mu", deviation="exp")
    with pytest.raises(ModelError, match="`w_rho` gives deviations that are 0"):
        scored(Bayes([[1.0]], [[-1e4]]), "w_mu", deviation="exp")
