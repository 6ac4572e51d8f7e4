"""Corrupted copies of some samples: what every network makes of them, beside what it makes of the clean ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import DataError, UsageError
from secateur.data import Dataset, Split
from secateur.engine.damage.corruptions import TABLE, corrupt, pixels, scaled
from secateur.engine.damage.embedding import Plane
from secateur.engine.damage.geometry import of_outputs
from secateur.engine.damage.outputs import outputs
from secateur.engine.damage.samples import Skip, along, tensors

SEVERITY, MOST = 3, 200
"""Severity of the copies, and how many samples are copied for each corruption."""


def spoilt(
    nets: Sequence[tuple[str, nn.Module]], data: Dataset | Split, samples: dict[str, Tensor],
    own: Sequence[Plane | None], *, seed: int, batch: int, skip: Skip,
) -> tuple[dict[str, Tensor], dict[str, Any]]:  # fmt: skip
    """Corrupted copies of some of the samples, where these are images.

    Args:
        nets: names and networks, the dense one first.
        data: what the samples are from.
        samples: the clean samples, as :func:`tensors` gives them.
        own: the axes of each network, fitted on clean examples: the copies are seen along the same ones.
        seed: of the noise.
        batch: images in a batch.
        skip: hears what was left out, and why.

    Returns:
        Columns as those of the samples, named ``copies.`` and their name, a row a copy; t-SNE is left out, for it
        places nothing afterwards. ``copies.kind``, int64 ``(m,)``, tells which corruption. And a table: ``kinds``,
        the corruptions by that number, ``severity``, and ``copies`` of each kind.

    Cost: five forward passes of each network over at most 200 images.
    """
    images, _ = pixels(data)
    if images is None or "images" not in samples:
        return {}, {}
    count = len(samples["targets"])
    some = torch.linspace(0, count - 1, min(count, MOST), dtype=torch.float64).round().long()
    picked = images[samples["index"][some].to(images.device)]
    clean = picked.float() / 255 if picked.dtype == torch.uint8 else picked
    labels = samples["targets"][some].to(clean.device)
    kinds: list[str] = []
    parts: list[dict[str, Tensor]] = []
    for name in TABLE:
        try:
            part = _part(nets, data, Split(corrupt(clean, name, SEVERITY, seed), labels), own, batch)
        except (UsageError, DataError) as error:  # no Pillow, or a network that gives NaN for such pictures
            skip(f"corrupted samples: {name}", str(error))
            continue
        parts.append(part | {"index": samples["index"][some], "kind": torch.full((len(some),), len(kinds))})
        kinds.append(name)
    shared = [key for key in (parts[0] if parts else ()) if all(key in part for part in parts)]
    joined = {f"copies.{key}": torch.cat([part[key] for part in parts], _axis(parts[0][key])) for key in shared}
    return joined, {"kinds": kinds, "severity": SEVERITY, "copies": len(some)} if kinds else {}


def _part(
    nets: Sequence[tuple[str, nn.Module]], data: Dataset | Split, split: Split, own: Sequence[Plane | None], batch: int
) -> dict[str, Tensor]:
    """What is known of corrupted images, as of clean ones."""
    found = [outputs(net, scaled(data, split), name=name, batch=batch) for name, net in nets]
    every = torch.arange(len(split))
    known = tensors(found, [of_outputs(one) for one in found], every, split)
    return known | along(found, own, every, lambda what, why: None)  # the clean ones have told why


def _axis(column: Tensor) -> int:
    """The axis of the samples: networks come first where there is something of each."""
    return 0 if column.dim() == 1 or column.dtype == torch.uint8 else 1
