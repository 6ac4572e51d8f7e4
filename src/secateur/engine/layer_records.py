"""Forecast and truth tensor by tensor: what losing its pruned weights should do to the loss, and what it does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from secateur.core.errors import ModelError
from secateur.core.masks import Masks
from secateur.core.names import aliases, unwrap
from secateur.core.task import Task
from secateur.engine.cautions import caution

__all__ = ["LayerCut", "Rises", "in_order", "rises_of"]

FEW = 256
MOST = 200
"""Tensors: beyond, a forecast for each costs more than the pruning is worth."""


@dataclass(frozen=True)
class LayerCut:
    """What pruning did to one tensor.

    Args:
        name: the tensor.
        kept: weights kept.
        total: weights of the tensor.
        error: of a solver: mean squared change of the layer's output, over its mean square; on the inputs the solver
            was given.
        zeroed: of a solver: the same when the weights that went are set to zero and no other moves.
        forecast: the expected rise of the loss from this tensor, first and second order together, with the tensors
            before it pruned already; None unknown.
        rise: the measured one, likewise; None when it was not measured.
    """

    name: str
    kept: int
    total: int
    error: float | None = None
    zeroed: float | None = None
    forecast: float | None = None
    rise: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Rises:
    """The loss while one tensor after the other changes: forecast before each change, measured after it.

    On the first 256 examples (whole batches): second derivatives are dear, and a few hundred tell the order of
    magnitude.

    Args:
        task: network, loss and data.
    """

    def __init__(self, task: Task) -> None:
        self.task = _few(task)
        self.loss = self.task.mean_loss()

    def forecast(self, name: str, change: Tensor) -> tuple[float, float | None]:
        """First and second order rise of the loss when ``change`` is added to a tensor of the network as it is now.

        The second is None where the network cannot be differentiated twice. Cost: two backward passes.
        """
        try:
            return self.task.taylor({name: change})
        except ModelError:
            return float((self.task.gradients()[name] * change).sum()), None

    def measured(self) -> float:
        """How much the loss has risen since the last call. Cost: a forward pass."""
        before, self.loss = self.loss, self.task.mean_loss()
        return self.loss - before


def rises_of(task: Task, masks: Masks) -> tuple[LayerCut, ...]:
    """Set the pruned weights to zero tensor by tensor, in the order in which they run, and follow the loss.

    Args:
        task: network, loss and data; the network is left as it was.
        masks: True = kept. A tensor whose pruned weights are zero already changes nothing and costs nothing.

    Returns:
        A record for each tensor, in that order; the measured rises add up to that of all together. None, with a
        caution, when more than 200 tensors change.

    Raises:
        MaskError: when the masks belong to another network.
        SecateurError: as the task's own methods.

    Cost: two backward passes and one forward pass over the first 256 examples for each tensor that changes, and a
    copy of it.
    """
    weights = masks.match(task.model)
    changes = [name for name, mask in masks.items() if bool((weights[name].detach().ne(0) & ~mask).any())]
    if len(changes) > MOST:
        caution(
            f"{len(changes):,} tensors lose weights: beyond {MOST} the rise of the loss is forecast and measured "
            "for all together only."
        )
        return ()
    rises, records, backup = Rises(task), [], {}
    try:
        for name in in_order(rises.task, masks):
            mask, weight = masks[name], weights[name].detach()
            record = LayerCut(name, int(mask.sum()), mask.numel(), forecast=0.0, rise=0.0)
            if name in changes:
                first, second = rises.forecast(name, torch.where(mask, torch.zeros_like(weight), -weight))
                backup[name] = weight.clone()
                Masks({name: mask}).apply_(task.model)
                record = replace(record, forecast=first + (second or 0.0), rise=rises.measured())
            records.append(record)
    finally:
        with torch.no_grad():
            for name, weight in backup.items():
                weights[name].copy_(weight)
    return tuple(records)


def in_order(task: Task, names: Iterable[str]) -> list[str]:
    """Tensors sorted by when the module that holds them is first done with its work.

    A tensor held by several modules counts with the first of them. One whose module is not called itself (its parent
    takes the weight) counts with the nearest that is; equals stay in the order they were given in.

    Cost: one forward pass of the first batch.
    """
    inputs, target, _ = next(task.batches())
    modules, every = dict(unwrap(task.model).named_modules(remove_duplicate=False)), aliases(task.model)
    called = replace(task, data=[(inputs, target)]).collect(modules, lambda *_: True)
    places = {id(modules[name]): place for place, name in reversed(list(enumerate(called)))}

    def place(alias: str) -> int:
        above = alias.rpartition(".")[0]
        while above and id(modules[above]) not in places:
            above = above.rpartition(".")[0]
        return places.get(id(modules[above]), len(places))

    return sorted(names, key=lambda name: min(map(place, every[name])))


def _few(task: Task) -> Task:
    batches, seen = [], 0
    for inputs, target, count in task.batches():
        batches.append((inputs, target))
        seen += count
        if seen >= FEW:
            break
    return replace(task, data=batches)
