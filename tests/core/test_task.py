"""Task: derivatives of the mean loss over all examples, and a network left as it was."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false

import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from secateur.core.errors import DataError, ModelError
from secateur.core.names import aliases, parameters, plain, unwrap
from secateur.core.task import Task, examples, frozen

LOSS = nn.functional.cross_entropy


def network(dtype=torch.float64, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def normalized(seed=0):
    """A network with normalization and dropout, in training mode, its statistics already used."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 3))
        net = net.double().train()
        net[1](torch.randn(8, 4, dtype=torch.float64))
        net[0].eval()
    return net


def points(count, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=random, dtype=torch.float64), torch.randint(0, 3, (count,), generator=random)


def cut(x, y, sizes):
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def joined_gradient(net, x, y, loss=LOSS):
    twin = copy.deepcopy(net)
    loss(twin(x), y).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in twin.named_parameters()}


def assert_close(one, two, atol=1e-12):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=atol)


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


def test_parametrized_tensors_go_by_their_plain_names():
    net, (x, y) = network(), points(6)
    wrapped = copy.deepcopy(net)
    parametrizations.orthogonal(wrapped[0], "weight")
    original = wrapped[0].parametrizations.weight.original
    task = Task(wrapped, LOSS, cut(x, y, [2, 4]))

    gradients = task.gradients()

    assert gradients.keys() == dict(net.named_parameters()).keys()
    LOSS(wrapped(x), y).backward()
    torch.testing.assert_close(gradients["0.weight"], original.grad, rtol=0, atol=1e-12)
    shifted = {"0.weight": original.detach() + 1}
    with torch.no_grad():
        original.add_(1)
        expected = LOSS(wrapped(x), y).item()
        original.sub_(1)
    assert task.mean_loss(shifted) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, lambda m: torch.compile(m, backend="eager")]
)
def test_wrappers_are_looked_through(wrap):
    net, (x, y) = network(), points(6)

    assert_close(Task(wrap(net), LOSS, [(x, y)]).gradients(), joined_gradient(net, x, y))


def test_names_are_plain_and_tied_tensors_appear_once():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight

    assert list(parameters(net)) == ["0.weight", "0.bias", "1.bias"]
    assert aliases(net)["0.weight"] == ["0.weight", "1.weight"]
    assert plain("body.0.parametrizations.weight.original") == "body.0.weight" and plain("weight") == "weight"
    assert (
        unwrap(nn.DataParallel(torch.optim.swa_utils.AveragedModel(net))).state_dict().keys() == net.state_dict().keys()
    )


class Two(nn.Module):
    """Takes two inputs and answers like a transformer."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, first, second=None):
        @dataclass
        class Output:
            logits: torch.Tensor

        return Output(self.body(first) * (1 if second is None else second))


@pytest.mark.parametrize("form", ["tuple", "mapping"])
def test_tuples_and_mappings_are_unpacked_and_logits_taken(form):
    net, (x, y) = Two(), points(7)
    factor = torch.rand(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pairs = list(zip(x.split([3, 4]), factor.split([3, 4]), y.split([3, 4]), strict=True))
    data = [((a, b) if form == "tuple" else {"first": a, "second": b}, t) for a, b, t in pairs]
    task = Task(net, LOSS, data)

    expected = LOSS(net.body(x) * factor, y)
    assert task.mean_loss() == pytest.approx(expected.item(), abs=1e-12)
    expected.backward()
    assert_close(task.gradients(), {n: p.grad for n, p in net.named_parameters()})
    assert [(tuple(o.shape), n) for o, _, n in task.outputs()] == [((3, 3), 3), ((4, 3), 4)]


def test_the_number_of_examples_is_the_length_of_the_first_tensor():
    assert examples(torch.zeros(5, 2)) == examples((torch.zeros(5), torch.zeros(9))) == 5
    assert examples({"ids": torch.zeros(5, 2), "mask": torch.zeros(3)}) == 5 and examples(torch.tensor(1.0)) == 1
    for nothing in ((), {}, "text", [None]):
        with pytest.raises(DataError, match="without any tensor; pass tensors"):
            examples(nothing)


def test_hooks_see_every_batch_once_and_go_away():
    net, (x, y) = network(), points(9)
    task = Task(net, LOSS, cut(x, y, [4, 5]))

    grams = task.collect(
        {"in": net[0]}, lambda _, total, inputs, __: inputs[0].T @ inputs[0] + (0 if total is None else total)
    )

    torch.testing.assert_close(grams["in"], x.T @ x, rtol=0, atol=1e-12)
    assert not net[0]._forward_hooks


def test_a_spent_iterator_is_refused_with_the_cure():
    x, y = points(4)

    for data in (iter([(x, y)]), (batch for batch in [(x, y)]), zip([x], [y], strict=True)):
        with pytest.raises(DataError, match=r"iterator that can be read only once.*`list\(batches\)`"):
            Task(network(), LOSS, data).gradients()


@pytest.mark.parametrize("data", [[], [(torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, dtype=torch.long))]])
def test_empty_data_is_refused(data):
    for act in (Task.mean_loss, Task.gradients):
        with pytest.raises(DataError, match="holds no example"):
            act(Task(network(), LOSS, data))


class Loader:
    """Batches that can be read again and again."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_a_batch_that_is_no_pair_is_refused():
    x, y = points(4)

    assert Task(network(), LOSS, Loader([x, y])).mean_loss() == Task(network(), LOSS, [(x, y)]).mean_loss()
    with pytest.raises(DataError, match=r"pair \(inputs, target\), this one is tuple of length 3"):
        Task(network(), LOSS, Loader((x, y, y))).mean_loss()
    with pytest.raises(DataError, match="this one is Tensor"):
        Task(network(), LOSS, Loader(x)).mean_loss()


def test_a_loss_that_is_no_finite_number_is_refused():
    x, y = points(4)

    with pytest.raises(ModelError, match=r"loss has shape \(4,\); it must be one number"):
        Task(network(), lambda o, t: LOSS(o, t, reduction="none"), [(x, y)]).gradients()
    with pytest.raises(DataError, match="the loss is nan.*secateur doctor"):
        Task(network(), LOSS, [(x * float("nan"), y)]).gradients()


def test_a_network_that_answers_differently_each_time_is_noticed():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.calls = network(), 0

        def forward(self, x):
            self.calls += 1
            return self.body(x) * self.calls

    with pytest.raises(DataError, match="two passes over the same data gave losses"):
        Task(Noisy(), LOSS, [points(4)]).check_deterministic()
