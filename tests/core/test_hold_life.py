"""Hold in the life of a network: copies, wrappers, checkpoints, and what is refused."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false

import copy
import importlib.util
import pathlib

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from secateur.core.errors import MaskError
from secateur.core.hold import Hold
from secateur.core.masks import Masks

_spec = importlib.util.spec_from_file_location("hold_kit", pathlib.Path(__file__).with_name("hold_kit.py"))
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)
OPTIMIZERS, network, batches, half = kit.OPTIMIZERS, kit.network, kit.batches, kit.half
loss_of, backward, assert_zeros = kit.loss_of, kit.backward, kit.assert_zeros


def test_averaged_copies_are_masked_too():
    model = network()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for x, y in batches(3, seed=3):
        backward(model, x, y)
        optimizer.step()
        ema.update_parameters(model)
    masks = half(model)
    expected = {n: p.detach().double() for n, p in ema.module.named_parameters()}

    with masks.hold(model, optimizer, also=[ema]) as hold:
        assert_zeros(ema.module, masks)
        for x, y in batches(4):
            backward(model, x, y)
            optimizer.step()
            ema.update_parameters(model)
            expected = {n: 0.9 * expected[n] + 0.1 * p.double() for n, p in model.named_parameters()}
        hold.check()

        for n, p in ema.module.named_parameters():
            kept = masks[n] if n in masks else torch.ones_like(p, dtype=torch.bool)
            torch.testing.assert_close(p.double()[kept], expected[n][kept], rtol=1e-5, atol=1e-6)
        assert_zeros(ema.module, masks)
        ema.module[4].weight.data.fill_(1)
        with pytest.raises(MaskError, match="`4.weight` are not zero"):
            hold.check()


def test_a_copy_of_a_held_network_is_plain():
    model = network()
    masks = half(model)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    x, y = next(batches(1))

    with masks.hold(model, optimizer):
        twin = copy.deepcopy(model)
        assert type(twin) is nn.Sequential and list(twin.state_dict()) == list(network().state_dict())
        masks.check(twin)
        backward(twin, x, y)
        assert any(twin.get_parameter(n).grad[~m].ne(0).any() for n, m in masks.items()), "the copy is not held"
        assert torch.equal(twin(x), model(x))
        copy.deepcopy(optimizer).step()
        masks.hold(twin, OPTIMIZERS["sgd"](twin.parameters())).check()


@pytest.mark.parametrize("when", ["compiled first", "held first"])
def test_a_compiled_network_trains_like_an_eager_one(when):
    eager, inner = network(), network()
    masks = half(eager)
    optimizer, other = OPTIMIZERS["adamw"](eager.parameters()), OPTIMIZERS["adamw"](inner.parameters())
    if when == "compiled first":
        compiled = torch.compile(inner, backend="aot_eager")
        hold = masks.hold(compiled, other)
    else:
        hold = masks.hold(inner, other)
        compiled = torch.compile(inner, backend="aot_eager")
    held = masks.hold(eager, optimizer)

    for i, (x, y) in enumerate(batches(4)):
        if i == 2:
            masks = half(eager, 5)
            held.swap(masks)
            hold.swap(masks)
        for net, optim in ((eager, optimizer), (compiled, other)):
            optim.zero_grad()
            loss_of(net, x, y).backward()
            optim.step()
        for n, mask in masks.items():
            assert inner.get_parameter(n).grad[~mask].eq(0).all()
        assert all(torch.equal(a, b) for a, b in zip(eager.parameters(), inner.parameters(), strict=True))
        hold.check()


def test_a_dense_checkpoint_loaded_over_the_zeros_is_noticed():
    model, dense = network(), network(1).state_dict()
    masks = half(model)

    with masks.hold(model, OPTIMIZERS["sgd"](model.parameters())) as hold:
        model.load_state_dict(dense)

        with pytest.raises(MaskError, match=r"pruned weights of `0.weight` are not zero.*dense checkpoint"):
            hold.check()
        masks.apply_(model)
        hold.check()


def test_tied_weights_are_held_as_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x):
            return self.head(torch.tanh(self.table(x)))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tied()
    masks = Masks({"table.weight": torch.arange(28).reshape(7, 4) % 3 == 0})
    optimizer = OPTIMIZERS["adamw"](model.parameters())

    with masks.hold(model, optimizer) as hold:
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.arange(7)), torch.arange(7)).backward()
            assert model.head.weight.grad[~masks["table.weight"]].eq(0).all()
            optimizer.step()
        hold.check()
    assert model.head.weight is model.table.weight
    assert torch.equal(model.head.weight != 0, masks["table.weight"])


def test_zeros_survive_a_network_that_changes_its_type_while_held():
    model = network()
    masks = half(model)
    hold = masks.hold(model, OPTIMIZERS["sgd"](model.parameters()))
    hold.release()

    model.double()
    model[4].weight.data.add_(1)
    hold.mask_weights_()

    assert model[4].weight.dtype == torch.float64
    masks.check(model)


def test_an_optimizer_of_another_network_is_refused():
    model = network()

    with pytest.raises(MaskError, match=r"does not train `0.weight`.*Make the optimizer from `model.parameters\(\)`"):
        half(model).hold(model, torch.optim.SGD(network().parameters(), 0.1))
    with pytest.raises(MaskError, match="does not train `4.weight`"):
        half(model).hold(model, torch.optim.SGD(model[0].parameters(), 0.1))
    backward(model, *next(batches(1)))
    assert all(p.grad.ne(0).all() for n, p in model.named_parameters() if n == "6.weight"), "a hook was left behind"


def test_masks_that_name_other_tensors_are_refused():
    model = network()
    masks = half(model)

    with pytest.raises(MaskError, match="no parameter `9.weight`"):
        Masks({"9.weight": torch.ones(2, 2, dtype=torch.bool)}).hold(model)
    hold = masks.hold(model)
    with pytest.raises(MaskError, match="other tensors than the held ones: 4.weight, 6.weight"):
        hold.swap(Masks({"0.weight": masks["0.weight"]}))
    with pytest.raises(MaskError, match="has shape"):
        hold.swap(Masks({n: m[:1] for n, m in masks.items()}))
    assert hold.masks == masks, "a refused swap changes nothing"
    hold.check()


def test_a_frozen_tensor_needs_no_optimizer_and_keeps_its_zeros():
    model = network()
    model[4].weight.requires_grad_(False)
    masks = half(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)

    with masks.hold(model, optimizer):
        for x, y in batches(2):
            backward(model, x, y)
            optimizer.step()
        assert_zeros(model, masks)
        assert model[4].weight.grad is None


def test_release_and_leaving_the_block_let_go():
    model = network()
    masks = half(model)
    optimizer = OPTIMIZERS["momentum"](model.parameters())

    with masks.hold(model, optimizer) as hold:
        assert isinstance(hold, Hold)
    masks.check(model)
    x, y = next(batches(1))
    backward(model, x, y)
    assert any(model.get_parameter(n).grad[~m].ne(0).any() for n, m in masks.items())
    optimizer.step()
    with pytest.raises(MaskError, match="are not zero"):
        masks.check(model)
    hold.release()


def test_hold_without_an_optimizer_masks_gradients():
    model = network()
    masks = half(model)

    with masks.hold(model):
        backward(model, *next(batches(1)))
        for n, mask in masks.items():
            assert torch.equal(model.get_parameter(n).grad != 0, mask)


def test_missing_gradients_are_no_error():
    model = network()
    masks = half(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())

    with Hold(masks, model, optimizer, hooks=False) as hold:
        hold.mask_gradients_()
        hold.mask_weights_()
        optimizer.step()
    masks.check(model)


def test_gradients_from_before_the_hold_are_masked_too():
    model = network()
    masks = half(model)
    backward(model, *next(batches(1)))

    with masks.hold(model):
        for n, mask in masks.items():
            assert model.get_parameter(n).grad[~mask].eq(0).all()


def test_optimizer_state_of_other_shapes_is_left_alone():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for x, y in batches(2):
        backward(model, x, y)
        optimizer.step()

    Masks({n: torch.zeros(m.shape, dtype=torch.bool) for n, m in Masks.dense(model).items()}).hold(model, optimizer)

    assert {float(optimizer.state[p]["step"]) for p in model.parameters()} == {2.0}
    assert optimizer.state[model[4].bias]["exp_avg"].ne(0).any(), "a tensor without a mask was touched"
