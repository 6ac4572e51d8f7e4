"""Task: derivatives of the mean loss over all examples, and a network left as it was."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false

import copy
import importlib.util
import pathlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from secateur.core.errors import ModelError
from secateur.core.task import Task, frozen

_spec = importlib.util.spec_from_file_location("task_kit", pathlib.Path(__file__).with_name("task_kit.py"))
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)
LOSS, network, points, cut = kit.LOSS, kit.network, kit.points, kit.cut
joined_gradient, assert_close = kit.joined_gradient, kit.assert_close


def normalized(seed=0):
    """A network with normalization and dropout, in training mode, its statistics already used."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 3))
        net = net.double().train()
        net[1](torch.randn(8, 4, dtype=torch.float64))
        net[0].eval()
    return net


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(any))
def test_gradients_and_loss_are_those_of_the_joined_batch_however_it_is_cut(sizes):
    net, (x, y) = network(), points(sum(sizes))
    task = Task(net, LOSS, cut(x, y, sizes))

    assert_close(task.gradients(), joined_gradient(net, x, y))
    assert task.mean_loss() == pytest.approx(LOSS(net(x), y).item(), abs=1e-12)


def test_gradients_elsewhere_are_those_of_a_network_with_these_values():
    net, other, (x, y) = network(), network(seed=1), points(10)
    at = dict(other.named_parameters())
    task = Task(net, LOSS, cut(x, y, [3, 7]))

    assert_close(task.gradients(at), joined_gradient(other, x, y))
    assert task.mean_loss(at) == pytest.approx(LOSS(other(x), y).item(), abs=1e-12)
    mixed = copy.deepcopy(net)
    mixed[0].load_state_dict(other[0].state_dict())
    assert_close(task.gradients({n: p for n, p in at.items() if n.startswith("0.")}), joined_gradient(mixed, x, y))


class Summed(nn.Module):
    """Autograd hands out one tensor as the gradient of both ``a`` and ``b``, and an expanded one for ``c``."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.unused = (
            nn.Parameter(torch.full((3,), v, dtype=torch.float64)) for v in (1, 2, 3, 4)
        )

    def forward(self, x):
        return x * (self.a + self.b) + self.c.sum()


@pytest.mark.parametrize("sizes", [[8], [3, 5], [1, 6, 1]])
def test_gradients_that_share_memory_in_autograd_are_not_added_twice(sizes):
    net, (x, y) = Summed(), points(8)

    gradients = Task(net, LOSS, cut(x, y, sizes)).gradients()

    assert_close(gradients, joined_gradient(net, x, y))
    assert gradients["unused"].eq(0).all(), "a tensor the loss does not depend on has gradient zero"
    gradients["a"].zero_()
    assert gradients["b"].ne(0).any(), "each gradient has memory of its own"


def test_many_bf16_batches_add_up_without_losing_the_small_ones():
    net, (x, y) = network(torch.bfloat16), points(600)
    x = x.bfloat16()

    gradients = Task(net, lambda o, t: LOSS(o.float(), t), cut(x, y, [1] * 600)).gradients()

    exact = joined_gradient(copy.deepcopy(net).double(), x.double(), y)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.double(), exact[name], rtol=0.02, atol=2e-3)


def test_nothing_about_the_network_changes():
    net, (x, y) = normalized(), points(9)
    net(x).sum().backward()
    state, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    gradients = {n: (p.grad, p.grad.clone()) for n, p in net.named_parameters()}
    random = torch.get_rng_state()
    task = Task(net, LOSS, cut(x, y, [4, 5]))
    direction = {n: torch.ones_like(p) for n, p in net.named_parameters()}

    for statistics in ("running", "fresh", "auto"):
        task.gradients(statistics=statistics)
        task.loss_at((x, y), statistics=statistics)
    task.mean_loss()
    task.taylor(direction)
    task.collect({"first": net[0]}, lambda name, total, inputs, output: None)
    list(task.outputs())
    task.check_deterministic()

    assert all(torch.equal(net.state_dict()[name], value) for name, value in state.items())
    assert [m.training for m in net.modules()] == modes
    assert all(p.grad is gradients[n][0] and torch.equal(p.grad, gradients[n][1]) for n, p in net.named_parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks for m in net.modules())


def test_modes_come_back_even_after_an_error():
    net = normalized()
    modes = [m.training for m in net.modules()]

    with pytest.raises(ZeroDivisionError), frozen(net, "fresh"):
        assert not net[2].training and net[1].training
        raise ZeroDivisionError

    assert [m.training for m in net.modules()] == modes


@pytest.mark.parametrize("statistics", ["running", "fresh", "auto"])
def test_statistics_are_the_layers_own_or_those_of_the_batch(statistics):
    """Layer 1 has been trained and layer 3 has not: "auto" takes fresh statistics for layer 3 alone."""
    net, (x, y) = normalized(), points(9)
    twin = copy.deepcopy(net).eval()
    twin[1].train(statistics == "fresh")
    twin[3].train(statistics != "running")

    gradients = Task(net, LOSS, cut(x, y, [4, 5])).gradients(statistics=statistics)

    parts = [joined_gradient(twin, *batch) for batch in cut(x, y, [4, 5])]
    expected = {n: (4 * parts[0][n] + 5 * parts[1][n]) / 9 for n in parts[0]}
    assert_close(gradients, expected)


def flat_hessian(net, x, y):
    """Gradient and dense Hessian of the loss over all parameters in one vector."""
    named = list(net.named_parameters())

    def loss(vector):
        pieces = vector.split([p.numel() for _, p in named])
        values = {n: piece.reshape(p.shape) for (n, p), piece in zip(named, pieces, strict=True)}
        return LOSS(functional_call(net, values, (x,)), y)

    vector = torch.cat([p.detach().reshape(-1) for _, p in named])
    slope = torch.cat([g.reshape(-1) for g in joined_gradient(net, x, y).values()])
    return slope, torch.autograd.functional.hessian(loss, vector)


@pytest.mark.parametrize("chosen", [["0.weight", "0.bias", "2.weight", "2.bias"], ["2.weight"]])
def test_the_forecast_is_the_dense_hessian(chosen):
    net, (x, y) = network(), points(11)
    random = torch.Generator().manual_seed(3)
    direction = {
        n: torch.randn(p.shape, generator=random, dtype=p.dtype) for n, p in net.named_parameters() if n in chosen
    }
    whole = [direction.get(n, torch.zeros_like(p)).reshape(-1) for n, p in net.named_parameters()]
    d = torch.cat(whole)
    slope, hessian = flat_hessian(net, x, y)

    first, second = Task(net, LOSS, cut(x, y, [2, 6, 3])).taylor(direction)

    assert first == pytest.approx((slope @ d).item(), abs=1e-12)
    assert second == pytest.approx((d @ hessian @ d / 2).item(), abs=1e-12)


def test_the_forecast_of_a_linear_loss_has_no_second_order():
    net = nn.Linear(3, 1, dtype=torch.float64)
    x, y = points(4)
    task = Task(net, lambda output, _: output.mean(), [(x, y)])

    first, second = task.taylor({"weight": torch.ones(1, 3, dtype=torch.float64)})

    assert first == pytest.approx(x.sum(1).mean().item(), abs=1e-12) and second == 0


class Once(torch.autograd.Function):
    """A square whose author gave a first derivative only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


def test_an_operator_without_a_second_derivative_is_named():
    """Its part of the curvature must not silently count as zero."""
    task = Task(nn.Linear(3, 8, dtype=torch.float64), lambda output, _: Once.apply(output).square().mean(), [points(4)])

    with pytest.raises(ModelError, match="cannot be differentiated twice: .*once_differentiable"):
        task.taylor({"weight": torch.ones(8, 3, dtype=torch.float64)})


def test_attention_has_a_curvature():
    """The fused kernel has no second derivative; the forecast goes through the plain one, by itself."""

    def attend(x):
        x = x.reshape(1, 1, *x.shape)
        return nn.functional.scaled_dot_product_attention(x, x, x).square().mean()

    task = Task(nn.Linear(3, 8, dtype=torch.float64), lambda output, _: attend(output), [points(4)])
    direction = {"weight": torch.ones(8, 3, dtype=torch.float64)}
    step = 1e-4
    moved = [
        task.mean_loss({"weight": task.params()["weight"].detach() + s * direction["weight"]}) for s in (-step, 0, step)
    ]

    slope, curvature = task.taylor(direction)

    assert slope == pytest.approx((moved[2] - moved[0]) / (2 * step), rel=1e-5)
    assert curvature == pytest.approx((moved[2] - 2 * moved[1] + moved[0]) / (2 * step**2), rel=1e-4)


def test_frozen_parameters_have_gradients_here_and_stay_frozen():
    net, (x, y) = network(), points(6)
    expected = joined_gradient(net, x, y)
    net[0].weight.requires_grad_(False)

    assert_close(Task(net, LOSS, [(x, y)]).gradients(), expected)
    assert not net[0].weight.requires_grad and net[0].weight.grad is None
