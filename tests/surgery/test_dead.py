"""Removal of dead units leaves the function alone."""

import copy

import pytest
import torch
from tests.surgery.hf import HF
from tests.surgery.zoo import ARCHITECTURES
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from secateur import nets
from secateur.core.errors import UsageError
from secateur.surgery import analyse
from secateur.surgery.dead import absorb, dead_units, shrink_dead

CLOSE = 1e-12


class Pair(nn.Module):
    """Two convolutions with normalisation and activation between them."""

    def __init__(self, padding=0, bias=True, mode="zeros", norm_behind=False, act=F.relu):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=padding, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 5, 3, padding=padding, bias=bias, padding_mode=mode)
        self.behind = nn.BatchNorm2d(5) if norm_behind else nn.Identity()
        self.act = act

    def forward(self, x):
        return self.behind(self.second(self.act(self.norm(self.first(x)))))


def built(model, seed=0):
    """In float64 and evaluation mode, with every vector and statistic off its initial value."""
    made = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=made, dtype=p.dtype) * 0.4)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                drawn = torch.rand(buffer.shape, generator=made, dtype=buffer.dtype)
                buffer.copy_(drawn + 0.5 if name.endswith("var") else drawn - 0.5)
    return model


def images(n=2, size=8, channels=3):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def kill(norm, unit, shift=0.7):
    norm.weight[unit] = 0.0
    norm.bias[unit] = shift


def same(model, before, x):
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=CLOSE, atol=CLOSE)


# ---- scales of 0: network slimming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [F.relu, torch.tanh, F.gelu, torch.sigmoid])
def test_scale_of_0_without_padding_leaves_the_outputs(act):
    """A channel with γ = 0 is act(β) everywhere; next's bias takes act(β)·ΣW (card, test a)."""
    model = built(Pair(act=act))
    kill(model.norm, 2)
    x = images()
    before, bias = model(x).detach(), model.second.bias.detach().clone()
    moved = act(torch.tensor(0.7, dtype=torch.float64)) * model.second.weight[:, 2].sum((1, 2))

    cleared = shrink_dead(model, x)

    assert cleared.units == {"first.weight": (2,)} and cleared.into == ("second.bias",) and not cleared.inexact
    assert model.first.weight.shape[0] == 5 and model.norm.num_features == 5 and model.second.in_channels == 5
    torch.testing.assert_close(model.second.bias, bias + moved.detach(), rtol=0, atol=CLOSE)
    same(model, before, x)
    other = images(3, 11)
    assert torch.isfinite(model(other)).all()


def test_zero_padding_leaves_the_interior():
    """Border pixels see 0 where the channel was act(β): refused by default, else reported with its size (card, a)."""
    model = built(Pair(padding=1))
    kill(model.norm, 2)
    x = images()
    before, dense = model(x).detach(), copy.deepcopy(model)

    kept = shrink_dead(model, x)

    assert kept.units == {} and "zero padding of `second.weight`" in kept.left["first.weight"]
    same(model, before, x)
    cleared = shrink_dead(model, x, borders=True)
    after = model(x).detach()
    torch.testing.assert_close(after[..., 1:-1, 1:-1], before[..., 1:-1, 1:-1], rtol=CLOSE, atol=CLOSE)
    apart = (after - before).abs().max().item() / before.abs().max().item()
    assert cleared.units == {"first.weight": (2,)} and apart > 1e-3
    assert cleared.inexact == {"second.weight": pytest.approx(apart, rel=1e-9)} and cleared.error >= 0.999 * apart
    assert torch.equal(dense(x), before)


def test_shift_and_scale_of_0_are_exact_whatever_the_padding():
    """γ = β = 0 behind a ReLU is 0, which padding does not hide: sliced = masked (card, test c)."""
    model = built(Pair(padding=1))
    for unit in (1, 4):
        kill(model.norm, unit, shift=-0.3 if unit == 4 else 0.0)
    x = images()
    before, bias = model(x).detach(), model.second.bias.detach().clone()

    cleared = shrink_dead(model, x)

    assert cleared.units == {"first.weight": (1, 4)} and cleared.into == () and cleared.left == {}
    assert torch.equal(model.second.bias, bias)
    same(model, before, x)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_with_the_constant_itself_is_exact(mode):
    model = built(Pair(padding=1, mode=mode))
    kill(model.norm, 0)
    x = images()
    before = model(x).detach()

    assert shrink_dead(model, x).units == {"first.weight": (0,)}
    same(model, before, x)


# ---- filters that are all zero --------------------------------------------------------------------------------------


def test_all_zero_filters_before_normalisation():
    """The channel is β - γ·mean/√(var + ε), not 0; outputs stay, here where the next layer has no bias itself."""
    model = built(Pair(bias=False, norm_behind=True))
    with torch.no_grad():
        model.first.weight[[0, 3]] = 0.0
        model.norm.bias[:] = 1.0
    x = images()
    before, keys, mean = model(x).detach(), set(model.state_dict()), model.behind.running_mean.clone()

    cleared = shrink_dead(model, x, data=[images(5)])

    assert cleared.units == {"first.weight": (0, 3)} and cleared.into == ("behind.running_mean",)
    assert set(model.state_dict()) == keys and not torch.equal(model.behind.running_mean, mean)
    same(model, before, x)


def test_a_layer_without_bias_gets_one():
    model = built(Pair(bias=False))
    kill(model.norm, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = images()
    before = model(x).detach()

    cleared = shrink_dead(model, x, optimizer=optimizer)

    assert cleared.into == ("second.bias",) and cleared.units == {"first.weight": (5,)}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()} and id(model.second.bias) in held
    same(model, before, x)


def test_nothing_is_removed_that_only_happens_not_to_fire():
    """A ReLU that is off on the example may be on elsewhere; its weights are not zero."""
    model = built(Pair())
    with torch.no_grad():
        model.norm.bias[1] = -100.0
    x = images()

    assert shrink_dead(model, x).units == {}
    assert model.first.weight.shape[0] == 6


def test_columns_that_nobody_reads():
    """A unit that varies but meets only zero weights adds nothing, and goes."""
    model = built(nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)))
    with torch.no_grad():
        model[2].weight[:, 5] = 0.0
    x = torch.randn(6, 4, dtype=torch.float64)
    before = model(x).detach()

    cleared = shrink_dead(model, x)

    assert cleared.units == {"0.weight": (5,)} and cleared.into == ()
    same(model, before, x)


def test_dead_units_make_dead_units():
    """A unit fed by dead ones alone is a constant too; both go at once."""
    model = built(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 3)))
    with torch.no_grad():
        model[0].weight[:2] = 0.0
        model[2].weight[3, 2:] = 0.0
    x = torch.randn(6, 4, dtype=torch.float64)
    before = model(x).detach()

    cleared = shrink_dead(model, x)

    assert cleared.units == {"0.weight": (0, 1), "2.weight": (3,)}
    same(model, before, x)


def test_one_unit_of_each_dimension_stays():
    model = built(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    with torch.no_grad():
        model[0].weight[:] = 0.0
    x = torch.randn(6, 4, dtype=torch.float64)
    before = model(x).detach()

    assert shrink_dead(model, x).units == {"0.weight": (0, 1, 2, 3, 4)}
    assert model[0].out_features == 1
    same(model, before, x)


def test_flattened_maps_give_each_place_its_own_constant():
    """Behind a flatten a channel is many columns, and zero padding before makes their constants differ."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3, padding=1)
            self.second = nn.Conv2d(4, 5, 3, padding=1)
            self.head = nn.Linear(5 * 16, 3)

        def forward(self, x):
            return self.head(F.max_pool2d(F.elu(self.second(F.elu(self.first(x)))), 2).flatten(1))

    model = built(Net())
    with torch.no_grad():
        model.first.weight[0] = 0.0
        model.second.weight[2, 1:] = 0.0
    x = images()
    before = model(x).detach()

    cleared = shrink_dead(model, x)

    assert cleared.units == {"second.weight": (2,)} and "zero padding" in cleared.left["first.weight"]
    same(model, before, x)


# ---- coupled units --------------------------------------------------------------------------------------------------


def test_residual_stream_goes_only_where_every_part_is_dead():
    """A channel of a stage is dead when all that is added into it is."""
    model = built(nets.build("resnet_cifar", depth=14, width=4, shortcut="B"))
    parts = [model.layer1[0], model.layer1[1]]
    with torch.no_grad():
        for unit, also in ((0, True), (1, False)):
            model.conv1.weight[unit] = 0.0
            model.bn1.bias[unit], model.bn1.weight[unit] = -1.0, 0.0
            for block in parts if also else parts[:1]:
                block.bn2.weight[unit], block.bn2.bias[unit] = 0.0, 0.0
    x = images(size=16)
    before = model(x).detach()

    cleared = shrink_dead(model, x)

    group = next(g for g in analyse(nets.build("resnet_cifar", depth=14, width=4, shortcut="B").double(), x).groups
                 if ("conv1.weight", 0) in g.tensors)  # fmt: skip
    assert cleared.units == {group.name: (0,)}
    assert model.conv1.weight.shape[0] == 3 and model.layer1[0].conv2.weight.shape[0] == 3
    same(model, before, x)


def test_heads_whose_values_are_constants():
    """Attention weights sum up to 1, so a head with values of 0·x + b gives b, which the projection's bias takes."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

        def forward(self, x):
            n, t, _ = x.shape
            q, k, v = self.qkv(x).reshape(n, t, 3, -1, 4).permute(2, 0, 3, 1, 4).unbind(0)
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1))

    model = built(Attention())
    with torch.no_grad():
        model.qkv.weight[24 + 4 : 24 + 8] = 0.0
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    before = model(x).detach()

    cleared = shrink_dead(model, x)

    assert cleared.units == {"qkv.weight": (1,)} and cleared.into == ("proj.bias",)
    assert model.qkv.weight.shape == (24, 12) and model.proj.weight.shape == (12, 8)
    same(model, before, x)


def test_gated_units_die_with_either_factor():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
            self.down = nn.Linear(6, 4, bias=False)

        def forward(self, x):
            return self.down(F.silu(self.gate(x)) * self.up(x))

    model = built(Gated())
    with torch.no_grad():
        model.up.weight[1] = 0.0
        model.gate.weight[4] = 0.0
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    before = model(x).detach()

    assert shrink_dead(model, x).units == {"gate.weight": (1, 4)}
    same(model, before, x)


def test_a_layer_used_twice_takes_its_constant_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x, y):
            return self.second(torch.tanh(self.first(x))) - 2 * self.second(torch.tanh(self.first(y)))

    model = built(Twice())
    with torch.no_grad():
        model.first.weight[3] = 0.0
    args = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    before = model(*args).detach()

    cleared = shrink_dead(model, args)

    assert cleared.units == {"first.weight": (3,)} and cleared.into == ("second.bias",)
    torch.testing.assert_close(model(*args).detach(), before, rtol=CLOSE, atol=CLOSE)


def test_a_layer_used_with_other_constants_keeps_the_units():
    """One bias cannot take two constants."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            y = self.first(x)
            return self.second(torch.tanh(y)) + self.second(torch.sigmoid(y))

    model = built(Two())
    with torch.no_grad():
        model.first.weight[3] = 0.0
    x = torch.randn(3, 4, dtype=torch.float64)

    cleared = shrink_dead(model, x)

    assert cleared.units == {} and "reads other values elsewhere" in cleared.left["first.weight"]


def test_units_of_a_normalisation_stay():
    """Without them its mean would be taken over fewer."""
    model = built(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)))
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 0.0, 0.0
        model[1].weight[3], model[1].bias[3] = 0.0, 0.0
        model[2].weight[:, 3] = 0.0
    x = torch.randn(3, 4, dtype=torch.float64)

    cleared = shrink_dead(model, x)

    assert cleared.units == {} and "statistics" in cleared.left["0.weight"]


ZOO = ["vgg", "densenet", "mobilenet_v3", "inception", "swin", "cross_attention", "gqa_decoder", "wavenet", "siamese"]


@pytest.mark.parametrize("name", ZOO)
def test_zoo_with_zero_rows_computes_the_same_on_other_inputs(name):
    """A proof from the weights holds for inputs that were never seen."""
    model, args = ARCHITECTURES[name]()
    made = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p[torch.rand(len(p), generator=made) < 0.4] = 0.0
    args = tree_map(lambda x: x.double() if x.is_floating_point() else x, args)
    others = tree_map(lambda x: x + torch.randn(x.shape, generator=made) if x.is_floating_point() else x.flip(1), args)
    before = [model(*x).detach() for x in (args, others)]

    cleared = shrink_dead(model, args)

    assert sum(map(len, cleared.units.values())) >= 15 and cleared.shrunk.params[1] < 0.95 * cleared.shrunk.params[0]
    for x, expected in zip((args, others), before, strict=True):
        torch.testing.assert_close(cleared.model(*x).detach(), expected, rtol=CLOSE, atol=CLOSE)


def test_hugging_face_gpt2_keeps_its_logits():
    """Its layers keep (in, out) and are computed as a sum with the bias first."""
    pytest.importorskip("transformers")
    model, kwargs = HF["gpt2_lm"]()
    model = model.double().eval()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[:, :20] = 0.0
        model.transformer.h[1].mlp.c_proj.weight[5:9] = 0.0
    before = model(**kwargs).logits.detach()

    cleared = shrink_dead(model, kwargs)

    assert sorted(map(len, cleared.units.values())) == [4, 20]
    assert cleared.into == ("transformer.h.0.mlp.c_proj.bias",) and model.transformer.h[0].mlp.c_fc.nf == 108
    torch.testing.assert_close(model(**kwargs).logits.detach(), before, rtol=CLOSE, atol=CLOSE)


def test_noise_is_no_constant():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            y = self.first(x)
            return self.second(y + torch.randn_like(y))

    model = Noisy().double()
    with torch.no_grad():
        model.first.weight[3] = 0.0
    x = torch.randn(3, 4, dtype=torch.float64)

    assert dead_units(analyse(model, x), model, x) == {}


# ---- pieces ---------------------------------------------------------------------------------------------------------


def test_finding_changes_nothing_and_absorbing_keeps_the_shapes():
    """What `absorb` moves equals the dead channel's part of the sum; the channel is still there."""
    model = built(Pair())
    kill(model.norm, 2)
    x = images()
    state, analysis = copy.deepcopy(model.state_dict()), analyse(model, x)

    dead = dead_units(analysis, model, x, [images(1, 9)])

    assert dead == {"first.weight": [2]}
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    before = model(x).detach()
    old, inexact = absorb(analysis, model, x, dead)
    assert list(old) == ["second.bias"] and torch.equal(old["second.bias"], state["second.bias"]) and not inexact
    with torch.no_grad():
        model.second.weight[:, 2] = 0.0
    same(model, before, x)
    with pytest.raises(UsageError, match="unit 1 of group 'first.weight' is not dead"):
        absorb(analysis, model, x, {"first.weight": [1]})


def test_float32_keeps_its_own_accuracy_and_the_training_mode():
    model = built(Pair()).float().train()
    kill(model.norm, 2)
    x = images().float()
    before = copy.deepcopy(model).eval()(x).detach()

    cleared = shrink_dead(model, x)

    assert model.training and cleared.units == {"first.weight": (2,)} and cleared.error < 1e-6
    torch.testing.assert_close(model.eval()(x), before, rtol=1e-5, atol=1e-5)


def test_a_refusal_restores_everything(monkeypatch):
    """A network whose outputs cannot be kept is left as it was, with its biases and its optimizer."""
    from secateur.core.errors import ModelError
    from secateur.surgery import dead

    model = built(Pair(bias=False))
    kill(model.norm, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state, count = copy.deepcopy(model.state_dict()), len(optimizer.param_groups[0]["params"])
    monkeypatch.setattr(dead, "_bound", lambda *_: -1.0)

    with pytest.raises(ModelError, match="nothing was changed"):
        shrink_dead(model, images(), optimizer=optimizer)

    assert model.second.bias is None and len(optimizer.param_groups[0]["params"]) == count
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
