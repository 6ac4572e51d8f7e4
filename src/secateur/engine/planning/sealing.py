"""Seals of a plan: by which data it was made and which weights it keeps, so that what differs later is told."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from secateur.core.sockets import name_of
from secateur.core.task import Task
from secateur.engine.planning.carrying import masks_of
from secateur.engine.planning.plans import LayerPlan

if TYPE_CHECKING:
    from secateur.engine.planning.planner import Planner

__all__ = ["data_of", "differences", "masks_seal", "sealed"]

_BYTES = 32


def sealed(plan: LayerPlan, planner: Planner) -> LayerPlan:
    """The plan with the digests of its data, and of its masks where the data decide on them.

    Args:
        plan: what was planned.
        planner: which planned it; the scores that it has are used again.
    """
    return replace(plan, data=data_of(planner.task, planner.how.seed), masks=masks_seal(plan, planner))


def masks_seal(plan: LayerPlan, planner: Planner) -> str:
    """Digest of the masks of a plan; empty where a solver chooses them, or the weights alone."""
    if plan.solver is not None or "data-free" in plan.criterion.needs:
        return ""
    return masks_of(planner.scores, {layer.name: (layer.pattern, layer.kept) for layer in plan.layers}).digest


def data_of(task: Task, seed: int) -> dict[str, Any]:
    """How many examples a task has, the seed they were drawn with, and a digest of them.

    The order of the examples and how they lie in batches make no difference.

    Cost: one pass over the data, without the network.
    """
    total = count = 0
    for inputs, target, n in task.batches():
        rows, shared = [], hashlib.blake2b(digest_size=_BYTES)
        for leaf in _leaves((inputs, target)):
            if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == n:
                whole = _bytes(leaf)
                rows.append(whole.reshape(n, whole.size // n))
            else:
                shared.update(_bytes(leaf).tobytes() if isinstance(leaf, Tensor) else repr(leaf).encode())
        for example in range(n):
            own = shared.copy()
            for row in rows:
                own.update(row[example].tobytes())
            total += int.from_bytes(own.digest(), "big")
        count += n
    return {"examples": count, "seed": seed, "digest": f"{total % (1 << 8 * _BYTES):0{2 * _BYTES}x}"}


def differences(plan: LayerPlan, data: Mapping[str, Any], masks: str) -> list[str]:
    """What is carried out otherwise than it was planned, a line each.

    Args:
        plan: what was planned.
        data: of the task at hand, as :func:`data_of` tells.
        masks: digest of the weights that are kept now; empty where a solver chooses them.
    """
    other = bool(plan.masks and masks) and plan.masks != masks
    if not plan.data or plan.data.get("digest") == data["digest"]:
        word = name_of(plan.criterion)
        return [f"{word} scores otherwise here than where the plan was made: other weights go"] if other else []
    if plan.solver is not None:
        so = f"{name_of(plan.solver)} goes by them, and may keep other weights than those that were tried"
    elif other:
        so = f"{name_of(plan.criterion)} scores by them, and other weights go than were planned"
    else:
        so = "the same weights go, but the forecast of the loss is that of the others"
    counts = f"{plan.data.get('examples', 0):,} there, {data['examples']:,} here"
    return [f"the examples are not those that the plan was made with ({counts}): {so}"]


def _leaves(thing: Any) -> Iterator[Any]:
    """Whatever lies in nested tuples, lists and mappings, in their order."""
    if isinstance(thing, Mapping):
        thing = tuple(thing.values())
    if isinstance(thing, tuple | list):
        for entry in thing:
            yield from _leaves(entry)
    else:
        yield thing


def _bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor, in the order of its entries."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
