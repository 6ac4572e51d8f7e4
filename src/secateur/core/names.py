"""Plain names of parameters, whatever wraps the network or stands behind a parametrization."""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

Named = dict[str, Tensor]
"""Tensors under the keys of ``model.named_parameters()``: a tied tensor appears once."""

_PARAMETRIZED = re.compile(r"parametrizations\.([^.]+)\.original$")


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own network inside DDP, ``torch.compile`` or an averaged copy."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, DistributedDataParallel | DataParallel | AveragedModel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def plain(name: str) -> str:
    """The name a parameter has without parametrizations.

    >>> plain("body.0.parametrizations.weight.original")
    'body.0.weight'
    """
    return _PARAMETRIZED.sub(r"\1", name)


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the unwrapped network under plain names; a tied tensor once, under its first name."""
    return {plain(name): p for name, p in unwrap(model).named_parameters()}


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """All names of each tensor, under its first: more than one for tied weights."""
    names: dict[int, list[str]] = {}
    for name, p in unwrap(model).named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(plain(name))
    return {every[0]: every for every in names.values()}


def owners(model: nn.Module) -> dict[str, tuple[nn.Module, ...]]:
    """The modules that hold each tensor (several for tied weights), under the tensor's first name."""
    modules = dict(unwrap(model).named_modules(remove_duplicate=False))
    found: dict[str, tuple[nn.Module, ...]] = {}
    for first, every in aliases(model).items():
        holders = {id(modules[name.rpartition(".")[0]]): modules[name.rpartition(".")[0]] for name in every}
        found[first] = tuple(holders.values())  # a module under two names holds it once
    return found
