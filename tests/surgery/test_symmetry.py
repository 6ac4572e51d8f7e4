"""Units that can change places: the function stays, on every small network, and permuted copies come back."""

import pytest
import torch
from torch import nn

from secateur import nets
from secateur.core.streams import stream
from secateur.core.task import call
from secateur.linalg.alignment import Exchange, permute, tensors_of
from secateur.surgery import symmetry
from secateur.surgery.analysis import analyse
from secateur.surgery.proof import run
from secateur.surgery.symmetry import align, symmetries
from secateur.testing.cases import CASES, HIDDEN, reorder


def first(task):
    return next(iter(task.data))[0]


def orders_of(groups, seed=0):
    return {g.name: torch.randperm(len(g), generator=stream(seed, "test", g.name)) for g in groups}


@pytest.mark.parametrize("name", CASES)
def test_all_groups_permuted_at_once_the_network_computes_the_same(name):
    task = CASES[name]()
    groups = symmetries(task.model, first(task))
    assert groups
    state = {n: t.detach().clone() for n, t in tensors_of(task.model).items()}
    moved = permute(state, groups, orders_of(groups))
    assert any(not torch.equal(moved[n], state[n]) for n in state)
    with torch.no_grad():
        expected, found = call(task.model, first(task)), call(task.model, first(task), moved)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-13)
    assert all(torch.equal(t, state[n]) for n, t in tensors_of(task.model).items())


@pytest.mark.parametrize("name", CASES)
def test_the_places_of_hidden_channels_are_those_written_down_by_hand(name):
    task, hidden = CASES[name](), HIDDEN[name]
    found = next(
        g for g in symmetries(task.model, first(task)) if {p.tensor for p in g.places} >= {hidden.places[0][0]}
        and len(g) == hidden.width
    )  # fmt: skip
    order = torch.randperm(hidden.width, generator=stream(1, "test"))
    state = dict(task.model.state_dict())
    expected = dict(state)
    for place, dim, blocks in hidden.places:
        expected[place] = reorder(expected[place], dim, blocks, order)
    moved = permute(state, [found], {found.name: order})
    assert all(torch.equal(moved[n], expected[n]) for n in state)


@pytest.mark.parametrize("name", CASES)
def test_a_permuted_copy_comes_back(name):
    task = CASES[name]()
    groups = symmetries(task.model, first(task))
    state = {n: t.detach().clone() for n, t in tensors_of(task.model).items()}
    found = align(task.model, permute(state, groups, orders_of(groups)), first(task), groups)
    assert found.objective[-1] > found.objective[0]
    if name == "tied":  # the stream and the hidden layer wait for each other: the ascent ends in a local optimum
        with torch.no_grad():
            same = torch.allclose(call(task.model, first(task), found.state), call(task.model, first(task)), atol=1e-13)
        assert same
    else:
        assert all(torch.equal(found.state[n], state[n]) for n in state)


@pytest.mark.parametrize("name, options, shape", [
    ("lenet5", {"widths": (4, 6, 20)}, (1, 28, 28)),
    ("resnet_cifar", {"depth": 8}, (3, 32, 32)),
    ("mlp", {}, (1, 12, 12)),
])  # fmt: skip
def test_a_permuted_copy_of_ordinary_networks_comes_back(name, options, shape):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nets.build(name, shape, 10, **options).double().eval()
    x = torch.randn(2, *shape, dtype=torch.float64, generator=stream(0, "x"))
    groups = symmetries(net, x)
    state = {n: t.detach().clone() for n, t in tensors_of(net).items()}
    moved = permute(state, groups, orders_of(groups))
    with torch.no_grad():
        assert torch.allclose(call(net, x, moved), net(x), rtol=1e-10, atol=1e-11)
    found = align(net, moved, x, groups)
    assert all(torch.equal(found.state[n], state[n]) for n in state)


def test_channels_that_a_group_norm_binds_are_left_out_or_move_in_whole_groups():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm, self.head = nn.Conv2d(2, 8, 3), nn.GroupNorm(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(torch.relu(self.norm(self.stem(x))).mean((2, 3)))

    net = Net().double().eval()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64, generator=stream(0, "x"))
    assert analyse(net, x).groups
    groups = symmetries(net, x)
    state = dict(tensors_of(net))
    with torch.no_grad():
        moved = permute(state, groups, orders_of(groups))
        assert torch.allclose(call(net, x, moved), net(x), rtol=1e-12, atol=1e-13)
        swapped = {n: t.detach().clone() for n, t in state.items()}
        order = torch.tensor([0, 2, 1, 3, 4, 5, 6, 7])
        for name in ("stem.weight", "stem.bias", "norm.weight", "norm.bias"):
            swapped[name] = swapped[name][order]
        swapped["head.weight"] = swapped["head.weight"][:, order]
        assert not torch.allclose(call(net, x, swapped), net(x), rtol=1e-6)


def test_a_unit_that_a_constant_singles_out_does_not_move():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.two(torch.sin(self.one(x)) * torch.arange(1.0, 6.0))

    net = Net()
    x = torch.randn(2, 4, generator=stream(0, "x"))
    assert not symmetries(net, x)


def test_a_group_that_leaves_a_tensor_out_does_not_pass_the_proof():
    task = CASES["conv_bn"]()
    x = first(task)
    whole = next(g for g in symmetries(task.model, x) if g.name == "first.weight")
    order = torch.arange(len(whole)).roll(1)
    expected = run(task.model, x, torch.float64)
    assert symmetry._same(task.model, x, expected, whole, order) < 1e-12
    for left_out in whole.places:
        part = Exchange("part", tuple(p for p in whole.places if p is not left_out))
        assert symmetry._same(task.model, x, expected, part, order) > 1e-4, left_out.tensor
