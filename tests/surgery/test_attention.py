"""Attention with fewer heads: torch's own with all of them, and with heads gone the dense one without their columns."""

import copy

import pytest
import torch
from torch import nn

from secateur.surgery import analyse, shrink
from secateur.surgery.attention import ThinAttention

CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def attention(seed=0, **options):
    torch.manual_seed(seed)
    return nn.MultiheadAttention(16, 4, **options).double().eval()


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def padding(b, s):
    return torch.arange(s).expand(b, s) >= torch.tensor([[s], [s - 2], [2]])


MASKS = {
    "none": lambda b, t, s: {},
    "bool": lambda b, t, s: {"attn_mask": torch.ones(t, s).triu(1).bool()},
    "float": lambda b, t, s: {"attn_mask": randn(t, s)},
    "each head": lambda b, t, s: {"attn_mask": randn(b * 4, t, s)},
    "padding": lambda b, t, s: {"key_padding_mask": padding(b, s)},
    "both": lambda b, t, s: {"attn_mask": torch.ones(t, s).triu(1).bool(), "key_padding_mask": padding(b, s)},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}, {"kdim": 6, "vdim": 5}])
@pytest.mark.parametrize("weights", [True, False])
def test_with_all_heads_it_is_torchs_own(mask, options, weights):
    own = attention(**options)
    ours = copy.deepcopy(own)
    ThinAttention.adopt(ours)
    assert list(ours.state_dict()) == list(own.state_dict())
    b, t = 3, 5
    q, k, v = randn(b, t, 16), randn(b, t, options.get("kdim", 16)), randn(b, t, options.get("vdim", 16))
    if not options.get("batch_first"):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    given = MASKS[mask](b, t, t)
    with torch.no_grad():
        wanted, seen = own(q, k, v, need_weights=weights, **given)
        found, shown = ours(q, k, v, need_weights=weights, **given)
    torch.testing.assert_close(found, wanted, **CLOSE)
    if weights:
        torch.testing.assert_close(shown, seen, **CLOSE)
    else:
        assert shown is None


def test_without_a_batch_and_causal():
    own = attention()
    ours = copy.deepcopy(own)
    ThinAttention.adopt(ours)
    x, mask = randn(5, 16), nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    with torch.no_grad():
        wanted = own(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
        torch.testing.assert_close(ours(x, x, x, is_causal=True, need_weights=False)[0], wanted, **CLOSE)
        shown, seen = (m(x, x, x, average_attn_weights=False)[1] for m in (ours, own))
    torch.testing.assert_close(shown, seen, **CLOSE)


def test_heads_of_an_encoder_go_and_it_stays_an_encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=True)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    x = randn(3, 6, 16)
    dense = copy.deepcopy(net)
    cut = shrink(net, x, {"layers.0.self_attn.in_proj_weight": [1, 3]})
    assert cut.model is net and not cut.rewritten
    assert net.layers[0].self_attn.in_proj_weight.shape == (24, 16) and net.layers[0].self_attn.num_heads == 2
    assert type(net.layers[1].self_attn) is nn.MultiheadAttention
    with torch.no_grad():
        dense.layers[0].self_attn.out_proj.weight.view(16, 4, 4)[:, [1, 3]] = 0.0
        torch.testing.assert_close(net(x), dense(x), **CLOSE)
    assert bool(net.train()(x).isfinite().all())
    assert len(analyse(net.eval(), x).group("layers.0.self_attn.in_proj_weight")) == 2
