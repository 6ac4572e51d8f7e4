"""Variational dropout against draws of the weights, and its penalty against the divergence itself."""

import math

import pytest
import torch
from tests.rules.behind_kit import heard, run_of
from torch import nn
from torch.nn import functional

from secateur.core.errors import ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.streams import stream
from secateur.rules import _behind
from secateur.rules.variational_dropout import K1, Noise, VariationalDropout, divergence
from secateur.testing.cases import conv_bn, tanh_mlp


def normals(*shape, name="normals"):
    return torch.randn(*shape, generator=stream(0, name), dtype=torch.float64)


def noise_of(net, rule):
    run = run_of(net, rule)
    return run, next(iter(_behind.standing(run, Noise).values()))


@pytest.mark.parametrize("log_alpha", [-8.0, -5.0, -3.0, -1.0, 0.0, 1.0, 3.0, 5.0, 8.0])
def test_divergence_is_that_of_many_draws(log_alpha):
    """Card test (a): E[log alpha / 2 - log|1 + sqrt(alpha) eps|] - k1, with two million draws."""
    noise = normals(1_000_000)
    noise = torch.cat([noise, -noise])
    drawn = (log_alpha / 2 - torch.log((1 + math.exp(log_alpha / 2) * noise).abs())).mean() - K1

    assert -float(divergence(torch.tensor(log_alpha, dtype=torch.float64))) == pytest.approx(float(drawn), abs=0.01)


def test_limits_of_the_divergence():
    """Card test (b): k1 is E[-log|eps|] = (Euler's constant + log 2) / 2, so that endless noise costs nothing."""
    exact = (0.5772156649015329 + math.log(2)) / 2
    assert exact == pytest.approx(0.6352, abs=5e-5) and pytest.approx(exact, abs=6e-4) == K1
    assert float(divergence(torch.tensor(60.0, dtype=torch.float64))) == pytest.approx(0, abs=1e-12)


def test_more_noise_costs_less():
    """Card test (d)."""
    points = torch.linspace(-8, 8, 1601, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(-divergence(points).sum(), points)
    assert bool((slope > 0).all())


@pytest.mark.parametrize("layer", [
    nn.Linear(5, 3),
    nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
    nn.Conv1d(2, 3, 2, padding=1, padding_mode="circular"),
], ids=["dense", "groups", "circular"])  # fmt: skip
def test_noise_is_that_of_drawn_weights(layer):
    """Card test (c): mean and variance of every output over 20,000 draws, of the weights and of the rule."""
    layer, count = layer.double(), 20_000
    with torch.no_grad():
        layer.weight.copy_(0.5 * normals(*layer.weight.shape, name="w"))
    shape = {nn.Linear: (5,), nn.Conv2d: (4, 3, 3), nn.Conv1d: (2, 3)}[type(layer)]
    x, w = normals(*shape, name="x"), layer.weight.detach().clone()
    deviation = 0.1 + 0.5 * normals(*w.shape, name="s").abs()
    bare = {"bias": layer.bias.detach()}

    drawn = torch.stack([
        torch.func.functional_call(layer, {"weight": w + deviation * e, **bare}, (x[None],))[0]
        for e in normals(count, *w.shape, name="e")
    ])  # fmt: skip
    _, (_, noise) = noise_of(layer, VariationalDropout())
    noise.log_variance.data = 2 * deviation.log()
    with torch.no_grad():
        found = layer.train()(x.expand(count, *shape))
        exact = layer.eval()(x[None])[0] if bool(noise.kept(w).all()) else None

    spread = drawn.var(0)
    for sample in (drawn, found):
        assert bool(((sample.mean(0) - drawn.mean(0)).abs() < 5 * (2 * spread / count).sqrt()).all())
        assert bool((sample.var(0) / spread - 1).abs().max() < 0.07)
    assert exact is None or bool(((found.mean(0) - exact).abs() < 5 * (spread / count).sqrt()).all())
    assert float(torch.corrcoef(found.reshape(count, -1)[:, :2].T)[0, 1].abs()) < 0.05  # outputs have their own noise


def test_examples_and_steps_have_their_own_noise():
    """Calls of one step too; evaluation mode has none."""
    rule, net = VariationalDropout(variance=-2.0), nn.Linear(4, 3)
    run, _ = noise_of(net, rule)
    x = torch.ones(2, 4)
    first, second = net(x), net(x)
    run.step = 1
    rule.after_step(run)
    third = net(x)
    assert len({*map(tuple, torch.cat([first, second, third]).tolist())}) == 6
    assert torch.equal(net.eval()(x)[0], net(x)[1])


def test_what_is_left_is_the_mean_without_the_noisy_weights():
    """Card test (e): the dense network with those weights zeroed, to the bit."""
    net, twin = conv_bn().model, conv_bn().model
    rule = VariationalDropout()
    run = run_of(net, rule)
    x = next(iter(conv_bn().data))[0]
    for name, (module, noise) in _behind.standing(run, Noise).items():
        noise.log_variance.data = normals(*noise.mask.shape, name=name) * 3
        w = _behind.weight(module).detach()
        gone = noise.log_variance.detach() - torch.log(w**2 + 1e-8) >= 3
        assert 0 < int(gone.sum()) < gone.numel()
        with torch.no_grad():
            twin.get_parameter(name).masked_fill_(gone, 0)
    assert torch.equal(net.eval()(x), twin.eval()(x))
    rule.end(run)
    assert torch.equal(net(x), twin(x))
    assert all(torch.equal(mask, twin.get_parameter(name) != 0) for name, mask in run.masks.items())


def test_gradient_of_the_divergence():
    """r / N times its sum over the weights kept, by central differences; a layer without a call has none."""
    rule = VariationalDropout(0.8, start=0.0, stop=0.5, variance=-3.0, examples=40)
    net = tanh_mlp().model.train()
    masks = Masks({n: torch.rand(m.shape, generator=stream(1, n)) < 0.7 for n, m in Masks.dense(net).items()})
    run = run_of(net, rule, masks=masks)
    run.step = 1  # of 10: a fifth of the rise
    rule.after_step(run)
    net[2:](net[0](torch.ones(1, 5, dtype=torch.float64)))
    first, second = list(_behind.standing(run, Noise).values())[:2]
    second[1].calls = 0
    rule.before_step(run)

    def value(log_variance, w):
        log_alpha = (log_variance - torch.log(w**2 + 1e-8)).clamp(-8, 8)
        minus = 0.63576 * torch.sigmoid(1.8732 + 1.48695 * log_alpha) - torch.log1p(torch.exp(-log_alpha)) / 2 - 0.63576
        return -minus * masks["0.weight"] * 0.8 * 0.2 / 40

    w, s, step = _behind.weight(first[0]).detach(), first[1].log_variance.detach(), 1e-5
    for found, (a, b) in ((first[1].log_variance.grad, (step, 0)), (_behind.weight(first[0]).grad, (0, step))):
        slope = (value(s + a, w + b) - value(s - a, w - b)) / (2 * step)
        torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-9)
    assert second[1].log_variance.grad is None


def test_the_divergence_rises_in_a_straight_line():
    rule = VariationalDropout(2.0, start=0.2, stop=0.6)
    assert [rule.weight(p) for p in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx([0, 0, 1, 2, 2])
    assert VariationalDropout(start=0.0, stop=0.0).weight(0.0) == 1.0
    run = run_of(tanh_mlp().model, rule)
    heard(run, rule, 3)
    rule.before_step(run)
    assert all(p.grad is None for p in run.model.parameters())


def test_pruned_weights_make_no_noise():
    rule, net = VariationalDropout(variance=2.0), nn.Linear(3, 2)
    masks = Masks({"weight": torch.tensor([[True, True, True], [False, False, False]])})
    run_of(net, rule, masks=masks)
    y = net(torch.ones(100, 3)).detach()
    assert float(y[:, 0].std()) > 1 and float(y[:, 1].std()) < 1e-3


def test_noisy_weights_can_be_left_out_in_training():
    net = nn.Linear(2, 1, bias=False)
    _, (_, noise) = noise_of(net, VariationalDropout(drop=True))
    with torch.no_grad():
        net.parametrizations.weight.original.copy_(torch.tensor([[1.0, 2.0]]))
    noise.log_variance.data = torch.tensor([[4.0, -10.0]])
    assert net.weight.tolist() == [[0.0, 2.0]]
    y = net(torch.tensor([[1.0, 0.0]]).expand(1000, 2)).detach()
    assert float(y.std()) == pytest.approx(math.exp(2), rel=0.1)


def test_inputs_by_name_and_without_a_batch():
    net = nn.Linear(3, 2)
    run_of(net, VariationalDropout())
    assert net(input=torch.ones(3)).shape == (2,) and functional.relu(net(torch.ones(2, 4, 3))).shape == (2, 4, 2)


def test_a_layer_that_dies_is_an_error():
    """The network is plain all the same."""
    rule, net = VariationalDropout(), nn.Linear(3, 2)
    run, (_, noise) = noise_of(net, rule)
    noise.log_variance.data.fill_(20.0)
    with pytest.raises(ModelError, match="no weight of `weight` is left. Let the divergence rise later"):
        rule.end(run)
    assert type(net) is nn.Linear


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strength": -1.0}, "strength is -1.0"),
        ({"start": 0.5, "stop": 0.4}, "start is 0.5 and stop 0.4"),
        ({"threshold": 9.0}, "threshold is 9.0; it must lie between -8 and 8"),
        ({"variance": math.nan}, "variance is nan"),
        ({"examples": -1}, "examples is -1"),
    ],
)
def test_values_out_of_range_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        VariationalDropout(**options)
