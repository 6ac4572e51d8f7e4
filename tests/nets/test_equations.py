# Networks come by name, so the type checker cannot know their attributes.
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false
"""The networks' parts against independent definitions, in double precision."""

import pytest
import torch
from torch import nn

from secateur import nets
from secateur.core.errors import DataError
from secateur.nets.bert import Layer
from secateur.nets.gpt import Block as GptBlock
from secateur.nets.lstm import LSTMLayer
from secateur.nets.resnet_cifar import PadShortcut
from secateur.nets.vit import Block as VitBlock


@pytest.fixture
def random():
    torch.manual_seed(3)
    return torch.Generator().manual_seed(4)


def test_lstm_layer_equals_torch_lstm(random):
    own, reference = LSTMLayer(5, 7).double(), nn.LSTM(5, 7, batch_first=True).double()
    with torch.no_grad():
        reference.weight_ih_l0.copy_(own.input_gates.weight)
        reference.weight_hh_l0.copy_(own.hidden_gates.weight)
        reference.bias_ih_l0.copy_(own.input_gates.bias)
        reference.bias_hh_l0.zero_()
    x = torch.randn(3, 9, 5, dtype=torch.float64, generator=random)
    torch.testing.assert_close(own(x), reference(x)[0])


def test_lstm_classifier_reads_the_last_position(random):
    model = nets.build("lstm", inputs=5, hidden=7, layers=2, outputs=4, classify=True)
    x = torch.randn(3, 9, 5, generator=random)
    torch.testing.assert_close(model(x), model.head(model.layers[1](model.layers[0](x))[:, -1]))


def test_lstm_of_tokens_looks_at_the_past_only(random):
    model = nets.build("lstm", vocab=11, hidden=8)
    tokens = torch.randint(11, (2, 6), generator=random)
    changed = tokens.clone()
    changed[:, 4:] = (tokens[:, 4:] + 1) % 11
    torch.testing.assert_close(model(changed)[:, :4], model(tokens)[:, :4], rtol=0, atol=0)
    assert not torch.equal(model(changed)[:, 4], model(tokens)[:, 4])


def reference_layer(norm_first, activation, eps):
    kind = {"dim_feedforward": 32, "dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    return nn.TransformerEncoderLayer(8, 2, norm_first=norm_first, activation=activation, layer_norm_eps=eps, **kind)


def copy_layer(reference, qkv, proj, one, two, norm1, norm2):
    attention = reference.self_attn
    pairs = [
        *zip((attention.in_proj_weight, attention.in_proj_bias), qkv, strict=True),
        *((mine, theirs) for a, b in ((attention.out_proj, proj), (reference.linear1, one), (reference.linear2, two))
          for mine, theirs in zip(a.parameters(), b.parameters(), strict=True)),
        *((mine, theirs) for a, b in ((reference.norm1, norm1), (reference.norm2, norm2))
          for mine, theirs in zip(a.parameters(), b.parameters(), strict=True)),
    ]  # fmt: skip
    with torch.no_grad():
        for mine, theirs in pairs:
            mine.copy_(theirs)


def scramble(module, random):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random, dtype=torch.float64))
    return module


def test_vit_block_equals_torch_encoder_layer_with_norm_first(random):
    own = scramble(VitBlock(8, 2, 32, 0.0).double(), random)
    reference = reference_layer(True, "gelu", 1e-6)
    qkv = own.attn.qkv.weight, own.attn.qkv.bias
    copy_layer(reference, qkv, own.attn.proj, own.mlp.fc1, own.mlp.fc2, own.norm1, own.norm2)
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=random)
    torch.testing.assert_close(own(x), reference(x))


def test_gpt_block_equals_torch_encoder_layer_under_a_causal_mask(random):
    own = scramble(GptBlock(8, 2, 0.0).double(), random)
    reference = reference_layer(True, lambda x: nn.functional.gelu(x, approximate="tanh"), 1e-5)
    qkv = own.attn.c_attn.weight, own.attn.c_attn.bias
    copy_layer(reference, qkv, own.attn.c_proj, own.mlp.c_fc, own.mlp.c_proj, own.ln_1, own.ln_2)
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=random)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    torch.testing.assert_close(own(x), reference(x, src_mask=mask))


def test_bert_layer_equals_torch_encoder_layer_with_padding(random):
    own = scramble(Layer(8, 2, 0.0).double(), random)
    reference = reference_layer(False, "gelu", 1e-12)
    parts = own.attention.query, own.attention.key, own.attention.value
    qkv = torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])
    copy_layer(reference, qkv, own.attention.output, own.fc1, own.fc2, own.norm1, own.norm2)
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=random)
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    expected = reference(x, src_key_padding_mask=~real)
    torch.testing.assert_close(own(x, real[:, None, None])[real], expected[real])


def test_gpt_logits_do_not_see_later_tokens(small):
    model, tokens = small("gpt_tiny")
    model.double().eval()
    changed = tokens.clone()
    changed[:, 3:] = (tokens[:, 3:] + 1) % 11
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert (after[:, 3:] - before[:, 3:]).abs().amin(dim=(0, 2)).gt(0).any()


def test_gpt_takes_shorter_texts_than_its_length(small):
    model, tokens = small("gpt_tiny")
    model.double().eval()
    torch.testing.assert_close(model(tokens[:, :4]), model(tokens)[:, :4])


def test_tied_gpt_has_one_tensor_that_learns_from_both_ends(small):
    model, tokens = small("gpt_tiny")
    assert model.lm_head.weight is model.wte.weight
    names = [name for name, _ in model.named_parameters()]
    assert "wte.weight" in names and "lm_head.weight" not in names
    model.eval()(tokens).square().mean().backward()
    unseen = [v for v in range(11) if not (tokens == v).any()]
    # Tokens that never come in still get a gradient, through the logits.
    assert unseen and model.wte.weight.grad[unseen].abs().sum() > 0


def test_untied_gpt_has_two_tensors():
    model = nets.build("gpt_tiny", vocab=11, length=6, dim=8, depth=1, tied=False)
    assert model.lm_head.weight is not model.wte.weight
    assert not torch.equal(model.lm_head.weight, model.wte.weight)


def test_bert_does_not_see_padding(small):
    model, tokens = small("bert_tiny")
    model.double().eval()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]] * 3)
    changed = tokens.clone()
    changed[:, 4:] = (tokens[:, 4:] + 1) % 11
    masked = model(tokens, attention_mask=mask)
    torch.testing.assert_close(model(changed, attention_mask=mask), masked)
    torch.testing.assert_close(model(tokens[:, :4]), masked)
    assert not torch.allclose(model(changed), model(tokens))


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float32])
def test_bert_takes_masks_of_any_type_and_all_ones_are_no_mask(small, kind):
    model, tokens = small("bert_tiny")
    model.double().eval()
    torch.testing.assert_close(model(tokens, attention_mask=torch.ones(3, 6).to(kind)), model(tokens))


def test_bert_segments_default_to_zero_and_matter(small):
    model, tokens = small("bert_tiny")
    model.double().eval()
    zeros = torch.zeros_like(tokens)
    assert torch.equal(model(tokens, token_type_ids=zeros), model(tokens))
    assert not torch.allclose(model(tokens, token_type_ids=zeros + 1), model(tokens))


def test_bert_export_keeps_the_mask(small):
    model, tokens = small("bert_tiny")
    model.eval()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]] * 3)
    captured = torch.export.export(model, (tokens,), {"attention_mask": mask}).module()
    for other in (mask, mask.flip(0).roll(1, 1) | 1, torch.ones_like(mask)):
        with torch.no_grad():
            assert torch.equal(captured(tokens, attention_mask=other), model(tokens, attention_mask=other))


def test_shortcut_a_is_every_second_pixel_between_zero_channels(random):
    x = torch.randn(2, 3, 5, 6, generator=random)
    y = PadShortcut(3, 6, 2)(x)
    assert y.shape == (2, 6, 3, 3)
    for channel in range(6):
        expected = x[:, channel - 1, [0, 2, 4]][:, :, [0, 2, 4]] if 1 <= channel <= 3 else torch.zeros(2, 3, 3)
        assert torch.equal(y[:, channel], expected)


def test_resnet50_names_are_those_of_torchvision(meta):
    names = set(meta("resnet50").state_dict())
    some = ["conv1.weight", "bn1.running_var", "layer1.0.conv3.weight", "layer1.0.downsample.0.weight", "fc.bias"]
    some += ["layer1.0.downsample.1.num_batches_tracked", "layer3.5.bn2.weight", "layer4.2.conv3.weight"]
    assert names.issuperset(some)
    assert len(names) == 320 and "layer1.1.downsample.0.weight" not in names


def test_vit_names_are_those_of_timm(meta):
    names = set(meta("vit_tiny", depth=1).state_dict())
    parts = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    expected = {"cls_token", "pos_embed", *(f"{part}.{kind}" for kind in ("weight", "bias") for part in [
        "patch_embed.proj", "norm", "head", *(f"blocks.0.{part}" for part in parts)])}  # fmt: skip
    assert names == expected


def test_lenet5_rounds_its_pooling_up():
    # 15 → 11 → 6 → 2 → 1 pixels: with rounding down the first pooling would leave 5.
    model = nets.build("lenet5", size=15)
    assert model.fc1.in_features == 50 and model(torch.zeros(2, 1, 15, 15)).shape == (2, 10)


def test_transformers_and_lstm_refuse_what_are_not_tokens(small):
    for name in ("bert_tiny", "gpt_tiny", "lstm"):
        model, tokens = small(name)
        with pytest.raises(DataError, match=rf"{name} takes token numbers of shape \(N, T\).*float32"):
            model(tokens.float())
        with pytest.raises(DataError, match=rf"{name}.*\(6,\)"):
            model(tokens[0])


def test_transformers_refuse_longer_texts_and_name_the_cure(small):
    for name in ("bert_tiny", "gpt_tiny"):
        model, tokens = small(name)
        with pytest.raises(DataError, match="texts of 12 tokens need length=12, not length=6"):
            model(torch.cat((tokens, tokens), dim=1))


def test_bert_without_segments_refuses_them():
    model = nets.build("bert_tiny", vocab=11, length=6, dim=8, segments=0)
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    assert model(tokens).shape == (2, 2)
    with pytest.raises(DataError, match="Set segments=2"):
        model(tokens, token_type_ids=tokens)


def test_lstm_refuses_sequences_of_other_vectors_and_empty_ones():
    model = nets.build("lstm", inputs=5, hidden=7, outputs=4)
    with pytest.raises(DataError, match=r"\(N, T, 5\), not \(2, 9, 6\)"):
        model(torch.zeros(2, 9, 6))
    with pytest.raises(DataError, match="length 0"):
        model(torch.zeros(2, 0, 5))
