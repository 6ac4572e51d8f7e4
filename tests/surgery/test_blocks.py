"""Removal of whole blocks."""

import copy

import pytest
import torch
from tests.surgery.hf import HF
from tests.surgery.zoo import ARCHITECTURES
from torch import nn
from torch.nn import functional as F

from secateur import nets
from secateur.core.errors import ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.streams import seed_global
from secateur.core.task import Task
from secateur.surgery.blocks import Skip, block_influence, blocks, remove_blocks


def built(name, **options):
    """A small network off its initial values, in float64 and evaluation mode."""
    seed_global(0, "blocks", name)
    model = nets.build(name, **options).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for key, buffer in model.named_buffers():
            if key.endswith("running_var"):
                buffer.mul_(0.75 + 0.5 * torch.rand_like(buffer))
    return model


def gpt():
    return built("gpt_tiny", vocab=11, length=8, dim=12, depth=4, heads=2), torch.arange(12).reshape(2, 6) % 11


def resnet(shortcut="A"):
    return built("resnet20", width=4, shortcut=shortcut), torch.randn(2, 3, 16, 16, dtype=torch.float64)


def movable(model, example):
    return [block.path for block in blocks(model, example) if not block.why_not]


# ---- which can go ---------------------------------------------------------------------------------------------------


def test_resnet_blocks_that_keep_their_shape_can_go():
    model, x = resnet()

    found = {block.path: block for block in blocks(model, x)}

    same = {f"layer{stage}.{i}" for stage in (1, 2, 3) for i in range(3)} - {"layer2.0", "layer3.0"}
    assert {path for path, block in found.items() if not block.why_not} == same
    assert found["layer2.0"].why_not == "it makes (2, 8, 8, 8) of (2, 4, 16, 16)"
    one = found["layer1.1"]
    assert one.params == sum(p.numel() for p in model.layer1[1].parameters()) and one.residual
    assert one.macs == 2 * 16 * 16 * 4 * 4 * 9  # two convolutions, each weight once at every pixel


@pytest.mark.parametrize("name", ["vit_tiny", "gpt_tiny"])
def test_transformer_blocks_can_go(name):
    model, x = gpt() if name == "gpt_tiny" else (built("vit_tiny", size=8, dim=12, depth=3, heads=3),
                                                  torch.randn(2, 3, 8, 8, dtype=torch.float64))  # fmt: skip

    found = [block for block in blocks(model, x) if not block.why_not]

    depth = 4 if name == "gpt_tiny" else 3
    assert [b.path for b in found] == [f"{'h' if depth == 4 else 'blocks'}.{i}" for i in range(depth)]
    assert all(b.residual and b.macs > 0 for b in found)


def test_vgg_has_no_block_and_says_why():
    model = built("vgg11", width=0.1)

    found = {b.path: b.why_not for b in blocks(model, torch.randn(2, 3, 32, 32, dtype=torch.float64))}

    assert len(found) == 16 and all(found.values())
    assert found["features.0"] == "it makes (2, 6, 32, 32) of (2, 3, 32, 32)"
    assert found["features.1"] == "it has no weights that a path could lead around"
    assert "no path leads around its weights" in found["features.18"]


def test_a_shortcut_with_weights_is_none():
    """A projection of the same shape stands on the shortcut: without weights nothing is left of the input."""

    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return F.relu(self.one(x)) + self.two(x)

    model = nn.Sequential(Projected(), nn.Linear(4, 2))

    assert "no path leads around" in blocks(model, torch.randn(3, 4))[0].why_not


def test_a_block_that_is_not_called_stays():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x):
            return self.parts[0](x)

    assert [b.why_not for b in blocks(Net(), torch.randn(3, 4))][1] == "it is not called on this example"


# ---- taking them out ------------------------------------------------------------------------------------------------


def fewer(model, gone, path):
    """The outputs' independent definition: the forward pass of a copy whose list is shorter by hand."""
    other = copy.deepcopy(model)
    parent = other.get_submodule(path)
    kept = [child for i, child in enumerate(parent) if i not in gone]
    setattr(other, path, type(parent)(*kept) if isinstance(parent, nn.Sequential) else type(parent)(kept))
    return other


@pytest.mark.parametrize("gone", [(1,), (0, 2), (0, 1, 2)])
def test_gpt_without_blocks_is_a_gpt_of_less_depth(gone):
    model, x = gpt()
    expected = fewer(model, gone, "h")(x).detach()
    shallow = nets.build("gpt_tiny", vocab=11, length=8, dim=12, depth=4 - len(gone), heads=2)

    made = remove_blocks(model, x, [f"h.{i}" for i in gone])

    torch.testing.assert_close(model(x).detach(), expected, rtol=0, atol=1e-12)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in shallow.state_dict().items()}
    assert made.removed == tuple(f"h.{i}" for i in gone) and made.error <= 1e-9 and not made.notes
    assert made.model is model and made.params[1] == sum(p.numel() for p in model.parameters()) < made.params[0]


def test_resnet20_without_three_blocks():
    """One in each stage: 14 layers, with the names of a ResNet-14."""
    model, x = resnet()
    dense = copy.deepcopy(model)

    made = remove_blocks(model, x, ["layer1.0", "layer2.2", "layer3.1"])

    assert set(model.state_dict()) == set(nets.build("resnet_cifar", depth=14, width=4).state_dict())
    assert made.names["layer1.0.conv1.weight"] == "layer1.1.conv1.weight"
    y = dense.relu(dense.bn1(dense.conv1(x)))
    for part in (dense.layer1[1:], dense.layer2[:2], dense.layer3[0], dense.layer3[2]):
        y = part(y)
    torch.testing.assert_close(model(x), dense.fc(y.mean((2, 3))), rtol=0, atol=1e-12)


def test_optimizer_masks_and_training_follow():
    model, x = gpt()
    optimizer = torch.optim.AdamW(
        [{"params": model.h[2].parameters()}, {"params": [p for n, p in model.named_parameters() if "h.2" not in n]}]
    )
    model(x).square().sum().backward()
    optimizer.step()
    masks = Masks({name: p.detach() > 0 for name, p in model.named_parameters() if name.endswith("weight")})
    old, kept = copy.deepcopy(masks), {id(p): optimizer.state[p] for p in model.h[3].parameters()}

    made = remove_blocks(model, x, ["h.2"], optimizer=optimizer)

    own = {id(p) for p in model.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == own
    assert {id(p) for p in optimizer.state} == own and [len(g["params"]) for g in optimizer.param_groups][0] == 0
    assert all(optimizer.state[p] is kept[id(p)] for p in model.h[2].parameters())
    follow = made.masks(masks)
    assert torch.equal(follow["h.2.mlp.c_fc.weight"], old["h.3.mlp.c_fc.weight"])
    assert set(follow) == {n for n, _ in model.named_parameters() if n.endswith("weight")}
    model(x).square().sum().backward()
    optimizer.step()


def test_what_is_called_by_number_keeps_its_place():
    """A network that asks for entries by number gets something that passes its input on."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x, scale):
            return x + scale * self.inner(x), scale

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts, self.last = nn.ModuleList([Part() for _ in range(3)]), Part()

        def forward(self, x):
            for i in range(3):
                x, _ = self.parts[i](x, 2.0)
            return self.last(x, scale=3.0)[0]

    seed_global(0, "numbered")
    model = Net().double()
    x = torch.randn(5, 4, dtype=torch.float64)
    parts = model.parts
    expected = (lambda y: y + 3 * model.last.inner(y))(parts[2](x, 2.0)[0]).detach()

    made = remove_blocks(model, x, ["parts.0", "parts.1"])

    assert isinstance(model.parts[0], Skip) and len(model.parts) == 3 and "keep their places" in made.notes[0]
    torch.testing.assert_close(model(x).detach(), expected, rtol=0, atol=1e-12)
    remove_blocks(model, x, ["last"])
    torch.testing.assert_close(model(x).detach(), parts[2](x, 2.0)[0].detach(), rtol=0, atol=1e-12)


def test_a_named_block_becomes_an_identity():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.head = nn.Linear(4, 6), Inner(), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.block(self.stem(x)))

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, x):
            return x + self.two(F.gelu(self.one(x)))

    model = Net().double()
    x = torch.randn(3, 4, dtype=torch.float64)

    assert movable(model, x) == ["block"]
    remove_blocks(model, x, ["block"])

    assert isinstance(model.block, nn.Identity)
    torch.testing.assert_close(model(x), model.head(model.stem(x)), rtol=0, atol=0)


def test_a_block_that_passes_more_than_its_output_on_stays():
    """The network reads a second result of the block; without it nothing can be proved, and nothing changes."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            y = self.inner(x)
            return x + y, y.sum()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([Part(), Part()])

        def forward(self, x):
            total = 0.0
            for part in self.parts:
                x, y = part(x)
                total = total + y
            return x * total

    model = Net()
    x = torch.randn(3, 4)
    state, optimizer = copy.deepcopy(model.state_dict()), torch.optim.SGD(model.parameters(), lr=0.1)

    with pytest.raises(ModelError, match="nothing was changed"):
        remove_blocks(model, x, ["parts.1"], optimizer=optimizer)

    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and len(model.parts) == 2
    assert len(optimizer.param_groups[0]["params"]) == 4


def test_refusals_name_the_block():
    model, x = resnet()

    with pytest.raises(UsageError, match="no module 'layer1.7'"):
        remove_blocks(model, x, ["layer1.7"])
    with pytest.raises(UsageError, match="name at least one"):
        remove_blocks(model, x, [])
    with pytest.raises(ModelError, match=r"`layer2.0` has to stay: it makes \(2, 8, 8, 8\) of \(2, 4, 16, 16\)"):
        remove_blocks(model, x, ["layer1.0", "layer2.0"])
    assert len(model.layer1) == 3


ZOO = {"resnet_bottleneck": 2, "resnet_preact": 2, "mobilenet_v2": 2, "convnext": 1, "swin": 1, "mlp_mixer": 1,
       "torch_transformer": 1, "gqa_decoder": 1}  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_zoo_blocks_can_be_bypassed_one_by_one(name):
    """Every block that is said to go can be taken out; what is left computes what hooks on the dense network give."""
    model, args = ARCHITECTURES[name]()
    model.eval()
    paths = movable(model, args)

    assert len(paths) >= ZOO[name]
    for path in paths[:2]:
        one = copy.deepcopy(model)
        made = remove_blocks(one, args, [path])
        assert made.error <= 1e-9 and made.params[1] < made.params[0]


# ---- transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert_classifier", "gpt2_lm", "llama_lm", "qwen2_lm", "mistral_lm", "vit_classifier"])
def test_hugging_face_layers_can_go(name):
    """The configuration follows, so that the class builds the same network from it and loads its weights."""
    pytest.importorskip("transformers")
    model, kwargs = HF[name]()
    model.eval()
    layers = [b for b in blocks(model, kwargs) if b.path.endswith(".0") and not b.why_not]
    path = layers[0].path.removesuffix(".0")

    made = remove_blocks(model, kwargs, [f"{path}.0"])

    assert made.error <= 1e-9 and not made.notes and model.config.num_hidden_layers == 1
    assert layers[0].residual is (name != "bert_classifier")
    assert {m.layer_idx for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)} <= {0}
    again = type(model)(copy.deepcopy(model.config)).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(**kwargs).logits, model(**kwargs).logits, rtol=0, atol=0)
        if model.can_generate():
            text = model.generate(kwargs["input_ids"], max_new_tokens=3, do_sample=False, use_cache=True)
            plain = model.generate(kwargs["input_ids"], max_new_tokens=3, do_sample=False, use_cache=False)
            assert torch.equal(text, plain)


def test_encoder_and_decoder_count_their_own_layers():
    """Only the first T5 block has the bias of positions that all others use, so it stays."""
    pytest.importorskip("transformers")
    model, kwargs = HF["t5_seq2seq"]()

    with pytest.raises(ModelError, match="encoder.block.0 the network does not compute"):
        remove_blocks(model, kwargs, ["encoder.block.0"])
    remove_blocks(model, kwargs, ["decoder.block.1"])

    assert (model.config.num_layers, model.config.num_decoder_layers) == (2, 1)
    assert (len(model.encoder.block), len(model.decoder.block)) == (2, 1)


# ---- influence ------------------------------------------------------------------------------------------------------


class Mapped(nn.Module):
    """A block that is a given function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_influence_of_a_scaled_copy_is_0_and_of_a_mirror_2():
    """BI of x → 3x is 0 (card, test c), of x → -x it is 2, of a quarter turn 1."""

    def turned(x):
        return torch.stack([-x[..., 1], x[..., 0]], -1)

    model = nn.Sequential(Mapped(lambda x: 3 * x), Mapped(torch.neg), Mapped(turned))
    x = torch.randn(4, 5, 2, dtype=torch.float64)

    found = block_influence(Task(model, lambda y, _: y.mean(), [(x, x)]), ["0", "1", "2"])

    assert found == pytest.approx({"0": 0.0, "1": 2.0, "2": 1.0}, abs=1e-12)


def test_influence_is_the_mean_over_tokens_of_all_batches():
    model, x = gpt()
    other = (x[:1] + 3) % 11
    rows = []
    for tokens in (x, other):
        h = model.wte(tokens) + model.wpe(torch.arange(6))
        for i, block in enumerate(model.h):
            y = block(h)
            if i == 2:
                rows.append(F.cosine_similarity(h, y, dim=-1).flatten())
            h = y

    found = block_influence(Task(model, lambda y, _: y.mean(), [(x, x), (other, other)]), ["h.2"])

    assert found["h.2"] == pytest.approx(1 - torch.cat(rows).mean().item(), abs=1e-12)


def test_influence_of_maps_is_taken_over_channels_at_pixels():
    model, x = resnet()
    h = model.relu(model.bn1(model.conv1(x)))
    y = model.layer1[0](h)
    rows = F.cosine_similarity(h, y, dim=1)
    rows[(h == y).all(1)] = 1.0

    found = block_influence(Task(model, lambda y, _: y.mean(), [(x, x)]), ["layer1.0"])

    assert found["layer1.0"] == pytest.approx(1 - rows.mean().item(), abs=1e-12)


def test_influence_leaves_padding_out():
    pytest.importorskip("transformers")
    model, kwargs = HF["bert_classifier"]()
    path = "bert.encoder.layer.1"
    short = {"input_ids": kwargs["input_ids"], "attention_mask": kwargs["attention_mask"]}
    seen = {}
    model.get_submodule(path).register_forward_hook(
        lambda _, a, y: seen.update(x=a[0], y=y[0] if isinstance(y, tuple) else y)
    )  # noqa: E501

    found = block_influence(Task(model, lambda y, _: y.mean(), [(short, torch.zeros(2))]), [path])

    rows = F.cosine_similarity(seen["x"].double(), seen["y"].double(), dim=-1)[kwargs["attention_mask"] == 1]
    assert found[path] == pytest.approx(1 - rows.mean().item(), abs=1e-9)
    with pytest.raises(UsageError, match="no module"):
        block_influence(Task(model, lambda y, _: y.mean(), [(short, torch.zeros(2))]), ["bert.encoder.layer.9"])
