"""Which tensors of a network can be pruned, and why the others are left alone."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secateur.core.errors import ModelError, UsageError, nearest
from secateur.core.names import Named, aliases, owners, parameters
from secateur.core.patterns import Pattern

_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)


class Coverage(NamedTuple):
    """Prunable tensors by name, and the reason for each tensor that is left alone."""

    prunable: Named
    left_alone: dict[str, str]


def coverage(
    model: nn.Module, only: Sequence[str] = (), skip: Sequence[str] = (), pattern: Pattern | None = None
) -> Coverage:
    """Sort the parameters of a network into prunable ones and ones left alone, with the reason.

    By default every floating-point ``*weight*`` (or ``in_proj_weight``, ``weight_ih_l0``, ...) of at least two
    dimensions is prunable, except lookup tables (embeddings) and whatever is tied to one. Tensors that
    ``only`` names are prunable whatever they are.

    Args:
        model: the network.
        only: globs of parameter names; when given, all others are left alone.
        skip: globs of parameter names to leave alone.
        pattern: leave tensors alone that cannot take it (an error for those that ``only`` names).

    Raises:
        UsageError: when a glob matches nothing, or a tensor named by ``only`` cannot take the pattern.
        ModelError: when nothing is left to prune.
    """
    every, holders, tied = parameters(model), owners(model), aliases(model)
    for glob in (*only, *skip):
        if not any(_matches(names, [glob]) for names in tied.values()):
            raise UsageError(f"no parameter matches {glob!r}. {nearest(glob, every)}")
    prunable: Named = {}
    left: dict[str, str] = {}
    for name, p in every.items():
        named = _matches(tied[name], only)
        if _matches(tied[name], skip):
            why = "skipped by name"
        elif only:
            why = "" if named else "not named"
        else:
            why = _why_not(name, p, holders[name])
        if not why and pattern is not None:
            if named:
                pattern.check(name, tuple(p.shape))
            why = pattern.why_not(tuple(p.shape))
        if why:
            left[name] = why
        else:
            prunable[name] = p
    _refuse_nothing(prunable, left)
    return Coverage(prunable, left)


def _matches(names: Sequence[str], globs: Sequence[str]) -> bool:
    """Whether any name of a tensor matches any glob."""
    return any(fnmatch.fnmatchcase(name, glob) for name in names for glob in globs)


def _refuse_nothing(prunable: Named, left: dict[str, str]) -> None:
    if not prunable:
        reasons = "; ".join(f"`{n}`: {why}" for n, why in list(left.items())[:4]) or "it has no parameters"
        raise ModelError(f"nothing in this network can be pruned ({reasons}). Name tensors with `--only 'glob'`.")


def _why_not(name: str, p: nn.Parameter, holders: tuple[nn.Module, ...]) -> str:
    if is_lazy(p):
        return "its shape is not known before the network has seen a batch"
    if not p.is_floating_point():
        return f"its type is {p.dtype}"
    if p.dim() < 2:
        return "a bias or scale: few numbers, and each matters"
    if not p.numel():
        return "it is empty"
    if any(isinstance(module, _LOOKUPS) for module in holders):
        return "an embedding (or tied to one): rows are looked up, not multiplied; name it with `only` to include it"
    if "weight" not in name.rpartition(".")[2]:
        return "a free parameter, not called a weight; name it with `only` to include it"
    return ""


def comparable(tensor: Tensor) -> Tensor:
    """The values in a type that torch can compare and test: numbers of 8 bits become float32, which holds them all.

    >>> import torch
    >>> comparable(torch.ones(2).to(torch.float8_e5m2)).dtype, comparable(torch.ones(2)).dtype
    (torch.float32, torch.float32)
    """
    values = tensor.detach()
    return values.float() if values.is_floating_point() and values.element_size() == 1 else values


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not finite.

    Raises:
        ModelError: naming the first such tensor, the count and what to do.
    """
    for name, p in tensors.items():
        bad = int((~comparable(p).isfinite()).sum())
        if bad:
            raise ModelError(
                f"{bad:,} of {p.numel():,} weights of `{name}` are NaN or infinite: the training diverged, or the file "
                "is damaged. Start from an earlier checkpoint (`best/`), or train with a lower rate."
            )
