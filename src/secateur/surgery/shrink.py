"""Removing units from a network, all or nothing: edited on a copy, compared with the dense one, then handed over."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from secateur.core.errors import ModelError, SecateurError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import parameters, unwrap
from secateur.runtime.lower_export import first_line
from secateur.surgery.analysis import Analysis, Group, analyse
from secateur.surgery.attributes import Change, known, written
from secateur.surgery.reference import Zeroed, casts
from secateur.surgery.rewrite import rewrite
from secateur.surgery.slicing import Kept, kept_of, slice_module, slice_optimizer, sliced
from secateur.surgery.tracing import split_inputs

Removal = Mapping[str, Sequence[int]]
"""Which units of which groups go, by the name of the group and the place in it."""

_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Shrunk:
    """A network without some of its units.

    Args:
        model: the user's own network, smaller; or a ``GraphModule`` where its forward writes sizes down.
        kept: for each tensor that lost slices, by dimension, the indices of those that stay.
        changes: attributes of modules that took another value.
        error: largest difference from the dense network with the units zeroed, relative to the largest output.
        params: parameters before and after.
        rewritten: why the model is a ``GraphModule``; empty where it is the user's own.
        inexact: what else the removal changed, such as the statistics of a normalisation, by group.
        notes: anything else, such as optimizer state that begins anew.
    """

    model: nn.Module
    kept: Kept
    changes: tuple[Change, ...]
    error: float
    params: tuple[int, int]
    rewritten: str = ""
    inexact: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def masks(self, masks: Masks) -> Masks:
        """Masks of the dense network as masks of this one."""
        return Masks({name: sliced(mask, self.kept.get(name, {})) for name, mask in masks.items()})


def shrink(
    model: nn.Module,
    example: Any,
    remove: Removal,
    *,
    analysis: Analysis | None = None,
    optimizer: Optimizer | None = None,
    also: Sequence[nn.Module] = (),
    rewriting: bool = True,
) -> Shrunk:
    """Remove units from a network in place, once a copy without them has been proved to compute the same.

    "The same" is what the dense network computes with the units zeroed wherever a sum is taken over them, and with
    statistics of normalisations taken over those that stay.

    Args:
        model: the network. Its class, its modules and their hooks stay.
        example: one batch as it takes it.
        remove: which units go, by the name of their group.
        analysis: that of this network, if it is known already.
        optimizer: the one that trains it; it gets the new parameters, and its state is sliced.
        also: averaged copies (EMA) of the network, edited alike.
        rewriting: give a ``GraphModule`` instead where the network's own forward cannot take the new sizes; without,
            refuse.

    Raises:
        UsageError: for an unknown group, a unit out of range, or a group that would be empty.
        ModelError: when the result does not compute the same; nothing was changed then.

    Cost: the analysis, two copies of the network, and three forward passes over the example.
    """
    own = unwrap(model)
    found = analysis or analyse(own, example)
    groups = _check(found, remove)
    labels = torch.cat([group.labels[torch.as_tensor(list(units))] for group, units in groups])
    gone = torch.zeros(found.run.units.size + 1, dtype=torch.bool)
    gone[labels] = True
    gone = gone[found.run.units.find(torch.arange(found.run.units.size))]
    shapes = {name: value.shape for name, value in found.run.parameters.items()}
    slices = [(name, d, group.index[i][torch.as_tensor(list(units))])
              for group, units in groups for i, (name, d) in enumerate(group.tensors)]  # fmt: skip
    kept = kept_of(shapes, slices)
    expected, wide = _expected(found, labels, example)
    count = sum(p.numel() for p in own.parameters())
    inexact = {group.name: group.inexact for group, _ in groups if group.inexact}
    changes, error, why = _edited(own, found, kept, gone, example, (expected, wide))
    if why and not rewriting:
        raise ModelError(f"the network cannot take the new sizes ({why}); nothing was changed. Allow rewriting.")
    if why:
        made, error = _rewritten(found, kept, gone, example, (expected, wide))
        _refuse(error, wide, groups)
        swapped = _pairs(own, made, kept)
        notes = slice_optimizer(optimizer, swapped) if optimizer is not None else []
        if also:
            raise UsageError("averaged copies cannot follow a network that had to be rewritten; begin a new average.")
        after = sum(p.numel() for p in made.parameters())
        return Shrunk(made, kept, (), error, (count, after), why, inexact, tuple(notes))
    notes = []
    for each in (own, *map(unwrap, also)):
        swapped = slice_module(each, kept)
        apply(each, changes)
        if each is own and optimizer is not None:
            notes = slice_optimizer(optimizer, swapped)
    after = sum(p.numel() for p in own.parameters())
    return Shrunk(model, kept, tuple(changes), error, (count, after), "", inexact, tuple(notes))


def apply(model: nn.Module, changes: Sequence[Change]) -> None:
    """Give attributes their new values, and layers what follows from their weights."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for change in changes:
        setattr(modules[change.path], change.name, change.new)
    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.modules.conv._ConvNd) and weight is not None:
            a, b = (1, 0) if not module.transposed else (0, 1)
            sizes = [weight.shape[0], weight.shape[1]]
            sizes[1] *= module.groups
            module.in_channels, module.out_channels = sizes[a], sizes[b]
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


def _check(found: Analysis, remove: Removal) -> list[tuple[Group, list[int]]]:
    groups = []
    for name, units in remove.items():
        group, chosen = found.group(name), sorted({int(u) for u in units})
        if not chosen:
            continue
        if chosen[0] < 0 or chosen[-1] >= len(group):
            raise UsageError(
                f"group {name!r} has units 0 to {len(group) - 1}, not {chosen[-1] if chosen[0] >= 0 else chosen[0]}."
            )
        groups.append((group, chosen))
    if not groups:
        raise UsageError("nothing is to be removed; name at least one unit.")
    lost: dict[tuple[str, int], int] = {}
    for group, chosen in groups:
        for (name, d), index in zip(group.tensors, group.index, strict=True):
            lost[name, d] = lost.get((name, d), 0) + len(chosen) * index.shape[1]
    for (name, d), count in lost.items():
        if count >= found.run.parameters[name].shape[d]:
            raise UsageError(f"nothing would be left of dimension {d} of `{name}`; keep at least one unit of it.")
    return groups


def _expected(found: Analysis, labels: Tensor, example: Any) -> tuple[list[Any], torch.dtype | None]:
    """What the shrunken network must give, and the type in which both are computed."""
    args, kwargs = split_inputs(example)
    for dtype in (None,) if casts(found.run) else (torch.float64, None):
        try:
            with torch.no_grad():
                return Zeroed(found.run, labels, dtype)(args, kwargs), dtype
        except Exception as error:  # an operator that does not take float64
            if dtype is None:
                raise ModelError(f"the dense network cannot be run from its graph ({error}).") from error
    raise AssertionError


@torch.no_grad()
def _run(model: nn.Module, example: Any, dtype: torch.dtype | None) -> list[Any]:
    args, kwargs = split_inputs(example)
    if dtype is not None:
        model = copy.deepcopy(model).to(dtype)
        args, kwargs = pytree.tree_map(
            lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, (args, kwargs)
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytree.tree_leaves(model(*args, **kwargs))


def _error(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest difference, relative to the largest number of each output; infinite where shapes differ."""
    found = [x for x in found if isinstance(x, Tensor)]
    expected = [x for x in expected if isinstance(x, Tensor)]
    if len(found) != len(expected):
        return float("inf")
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape:
            return float("inf")
        if not one.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(one, other.to(one)) else float("inf"))
        elif one.numel():
            size = float(other.abs().max()) or 1.0
            apart = float((one.double() - other.double()).abs().max()) / size
            worst = max(worst, apart if apart == apart else float("inf"))
    return worst


def _bound(wide: torch.dtype | None, expected: Sequence[Any]) -> float:
    if wide is not None:
        return _CLOSE[wide]
    kinds = [x.dtype for x in expected if isinstance(x, Tensor) and x.is_floating_point()]
    return max((_CLOSE.get(kind, 1e-5) for kind in kinds), default=1e-5)


def _refuse(error: float, wide: torch.dtype | None, groups: Sequence[tuple[Group, Any]]) -> None:
    if error > _CLOSE[wide or torch.float32]:
        names = ", ".join(group.name for group, _ in groups[:4])
        raise ModelError(
            f"without these units ({names}) the network differs by {error:.2g} from the dense one with the units "
            "zeroed; nothing was changed. Leave the group out."
        )


def _rewritten(
    found: Analysis, kept: Kept, gone: Tensor, example: Any, expected: tuple[list[Any], torch.dtype | None]
) -> tuple[nn.Module, float]:
    try:
        made = rewrite(found.run, kept, gone)
        return made, _error(_run(made, example, expected[1]), expected[0])
    except SecateurError:
        raise
    except Exception as problem:  # any operator may fail in any way
        raise ModelError(
            f"neither the network nor its graph can take the new sizes ({type(problem).__name__}: "
            f"{first_line(problem)}); nothing was changed. Leave groups out."
        ) from problem


def _edited(
    own: nn.Module,
    found: Analysis,
    kept: Kept,
    gone: Tensor,
    example: Any,
    expected: tuple[list[Any], torch.dtype | None],
) -> tuple[list[Change], float, str]:
    """Attributes to change and the error that is left, found on a copy; or why the network cannot take the sizes."""
    outputs, wide = expected
    why = ""
    for changes in _guesses(own, found, kept, gone):
        trial = copy.deepcopy(own).eval()
        slice_module(trial, kept)
        try:
            apply(trial, changes)
            error = _error(_run(trial, example, wide), outputs)
        except SecateurError:
            raise
        except Exception as problem:  # any forward may fail in any way
            why = why or f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:160]}"
            continue
        if error <= _bound(wide, outputs):
            return changes, error, ""
        why = why or f"its outputs would differ by {error:.2g}"
    return [], float("inf"), why


def _guesses(own: nn.Module, found: Analysis, kept: Kept, gone: Tensor) -> list[list[Change]]:
    """Sets of attributes that may have to change, the likeliest first."""
    small = copy.deepcopy(own)
    slice_module(small, kept)
    sure = known(own, small)
    places = {(c.path, c.name) for c in sure}
    maybe = [c for c in written(found.run, own, gone) if (c.path, c.name) not in places]
    narrow = [c for c in maybe if "dim" not in c.name and "size" not in c.name]
    heads = [c for c in maybe if "head" in c.name and "dim" not in c.name and "size" not in c.name]
    guesses = []
    for more in (maybe, narrow, heads, []):
        if [*sure, *more] not in guesses:
            guesses.append([*sure, *more])
    return guesses


def _pairs(
    own: nn.Module, made: nn.Module, kept: Kept
) -> dict[nn.Parameter, tuple[nn.Parameter, Mapping[int, Tensor]]]:
    news = dict(made.named_parameters(remove_duplicate=False))
    return {old: (news[name], kept.get(name, {})) for name, old in parameters(own).items() if name in news}


__all__ = ["Removal", "Shrunk", "apply", "shrink"]
