"""Network slimming: the gradient is that of the penalty, and training with the rule is training with the penalty."""

import copy

import pytest
import torch
from torch import nn

import secateur
from secateur.core.errors import ModelError, UsageError
from secateur.core.hold import Hold
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.run import Run
from secateur.engine.binding import table_of, value_of
from secateur.rules.slimming import Slimming
from secateur.testing.cases import conv_bn, depthwise, residual_bn, tanh_mlp
from secateur.testing.rules_contract import check_rule

NETWORKS = ["conv_bn", "residual_bn", "depthwise"]


def run_of(net):
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    return Run(net, optimizer, Hold(Masks.dense(net), net, optimizer, hooks=False), 10, 5)


def scales(net):
    return {name: m.weight for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}


def with_zeros(task):
    """The network with scales of both signs and one of 0 in each norm."""
    with torch.no_grad():
        for gamma in scales(task.model).values():
            gamma[::2] *= -1
            gamma[0] = 0.0
    return task.model


def penalised(net, strength):
    """The loss with the penalty written out, for a network in training mode."""
    return lambda out, y: CrossEntropy()(out, y) + strength * sum(g.abs().sum() for g in scales(net).values())


@pytest.mark.parametrize("build", [conv_bn, residual_bn, depthwise])
def test_gradient_is_strength_times_sign(build):
    """Card test (d): beside the loss's own gradient exactly λ sign(γ), 0 at 0; all else keeps its gradient."""
    net, (x, y) = with_zeros(build()), next(iter(build().data))
    run = run_of(net)
    CrossEntropy()(net(x), y).backward()
    before = {name: p.grad.clone() for name, p in net.named_parameters()}

    Slimming(0.25).before_step(run)

    own = {f"{name}.weight" for name in scales(net)}
    assert own and own < set(before)
    for name, p in net.named_parameters():
        wanted = 0.25 * torch.where(p > 0, 1.0, torch.where(p < 0, -1.0, 0.0)) if name in own else torch.zeros_like(p)
        assert torch.equal(p.grad, before[name] + wanted), name
    for gamma in scales(net).values():
        assert gamma[0] == 0 and bool((gamma < 0).any() and (gamma > 0).any())


def test_gradient_is_autograd_s_of_the_penalty():
    """The same from the penalty written into the loss; a scale that no loss reaches has the penalty's alone."""
    net, (x, y) = with_zeros(conv_bn()), next(iter(conv_bn().data))
    twin = copy.deepcopy(net)
    penalised(twin, 0.3)(twin(x), y).backward()
    CrossEntropy()(net(x), y).backward()
    net.spare = spare = nn.BatchNorm2d(2).double()

    Slimming(0.3).before_step(run_of(net))

    for (name, p), other in zip(net.named_parameters(), twin.parameters(), strict=False):
        torch.testing.assert_close(p.grad, other.grad, rtol=0, atol=1e-14, msg=name)
    assert spare.weight.grad is not None and spare.weight.grad.tolist() == [0.3, 0.3]
    assert spare.bias.grad is None


def test_training_with_the_rule_is_training_with_the_penalty():
    """Twelve steps with momentum end at the same weights as with the penalty in the loss, and not as without."""
    ends = []
    for way in ("rule", "loss", "plain"):
        task = residual_bn(batches=(8, 6))
        rules = [Slimming(0.05)] if way == "rule" else []
        loss = penalised(task.model, 0.05) if way == "loss" else None
        secateur.train(task.model, list(task.data), rules=rules, loss=loss, epochs=6, lr=0.05, momentum=0.9)
        ends.append(task.model.state_dict())

    rule, loss, plain = ends
    assert all(torch.allclose(rule[name], loss[name], rtol=0, atol=1e-12) for name in rule)
    assert max(float((rule[name] - plain[name]).abs().max()) for name in rule) > 1e-3


def test_shared_scales_count_once_and_frozen_ones_stay_as_they_are():
    one, other, still = (nn.BatchNorm2d(3).double() for _ in range(3))
    other.weight = one.weight
    still.weight.requires_grad_(False)

    Slimming(0.5).before_step(run_of(nn.Sequential(one, other, still, nn.Conv2d(3, 2, 1).double())))

    assert one.weight.grad is not None and torch.equal(one.weight.grad, torch.full((3,), 0.5).double())
    assert still.weight.grad is None


@pytest.mark.parametrize("net", [
    tanh_mlp().model,
    nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, affine=False)),
    nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3).requires_grad_(False)),
    nn.Sequential(nn.Conv2d(2, 3, 1), nn.GroupNorm(1, 3)),
], ids=["none", "without scales", "frozen", "group norm"])  # fmt: skip
def test_networks_without_scales_are_refused(net):
    with pytest.raises(ModelError, match="slimming: Sequential has no BatchNorm with a trained scale"):
        Slimming().begin(run_of(net))


@pytest.mark.parametrize("strength", [-1e-4, float("nan"), float("inf")])
def test_bad_strengths_are_refused(strength):
    with pytest.raises(UsageError, match="strength is .* it must be at least 0, 1e-4 is usual"):
        Slimming(strength)


def test_contract_and_recipe():
    """A strength that matters in a short run keeps the contract of all rules; a recipe holds the rule."""
    check_rule(Slimming(0.1), NETWORKS)

    assert value_of(Slimming, table_of(Slimming(0.02)), "rule") == Slimming(0.02)
