"""Random networks for a fuzzer: a drawn list of steps over feature maps or token sequences, and a module that runs it.

``random_network(random)`` is a pure function of the given ``random.Random``: structure, weights and inputs all follow
from it. A step reads earlier values by their index, so branches, skips and shared modules need no code of their own.
"""

import dataclasses
import operator
import random as random_module
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from tests.surgery.zoo import stir

WIDTHS = (16, 24, 32, 40, 48)
WIDEST = 72
MAP, TOKENS, CODES = "map", "tokens", "codes"


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation: its name, the indices of the values it reads, its module's name and its literal settings."""

    op: str
    inputs: tuple[int, ...]
    part: str = ""
    settings: tuple = ()


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a value is: channels and side of a map, or features and length of a sequence."""

    kind: str
    width: int
    extent: int


class Attention(nn.Module):
    """Self-attention with fused or separate projections; ``kv_heads < heads`` shares keys among queries."""

    def __init__(self, dim, heads, kv_heads, head_dim, fused, explicit):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.explicit = heads, kv_heads, head_dim, explicit
        self.qkv = None
        if fused:
            self.qkv = nn.Linear(dim, 3 * heads * head_dim)
        else:
            self.q = nn.Linear(dim, heads * head_dim, bias=False)
            self.k = nn.Linear(dim, kv_heads * head_dim)
            self.v = nn.Linear(dim, kv_heads * head_dim)
        self.out = nn.Linear(heads * head_dim, dim)

    def forward(self, x):
        B, T, _ = x.shape
        if self.qkv is not None:
            q, k, v = self.qkv(x).reshape(B, T, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q = self.q(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)
            k = self.k(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
            v = self.v(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
            if self.kv_heads != self.heads:
                k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
                v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        if self.explicit:
            x = ((q @ k.transpose(-2, -1)) * self.head_dim**-0.5).softmax(-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).reshape(B, T, self.heads * self.head_dim))


class GLU(nn.Module):
    """A gated unit over the last axis: one projection and a chunk, or two projections."""

    def __init__(self, dim, hidden, fused):
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden if fused else hidden)
        self.gate = None if fused else nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x):
        if self.gate is None:
            value, gate = self.up(x).chunk(2, dim=-1)
        else:
            value, gate = self.up(x), self.gate(x)
        return self.down(value * F.silu(gate))


class SqueezeExcite(nn.Module):
    def __init__(self, width, squeeze):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, squeeze), nn.Linear(squeeze, width)

    def forward(self, x):
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class HeadScale(nn.Module):
    """Views features as heads, scales each head and views them back."""

    def __init__(self, heads, head_dim):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.scale = nn.Parameter(torch.rand(heads, 1) + 0.5)

    def forward(self, x):
        B, T, _ = x.shape
        x = x.view(B, T, self.heads, self.head_dim) * self.scale
        return x.view(B, T, self.heads * self.head_dim)


class ChannelLast(nn.Module):
    """Runs a module over the channels of a map as its last axis."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SwapAxes(nn.Module):
    """Runs a module over the length of a sequence in place of its features."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


def shuffle(x, groups):
    B, C, H, W = x.shape
    return x.view(B, groups, C // groups, H, W).transpose(1, 2).reshape(B, C, H, W)


def cat(*xs_and_dim):
    *xs, dim = xs_and_dim
    return torch.cat(xs, dim=dim)


def to_map(x, side):
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], side, side)


OPERATIONS: dict[str, Callable] = {
    "add": lambda a, b: a + b,
    "scaled_add": lambda a, b: torch.add(a, b, alpha=0.5),
    "mul": lambda a, b: a * torch.sigmoid(b),
    "cat": cat,
    "chunk": lambda x, parts, dim: x.chunk(parts, dim=dim),
    "split": lambda x, sizes, dim: torch.split(x, list(sizes), dim=dim),
    "item": operator.getitem,
    "shuffle": shuffle,
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "avg_pool": lambda x: F.avg_pool2d(x, 2),
    "stride": lambda x: x[:, :, ::2, ::2],
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False),
    "to_tokens": lambda x: x.flatten(2).transpose(1, 2),
    "to_map": to_map,
    "narrow": lambda x, width, dim: x.narrow(dim, 0, width),
    "global_mean": lambda x: x.mean((-2, -1)),
    "global_max": lambda x: x.amax((2, 3)),
    "pool_flatten": lambda x: torch.flatten(F.adaptive_avg_pool2d(x, 1), 1),
    "flatten": lambda x: x.flatten(1),
    "view_flat": lambda x: x.view(x.size(0), -1) if x.is_contiguous() else x.reshape(x.size(0), -1),
    "token_mean": lambda x: x.mean(dim=1),
    "first_token": lambda x: x[:, 0],
    "last_token": lambda x: x[:, -1, :],
}


class RandomNetwork(nn.Module):
    """Runs ``steps`` in order over a list of values and returns those named by ``outputs``."""

    def __init__(self, steps: list[Step], parts: dict[str, nn.Module], outputs: tuple[int, ...]):
        super().__init__()
        self.steps = steps
        self.parts = nn.ModuleDict(parts)
        self.outputs = outputs

    def forward(self, x):
        values = [x]
        for step in self.steps:
            inputs = [values[i] for i in step.inputs]
            if step.op == "part":
                values.append(self.parts[step.part](*inputs))
            else:
                values.append(OPERATIONS[step.op](*inputs, *step.settings))
        results = tuple(values[i] for i in self.outputs)
        return results[0] if len(results) == 1 else results


class Builder:
    """Draws steps. Methods that draw a block take the index of a value and return the index of the block's result."""

    def __init__(self, random: random_module.Random, start: Shape):
        self.random = random
        self.steps: list[Step] = []
        self.parts: dict[str, nn.Module] = {}
        self.shapes: list[Shape] = [start]

    # -- bookkeeping ----------------------------------------------------------

    def op(self, name: str, inputs: tuple[int, ...], shape: Shape, *settings) -> int:
        self.steps.append(Step(name, inputs, settings=settings))
        self.shapes.append(shape)
        return len(self.shapes) - 1

    def part(self, module: nn.Module, at: int, width: int | None = None, extent: int | None = None) -> int:
        name = f"p{len(self.parts)}_{type(module).__name__.lower()}"
        self.parts[name] = module
        old = self.shapes[at]
        shape = Shape(old.kind, old.width if width is None else width, old.extent if extent is None else extent)
        self.steps.append(Step("part", (at,), name))
        self.shapes.append(shape)
        return len(self.shapes) - 1

    def again(self, at: int) -> int:
        """Applies the last drawn module a second time."""
        step = next(step for step in reversed(self.steps) if step.op == "part")
        self.steps.append(Step("part", (at,), step.part))
        self.shapes.append(self.shapes[at])
        return len(self.shapes) - 1

    def channel_axis(self, at: int) -> int:
        return 1 if self.shapes[at].kind == MAP else -1

    def pick_groups(self, width: int) -> int:
        return self.random.choice([g for g in (2, 4, 8) if width % g == 0] or [1])

    def activation(self) -> nn.Module:
        return self.random.choice([nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.Tanh])()

    # -- blocks over maps -----------------------------------------------------

    def conv(self, at: int) -> int:
        old, new = self.shapes[at].width, self.random.choice(WIDTHS)
        k = self.random.choice([1, 3, 3])
        at = self.part(nn.Conv2d(old, new, k, padding=k // 2, bias=self.random.random() < 0.5), at, new)
        if self.random.random() < 0.7:
            at = self.part(nn.BatchNorm2d(new), at)
        return self.part(self.activation(), at)

    def depthwise(self, at: int) -> int:
        width = self.shapes[at].width
        times = self.random.choice([1, 1, 2])
        at = self.part(nn.Conv2d(width, times * width, 3, padding=1, groups=width), at, times * width)
        if times == 2 or self.random.random() < 0.5:
            new = self.random.choice(WIDTHS)
            at = self.part(nn.Conv2d(times * width, new, 1), at, new)
        return at

    def grouped_conv(self, at: int) -> int:
        width, new = self.shapes[at].width, self.random.choice((16, 24, 32, 48))
        groups = self.random.choice([g for g in (2, 4, 8) if width % g == 0 and new % g == 0] or [1])
        at = self.part(nn.Conv2d(width, new, 3, padding=1, groups=groups, bias=False), at, new)
        return self.part(nn.BatchNorm2d(new), at)

    def channel_shuffle(self, at: int) -> int:
        return self.op("shuffle", (at,), self.shapes[at], self.pick_groups(self.shapes[at].width))

    def squeeze_excite(self, at: int) -> int:
        return self.part(SqueezeExcite(self.shapes[at].width, self.random.choice((4, 8))), at)

    def map_norm(self, at: int) -> int:
        width = self.shapes[at].width
        kind = self.random.randrange(4)
        if kind == 0:
            return self.part(nn.GroupNorm(self.pick_groups(width), width), at)
        if kind == 1:
            return self.part(ChannelLast(nn.LayerNorm(width)), at)
        return self.part(nn.BatchNorm2d(width) if kind == 2 else nn.InstanceNorm2d(width, affine=True), at)

    def map_mlp(self, at: int) -> int:
        width, hidden = self.shapes[at].width, self.random.choice(WIDTHS)
        if self.random.random() < 0.4:
            return self.part(ChannelLast(GLU(width, hidden, self.random.random() < 0.5)), at)
        at = self.part(nn.Conv2d(width, hidden, 1), at, hidden)
        at = self.part(self.activation(), at)
        return self.part(nn.Conv2d(hidden, width, 1), at, width)

    def map_attention(self, at: int) -> int:
        shape = self.shapes[at]
        if shape.extent > 8:
            return self.conv(at)
        tokens = Shape(TOKENS, shape.width, shape.extent**2)
        at = self.attention(self.op("to_tokens", (at,), tokens))
        return self.op("to_map", (at,), shape, shape.extent)

    def u_shape(self, at: int) -> int:
        """Down, a conv, up again, and a concat with what was there before."""
        shape = self.shapes[at]
        if shape.extent % 2 or shape.extent < 4:
            return self.conv(at)
        low = self.conv(self.down(at))
        width = self.shapes[low].width
        if self.random.random() < 0.5:
            new = self.random.choice(WIDTHS)
            up = self.part(nn.ConvTranspose2d(width, new, 2, stride=2), low, new, shape.extent)
        else:
            up = self.op(self.random.choice(["nearest", "bilinear"]), (low,), Shape(MAP, width, shape.extent))
        return self.concat([at, up])

    def down(self, at: int) -> int:
        shape = self.shapes[at]
        kind = self.random.choice(["max_pool", "avg_pool", "stride", "conv"])
        if kind == "conv":
            new = self.random.choice(WIDTHS)
            return self.part(nn.Conv2d(shape.width, new, 3, 2, 1), at, new, shape.extent // 2)
        return self.op(kind, (at,), Shape(MAP, shape.width, shape.extent // 2))

    def pool(self, at: int) -> int:
        shape = self.shapes[at]
        return self.down(at) if shape.extent % 2 == 0 and shape.extent >= 4 else self.map_norm(at)

    # -- blocks over token sequences ------------------------------------------

    def linear(self, at: int) -> int:
        old, new = self.shapes[at].width, self.random.choice(WIDTHS)
        return self.part(self.activation(), self.part(nn.Linear(old, new), at, new))

    def attention(self, at: int) -> int:
        width, heads = self.shapes[at].width, self.random.choice((1, 2, 3, 4))
        head_dim = self.random.choice((4, 6, 8, 12))
        fused, explicit = self.random.random() < 0.5, self.random.random() < 0.5
        kv_heads = heads if fused else self.random.choice([h for h in (1, 2, 3, 4) if heads % h == 0])
        return self.part(Attention(width, heads, kv_heads, head_dim, fused, explicit), at)

    def token_mlp(self, at: int) -> int:
        width, hidden = self.shapes[at].width, self.random.choice(WIDTHS)
        if self.random.random() < 0.4:
            return self.part(GLU(width, hidden, self.random.random() < 0.5), at)
        inner = nn.Sequential(nn.Linear(width, hidden), self.activation(), nn.Linear(hidden, width))
        return self.part(inner, at)

    def token_norm(self, at: int) -> int:
        width = self.shapes[at].width
        module = self.random.choice([nn.LayerNorm(width), nn.RMSNorm(width), SwapAxes(nn.BatchNorm1d(width))])
        return self.part(module, at)

    def token_mixing(self, at: int) -> int:
        length, hidden = self.shapes[at].extent, self.random.choice((8, 12, 16))
        inner = nn.Sequential(nn.Linear(length, hidden), self.activation(), nn.Linear(hidden, length))
        return self.part(SwapAxes(inner), at)

    def token_conv(self, at: int) -> int:
        width, new = self.shapes[at].width, self.random.choice(WIDTHS)
        return self.part(SwapAxes(nn.Conv1d(width, new, 3, padding=1)), at, new)

    def head_scale(self, at: int) -> int:
        width = self.shapes[at].width
        heads = self.random.choice([h for h in (2, 4, 8) if width % h == 0] or [1])
        return self.part(HeadScale(heads, width // heads), at)

    # -- blocks over either ---------------------------------------------------

    def project(self, at: int, width: int) -> int:
        """A linear map over channels to the given width, and nothing where the width is right already."""
        old = self.shapes[at]
        if old.width == width:
            return at
        return self.part(nn.Conv2d(old.width, width, 1) if old.kind == MAP else nn.Linear(old.width, width), at, width)

    def concat(self, items: list[int]) -> int:
        shape = self.shapes[items[0]]
        total = sum(self.shapes[i].width for i in items)
        at = self.op("cat", tuple(items), Shape(shape.kind, total, shape.extent), self.channel_axis(items[0]))
        return self.project(at, self.random.choice(WIDTHS)) if total > WIDEST else at

    def residual(self, at: int, depth: int) -> int:
        body = self.chain(at, depth + 1, self.random.choice((1, 2, 3)))
        join = self.random.choice(["add", "add", "add", "scaled_add", "mul"])
        if self.random.random() < 0.5:
            body = self.project(body, self.shapes[at].width)
        else:
            at = self.project(at, self.shapes[body].width)
        return self.op(join, (at, body), self.shapes[at])

    def branches(self, at: int, depth: int) -> int:
        ends = [self.chain(at, depth + 1, self.random.choice((1, 2))) for _ in range(self.random.choice((2, 3)))]
        return self.concat(ends + ([at] if self.random.random() < 0.3 else []))

    def split_and_cat(self, at: int, depth: int) -> int:
        """Cuts the channels, works on some of the pieces and joins them again, maybe in another order."""
        shape, axis = self.shapes[at], self.channel_axis(at)
        if self.random.random() < 0.5 and shape.width % 2 == 0:
            widths = [shape.width // 2] * 2
            cut = self.op("chunk", (at,), shape, 2, axis)
        else:
            first = self.random.choice((shape.width // 4, shape.width // 2, shape.width - 4))
            widths = [first, shape.width - first]
            cut = self.op("split", (at,), shape, tuple(widths), axis)
        pieces = [self.op("item", (cut,), Shape(shape.kind, w, shape.extent), i) for i, w in enumerate(widths)]
        worked = self.random.randrange(2)
        pieces[worked] = self.chain(pieces[worked], depth + 1, 1)
        if self.random.random() < 0.3:
            pieces.reverse()
        return self.concat(pieces)

    def shared(self, at: int) -> int:
        """One module used twice in a row."""
        width = self.shapes[at].width
        module = nn.Conv2d(width, width, 3, padding=1) if self.shapes[at].kind == MAP else nn.Linear(width, width)
        return self.again(self.part(self.activation(), self.again(self.part(module, at))))

    def narrow(self, at: int) -> int:
        shape = self.shapes[at]
        if shape.width < 16:
            return at
        return self.op("narrow", (at,), Shape(shape.kind, shape.width - 8, shape.extent), shape.width - 8,
                       1 if shape.kind == MAP else 2)  # fmt: skip

    def long_skip(self, at: int) -> int:
        """Joins any earlier value of the same kind and extent."""
        shape = self.shapes[at]
        others = [i for i in range(1, at) if (self.shapes[i].kind, self.shapes[i].extent) == (shape.kind, shape.extent)
                  and self.steps[i - 1].op not in ("chunk", "split")]  # fmt: skip
        if not others:
            return self.shared(at)
        other = self.random.choice(others)
        if self.shapes[other].width == shape.width:
            return self.op("add", (at, other), shape)
        return self.concat([other, at])

    # -- chains and heads -----------------------------------------------------

    ON_MAPS = ("conv", "conv", "depthwise", "grouped_conv", "channel_shuffle", "squeeze_excite", "map_norm", "map_mlp",
               "map_attention", "u_shape")  # fmt: skip
    ON_TOKENS = ("linear", "attention", "attention", "token_mlp", "token_norm", "token_mixing", "token_conv",
                 "head_scale")  # fmt: skip
    ON_BOTH = ("shared", "narrow", "long_skip")
    NESTING = ("residual", "residual", "branches", "split_and_cat")

    def chain(self, at: int, depth: int, length: int) -> int:
        """Draws ``length`` blocks in a row; the extent stays the same."""
        for _ in range(length):
            at = self.project(at, 16) if self.shapes[at].width < 4 else at
            names = self.ON_MAPS if self.shapes[at].kind == MAP else self.ON_TOKENS
            if depth < 2 and self.random.random() < 0.45:
                at = getattr(self, self.random.choice(self.NESTING))(at, depth)
            elif self.random.random() < 0.15:
                at = getattr(self, self.random.choice(self.ON_BOTH))(at)
            else:
                at = getattr(self, self.random.choice(names))(at)
            at = self.project(at, self.random.choice(WIDTHS)) if self.shapes[at].width > WIDEST else at
        return at

    def head(self, at: int) -> int:
        shape = self.shapes[at]
        outputs = self.random.choice((3, 5, 10))
        width = shape.width
        if shape.kind == MAP:
            names = ["global_mean", "global_max", "pool_flatten"]
            names += ["flatten", "view_flat"] if width * shape.extent**2 <= 2048 else []
            name = self.random.choice(names)
            width = width * shape.extent**2 if name in ("flatten", "view_flat") else width
            at = self.op(name, (at,), Shape(TOKENS, width, 1))
        elif self.random.random() < 0.8:
            names = ["token_mean", "first_token", "last_token"]
            names += ["flatten"] if width * shape.extent <= 1024 else []
            name = self.random.choice(names)
            width = width * shape.extent if name == "flatten" else width
            at = self.op(name, (at,), Shape(TOKENS, width, 1))
        if self.random.random() < 0.3:
            at = self.part(nn.ReLU(), self.part(nn.Linear(width, 24), at, 24))
            width = 24
        return self.part(nn.Linear(width, outputs), at, outputs)


def draw_start(random: random_module.Random) -> tuple[Shape, torch.Tensor]:
    """The kind of input and an example of it: images, float sequences or token numbers."""
    kind = random.choice((MAP, MAP, MAP, TOKENS, CODES))
    if kind == MAP:
        side = random.choice((8, 12, 16))
        return Shape(MAP, 3, side), torch.randn(2, 3, side, side)
    length = random.choice((6, 8, 10))
    if kind == TOKENS:
        return Shape(TOKENS, 12, length), torch.randn(2, length, 12)
    return Shape(CODES, 30, length), torch.randint(0, 30, (2, length))


def draw_stem(builder: Builder, start: Shape) -> int:
    """The first layer: an embedding, a linear map, or a convolution that may cut patches."""
    width = builder.random.choice(WIDTHS)
    if start.kind == CODES:
        at = builder.part(nn.Embedding(start.width, width), 0, width)
        builder.shapes[at] = Shape(TOKENS, width, start.extent)
        return at
    if start.kind == TOKENS:
        return builder.part(nn.Linear(start.width, width), 0, width)
    stride = builder.random.choice((1, 2, 4))
    kernel = {1: 3, 2: 3, 4: 4}[stride]
    padding = 0 if stride == 4 else 1
    return builder.part(nn.Conv2d(3, width, kernel, stride, padding), 0, width, start.extent // stride)


def random_network(random: random_module.Random) -> tuple[nn.Module, tuple]:
    """Draws a network and a batch of two for it; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.getrandbits(31))
        start, example = draw_start(random)
        builder = Builder(random, start)
        at = draw_stem(builder, start)
        outputs = []
        for _ in range(random.choice((1, 2, 2, 3))):
            at = builder.chain(at, 0, random.choice((1, 2, 3)))
            shape = builder.shapes[at]
            if shape.kind == MAP:
                at = builder.pool(at)
                side = builder.shapes[at].extent
                if side <= 8 and random.random() < 0.25:
                    at = builder.op("to_tokens", (at,), Shape(TOKENS, builder.shapes[at].width, side**2))
            if random.random() < 0.15:
                outputs.append(builder.head(at))
        outputs.append(builder.head(at))
        model = RandomNetwork(builder.steps, builder.parts, tuple(outputs))
        stir(model)
    return model, (example,)
