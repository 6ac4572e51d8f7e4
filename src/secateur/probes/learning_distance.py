"""Learning distance: how far the weights have moved from where they began."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from secateur.core.masks import Masks
from secateur.core.names import parameters, plain
from secateur.core.reading import Paper, Reading
from secateur.core.sockets import Probe
from secateur.core.task import Task
from secateur.probes._other import Other, tensors_like


@dataclass(frozen=True)
class LearningDistance(Probe):
    """Euclidean distance of the surviving parameters from those of a reference, such as the initial network.

    The value is ``|m * (w - w_ref)|`` over all parameters, biases and scales included: pruned weights count nothing,
    whatever the reference holds there. Without masks every parameter survives.

    Parts: ``all``, ``|w - w_ref|`` with pruned weights, which moved to zero; ``cosine``, 1 less the cosine of the angle
    between the surviving parameters and theirs in the reference; and for each parameter ``l2:NAME``, ``all:NAME`` and
    ``cosine:NAME``. Cosines are left out where either side is zero.

    Args:
        reference: the network to measure from: a module, a ``.safetensors`` file, or a step's folder. None measures
            from zero, which gives the norm of the weights and no cosine; the note says so.

    Raises:
        FileError: when the reference cannot be read.
        ModelError: when it is of another architecture.
        MaskError: when ``masks`` belong to another network.

    Cost: one pass over the parameters in float64; no data.
    """

    reference: Other = None

    paper = Paper(
        "Sparse Double Descent: Where Network Pruning Aggravates Overfitting",
        "He, Xie, Zhu, Qin",
        2022,
        "arXiv:2206.08684",
        differs="the distance itself where the repository gives its square; adds distances with pruned weights, by "
        "layer, and cosines",
    )
    needs = frozenset({"data-free"})

    def __call__(self, task: Task, masks: Masks | None = None) -> Reading:
        """Distance from the reference."""
        if masks is not None:
            masks.match(task.model)
        there = {} if self.reference is None else tensors_like(self.reference, task.model)
        start = {plain(name): tensor for name, tensor in there.items()}
        parts: dict[str, float] = {}
        sums = [0.0] * 5
        for name, p in parameters(task.model).items():
            kept = masks[name].to(p.device) if masks is not None and name in masks else None
            here = _sums(p.detach().double(), start[name].double() if name in start else None, kept)
            parts |= {f"l2:{name}": math.sqrt(here[0]), f"all:{name}": math.sqrt(here[1])} | _cosine(here, f":{name}")
            sums = [a + b for a, b in zip(sums, here, strict=True)]
        total = {"all": math.sqrt(sums[1])} | _cosine(sums, "")
        note = "" if start else "no network is named to measure from (`reference`), so this is the distance from zero"
        return Reading(math.sqrt(sums[0]), "", parts={**total, **parts}, note=note)


def _sums(w: Tensor, start: Tensor | None, kept: Tensor | None) -> list[float]:
    """Squared distances of surviving and of all weights, and products of surviving ones with those of the start."""
    start = w.new_zeros(()).expand_as(w) if start is None else start
    moved = (w - start).square()
    if kept is not None:
        w, start = w * kept, start * kept
    survived = moved if kept is None else moved * kept
    return [float(x.sum()) for x in (survived, moved, w * start, w.square(), start.square())]


def _cosine(sums: list[float], where: str) -> dict[str, float]:
    """1 less the cosine, where there is one."""
    product, own, start = sums[2:]
    return {f"cosine{where}": max(0.0, 1 - product / math.sqrt(own * start))} if own * start > 0 else {}
