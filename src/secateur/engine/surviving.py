"""Compensation over a whole network: all kept weights move at once to make up for those that went."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.core.errors import ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.prunable import check_finite
from secateur.core.task import Task
from secateur.linalg.flat import Flat
from secateur.linalg.memory import check, estimate
from secateur.linalg.products import per_example_gradients

__all__ = ["DAMPING", "refit_survivors"]

DAMPING = 1e-5
_COLUMNS = 1 << 22  # entries of the gradients that are widened at once


@torch.no_grad()
def refit_survivors(
    task: Task, masks: Masks, damping: float = DAMPING, before: Mapping[str, Tensor] | None = None
) -> Named:
    """Prune by ``masks`` and move the weights that stay, in place, to the minimum of a quadratic model of the loss.

    The model is ``dᵀFd / 2`` for a change ``d`` of all weights in the masks, with ``F = λI + mean g gᵀ`` over the
    gradients ``g`` of single examples at the weights before pruning. Weights that go change by ``d_Q = -w_Q``; the
    others by the exact minimiser, ``F_SS d_S = F_SQ w_Q``, which is ``d_S = G_Sᵀ (NλI + G_S G_Sᵀ)⁻¹ G_Q w_Q`` with
    the gradients of ``N`` examples as rows of ``G``. Tensors outside the masks (biases, BatchNorm) stay. Pruned
    weights become exactly +0.0. Evaluation mode: running statistics of BatchNorm.

    Args:
        task: network, loss and the examples of the Fisher matrix; a few hundred to a thousand are usual.
        masks: True = kept; weights that were zero before go for nothing.
        damping: ``λ`` as a share of the mean diagonal of the Fisher over all weights that are not zero, above 0.
        before: the weights before pruning by name, when the network holds others by now; its own by default. Whatever
            a solver made of the kept ones is lost: the minimum depends on the weights before and the masks alone.

    Returns:
        The change of every tensor in the masks: ``d``.

    Raises:
        UsageError: for a damping not above 0, or gradients that do not fit into memory.
        ModelError: when a weight is NaN or infinite, or rounding loses so small a damping.
        DataError: when the data is empty or spent, or a gradient is not finite.
        MaskError: when ``masks`` belong to another network.

        After an error the network is as it was.

    Cost: the gradient of every example, of which the kept part is held, ``N`` by the kept weights, and ``N²`` times
    as many multiplications in float64.
    """
    if not 0 < damping < float("inf"):
        raise UsageError(f"damping must be above 0, not {damping:g}: without it there is no one minimum; try 1e-5.")
    weights = masks.match(task.model)
    now = {name: p.detach().clone() for name, p in weights.items()}
    try:
        for name, old in (before or {}).items():
            if name in weights:
                weights[name].copy_(old)
        check_finite(dict(weights))
        dense = {name: p.detach().clone() for name, p in weights.items()}
        change = _change(task, masks, dense, damping)
        for name, p in weights.items():
            p.copy_((dense[name] + change[name]).masked_fill_(~masks[name], 0.0))
        check_finite(dict(weights))
    except BaseException:
        for name, p in weights.items():
            p.copy_(now[name])
        raise
    return change


def _change(task: Task, masks: Masks, dense: Named, damping: float) -> Named:
    """The change of each tensor, ``-w`` where it is pruned."""
    lost = {name: w.masked_fill(masks[name], 0.0) for name, w in dense.items()}
    gone = {name: -w for name, w in lost.items()}
    if not masks.kept or not any(bool(w.any()) for w in lost.values()):
        return gone
    every = Masks({name: (w != 0) | masks[name] for name, w in dense.items()})
    kept, whole = Flat(task, masks), Flat(task, every)
    rows, pull, mean = _gradients(task, masks, every, lost)
    if not mean:  # no example's loss depends on a weight: there is nothing to make up for
        return gone
    solved = _solve(rows, pull, damping * mean)
    moved = torch.cat([part.to(solved.dtype).T @ solved for part in _parts(rows)]).to(whole.dtype)
    return {name: gone[name] + part.to(gone[name].dtype) for name, part in kept.unflatten(moved).items()}


def _gradients(task: Task, masks: Masks, every: Masks, lost: Named) -> tuple[Tensor, Tensor, float]:
    """Each example's gradient at the kept weights, its slope along the lost ones, and the mean square of an entry."""
    kept, whole = Flat(task, masks), Flat(task, every)
    stay = whole.flatten({name: mask.to(whole.dtype) for name, mask in masks.items()}) > 0
    w = _wide(whole.flatten(lost))
    examples = sum(n for _, _, n in task.batches())
    what = f"the gradients of {examples:,} examples at {kept.size:,} kept weights"
    check(estimate((examples, kept.size), kept.dtype), what, "pass fewer examples", kept.device)
    rows = torch.empty(examples, kept.size, dtype=kept.dtype, device=kept.device)
    pull, square, start = w.new_empty(examples), w.new_zeros(()), 0
    for some in per_example_gradients(task, every):
        stop = start + len(some)
        rows[start:stop] = some[:, stay]
        pull[start:stop] = torch.stack([row.to(w.dtype) @ w for row in some])
        square += torch.stack([row.to(w.dtype).square().sum() for row in some]).sum()
        start = stop
    return rows, pull, float(square) / (examples * whole.size)


def _solve(rows: Tensor, pull: Tensor, damping: float) -> Tensor:
    """``(NλI + G_S G_Sᵀ)⁻¹`` times the slopes."""
    inner = torch.diag(torch.full_like(pull, len(rows) * damping))
    for part in _parts(rows):
        wide = part.to(pull.dtype)
        inner.addmm_(wide, wide.T)
    lower, failed = torch.linalg.cholesky_ex(inner)
    if bool(failed):
        raise ModelError(
            f"a damping of {damping:.3g} is lost to rounding beside gradients as large as these. Raise `damping` "
            "tenfold, or pass other examples: some may be the same."
        )
    return torch.cholesky_solve(pull[:, None], lower)[:, 0]


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(1, _COLUMNS // max(1, len(rows))), dim=1)


def _wide(vector: Tensor) -> Tensor:
    return vector if vector.device.type == "mps" else vector.double()
