"""Task: networks, data and losses of every form are understood, or refused with the cure."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false

import copy
import importlib.util
import pathlib
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from secateur.core.errors import DataError, ModelError
from secateur.core.names import aliases, owners, parameters, plain, unwrap
from secateur.core.task import Task, examples

_spec = importlib.util.spec_from_file_location("task_kit", pathlib.Path(__file__).with_name("task_kit.py"))
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)
LOSS, network, points, cut = kit.LOSS, kit.network, kit.points, kit.cut
joined_gradient, assert_close = kit.joined_gradient, kit.assert_close


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


class Twice(nn.Module):
    """One module under two names, called twice, its weight tied to a third."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.b, self.again = self.a, self.norm
        self.c = nn.Linear(4, 4, bias=False)
        self.c.weight = self.a.weight

    def forward(self, x):
        return self.c(self.again(self.b(torch.tanh(self.norm(self.a(x))))))


def test_a_module_under_two_names_is_replaced_in_every_place_and_keeps_its_parameters():
    net, x, y = Twice().double(), torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    task = Task(net, nn.functional.mse_loss, [(x, y)])
    held = {name: tuple(map(id, module.parameters(recurse=False))) for name, module in net.named_modules()}
    at = {name: p.detach() + 0.1 for name, p in task.params().items()}
    moved = copy.deepcopy(net).eval()
    with torch.no_grad():
        for p in moved.parameters():
            p += 0.1
    loss = nn.functional.mse_loss(moved(x), y)
    truth = dict(zip(at, torch.autograd.grad(loss, list(moved.parameters())), strict=True))
    for statistics in ("running", "fresh"):
        task.gradients(statistics=statistics)
    for name, slope in task.gradients(at).items():
        torch.testing.assert_close(slope, truth[name], rtol=1e-12, atol=1e-14)
    assert task.mean_loss(at) == pytest.approx(loss.item(), rel=1e-14)
    assert held == {name: tuple(map(id, module.parameters(recurse=False))) for name, module in net.named_modules()}
    assert owners(net)["a.weight"] == (net.a, net.c)
