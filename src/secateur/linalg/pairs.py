"""What pairs of output units do to the loss together, for networks with more outputs than units."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.errors import ModelError
from secateur.core.masks import Masks
from secateur.core.task import Task, call, check_loss, check_twice
from secateur.linalg.products import _pieces, _plain, _slopes

_BYTES = 1 << 28  # of the outputs' changes that are held at once


def unit_pairs(task: Task, masks: Masks) -> Tensor:
    """``w_s · G w_t`` for all pairs of rows of the tensors in ``masks``, with the Gauss-Newton matrix ``G``.

    Args:
        task: network, loss and data; the output must be one tensor with the examples first.
        masks: True = kept; ``w_s`` are the kept weights of a row.

    Returns:
        A symmetric matrix, rows and columns in the order of the tensors and their rows, float32 or wider.

    Raises:
        ModelError: for another output, or a network that cannot be differentiated twice.
        DataError: when the data is empty or spent, or the loss is not finite.
        MaskError: when ``masks`` belong to another network.

    Cost: two backward passes for each unit and piece of a batch, one of them through the loss alone; pieces are such
    that the changes that all units make to the outputs take 256 MB.
    """
    weights = {name: p.detach() * masks[name].to(p.device) for name, p in masks.match(task.model).items()}
    units = sum(len(w) for w in weights.values())
    wide = max((torch.promote_types(w.dtype, torch.float32) for w in weights.values()), key=lambda d: d.itemsize)
    device = next(iter(weights.values())).device
    total, count = torch.zeros(units, units, dtype=wide, device=device), 0
    for inputs, target, n in task.batches():
        with _plain(task), torch.enable_grad():
            output = call(task.model, inputs, {name: p.detach() for name, p in task.params().items()})
            free, slope = outer(task, output, target, n)
            count += n
            if not slope.requires_grad:
                continue
            each = max(1, _BYTES // max(1, 2 * units * output[0].numel() * wide.itemsize))
            start = 0
            for piece in _pieces((inputs, target), n, each):
                part = slice(start, start + piece.count)
                moved = _changes(task, weights, piece.whole()[0])
                bent = torch.stack([_bend(slope, free, part, m) for m in moved])
                total += n * (moved.flatten(1).to(wide) @ bent.flatten(1).to(wide).T)
                start += piece.count
    return (total + total.T) / (2 * count)


def outer(task: Task, output: object, target: object, n: int) -> tuple[Tensor, Tensor]:
    """A leaf with the values of the output, and the slope of the loss there, which can be differentiated again.

    Raises:
        ModelError: when the output is not one tensor with a row for each of ``n`` examples.
        DataError: when the loss is not finite.
    """
    if not isinstance(output, Tensor) or not output.dim() or len(output) != n:
        shape = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"type {type(output).__name__}"
        raise ModelError(f"the output has {shape}; it must have a row for each of {n} examples. Use `sosp_h` instead.")
    with torch.enable_grad():
        free = output.detach().to(torch.promote_types(output.dtype, torch.float32)).requires_grad_()
        value = task.loss(free, target)
        check_loss(value)
        (slope,) = torch.autograd.grad(value, free, create_graph=True, materialize_grads=True)
    return free, slope


def _changes(task: Task, weights: dict[str, Tensor], inputs: object) -> Tensor:
    """``J w_s`` of some examples: ``(units, examples, ...)``, the slope of ``Jᵀ probe`` in the probe along ``w_s``."""
    points = {name: p.detach().requires_grad_() for name, p in task.params().items() if name in weights}
    output = call(task.model, inputs, points)
    probe = torch.zeros_like(output, requires_grad=True)
    pulled = dict(zip(points, _slopes([output], list(points.values()), [probe], more=True), strict=True))
    check_twice(torch.stack([p.sum() for p in pulled.values()]).sum())
    moved = []
    for name, w in weights.items():
        for i in range(len(w)):
            along = torch.zeros_like(w)
            along[i] = w[i]
            moved.append(_slopes([pulled[name]], [probe], [along])[0])
    return torch.stack(moved)


def _bend(slope: Tensor, free: Tensor, part: slice, change: Tensor) -> Tensor:
    """The Hessian of the loss in the outputs times a change of those of some examples, for these examples."""
    along = torch.zeros_like(free)
    along[part] = change
    return _slopes([slope], [free], [along])[0][part].clone()  # a view would hold the whole batch
