"""Tasks whose loss is exactly a quadratic, so that slopes and curvatures are known in closed form.

The only parameter is ``weight`` of shape ``(1, n)``. The mean loss over the data is
``L(w) = w·Hw / 2 + b·w``, its gradient is ``Hw + b`` and its Hessian is ``H`` everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from secateur.core.errors import UsageError
from secateur.core.task import Task


class Quadratic(nn.Module):
    """``(w·Hw / 2 + b·w)`` times the input of each example.

    Args:
        hessian: symmetric, shape ``(n, n)``.
        slope: ``b``, shape ``(n,)``.
        at: the value of ``w``, shape ``(n,)``.
    """

    hessian: Tensor
    slope: Tensor

    def __init__(self, hessian: Tensor, slope: Tensor, at: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(at.reshape(1, -1).clone())
        self.register_buffer("hessian", hessian)
        self.register_buffer("slope", slope)

    def forward(self, inputs: Tensor) -> Tensor:
        """One value for each example, shape of ``inputs``."""
        w = self.weight[0]
        return inputs * (w @ (self.hessian @ w) / 2 + self.slope @ w)


def diagonal(values: Sequence[float], slope: Sequence[float] | None = None, at: Sequence[float] | None = None) -> Task:
    """A quadratic with a diagonal Hessian, in float64.

    >>> diagonal([1.0, 4.0, 9.0]).mean_loss()
    7.0

    Args:
        values: the diagonal of the Hessian.
        slope: the gradient at zero; zeros by default.
        at: the weights; ones by default.

    Raises:
        UsageError: when the lengths differ.
    """
    return dense(torch.diag(torch.tensor(values, dtype=torch.float64)), slope, at)


def dense(
    hessian: Tensor | Sequence[Sequence[float]],
    slope: Sequence[float] | Tensor | None = None,
    at: Sequence[float] | Tensor | None = None,
) -> Task:
    """A quadratic with any symmetric Hessian, in float64.

    The data are two batches of unequal size whose own losses differ (one and a half times the mean loss for two
    examples, three quarters of it for four), so that weighing batches alike instead of examples shows.

    Args:
        hessian: symmetric, shape ``(n, n)``.
        slope: the gradient at zero, shape ``(n,)``; zeros by default.
        at: the weights, shape ``(n,)``; ones by default.

    Raises:
        UsageError: when the Hessian is not symmetric or the shapes differ.
    """
    h = torch.as_tensor(hessian, dtype=torch.float64)
    if h.dim() != 2 or h.shape[0] != h.shape[1] or not torch.equal(h, h.T):
        raise UsageError(f"a Hessian is a symmetric matrix; this one has shape {tuple(h.shape)} or is not symmetric.")
    b = torch.zeros(len(h), dtype=torch.float64) if slope is None else torch.as_tensor(slope, dtype=torch.float64)
    w = torch.ones(len(h), dtype=torch.float64) if at is None else torch.as_tensor(at, dtype=torch.float64)
    if b.shape != h.shape[:1] or w.shape != h.shape[:1]:
        raise UsageError(
            f"the Hessian is {len(h)} x {len(h)}, but slope has shape {tuple(b.shape)} and at {tuple(w.shape)}."
        )
    data = [
        (torch.full((count, 1), scale, dtype=torch.float64), torch.zeros(count))
        for count, scale in ((2, 1.5), (4, 0.75))
    ]
    return Task(Quadratic(h, b, w), _mean, data)


def _mean(output: Tensor, target: Tensor) -> Tensor:
    return output.mean()
