"""Pictures of the masks: which parts of each tensor pruning kept."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np

from secateur.report.maskfile import NAME, Damaged, TensorMask, read_masks
from secateur.report.numbers import count, many, percent, shorten
from secateur.report.sections import Heat, Section
from secateur.report.source import RunRecord, names

SIDE = 64
"""Cells of a picture along each side at most."""
LEAST = 4
BUDGET = 540_000
"""Characters that all pictures of a report may take together; beyond, the cells get coarser."""
PROFILE = 24
_SIZES = (1, 2, 4, 8)


def section(run: RunRecord) -> Section | str:
    """A picture for each tensor of the last network's masks; nothing for a network that is dense."""
    step = run.last_net()
    if step is None or step.density == 100:
        return ""
    try:
        masks = read_masks(step.folder / NAME)
    except FileNotFoundError:
        return ""
    except Damaged as error:
        return f"No pictures of the masks: {step.folder.name}/{NAME} cannot be read ({error})."
    if not masks:
        return ""
    pictures = drawn(masks)
    return Section("Masks", _says(pictures), chart=pictures, source=names([step]), more=(_how(pictures),))


def drawn(masks: Sequence[TensorMask]) -> tuple[Heat, ...]:
    """The pictures, with cells as fine as the budget allows.

    Cost: unpacks every mask once.
    """
    side = SIDE
    while side > LEAST and sum(_characters(mask, side) for mask in masks) > BUDGET:
        side //= 2
    return tuple(picture(mask, side) for mask in masks)


def picture(mask: TensorMask, side: int = SIDE) -> Heat:
    """One tensor in at most ``side`` times ``side`` cells of equally many rows and columns."""
    tall, wide = -(-mask.height // side), -(-mask.width // side)
    cells = mask.counts(tall, wide)
    size = _size(mask, tall, wide)
    data = base64.b64encode(cells.astype(f"<u{size}").tobytes()).decode()
    return Heat(
        mask.name, mask.shape, mask.height, mask.width, mask.depth, tall, wide, int(cells.sum()), size, data,
        _profile(cells, mask, tall), _spoken(mask, cells, tall, wide),
    )  # fmt: skip


def _size(mask: TensorMask, tall: int, wide: int) -> int:
    """Bytes that hold the count of a full cell."""
    most = min(tall, mask.height) * min(wide, mask.width) * mask.depth
    return next(size for size in _SIZES if most < 1 << 8 * size)


def _characters(mask: TensorMask, side: int) -> int:
    tall, wide = -(-mask.height // side), -(-mask.width // side)
    return -(-mask.height // tall) * -(-mask.width // wide) * _size(mask, tall, wide) * 4 // 3


def _profile(cells: np.ndarray, mask: TensorMask, tall: int) -> tuple[float, ...]:
    """Share of kept weights in up to 24 parts of the rows of cells."""
    lines = cells.sum(1)
    heights = np.minimum(tall, mask.height - tall * np.arange(len(lines)))
    every = -(-len(lines) // PROFILE)
    starts = np.arange(0, len(lines), every)
    kept, rows = np.add.reduceat(lines, starts), np.add.reduceat(heights, starts)
    return tuple(round(float(k / (r * mask.width * mask.depth)), 6) for k, r in zip(kept, rows, strict=True))


def _spoken(mask: TensorMask, cells: np.ndarray, tall: int, wide: int) -> str:
    kept = int(cells.sum())
    says = f"{count(kept)} of {count(mask.total)} weights kept ({percent(100 * kept / mask.total)})"
    empty = int((cells == 0).sum())
    what = "kernels" if mask.depth > 1 else "weights"
    if (tall, wide) != (1, 1):
        what = f"parts of {min(tall, mask.height)} × {min(wide, mask.width)} {what}"
    elif mask.depth == 1:
        return f"{says}."
    return f"{says}; {count(empty)} of {count(cells.size)} {what} are empty." if empty else f"{says}; no part is empty."


def _says(pictures: Sequence[Heat]) -> str:
    shares = [(p.kept / (p.height * p.width * p.depth), p.title) for p in pictures]
    low, high = min(shares), max(shares)
    if len(pictures) == 1:
        return f"Where the {percent(100 * low[0])} of the weights lie that {shorten(low[1], 60)} keeps."
    return (
        f"Where the kept weights lie in {many(len(pictures), 'tensor')}, from {percent(100 * low[0])} kept in "
        f"{shorten(low[1], 60)} to {percent(100 * high[0])} in {shorten(high[1], 60)}."
    )


def _how(pictures: Sequence[Heat]) -> str:
    kernels = ", of convolutions one kernel" if any(p.depth > 1 for p in pictures) else ""
    coarse = any((p.tall, p.wide) != (1, 1) for p in pictures)
    parts = "; where there are more, a cell stands for several" if coarse else ""
    return (
        "Rows are the first dimension of a weight (the outputs of most layers), columns the second. A cell is one "
        f"weight{kernels}{parts}. The first colour of a scale is nothing kept; open a picture to read every cell."
    )
