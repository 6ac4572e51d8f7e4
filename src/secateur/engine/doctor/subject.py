"""What is looked at: the tensors of a file, and whatever else is known of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data import Dataset

_LOOKUP = re.compile(r"emb|wte|wpe|position|token", re.IGNORECASE)
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
_MULTIPLIED = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # operators of ONNX that multiply rows by columns
_PRUNED = re.compile(r"(^|[._])(weight|bias|kernel)[^.]*$")
_RECURRENT = re.compile(r"weight_(ih|hh|hr)(_|$)")


@dataclass(frozen=True)
class Subject:
    """The tensors of a file with all that is known of them.

    Args:
        path: the file or the folder of a step.
        kind: its format.
        tensors: by name, decoded.
        masks: which weights are kept, by name; they may belong to another network.
        masked: whether there are masks at all.
        ties: groups of names that the file stores once or the network ties.
        averages: averaged copies of the weights, by the name of the copy.
        outside: names of averaged copies that lie in another file.
        dense: the network that it came from.
        optimizer: state of the optimizer, as ``torch`` saves it.
        unplaced: names of further optimizers' states in the file, which are not looked into.
        net: the network, without these weights.
        data: examples, for statistics.
        stored: how tensors lie in the file where not plain.
        others: further tables of tensors in the file, which are neither the network nor an average of it.
        used: by which operator of a graph a tensor is used, where the file tells.
    """

    path: Path
    kind: str
    tensors: Mapping[str, Tensor]
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    masked: bool = False
    ties: tuple[tuple[str, ...], ...] = ()
    averages: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    outside: frozenset[str] = frozenset()
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer: Mapping[str, Any] | None = None
    unplaced: tuple[str, ...] = ()
    net: nn.Module | None = None
    data: Dataset | None = None
    stored: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    used: Mapping[str, str] = field(default_factory=dict)

    def changed(self, new: Mapping[str, Tensor], gone: frozenset[str] = frozenset()) -> Subject:
        """With some tensors replaced or added, and others left out; the order stays."""
        whole = {name: new.get(name, tensor) for name, tensor in self.tensors.items() if name not in gone}
        whole.update({name: tensor for name, tensor in new.items() if name not in whole})
        return replace(self, tensors=whole)

    def matrices(self) -> dict[str, Tensor]:
        """Floating tensors of two dimensions or more that are no mask of ``torch.nn.utils.prune``."""
        return {
            name: tensor
            for name, tensor in self.tensors.items()
            if prunes(tensor) and tensor.dim() >= 2 and tensor.numel() and not self.is_mask(name)
        }

    def weights(self) -> dict[str, Tensor]:
        """Matrices whose rows are outputs and whose columns are inputs: no lookup tables, no free parameters."""
        return {name: tensor for name, tensor in self.matrices().items() if self._multiplied(name)}

    def _multiplied(self, name: str) -> bool:
        if self.kind == "onnx":  # names say little there, and scales and masks may have any number of dimensions
            return self.used.get(name) in _MULTIPLIED
        return not _LOOKUP.search(name) and "weight" in name.rpartition(".")[2]

    def is_mask(self, name: str) -> bool:
        """Whether a tensor is the mask that a pruning left beside a weight."""
        stem = name.removesuffix("_mask")
        if stem != name and (f"{stem}_orig" in self.tensors or prunable(stem)):
            return True
        return bool(re.search(r"parametrizations\..*\.\d+\.", name))


def prunes(tensor: Tensor) -> bool:
    """Whether values can be set to zero: bare powers of two, as scales are kept, have none."""
    return tensor.is_floating_point() and tensor.dtype != torch.float8_e8m0fnu


def prunable(name: str) -> bool:
    """Whether a name is one of what is pruned; others may end in ``_mask`` or ``_orig`` for reasons of their own.

    >>> prunable("fc.weight"), prunable("rnn.weight_ih_l0"), prunable("attention.causal")
    (True, True, False)
    """
    return bool(_PRUNED.search(name))


def recurrent(name: str) -> bool:
    """Whether a weight is one of two whose products are summed, so that a row of zeros says nothing of the unit.

    >>> recurrent("cell.weight_ih_l0"), recurrent("fc.weight")
    (True, False)
    """
    return bool(_RECURRENT.search(name.rpartition(".")[2]))


def real(tensor: Tensor) -> Tensor:
    """The values in a type that torch can compare: float8 becomes float32, and zeros of unsigned numbers stay zeros.

    >>> real(torch.ones(2, dtype=torch.bfloat16)).dtype
    torch.bfloat16
    """
    if tensor.is_floating_point() and tensor.element_size() == 1:
        return tensor.float()
    return tensor.detach().view(_SIGNED[tensor.dtype]) if tensor.dtype in _SIGNED else tensor.detach()


def zeros(tensor: Tensor) -> int:
    """How many values are exactly zero.

    >>> zeros(torch.tensor([0.0, -0.0, 1.0]))
    2
    """
    return int((real(tensor) == 0).sum())
