"""Small networks for the tests of capture, and what runs a captured one."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from secateur.runtime.capture import NativeSegment
from secateur.runtime.reference import Reference


def run(captured, *inputs):
    """The network's results, segment by segment: NumPy for graphs, torch for the rest."""
    values = {spec.name: given for spec, given in zip(captured.inputs, inputs, strict=True)}
    for segment in captured.segments:
        if isinstance(segment, NativeSegment):
            arrays = [np.asarray(values[spec.name]) for spec in segment.graph.inputs]
            made = [torch.tensor(array) for array in Reference(segment.graph, segment.weights)(*arrays)]
            values.update(zip(segment.graph.outputs, made, strict=True))
        else:
            made = segment.module(*[values[name] for name in segment.inputs])
            values.update(zip(segment.outputs, made, strict=True))
    return [values[name] for name in captured.outputs]


def flat(result):
    """The tensors of a result in torch's order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def other(inputs, batch, seed=1):
    """Inputs of the same kind for another batch."""
    draw = torch.Generator().manual_seed(seed)

    def fresh(x):
        if x.is_floating_point():
            return torch.randn(batch, *x.shape[1:], generator=draw)
        return torch.randint(0, int(x.max()) + 1, (batch, *x.shape[1:]), generator=draw)

    return tuple(fresh(x) for x in inputs)


def assert_same(captured, model, inputs, tolerance=1e-5):
    """The captured network gives what the network in evaluation mode gives."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        wanted = flat(model(*inputs))
    for module, flag in flags.items():
        module.training = flag
    found = run(captured, *inputs)
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted, strict=True):
        assert got.shape == want.shape
        if not want.is_floating_point():
            assert torch.equal(got, want)
            continue
        error = (got - want).abs().max().item() / max(want.abs().max().item(), 1e-30)
        assert error < tolerance, f"off by {error}"


def census(captured):
    """How many nodes there are of each operator, over all native segments."""
    counts = {}
    for segment in captured.segments:
        for node in segment.graph.nodes if isinstance(segment, NativeSegment) else ():
            counts[node.op] = counts.get(node.op, 0) + 1
    return counts


def unsettle(model, seed=0):
    """BatchNorm with statistics and scales that are not those of the start."""
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.copy_(torch.randn(tensor.shape, generator=draw))
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=draw) + 0.5)
    return model


class Call(nn.Module):
    """A function of modules and inputs as a network."""

    def __init__(self, function, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.function = function

    def forward(self, *inputs):
        return self.function(self.parts, *inputs)


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 2, 1)
        self.up = nn.Conv2d(2, 8, 1)

    def forward(self, x):
        x = self.conv(x)
        return x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Row(nn.Module):
    """Convolutions over one dimension with a residual sum."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(3, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm1d(8)
        self.second = nn.Conv1d(8, 8, 3, padding="same", dilation=2)
        self.norm2 = nn.BatchNorm1d(8)
        self.pool = nn.MaxPool1d(2)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = F.relu(self.norm1(self.first(x)))
        x = F.relu(self.norm2(self.second(x)) + x)
        return self.head(self.pool(x).mean(-1))


class ByHand(nn.Module):
    """Attention as nanoGPT writes it; ``fill`` hides what is ahead, and for the first of the ``blind`` everything."""

    def __init__(self, length=6, width=8, heads=2, fill=-math.inf, blind=False):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.heads, self.fill = heads, fill
        self.register_buffer("mask", torch.tril(torch.ones(length, length)).view(1, 1, length, length))
        if blind:
            self.mask[0, 0, 0] = 0

    def forward(self, x):
        n, t, e = x.shape
        q, k, v = (y.view(n, t, self.heads, e // self.heads).transpose(1, 2) for y in self.qkv(x).split(e, dim=2))
        scores = (q @ k.transpose(-2, -1)) * (1 / math.sqrt(e // self.heads))
        scores = scores.masked_fill(self.mask[:, :, :t, :t] == 0, self.fill)
        return self.out((F.softmax(scores, -1) @ v).transpose(1, 2).contiguous().view(n, t, e))


class Attend(nn.Module):
    """nn.MultiheadAttention of a sequence to itself; ``causal`` with the mask that torch makes."""

    def __init__(self, causal=False, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.options = options
        mask = nn.Transformer.generate_square_subsequent_mask(5)
        self.register_buffer("mask", mask if causal else None)

    def forward(self, x):
        return self.attn(x, x, x, attn_mask=self.mask, **self.options)[0]


class Recurrent(nn.Module):
    """A recurrent layer with its last states."""

    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(4, 8, batch_first=True, **options)

    def forward(self, x):
        y, state = self.rnn(x)
        return (y, *state) if isinstance(state, tuple) else (y, state)


class Skip(nn.Module):
    """Down, up by copying pixels, and the first map beside it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 8, 3, 2, 1)
        self.up = nn.Upsample(scale_factor=2)
        self.last = nn.Conv2d(12, 2, 3, padding=1)

    def forward(self, x):
        x = F.silu(self.first(x))
        return self.last(torch.cat([x, self.up(F.silu(self.down(x)))], 1))


class ConvNext(nn.Module):
    """Depthwise, then layers over channels in last place, with a factor for each channel."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.gamma = nn.Parameter(torch.randn(8))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class Sums(nn.Module):
    """Two operators without a counterpart, between layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = torch.cumsum(self.first(x), -1).sin()
        return self.third(torch.cumsum(self.second(x), -1))


def rotate(parts, x):
    """Attention with rotary positions."""
    n, t, _ = x.shape
    q, k, v = (part(x).view(n, t, 2, 4).transpose(1, 2) for part in parts)
    angle = torch.arange(t)[:, None] * torch.tensor([1.0, 0.1])
    cos, sin = (torch.cat([f(angle), f(angle)], -1) for f in (torch.cos, torch.sin))

    def turn(y):
        left, right = y.chunk(2, -1)
        return y * cos + torch.cat([-right, left], -1) * sin

    return F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True).transpose(1, 2).reshape(n, t, 8)


def grouped(parts, x):
    """Attention whose keys and values serve two heads each."""
    n, t, e = x.shape
    q, k, v = (part(x).view(n, t, -1, 2).transpose(1, 2) for part in parts)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).reshape(n, t, e)


def windows(parts, x):
    """Attention within windows of 2 by 2 pixels, as in Swin: (N, 4, 4, 8)."""
    n = x.shape[0]
    y = x.view(n, 2, 2, 2, 2, 8).transpose(2, 3).reshape(-1, 4, 8)
    q, k, v = parts[0](y).reshape(-1, 4, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    bias = torch.arange(32.0).view(1, 2, 4, 4) / 10
    y = (torch.softmax(q * 0.5 @ k.transpose(-2, -1) + bias, -1) @ v).transpose(1, 2).reshape(-1, 4, 8)
    return parts[1](y).view(n, 2, 2, 2, 2, 8).transpose(2, 3).reshape(n, 4, 4, 8) + x


class Cells(nn.Module):
    """An LSTM written out, with its gates in an order of its own and both biases; also the last state or cell."""

    def __init__(self, inner=False):
        super().__init__()
        self.inner = inner
        self.given, self.before = nn.Linear(8, 16), nn.Linear(4, 16)

    def forward(self, x):
        given, states = self.given(x), []
        h = cell = x.new_zeros(x.shape[0], 4)
        for t in range(x.shape[1]):
            keep, leave, enter, new = (self.before(h) + given[:, t]).chunk(4, 1)
            cell = torch.tanh(new) * torch.sigmoid(enter) + cell * torch.sigmoid(keep)
            h = torch.tanh(cell) * torch.sigmoid(leave)
            states.append(h)
        return torch.stack(states, 1), cell if self.inner else h
