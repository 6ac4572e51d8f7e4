"""Hard-concrete gates against sums over many draws, and the penalty against its closed form."""

import math

import pytest
import torch
from tests.rules.behind_kit import heard, run_of
from torch import nn
from torch.nn import functional

from secateur.core.errors import UsageError
from secateur.core.streams import stream
from secateur.rules import _behind
from secateur.rules.l0 import HIGHEST, L0, LOWEST, Gate, chance
from secateur.testing.cases import depthwise, tanh_mlp


def gate_of(net, rule):
    run = run_of(net, rule)
    return run, next(iter(_behind.standing(run, Gate).values()))


@pytest.mark.parametrize("log_alpha", [-3.0, -1.0, 0.0, 0.7, 3.0])
def test_chances_of_open_and_of_fully_open(log_alpha):
    """Card tests (a) and (b): 2 million draws of the gate itself."""
    net = nn.Linear(2_000_000, 1, bias=False).double()
    _, (_, gate) = gate_of(net, L0())
    gate.log_alpha.data.fill_(log_alpha)

    z = gate.value().detach()

    full = torch.sigmoid(torch.tensor(log_alpha) - 2 / 3 * math.log(1.1 / 0.1)).item()
    assert float((z != 0).double().mean()) == pytest.approx(float(chance(torch.tensor(log_alpha))), abs=0.0015)
    assert float((z == 1).double().mean()) == pytest.approx(full, abs=0.0015)
    assert bool((z >= 0).all() and (z <= 1).all())


def test_the_known_value_and_shift():
    zero = torch.zeros((), dtype=torch.float64)
    assert float(chance(zero)) == pytest.approx(0.8318, abs=5e-5)
    assert math.log(chance(zero) / (1 - chance(zero))) == pytest.approx(1.5986, abs=5e-5)


def test_gates_of_evaluation_mode_close_and_open_exactly():
    """No noise and no temperature: 0 up to -2.398, 1 from 2.398 on."""
    net = nn.Linear(5, 2)
    _, (_, gate) = gate_of(net, L0())
    gate.log_alpha.data = torch.tensor([-2.399, -2.397, 0.0, 2.397, 2.399])
    z = gate.eval().value().detach()
    assert z[0] == 0 < z[1] < 0.001 and z[2] == pytest.approx(0.5) and 0.999 < z[3] < 1 == z[4]


@pytest.mark.parametrize("groups", ["inputs", "outputs", "weights"])
def test_gradient_of_the_penalty(groups):
    """Card test (c): strength |g| P (1 - P) / N for log alpha; decay P w / N for weights, decay b / N for biases."""
    rule = L0(0.4, groups, decay=0.0)
    run = run_of(tanh_mlp().model, rule, per_epoch=3)
    heard(run, rule, 7)
    rule.before_step(run)
    for module, gate in _behind.standing(run, Gate).values():
        p = torch.sigmoid(gate.log_alpha.detach() + 2 / 3 * math.log(11))
        size = {"inputs": module.out_features, "outputs": module.in_features, "weights": 1}[groups]
        torch.testing.assert_close(gate.log_alpha.grad, 0.4 * size * p * (1 - p) / 21, rtol=1e-12, atol=0)
        assert not _behind.weight(module).grad.any()

    rule = L0(0.0, groups, decay=0.3, examples=50)
    run = run_of(tanh_mlp().model, rule)
    rule.before_step(run)
    for module, gate in _behind.standing(run, Gate).values():
        p = torch.sigmoid(gate.log_alpha.detach() + 2 / 3 * math.log(11))
        p = p[:, None] if groups == "outputs" else p
        w, bias = _behind.weight(module), _behind.bias(module)[0]
        torch.testing.assert_close(w.grad, 0.3 * p * w.detach() / 50, rtol=1e-12, atol=0)
        torch.testing.assert_close(bias.grad, 0.3 * bias.detach() / 50, rtol=1e-12, atol=0)


def test_nothing_changes_when_all_gates_are_open():
    """Card test (e): without a price and with gates of 1 it is the plain network, to the bit."""
    task, rule = tanh_mlp(), L0(0.0, decay=0.0, examples=10)
    x, plain = next(iter(task.data))[0], tanh_mlp().model
    run = run_of(task.model, rule)
    for _, gate in _behind.standing(run, Gate).values():
        gate.log_alpha.data.fill_(HIGHEST)
    rule.before_step(run)
    assert not any(p.grad.any() for p in task.model.parameters() if p.grad is not None)
    assert torch.equal(task.model.eval()(x), plain.eval()(x))
    rule.end(run)
    assert torch.equal(task.model(x), plain(x)) and run.masks.kept == run.masks.total


@pytest.mark.parametrize("groups", ["inputs", "outputs", "mixed"])
def test_gates_multiply_inputs_and_outputs(groups):
    """Also of convolutions in groups, where an input channel is a slice of one group's filters."""
    random = stream(0, "x")
    conv, x = nn.Conv2d(6, 4, 3, groups=2).double(), torch.randn(3, 6, 5, 5, generator=random, dtype=torch.float64)
    weight, bias = conv.weight.detach().clone(), conv.bias.detach().clone()
    _, (_, gate) = gate_of(conv, L0(groups=groups))
    z = gate.value().detach()
    assert len(z) == (6 if groups == "inputs" else 4)
    if groups == "inputs":
        wanted = functional.conv2d(x * z[:, None, None], weight, bias, groups=2)
    else:
        wanted = functional.conv2d(x, weight, bias, groups=2) * z[:, None, None]
    torch.testing.assert_close(conv(x), wanted, rtol=0, atol=1e-12)

    dense = nn.Linear(6, 4)
    _, (_, gate) = gate_of(dense, L0(groups=groups))
    assert len(gate.log_alpha) == (4 if groups == "outputs" else 6)


def test_outputs_that_close_take_their_bias_along():
    rule = L0(groups="outputs")
    run, (_, gate) = gate_of(net := nn.Linear(3, 4), rule)
    gate.log_alpha.data = torch.tensor([LOWEST, 1.0, LOWEST, 3.0])
    rule.end(run)
    assert (net.bias == 0).tolist() == [True, False, True, False]
    assert run.masks["weight"].any(1).tolist() == [False, True, False, True]


def test_a_layer_keeps_its_best_gate():
    """The best one that has weights, fully open; with a warning."""
    rule = L0()
    run, (_, gate) = gate_of(net := nn.Linear(3, 2), rule)
    before = net.parametrizations.weight.original.detach().clone()
    gate.mask = torch.tensor([[True, False, True]] * 2)
    run.masks = secateur_masks(gate.mask)
    gate.log_alpha.data = torch.tensor([-4.0, -2.5, -3.0])
    with pytest.warns(UserWarning, match="all gates of `weight` closed"):
        rule.end(run)
    assert run.masks["weight"].tolist() == [[False, False, True]] * 2
    assert torch.equal(net.weight[:, 2], before[:, 2]) and not net.weight[:, :2].any()


def secateur_masks(mask):
    from secateur.core.masks import Masks

    return Masks({"weight": mask})


def test_log_alpha_is_held_within_bounds_and_starts_at_the_drop_rate():
    rule = L0(drop=0.2)
    run, (_, gate) = gate_of(nn.Linear(5000, 2), rule)
    assert float(gate.log_alpha.detach().mean()) == pytest.approx(math.log(4), abs=1e-3)
    assert float(gate.log_alpha.detach().std()) == pytest.approx(0.01, rel=0.05)
    gate.log_alpha.data[:2] = torch.tensor([-9.0, 9.0])
    first = gate.uniform
    run.step = 1
    rule.after_step(run)
    assert gate.log_alpha[:2].tolist() == pytest.approx([math.log(0.01), math.log(100)])
    assert not torch.equal(first, gate.uniform)


def test_one_sample_lasts_a_step():
    """Two micro-batches of a step, or a weight that is read twice, see the same gates."""
    net = depthwise().model.train()
    rule = L0()
    run = run_of(net, rule)
    layer = net.project
    assert torch.equal(layer.weight, layer.weight)
    before = layer.weight.detach().clone()
    run.step = 1
    rule.after_step(run)
    assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strength": -1.0}, "strength is -1.0; it must be at least 0"),
        ({"decay": math.nan}, "decay is nan"),
        ({"drop": 1.0}, "drop is 1.0; it must lie between 0 and 1"),
        ({"examples": -1}, "examples is -1"),
    ],
)
def test_values_out_of_range_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        L0(**options)
