"""Which units of a network can change places, found from its graph and proved on the network itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from secateur.core.names import unwrap
from secateur.core.streams import stream
from secateur.linalg.alignment import Exchange, Matching, Place, match, permute, tensors_of
from secateur.surgery.analysis import Group, analyse
from secateur.surgery.proof import _drawn, _noise, difference, run
from secateur.surgery.reference import casts

_EXACT, _CASTING = 1e-9, 1e-4


def symmetries(model: nn.Module, example: Any) -> tuple[Exchange, ...]:
    """Groups of units whose permutation does not change what the network computes.

    The groups are those of :func:`secateur.surgery.analyse`: hidden units, channels (of a residual stream too) and
    heads, with the slices that go with each. Every group is proved: with weights, statistics and inputs drawn anew,
    the network computes the same in float64 after two of its permutations; a group that does not pass (channels that
    a group normalisation binds to their place, say) is left out.

    Args:
        model: the network; it stays as it is.
        example: one batch as it takes it, of two examples or more.

    Raises:
        ModelError: when torch.export cannot trace the network.

    Cost: the analysis, and two forward passes of the example in float64 for each group.
    """
    own = unwrap(model)
    found = analyse(own, example)
    trial, noise = _drawn(own).double(), _noise(example)
    _draw_statistics(trial)
    expected = run(trial, noise, torch.float64)
    bound = _CASTING if casts(found.run) else _EXACT
    groups = [made for made in map(_exchange(own), found.groups) if len(made) > 1]
    return tuple(g for g in groups if all(_same(trial, noise, expected, g, o) <= bound for o in _orders(g)))


def align(
    model: nn.Module, other: Mapping[str, Tensor], example: Any, groups: Sequence[Exchange] | None = None
) -> Matching:
    """Permute the units of another network of the same architecture so that its weights lie closest to this one's.

    Args:
        model: the network that stays.
        other: tensors of the other one, under the names of :func:`secateur.linalg.alignment.tensors_of`.
        example: one batch as the network takes it.
        groups: its units that can change places, if they are known already (:func:`symmetries`).

    Returns:
        The permuted tensors, which compute what ``other`` computes, and the permutations.

    Raises:
        ModelError: when the networks differ in names or shapes, or the network cannot be traced.
        UsageError: when scipy is not installed.

    Cost: as :func:`symmetries` and :func:`secateur.linalg.alignment.match`.
    """
    groups = symmetries(model, example) if groups is None else groups
    weights = [name for name, p in unwrap(model).named_parameters() if p.is_floating_point()]
    return match(tensors_of(model), other, groups, weights, stream(0, "alignment"))


def _exchange(own: nn.Module) -> Any:
    """A function that names a group's tensors by their first names, each dimension once."""
    state = dict(own.named_parameters(remove_duplicate=False)) | dict(own.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, tensor in tensors_of(own).items():
        first.setdefault(id(tensor), name)

    def made(group: Group) -> Exchange:
        places: dict[tuple[str, int], Place] = {}
        for (name, dim), index in zip(group.tensors, group.index, strict=True):
            known = first[id(state[name])] if name in state else name
            places.setdefault((known, dim), Place(known, dim, index.cpu()))
        return Exchange(group.name, tuple(places.values()))

    return made


def _orders(group: Exchange) -> list[Tensor]:
    units = len(group)
    return [torch.arange(units).roll(1), torch.randperm(units, generator=stream(0, "symmetry", group.name))]


def _same(trial: nn.Module, noise: Any, expected: list[Any], group: Exchange, order: Tensor) -> float:
    """How far the outputs move when a group's units change places; infinite where that cannot be computed."""
    state = tensors_of(trial)
    moved = permute(state, [group], {group.name: order})
    kept = {name: tensor.detach().clone() for name, tensor in state.items()}
    with torch.no_grad():
        try:
            for name, tensor in state.items():
                tensor.copy_(moved[name])
            return difference(run(trial, noise, torch.float64), expected)
        finally:
            for name, tensor in state.items():
                tensor.copy_(kept[name])


def _draw_statistics(model: nn.Module) -> None:
    """Running statistics of which no two agree, so that one that does not move along is noticed."""
    random = stream(0, "symmetry", "statistics")
    for module in model.modules():
        if isinstance(module, _NormBase):
            for buffer in (module.running_mean, module.running_var):
                if buffer is not None:
                    buffer.copy_(0.5 + torch.rand(buffer.shape, generator=random, dtype=torch.float64))
