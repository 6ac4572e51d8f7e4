"""Hold: the trajectory of exact masking, for any optimizer, in any loop.

Two independent routes stand beside it. `Gated` trains a network whose weights are computed as
`original * mask` inside the forward pass (parametrizations); `by_hand` masks gradients and weights
around the step, and clears optimizer state by the names of its entries.
"""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false

import copy
import importlib.util
import pathlib

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, parametrize

from secateur.core.hold import Hold

_spec = importlib.util.spec_from_file_location("hold_kit", pathlib.Path(__file__).with_name("hold_kit.py"))
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)
OPTIMIZERS, network, batches, half = kit.OPTIMIZERS, kit.network, kit.batches, kit.half
loss_of, backward, assert_zeros = kit.loss_of, kit.backward, kit.assert_zeros
STATE = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg", "sum")
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def assert_clean(model, optimizer, gone):
    """Every state tensor in the shape of its parameter is zero where ``gone`` says, and alive elsewhere."""
    weights, seen = dict(model.named_parameters()), 0
    for name, where in gone.items():
        for key, value in optimizer.state[weights[name]].items():
            if key in STATE and value is not None:
                seen += 1
                assert value[where].eq(0).all(), (name, key)
                assert value[~where].ne(0).any(), (name, key)
    assert seen or isinstance(optimizer, torch.optim.SGD)


class Gate(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, weight):
        return weight * self.mask


class Gated:
    """The same network with weights computed as ``original * mask``: an independent implementation."""

    def __init__(self, model, masks):
        self.model, self.names = copy.deepcopy(model), [n for n, _ in model.named_parameters()]
        self.masks = masks
        for name, mask in masks.items():
            owner, _, leaf = name.rpartition(".")
            parametrize.register_parametrization(self.model.get_submodule(owner), leaf, Gate(mask.float()))

    def parameters(self):
        """In the order of the plain network: norms add up in it, and rounding depends on it."""
        own = dict(self.model.named_parameters())
        for name in self.names:
            owner, _, leaf = name.rpartition(".")
            yield own[f"{owner}.parametrizations.{leaf}.original" if name in self.masks else name]

    def weight(self, name):
        owner, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(owner), leaf)

    def assert_equal(self, model):
        for name, p in model.named_parameters():
            assert torch.equal(p, self.weight(name)), name


def by_hand(model, optimizer, masks):
    """A step function that masks gradients, steps and masks weights, all by assignment."""
    weights = dict(model.named_parameters())

    def step(clip=None):
        for name, mask in masks.items():
            weights[name].grad[~mask] = 0
        norm = clip_grad_norm_(model.parameters(), clip) if clip else None
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items():
                weights[name][~mask] = 0
        return norm

    with torch.no_grad():
        for name, mask in masks.items():
            weights[name][~mask] = 0
            for key, value in optimizer.state[weights[name]].items():
                if key in STATE and value is not None:
                    value[~mask] = 0
    return step


@every_optimizer
@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_trajectory_is_that_of_gated_weights_bit_for_bit(name, clip):
    model = network()
    masks = half(model)
    gated = Gated(model, masks)
    optimizer, other = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](list(gated.parameters()))

    with masks.hold(model, optimizer) as hold:
        for x, y in batches(12):
            backward(model, x, y)
            backward(gated.model, x, y)
            if clip:
                norms = [clip_grad_norm_(list(net.parameters()), clip) for net in (model, gated)]
                assert torch.equal(norms[0], norms[1]) and norms[0] > clip
            optimizer.step()
            other.step()
            assert_zeros(model, masks)
            gated.assert_equal(model)
        hold.check()


@every_optimizer
def test_a_warm_optimizer_forgets_the_pruned_and_goes_on_as_by_hand(name):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    for x, y in batches(3, seed=7):
        backward(model, x, y)
        optimizer.step()
    twin = copy.deepcopy(model)
    other = OPTIMIZERS[name](twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    masks = half(model)

    hold = masks.hold(model, optimizer)
    step = by_hand(twin, other, masks)

    assert_clean(model, optimizer, {n: ~m for n, m in masks.items()})
    for x, y in batches(6):
        backward(model, x, y)
        backward(twin, x, y)
        norm = clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        assert torch.equal(norm, step(clip=0.1))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
        assert_zeros(model, masks)
    hold.release()


@every_optimizer
def test_a_swap_clears_the_state_of_dropped_and_of_regrown_weights(name):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    old, new = half(model, 1), half(model, 2)
    with old.hold(model, optimizer) as hold:
        for x, y in batches(4):
            backward(model, x, y)
            optimizer.step()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}

        hold.swap(new)

        weights = dict(model.named_parameters())
        for n in new:
            assert torch.equal(weights[n], torch.where(old[n] & new[n], before[n], 0.0)), (
                "regrown weights start at zero"
            )
            assert weights[n].grad[~new[n]].eq(0).all()
        assert_clean(model, optimizer, {n: ~new[n] | (new[n] & ~old[n]) for n in new})
        for x, y in batches(3, seed=5):
            backward(model, x, y)
            optimizer.step()
        assert_zeros(model, new)
        assert hold.masks == new


class Mixing(torch.optim.Optimizer):
    """An optimizer that moves every weight of a tensor by the gradients of all: masked gradients do not suffice."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            buffer.mul_(0.9).add_(p.grad + p.grad.mean() + 0.01)
            p.sub_(buffer, alpha=0.1)


@pytest.mark.parametrize("hooks", [True, False])
def test_optimizers_that_mix_coordinates_leave_zeros_and_no_state_behind(hooks):
    model = network()
    optimizer = Mixing(model.parameters(), {})
    old, new = half(model, 1), half(model, 2)

    with Hold(old, model, optimizer, hooks=hooks) as hold:
        for x, y in batches(3):
            backward(model, x, y)
            optimizer.step()
            if not hooks:
                hold.mask_weights_()
            assert_zeros(model, old)
        hold.swap(new)

    assert_clean(model, optimizer, {n: ~new[n] | (new[n] & ~old[n]) for n in new})


def test_orthogonalizing_optimizers_keep_the_zeros():
    model = nn.Linear(8, 6, bias=False)
    masks = half(model)
    optimizer = torch.optim.Muon(model.parameters(), 0.1)

    with masks.hold(model, optimizer):
        for x in torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            assert_zeros(model, masks)


def test_a_dense_optimizer_state_loaded_while_held_does_not_wake_pruned_weights():
    model = network()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    for x, y in batches(2):
        backward(model, x, y)
        optimizer.step()
    dense = copy.deepcopy(optimizer.state_dict())
    masks = half(model)

    with masks.hold(model, optimizer):
        optimizer.load_state_dict(dense)
        for x, y in batches(2):
            backward(model, x, y)
            optimizer.step()
            assert_zeros(model, masks)


def test_clipping_sees_kept_gradients_only():
    model = network()
    masks = half(model)
    twin = copy.deepcopy(model)
    masks.apply_(twin)
    x, y = next(batches(1))
    backward(twin, x, y)
    kept = [p.grad[masks[n]] if n in masks else p.grad for n, p in twin.named_parameters()]
    expected = torch.cat([g.double().reshape(-1) for g in kept]).norm()

    with masks.hold(model, torch.optim.SGD(model.parameters(), 0.1)):
        backward(model, x, y)
        norm = clip_grad_norm_(model.parameters(), 0.01)

    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_a_loop_without_hooks_equals_a_loop_with_hooks_to_the_bit(name):
    one, two = network(), network()
    masks = half(one)
    first, second = OPTIMIZERS[name](one.parameters()), OPTIMIZERS[name](two.parameters())
    hooked, bare = Hold(masks, one, first), Hold(masks, two, second, hooks=False)

    for x, y in batches(6):
        backward(one, x, y)
        clip_grad_norm_(one.parameters(), 0.1)
        first.step()
        backward(two, x, y)
        bare.mask_gradients_()
        clip_grad_norm_(two.parameters(), 0.1)
        second.step()
        bare.mask_weights_()

    hooked.check()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_bf16_autocast_follows_gated_weights():
    model = network()
    masks = half(model)
    gated = Gated(model, masks)
    optimizer, other = OPTIMIZERS["adamw"](model.parameters()), OPTIMIZERS["adamw"](list(gated.parameters()))

    with masks.hold(model, optimizer):
        for x, y in batches(6):
            for net, optim in ((model, optimizer), (gated.model, other)):
                optim.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = loss_of(net, x, y)
                loss.backward()
                optim.step()
            assert_zeros(model, masks)
            gated.assert_equal(model)


def test_a_gradient_scaler_unscales_clips_and_skips_as_usual():
    model = network()
    masks = half(model)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    with masks.hold(model, optimizer):
        for i, (x, y) in enumerate(batches(5)):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, x * (float("inf") if i == 2 else 1), y)).backward()
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), 1.0)
            before = [p.detach().clone() for p in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            if i == 2:
                assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True)), "not skipped"
            assert_zeros(model, masks)


def test_accumulated_gradients_are_masked_once_and_add_up():
    model = network(dtype=torch.float64)
    masks = half(model)
    parts = list(batches(3, torch.float64))
    masks.apply_(model)
    model.eval()
    backward(model, torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()

    with masks.hold(model, OPTIMIZERS["adamw"](model.parameters())):
        for x, y in parts:
            (loss_of(model, x, y) / 3).backward()

    for n, p in model.named_parameters():
        wanted = expected[n] * masks[n] if n in masks else expected[n]
        torch.testing.assert_close(p.grad, wanted, rtol=0, atol=1e-7)
        assert n not in masks or p.grad[~masks[n]].eq(0).all()


@pytest.mark.parametrize("name", ["momentum", "adamw", "adagrad"])
def test_bf16_parameters_stay_bf16_and_exactly_zero(name):
    model = network(dtype=torch.bfloat16)
    twin = copy.deepcopy(model)
    masks = half(model)
    optimizer, other = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](twin.parameters())
    step = by_hand(twin, other, masks)

    with masks.hold(model, optimizer):
        for x, y in batches(5, torch.bfloat16):
            backward(model, x, y)
            backward(twin, x, y)
            optimizer.step()
            step()
            for n, mask in masks.items():
                assert model.get_parameter(n)[~mask].eq(0).all()
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
