"""What measures of flatness are made of: a fixed sample, the free weights, the top of a spectrum, noise by filters."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_map

from secateur.core.errors import DataError, ModelError
from secateur.core.masks import Masks
from secateur.core.names import Named, parameters, unwrap
from secateur.core.streams import stream
from secateur.core.task import Batch, Task, check_loss, frozen
from secateur.linalg.flat import Symmetric
from secateur.linalg.memory import check, estimate
from secateur.probes._statistics import Spread, Z

_BASIS, _KEPT = 12, 4
_HELD = 1 << 26  # numbers of the vectors that are multiplied at once
_AGREE = 1e-3
_BATCH = 64
"""Examples in a batch: a second derivative holds several times the memory of a training step."""


class Top(NamedTuple):
    """The largest eigenvalue found: a Rayleigh quotient, the norm of ``Hv - value v``, and the products it took."""

    value: float
    residual: float
    products: int


def fixed(task: Task, count: int) -> tuple[Task, int, str]:
    """The first ``count`` examples of the data, held in small batches; in a float32 copy for a network of a half type.

    Returns:
        The task, the number of its examples, and what a reader must know.

    Raises:
        DataError: when the data is empty or spent, or two passes over it give different losses.
        ModelError: when the network is of a half type and cannot be copied.
    """
    batches: list[Batch] = []
    left, wide = count, _wide(task)
    for inputs, target, n in task.batches():
        stop = min(n, left)
        for start in range(0, stop, _BATCH):
            rows = slice(start, min(start + _BATCH, stop))
            one = functools.partial(_cut, n=n, rows=rows, widen=wide is not task)
            batches.append((tree_map(one, inputs), tree_map(one, target)))
        left -= stop
        if not left:
            break
    held = Task(wide.model, task.loss, batches)
    first, again = mean_loss(held), mean_loss(held)
    if math.isfinite(first) and not abs(first - again) <= _AGREE * abs(first) + 1e-9:
        raise DataError(
            f"two passes over the same examples gave losses {first:.6g} and {again:.6g}, so no rise can be told from "
            "chance. Switch off the random module that stays active in evaluation mode."
        )
    return held, count - left, "" if wide is task else "computed in a float32 copy of the network"


def _wide(task: Task) -> Task:
    tensors = [*unwrap(task.model).parameters(), *unwrap(task.model).buffers()]
    if not any(t.dtype in (torch.float16, torch.bfloat16) for t in tensors):
        return task
    try:
        return Task(copy.deepcopy(unwrap(task.model)).float(), task.loss, task.data)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(
            f"curvature is not computed in half types, and the network cannot be copied to float32 ({error}). Pass one "
            "that is float32 already: `model.float()`."
        ) from error


def _cut(thing: Any, n: int, rows: slice, widen: bool) -> Any:
    if not isinstance(thing, Tensor):
        return thing
    if widen and thing.dtype in (torch.float16, torch.bfloat16):
        thing = thing.float()
    return thing[rows] if thing.dim() and thing.shape[0] == n else thing


def free(task: Task, masks: Masks | None) -> Masks:
    """Which weights may move: those kept by the masks, and all of every other parameter that is trained.

    Parameters that ask for no gradient stay, unless none asks for one. Tied parameters are there once.

    Raises:
        MaskError: when the masks belong to another network.
    """
    if masks is not None:
        masks.match(task.model)
    every = {name: p for name, p in parameters(task.model).items() if p.is_floating_point()}
    trained = {name: p for name, p in every.items() if p.requires_grad} or every
    return Masks({
        name: torch.ones(p.shape, dtype=torch.bool, device=p.device)
        if masks is None or name not in masks
        else masks[name].to(p.device)
        for name, p in trained.items()
    })  # fmt: skip


@torch.no_grad()
def mean_loss(task: Task, at: Named | None = None) -> float:
    """Mean loss in evaluation mode with other weights; NaN and infinity come back as they are.

    Raises:
        ModelError: for a loss of several values.
        DataError: when the data is empty or spent.

    Cost: one forward pass.
    """
    total, count = 0.0, 0
    with frozen(task.model):
        for inputs, target, n in task.batches():
            value = task.loss_at((inputs, target), at)
            if value.dim():
                check_loss(value)
            total, count = total + value.item() * n, count + n
    return total / count


def top_eigenvalue(op: Symmetric, steps: int, generator: Generator, tolerance: float = 1e-3) -> Top:
    """The largest eigenvalue (not the largest in size) by Lanczos with restarts, and its residual.

    The space grows by the residual of its best vector, which is Lanczos; when it is full the best vectors are kept
    (Wu and Simon 2000). Some eigenvalue lies within the residual, and the largest is not below the value.

    Args:
        op: a symmetric operator.
        steps: at most this many products.
        generator: where the start comes from.
        tolerance: stop when the residual is below this share of the largest eigenvalue in size that is seen.

    Raises:
        UsageError: when the vectors do not fit into memory.
        ModelError: when a product is not finite.

    Cost: up to ``steps`` products; memory of 24 vectors.
    """
    room = min(_BASIS, op.size)
    check(2 * estimate((room, op.size), op.dtype), f"{2 * room} vectors of Lanczos", "prune more first", op.device)
    basis = torch.zeros(room, op.size, dtype=op.dtype, device=op.device)
    moved, n = torch.zeros_like(basis), 0
    begin = torch.randn(op.size, generator=generator, device=generator.device, dtype=torch.float64)
    basis[0] = (begin / begin.norm()).to(op.device, op.dtype)
    for step in range(1, steps + 1):
        moved[n] = op @ basis[n]
        n += 1
        inner = (basis[:n] @ moved[:n].T).double().cpu()
        values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
        value, size = values[-1].item(), values.abs().max().item()
        best = vectors[:, -1].to(op.device, op.dtype)
        rest = best @ moved[:n] - value * (best @ basis[:n])
        found = Top(value, rest.norm().item(), step)
        if found.residual <= max(tolerance, 10 * torch.finfo(op.dtype).eps) * size or n == op.size:
            return found
        if n == room:
            keep = vectors[:, -_KEPT:].T.to(op.device, op.dtype)
            basis[:_KEPT], moved[:_KEPT], n = keep @ basis, keep @ moved, _KEPT
        for _ in range(2):  # once more: rounding leaves a part of the first pass behind
            rest = rest - basis[:n].T @ (basis[:n] @ rest)
        basis[n] = rest / rest.norm()
    return found


def signed_sums(op: Symmetric, draws: int, generator: Generator) -> Tensor:
    """``vᵀ op v`` for vectors of random signs, (draws,) float64 on the CPU: their mean estimates the trace.

    One of them has variance ``2 Σ op_ij²`` over ``i ≠ j``, and is the trace itself where ``op`` is diagonal.

    Raises:
        ModelError: when a product is not finite.

    Cost: ``draws`` products.
    """
    found: list[Tensor] = []
    for start in range(0, draws, max(1, _HELD // op.size)):
        count = min(max(1, _HELD // op.size), draws - start)
        # a row for each vector, so that the signs do not depend on how many are taken at once
        coins = torch.randint(0, 2, (count, op.size), generator=generator, device=generator.device)
        signs = (coins * 2 - 1).to(op.device, op.dtype).T
        found.append((signs * (op @ signs)).sum(0).double().cpu())
    return torch.cat(found)


def filter_noise(weights: Named, kept: Masks, seed: int, draw: int) -> Named:
    """Gaussian noise on kept weights, each filter's as long as the filter itself; none for tensors of one dimension.

    A filter is what lies at one index of the first dimension: a row of a matrix, the kernels of an output channel.
    Noise follows from the seed, the number of the draw and the name of the tensor, whatever the masks.
    """
    noise: Named = {}
    for name, mask in kept.items():
        if mask.dim() < 2:
            continue
        w = weights[name].detach() * mask
        random = stream(seed, "flatness", "noise", draw, name)
        z = torch.randn(w.shape, generator=random, dtype=torch.float32).to(w.device, w.dtype) * mask
        lengths = [t.reshape(len(t), -1).norm(dim=1) for t in (w, z)]
        ratio = torch.where(lengths[1] > 0, lengths[0] / lengths[1], 0.0)
        noise[name] = z * ratio.reshape(-1, *[1] * (w.dim() - 1))
    return noise


def spread_of_mean(values: Tensor) -> Spread:
    """Standard error and Student's 95 % interval of the mean of independent draws, (n,) with n of at least 5.

    Source: the quantile by Abramowitz and Stegun 26.7.5, within 0.3 % from 5 draws on.
    """
    n, mean = len(values), float(values.mean())
    stderr, v = float(values.std()) / math.sqrt(n), n - 1
    powers = [Z**k for k in range(8)]
    t = Z + (powers[3] + Z) / (4 * v) + (5 * powers[5] + 16 * powers[3] + 3 * Z) / (96 * v**2)
    t += (3 * powers[7] + 19 * powers[5] + 17 * powers[3] - 15 * Z) / (384 * v**3)
    return Spread(stderr, mean - t * stderr, mean + t * stderr)
