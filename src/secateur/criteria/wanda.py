"""Wanda: the size of a weight times the norm of the input it multiplies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.core.errors import DataError, ModelError
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.sockets import Criterion
from secateur.core.task import Task, call, frozen


@dataclass(frozen=True)
class Wanda(Criterion):
    """``|w| · ‖x‖₂``, where x is all that the weight multiplies: its input at every position of every example.

    The square is what the squared output of the layer changes by when the weight goes, summed over examples and
    positions. Scores have the shape of each weight, float32 or wider. Evaluation mode, no gradient; no weight is
    updated. Where inputs are a mapping with an ``attention_mask``, positions it marks 0 do not count.

    Inputs are heard where the network calls a linear layer, a product (``x @ w``, ``addmm``, ``einsum``), a
    convolution, an embedding, an attention or a recurrent layer, through a module or a function; a weight used
    several times adds up its uses. Weights used in another way (a view or a transpose of them, packed sequences,
    projections of an LSTM, attention with other widths of keys and values) and weights that no example reached, such
    as an expert's, are refused: nothing is known of their inputs.

    Args:
        rows: give each weight its rank within its output unit, from 1 (highest) down to ``1 / width`` (equal ones in
            order; 0 where the score is 0). The paper compares within rows: with ``uniform`` and single weights, every
            row then keeps the same number.

    Raises:
        ModelError: when a weight is not finite, or its inputs are not heard.
        DataError: when the data is empty or spent, or an input of a layer is not finite.
        MaskError: when ``masks`` belong to another network.

    Cost: one forward pass over the data, two of recurrent and attention layers, and one sum of squares for each layer
    (for products and embeddings, a backward pass of it); memory of a copy of one layer's input in float32.
    """

    rows: bool = False

    paper = Paper(
        "A Simple and Effective Pruning Approach for Large Language Models",
        "Sun, Liu, Bair, Kolter",
        2024,
        "arXiv:2306.11695",
        differs="one pass through the network as it stands, where the paper passes on the outputs of pruned blocks; "
        "scores are compared within rows only when asked for",
    )
    needs = frozenset({"activations"})

    @torch.no_grad()
    def __call__(self, task: Task, masks: Masks) -> Named:
        """Scores for every tensor of ``masks``; higher = keep."""
        weights = masks.match(task.model)
        check_finite(dict(weights))
        own = {name: p.detach() for name, p in task.params().items()}  # kernels round otherwise for frozen ones
        ear = _Ear({id(own[name]): name for name in weights})
        with frozen(task.model):
            for inputs, _, _ in task.batches():
                padded = isinstance(inputs, Mapping) and isinstance(inputs.get("attention_mask"), Tensor)
                ear.real = inputs["attention_mask"].reshape(-1) != 0 if padded else None
                with ear:
                    call(task.model, inputs, own)
        scores = {}
        for name, w in weights.items():
            if name not in ear.heard:
                raise ModelError(
                    f"no inputs of `{name}` are known: no example reaches it, or the network uses a view of it. "
                    f"Leave it out with `--skip '{name}'`, or use `taylor`."
                )
            heard = ear.heard[name]
            if not bool(heard.isfinite().all()):
                raise DataError(f"inputs that `{name}` multiplies are NaN or infinite; check data and network.")
            score = w.detach().to(heard.dtype).abs() * heard.sqrt()
            scores[name] = _ranks(score) if self.rows else score
        return scores


def _ranks(score: Tensor) -> Tensor:
    flat = score.reshape(len(score), -1)
    places = torch.sort(flat, dim=1, descending=True, stable=True).indices.argsort(1).to(score.dtype)
    return ((1 - places / flat.shape[1]) * (flat > 0)).reshape(score.shape)


class _Ear(TorchFunctionMode):
    """Sums of the squares of what weights multiply, by name; each broadcasts to the shape of its weight."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names, self.heard = names, Named()
        self.real: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        listen = _LISTEN.get(getattr(func, "__name__", ""))
        if listen is not None and all(x.numel() for x in args if isinstance(x, Tensor)):  # nothing is heard of no rows
            listen(self, func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def add(self, weight: Any, squares: Tensor) -> None:
        """More of what a weight multiplies."""
        name = self.names[id(weight)]
        self.heard[name] = self.heard[name] + squares if name in self.heard else squares

    def square(self, x: Tensor) -> Tensor:
        """Squares, zero at positions that are not real."""
        squares = x.to(torch.promote_types(x.dtype, torch.float32)).square()
        if self.real is None or x.dim() < 2 or x.shape[:-1].numel() != len(self.real):
            return squares
        return squares * self.real.reshape(*x.shape[:-1], 1)

    def layer(self, func: Any, input: Tensor, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> None:
        """A linear layer or convolution: all filters of a group multiply the same inputs, so one of each tells."""
        if id(weight) in self.names:
            groups = kwargs.get("groups", args[3] if len(args) > 3 else 1)
            squares = _slope(lambda probe: func(self.square(input), probe, None, *args, **kwargs), weight[:groups])
            self.add(weight, squares if groups == 1 else squares.repeat_interleave(len(weight) // groups, 0))

    def product(self, func: Any, *args: Any, **kwargs: Any) -> None:
        """Whatever is linear in a weight and in its inputs."""
        for i, weight in enumerate(args):
            if id(weight) in self.names:
                x = [self.square(o) if isinstance(o, Tensor) and o.is_floating_point() else o for o in args]
                self.add(weight, _slope(lambda probe, x=x, i=i: func(*x[:i], probe, *x[i + 1 :], **kwargs), weight))

    def cell(self, _: Any, input: Tensor, hx: Any, *weights: Any) -> None:
        self.layer(nn.functional.linear, input, weights[0])
        self.layer(nn.functional.linear, hx if isinstance(hx, Tensor) else hx[0], weights[1])

    def recurrent(self, func: Any, *args: Any) -> None:
        if not isinstance(args[3], bool):  # packed: rows of several lengths behind one another
            return
        x, hx, weights, biases, layers, _, _, both, batch_first = args
        time, step = int(batch_first), len(weights) // (layers * (1 + both))
        for start in range(0, len(weights), step * (1 + both)):
            outputs = []
            for way, first in enumerate(range(start, start + step * (1 + both), step)):
                own, i = weights[first : first + step], first // step
                state = hx[i : i + 1] if isinstance(hx, Tensor) else [h[i : i + 1] for h in hx]
                output = func(x.flip(time) if way else x, state, own, biases, 1, 0.0, False, False, batch_first)[0]
                begin = (state if isinstance(state, Tensor) else state[0]).transpose(0, time)
                before = torch.cat([begin, output], time).narrow(time, 0, output.shape[time])
                self.cell(func, x, before.flip(time) if way else before, *own)
                outputs.append(output.flip(time) if way else output)
            x = torch.cat(outputs, -1)

    def heads(self, func: Any, *args: Any, **kwargs: Any) -> None:
        inputs = [x.transpose(0, 1) if x.dim() == 3 else x for x in args[:3]]  # batch first, as the padding is
        if id(args[5]) in self.names:
            self.add(args[5], torch.cat([self.square(x).flatten(0, -2).sum(0).expand(args[3], -1) for x in inputs]))
        # With the identity in the place of its last layer, attention gives the inputs of that layer
        mixed = func(*args[:11], torch.eye(args[3]).to(args[0]), None, **kwargs)[0]
        self.layer(nn.functional.linear, mixed.transpose(0, 1) if mixed.dim() == 3 else mixed, args[11])


def _slope(product: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """What the sum of a product with squared inputs changes by with each weight: the squares it multiplies."""
    probe = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)).requires_grad_()
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return torch.autograd.grad(product(probe).sum(), probe)[0]


_LISTEN = {
    **dict.fromkeys("linear conv1d conv2d conv3d".split(), _Ear.layer),
    **dict.fromkeys("matmul __matmul__ mm bmm addmm baddbmm einsum embedding".split(), _Ear.product),
    **dict.fromkeys("conv_transpose1d conv_transpose2d conv_transpose3d".split(), _Ear.product),
    **dict.fromkeys("lstm gru rnn_tanh rnn_relu".split(), _Ear.recurrent),
    **dict.fromkeys("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell".split(), _Ear.cell),
    "multi_head_attention_forward": _Ear.heads,
}
