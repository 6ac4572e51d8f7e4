"""Small networks with data, written as users write them: what the contract suites run on.

Every function gives a fresh :class:`~secateur.core.task.Task`; the same arguments give the same weights and
data. Weights are drawn in float64 from named streams and then cast, so one network in two types is the same
network. All are classifiers with cross entropy, and by default their batches are of unequal size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.core.names import parameters
from secateur.core.streams import stream
from secateur.core.task import Task

_CLASSES = 3
_WORDS = 11


class Hidden(NamedTuple):
    """Hidden channels that can change places without changing what the network computes.

    Args:
        width: how many channels.
        places: where they appear: tensor, dimension, and how many blocks of ``width`` that dimension stacks.
    """

    width: int
    places: tuple[tuple[str, int, int], ...]


def tanh_mlp(dtype: torch.dtype = torch.float64, batches: Sequence[int] = (4, 2), seed: int = 0) -> Task:
    """Two smooth hidden layers; inputs ``(n, 5)``."""
    net = _build(
        lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, _CLASSES)),
        "tanh_mlp",
        seed,
    )
    return _task(net, _reals("tanh_mlp", seed, batches, 5), dtype, batches, seed)


def relu_mlp(dtype: torch.dtype = torch.float64, batches: Sequence[int] = (4, 2), seed: int = 0) -> Task:
    """One hidden layer with ReLU and dropout; inputs ``(n, 5)``."""
    net = _build(
        lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, _CLASSES)), "relu_mlp", seed
    )
    return _task(net, _reals("relu_mlp", seed, batches, 5), dtype, batches, seed)


def conv_bn(
    dtype: torch.dtype = torch.float64, batches: Sequence[int] = (4, 2), seed: int = 0, trained: bool = True
) -> Task:
    """Two convolutions with BatchNorm; inputs ``(n, 2, 6, 6)``.

    Args:
        dtype: type of weights and inputs.
        batches: examples in each batch.
        seed: another seed gives other weights and data.
        trained: whether BatchNorm has seen data; its running statistics are fresh otherwise.
    """
    net = _build(_ConvNet, "conv_bn", seed)
    inputs = _reals("conv_bn", seed, batches, 2, 6, 6)
    return _task(_train_norms(net, inputs) if trained else net, inputs, dtype, batches, seed)


def residual_bn(dtype: torch.dtype = torch.float64, batches: Sequence[int] = (4, 2), seed: int = 0) -> Task:
    """A stem and a residual block whose shortcut is a strided convolution; inputs ``(n, 2, 6, 6)``."""
    inputs = _reals("residual_bn", seed, batches, 2, 6, 6)
    return _task(_train_norms(_build(_ResidualNet, "residual_bn", seed), inputs), inputs, dtype, batches, seed)


def depthwise(dtype: torch.dtype = torch.float64, batches: Sequence[int] = (4, 2), seed: int = 0) -> Task:
    """Expand, filter each channel by itself, project; inputs ``(n, 2, 6, 6)``."""
    inputs = _reals("depthwise", seed, batches, 2, 6, 6)
    return _task(_train_norms(_build(_DepthwiseNet, "depthwise", seed), inputs), inputs, dtype, batches, seed)


def attention(dtype: torch.dtype = torch.float64, batches: Sequence[int] = (4, 2), seed: int = 0) -> Task:
    """A transformer block: LayerNorm, fused query-key-value, attention with two heads; inputs ``(n, 5, 8)``."""
    return _task(
        _build(_Transformer, "attention", seed), _reals("attention", seed, batches, 5, 8), dtype, batches, seed
    )


def tied(dtype: torch.dtype = torch.float64, batches: Sequence[int] = (4, 2), seed: int = 0) -> Task:
    """Predicts the next word, with the embedding as its head; inputs ``(n, 4)`` word numbers."""
    words = torch.randint(_WORDS, (sum(batches), 5), generator=stream(seed, "cases", "tied", "inputs"))
    net = _build(_TiedLanguageModel, "tied", seed).to(dtype)
    return Task(net, _mean_over_words, _cut(words[:, :-1].clone(), words[:, 1:].clone(), batches))


def lstm(dtype: torch.dtype = torch.float64, batches: Sequence[int] = (4, 2), seed: int = 0) -> Task:
    """A recurrent layer and a head on its last state; inputs ``(n, 6, 4)``."""
    return _task(_build(_Recurrent, "lstm", seed), _reals("lstm", seed, batches, 6, 4), dtype, batches, seed)


CASES: dict[str, Callable[..., Task]] = {
    "tanh_mlp": tanh_mlp,
    "relu_mlp": relu_mlp,
    "conv_bn": conv_bn,
    "residual_bn": residual_bn,
    "depthwise": depthwise,
    "attention": attention,
    "tied": tied,
    "lstm": lstm,
}
"""All networks by name; each takes ``(dtype, batches, seed)``."""


def _norm(name: str) -> tuple[tuple[str, int, int], ...]:
    return tuple((f"{name}.{part}", 0, 1) for part in ("weight", "bias", "running_mean", "running_var"))


_GATES = tuple((f"cell.{kind}_{side}_l0", 0, 4) for kind in ("weight", "bias") for side in ("ih", "hh"))

HIDDEN: dict[str, Hidden] = {
    "tanh_mlp": Hidden(7, (("0.weight", 0, 1), ("0.bias", 0, 1), ("2.weight", 1, 1))),
    "relu_mlp": Hidden(8, (("0.weight", 0, 1), ("0.bias", 0, 1), ("3.weight", 1, 1))),
    "conv_bn": Hidden(6, (("first.weight", 0, 1), *_norm("first_norm"), ("second.weight", 1, 1))),
    "residual_bn": Hidden(5, (("first.weight", 0, 1), *_norm("first_norm"), ("second.weight", 1, 1))),
    "depthwise": Hidden(
        6,
        (
            ("expand.weight", 0, 1),
            *_norm("expand_norm"),
            ("filter.weight", 0, 1),
            *_norm("filter_norm"),
            ("project.weight", 1, 1),
        ),
    ),
    "attention": Hidden(12, (("up.weight", 0, 1), ("up.bias", 0, 1), ("down.weight", 1, 1))),
    "tied": Hidden(8, (("up.weight", 0, 1), ("up.bias", 0, 1), ("down.weight", 1, 1))),
    "lstm": Hidden(5, (*_GATES, ("cell.weight_hh_l0", 1, 1), ("head.weight", 1, 1))),
}
"""Hidden channels of each network in :data:`CASES`."""


def reorder(tensor: Tensor, dim: int, blocks: int, order: Tensor) -> Tensor:
    """A copy with the channels of one dimension in another order, block by block.

    >>> reorder(torch.tensor([0, 1, 10, 11]), 0, 2, torch.tensor([1, 0]))
    tensor([ 1,  0, 11, 10])
    """
    index = torch.cat([order + block * len(order) for block in range(blocks)]).to(tensor.device)
    return tensor.detach().index_select(dim, index)


def reordered(task: Task, hidden: Hidden, order: Tensor) -> Task:
    """The same function, computed by a copy of the network whose hidden channels stand in another order."""
    twin = copy.deepcopy(task.model)
    state = twin.state_dict()
    for name, dim, blocks in hidden.places:
        state[name] = reorder(state[name], dim, blocks, order)
    twin.load_state_dict(state)
    return Task(twin, task.loss, task.data)


def recut(task: Task, batches: Sequence[int], order: Tensor | None = None) -> Task:
    """The same network on the same examples, cut into other batches, in another order when one is given."""
    pairs = list(task.data)
    inputs, target = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    if order is not None:
        inputs, target = inputs[order], target[order]
    return Task(task.model, task.loss, _cut(inputs, target, batches))


class _ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.second, self.second_norm = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.first_norm(self.first(x))), 2)
        return self.head(functional.relu(self.second_norm(self.second(x))).mean((2, 3)))


class _ResidualNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.first, self.first_norm = nn.Conv2d(4, 5, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(5)
        self.second, self.second_norm = nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.shortcut, self.shortcut_norm = nn.Conv2d(4, 6, 1, stride=2, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem_norm(self.stem(x)))
        branch = self.second_norm(self.second(functional.relu(self.first_norm(self.first(x)))))
        return self.head(functional.relu(branch + self.shortcut_norm(self.shortcut(x))).mean((2, 3)))


class _DepthwiseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.expand_norm = nn.Conv2d(2, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.filter, self.filter_norm = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6)
        self.project = nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.expand_norm(self.expand(x)))
        x = functional.relu6(self.filter_norm(self.filter(x)))
        return self.head(self.project(x).mean((2, 3)))


class _Transformer(nn.Module):
    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 12), nn.Linear(12, width)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(width, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width)
        x = x + self.drop(self.out(mixed))
        x = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


class _TiedLanguageModel(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(_WORDS, width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 8), nn.Linear(8, width)
        self.head = nn.Linear(width, _WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        return self.head(x + self.down(functional.gelu(self.up(self.norm(x)))))


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


def _mean_over_words(logits: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def _build(make: Callable[[], nn.Module], name: str, seed: int) -> nn.Module:
    """A network in float64 with weights from its own stream, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):  # constructors draw from the global generator
        net = make().double().eval()
    random = stream(seed, "cases", name, "weights")
    with torch.no_grad():
        for key, p in parameters(net).items():
            noise = torch.randn(p.shape, generator=random, dtype=torch.float64)
            if p.dim() > 1:
                p.copy_(1.4 * noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.1 * noise + (0.0 if "bias" in key else 1.0))
    return net


@torch.no_grad()
def _train_norms(net: nn.Module, inputs: Tensor) -> nn.Module:
    net.train()
    for scale in (1.0, 1.2, 0.8):
        net(inputs * scale)
    return net.eval()


def _reals(name: str, seed: int, batches: Sequence[int], *shape: int) -> Tensor:
    return torch.randn(sum(batches), *shape, generator=stream(seed, "cases", name, "inputs"), dtype=torch.float64)


def _task(net: nn.Module, inputs: Tensor, dtype: torch.dtype, batches: Sequence[int], seed: int) -> Task:
    target = torch.randint(_CLASSES, (len(inputs),), generator=stream(seed, "cases", "targets"))
    return Task(net.to(dtype), functional.cross_entropy, _cut(inputs.to(dtype), target, batches))


def _cut(inputs: Tensor, target: Tensor, batches: Sequence[int]) -> list[tuple[Any, Any]]:
    sizes = list(batches)
    return list(zip(inputs.split(sizes), target.split(sizes), strict=True))
