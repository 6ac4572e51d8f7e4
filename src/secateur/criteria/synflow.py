"""SynFlow: keep the weights that carry most of the flow from inputs to outputs, without any data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from secateur.core.errors import DataError, ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import Named, unwrap
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.sockets import Criterion
from secateur.core.task import Task, call, device_of, frozen

_PASS = frozenset(
    "relu relu6 leaky_relu rrelu prelu elu selu celu gelu silu mish softplus softsign tanh sigmoid logsigmoid hardtanh "
    "hardsigmoid hardswish log_softmax".split()
)


@dataclass(frozen=True)
class Synflow(Criterion):
    """Synaptic flow ``|w| · dR/d|w|``, where R sums the outputs of the network with all parameters made positive.

    The input is one example of ones; scores are float64, at least 0, in the shape of each weight, and 0 for weights
    that ``masks`` prune. Only the shape of the first batch is used. Without data, or when a generator is all there is,
    ``shape`` says it, or else the first layer when that is linear or an embedding.

    What breaks the flow is made linear: activations pass everything, normalisation keeps its scale and shift only
    (BatchNorm divides by the running deviation as well), attention multiplies ``q kᵀ v`` without softmax, masks and
    softmax's exponential left out, an embedding gives the sum of its rows. Then what flows into a unit flows out of
    it, and every layer of a chain without biases scores R in all. Recurrent layers run as they are: their gates do
    not conserve the flow. So do operations built from subtraction or division.

    One call scores one round. The method needs many (100 in the paper): keep ``density ** (k / rounds)`` after round
    k; a single cut to high sparsity empties layers.

    Args:
        shape: shape of one example without the batch, such as ``(3, 32, 32)``; ``()`` takes it from the data.

    Raises:
        UsageError: when the shape is not made of whole numbers of at least 1.
        DataError: when the shape of an example is not known.
        ModelError: when a weight is not finite, the network does not take such an example, or R is 0 or overflows.
        MaskError: when ``masks`` belong to another network.

    Cost: one forward and backward pass of one example; a float64 copy of the parameters and one gradient.
    """

    shape: tuple[int, ...] = ()

    paper = Paper(
        "Pruning neural networks without any data by iteratively conserving synaptic flow",
        "Tanaka, Kunin, Yamins, Ganguli",
        2020,
        "arXiv:2006.05467",
        differs="one round of scores; BatchNorm is a positive scale, where the official code takes the absolute value "
        "of the running mean; attention, LayerNorm and embeddings, which the paper does not treat, are made linear",
    )
    needs = frozenset({"data-free"})

    def __post_init__(self) -> None:
        if not all(isinstance(size, int) and size >= 1 for size in self.shape):
            raise UsageError(f"shape must be whole numbers of at least 1, such as (3, 32, 32), not {self.shape!r}.")

    @torch.enable_grad()
    def __call__(self, task: Task, masks: Masks) -> Named:
        """Scores for every tensor of ``masks``; higher = keep."""
        own = task.params()
        masks.match(task.model)
        check_finite(dict(own))
        at = {name: p.detach().double().abs() for name, p in own.items()}
        at |= {name: at[name].masked_fill_(~masks[name].to(at[name].device), 0).requires_grad_() for name in masks}
        buffers = {n: b.detach().double() for n, b in unwrap(task.model).named_buffers() if b.is_floating_point()}
        ones = self._ones(task)
        try:  # cuDNN cannot differentiate recurrent layers in evaluation mode
            with frozen(task.model), torch.backends.cudnn.flags(enabled=False), _Flow():
                outputs = tree_leaves(call(task.model, ones, {**buffers, **at}))
                flow = torch.stack([x.sum(dtype=torch.float64) for x in outputs if isinstance(x, Tensor)]).sum()
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ModelError(f"the network does not run on one example of ones in float64: {error}") from error
        if not (torch.isfinite(flow) and flow != 0):
            raise ModelError(
                f"the flow through the network is {flow.item()}: "
                + ("no path is left" if flow == 0 else "it is too deep or wide, or its example too long, for float64")
                + ". Leave layers out with `--skip`, give a shorter example (`-s criterion.shape=[3]`: 3 tokens), or "
                "use another criterion, such as `snip`."
            )
        wanted = [at[name] for name in masks]
        slopes = torch.autograd.grad(flow, wanted, allow_unused=True, materialize_grads=True)
        return {name: (g * w.detach()).abs() for name, g, w in zip(masks, slopes, wanted, strict=True)}

    def _ones(self, task: Task) -> Any:
        """One example of ones: of ``shape``, as the data has them, or as the first layer takes them."""
        where = device_of(task.model)
        if self.shape:
            kind = torch.int64 if _takes_tokens(task) else torch.float64
            return torch.ones((1, *self.shape), dtype=kind, device=where)
        try:
            return tree_map(_one, next(iter(task.batches()))[0])
        except DataError as error:
            layers = (
                m for m in unwrap(task.model).modules() if next(iter(m.parameters(recurse=False)), None) is not None
            )
            first = next(layers, None)
            if isinstance(first, nn.Linear):
                return torch.ones((1, first.in_features), dtype=torch.float64, device=where)
            if isinstance(first, nn.Embedding):
                return torch.zeros((1, 1), dtype=torch.int64, device=where)
            raise DataError(f"the shape of an example is not known; give it as `shape`. {error}") from error


def _takes_tokens(task: Task) -> bool:
    """Whether the first layer looks rows up: whole numbers are what it takes, and any will do."""
    layers = (m for m in unwrap(task.model).modules() if next(iter(m.parameters(recurse=False)), None) is not None)
    return isinstance(next(layers, None), nn.Embedding)


class _Flow(TorchFunctionMode):
    """What breaks the flow is replaced, whether a module or a function asks for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _INSTEAD:
            return _INSTEAD[func](*args, **kwargs)
        name, x = getattr(func, "__name__", "").rstrip("_"), args[0] if args else kwargs.get("input")
        if name in _PASS:
            return x
        if name == "softmax":  # scores of masked positions are far below 0
            return x.clamp(min=0) / x.shape[kwargs["dim"] if "dim" in kwargs else args[1]]
        return func(*args, **kwargs)


def _features(x: Tensor, *_: Any, weight: Any = None, bias: Any = None, **__: Any) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _channels(x: Tensor, *rest: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, **kw: Any) -> Tensor:
    """Only BatchNorm has a variance of its own; it is the second of its statistics."""
    shape = (-1, *[1] * (x.dim() - 2))
    variance = kw.get("running_var", rest[1] if len(rest) > 1 else None)
    x = x if variance is None else x / (variance.reshape(shape) + eps).sqrt()
    return _features(
        x, weight=None if weight is None else weight.reshape(shape), bias=None if bias is None else bias.reshape(shape)
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, *_: Any, scale: Any = None, enable_gqa: bool = False, **__: Any) -> Tensor:
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    return q @ k.transpose(-2, -1) @ v * ((q.shape[-1] ** -0.5 if scale is None else scale) / k.shape[-2])


def _heads(q: Tensor, k: Tensor, v: Tensor, _: int, heads: int, w: Any, b: Any, *rest: Any, **kw: Any) -> Any:
    ws: Any = [kw[f"{part}_proj_weight"] for part in "qkv"] if w is None else w.chunk(3)
    bs = [None] * 3 if b is None else b.chunk(3)
    parts = [functional.linear(x, matrix, bias) for x, matrix, bias in zip((q, k, v), ws, bs, strict=True)]
    mixed = _attend(*(x.unflatten(-1, (heads, -1)).movedim(0, -2) for x in parts)).movedim(-2, 0).flatten(-2)
    return functional.linear(mixed, *rest[4:6]), None


_INSTEAD: Mapping[Any, Callable[..., Any]] = {
    **dict.fromkeys((functional.batch_norm, functional.instance_norm, functional.group_norm), _channels),
    **dict.fromkeys((functional.layer_norm, functional.rms_norm), _features),
    functional.scaled_dot_product_attention: _attend,
    functional.multi_head_attention_forward: _heads,
    functional.embedding: lambda index, rows, *_, **__: rows.sum(0).expand(*index.shape, -1),
}


def _one(value: Any) -> Any:
    """One example of ones in the shape of a batch; real numbers in float64."""
    if not isinstance(value, Tensor):
        return value
    kind = torch.float64 if value.is_floating_point() else value.dtype
    return torch.ones((1, *value.shape[1:])[: value.dim()], dtype=kind, device=value.device)
