"""The sample set: single decisions to look at, with what every network makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.core.errors import DataError, UsageError
from secateur.core.streams import stream
from secateur.data import Dataset, Split
from secateur.engine.damage.corruptions import pixels
from secateur.engine.damage.embedding import TSNE, Plane, pca, tsne
from secateur.engine.damage.geometry import Geometry
from secateur.engine.damage.outputs import Features, Outputs

Skip = Callable[[str, str], None]

CONTEXT = 48
"""Tokens that are kept of a text, up to the one that is followed by the answer."""


def flipped(found: Sequence[Outputs]) -> Tensor:
    """Decisions on which any network answers otherwise than the first, boolean ``(n,)``."""
    changed = torch.zeros_like(found[0].right)
    for other in found[1:]:
        changed |= other.answers != found[0].answers
    return changed


def choose(changed: Tensor, examples: int, seed: int) -> Tensor:
    """Numbers of the decisions to look at, in rising order.

    All flipped ones, up to half of ``examples``; the others are drawn from those that did not flip. Where either are
    too few for their half, the other ones fill it. Which of them is drawn by the seed.

    Args:
        changed: which decisions flipped, ``(n,)``.
        examples: how many to take; all, where there are fewer.
        seed: seed of the draw.
    """
    random = stream(seed, "damage", "samples")
    parts = [rows[torch.randperm(len(rows), generator=random)] for rows in _two(changed)]
    first = min(len(parts[0]), examples // 2)
    second = min(len(parts[1]), examples - first)
    first = min(len(parts[0]), examples - second) if second < examples - first else first
    return torch.cat([parts[0][:first], parts[1][:second]]).sort().values


def _two(changed: Tensor) -> tuple[Tensor, Tensor]:
    return changed.nonzero().flatten(), (~changed).nonzero().flatten()


def tensors(
    found: Sequence[Outputs], measured: Sequence[Geometry | None], chosen: Tensor, data: Dataset | Split
) -> dict[str, Tensor]:
    """What is known of the chosen decisions; ``v`` is the network, in the order of ``found``.

    Returns:
        ``index``: number of the example in the test part, int64 ``(n,)``; ``position``: of tokens, the place in the
        sequence; ``context``: of texts, the tokens up to there, int64 ``(n, 48)``, -1 before the beginning; ``targets``
        int64 ``(n,)``; ``predictions`` int64 ``(v, n)``; ``confidence`` and, where any network has features, ``angle``,
        ``length`` and ``margin``, float32 ``(v, n)``, NaN where there is none; ``images`` uint8 ``(n, H, W, C)``, where
        the data are images.
    """
    first = found[0]
    table = {
        "index": first.example[chosen],
        "targets": first.labels[chosen],
        "predictions": torch.stack([one.answers[chosen] for one in found]),
        "confidence": torch.stack([one.confidence[chosen].float() for one in found]),
    }
    if first.tokens:
        table["position"] = first.position[chosen]
        if isinstance(data, Dataset) and data.kind == "text":
            table["context"] = _before(data.test.x, table["index"], table["position"])
    if any(metrics is not None for metrics in measured):
        for name in ("angle", "length", "margin"):
            table[name] = torch.stack([
                torch.full((len(chosen),), torch.nan) if metrics is None else getattr(metrics, name)[chosen].float()
                for metrics in measured
            ])  # fmt: skip
    images, _ = pixels(data)
    if images is not None and not first.tokens:
        picked = images[table["index"].to(images.device)].permute(0, 2, 3, 1).cpu()
        exact = picked.dtype == torch.uint8
        table["images"] = (picked if exact else picked.double().mul(255).round().to(torch.uint8)).contiguous()
    return table


def _before(x: Tensor, index: Tensor, position: Tensor) -> Tensor:
    """The tokens that a text has up to a place, ``(n, CONTEXT)``; -1 before its beginning."""
    places = position[:, None] + torch.arange(1 - CONTEXT, 1)
    rows = x.cpu().long()[index]
    return rows.gather(1, places.clamp(min=0)).masked_fill(places < 0, -1)


def axes(found: Sequence[Outputs], skip: Skip) -> list[Plane | None]:
    """The first two principal components of each network's features; None where there are none."""
    return [_axes(one, skip) for one in found]


def along(found: Sequence[Outputs], own: Sequence[Plane | None], chosen: Tensor, skip: Skip) -> dict[str, Tensor]:
    """Features along principal components: ``pca`` on those of the first network, ``pca_own`` on each network's own.

    Returns:
        Tensors, float32 ``(v, n, 2)``, NaN for a network without them; none where no network has any.
    """
    columns: dict[str, list[Tensor | None]] = {"pca": [], "pca_own": []}
    for one, plane in zip(found, own, strict=True):
        head = one.features
        columns["pca_own"].append(None if head is None or plane is None else plane(head.x[chosen]))
        columns["pca"].append(_on(own[0], head, chosen, lambda why, one=one: skip(f"pca of {one.name}", why)))
    return {name: made for name, column in columns.items() if (made := _stacked(column, len(chosen))) is not None}


def _stacked(column: Sequence[Tensor | None], count: int) -> Tensor | None:
    """One row a network, NaN where it has none."""
    if all(part is None for part in column):
        return None
    none = torch.full((count, 2), torch.nan)
    return torch.stack([none if part is None else part.float() for part in column])


def planes(
    found: Sequence[Outputs], own: Sequence[Plane | None], chosen: Tensor, seed: int, skip: Skip
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The chosen examples' features in the plane.

    Args:
        found: what the networks answered.
        own: the axes of each.
        chosen: which examples.
        seed: of t-SNE.
        skip: hears what was left out, and why.

    Returns:
        Tensors, float32 ``(v, n, 2)``, NaN for a network without them: ``pca`` on the axes of the first network,
        ``pca_own`` on each network's own, both fitted on the test examples, chosen or not; ``tsne``. And a table: by
        network the share of the variance along its own two axes, and for ``tsne`` the perplexity.
    """
    if all(one.features is None for one in found):
        return {}, {}
    table: dict[str, Any] = {
        "explained": {
            one.name: None if plane is None else plane.explained.tolist() for one, plane in zip(found, own, strict=True)
        }
    }
    made = along(found, own, chosen, skip)
    spread = [
        _spread(one.features, chosen, seed, lambda why, one=one: skip(f"tsne of {one.name}", why)) for one in found
    ]
    if (placed := _stacked(spread, len(chosen))) is not None:
        made["tsne"] = placed
    if "tsne" in made:
        table["perplexity"] = min(30.0, (len(chosen) - 1) / 3)
    return made, table


def _axes(found: Outputs, skip: Skip) -> Plane | None:
    if found.features is None:
        return None
    try:
        return pca(found.features.x)
    except DataError as error:
        skip(f"pca of {found.name}", str(error))
        return None


def _on(plane: Plane | None, head: Features | None, chosen: Tensor, told: Callable[[str], None]) -> Tensor | None:
    if head is None:
        return None
    if plane is None:
        told("the first network has no axes of its own to look along")
        return None
    try:
        return plane(head.x[chosen])
    except DataError as error:
        told(str(error))
        return None


def _spread(head: Features | None, chosen: Tensor, seed: int, told: Callable[[str], None]) -> Tensor | None:
    if head is None:
        return None
    # Of more examples than t-SNE takes, evenly spaced ones; the others have no place.
    some = torch.linspace(0, len(chosen) - 1, min(len(chosen), TSNE), dtype=torch.float64).round().long()
    try:
        made = tsne(head.x[chosen[some]], seed)
    except (DataError, UsageError) as error:
        told(str(error))
        return None
    whole = made.new_full((len(chosen), 2), torch.nan)
    whole[some] = made
    return whole
