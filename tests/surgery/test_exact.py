"""Removal is exact: against networks whose columns and rows are zeroed here by hand, in float64, with plain torch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.surgery.proofs import snapshot, unchanged
from tests.surgery.zoo import ARCHITECTURES
from torch import nn

from secateur.core.errors import UsageError
from secateur.nets import build
from secateur.surgery import analyse, shrink

CLOSE = 1e-12


def conv_bn(c_in, c_out, k=3, **more):
    return nn.Sequential(nn.Conv2d(c_in, c_out, k, padding=k // 2, bias=False, **more), nn.BatchNorm2d(c_out))


def shuffle(x, groups):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class Card(nn.Module):
    """Convolution, BatchNorm, depthwise, squeeze-and-excite, chunk, cat, shuffle, flatten."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = conv_bn(3, 8), conv_bn(8, 8, groups=8)
        self.squeeze, self.excite = nn.Linear(8, 5), nn.Linear(5, 8)
        self.side = nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6 * 9, 4)

    def features(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.depthwise(x))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))[:, :, None, None]
        one, other = x.chunk(2, 1)
        return shuffle(torch.cat([one, F.relu(self.side(other))], 1), 2)

    def forward(self, x):
        return self.head(F.relu(self.last(self.features(x))).flatten(1))


def make(model, seed=0):
    """Weights off their initial values, running statistics too, in float64 and evaluation mode."""
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=made)
                tensor.copy_(noise.abs() + 0.5 if tensor.dim() == 1 else noise / 2)
    return model.double().eval()


def images(channels=3, side=3, batch=2):
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(1)).double()


@torch.no_grad()
def zero(model, columns):
    """A copy with zeros at ``(name, dim, places)``."""
    made = copy.deepcopy(model)
    for name, dim, places in columns:
        made.get_parameter(name).index_fill_(dim, torch.tensor(places), 0.0)
    return made


def agree(small, dense, x):
    with torch.no_grad():
        torch.testing.assert_close(small(x), dense(x), rtol=CLOSE, atol=CLOSE)


def tensors(group):
    return dict.fromkeys(group.tensors).keys()


def test_card_network_equals_the_one_with_zeroed_columns():
    model, x = make(Card()), images()
    analysis = analyse(model, x)
    groups = {g.name: g for g in analysis.groups}
    assert set(groups) == {"stem.0.weight", "squeeze.weight", "last.weight"}
    assert not any(g.inexact for g in analysis.groups)
    # channel c of the first half goes with channel c + 4 of the second, since chunk and shuffle cut in the middle
    assert groups["stem.0.weight"].index[0].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    dense = zero(model, [
        ("squeeze.weight", 1, [1, 5]), ("side.weight", 1, [1]), ("last.weight", 1, [2, 3]),
        ("excite.weight", 1, [0, 3]), ("head.weight", 1, [c * 9 + i for c in (2, 4) for i in range(9)]),
    ])  # fmt: skip

    done = shrink(model, x, {"stem.0.weight": [1], "squeeze.weight": [0, 3], "last.weight": [2, 4]}, analysis=analysis)

    assert done.model is model and done.error < CLOSE
    agree(model, dense, images(batch=5))


def test_card_network_equals_the_one_with_zeroed_rows():
    """Every producer zeroed instead: weights, shifts and scales, as relu(0) = 0."""
    model, x = make(Card()), images()
    dense = zero(model, [
        ("stem.0.weight", 0, [1, 5]), ("stem.1.weight", 0, [1, 5]), ("stem.1.bias", 0, [1, 5]),
        ("depthwise.0.weight", 0, [1, 5]), ("depthwise.1.weight", 0, [1, 5]), ("depthwise.1.bias", 0, [1, 5]),
        ("side.weight", 0, [1]), ("side.bias", 0, [1]), ("squeeze.weight", 0, [0]), ("squeeze.bias", 0, [0]),
        ("last.weight", 0, [5]), ("last.bias", 0, [5]),
    ])  # fmt: skip

    shrink(model, x, {"stem.0.weight": [1], "squeeze.weight": [0], "last.weight": [5]})

    agree(model, dense, images(batch=5))


def test_shuffle_is_that_of_a_mapping_made_by_hand():
    """Channel i of a shuffle in two groups of eight is channel (i % 2) * 4 + i // 2."""
    model = make(Card())
    (group,) = [g for g in analyse(model, images()).groups if g.name == "stem.0.weight"]
    at = group.tensors.index(("last.weight", 1))
    mapping = [(i % 2) * 4 + i // 2 for i in range(8)]

    for unit in range(4):
        made = sorted(mapping[i] for i in group.index[at][unit].tolist())
        assert made == group.index[0][unit].tolist() == [unit, unit + 4]


def test_flattened_columns_belong_to_their_channel():
    model = make(Card())
    (group,) = [g for g in analyse(model, images()).groups if g.name == "last.weight"]
    columns = group.index[group.tensors.index(("head.weight", 1))]

    assert columns.shape == (6, 9)
    assert all(j // 9 == channel for channel, row in enumerate(columns.tolist()) for j in row)


@pytest.mark.parametrize("remove", [{}, {"stem.0.weight": []}, {"stem.0.weight": [], "last.weight": []}])
def test_no_removal_is_refused_by_name(remove):
    model, x = make(Card()), images()
    before = snapshot(model)

    with pytest.raises(UsageError, match="nothing is to be removed"):
        shrink(model, x, remove)

    assert unchanged(before, model)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = conv_bn(3, 8), conv_bn(8, 6), conv_bn(6, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        return self.fc(x.mean((2, 3)))


def test_residual_channels_go_from_every_branch():
    model, x = make(Residual()), images()
    analysis = analyse(model, x)
    outer, inner = (analysis.group(n) for n in ("stem.0.weight", "a.0.weight"))
    bn = [(f"{n}.1.{k}", 0) for n in ("stem", "b") for k in ("weight", "bias", "running_mean", "running_var")]
    assert tensors(outer) == {("stem.0.weight", 0), ("b.0.weight", 0), ("a.0.weight", 1), ("fc.weight", 1), *bn}
    assert len(outer) == 8 and len(inner) == 6 and len(analysis.groups) == 2
    dense = zero(model, [("a.0.weight", 1, [0, 7]), ("fc.weight", 1, [0, 7]), ("b.0.weight", 1, [2])])

    shrink(model, x, {"stem.0.weight": [0, 7], "a.0.weight": [2]}, analysis=analysis)

    agree(model, dense, images(batch=3))


class Fused(nn.Module):
    """Attention with one projection for queries, keys and values."""

    def __init__(self, dim=12, heads=4, size=5):
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv, self.out = nn.Linear(dim, 3 * heads * size), nn.Linear(heads * size, dim)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, t, self.heads * self.size))


def tokens(dim=12, length=6, batch=2):
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(2)).double()


def test_fused_heads_go_whole():
    model, x = make(Fused()), tokens()
    analysis = analyse(model, x)
    (group,) = analysis.groups
    assert len(group) == 4 and tensors(group) == {("qkv.weight", 0), ("qkv.bias", 0), ("out.weight", 1)}
    rows = [part * 20 + 2 * 5 + i for part in range(3) for i in range(5)]
    assert sorted(group.index[group.tensors.index(("qkv.weight", 0))][2].tolist()) == rows
    dense = zero(model, [("out.weight", 1, list(range(10, 15)))])

    shrink(model, x, {group.name: [2]}, analysis=analysis)

    assert model.heads == 3 and model.size == 5
    agree(model, dense, tokens(batch=3))


def test_dimensions_of_heads_that_are_scaled_by_their_size_stay():
    model, x = make(Fused()), tokens()
    analysis = analyse(model, x, "dims")

    assert analysis.groups == ()
    why = {(r.tensor, r.dim): r.why for r in analysis.rows}
    assert "scaled by the size of its heads" in why["qkv.weight", 0]


class Shared(nn.Module):
    """Six query heads share two heads of keys and values."""

    def __init__(self, dim=12, heads=6, kv=2, size=4):
        super().__init__()
        self.heads, self.kv, self.size = heads, kv, size
        self.q, self.k, self.v = nn.Linear(dim, heads * size), nn.Linear(dim, kv * size), nn.Linear(dim, kv * size)
        self.o = nn.Linear(heads * size, dim)

    def forward(self, x):
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.heads, self.size).transpose(1, 2)
        k = self.k(x).view(b, t, self.kv, self.size).transpose(1, 2)
        v = self.v(x).view(b, t, self.kv, self.size).transpose(1, 2)
        k, v = k.repeat_interleave(self.heads // self.kv, 1), v.repeat_interleave(self.heads // self.kv, 1)
        y = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


def test_a_shared_head_goes_with_all_its_queries():
    model, x = make(Shared()), tokens()
    analysis = analyse(model, x)
    (group,) = analysis.groups
    sizes = {name: tuple(i.shape) for (name, _), i in zip(group.tensors, group.index, strict=True)}
    assert sizes["q.weight"] == sizes["o.weight"] == (2, 12) and sizes["k.weight"] == sizes["v.bias"] == (2, 4)
    dense = zero(model, [("o.weight", 1, list(range(12)))])

    done = shrink(model, x, {group.name: [0]}, analysis=analysis)

    agree(done.model, dense, tokens(batch=3))


def test_the_same_index_goes_from_every_head():
    model, x = make(Shared()), tokens()
    analysis = analyse(model, x, "dims")
    keys, values = analysis.group("q.weight"), analysis.group("v.weight")
    assert len(keys) == len(values) == 4
    assert {n for n, _ in keys.tensors} == {"q.weight", "q.bias", "k.weight", "k.bias"}
    assert {n for n, _ in values.tensors} == {"v.weight", "v.bias", "o.weight"}
    q = [h * 4 + 1 for h in range(6)]
    dense = zero(model, [("q.weight", 0, q), ("q.bias", 0, q), ("o.weight", 1, [h * 4 + 3 for h in range(6)])])

    done = shrink(model, x, {"q.weight": [1], "v.weight": [3]}, analysis=analysis)

    agree(done.model, dense, tokens(batch=3))


class Recurrent(nn.Module):
    def __init__(self, kind, **more):
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.rnn = kind(6, 7, batch_first=True, **more)
        self.out = nn.Linear(7 * (2 if more.get("bidirectional") else 1), 3)

    def forward(self, x):
        return self.out(self.rnn(self.embed(x))[0])


@pytest.mark.parametrize("kind, gates", [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("more", [{}, {"num_layers": 2, "bidirectional": True}])
def test_hidden_units_of_recurrent_layers(kind, gates, more):
    model = make(Recurrent(kind, **more))
    x = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(0))
    analysis = analyse(model, x)
    hidden, words = analysis.group("rnn.weight_ih_l0"), analysis.group("embed.weight:1")
    assert len(hidden) == 7 and len(words) == 6
    index = dict(zip(hidden.tensors, hidden.index, strict=True))
    assert index["rnn.weight_hh_l0", 0][3].tolist() == [3 + 7 * g for g in range(gates)]
    both = [0, 7] if more else [0]
    columns = [(n, 1, [3]) for n, _ in model.named_parameters() if "weight_hh" in n]
    columns += [(n, 1, [3, 10]) for n, _ in model.named_parameters() if "weight_ih_l1" in n]
    columns += [("out.weight", 1, [3 + b for b in both])]
    columns += [(n, 1, [0, 5]) for n, _ in model.named_parameters() if "weight_ih_l0" in n]
    dense = zero(model, columns)

    shrink(model, x, {"rnn.weight_ih_l0": [3], "embed.weight:1": [0, 5]}, analysis=analysis)

    assert model.rnn.hidden_size == 6 and model.rnn.input_size == 4
    agree(model, dense, x.flip(1))


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mlp = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        h = self.embed(x)
        return self.head(h + F.relu(self.mlp(h)))


def test_embedding_tied_to_the_head():
    model = make(TiedHead())
    x = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(0))
    dense = zero(model, [("embed.weight", 1, [2, 6]), ("mlp.weight", 1, [2, 6])])
    (group,) = analyse(model, x).groups
    assert {("embed.weight", 1), ("head.weight", 1), ("mlp.weight", 0), ("mlp.weight", 1)} <= tensors(group)

    shrink(model, x, {group.name: [2, 6]})

    assert model.head.weight is model.embed.weight and model.embed.embedding_dim == 6
    agree(model, dense, x.flip(1))


def test_grouped_convolution_loses_the_same_channel_of_every_group():
    model = make(nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=2), nn.ReLU(),
                               nn.Flatten(), nn.Linear(8, 3)))  # fmt: skip
    x = images()
    analysis = analyse(model, x)
    inside, outside = analysis.group("0.weight"), analysis.group("2.weight")
    assert len(inside) == 6 and inside.index[0][1].tolist() == [1, 7]
    assert len(outside) == 4 and outside.index[0][1].tolist() == [1, 5]
    dense = zero(model, [("2.weight", 1, [1]), ("5.weight", 1, [3, 7])])

    shrink(model, x, {"0.weight": [1], "2.weight": [3]}, analysis=analysis)

    assert (model[2].in_channels, model[2].out_channels, model[2].groups) == (10, 6, 2)
    agree(model, dense, images(batch=3))


def test_small_groups_go_whole():
    """Three channels in each of four groups: a group goes with the channels it makes."""
    model = make(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(),
                               nn.Flatten(), nn.Linear(12, 3)))  # fmt: skip
    x = images()
    analysis = analyse(model, x)
    (group,) = analysis.groups
    assert len(group) == 4 and {n: i[1].tolist() for (n, _), i in zip(group.tensors, group.index, strict=True)} == {
        "0.weight": [2, 3], "0.bias": [2, 3], "2.weight": [3, 4, 5], "2.bias": [3, 4, 5], "5.weight": [3, 4, 5]
    }  # fmt: skip
    dense = zero(model, [("5.weight", 1, [3, 4, 5])])

    shrink(model, x, {group.name: [1]}, analysis=analysis)

    assert (model[2].groups, model[2].in_channels, model[2].out_channels) == (3, 6, 9)
    agree(model, dense, images(batch=3))


def test_transposed_convolution_reads_its_rows():
    model = make(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.ConvTranspose2d(6, 5, 2, stride=2), nn.ReLU(),
                               nn.ConvTranspose2d(5, 2, 3)))  # fmt: skip
    x = images()
    dense = zero(model, [("2.weight", 0, [0, 4]), ("4.weight", 0, [1])])
    analysis = analyse(model, x)
    assert [len(g) for g in analysis.groups] == [6, 5]
    first, second = analysis.groups
    assert ("2.weight", 0) in first.tensors and ("2.weight", 1) in second.tensors

    shrink(model, x, {first.name: [0, 4], second.name: [1]}, analysis=analysis)

    assert (model[2].in_channels, model[2].out_channels, model[4].in_channels) == (4, 4, 4)
    agree(model, dense, images(batch=3))


def test_pixel_shuffle_keeps_the_pixels_of_a_channel_together():
    model = make(nn.Sequential(nn.Conv2d(3, 12, 1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(3, 2, 1)))
    x = images()
    analysis = analyse(model, x)
    (group,) = analysis.groups
    assert group.index[0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    dense = zero(model, [("3.weight", 1, [1])])

    shrink(model, x, {group.name: [1]}, analysis=analysis)

    agree(model, dense, images(batch=3))


def test_a_layer_norm_is_said_to_change_and_is_that_of_the_channels_that_stay():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 9), nn.LayerNorm(9), nn.Linear(9, 3)

        def forward(self, x):
            return self.b(self.norm(self.a(x)))

    model, x = make(Normed()), tokens(4)
    dense, stays = copy.deepcopy(model), [0, 1, 3, 4, 5, 7, 8]
    (group,) = analyse(model, x).groups
    assert group.inexact == ("the statistics of a normalisation are taken over it",)

    done = shrink(model, x, {group.name: [2, 6]})

    assert done.inexact == {group.name: group.inexact} and model.norm.normalized_shape == (7,)
    with torch.no_grad():
        h = dense.a(x)[..., stays]
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        expected = F.linear(
            h * dense.norm.weight[stays] + dense.norm.bias[stays], dense.b.weight[:, stays], dense.b.bias
        )
        torch.testing.assert_close(model(x), expected, rtol=CLOSE, atol=CLOSE)


def test_reasons_say_what_holds_a_dimension():
    model, x = make(Residual()), images()
    rows = {(r.tensor, r.dim): r for r in analyse(model, x).rows}

    assert rows["fc.weight", 0].why == "it is an output of the network" and rows["fc.weight", 0].units == 0
    assert "fixed size" in rows["stem.0.weight", 1].why
    assert "kernel" in rows["stem.0.weight", 2].why
    assert rows["stem.0.weight", 0].units == 8 and rows["stem.0.weight", 0].why == ""


@pytest.mark.parametrize("name, units", [
    ("vgg", {"features.0.weight": 16, "features.4.weight": 32, "features.7.weight": 32, "features.11.weight": 48,
             "classifier.0.weight": 64}),
    ("squeezenet", {"0.weight": 16, "3.squeeze.weight": 8, "3.expand1x1.weight": 16, "3.expand3x3.weight": 16,
                    "4.squeeze.weight": 8, "4.expand1x1.weight": 24, "4.expand3x3.weight": 24}),
])  # fmt: skip
def test_groups_are_those_a_person_counts(name, units):
    model, example = ARCHITECTURES[name]()
    analysis = analyse(model, example)

    assert {g.name: len(g) for g in analysis.groups} == units
    assert not any(g.inexact for g in analysis.groups) and not analysis.operators


def test_shortcuts_that_pad_channels_keep_their_class():
    """The two sides of the padding lose different numbers of channels, though both were 8."""
    torch.manual_seed(0)
    model, x = build("resnet20", (3, 16, 16), 10).eval(), torch.randn(2, 3, 16, 16)
    analysis = analyse(model, x)
    second = analysis.group("layer2.0.conv2.weight")  # the 16 channels that the shortcut fills with zeros

    done = shrink(model, x, {second.name: [0, 1, 9]}, analysis=analysis)

    assert done.model is model and not done.rewritten
    pad = model.get_submodule("layer2.0.shortcut")
    assert (pad.before, pad.after) == (6, 7)
    again = copy.deepcopy(model).train()
    again(x).sum().backward()
    assert model(x).shape == (2, 10)
