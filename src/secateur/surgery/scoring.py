"""Scores of units from scores of weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Literal, TypedDict, get_args

import torch
from torch import Tensor

from secateur.core.errors import ModelError, UsageError, nearest
from secateur.core.names import Named, plain
from secateur.core.select import check_scores
from secateur.surgery.analysis import Analysis, Group

Reduce = Literal["sum", "mean", "max", "l2", "units"]
Normalize = Literal["none", "mean", "max", "l2", "standard"]
Where = Literal["all", "producers", "consumers"]
Missing = Literal["error", "leave"]


class How(TypedDict):
    """How scores of weights are read."""

    reduce: Reduce
    where: Where


def how(criterion: str) -> How:
    """How the scores of a criterion are meant to be read.

    Criteria that score whole filters spread a filter's score over its weights, so that their mean is that score:
    they are read where units are made. Criteria that score inputs spread theirs over the column that takes the input:
    they are read where units are used. Scores of single weights add up over all that goes with the unit, as in
    DepGraph.

    >>> how("taylor_filter"), how("magnitude")
    ({'reduce': 'units', 'where': 'producers'}, {'reduce': 'sum', 'where': 'all'})
    """
    name = criterion.rpartition(":")[2].rpartition(".")[2]
    if name in ("taylor_filter", "sosp_h", "sosp_i", "bn_scale", "fpgm"):
        return {"reduce": "units", "where": "producers"}
    if name in ("flap", "minitron"):
        return {"reduce": "sum", "where": "consumers"}
    return {"reduce": "sum", "where": "all"}


def unit_scores(
    analysis: Analysis,
    scores: Named,
    reduce: Reduce = "sum",
    normalize: Normalize = "none",
    *,
    where: Where = "all",
    missing: Missing = "error",
) -> dict[str, Tensor]:
    """Scores of the units of every group, from those of the weights that go with them.

    Every weight counts once, however many names and dimensions it is reached by; tensors without scores are passed
    over. Sums are float64.

    Args:
        analysis: the groups.
        scores: per weight, under the names of the network's parameters, as criteria give them.
        reduce: over the weights of a unit: their ``"sum"``, ``"mean"``, ``"max"`` or ``"l2"`` (root of the sum of
            squares); or ``"units"``, the mean over each slice, added over the slices: what a criterion of whole
            filters gave each of them.
        normalize: within each group: ``"none"``, divide by the ``"mean"``, the ``"max"`` or the ``"l2"`` norm of its
            units' absolute scores, or ``"standard"``: subtract the mean and divide by the standard deviation (FLAP).
            A group that would be divided by 0 scores 0.
        where: weights that count: ``"all"``; ``"producers"``, slices of first dimensions (filters, rows), which make
            the unit and which criteria of whole filters score; or ``"consumers"``, slices of other dimensions, which
            use it. :func:`how` says which of these a criterion asks for.
        missing: what becomes of a group without any score: an ``"error"``, or ``"leave"`` it out (:func:`unscored`
            says why).

    Returns:
        float64, shape ``(units,)``, by the name of the group, on the device of the scores.

    Raises:
        UsageError: for scores of unknown tensors or of other shapes, or an unknown option.
        ModelError: when a score is NaN, or a group has no scores.

    Cost: two passes over the scores.
    """
    for value, kind in ((reduce, Reduce), (normalize, Normalize), (where, Where), (missing, Missing)):
        if value not in get_args(kind):
            raise UsageError(f"{value!r} is none of {', '.join(get_args(kind))}.")
    check_scores(scores)
    own = _Scores(analysis, scores)
    found: dict[str, Tensor] = {}
    for group in analysis.groups:
        parts = own.of(group, where)
        if parts:
            found[group.name] = _normalized(_reduced(parts, reduce), normalize)
        elif missing == "error":
            raise ModelError(
                f"no units of group {group.name!r} can be scored: {_why(group, where)}. Score one of its tensors, "
                'or leave such groups whole with `missing="leave"`.'
            )
    return found


def unscored(analysis: Analysis, scores: Named, where: Where = "all") -> dict[str, str]:
    """Why groups have no scores, by name; empty when all have."""
    own = _Scores(analysis, scores)
    return {group.name: _why(group, where) for group in analysis.groups if not own.of(group, where)}


def _why(group: Group, where: Where) -> str:
    names = list(dict.fromkeys(name for name, d in group.tensors if _counts(d, where)))
    if not names:
        return f"none of its tensors is among the {where}"
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"there are no scores for {', '.join(f'`{name}`' for name in names[:4])}{more}"


def _counts(d: int, where: Where) -> bool:
    return where == "all" or (d == 0) == (where == "producers")


_Part = tuple[Tensor, dict[int, Tensor]]
"""Scores of a tensor, and for each dimension that loses slices which slices go with which unit."""


class _Scores:
    """Scores under every name of their tensor."""

    def __init__(self, analysis: Analysis, scores: Named) -> None:
        program = analysis.run.program
        tensors: Mapping[str, Tensor] = program.state_dict
        self.first: dict[int, str] = {}
        self.own = {name: self.first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
        named = {plain(name): name for name in tensors}
        self.scores: Named = {}
        for name, score in scores.items():
            full = name if name in tensors else named.get(plain(name), "")
            if not full:
                raise UsageError(f"there are scores for {name!r}, which is no tensor. {nearest(name, tensors)}")
            if score.shape != tensors[full].shape:
                raise UsageError(
                    f"the scores of `{name}` have shape {tuple(score.shape)}, the tensor {tuple(tensors[full].shape)}."
                )
            self.scores[self.own[full]] = score

    def of(self, group: Group, where: Where) -> list[_Part]:
        """What counts of a group: each tensor once, with every dimension of it once."""
        found: dict[str, dict[int, Tensor]] = {}
        for (name, d), index in zip(group.tensors, group.index, strict=True):
            own = self.own.get(name, name)
            if own in self.scores and _counts(d, where):
                found.setdefault(own, {})[d] = index.to(self.scores[own].device)
        return [(self.scores[name], dims) for name, dims in found.items()]


def _reduced(parts: list[_Part], reduce: Reduce) -> Tensor:
    if reduce == "max":
        every = [_along(score, d, "max")[index].amax(1) for score, dims in parts for d, index in dims.items()]
        return torch.stack([x.to(every[0].device) for x in every]).amax(0)
    if reduce == "units":
        return _added(
            _along(score, d, "sum")[index].sum(1) / (score.numel() // score.shape[d])
            for score, dims in parts
            for d, index in dims.items()
        )
    total = _added(_union(score, dims, reduce == "l2") for score, dims in parts)
    if reduce == "mean":
        return total / sum(_size(score, dims) for score, dims in parts)
    return total.sqrt() if reduce == "l2" else total


def _added(parts: Iterable[Tensor]) -> Tensor:
    every = list(parts)
    return torch.stack([x.to(every[0].device) for x in every]).sum(0)


def _along(score: Tensor, d: int, what: str) -> Tensor:
    """Each slice of a dimension as one number, float64, shape ``(slices,)``."""
    rest = [i for i in range(score.dim()) if i != d]
    if what == "max":
        return (score.amax(rest) if rest else score).double()
    if what == "squares":
        found = torch.linalg.vector_norm(score, 2, rest, dtype=torch.float64) if rest else score.double()
        return found.square()
    return score.sum(rest, dtype=torch.float64) if rest else score.double()


def _union(score: Tensor, dims: dict[int, Tensor], squares: bool) -> Tensor:
    """Sums over the union of a unit's slices: what lies in slices of several dimensions counts once."""
    what = "squares" if squares else "sum"
    total = torch.stack([_along(score, d, what)[index].sum(1) for d, index in dims.items()]).sum(0)
    for many in range(2, len(dims) + 1):
        for chosen in itertools.combinations(sorted(dims), many):
            common = score.movedim(chosen, tuple(range(many)))[_crossed([dims[d] for d in chosen])].double()
            total = total - (-1) ** many * (common.square() if squares else common).flatten(1).sum(1)
    return total


def _crossed(index: list[Tensor]) -> tuple[Tensor, ...]:
    """Indices of the places where slices of several dimensions meet, unit by unit."""
    shapes = [[len(x), *[1] * i, x.shape[1], *[1] * (len(index) - 1 - i)] for i, x in enumerate(index)]
    return tuple(x.reshape(shape) for x, shape in zip(index, shapes, strict=True))


def _size(score: Tensor, dims: dict[int, Tensor]) -> int:
    """Weights in the union of a unit's slices."""
    outside = 1
    for d, size in enumerate(score.shape):
        outside *= size - (dims[d].shape[1] if d in dims else 0)
    return score.numel() - outside


def _normalized(scores: Tensor, normalize: Normalize) -> Tensor:
    if normalize == "none":
        return scores
    if normalize == "standard":
        spread = scores.std() if len(scores) > 1 else scores.new_zeros(())
        return torch.where(spread > 0, (scores - scores.mean()) / torch.where(spread > 0, spread, 1), 0.0)
    sizes = scores.abs()
    by = sizes.mean() if normalize == "mean" else sizes.amax() if normalize == "max" else sizes.norm()
    return scores / torch.where(by > 0, by, 1)
