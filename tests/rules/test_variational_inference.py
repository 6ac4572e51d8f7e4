"""Variational inference: slopes against autograd and torch's distributions, a posterior that is known, and pruning."""

import math

import pytest
import torch
from torch import distributions as D
from torch import nn
from torch.nn import functional

from secateur.core.allocations import ByCost, Global
from secateur.core.budget import keep_for
from secateur.core.errors import BudgetError, DataError, UsageError
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.names import parameters
from secateur.core.select import top_mask
from secateur.core.sockets import Rule
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.data import Loader, Split
from secateur.engine.binding import table_of, value_of
from secateur.engine.loop import Training
from secateur.engine.recipe import TrainStep
from secateur.linalg.diagonals import fisher_diagonal
from secateur.nets import build
from secateur.rules._draws import Density
from secateur.rules._posterior import Prediction, predictive, uncertainty_error
from secateur.rules.variational_inference import VariationalInference
from secateur.testing.rules_contract import check_rule

PRIORS = {
    "gaussian": D.Normal(torch.tensor(0.0).double(), torch.tensor(0.3, dtype=torch.float64)),
    "laplace": D.Laplace(torch.tensor(0.0).double(), torch.tensor(0.3, dtype=torch.float64)),
    "gaussian-mixture": D.MixtureSameFamily(
        D.Categorical(torch.tensor([0.25, 0.75], dtype=torch.float64)),
        D.Normal(torch.zeros(2).double(), torch.tensor([0.3, 0.01], dtype=torch.float64)),
    ),
    "laplace-mixture": D.MixtureSameFamily(
        D.Categorical(torch.tensor([0.25, 0.75], dtype=torch.float64)),
        D.Laplace(torch.zeros(2).double(), torch.tensor([0.3, 0.01], dtype=torch.float64)),
    ),
}


def data(batch=4):
    random = stream(0, "data")
    x = torch.randn(12, 6, generator=random, dtype=torch.float64)
    return Loader(Split(x, torch.arange(12) % 3), batch, shuffle=True, dtype=torch.float64)


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()


class Watched(Rule):
    """Before or after the rule under test: what it finds."""

    paper = VariationalInference.paper

    def __init__(self):
        self.drawn, self.shown = [], []

    def loss(self, run, loss, batch, output):
        self.drawn.append({n: w.detach().clone() for n, w in run.weights().items()})
        return loss

    def after_step(self, run):
        self.shown.append({n: w.detach().clone() for n, w in run.weights().items()})


def trained(rule, epochs=2, masks=None, loader=None, model=None, loss=None, seed=5, **options):
    model, watched = model or net(), Watched()
    loader = loader or data()
    step = TrainStep(epochs=epochs, rules=(rule, watched), **{"lr": 0.1, **options})
    sample = lambda n, m: Task(m, loss or CrossEntropy(), list(loader.epoch(0)))  # noqa: E731
    training = Training(model, loader, step, masks=masks, seed=seed, loss=loss, sample=sample)
    training.fit()
    return training, watched


@pytest.mark.parametrize("prior", PRIORS)
def test_log_densities_are_those_of_the_distributions(prior):
    """Far tails of mixtures too, where densities underflow."""
    w = torch.cat([torch.linspace(-2, 2, 41), torch.tensor([-40.0, 1e-4, 40.0])]).double()
    density = Density(prior, 0.3, 0.01, 0.25)

    torch.testing.assert_close(density.log(w), PRIORS[prior].log_prob(w), rtol=1e-10, atol=1e-10)
    free = w[w != 0].clone().requires_grad_()
    slope = torch.autograd.grad(PRIORS[prior].log_prob(free).sum(), free)[0]
    torch.testing.assert_close(density.slope(w[w != 0]), slope, rtol=1e-9, atol=1e-9)


def test_the_sampled_divergence_converges_to_the_closed_form():
    """Card test (a): the mean of log q - log p over draws, within five standard errors."""
    mu, sigma = torch.tensor([0.2, -1.0, 0.0]).double(), torch.tensor([0.05, 0.5, 0.3]).double()
    noise = torch.randn(200_000, 3, generator=stream(0, "draws"), dtype=torch.float64)
    draws = mu + sigma * noise
    each = D.Normal(mu, sigma).log_prob(draws) - Density("gaussian", 0.3, 0.01, 0.25).log(draws)

    exact = D.kl_divergence(D.Normal(mu, sigma), D.Normal(0.0, torch.tensor(0.3).double()))

    assert bool(((each.mean(0) - exact).abs() < 5 * each.std(0) / each.shape[0] ** 0.5).all())


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("temperature", [0.0, 0.01, 1.0])
def test_a_step_goes_down_the_slope_of_the_free_energy(prior, temperature):
    """One step of SGD against autograd through the draw; T = 0 is maximum likelihood on drawn weights (card test c)."""
    options = {"prior": prior, "scale": 0.3, "spike": 0.01, "share": 0.25}
    rule = VariationalInference(sparsity=0.0, temperature=temperature, **options)
    model = net()
    first = {n: p.detach().clone() for n, p in parameters(model).items()}
    training, watched = trained(rule, 1, model=model, momentum=0.0, schedule="constant", loader=data(12))
    x, y = next(data(12).epoch(0))

    mu = {n: p.clone().requires_grad_() for n, p in first.items()}
    rho, at = {}, dict(mu)
    divergence = torch.zeros((), dtype=torch.float64)
    for n in training.run.masks:
        start = torch.empty(first[n].shape, dtype=torch.float64)
        start.uniform_(-5, -4, generator=stream(5, "variational_inference", "rho", n))
        rho[n] = start.requires_grad_()
        noise = torch.randn(start.shape, generator=stream(5, "variational_inference", 0, n), dtype=torch.float64)
        at[n] = mu[n] + rho[n].exp() * noise
        torch.testing.assert_close(watched.drawn[0][n], at[n].detach(), rtol=0, atol=1e-15)
        q = D.Normal(mu[n], rho[n].exp())
        divergence = divergence + (q.log_prob(at[n]) - PRIORS[prior].log_prob(at[n])).sum()
    likely = functional.cross_entropy(torch.func.functional_call(model, at, (x,)), y, reduction="sum")
    energy = (likely + temperature * divergence) / 12
    slopes = torch.autograd.grad(energy, [*mu.values(), *rho.values()])

    for (n, p), slope in zip(first.items(), slopes, strict=False):
        torch.testing.assert_close(parameters(model)[n].detach(), p - 0.1 * slope, rtol=1e-9, atol=1e-12)
    for (n, r), slope in zip(rho.items(), slopes[len(mu) :], strict=True):
        found = training.run.state(rule)[f"rho:{n}"]
        torch.testing.assert_close(found, r.detach() - 0.1 * slope, rtol=1e-9, atol=1e-12)


def test_all_batches_of_an_epoch_together_weigh_the_divergence_once():
    """Batches that are added up before a step share one draw, and count as one batch."""
    rule = VariationalInference(sparsity=0.0, temperature=1.0)
    options = {"momentum": 0.0, "schedule": "constant", "epochs": 1}

    one, _ = trained(rule, loader=data(12), **options)
    three, watched = trained(rule, loader=data(4), accumulate=3, **options)

    for n, w in one.model.state_dict().items():
        torch.testing.assert_close(three.model.state_dict()[n], w, rtol=0, atol=1e-13)
    assert len(watched.drawn) == 3
    assert all(torch.equal(watched.drawn[0][n], again[n]) for again in watched.drawn for n in again)


def test_between_steps_the_network_holds_the_means():
    """What the loss saw is a draw; what is evaluated is not; in evaluation mode nothing is drawn."""
    rule = VariationalInference(sparsity=0.0, temperature=1.0)
    model, seen = net(), []

    def evaluate(net):
        seen.append(net.eval()(torch.ones(1, 6).double()))
        return {}

    step = TrainStep(epochs=2, rules=(rule,), lr=0.01)
    Training(model, data(), step, evaluate=evaluate).fit()
    torch.testing.assert_close(model.eval()(torch.ones(1, 6).double()), seen[-1], rtol=0, atol=0)

    _, watched = trained(rule, epochs=3, lr=0.01)
    for drawn, shown in zip(watched.drawn[1:], watched.shown, strict=False):
        for n, w in drawn.items():
            size = (w - shown[n]).abs()
            assert 0 < float(size.min()) and float(size.mean()) < 0.03


def test_bayesian_linear_regression_finds_its_posterior():
    """Card test (e): unit noise, T = 1, prior precision 4: mean of the posterior, and deviations of 1/precision_jj."""
    random = stream(0, "regression")
    x = torch.randn(20, 3, generator=random, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5]).double()
    x[:, 1] += x[:, 0]
    y = x @ torch.tensor([1.0, -0.5, 0.25]).double() + torch.randn(20, generator=random, dtype=torch.float64)
    precision = x.T @ x + 4 * torch.eye(3).double()
    loader = Loader(Split(x, torch.arange(20)), 20, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    rule = VariationalInference(sparsity=0.0, temperature=1.0, scale=0.5)

    def loss(output, target):
        return (output[:, 0] - y[target]).square().mean() / 2

    training, _ = trained(rule, 3000, loader=loader, model=model, loss=loss, optimizer="adam", lr=0.02)

    sigma = training.run.state(rule)["rho:weight"].exp()[0]
    torch.testing.assert_close(sigma, precision.diag().rsqrt(), rtol=0.03, atol=0)
    mean = torch.linalg.solve(precision, x.T @ y)
    torch.testing.assert_close(model.weight.detach()[0], mean, rtol=0, atol=0.02)


@pytest.mark.parametrize("rank", ["snr", "fisher"])
def test_each_layer_loses_the_same_share_and_its_noise(rank):
    """Exact counts, the lowest of a plain sort, and no deviation left where the mean is gone."""
    free, _ = trained(VariationalInference(sparsity=0.0, temperature=0.1))
    rule = VariationalInference(sparsity=0.4, rank=rank, temperature=0.1)

    training, _ = trained(rule)

    masks = training.run.masks
    assert masks.kept == keep_for(0.4, masks.total)
    task = Task(free.model, CrossEntropy(), list(data().epoch(0)))
    known = free.run.state(free.step.rules[0])
    fisher = fisher_diagonal(task, Masks.dense(free.model))
    for n, mask in masks.items():
        mean = parameters(free.model)[n].detach()
        score = mean.abs() / known[f"rho:{n}"].exp() if rank == "snr" else fisher[n]
        assert abs(int(mask.sum()) - 0.6 * mask.numel()) <= 1
        assert torch.equal(mask, top_mask(score, int(mask.sum())))
        assert torch.equal(parameters(training.model)[n].detach(), mean * mask)
        rho = training.run.state(rule)[f"rho:{n}"]
        assert bool((rho[~mask] == -torch.inf).all()) and torch.equal(rho[mask], known[f"rho:{n}"][mask])
        assert not rho.requires_grad


def test_the_rank_does_not_change_when_means_and_deviations_scale():
    """Card test (b)."""
    rule = VariationalInference(sparsity=0.0)
    training, _ = trained(rule)
    before = rule.scores(training.run)
    with torch.no_grad():
        for n, w in training.run.weights().items():
            w.mul_(8)
            training.run.state(rule)[f"rho:{n}"].add_(math.log(8))

    for n, score in rule.scores(training.run).items():
        torch.testing.assert_close(score, before[n], rtol=1e-12, atol=0)


def test_the_optimizer_is_left_with_the_network_alone():
    training, _ = trained(VariationalInference(), weight_decay=0.1)

    own = {id(p) for p in training.model.parameters()}
    assert [id(p) in own for group in training.run.optimizer.param_groups for p in group["params"]] == [True] * 4
    assert all(id(p) in own for p in training.run.optimizer.state)
    assert not training.model._forward_pre_hooks


def test_masks_it_came_with_are_lifted():
    half = Masks({n: torch.arange(m.numel()).reshape(m.shape) % 2 > 0 for n, m in Masks.dense(net()).items()})

    training, _ = trained(VariationalInference(sparsity=0.2), masks=half)

    assert training.run.masks.kept == keep_for(0.2, half.total) > half.kept


def test_predictions_without_noise_are_the_network_s():
    """Card test (d): σ → 0 leaves no mutual information, and the entropy of the softmax."""
    model, batches = net().eval(), list(data().epoch(0))
    task = Task(model, CrossEntropy(), batches)
    still = predictive(task, {n: torch.zeros_like(p) for n, p in parameters(model).items()}, samples=5)
    p = torch.cat([model(x).softmax(1) for x, _ in batches])

    torch.testing.assert_close(still.probabilities, p.detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(still.entropy, D.Categorical(p).entropy().detach(), rtol=0, atol=1e-13)
    assert float(still.information.abs().max()) < 1e-14
    sizes = []
    for size in (1e-4, 1e-2, 1.0):
        loud = predictive(task, {n: torch.full_like(p, size) for n, p in parameters(model).items()}, samples=20)
        assert bool((loud.information > -1e-14).all())
        sizes.append(float(loud.information.mean()))
    assert sizes == sorted(sizes) and sizes[0] < 1e-6 < 0.05 < sizes[2]


def test_uncertainty_is_calibrated_where_errors_are_as_frequent_as_it_says():
    """Hand-made: certain and right, certain and wrong, and a coin that is wrong half of the time."""
    sure, coin = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.5, 0.5]).double()

    def error(rows, target):
        p = torch.stack(rows)
        entropy = D.Categorical(p).entropy()
        return uncertainty_error(Prediction(p, entropy, torch.zeros(len(p)), torch.tensor(target)))

    assert error([sure] * 4, [0, 0, 0, 0]) == pytest.approx(0, abs=1e-12)
    assert error([sure] * 4, [1, 1, 1, 1]) == pytest.approx(2)  # errors of two classes count twice
    assert error([coin] * 4, [0, 1, 0, 1]) == pytest.approx(0, abs=1e-12)
    assert error([coin] * 4, [0, 0, 0, 0]) == pytest.approx(1)
    assert error([sure, sure, coin, coin], [0, 0, 0, 0]) == pytest.approx(0.5)


def test_bad_predictions_are_refused():
    model = net()
    task = Task(model, CrossEntropy(), list(data().epoch(0)))
    with pytest.raises(UsageError, match="2 draws or more"):
        predictive(task, {}, samples=1)
    with pytest.raises(UsageError, match="`w`, which is no parameter"):
        predictive(task, {"w": torch.ones(1)}, samples=2)
    whole = Prediction(torch.ones(2, 1).double(), torch.zeros(2), torch.zeros(2), torch.zeros(2).long())
    with pytest.raises(DataError, match="two classes or more"):
        uncertainty_error(whole)
    with pytest.raises(UsageError, match="bins is 0"):
        uncertainty_error(whole, bins=0)


def test_averages_clipping_autocast_and_batchnorm():
    """An ordinary ResNet: BatchNorm has no noise, and everything stays finite."""
    torch.manual_seed(0)
    model = build("resnet20", outputs=3)
    random = stream(0, "images")
    loader = Loader(Split(torch.randn(16, 3, 8, 8, generator=random), torch.arange(16) % 3), 8)

    training, watched = trained(
        VariationalInference(rank="fisher"), model=model, loader=loader, amp=True, ema=0.9, clip=1.0, lr=0.01
    )

    assert training.run.masks.kept == keep_for(0.3, training.run.masks.total)
    assert all(bool(t.isfinite().all()) for t in model.state_dict().values())
    assert not any("bn" in n or "norm" in n for n in watched.drawn[0])


def test_other_priors_keep_the_contract():
    rule = VariationalInference(sparsity=0.5, rank="fisher", prior="laplace-mixture", allocation=Global())
    check_rule(rule, ["conv_bn"], epochs=2)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sparsity": 1.0}, BudgetError, r"sparsity is 1.0; it must be in \[0, 1\)"),
        ({"sparsity": float("nan")}, BudgetError, "sparsity is nan"),
        ({"temperature": -0.1}, UsageError, "temperature is -0.1"),
        ({"scale": 0.0}, UsageError, "scale is 0.0"),
        ({"spike": -1.0}, UsageError, "spike -1.0"),
        ({"share": 1.0}, UsageError, "share 1.0"),
        ({"examples": 0}, UsageError, "at least 1"),
        ({"allocation": ByCost()}, UsageError, "needs MACs"),
    ],
)
def test_values_out_of_range_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        VariationalInference(**options)


def test_names_that_do_not_exist_are_refused():
    for table in ({"prior": "cauchy"}, {"rank": "size"}):
        with pytest.raises(UsageError, match="must be one of"):
            value_of(Rule, {"use": "variational_inference", **table}, "rule")
    odd = VariationalInference()
    object.__setattr__(odd, "prior", "cauchy")
    with pytest.raises(UsageError, match="the prior must be one of gaussian"):
        odd.__post_init__()


def test_runs_that_do_not_fit_are_refused_before_training():
    with pytest.raises(BudgetError, match="would empty whole layers"):
        trained(VariationalInference(sparsity=0.999))
    step = TrainStep(epochs=1, rules=(VariationalInference(rank="fisher"),))
    with pytest.raises(UsageError, match="no data sample"):
        Training(net(), data(), step).fit()


def test_recipes_can_hold_it():
    rule = VariationalInference(sparsity=0.5, rank="fisher", prior="laplace", temperature=1.0)

    assert value_of(Rule, table_of(rule), "rule") == rule
    assert value_of(Rule, "variational_inference", "rule") == VariationalInference()
