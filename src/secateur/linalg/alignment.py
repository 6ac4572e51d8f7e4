"""Units that can change places without a trace, and the permutation of one network's units that fits another's best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from secateur.core.errors import ModelError, UsageError, nearest
from secateur.core.names import Named, unwrap

_SMALL = 1e-12


class Place(NamedTuple):
    """Where units lie: a tensor, one of its dimensions, and which slices belong to each unit, ``(units, slices)``."""

    tensor: str
    dim: int
    index: Tensor


@dataclass(frozen=True)
class Exchange:
    """Units that can change places: the network computes the same when all of their slices move together.

    Args:
        name: of the group.
        places: every tensor and dimension that carries them.
    """

    name: str
    places: tuple[Place, ...]

    def __len__(self) -> int:
        return len(self.places[0].index)


@dataclass(frozen=True)
class Matching:
    """The permutation found by :func:`match`.

    Args:
        state: the second network's tensors, permuted.
        orders: by group, for each place the number of the unit that has come there, ``(units,)``.
        objective: the sum of products of the two networks' weights, before and after each permutation taken.
        sweeps: passes over all groups, the last one without a gain.
    """

    state: Named
    orders: dict[str, Tensor]
    objective: tuple[float, ...]
    sweeps: int


def tensors_of(model: nn.Module) -> Named:
    """Parameters and buffers of a network, each tensor once, under its first name."""
    own = unwrap(model)
    return {**dict(own.named_parameters()), **dict(own.named_buffers())}


def permute(state: Mapping[str, Tensor], groups: Sequence[Exchange], orders: Mapping[str, Tensor]) -> Named:
    """Tensors whose units have changed places; masks and running statistics are permuted like weights.

    Args:
        state: tensors by name; places whose tensor is not among them are passed over.
        groups: which units there are.
        orders: by group, the unit that comes to each place, ``(units,)``; groups that are not named stay.

    Raises:
        UsageError: when an order is no permutation of the units, or its group is unknown.
    """
    sizes = {group.name: len(group) for group in groups}
    for name, order in orders.items():
        if name not in sizes:
            raise UsageError(f"no group of units is called {name!r}. {nearest(name, sizes)}")
        if not torch.equal(order.sort().values.cpu(), torch.arange(sizes[name])):
            raise UsageError(f"the order of group {name!r} is no permutation of 0 to {sizes[name] - 1}.")
    moved = dict(state)
    for group in groups:
        for place in group.places if group.name in orders else ():
            if place.tensor in moved:
                moved[place.tensor] = _moved(moved[place.tensor], place, orders[group.name])
    return moved


def match(
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    groups: Sequence[Exchange],
    weights: Sequence[str],
    random: Generator | None = None,
    sweeps: int = 100,
) -> Matching:
    """Permute the units of the second network so that its weights have the largest product with those of the first.

    One group at a time, the others fixed, is a linear assignment: unit j of the second goes where it has the largest
    sum of products with a unit of the first. Where one tensor carries a group in two dimensions the assignment is of
    the part that is linear in either; an order is taken only when the whole product grows, so it never falls. The sum
    of squared distances falls as the product grows. The result is a local optimum.

    Args:
        first: tensors of the network that stays.
        second: tensors of the other one, of the same names and shapes.
        groups: which units can change places.
        weights: names of the tensors that count; others (running statistics, masks) move along.
        random: draws the order of the groups in each sweep; as they come by default.
        sweeps: at most so many.

    Raises:
        ModelError: when names or shapes differ.
        UsageError: when scipy is not installed.

    Cost: for each group and sweep one matrix product of its slices, and an assignment of O(units³), in float64.
    """
    _check(first, second)
    state, counted = dict(second), set(weights)
    orders = {group.name: torch.arange(len(group)) for group in groups}
    total = sum(_product(first[name], state[name]) for name in counted)
    objective, scale = [total], _scale(first, second, counted)
    taken = 0
    while taken < sweeps:
        taken += 1
        before = objective[-1]
        turns = torch.randperm(len(groups), generator=random).tolist() if random else range(len(groups))
        for group in (groups[turn] for turn in turns):
            order = _assigned(first, state, group, counted)
            moved = permute(state, [group], {group.name: order})
            touched = {place.tensor for place in group.places} & counted
            gain = sum(_product(first[n], moved[n]) - _product(first[n], state[n]) for n in touched)
            if gain > _SMALL * scale:
                state, orders[group.name] = moved, orders[group.name][order]
                objective.append(objective[-1] + gain)
        if objective[-1] - before <= _SMALL * scale:
            break
    return Matching(state, orders, tuple(objective), taken)


def _assigned(first: Mapping[str, Tensor], state: Named, group: Exchange, counted: set[str]) -> Tensor:
    """The best order of one group, the other groups and the other dimension of the same tensor as they are."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError as error:
        raise UsageError("matching units needs scipy: `pip install scipy`.") from error
    profit = torch.zeros(len(group), len(group), dtype=torch.float64)
    for place in group.places:
        if place.tensor in counted:
            one, two = (_slices(tensors[place.tensor], place) for tensors in (first, state))
            profit += (one @ two.T).cpu()
    return torch.from_numpy(linear_sum_assignment(profit.numpy(), maximize=True)[1])


def _slices(tensor: Tensor, place: Place) -> Tensor:
    """(units, everything else) in float64."""
    rows = tensor.detach().movedim(place.dim, 0).flatten(1) if tensor.dim() > 1 else tensor.detach()[:, None]
    return rows.double()[place.index.to(tensor.device)].flatten(1)


def _moved(tensor: Tensor, place: Place, order: Tensor) -> Tensor:
    places = torch.arange(tensor.shape[place.dim])
    places[place.index.reshape(-1)] = place.index[order.cpu()].reshape(-1)
    return tensor.detach().index_select(place.dim, places.to(tensor.device))


def _product(one: Tensor, other: Tensor) -> float:
    return float((one.detach().double() * other.detach().double()).sum())


def _scale(first: Mapping[str, Tensor], second: Mapping[str, Tensor], counted: set[str]) -> float:
    """The largest that the product can be: that of the norms."""
    squares = [sum(_product(tensors[name], tensors[name]) for name in counted) for tensors in (first, second)]
    return (squares[0] * squares[1]) ** 0.5


def _check(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    odd = sorted(set(first) ^ set(second))
    if odd:
        raise ModelError(f"the two networks are of different architectures: only one has `{odd[0]}`.")
    for name, tensor in first.items():
        if tensor.shape != second[name].shape:
            raise ModelError(
                f"the two networks are of different architectures: `{name}` has shapes {tuple(tensor.shape)} and "
                f"{tuple(second[name].shape)}."
            )
