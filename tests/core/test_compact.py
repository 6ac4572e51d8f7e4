"""Compact optimizer state gives the weights of dense state, in any loop, through any change of the masks."""

import copy

import pytest
import torch
from torch import nn

from secateur.core.compact import CompactState
from secateur.core.errors import MaskError, UsageError
from secateur.core.masks import Masks
from secateur.core.streams import stream

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, 0.9, dampening=0.3, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)


def net(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Tanh(), nn.Flatten(), nn.Linear(45, 7), nn.Tanh(), nn.Linear(7, 3)
    )
    return model.to(dtype)


def batch(number, dtype=torch.float64):
    x = torch.randn(6, 2, 5, 5, generator=stream(number, "x"), dtype=torch.float64).to(dtype)
    return x, torch.arange(6) % 3


def drawn(model, seed, density=0.3):
    masks = {n: torch.rand(m.shape, generator=stream(seed, n)) < density for n, m in Masks.dense(model).items()}
    return Masks(masks)


def moving(model):
    """Masks along a run: sparse, other zeros, denser, one tensor whole, all whole, sparse again."""
    whole, part = Masks.dense(model), drawn(model, 3)
    one_whole = Masks({**part, "4.weight": whole["4.weight"]})
    return [drawn(model, 1), drawn(model, 2), drawn(model, 2) | part, one_whole, whole, part]


def trained(model, optimizer, changes, steps=4, schedule=True):
    """Steps under each of the masks, with a changing learning rate, clipping and one step without gradients."""
    hold = changes[0].hold(model, optimizer)
    done = 0
    for masks in changes:
        hold.swap(masks)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch(done)[0]), batch(done)[1]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if done == 5:
                optimizer.zero_grad()
            if schedule:
                optimizer.param_groups[0]["lr"] *= 0.97
            optimizer.step()
            done += 1
    hold.check()
    hold.release()
    return {name: value.clone() for name, value in model.state_dict().items()}


@every
def test_the_weights_are_those_of_dense_state(name):
    """At every change of the masks: carried, dropped and fresh state."""
    one, other = net(), net()
    dense = trained(one, OPTIMIZERS[name](one.parameters()), moving(one))

    compact = trained(other, CompactState(OPTIMIZERS[name](other.parameters())), moving(other))

    for key, value in dense.items():
        torch.testing.assert_close(compact[key], value, rtol=1e-12, atol=1e-14)
    assert any(not torch.equal(value, net().state_dict()[key]) for key, value in dense.items())


@every
def test_there_is_state_for_kept_weights_only(name):
    model = net()
    masks = drawn(model, 1)
    optimizer = CompactState(OPTIMIZERS[name](model.parameters()))
    trained(model, optimizer, [masks])

    plain = net()
    dense = OPTIMIZERS[name](plain.parameters())
    trained(plain, dense, [drawn(plain, 1)])

    kept, others = masks.kept, sum(p.numel() for n, p in model.named_parameters() if n not in masks)
    kinds = sum(v.numel() for s in dense.state.values() for v in s.values() if v is not None and v.dim())
    each = kinds // sum(p.numel() for p in plain.parameters())
    held = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v is not None and v.dim())
    assert held == each * (kept + others)
    leaves = [leaf for group in optimizer.inner.param_groups for leaf in group["params"]]
    assert sum(leaf.numel() for leaf in leaves) == others


@every
def test_saved_and_loaded_it_goes_on_to_the_bit(name):
    changes = moving(net())
    whole = net()
    optimizer = CompactState(OPTIMIZERS[name](whole.parameters()))
    wanted = trained(whole, optimizer, changes[:2])
    trained(whole, optimizer, changes[1:2], schedule=False)

    again = net()
    first = CompactState(OPTIMIZERS[name](again.parameters()))
    assert all(torch.equal(v, wanted[k]) for k, v in trained(again, first, changes[:2]).items())
    saved = copy.deepcopy(first.state_dict())
    fresh = net()
    fresh.load_state_dict(again.state_dict())
    second = CompactState(OPTIMIZERS[name](fresh.parameters()))
    with changes[1].hold(fresh, second):
        second.load_state_dict(saved)
    assert (
        second.param_groups[0]["lr"]
        == first.param_groups[0]["lr"]
        != OPTIMIZERS[name](net().parameters()).defaults["lr"]
    )
    trained(fresh, second, changes[1:2], schedule=False)

    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), fresh.parameters(), strict=True))


def test_state_of_other_masks_or_of_a_dense_optimizer_is_refused():
    model = net()
    optimizer = CompactState(OPTIMIZERS["adam"](model.parameters()))
    trained(model, optimizer, [drawn(model, 1)])
    other = CompactState(OPTIMIZERS["adam"](model.parameters()))

    with drawn(model, 2).hold(model, other), pytest.raises(MaskError, match="of parameter 0 has shape"):
        other.load_state_dict(optimizer.state_dict())
    plain = net()
    dense = OPTIMIZERS["adam"](plain.parameters())
    trained(plain, dense, [drawn(plain, 2)])
    with drawn(model, 2).hold(model, other), pytest.raises(MaskError, match="dense state does not fit"):
        other.load_state_dict(dense.state_dict())


def test_without_a_hold_it_is_the_optimizer_itself():
    one, other = net(), net()
    plain, compact = OPTIMIZERS["adamw"](one.parameters()), CompactState(OPTIMIZERS["adamw"](other.parameters()))

    for model, optimizer in ((one, plain), (other, compact)):
        for number in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch(number)[0]), batch(number)[1]).backward()
            optimizer.step()

    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_schedulers_closures_and_groups():
    """Two groups with their own rates, a scheduler of torch, and a step that computes the loss itself."""

    def run(make):
        model = net()
        groups = [{"params": model[0].parameters()}, {"params": model[1:].parameters(), "lr": 0.05}]
        optimizer = make(torch.optim.SGD(groups, 0.1, 0.9))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        with drawn(model, 1).hold(model, optimizer):
            for number in range(5):

                def closure(number=number):
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(model(batch(number)[0]), batch(number)[1])
                    loss.backward()
                    return loss

                assert optimizer.step(closure) > 0
                scheduler.step()
        return model.state_dict(), [group["lr"] for group in optimizer.param_groups]

    dense, rates = run(lambda optimizer: optimizer)
    compact, same = run(CompactState)

    assert rates == same
    for key, value in dense.items():
        torch.testing.assert_close(compact[key], value, rtol=1e-12, atol=1e-14)


def test_channels_last_weights_and_bfloat16():
    def run(make):
        model = net(torch.bfloat16)
        weight = next(model.parameters())
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        optimizer = make(torch.optim.SGD(model.parameters(), 0.1, 0.9))
        with drawn(model, 1).hold(model, optimizer):
            for number in range(4):
                optimizer.zero_grad()
                x, y = batch(number, torch.bfloat16)
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        return model.state_dict()

    dense, compact = run(lambda optimizer: optimizer), run(CompactState)

    for key, value in dense.items():
        torch.testing.assert_close(compact[key].double(), value.double(), rtol=0.02, atol=1e-3)


def test_other_optimizers_and_late_parameters_are_refused():
    model = net()
    with pytest.raises(UsageError, match="Adagrad cannot have compact state: .* SGD, Adam, AdamW, RMSprop"):
        CompactState(torch.optim.Adagrad(model.parameters()))
    optimizer = CompactState(torch.optim.SGD(model[0].parameters(), 0.1))
    with pytest.raises(UsageError, match="parameters cannot be added"):
        optimizer.add_param_group({"params": list(model[4].parameters())})
