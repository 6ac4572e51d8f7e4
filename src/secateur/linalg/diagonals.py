"""Diagonals of curvatures: of the empirical Fisher, by random signs at outputs or weights, and exactly."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.streams import stream
from secateur.core.task import Task, call, frozen
from secateur.linalg.factors import example_signs, root
from secateur.linalg.flat import Flat, Symmetric
from secateur.linalg.products import per_example_gradients

_COLUMNS = 16


def fisher_diagonal(task: Task, masks: Masks) -> Named:
    """The mean over examples of the squared gradient of each example's own loss; zeros where pruned.

    The diagonal of the empirical Fisher, ``Operator(task, masks, "fisher")``. Squares are float32 or wider.

    Args:
        task: network, loss and data.
        masks: True = kept.

    Raises:
        DataError: when a gradient is not finite, or the data is empty or spent.
        ModelError: when the loss is not one number.
        MaskError: when ``masks`` belong to another network.

    Cost: that of :func:`~secateur.linalg.products.per_example_gradients`.
    """
    flat = Flat(task, masks)
    total, count = torch.zeros(flat.size, dtype=flat.dtype, device=flat.device), 0
    for rows in per_example_gradients(task, masks):
        total += rows.square().sum(0)
        count += len(rows)
    return flat.unflatten(total / count)


def ggn_diagonal(task: Task, masks: Masks, seed: int = 0, draws: int = 1) -> Named | None:
    """The diagonal of the Gauss-Newton matrix ``mean JᵀRJ`` by random signs at the outputs; zeros where pruned.

    With a root ``R = A Aᵀ`` (:func:`~secateur.linalg.factors.root`) and random signs ``s``, the squares of ``JᵀAs``
    have the diagonal as their mean. Every example has signs of its own and examples never mix, so the error falls
    with the root of their number too; that of random signs at the weights grows with the whole row of the matrix.

    Args:
        task: network, loss and data; the output must be one tensor with the examples first.
        masks: True = kept.
        seed: of the random signs, which follow from it and the example itself, wherever it stands in the data.
        draws: how many for each example.

    Returns:
        Estimates that are never negative, float32 or wider; None where the output is no such tensor or the loss
        is one whose root is not known.

    Raises:
        UsageError: for fewer than one draw.
        DataError: when a gradient or the loss is not finite, or the data is empty or spent.
        MaskError: when ``masks`` belong to another network.

    Cost: a forward pass, and for each draw that of :func:`~secateur.linalg.products.per_example_gradients`.
    """
    if draws < 1:
        raise UsageError(f"draws must be at least 1, not {draws}.")
    flat, points = Flat(task, masks), {name: p.detach() for name, p in task.params().items()}
    total, count = torch.zeros(flat.size, dtype=flat.dtype, device=flat.device), 0
    for inputs, target, n in task.batches():
        with torch.no_grad(), frozen(task.model):  # some layers round otherwise when their weights are frozen
            output = call(task.model, inputs, points)
        if not isinstance(output, Tensor) or not output.dim() or len(output) != n:
            return None
        factor = root(task.loss, output, target, stream(seed, "probe"))
        if factor is None:
            return None
        for k in range(draws):
            v = factor(example_signs(inputs, output.to(flat.dtype), seed * draws + k)).to(output.dtype)
            for rows in per_example_gradients(Task(task.model, _inner, [(inputs, v)]), masks):
                total += n * rows.square().sum(0)
        count += n
    return flat.unflatten(total / (count * draws))


def _inner(output: Tensor, v: Tensor) -> Tensor:
    return (output * v).sum()


def hutchinson(op: Symmetric, samples: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """The diagonal by random signs ``z``: the mean of ``z ∘ (op z)``, exact at once where ``op`` is diagonal.

    Args:
        op: the operator.
        samples: how many vectors of signs, at least 2.
        generator: where the signs come from; one on the CPU gives the same signs for every device.

    Returns:
        The estimate and its standard error, entry by entry, shape ``(size,)`` both. An entry's variance is the sum
        of the squares of its row off the diagonal, over ``samples``.

    Raises:
        UsageError: for fewer than two samples.

    Cost: ``samples`` products; memory of 34 vectors.
    """
    if samples < 2:
        raise UsageError(f"samples must be at least 2, not {samples}: one has no standard error; 100 is usual.")
    mean = torch.zeros(op.size, dtype=op.dtype, device=op.device)
    spread, seen = torch.zeros_like(mean), 0
    for start in range(0, samples, _COLUMNS):
        count = min(_COLUMNS, samples - start)
        # a row for each vector, so that the signs do not depend on how many are taken at once
        coins = torch.randint(0, 2, (count, op.size), generator=generator, device=generator.device)
        signs = (coins * 2 - 1).to(op.device, op.dtype).T
        values = signs * (op @ signs)
        own = values.mean(1)
        # joined as deviations from the means: squares would cancel
        spread += (values - own[:, None]).square().sum(1) + (own - mean).square() * (seen * count / (seen + count))
        mean += (own - mean) * (count / (seen + count))
        seen += count
    return mean, (spread / (samples - 1) / samples).sqrt()


def exact_diagonal(op: Symmetric) -> Tensor:
    """The diagonal by products with every unit vector, shape ``(size,)``; for small sizes.

    Cost: ``size`` products, sixteen at a time.
    """
    entries = []
    for start in range(0, op.size, _COLUMNS):
        count = min(_COLUMNS, op.size - start)
        axes = torch.zeros(op.size, count, dtype=op.dtype, device=op.device)
        axes[start : start + count].fill_diagonal_(1.0)
        entries.append((op @ axes)[start : start + count].diagonal())
    return torch.cat(entries)
