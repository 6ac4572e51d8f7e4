"""Removing units from a network, all or nothing: edited on a copy, compared with the dense one, then handed over."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.core.calls import first_line
from secateur.core.errors import ModelError, SecateurError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import parameters, unwrap
from secateur.surgery.analysis import Analysis, Group, analyse
from secateur.surgery.attention import ThinAttention
from secateur.surgery.attributes import Change, around, known, written
from secateur.surgery.proof import Case, cases, copied, more_rows, trains
from secateur.surgery.rewrite import rewrite
from secateur.surgery.slicing import Kept, check_copy, check_optimizer, kept_of, slice_module, slice_optimizer, sliced

Removal = Mapping[str, Sequence[int]]
"""Which units of which groups go, by the name of the group and the place in it."""


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

    Cost: the analysis, and for each set of attributes tried (nearly always one) two copies of the network and four
    forward passes over the example, two of them in float64.
    """
    own = unwrap(model)
    found = analysis or analyse(own, example)
    groups = _check(found, remove)
    labels, gone, kept = _marked(found, groups)
    shrinking = {p for name, p in own.named_parameters(remove_duplicate=False) if name in kept}
    if optimizer is not None:
        check_optimizer(optimizer, shrinking)
    for each in also:
        check_copy(own, unwrap(each), kept)
    proofs = cases(found, labels, own, example)
    count = sum(p.numel() for p in own.parameters())
    inexact = {group.name: group.inexact for group, _ in groups if group.inexact}
    changes, error, why = _edited(own, found, kept, gone, proofs)
    made, notes = model, []
    if why:
        _may_rewrite(why, rewriting, also)
        made, error = _rewritten(own, found, kept, gone, proofs)
        notes = slice_optimizer(optimizer, _pairs(own, made, kept)) if optimizer is not None else []
    for each in () if why else (own, *map(unwrap, also)):
        swapped = slice_module(each, kept)
        apply(each, changes)
        if each is own and optimizer is not None:
            notes = slice_optimizer(optimizer, swapped)
    after = sum(p.numel() for p in unwrap(made).parameters())
    return Shrunk(made, kept, tuple(changes), error, (count, after), why, inexact, tuple(notes))


def _marked(found: Analysis, groups: list[tuple[Group, list[int]]]) -> tuple[Tensor, Tensor, Kept]:
    """Labels of the units that go, True for every label of one, and what stays of each tensor."""
    chosen = [(group, torch.as_tensor(units)) for group, units in groups]
    labels = torch.cat([group.labels[units] for group, units in chosen])
    gone = torch.zeros(found.run.units.size + 1, dtype=torch.bool)
    gone[labels] = True
    gone = gone[found.run.units.find(torch.arange(found.run.units.size))]
    shapes = {name: value.shape for name, value in found.run.parameters.items()}
    slices = [(n, d, group.index[i][units]) for group, units in chosen for i, (n, d) in enumerate(group.tensors)]
    return labels, gone, kept_of(shapes, slices)


def _may_rewrite(why: str, rewriting: bool, also: Sequence[nn.Module]) -> None:
    if not rewriting:
        raise ModelError(f"the network cannot take the new sizes ({why}); nothing was changed. Allow rewriting.")
    if also:
        raise UsageError(
            f"averaged copies cannot follow, since the network has to be rewritten ({why}); nothing was changed. "
            "Begin a new average."
        )


def apply(model: nn.Module, changes: Sequence[Change]) -> None:
    """Give attributes their new values, and layers what follows from their weights."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for change in changes:
        if change.name == "__class__":
            ThinAttention.adopt(modules[change.path])  # type: ignore[arg-type]
        else:
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


def _rewritten(
    own: nn.Module, found: Analysis, kept: Kept, gone: Tensor, proofs: Sequence[Case]
) -> tuple[nn.Module, float]:
    """The graph with the new sizes, and its error.

    Raises:
        ModelError: when it does not compute the same.
    """
    try:
        made = rewrite(found.run, kept, gone)

        def build(dense: nn.Module) -> nn.Module:
            slice_module(dense, kept)
            small, given = copied(made), dict(dense.named_parameters(remove_duplicate=False))
            with torch.no_grad():
                for name, p in small.named_parameters(remove_duplicate=False):
                    p.copy_(given[name])
            return small

        errors = [case.error(build) for case in proofs]
        example, dtype = proofs[0].example, proofs[0].dtype
        if not found.note and more_rows(own, example, dtype) <= proofs[0].bound:
            errors[0] = max(errors[0], more_rows(made, example, dtype))
    except SecateurError:
        raise
    except Exception as problem:  # any operator may fail in any way
        raise ModelError(
            f"neither the network nor its graph can take the new sizes ({type(problem).__name__}: "
            f"{first_line(problem)}); nothing was changed. Leave groups out."
        ) from problem
    for case, error in zip(proofs, errors, strict=True):
        if error > case.bound:
            raise ModelError(
                f"without these units the network differs by {error:.2g} from the dense one with the units zeroed; "
                "nothing was changed. Leave groups out."
            )
    return made, errors[0]


def _edited(
    own: nn.Module, found: Analysis, kept: Kept, gone: Tensor, proofs: Sequence[Case]
) -> tuple[list[Change], float, str]:
    """Attributes to change and the error that is left, found on copies; or why the network cannot take the sizes."""
    why, learns = "", None
    for changes in _guesses(own, found, kept, gone):

        def build(dense: nn.Module, changes: list[Change] = changes) -> nn.Module:
            slice_module(dense, kept)
            apply(dense, changes)
            return dense

        try:
            errors = [case.error(build) for case in proofs]
        except SecateurError:
            raise
        except Exception as problem:  # any forward may fail in any way
            why = why or f"{type(problem).__name__}: {first_line(problem)[:160]}"
            continue
        wrong = next((e for case, e in zip(proofs, errors, strict=True) if e > case.bound), None)
        if wrong is None:
            learns = trains(own, proofs[0].example) if learns is None else learns
            wrong = "" if learns else trains(build(copied(own)), proofs[0].example)
            if not wrong:
                return changes, errors[0], ""
            why = why or wrong
        why = why or f"its outputs would differ by {wrong:.2g}"
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
        places = {(c.path, c.name) for c in (*sure, *more)}
        wide = [c for c in around(own, sure) if (c.path, c.name) not in places]
        for guess in ([*sure, *more], [*sure, *more, *wide]):
            if guess not in guesses:
                guesses.append(guess)
    return guesses


def _pairs(
    own: nn.Module, made: nn.Module, kept: Kept
) -> dict[nn.Parameter, tuple[nn.Parameter, Mapping[int, Tensor]]]:
    news = dict(made.named_parameters(remove_duplicate=False))
    return {old: (news[name], kept.get(name, {})) for name, old in parameters(own).items() if name in news}
