"""The kept entries of a network's tensors as one vector, and what the other files ask of a symmetric operator on it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from secateur.core.errors import UsageError, nearest
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.task import Task, device_of


@runtime_checkable
class Symmetric(Protocol):
    """What the other files ask of an operator: a symmetric matrix known by its products."""

    @property
    def size(self) -> int:
        """Rows and columns."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of the products."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the products are."""
        ...

    def __matmul__(self, v: Tensor) -> Tensor:
        """The product with a vector ``(size,)`` or with columns ``(size, k)``."""
        ...


class Flat:
    """The kept entries of the tensors in ``masks`` as one vector, in the order of the masks.

    Args:
        task: the network the masks belong to.
        masks: True = kept.

    Raises:
        MaskError: when ``masks`` belong to another network.
        UsageError: when nothing is kept.
    """

    def __init__(self, task: Task, masks: Masks) -> None:
        weights = masks.match(task.model)
        self.masks = masks
        self.device = device_of(task.model)
        wide = [torch.promote_types(p.dtype, torch.float32) for p in weights.values()]
        self.dtype: torch.dtype = functools.reduce(torch.promote_types, wide, torch.float32)
        places = {name: mask.reshape(-1).nonzero()[:, 0] for name, mask in masks.items()}
        self.counts = [len(index) for index in places.values()]
        # a tensor that is kept whole needs no list of its entries
        self._places = {n: None if len(i) == masks[n].numel() else i.to(self.device) for n, i in places.items()}
        self.size = sum(self.counts)
        if not self.size:
            raise UsageError("the masks keep no weight, so there is no curvature to look at; keep at least one.")

    def flatten(self, named: Mapping[str, Tensor]) -> Tensor:
        """The kept entries, shape ``(size,)``, float32 or wider.

        Raises:
            UsageError: when a tensor is missing or has another shape.
        """
        for name, mask in self.masks.items():
            if name not in named:
                raise UsageError(f"there is no value for `{name}`. {nearest(name, named)}")
            if named[name].shape != mask.shape:
                raise UsageError(f"`{name}` has shape {tuple(mask.shape)}, its value {tuple(named[name].shape)}.")
        return self.rows([named[name].detach()[None] for name in self.masks])[0]

    def rows(self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Tensors with one leading dimension more, in the order of the masks, as rows ``(n, size)``."""
        flat = []
        for place, tensor in zip(self._places.values(), tensors, strict=True):
            row = tensor.reshape(len(tensor), -1).to(self.device, dtype or self.dtype)
            flat.append(row if place is None else row[:, place])
        return torch.cat(flat, 1)

    def unflatten(self, flat: Tensor) -> Named:
        """The vector as tensors, zeros where pruned.

        Raises:
            UsageError: for another shape than ``(size,)``.
        """
        if flat.shape != (self.size,):
            raise UsageError(f"a vector of shape ({self.size},) is needed here, not {tuple(flat.shape)}.")
        named: Named = {}
        for (name, place), part in zip(self._places.items(), flat.split(self.counts), strict=True):
            mask = self.masks[name]
            whole = part if place is None else part.new_zeros(mask.numel()).index_copy_(0, place, part)
            named[name] = whole.reshape(mask.shape).clone()
        return named
