"""Bernoulli gates against all states written out, and the eliminated hyper-prior against a search."""

import itertools
import math

import numpy as np
import pytest
import torch
from tests.rules.behind_kit import run_of
from torch import nn
from torch.nn import functional

import secateur
from secateur.core.errors import UsageError
from secateur.core.streams import stream
from secateur.rules import _behind
from secateur.rules.variational_bernoulli import Switch, VariationalBernoulli
from secateur.testing.cases import tanh_mlp
from secateur.testing.rules_contract import check_rule


def switch_of(net, rule):
    run = run_of(net, rule)
    return run, next(iter(_behind.standing(run, Switch).values()))


def normals(*shape, name):
    return torch.randn(*shape, generator=stream(0, name), dtype=torch.float64)


@pytest.mark.parametrize("gamma", [0.5, 0.01])
def test_the_hyper_prior_leaves_a_linear_penalty(gamma):
    """Card test (a): min over pi of KL(theta || pi) - log p(pi | gamma), and what the rule pays is its slope."""
    logit = np.linspace(-40, 40, 4_000_001)
    log_pi, log_rest = -np.logaddexp(0, -logit), -np.logaddexp(0, logit)
    least = {}
    for theta in (0.0, 0.1, 0.5, 0.9, 1.0):
        first = theta * (np.log(theta) - log_pi) if theta else 0.0
        second = (1 - theta) * (np.log1p(-theta) - log_rest) if theta < 1 else 0.0
        prior = math.log((gamma - 1) / math.log(gamma)) - np.log1p((gamma - 1) * np.exp(log_rest))
        least[theta] = float(np.min(first + second - prior))
        linear = -theta * math.log(gamma) + math.log(gamma) - math.log((gamma - 1) / math.log(gamma))
        assert least[theta] == pytest.approx(linear, abs=1e-4)

    rule = VariationalBernoulli(math.log(gamma), start=0.5, rate=1e-3, examples=10)
    run, (_, switch) = switch_of(nn.Linear(3, 2).double(), rule)
    switch.theta.grad = torch.zeros(3, dtype=torch.float64)
    rule.before_step(run)
    moved = (switch.theta.detach() - 0.5) / -1e-3
    assert moved.tolist() == pytest.approx([(least[0.9] - least[0.1]) / 0.8 / 10] * 3, rel=1e-3)


def _losses(net, x, y):
    """The loss with every state of the three inputs, and its gradient by theta as the rule takes it."""
    found = {}
    layer = net
    switch = layer.parametrizations.weight[0]
    for state in itertools.product((0.0, 1.0), repeat=3):
        switch.sample = lambda x, s=state: torch.tensor(s, dtype=x.dtype) + switch.theta - switch.theta.detach()
        loss = (layer(x) * y).sum(1).mean()  # linear in the outputs, so in every switch
        (slope,) = torch.autograd.grad(loss, switch.theta)
        found[state] = (float(loss.detach()), slope)
    return found


def test_gradient_of_theta_over_all_states():
    """Card tests (b) and (c): the expected loss over eight states is linear in theta, its slope E[l|1] - E[l|0]."""
    net = nn.Linear(3, 2).double()
    _, (_, switch) = switch_of(net, VariationalBernoulli())
    found = _losses(net, normals(5, 3, name="x"), normals(5, 2, name="y"))

    def chance(state, theta):
        return math.prod(t if on else 1 - t for on, t in zip(state, theta, strict=True))

    def expected(theta):
        return sum(chance(state, theta) * loss for state, (loss, _) in found.items())

    theta = [0.3, 0.8, 0.55]
    mine = sum(chance(state, theta) * slope for state, (_, slope) in found.items())
    for i in range(3):
        ends = [expected([*theta[:i], end, *theta[i + 1 :]]) for end in (0.0, 0.25, 1.0)]
        assert ends[1] == pytest.approx(0.75 * ends[0] + 0.25 * ends[2], abs=1e-12)
        assert float(mine[i]) == pytest.approx(ends[2] - ends[0], abs=1e-12)
    assert float((switch.theta.detach() - 0.9).abs().max()) < 1e-7


def test_one_step_of_theta():
    """theta - rate (gradient - log gamma / N), within [0, 1]; the rate is half of itself in the middle of the run."""
    rule = VariationalBernoulli(-5.0, start=0.5, rate=0.8, examples=25)
    run, (_, switch) = switch_of(nn.Linear(4, 2), rule)
    run.step = 5
    switch.theta.grad = torch.tensor([0.1, -0.7, 2.0, -9.0])
    rule.before_step(run)
    assert switch.theta.tolist() == pytest.approx([0.5 - 0.4 * 0.3, 0.5 + 0.4 * 0.5, 0.0, 1.0])
    assert switch.theta.grad is None


def test_without_pressure_nothing_goes():
    """Card test (d): the penalty vanishes as gamma goes to 1."""
    rule = VariationalBernoulli(-1e-13, start=0.7, rate=1.0, examples=10)
    run, (_, switch) = switch_of(nn.Linear(4, 2).double(), rule)
    switch.theta.grad = torch.zeros(4, dtype=torch.float64)
    rule.before_step(run)
    assert switch.theta.tolist() == pytest.approx([0.7] * 4, abs=1e-13)
    rule.end(run)
    assert run.masks.kept == 8


def test_with_all_switches_on_it_is_ordinary_training():
    """Card test (e): with weight decay, to the bit."""
    ends = []
    for rules in ([], [VariationalBernoulli(-1e-9, start=1.0, rate=0.0)]):
        task = tanh_mlp(batches=(8, 6))
        secateur.train(task.model, list(task.data), rules=rules, epochs=5, lr=0.1, weight_decay=0.01)
        ends.append(task.model.state_dict())
    assert all(torch.equal(w, ends[1][name]) for name, w in ends[0].items())


@pytest.mark.parametrize(("layer", "shape", "drawn"), [
    (nn.Linear(3, 2), (4, 3), (4, 3)),
    (nn.Linear(3, 2), (4, 5, 3), (4, 1, 3)),
    (nn.Linear(3, 2), (3,), (3,)),
    (nn.Conv2d(3, 2, 2), (4, 3, 5, 5), (4, 3, 1, 1)),
    (nn.Conv2d(3, 2, 2), (3, 5, 5), (3, 1, 1)),
    (nn.Conv1d(3, 2, 2), (4, 3, 5), (4, 3, 1)),
], ids=["dense", "words", "single", "images", "image", "signals"])  # fmt: skip
def test_every_example_has_its_own_switches(layer, shape, drawn):
    """Zeros and ones with one number for each example and channel, and the layer sees what is switched on."""
    net = layer.double()
    _, (_, switch) = switch_of(net, VariationalBernoulli(start=0.5))
    x = normals(*shape, name="x")
    xi = switch.sample(x).detach()
    assert xi.shape == drawn and bool(((xi == 0) | (xi == 1)).all())
    switch.calls = 0
    found = net(x)
    weight, bias = _behind.weight(net), net.bias
    dims = weight.dim() - 2
    plain = (functional.linear, functional.conv1d, functional.conv2d)[dims]
    torch.testing.assert_close(found, plain(x * xi, weight, bias), rtol=0, atol=1e-12)


def test_switches_come_at_their_chances():
    net = nn.Linear(3, 1)
    _, (_, switch) = switch_of(net, VariationalBernoulli())
    switch.theta.data = torch.tensor([0.0, 0.3, 1.0])
    share = switch.sample(torch.ones(20_000, 3)).detach().mean(0)
    assert share[0] == 0 and share[1] == pytest.approx(0.3, abs=0.015) and share[2] == 1


def test_channels_of_groups_are_pruned_where_they_are_read():
    """Six channels in two groups: channel 4 is the second slice of the filters of the second group."""
    rule, net = VariationalBernoulli(), nn.Conv2d(6, 4, 3, groups=2).double()
    run, (_, switch) = switch_of(net, rule)
    switch.theta.data[4] = 0.2
    x = normals(2, 6, 5, 5, name="x")
    wanted = functional.conv2d(
        x.index_fill(1, torch.tensor([4]), 0.0), _behind.weight(net), net.bias, groups=2
    ).detach()
    rule.end(run)
    torch.testing.assert_close(net(x), wanted, rtol=0, atol=1e-12)
    assert (~run.masks["weight"]).sum() == 18 and not run.masks["weight"][2:, 1].any()


def test_a_layer_keeps_its_best_channel():
    rule = VariationalBernoulli()
    run, (_, switch) = switch_of(net := nn.Linear(3, 2), rule)
    switch.theta.data = torch.tensor([0.1, 0.4, 0.2])
    with pytest.warns(UserWarning, match="all inputs of `weight` went off"):
        rule.end(run)
    assert run.masks["weight"].tolist() == [[False, True, False]] * 2
    assert (net.weight != 0).tolist() == [[False, True, False]] * 2


def test_weight_decay_acts_on_what_is_switched_off():
    """Weights behind a switch that is off shrink by rate times decay in every step."""
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3)).double()
    before = net[1].weight.detach().clone()
    data = [(normals(6, 2, name="x"), torch.arange(6) % 3)] * 2
    seen = []

    class Watched(VariationalBernoulli):
        def begin(self, run):
            super().begin(run)
            _behind.standing(run, Switch)["1.weight"][1].theta.data[0] = 0.0

        def end(self, run):
            seen.append(_behind.weight(net[1]).detach().clone())
            super().end(run)

    rule = Watched(-1e-9, start=1.0, rate=0.0)
    secateur.train(net, data, rules=[rule], epochs=5, lr=0.1, momentum=0.0, weight_decay=0.2, schedule="constant")
    torch.testing.assert_close(seen[0][:, 0], before[:, 0] * 0.98**10, rtol=1e-12, atol=0)


def test_the_contract_with_little_pressure():
    """Where some channels stay and some go."""
    check_rule(VariationalBernoulli(log_gamma=-0.5, start=0.6, rate=0.5), ["conv_bn", "attention"], epochs=4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"log_gamma": 0.0}, "log_gamma is 0.0; it must be below 0"),
        ({"log_gamma": -math.inf}, "log_gamma is -inf"),
        ({"start": 1.5}, "start is 1.5"),
        ({"rate": -1.0}, "rate is -1.0"),
        ({"examples": -1}, "examples is -1"),
    ],
)
def test_values_out_of_range_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        VariationalBernoulli(**options)
