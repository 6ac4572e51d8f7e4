"""Inverses of curvature matrices: damped Cholesky factors, the Woodbury recursion, M-FAC and downdates."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.errors import DataError, ModelError, UsageError
from secateur.linalg.memory import check, estimate

_COLUMNS = 1 << 22  # entries of the gradients that are widened to float64 at once
_LEAST = 1e-13  # a damping that float64 does not lose, as a share of the sum of the squared gradients


def damped_cholesky(matrix: Tensor, damping: float = 0.01, tries: int = 5) -> tuple[Tensor, float]:
    """The lower factor ``L`` of ``matrix + damping · mean(diagonal) · I = L Lᵀ``; more damping where that fails.

    Args:
        matrix: symmetric, ``(n, n)`` or ``(batch, n, n)``; only the lower triangle is read. Float32 or wider.
        damping: relative to the mean of each matrix's diagonal, at least 0.
        tries: how often to try; each time the damping is ten times larger (starting at ``√eps`` if it was 0).

    Returns:
        The lower factor in the type of ``matrix``, and the (relative) damping that was used.

    Raises:
        UsageError: when the damping is negative or the shape is not square.
        DataError: when an entry is not finite.
        ModelError: when the matrix stays indefinite; the message gives its lowest eigenvalue and the damping tried.

    Cost: ``n³ / 3`` a try; memory of two matrices.
    """
    _check_square(matrix)
    if not damping >= 0:
        raise UsageError(f"damping must be at least 0, not {damping}; 0.01 is usual.")
    scale = matrix.diagonal(dim1=-2, dim2=-1).abs().mean(-1)[..., None]
    if not bool((scale > 0).all()):
        raise ModelError(
            "a curvature matrix has a diagonal of zeros: the inputs of the layer are all zero, or no gradient reaches "
            "it. Leave the layer out, or set its diagonal to 1 and its weights to 0."
        )
    used = damping
    for _ in range(tries):
        damped = matrix.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(used * scale)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed.any()):
            return factor, used
        tried, used = used, 10 * used or torch.finfo(matrix.dtype).eps ** 0.5
    lowest = (torch.linalg.eigvalsh(matrix.double())[..., 0] / scale[..., 0]).min().item()
    raise ModelError(
        f"a curvature matrix is not positive definite: its lowest eigenvalue is {lowest:.3g} times the mean of its "
        f"diagonal, and damping from {damping:g} to {tried:g} was not enough. Pass `damping` above "
        f"{max(-lowest, tried):.2g}, or use more examples."
    )


def inverse_cholesky(matrix: Tensor, damping: float = 0.01) -> Tensor:
    """The upper factor ``U`` of the inverse, ``(matrix + damping · mean(diagonal) · I)⁻¹ = Uᵀ U``.

    ``U[j, j]²`` is the first diagonal entry of the inverse of the matrix without its first ``j`` rows and columns.

    Args:
        matrix: symmetric, ``(n, n)`` or ``(batch, n, n)``.
        damping: as for :func:`damped_cholesky`, with which it is raised where needed.

    Raises:
        UsageError, DataError, ModelError: as :func:`damped_cholesky`.

    Cost: ``2 n³ / 3``; memory of four matrices. The inverse itself is never formed.
    """
    # with rows and columns in reverse order the factor of the matrix is upper, and so is its inverse
    factor = damped_cholesky(matrix.flip(-1, -2), damping)[0].flip(-1, -2)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(factor, eye.expand_as(matrix), upper=True)


def fisher_inverse(gradients: Tensor, damping: float, examples: int | None = None, block: int = 32) -> Tensor:
    """The inverse of ``damping · I + gradientsᵀ gradients / examples``, row by row with Woodbury's formula.

    Args:
        gradients: ``(m, n)``, a gradient (or a scaled row of the Jacobian) in each row.
        damping: added to the diagonal as it is (not relative), above 0.
        examples: the divisor; the number of rows by default. Another number when an example has several rows.
        block: rows that are taken in at once; 1 is the recursion of the papers. The result is the same.

    Returns:
        ``(n, n)``, symmetric, in float64: with a small damping float32 would lose it.

    Raises:
        UsageError: when damping, examples or block are not positive, or the matrix does not fit into memory.
        DataError: when a gradient is not finite.
        ModelError: when rounding loses so small a damping beside such large gradients.

    Cost: ``2 m n²`` multiplications; memory of two ``(n, n)`` matrices in float64.
    """
    count = _check_rows(gradients, damping, examples)
    if block < 1:
        raise UsageError(f"block must be at least 1, not {block}.")
    n = gradients.shape[1]
    check(2 * estimate((n, n), torch.float64), f"the inverse of {n:,} weights", "use MFac or blocks", gradients.device)
    inverse = torch.eye(n, dtype=torch.float64, device=gradients.device).div_(damping)
    for rows in gradients.split(block):
        moved = rows.double() @ inverse
        inner = moved @ rows.double().T
        inner.diagonal().add_(count)
        half = torch.linalg.solve_triangular(_factor(inner, damping, gradients), moved, upper=False)
        inverse.addmm_(half.T, half, alpha=-1)
    if not bool((inverse.diagonal() > 0).all()):
        raise _lost(damping, gradients)
    return inverse


class MFac:
    """The inverse of ``damping · I + gradientsᵀ gradients / examples`` as products, without the matrix (M-FAC).

    Args:
        gradients: ``(m, n)``, a gradient in each row; kept as it is, not copied.
        damping: added to the diagonal as it is (not relative), above 0.
        examples: the divisor; the number of rows by default.

    Raises:
        UsageError: when damping or examples are not positive.
        DataError: when a gradient is not finite.
        ModelError: when rounding loses so small a damping beside such large gradients.

    Cost: ``m² n`` multiplications once, ``2 m n`` a product; memory of one ``(m, m)`` matrix in float64.
    """

    def __init__(self, gradients: Tensor, damping: float, examples: int | None = None) -> None:
        count = _check_rows(gradients, damping, examples)
        self.gradients, self.damping, self._count = gradients.detach(), damping, count
        m = len(gradients)
        inner = torch.zeros(m, m, dtype=torch.float64, device=gradients.device)
        for part in self._parts():
            inner.addmm_(part.double(), part.double().T)
        inner.diagonal().add_(count * damping)
        self._factor = _factor(inner, damping, gradients)

    def multiply(self, v: Tensor) -> Tensor:
        """The inverse times ``v`` of shape ``(n,)`` or ``(n, k)``; same shape, in float64.

        Raises:
            UsageError: for another shape.
        """
        n = self.gradients.shape[1]
        if v.dim() not in (1, 2) or v.shape[0] != n:
            raise UsageError(f"shape ({n},) or ({n}, k) is needed here, not {tuple(v.shape)}.")
        columns = v.detach().reshape(n, -1).double()
        pieces = columns.split(self._width())
        along = torch.stack([part.double() @ c for part, c in zip(self._parts(), pieces, strict=True)]).sum(0)
        solved = torch.cholesky_solve(along, self._factor)
        back = torch.cat([part.double().T @ solved for part in self._parts()])
        return ((columns - back) / self.damping).reshape(v.shape)

    def diagonal(self) -> Tensor:
        """The diagonal of the inverse, shape ``(n,)``, in float64.

        Entries are right to about ``1e-16`` of the largest possible one, ``1 / damping``.
        """
        entries = []
        for part in self._parts():
            wide = part.double()
            explained = torch.linalg.solve_triangular(self._factor, wide, upper=False).square().sum(0)
            # one over the diagonal of the matrix is never more than the diagonal of its inverse; rounding may be less
            floor = 1 / (self.damping + wide.square().sum(0) / self._count)
            entries.append(torch.maximum((1 - explained) / self.damping, floor))
        return torch.cat(entries)

    def _width(self) -> int:
        return max(1, _COLUMNS // max(1, len(self.gradients)))

    def _parts(self) -> tuple[Tensor, ...]:
        return self.gradients.split(self._width(), dim=1)


def downdate(inverse: Tensor, index: int | Tensor) -> Tensor:
    """Turn the inverse of a matrix, in place, into that of the matrix without row and column ``index``.

    The shape stays: row and column ``index`` become exactly zero.

    Args:
        inverse: ``(n, n)``, or ``(batch, n, n)`` with an index for each.
        index: which to remove; for a batch a tensor ``(batch,)`` of whole numbers.

    Returns:
        ``inverse`` itself.

    Raises:
        ModelError: when the diagonal entry is not positive: removed before, or lost to rounding.

    Cost: ``n²`` a matrix.
    """
    many = inverse if inverse.dim() == 3 else inverse[None]
    at = torch.as_tensor(index, device=inverse.device).reshape(-1)
    which = torch.arange(len(many), device=inverse.device)
    column = many[which, :, at]
    pivot = column[which, at]
    if not bool((pivot > 0).all()):
        worst = int(pivot.argmin())
        raise ModelError(
            f"cannot remove row {int(at[worst])} from an inverse: its diagonal entry is {pivot[worst].item():.3g}, not "
            "positive. It was removed before, or rounding has spoiled the inverse: use float64 or more damping."
        )
    column = column / pivot.sqrt()[:, None]
    many.baddbmm_(column[:, :, None], column[:, None, :], alpha=-1)
    many[which, at] = 0.0
    many[which, :, at] = 0.0
    return inverse


def _factor(inner: Tensor, damping: float, gradients: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(inner)
    if bool(failed):
        raise _lost(damping, gradients)
    return factor


def _lost(damping: float, gradients: Tensor) -> ModelError:
    size = sum(float(part.double().square().sum()) for part in gradients.split(max(1, _COLUMNS // gradients.shape[1])))
    return ModelError(
        f"a damping of {damping:.3g} is lost to rounding beside gradients whose squares add up to {size:.3g}, and the "
        f"inverse is not positive. Raise `damping` by a factor of {max(10.0, _LEAST * size / damping):.2g}."
    )


def _check_square(matrix: Tensor) -> None:
    if matrix.dim() not in (2, 3) or matrix.shape[-1] != matrix.shape[-2]:
        raise UsageError(f"a square matrix is needed here, (n, n) or (batch, n, n), not {tuple(matrix.shape)}.")
    if not bool(torch.isfinite(matrix).all()):
        raise DataError(
            f"{int((~matrix.isfinite()).sum()):,} entries of a curvature matrix are NaN or infinite. Look for "
            "activations or gradients that are not finite (`secateur doctor`)."
        )


def _check_rows(gradients: Tensor, damping: float, examples: int | None) -> int:
    """The divisor, after all checks."""
    if gradients.dim() != 2 or not gradients.numel():
        raise UsageError(f"gradients must be rows (m, n) with at least one entry, not {tuple(gradients.shape)}.")
    if not 0 < damping < float("inf"):
        raise UsageError(f"damping must be above 0, not {damping}: without it the matrix has no inverse; try 1e-5.")
    count = len(gradients) if examples is None else examples
    if count < 1:
        raise UsageError(f"examples must be at least 1, not {examples}.")
    bad = int((~torch.isfinite(gradients)).any(1).sum())
    if bad:
        raise DataError(
            f"{bad:,} of {len(gradients):,} gradients are not finite; look for NaN or infinity in the data and in the "
            "weights (`secateur doctor`)."
        )
    return count
