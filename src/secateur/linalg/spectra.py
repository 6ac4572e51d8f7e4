"""Eigenvalues of operators by Lanczos: the extreme ones exactly, the density between them as weighted points."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from secateur.core.errors import ModelError, UsageError
from secateur.linalg.flat import Symmetric
from secateur.linalg.memory import check, estimate


def lanczos(op: Symmetric, steps: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Ritz values and their weights, from a random start, with full reorthogonalisation.

    ``Σ weight · f(value)`` estimates ``trace(f(op)) / size``; it is exact for polynomials below degree ``2 · steps``
    in the measure of the start. With as many steps as distinct eigenvalues the values are these.

    Args:
        op: a symmetric operator.
        steps: at most this many products; fewer when the vectors span all that the start reaches.
        generator: where the start comes from.

    Returns:
        Values, ascending, and weights that sum to 1, both ``(steps,)`` in float64 on the CPU.

    Raises:
        UsageError: for no step, or when the vectors do not fit into memory.
        ModelError: when a product is not finite.

    Cost: ``steps`` products and ``2 · steps² · size``; memory of ``steps`` vectors.
    """
    if steps < 1:
        raise UsageError(f"steps must be at least 1, not {steps}; 50 is usual.")
    values, vectors = torch.linalg.eigh(_tridiagonal(op, min(steps, op.size), generator))
    return values, vectors[0].square()


def largest(op: Symmetric, generator: Generator, steps: int = 100, tolerance: float = 1e-4) -> float:
    """The largest eigenvalue (not the largest in size; for that of ``-op`` look at the first of :func:`lanczos`).

    Args:
        op: a symmetric operator.
        generator: where the start comes from.
        steps: at most this many products.
        tolerance: stop when the residual is below this share of the largest eigenvalue in size found so far; some
            eigenvalue lies within the residual.

    Raises:
        UsageError: for no step.
        ModelError: when a product is not finite.

    Cost: up to ``steps`` products; memory of as many vectors.
    """
    if steps < 1:
        raise UsageError(f"steps must be at least 1, not {steps}; 100 is usual.")
    inner = _tridiagonal(op, min(steps, op.size), generator, tolerance)
    return torch.linalg.eigvalsh(inner)[-1].item()


def _tridiagonal(op: Symmetric, steps: int, generator: Generator, tolerance: float = 0.0) -> Tensor:
    """The operator in the orthonormal basis of its Krylov space."""
    check(estimate((steps, op.size), op.dtype), f"{steps} vectors of Lanczos", "take fewer steps", op.device)
    start = torch.randn(op.size, generator=generator, device=generator.device, dtype=torch.float64)
    basis = torch.zeros(steps, op.size, dtype=op.dtype, device=op.device)
    basis[0] = (start / start.norm()).to(op.device, op.dtype)
    inner = torch.zeros(steps, steps, dtype=torch.float64)
    for i in range(steps):
        moved = op @ basis[i]
        inner[i, i] = alpha = (moved @ basis[i]).item()
        if not torch.isfinite(inner[i, i]):
            raise ModelError(f"product {i + 1} of Lanczos is not finite ({alpha}): the operator holds NaN or infinity.")
        for _ in range(2):  # once more: rounding leaves a part of the first pass behind
            moved = moved - basis[: i + 1].T @ (basis[: i + 1] @ moved)
        beta = moved.norm().item()
        size = inner[: i + 1, : i + 1].abs().max().item()
        if i + 1 == steps or beta <= 10 * torch.finfo(op.dtype).eps * size or _settled(inner, i, beta, tolerance):
            return inner[: i + 1, : i + 1]
        inner[i, i + 1] = inner[i + 1, i] = beta
        basis[i + 1] = moved / beta
    return inner


def _settled(inner: Tensor, i: int, beta: float, tolerance: float) -> bool:
    """Whether the residual of the largest Ritz pair is small."""
    if not tolerance:
        return False
    values, vectors = torch.linalg.eigh(inner[: i + 1, : i + 1])
    return abs(beta * vectors[-1, -1].item()) <= tolerance * values.abs().max().item()
