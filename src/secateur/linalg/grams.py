"""Gram matrices of what flows into linear and convolution layers, in one pass that holds no activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.core.errors import DataError, ModelError
from secateur.core.task import Task, device_of, examples
from secateur.linalg.memory import check, estimate

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The layers whose output is a matrix times (patches of) their input."""

_PATCHES = 1 << 26  # bytes of unfolded patches that are held at once


@dataclass(frozen=True)
class Gram:
    """The mean over examples of ``Σ x xᵀ`` over the positions at which a layer is applied.

    With the layer's weight ``W`` as a matrix, ``trace(ΔW · matrix · ΔWᵀ)`` is the mean over examples of the squared
    change of its output, summed over units and positions.

    Args:
        matrix: ``(groups, in, in)``; ``in`` are the columns of :func:`layer_matrix`. Float32 or wider.
        examples: examples seen.
        positions: vectors ``x`` seen, over all examples: as many as examples for a linear layer on plain vectors,
            one for every place of the output of a convolution or of a sequence.
    """

    matrix: Tensor
    examples: int
    positions: int

    @property
    def rank_bound(self) -> int:
        """The rank cannot be larger: the positions, or the width where that is smaller."""
        return min(self.positions, self.matrix.shape[-1])


def layer_matrix(module: nn.Module, weight: Tensor | None = None) -> Tensor:
    """A layer's weight, or another tensor of its shape, as ``(groups, out / groups, in)``; a view where it can be.

    Raises:
        ModelError: when the layer is neither linear nor a convolution.
    """
    layer = _check(type(module).__name__, module)
    values: Tensor = layer.weight if weight is None else weight
    groups = getattr(layer, "groups", 1)
    return values.reshape(groups, values.shape[0] // groups, -1)


def layer_weight(module: nn.Module, matrix: Tensor) -> Tensor:
    """The inverse of :func:`layer_matrix`: ``(groups, out / groups, in)`` in the shape of the layer's weight.

    Raises:
        ModelError: when the layer is neither linear nor a convolution.
    """
    return matrix.reshape(_check(type(module).__name__, module).weight.shape)


def grams(task: Task, modules: Mapping[str, nn.Module], dtype: torch.dtype = torch.float32) -> dict[str, Gram]:
    """The Gram matrix of each module's inputs, all in one pass over the data, in evaluation mode.

    A module that is called several times in one pass adds up its calls.

    Args:
        task: network and data (the loss is not used).
        modules: linear and convolution layers (any groups, stride, dilation, padding) by any name.
        dtype: type of the sums; that of the inputs when wider.

    Returns:
        A Gram matrix for every name, on the device of the layer's inputs.

    Raises:
        ModelError: for a layer that is neither linear nor a convolution, or that is never called as a module.
        UsageError: when the matrices do not fit into memory.
        DataError: when the inputs of a layer are not finite, or the data is empty or spent.

    Cost: one forward pass, and ``positions · in²`` multiplications a group; memory of the matrices and 64 MB.
    """
    needed = 0
    for name, module in modules.items():
        rows = layer_matrix(_check(name, module))
        needed += estimate((rows.shape[0], rows.shape[2], rows.shape[2]), torch.promote_types(dtype, rows.dtype))
    check(needed, f"the Gram matrices of {len(modules)} layers", "take fewer layers at once", device_of(task.model))
    counted = _Counted(task.data)

    def fold(name: str, sofar: Gram | None, inputs: Any, _: Any) -> Gram:
        if not inputs:
            raise ModelError(f"layer `{name}` gets its input by keyword; call it as `layer(x)`, or leave it out.")
        added = _added(modules[name], inputs[0].detach(), dtype)
        if sofar is None:
            return added
        sofar.matrix.add_(added.matrix)
        return replace(sofar, positions=sofar.positions + added.positions)

    # data that can be read only once is refused by the task itself
    once = isinstance(task.data, Iterator)
    found = (task if once else replace(task, data=counted)).collect(modules, fold)
    for name in modules:
        if name not in found:
            raise ModelError(
                f"layer `{name}` is never called as a module (its weight is used in another way), so its inputs are "
                f"unknown. Leave it out with `--skip '{name}*'`."
            )
    return {name: _finished(name, found[name], counted.count) for name in modules}


@dataclass
class _Counted:
    """Batches that count their examples as they go by: a layer cannot know, for it may see windows or words."""

    data: Any
    count: int = field(default=0)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            if isinstance(batch, tuple | list) and len(batch) == 2:
                self.count += examples(batch[0])
            yield batch


def _check(name: str, module: nn.Module) -> Any:
    if not isinstance(module, LAYERS):
        raise ModelError(
            f"`{name}` is a {type(module).__name__}; only linear and convolution layers (1d, 2d, 3d) have a Gram "
            "matrix of inputs. Leave it out."
        )
    return module


def _finished(name: str, gram: Gram, count: int) -> Gram:
    if not torch.isfinite(gram.matrix).all():
        raise DataError(
            f"the inputs of layer `{name}` are not finite, or their squares overflow {gram.matrix.dtype}: look for NaN "
            "or infinity in the data and in the layers before it (`secateur doctor`)."
        )
    matrix = gram.matrix.div_(count)
    return replace(gram, matrix=(matrix + matrix.mT).div_(2), examples=count)  # the same to the bit on both sides


def _added(module: nn.Module, x: Tensor, dtype: torch.dtype) -> Gram:
    """The sum over the positions of one call, not yet divided by the examples."""
    dtype = torch.promote_types(dtype, x.dtype)
    if isinstance(module, nn.Linear):
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        return Gram((rows.T @ rows)[None], 0, len(rows))
    total, positions = torch.zeros(0), 0
    for patches in _patches(module, x):
        patches = patches.to(dtype)
        part = patches.mT @ patches
        total = total.add_(part) if positions else part
        positions += patches.shape[1]
    return Gram(total, 0, positions)


def _patches(module: Any, x: Tensor) -> Iterator[Tensor]:
    """What a convolution multiplies its weight with, ``(groups, positions, in)``, a few examples at a time."""
    dims = len(module.kernel_size)
    x = x[None] if x.dim() == dims + 1 else x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    # torch's own list of paddings, last dimension first: right for "same" and "valid" too
    x = functional.pad(x, tuple(module._reversed_padding_repeated_twice), mode=mode)
    for i, (size, stride, dilation) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        x = x.unfold(2 + i, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # (n, channels, places..., kernel...), still a view of the input
    places, groups = tuple(range(2, 2 + dims)), module.groups
    order = (1, 0, *(d + 1 for d in places), 2, *(d + 1 for d in range(2 + dims, 2 + 2 * dims)))
    view = x.unflatten(1, (groups, -1)).permute(order)  # (groups, n, places..., channels, kernel...)
    one = max(1, view[:, :1].numel() * max(4, x.element_size()))
    for part in view.split(max(1, _PATCHES // one), dim=1):
        yield part.reshape(groups, -1, module.in_channels // groups * x.shape[2 + dims :].numel())
