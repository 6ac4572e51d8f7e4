"""What can be removed from a network: units, the slices of tensors that go with each, and why the rest stays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.core.errors import UsageError
from secateur.core.names import unwrap
from secateur.surgery import rules_along, rules_compute, rules_shape  # noqa: F401  they register the rules
from secateur.surgery.labels import Units, Value
from secateur.surgery.propagate import Pass
from secateur.surgery.tracing import Traced, trace

Granularity = Literal["heads", "dims"]


@dataclass(frozen=True)
class Group:
    """Units that lie in the same dimensions of the same tensors.

    Args:
        name: that of the tensor and dimension that makes them, such as ``"layer1.0.conv1.weight"``.
        tensors: every tensor and dimension that loses a slice with them, by its name in ``state_dict``.
        index: for each of ``tensors``, shape ``(units, slices)``: which slices go with which unit.
        inexact: what else changes when they go, such as the statistics of a normalisation; empty where nothing does.
    """

    name: str
    tensors: tuple[tuple[str, int], ...]
    index: tuple[Tensor, ...]
    inexact: tuple[str, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Row:
    """A line of the coverage table.

    Args:
        tensor: its name in ``state_dict``.
        dim: which dimension.
        size: its length.
        units: how many units of it can be removed.
        why: why the others stay; empty where all can go.
    """

    tensor: str
    dim: int
    size: int
    units: int
    why: str


@dataclass(frozen=True)
class Analysis:
    """What can be removed from a network.

    Args:
        groups: units that can go, by group.
        rows: the coverage table, a line for each dimension of each tensor.
        operators: operators without a rule that units met, and how often; what flows into them stays.
        granularity: what units of attention are: heads, or the same index in every head.
        note: why the batch of the graph is fixed; empty where it is free.
        run: the labelled graph.
        examples: how many the example holds.
    """

    groups: tuple[Group, ...]
    rows: tuple[Row, ...]
    operators: Mapping[str, int]
    granularity: Granularity
    note: str
    run: Pass
    examples: int = 1

    def __str__(self) -> str:
        """The coverage table."""
        width = max((len(row.tensor) for row in self.rows), default=6)
        lines = [f"{'tensor':<{width}}  dim   size  units  why the rest stays"]
        lines += [f"{r.tensor:<{width}}  {r.dim:>3}  {r.size:>5}  {r.units:>5}  {r.why}".rstrip() for r in self.rows]
        lines += [
            f"not known: {name} ({count} times); what flows into it stays" for name, count in self.operators.items()
        ]
        return "\n".join(lines)

    def group(self, name: str) -> Group:
        """The group of that name.

        Raises:
            UsageError: when there is none.
        """
        for group in self.groups:
            if group.name == name:
                return group
        known = ", ".join(group.name for group in self.groups[:6])
        raise UsageError(f"there is no group {name!r} of removable units; there are {known or 'none'}, and so on.")


def analyse(model: nn.Module, example: Any, granularity: Granularity = "heads") -> Analysis:
    """Find what can be removed from a network without a trace.

    Args:
        model: the network; it stays as it is.
        example: one batch as it takes it: a tensor, a tuple of positional or a mapping of keyword arguments.
        granularity: ``"heads"``: whole heads of attention are units (with all queries of a shared key); ``"dims"``: the
            same index in every head.

    Raises:
        UsageError: for another granularity.
        ModelError: when torch.export cannot trace the network.

    Cost: one trace, and a pass over the graph that moves integers of the size of the activations.
    """
    if granularity not in get_args(Granularity):
        raise UsageError(f"granularity must be 'heads' or 'dims', not {granularity!r}.")
    found = label(trace(unwrap(model), example), granularity)
    sizes = [x.shape[0] for x in pytree.tree_leaves(example) if isinstance(x, Tensor) and x.dim()]
    return replace(found, examples=sizes[0] if sizes else 1)


def label(traced: Traced, granularity: Granularity = "heads") -> Analysis:
    """The analysis of a graph."""
    run = Pass(traced.program, Units(granularity == "heads"))
    run.run()
    frozen, marked = run.units.reasons(run.units.frozen), run.units.reasons(run.units.marked)
    members, rows = _members(run, frozen)
    counts: dict[str, int] = {}
    for why in run.left.values():
        counts[why.removeprefix("no rule for ")] = counts.get(why.removeprefix("no rule for "), 0) + 1
    return Analysis(tuple(_groups(members, marked)), tuple(rows), counts, granularity, traced.note, run)


def slices_of(run: Pass, value: Value) -> Iterable[tuple[int, Tensor]]:
    """Dimensions of a settled value with the unit of each slice."""
    for layer in value.layers:
        roots = run.units.find(layer)
        for d, size in enumerate(roots.shape):
            if size > 1:
                yield d, roots.reshape(-1)
                break


_Members = dict[int, list[tuple[str, int, Tensor]]]


def _members(run: Pass, frozen: Mapping[int, Sequence[str]]) -> tuple[_Members, list[Row]]:
    members: _Members = {}
    rows: list[Row] = []
    for name, value in run.parameters.items():
        seen = dict(slices_of(run, value))
        for d, size in enumerate(value.shape):
            roots = seen.get(d)
            if roots is None:
                rows.append(Row(name, d, size, 0, "a single slice" if size == 1 else "it stays whole"))
                continue
            order = torch.argsort(roots, stable=True)
            found, counts = torch.unique_consecutive(roots[order], return_counts=True)
            free = 0
            for root, places in zip(found.tolist(), order.split(counts.tolist()), strict=True):
                if root not in frozen:
                    members.setdefault(root, []).append((name, d, places))
                    free += 1
            why = next((frozen[root][0] for root in found.tolist() if root in frozen), "")
            rows.append(Row(name, d, size, free, why))
    return members, rows


def _groups(members: _Members, marked: Mapping[int, Sequence[str]]) -> Iterable[Group]:
    by_place: dict[tuple[tuple[str, int, int], ...], list[int]] = {}
    for root in sorted(members):
        key = tuple((name, d, len(places)) for name, d, places in members[root])
        by_place.setdefault(key, []).append(root)
    taken: dict[str, int] = {}
    for key, roots in by_place.items():
        name = _name(key)
        taken[name] = taken.get(name, 0) + 1
        if taken[name] > 1:
            name = f"{name}#{taken[name]}"
        index = tuple(torch.stack([members[root][i][2] for root in roots]) for i in range(len(key)))
        inexact = tuple(dict.fromkeys(what for root in roots for what in marked.get(root, ())))
        yield Group(name, tuple((n, d) for n, d, _ in key), index, inexact, torch.tensor(roots))


def _name(key: Sequence[tuple[str, int, int]]) -> str:
    """The first tensor that makes the units: a weight with several dimensions that loses its first."""
    for name, d, _ in key:
        if d == 0 and "weight" in name.rpartition(".")[2]:
            return name
    return f"{key[0][0]}:{key[0][1]}"
