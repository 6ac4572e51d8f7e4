"""Angle, length and margin of the last features (Li et al., "Understanding Robustness Lottery", arXiv:2206.07918).

The margin is signed by its formula, biases included; the paper's is a distance, negated for wrong answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.engine.damage.outputs import Features, Outputs

_AT_ONCE = 1 << 22
"""Entries of the largest intermediate."""


class Geometry(NamedTuple):
    """Where features lie among the directions of the classes, float64 on the device of the features.

    Args:
        angle: ``arccos(W_y·X / (|W_y||X|))`` to the row of the right class, in radians, ``(n,)``; NaN where the
            feature or the row is zero.
        length: ``|X|``, ``(n,)``.
        margin: ``min_{j≠y} [(W_y - W_j)·X + b_y - b_j] / |W_y - W_j|``, the signed distance to the nearest boundary
            of the right class, negative for a wrong answer, ``(n,)``. Rows that are equal have no boundary between
            them: by their biases they count as ±infinity, and with equal biases the margin is NaN, as it is for a
            single class.
        nearest: the class j of the minimum, int64 ``(n,)``; -1 where the margin is NaN.
    """

    angle: Tensor
    length: Tensor
    margin: Tensor
    nearest: Tensor


def geometry(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Geometry:
    """The three metrics of features under a linear layer, computed in float64.

    Args:
        x: features ``(n, p)``.
        weight: ``(classes, p)``.
        bias: ``(classes,)``, or None.
        labels: the right classes, int64 ``(n,)``.

    Cost: O(n · p · classes + p · classes²), in pieces.
    """
    w = weight.to(x.device).double()
    b = w.new_zeros(len(w)) if bias is None else bias.to(w)
    # Not by scalar products, whose rounding would give equal rows a distance.
    between = torch.cdist(w, w, compute_mode="donot_use_mm_for_euclid_dist")
    size = max(1, _AT_ONCE // max(x.shape[1], len(w)))
    pieces = [
        _piece(rows.double(), w, b, between, own)
        for rows, own in zip(x.split(size), labels.to(x.device).split(size), strict=True)
    ]
    return Geometry(*(torch.cat(column) for column in zip(*pieces, strict=True)))


def of_outputs(found: Outputs) -> Geometry | None:
    """The metrics of a network's answers; None where it has no features."""
    head = found.features
    return None if head is None else geometry(head.x, head.weight, head.bias, found.labels)


def logits_error(found: Outputs, head: Features) -> float:
    """Largest distance of the network's logits from ``W X + b``, as a share of the largest logit (or of 1).

    It is the rounding of the network's own type: the features are those of the last layer, so nothing else differs.

    Raises:
        ValueError: when the logits were not kept.
    """
    if found.logits is None:
        raise ValueError("the logits of tokens are not kept")
    bias = None if head.bias is None else head.bias.double()
    worst = top = 0.0
    size = max(1, _AT_ONCE // max(head.x.shape[1], found.classes))
    for rows, given in zip(head.x.split(size), found.logits.split(size), strict=True):
        made = torch.nn.functional.linear(rows.double(), head.weight.double(), bias)
        worst = max(worst, float((made - given.double()).nan_to_num(0.0).abs().max()))
        top = max(top, float(given.double().nan_to_num(0.0, posinf=0.0, neginf=0.0).abs().max()))
    return worst / max(top, 1.0)


def summary(measured: Geometry) -> dict[str, Any]:
    """Mean, standard deviation and quartiles of each metric over the examples that have one.

    Returns:
        For ``angle``, ``length`` and ``margin``: ``mean``, ``std`` (of the population), ``quartiles`` (three) and
        ``undefined``, the number of examples left out because the metric is NaN or infinite.
    """
    return {name: spread_of(values) for name, values in _metrics(measured)}


def by_class(measured: Geometry, labels: Tensor, classes: int) -> list[dict[str, Any]]:
    """Mean of each metric for each class, over the examples that have one; None for a class without any."""
    rows: list[dict[str, Any]] = [{"class": number} for number in range(classes)]
    for name, values in _metrics(measured):
        good = values.isfinite()
        count = torch.bincount(labels[good], minlength=classes)
        total = torch.bincount(labels[good], weights=values[good], minlength=classes)
        for row, n, value in zip(rows, count.tolist(), total.tolist(), strict=True):
            row[name] = value / n if n else None
    return rows


def spread_of(values: Tensor) -> dict[str, Any]:
    """Mean, standard deviation and quartiles of the finite ones of ``(n,)`` values."""
    good = values[values.isfinite()]
    table: dict[str, Any] = {"mean": None, "std": None, "quartiles": None, "undefined": len(values) - len(good)}
    if len(good):
        table |= {"mean": float(good.mean()), "std": float(good.std(correction=0)), "quartiles": _quartiles(good)}
    return table


def _quartiles(values: Tensor) -> list[float]:
    ranked = values.sort().values
    places = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device=values.device) * (len(ranked) - 1)
    low = places.floor().long()
    high = places.ceil().long()
    return torch.lerp(ranked[low], ranked[high], places - low).tolist()  # torch.quantile takes no more than 16 million


def _metrics(measured: Geometry) -> Iterator[tuple[str, Tensor]]:
    yield from (("angle", measured.angle), ("length", measured.length), ("margin", measured.margin))


def _piece(x: Tensor, w: Tensor, b: Tensor, between: Tensor, labels: Tensor) -> Geometry:
    products, own = x @ w.T, labels[:, None]
    mine = products.gather(1, own)[:, 0]
    length, norm = x.norm(dim=1), w.norm(dim=1)[labels]
    # Divided one by one: the product of two small lengths may vanish.
    cosine = (mine / length / norm).clamp(-1.0, 1.0)
    angle = torch.where((length > 0) & (norm > 0), cosine.arccos(), torch.nan)
    gap, distance = mine[:, None] - products + (b[labels][:, None] - b), between[labels]
    same = distance == 0  # no boundary: what rounding leaves of the gap of two equal rows must not decide
    gap = torch.where(same, b[labels][:, None] - b, gap)
    apart = (gap / distance).scatter(1, own, torch.inf)
    if len(w) == 1:
        return Geometry(angle, length, torch.full_like(length, torch.nan), torch.full_like(labels, -1))
    margin, nearest = apart.min(1)  # NaN, where there is one, is the minimum
    return Geometry(angle, length, margin, torch.where(margin.isnan(), -1, nearest))
