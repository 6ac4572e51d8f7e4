"""What the columns of weights multiply, as their layers hear it, and scores of columns on their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from secateur.core.errors import DataError, ModelError
from secateur.core.masks import Masks
from secateur.core.names import owners
from secateur.core.task import Task, call, frozen

Fold = Callable[[Any, Tensor, Tensor], Any]
"""``fold(so far or None, x, real)``: x float64 ``(examples, positions, inputs)``, real ``(examples, positions)``."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def hear(task: Task, masks: Masks, fold: Fold) -> dict[str, Any]:
    """Fold the inputs of every tensor of ``masks``: those of linear layers, convolutions and one recurrent layer.

    Positions are those of a sequence, or all places of an image, without padding of the layer's own. Where inputs are
    a mapping with an ``attention_mask``, positions that it marks 0 are not real.

    Returns:
        What ``fold`` returned last, by tensor. A tensor that several layers share hears all of them.

    Raises:
        ModelError: when the inputs of a tensor are not heard.
        DataError: when the data is empty or spent.

    Cost: one forward pass over the data; memory of one layer's input in float64.
    """
    weights, holders = masks.match(task.model), owners(task.model)
    own = {name: p.detach() for name, p in task.params().items()}  # kernels round otherwise for frozen ones
    heard: dict[str, Any] = {}
    padding: list[Any] = [None]

    def listen(name: str, module: nn.Module, given: Any, output: Any) -> None:
        x = _inputs(name.rpartition(".")[2], module, given, output)
        if x is not None and x.numel():
            fits = isinstance(padding[0], Tensor) and padding[0].shape == x.shape[:2]
            real = padding[0] != 0 if fits else torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            heard[name] = fold(heard.get(name), x.detach().double(), real)

    handles = [m.register_forward_hook(partial(listen, name)) for name in weights for m in holders[name]]
    try:
        with torch.no_grad(), frozen(task.model):
            for inputs, _, _ in task.batches():
                padding[0] = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
                call(task.model, inputs, own)
    finally:
        for handle in handles:
            handle.remove()
    for name in weights:
        if name not in heard:
            raise ModelError(
                f"no inputs of `{name}` are known: no example reaches it, or it is not that of a linear layer, a "
                f"convolution or a single recurrent layer. Leave it out with `--skip '{name}'`, or use `taylor`."
            )
    return heard


def _inputs(key: str, module: nn.Module, given: Any, output: Any) -> Tensor | None:
    """``(examples, positions, inputs)``; None where they are not known."""
    x = given[0] if given else None
    if not isinstance(x, Tensor):
        return None
    if isinstance(module, nn.Linear):
        return x.reshape(len(x) if x.dim() > 1 else 1, -1, x.shape[-1])
    if isinstance(module, _CONVOLUTIONS):
        return (x if x.dim() == module.weight.dim() else x[None]).flatten(2).transpose(1, 2)
    if not isinstance(module, nn.RNNBase) or key not in ("weight_ih_l0", "weight_hh_l0"):
        return None
    if key == "weight_hh_l0":
        if module.bidirectional or module.num_layers > 1 or module.proj_size:
            return None
        x = _states(module, given, output[0])
    return x[None] if x.dim() == 2 else x if module.batch_first else x.transpose(0, 1)


def _states(module: nn.RNNBase, given: Any, output: Tensor) -> Tensor:
    """The state that each step of a recurrent layer starts from."""
    time = int(module.batch_first and output.dim() == 3)
    first = given[1] if len(given) > 1 else None
    first = first[0] if isinstance(first, tuple) else first
    if first is None:
        begin = torch.zeros_like(output.narrow(time, 0, 1))
    else:  # (layers, examples, states), whatever the order of the inputs
        begin = cast(Tensor, first).transpose(0, time)
    return torch.cat([begin, output.narrow(time, 0, output.shape[time] - 1)], time)


def by_group(weight: Tensor, inputs: int) -> Tensor:
    """A weight ``(outputs, inputs of a group, ...)`` as ``(groups, outputs of one, inputs of one, kernel)``."""
    groups = inputs // weight.shape[1]
    return weight.reshape(groups, -1, weight.shape[1], max(1, weight[0, 0].numel()))


def on_columns(columns: Tensor, kept: Tensor) -> Tensor:
    """Scores of inputs on the weights that multiply them, shared evenly by those kept: a column's sum is its score.

    Args:
        columns: shape ``(inputs,)``.
        kept: boolean, the shape of the weight; the others score 0.
    """
    share = by_group(kept, len(columns)).to(columns.dtype)
    count = share.sum((1, 3), keepdim=True).clamp(min=1)
    return (share / count * columns.reshape(len(share), 1, -1, 1)).reshape(kept.shape)


def check_heard(name: str, columns: Tensor) -> Tensor:
    """The same scores, if they are finite.

    Raises:
        DataError: when they are not.
    """
    if not bool(columns.isfinite().all()):
        raise DataError(f"inputs that `{name}` multiplies are NaN or infinite; check data and network.")
    return columns
