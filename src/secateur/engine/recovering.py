"""What pruning upsets and a few examples can mend: the statistics of BatchNorm, the weights that stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.core.errors import DataError
from secateur.core.masks import Masks
from secateur.core.names import unwrap
from secateur.core.task import Task, call, frozen
from secateur.engine.last_layer import last_layer, outputs_of, refit_last_layer
from secateur.engine.surviving import refit_survivors

__all__ = ["Recover", "Recovery", "normed", "reestimate"]

Recover = Literal["batchnorm", "nothing", "survivors", "last-layer"]


class Recovery:
    """Mends a network after one pruning; made before it, since it keeps what it needs of the network as it was.

    Args:
        how: ``"batchnorm"`` takes the statistics of BatchNorm anew; ``"survivors"`` moves all kept weights at once
            first (:func:`secateur.engine.surviving.refit_survivors`), ``"last-layer"`` fits the last linear layer to
            its outputs before pruning afterwards (:func:`secateur.engine.last_layer.refit_last_layer`);
            ``"nothing"`` does nothing.
        task: the network before pruning, its loss and the examples to mend it with, in a fixed order.
        layer: the linear layer that ``"last-layer"`` fits; by default the one whose output is the network's.

    Raises:
        ModelError, UsageError: for ``"last-layer"``, when there is no such layer; nothing is pruned yet then.

    Memory: a copy of the weights (``"survivors"``), or the layer's outputs (``"last-layer"``).
    """

    def __init__(self, how: Recover, task: Task, layer: str = "") -> None:
        self.how, self.task = how, task
        self._weights = {n: p.detach().clone() for n, p in task.params().items()} if how == "survivors" else {}
        self._layer = last_layer(task, layer) if how == "last-layer" else ""
        self._targets = outputs_of(task, self._layer) if self._layer else []

    def __call__(self, masks: Masks, judge: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Mend the pruned network in place.

        Args:
            masks: True = kept.
            judge: a reading of the network as it is, as plain values.

        Returns:
            ``before`` and ``after``, what ``judge`` gave, and ``steps``, a record for each step taken, with its own;
            nothing when there was nothing to do.

        Raises:
            SecateurError: as the functions of the steps.
        """
        steps: list[dict[str, Any]] = []
        readings: list[dict[str, Any]] = []

        def step(name: str, **about: Any) -> None:
            readings.append(judge())
            steps.append({"step": name, **about, "before": readings[-2], "after": readings[-1]})

        if self.how == "nothing" or not (self.how != "batchnorm" or normed(self.task.model)):
            return {}
        readings.append(judge())
        if self.how == "survivors":
            change = refit_survivors(self.task, masks, before=self._weights)
            step("survivors", moved=sum(int((change[name] != 0)[mask].sum()) for name, mask in masks.items()))
        if count := reestimate(self.task):
            step("batchnorm", layers=count)
        if self.how == "last-layer":
            done = refit_last_layer(self.task, self._targets, masks, self._layer)
            step("last-layer", layer=done.layer, error={"before": done.before, "after": done.after})
        layers = {"batchnorm layers": count} if count else {}
        return {**layers, "before": readings[0], "after": readings[-1], "steps": steps}


def normed(model: nn.Module) -> list[_BatchNorm]:
    """The layers that keep running statistics."""
    return list(_normed(unwrap(model)))


def _normed(model: nn.Module) -> Iterator[_BatchNorm]:
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None:
            yield module


@torch.no_grad()
def reestimate(task: Task) -> int:
    """Take means and variances of BatchNorm anew, from the task's data and the weights as they are now.

    Every layer forgets its statistics and takes the average over all batches (each batch weighs by its examples, its
    variance is unbiased). All other layers act as in evaluation: dropout is off. The
    network's modes and the layers' momentum are left as they were. Weights do not change.

    Args:
        task: network and data; targets are not looked at. A few hundred examples are enough, of the training data.
            Batches of a single example are passed over: they have no variance.

    Returns:
        How many layers were set. Without any nothing happens.

    Raises:
        DataError: when the data is empty, or no batch has two examples. The statistics are then the old ones.

    Cost: one forward pass over the data.
    """
    layers = normed(task.model)
    if not layers:
        return 0
    modes = [(layer.training, layer.momentum) for layer in layers]
    old = [{name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)} for layer in layers]
    with frozen(task.model):
        try:
            _pass(task, layers)
        except BaseException:
            for layer, buffers in zip(layers, old, strict=True):
                for name, buffer in buffers.items():
                    getattr(layer, name).copy_(buffer)
            raise
        finally:
            for layer, (training, momentum) in zip(layers, modes, strict=True):
                layer.training, layer.momentum = training, momentum
    return len(layers)


def _pass(task: Task, layers: list[_BatchNorm]) -> None:
    for layer in layers:
        layer.reset_running_stats()
        layer.training = True
    seen = 0
    for inputs, _, count in task.batches():
        if count > 1:
            seen += count
            for layer in layers:
                layer.momentum = count / seen  # the running mean over examples
            call(task.model, inputs)
    if not seen:
        raise DataError("BatchNorm has no variance over a single example; pass batches of at least two.")
