"""Captured networks compute what torch computes, in few operators."""

import importlib.util
import math
import pathlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.nets import build
from secateur.runtime.capture import capture

_spec = importlib.util.spec_from_file_location("capture_kit", pathlib.Path(__file__).with_name("capture_kit.py"))
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)
Call = kit.Call

IMAGE, TOKENS = (2, 3, 32, 32), (2, 16)
TEXT = {"vocab": 10, "length": 16}


def example(shape):
    """Numbers for an image or a sequence, token numbers for (N, T) of a text."""
    if shape == TOKENS:
        return torch.randint(0, 10, shape, generator=torch.Generator().manual_seed(0))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


NETS = {
    "mlp": ("mlp", {}, (2, 784), {"linear": 3}),
    "mlp-norm": ("mlp", {"batch_norm": True, "activation": "silu"}, (2, 784), {"linear": 3}),
    "mlp-leaky": ("mlp", {"activation": "leaky_relu"}, (2, 784), {"linear": 3, "binary": 4, "const": 1}),
    "mlp-elu": ("mlp", {"activation": "elu"}, (2, 784), None),
    "lenet5": ("lenet5", {}, (2, 1, 28, 28), {"conv": 2, "max_pool": 2, "reshape": 1, "linear": 2}),
    "lenet5-odd": ("lenet5", {"size": 27}, (2, 1, 27, 27), {"conv": 2, "max_pool": 2, "reshape": 1, "linear": 2}),
    "vgg11": ("vgg11", {"width": 0.25}, IMAGE, {"conv": 8, "max_pool": 5, "reduce": 1, "linear": 1}),
    "resnet20": ("resnet20", {}, IMAGE, {"conv": 21, "reduce": 1, "linear": 1}),
    "resnet20-B": ("resnet20", {"shortcut": "B"}, IMAGE, {"conv": 21, "reduce": 1, "linear": 1}),
    "wide": ("wide_resnet", {"depth": 10, "widen": 1}, IMAGE, {"conv": 9, "affine": 4, "reduce": 1, "linear": 1}),
    "resnet18": ("resnet18", {"width": 8}, IMAGE, {"conv": 20, "max_pool": 1, "reduce": 1, "linear": 1}),
    "resnet50": ("resnet50", {"width": 8}, IMAGE, {"conv": 53, "max_pool": 1, "reduce": 1, "linear": 1}),
    "mobilenet_v1": ("mobilenet_v1", {"width": 0.25}, IMAGE, {"conv": 27, "reduce": 1, "linear": 1}),
    "mobilenet_v2": ("mobilenet_v2", {"width": 0.25}, IMAGE, {"conv": 52, "reduce": 1, "linear": 1}),
    "vit": ("vit_tiny", {"depth": 2}, IMAGE, {
        "conv": 1, "reshape": 2, "permute": 1, "const": 2, "expand": 1, "concat": 1, "binary": 1, "layer_norm": 5,
        "linear": 9, "slice": 7, "attention": 2,
    }),
    "bert": ("bert_tiny", TEXT, TOKENS, {
        "embedding": 1, "const": 2, "binary": 2, "layer_norm": 5, "linear": 14, "attention": 2, "slice": 1,
        "reshape": 1,
    }),
    "gpt": ("gpt_tiny", {**TEXT, "depth": 2}, TOKENS, {
        "embedding": 1, "const": 1, "binary": 1, "layer_norm": 5, "linear": 9, "slice": 6, "attention": 2,
    }),
    "lstm": ("lstm", {"vocab": 10, "layers": 2, "hidden": 16}, TOKENS, {"embedding": 1, "lstm": 2, "linear": 1}),
    "lstm-class": ("lstm", {"inputs": 3, "classify": True, "outputs": 4}, (2, 5, 3), {
        "lstm": 1, "slice": 1, "reshape": 1, "linear": 1,
    }),
}  # fmt: skip


@pytest.mark.parametrize("case", NETS)
def test_every_network_of_the_library_is_one_graph(case):
    """Results agree with torch for the example's batch and others, and nothing but layers is left."""
    name, options, shape, wanted = NETS[case]
    torch.manual_seed(0)
    model = kit.unsettle(build(name, **options))
    inputs = (example(shape),)

    captured = capture(model, inputs, strict=True)

    assert len(captured.segments) == 1 and captured.notes == ()
    assert wanted is None or kit.census(captured) == wanted
    for batch in (None, 1, 3):
        kit.assert_same(captured, model, inputs if batch is None else kit.other(inputs, batch))


SEQUENCE, MAP = (2, 5, 8), (2, 8, 8, 8)
LAYERS = {
    "squeeze-excite": (kit.SqueezeExcite, (2, 3, 8, 8), {"conv": 3, "adaptive_avg_pool": 1, "binary": 1}),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Hardswish(), nn.Conv2d(8, 16, 1, groups=4),
            nn.Hardsigmoid(), nn.Conv2d(16, 4, 3, dilation=2, padding=2, stride=2), nn.Sigmoid(),
        ), MAP, {"conv": 3},
    ),
    "row": (kit.Row, (2, 3, 12), {"reshape": 2, "conv": 2, "max_pool": 1, "reduce": 1, "linear": 1}),
    "even-same": (lambda: nn.Conv2d(8, 3, (4, 2), padding="same"), MAP, {"conv": 1}),
    "norms": (
        lambda: nn.Sequential(
            nn.GroupNorm(4, 8), nn.InstanceNorm2d(8, affine=True), nn.LayerNorm((8, 8)), nn.RMSNorm(8)
        ),
        MAP, {"group_norm": 2, "layer_norm": 1, "rms_norm": 1},
    ),
    "tracked-instance": (
        lambda: nn.Sequential(
            nn.Conv2d(8, 4, 1), kit.unsettle(nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
        ), MAP, {"conv": 1},
    ),
    "pools": (
        lambda: nn.Sequential(
            nn.AvgPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(2, 1, 1),
            nn.AdaptiveMaxPool2d(1),
        ), MAP, {"avg_pool": 2, "max_pool": 1, "reduce": 1},
    ),
    "uneven-windows": (lambda: nn.AdaptiveAvgPool2d((3, 5)), MAP, {"adaptive_avg_pool": 1}),
    "gelu-mlp": (
        lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(), nn.Linear(16, 8), nn.Tanh()),
        SEQUENCE, {"linear": 2},
    ),
    "swish-by-hand": (
        lambda: Call(lambda m, x: (y := m[0](x)) * torch.sigmoid(y), nn.Linear(8, 8)), SEQUENCE, {"linear": 1},
    ),
    "factor": (lambda: Call(lambda m, x: 3 - m[0](x) / 4, nn.Linear(8, 8)), SEQUENCE, {"linear": 1}),
    "heads": (lambda: kit.Attend(need_weights=False), SEQUENCE, {"linear": 2, "slice": 3, "attention": 1}),
    "heads-weights": (lambda: kit.Attend(need_weights=True), SEQUENCE, {"linear": 2, "slice": 3, "attention": 1}),
    "heads-causal": (lambda: kit.Attend(causal=True), SEQUENCE, {"linear": 2, "slice": 3, "attention": 1}),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        SEQUENCE, {"linear": 4, "slice": 3, "attention": 1, "layer_norm": 2},
    ),
    "encoders": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        SEQUENCE, {"linear": 8, "slice": 6, "attention": 2, "layer_norm": 4},
    ),
    "by-hand": (kit.ByHand, (2, 6, 8), {"linear": 2, "slice": 3, "attention": 1}),
    "both-scaled": (
        lambda: Call(lambda m, x: torch.softmax((m[0](x) * 0.6) @ (m[1](x) / 2).mT * 0.9, -1) @ x,
                     nn.Linear(8, 8), nn.Linear(8, 8)),
        SEQUENCE, {"linear": 2, "attention": 1},
    ),
    "by-hand-finite": (lambda: kit.ByHand(fill=-1e9), (2, 6, 8), {"linear": 2, "slice": 3, "attention": 1}),
    "by-hand-blind": (lambda: kit.ByHand(fill=-1e9, blind=True), (2, 6, 8), None),
    "by-hand-soft": (lambda: kit.ByHand(fill=-2.0), (2, 6, 8), None),
    "rotary": (lambda: Call(kit.rotate, *(nn.Linear(8, 8) for _ in range(3))), SEQUENCE, None),
    "grouped": (lambda: Call(kit.grouped, nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)), SEQUENCE, None),
    "windows": (lambda: Call(kit.windows, nn.Linear(8, 24), nn.Linear(8, 8)), (2, 4, 4, 8), None),
    "interleaved": (
        lambda: Call(
            lambda m, x: F.scaled_dot_product_attention(
                *m[0](x).view(-1, 5, 2, 3, 4).permute(3, 0, 2, 1, 4).unbind(0)
            ).transpose(1, 2).flatten(2), nn.Linear(8, 24),
        ), SEQUENCE, None,
    ),
    "gru": (lambda: kit.Recurrent(nn.GRU), (2, 5, 4), {"gru": 1}),
    "gru-bare": (lambda: kit.Recurrent(nn.GRU, bias=False), (2, 5, 4), {"gru": 1}),
    "lstm-both-ways": (lambda: kit.Recurrent(nn.LSTM, num_layers=2, bidirectional=True), (2, 5, 4), {"lstm": 1}),
    "cells": (kit.Cells, SEQUENCE, {"lstm": 1, "slice": 1, "reshape": 1}),
    "cells-inside": (lambda: kit.Cells(inner=True), SEQUENCE, None),
    "rnn": (lambda: kit.Recurrent(nn.RNN), (2, 5, 4), None),
    "skip": (kit.Skip, (2, 3, 8, 8), {"conv": 3, "reshape": 2, "expand": 1, "concat": 1}),
    "convnext": (kit.ConvNext, MAP, {"conv": 1, "permute": 2, "layer_norm": 1, "linear": 2, "binary": 1}),
    "activations": (
        lambda: nn.Sequential(
            nn.PReLU(8), nn.Mish(), nn.Softplus(2.0), nn.SELU(), nn.CELU(0.7), nn.ELU(0.3), nn.GLU(1), nn.Hardtanh(),
            nn.LogSigmoid(), nn.Softsign(), nn.Tanhshrink(), nn.ReLU6(), nn.LogSoftmax(1), nn.PixelShuffle(2),
        ), MAP, None,
    ),
    "reductions": (
        lambda: Call(
            lambda m, x: F.normalize(x, dim=-1) + x.std(-1, keepdim=True) + x.var(1, keepdim=True, unbiased=False)
            + x.max(1, keepdim=True)[0] - x.amin(-1, keepdim=True) + torch.logsumexp(x, 1, keepdim=True)
            + x.sum() / x.mean((1, 2), keepdim=True),
        ), SEQUENCE, None,
    ),
    "products": (
        lambda: Call(
            lambda m, x: torch.einsum("nth,oh->nto", x, m[0].weight) + x @ m[0].weight + x @ x.transpose(1, 2) @ x
            + torch.baddbmm(x, x @ x.mT, x, alpha=0.5) + (x @ m[0].bias)[..., None], nn.Linear(8, 8),
        ), SEQUENCE, None,
    ),
    "sums-of-layers": (
        lambda: Call(
            lambda m, x: F.relu((y := m[0](x)) + y + m[1](x)) + m[1](x) / torch.arange(1.0, 9),
            nn.Linear(8, 8), nn.Linear(8, 8),
        ), SEQUENCE, None,
    ),
    "norm-over-tokens": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(5), nn.ReLU()), SEQUENCE, {"linear": 1, "affine": 1},
    ),
    "norm-turned": (
        lambda: Call(lambda m, x: m[1](m[0](x).transpose(1, 2)).transpose(1, 2), nn.Linear(8, 8), nn.BatchNorm1d(8)),
        SEQUENCE, {"linear": 1, "affine": 1, "permute": 2},
    ),
    "norm-behind": (
        lambda: nn.Sequential(nn.Conv2d(8, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), MAP, {"conv": 1, "affine": 1},
    ),
    "moves": (
        lambda: Call(
            lambda m, x: F.pad(
                x.roll((1, -2), (1, 2)).repeat(1, 2, 3).repeat_interleave(2, 1)[:, 1::3], (1, -2, 2, 0), value=2.0
            )
        ), SEQUENCE, None,
    ),
    "known": (
        lambda: Call(
            lambda m, x: torch.where(torch.arange(5)[:, None] > 2, x, 7.0).masked_fill(torch.arange(8) > 6, -3.0)
            + torch.zeros_like(x) + torch.cat([x.new_ones(x.shape[0], 1, 8), x[:, 1:]], 1) + torch.linspace(0, 1, 8)
        ), SEQUENCE, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYERS)
def test_layers_agree_with_torch(case):
    """Each kind of layer, at the example's batch and at others."""
    make, shape, wanted = LAYERS[case]
    torch.manual_seed(0)
    model = kit.unsettle(make())
    inputs = (example(shape),)

    captured = capture(model, inputs, strict=True)

    assert len(captured.segments) == 1 and captured.notes == ()
    assert wanted is None or kit.census(captured) == wanted
    for batch in (None, 1, 3):
        kit.assert_same(captured, model, inputs if batch is None else kit.other(inputs, batch))


def attention_of(captured):
    """The attributes of the only attention."""
    (node,) = [node for node in captured.graph.nodes if node.op == "attention"]
    return node.attrs


@pytest.mark.parametrize("model", [kit.ByHand(), kit.ByHand(fill=-1e9), kit.Attend(causal=True)])
def test_masks_of_the_past_become_a_flag(model):
    """Whatever writes the triangle, the graph says causal, and keeps torch's scale and heads."""
    length = 6 if isinstance(model, kit.ByHand) else 5
    attrs = attention_of(capture(model, torch.randn(2, length, 8)))

    assert attrs["causal"] and attrs["heads"] == 2
    assert attrs["scale"] == pytest.approx(1 / math.sqrt(4), rel=1e-12)


@pytest.mark.parametrize("model", [kit.ByHand(fill=-2.0), kit.ByHand(fill=-1e9, blind=True)])
def test_a_fill_that_is_no_mask_stays_a_fill(model):
    """At -2 positions ahead still count; a row of nothing but -1e9 sees everything alike."""
    assert "attention" not in kit.census(capture(model, torch.randn(2, 6, 8)))


def test_a_recurrence_whose_inside_is_read_stays_written_out():
    """The cell is no result of every lstm's positions."""
    assert "lstm" not in kit.census(capture(kit.Cells(inner=True), torch.randn(2, 5, 8)))


@pytest.mark.parametrize("seed", range(24))
def test_any_chain_of_views_agrees_with_torch(seed):
    """Random views with layers between them: the algebra of views against torch's own."""
    draw = torch.Generator().manual_seed(seed)

    def pick(n):
        return int(torch.randint(0, n, (1,), generator=draw))

    moves, shape = [], [2, 3, 4, 6]
    for _ in range(9):
        kind, rank = pick(7), len(shape)
        if kind == 0 and rank > 1:
            a, b = pick(rank), pick(rank)
            shape[a], shape[b] = shape[b], shape[a]
            moves.append(lambda x, m, a=a, b=b: x.transpose(a, b))
        elif kind == 1 and rank > 2:
            at = pick(rank - 1)
            shape[at : at + 2] = [shape[at] * shape[at + 1]]
            moves.append(lambda x, m, at=at: x.flatten(at, at + 1))
        elif kind == 2 and rank < 6:
            at = pick(rank)
            parts = [d for d in (2, 3) if shape[at] % (d * 2) == 0 and shape[at] > 2]
            if parts:
                shape[at : at + 1] = [shape[at] // parts[0], parts[0]]
                moves.append(lambda x, m, at=at, d=parts[0]: x.unflatten(at, (-1, d)))
        elif kind == 3 and shape[-1] == 6:
            moves.append(lambda x, m: F.relu(m[0](x)))
        elif kind == 4:
            at = pick(rank)
            if shape[at] in (3, 6):
                start, shape[at] = (1, 2) if shape[at] == 3 else (2, 4)
                moves.append(lambda x, m, at=at, start=start, length=shape[at]: x.narrow(at, start, length))
        elif kind == 5:
            moves.append(lambda x, m: x + torch.sigmoid(x) * torch.arange(1.0, x.shape[-1] + 1))
        elif kind == 6:
            moves.append(lambda x, m: x.unsqueeze(1).softmax(-1).squeeze(1))

    def chain(parts, x):
        for move in moves:
            x = move(x, parts)
        return x.tanh() * 2.0

    torch.manual_seed(seed)
    model = Call(chain, nn.Linear(6, 6))
    inputs = (torch.randn(2, 3, 4, 6, generator=draw),)
    captured = capture(model, inputs)

    assert captured.parts == () or "a part of the batch" in captured.notes[-1]  # narrowed where the batch is merged in
    kit.assert_same(captured, model, inputs)
    if not captured.notes:
        kit.assert_same(captured, model, kit.other(inputs, 5))
