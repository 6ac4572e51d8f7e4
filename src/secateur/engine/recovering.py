"""What pruning upsets and data alone can mend: the statistics of BatchNorm."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.core.errors import DataError
from secateur.core.names import unwrap
from secateur.core.task import Task, call, frozen

__all__ = ["normed", "reestimate"]


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

    Every layer forgets its statistics and takes the plain average over all batches (each batch weighs the same, its
    variance unbiased, as torch's cumulative average does). All other layers act as in evaluation: dropout is off. The
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
        layer.momentum = None
        layer.training = True
    seen = 0
    for inputs, _, count in task.batches():
        if count > 1:
            call(task.model, inputs)
            seen += 1
    if not seen:
        raise DataError("BatchNorm has no variance over a single example; pass batches of at least two.")
