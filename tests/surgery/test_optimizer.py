"""What hangs on the parameters follows them: optimizer state, hooks, ties, gradients, masks and averaged copies."""

# Modules have their parts by attribute and number, which pyright takes for tensors.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

import copy

import pytest
import torch
from tests.surgery.proofs import snapshot, unchanged
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from secateur.core.errors import SecateurError
from secateur.core.masks import Masks
from secateur.surgery import analyse, shrink

OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, amsgrad=True),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True),
    "adafactor": lambda groups: torch.optim.Adafactor(groups),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, momentum=0.5, centered=True),
}


def network(seed=0):
    """Two convolutions and two linear layers, with statistics and a frozen bias."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 16, 10), nn.ReLU(), nn.Linear(10, 4),
    )  # fmt: skip
    model[3].bias.requires_grad_(False)
    return model


def grouped(model):
    """Weights with decay, vectors without, in the order in which a user might write them."""
    live = [p for p in model.parameters() if p.requires_grad]
    vectors, weights = [p for p in live if p.dim() < 2], [p for p in live if p.dim() > 1]
    return [
        {"params": vectors, "weight_decay": 0.0, "lr": 1e-3, "tag": "vectors"},
        {"params": weights, "weight_decay": 0.1, "lr": 1e-2, "tag": "weights"},
    ]


def steps(model, optimizer, count=3):
    for i in range(count):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(9))
REMOVE = {"0.weight": [1, 6], "3.weight": [0, 2], "6.weight": [3, 4, 9]}
"""Of 8 channels, 6 channels (16 columns each of the linear layer behind) and 10 features."""
CHANNELS, MAPS, FEATURES = [0, 2, 3, 4, 5, 7], [1, 3, 4, 5], [0, 1, 2, 5, 6, 7, 8]
COLUMNS = [16 * c + i for c in MAPS for i in range(16)]
STAYS = {
    "0.weight": (CHANNELS, None), "0.bias": (CHANNELS,), "1.weight": (CHANNELS,), "1.bias": (CHANNELS,),
    "3.weight": (MAPS, CHANNELS), "3.bias": (MAPS,), "6.weight": (FEATURES, COLUMNS), "6.bias": (FEATURES,),
    "8.weight": (None, FEATURES), "8.bias": (None,),
}  # fmt: skip
"""What stays of each dimension, written down by hand."""


def cut(tensor, places):
    """Slices by plain indexing."""
    for d, index in enumerate(places):
        if index is not None:
            tensor = tensor.index_select(d, torch.tensor(index))
    return tensor


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_that_of_the_slices_that_stay(name):
    model = network()
    optimizer = OPTIMIZERS[name](grouped(model))
    steps(model, optimizer)
    names = {p: n for n, p in model.named_parameters()}
    before = {names[p]: copy.deepcopy(state) for p, state in optimizer.state.items()}
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    order = [[names[p] for p in g["params"]] for g in optimizer.param_groups]

    done = shrink(model, EXAMPLE, REMOVE, optimizer=optimizer)

    assert not done.notes and not done.rewritten
    now = {p: n for n, p in model.named_parameters()}
    assert [[now[p] for p in g["params"]] for g in optimizer.param_groups] == order
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == options
    held = {p for g in optimizer.param_groups for p in g["params"]}
    assert held == {p for p in model.parameters() if p.requires_grad} and set(optimizer.state) <= held
    for parameter, state in optimizer.state.items():
        old = before[now[parameter]]
        assert state.keys() == old.keys()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), expected(old[key], key, STAYS[now[parameter]])), (parameter, key)
    assert set(before) == {now[p] for p in optimizer.state}
    steps(model, optimizer, 1)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def expected(old, key, places):
    """The hand-made slice of a state: Adafactor keeps the mean over rows or columns, whose dimension has one slice."""
    if not isinstance(old, torch.Tensor) or old.numel() == 1:
        return torch.as_tensor(old)
    return cut(old, [index if old.shape[d] > 1 else None for d, index in enumerate(places)])


def test_the_next_step_is_that_of_an_optimizer_with_the_same_numbers():
    model = network()
    optimizer = OPTIMIZERS["adamw"](grouped(model))
    steps(model, optimizer)
    shrink(model, EXAMPLE, REMOVE, optimizer=optimizer)
    twin = copy.deepcopy(model)
    other = OPTIMIZERS["adamw"](grouped(twin))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    steps(model, optimizer, 2)
    steps(twin, other, 2)

    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_gradients_frozen_parameters_and_weights_are_slices():
    model = network()
    model(EXAMPLE).sum().backward()
    before = {n: (p.detach().clone(), None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()}

    shrink(model, EXAMPLE, REMOVE)

    assert not model[3].bias.requires_grad and model[3].bias.grad is None
    for name, p in model.named_parameters():
        weight, grad = before[name]
        assert torch.equal(p, cut(weight, STAYS[name])) and p.is_contiguous()
        assert grad is None or torch.equal(p.grad, cut(grad, STAYS[name]))


def test_hooks_still_fire():
    model = network()
    seen = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(("forward", out.shape[1])))
    model[3].register_forward_pre_hook(lambda module, args: seen.append(("before", args[0].shape[1])))
    model[3].register_full_backward_hook(lambda module, grad, out: seen.append(("backward", out[0].shape[1])))
    model[6].weight.register_hook(lambda grad: seen.append(("gradient", *grad.shape)))
    model[6].weight.register_post_accumulate_grad_hook(lambda p: seen.append(("after", *p.grad.shape)))
    model.mark = "mine"
    model[6].weight.tag = "mine"

    shrink(model, EXAMPLE, REMOVE)
    seen.clear()
    model(EXAMPLE).sum().backward()

    assert seen == [("forward", 6), ("before", 6), ("gradient", 7, 64), ("after", 7, 64), ("backward", 4)]
    assert model.mark == model[6].weight.tag == "mine"


class Tied(nn.Module):
    """An embedding that is also the head, and one layer used twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.layer = nn.Linear(12, 12)
        self.again = self.layer
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        h = self.embed(x)
        h = h + torch.relu(self.layer(h))
        return self.head(h + torch.relu(self.again(h)))


def test_ties_hold_in_the_network_and_in_the_optimizer():
    torch.manual_seed(0)
    model, tokens = Tied(), torch.randint(0, 20, (2, 5))
    optimizer = torch.optim.AdamW(model.parameters())
    model(tokens).square().sum().backward()
    optimizer.step()
    (group,) = [g for g in analyse(model, tokens).groups if ("embed.weight", 1) in g.tensors]
    assert set(group.tensors) == {
        ("embed.weight", 1), ("head.weight", 1), ("layer.weight", 0), ("layer.weight", 1), ("layer.bias", 0),
        ("again.weight", 0), ("again.weight", 1), ("again.bias", 0),
    }  # fmt: skip
    assert not group.inexact and len(group) == 12

    shrink(model, tokens, {group.name: [0, 5]}, optimizer=optimizer)

    assert model.head.weight is model.embed.weight and model.again is model.layer
    assert model.head.weight.shape == (20, 10) and model.layer.weight.shape == (10, 10)
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(model.parameters()) == set(optimizer.state)
    optimizer.step()
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("rewriting", [True, False])
def test_an_optimizer_of_another_network_is_refused_and_nothing_changes(rewriting):
    model, other = network(), network()
    optimizer = OPTIMIZERS["adamw"](grouped(other))
    steps(other, optimizer)
    before, state, foreign = snapshot(model), copy.deepcopy(optimizer.state_dict()), snapshot(other)

    with pytest.raises(SecateurError, match="optimizer"):
        shrink(model, EXAMPLE, REMOVE, optimizer=optimizer, rewriting=rewriting)

    assert unchanged(before, model) and unchanged(foreign, other)
    now = optimizer.state_dict()
    assert now["param_groups"] == state["param_groups"]
    assert all(torch.equal(now["state"][i][k], v) for i, s in state["state"].items() for k, v in s.items())


def test_averaged_copies_shrink_alike():
    model = network()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    steps(model, optimizer)
    average.update_parameters(model)
    before = {n: t.clone() for n, t in average.module.named_parameters()}

    shrink(model, EXAMPLE, REMOVE, optimizer=optimizer, also=[average])

    for name, tensor in average.module.named_parameters():
        assert torch.equal(tensor, cut(before[name], STAYS[name]))
    average.update_parameters(model)
    assert average(EXAMPLE).shape == (2, 4)


def test_a_copy_of_another_network_is_refused_and_nothing_changes():
    model, stranger = network(), nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    before, foreign = snapshot(model), snapshot(stranger)

    with pytest.raises(SecateurError):
        shrink(model, EXAMPLE, REMOVE, also=[stranger])

    assert unchanged(before, model) and unchanged(foreign, stranger)


def test_masks_are_sliced():
    model = network()
    made = torch.Generator().manual_seed(0)
    masks = Masks({n: torch.rand(p.shape, generator=made) > 0.5 for n, p in model.named_parameters() if p.dim() > 1})
    before = {name: mask.clone() for name, mask in masks.items()}

    done = shrink(model, EXAMPLE, REMOVE)

    assert {n: tuple(m.shape) for n, m in done.masks(masks).items()} == {
        n: tuple(p.shape) for n, p in model.named_parameters() if p.dim() > 1
    }
    assert all(torch.equal(mask, cut(before[name], STAYS[name])) for name, mask in done.masks(masks).items())
    assert all(torch.equal(masks[name], mask) for name, mask in before.items())
