"""Sparsity overlap: how many weights two masks keep in common, beside what chance gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from secateur.core.errors import FileError, MaskError
from secateur.core.masks import Masks
from secateur.core.reading import Paper, Reading
from secateur.core.sockets import Probe
from secateur.core.task import Task


@dataclass(frozen=True)
class SparsityOverlap(Probe):
    """Intersection over union of the weights that two masks keep, over all tensors together.

    Beside it stands what random masks with the same counts in every tensor share: ``a`` and ``b`` of ``n`` weights
    drawn without replacement have ``a b / n`` in common on average, with variance
    ``a b (n - a) (n - b) / (n² (n - 1))``.

    Parts: ``intersection`` and ``union``, in weights; ``expected``, the intersection over union at the average
    intersection; ``deviations``, how many standard deviations the intersection lies above its average (left out where
    chance leaves no choice); and for each tensor ``iou:NAME``, ``expected:NAME``, ``intersection:NAME``. Two masks that
    keep nothing of a tensor agree about it: its value is 1.

    Args:
        other: the masks to compare with: masks, a network whose zeros are read, a mask file, or a step's folder. None
            compares the masks with themselves: the value is 1, and the note says so.

    Raises:
        FileError: when the other masks cannot be read.
        MaskError: when they name other tensors or have other shapes.

    Cost: one pass over the masks; no data. Without ``masks`` the network's own zeros are read.
    """

    other: Masks | str | Path | nn.Module | None = None

    paper = Paper(
        "The Distribution of the Flora in the Alpine Zone",
        "Jaccard",
        1912,
        "doi:10.1111/j.1469-8137.1912.tb05611.x",
        differs="sets of kept weights; adds what random masks of the same counts share",
    )
    needs = frozenset({"data-free"})

    def __call__(self, task: Task, masks: Masks | None = None) -> Reading:
        """Intersection over union."""
        own = Masks.from_zeros(task.model) if masks is None else masks
        own.match(task.model)
        other = own if self.other is None else _masks_of(self.other, own)
        both, either = (own & other).counts(), (own | other).counts()
        one, two = own.counts(), other.counts()
        parts: dict[str, float] = {}
        chance = variance = 0.0
        for name, mask in own.items():
            n, a, b = mask.numel(), one[name], two[name]
            average = a * b / n if n else 0.0
            chance += average
            variance += a * b * (n - a) * (n - b) / (n * n * (n - 1)) if n > 1 else 0.0
            parts |= {
                f"iou:{name}": _ratio(both[name], either[name]),
                f"expected:{name}": _ratio(average, a + b - average),
                f"intersection:{name}": float(both[name]),
            }
        shared, union = sum(both.values()), sum(either.values())
        total = {"intersection": float(shared), "union": float(union)}
        total["expected"] = _ratio(chance, own.kept + other.kept - chance)
        if variance > 0:
            total["deviations"] = (shared - chance) / math.sqrt(variance)
        note = "no other masks are named (`other`), so the masks were compared with themselves"
        note = f"{shared:,} of {union:,} weights" if self.other is not None else note
        return Reading(_ratio(shared, union), "", parts={**total, **parts}, note=note)


def _ratio(part: int | float, whole: int | float) -> float:
    return part / whole if whole else 1.0


def _masks_of(other: Masks | str | Path | nn.Module, own: Masks) -> Masks:
    """The other masks, of the same tensors."""
    if isinstance(other, nn.Module):
        found = Masks.from_zeros(other)
    elif isinstance(other, Masks):
        found = other
    else:
        path = Path(other)
        if path.is_dir():
            path = path / "masks.safetensors"
            if not path.is_file():
                raise FileError(f"{path.parent} holds no `{path.name}`; name the folder of one step, or a mask file.")
        found = Masks.load(path)
    odd = sorted(set(own) ^ set(found))
    if odd:
        side = "here" if odd[0] in own else "there"
        raise MaskError(
            f"the other masks belong to another network: `{odd[0]}` is only {side}. Name masks of the same tensors."
        )
    return found.to(next(iter(own.values())).device) if own else found
