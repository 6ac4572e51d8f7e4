"""Quadratic tasks have the loss, slope and curvature that were asked for."""

import pytest
import torch

from secateur.core.errors import UsageError
from secateur.testing.quadratics import dense, diagonal


def test_loss_gradient_and_hessian_are_the_ones_asked_for():
    """w·Hw/2 + b·w at w, its gradient Hw + b, and its Hessian by differentiating twice."""
    h = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, -1.0], [0.0, -1.0, 4.0]], dtype=torch.float64)
    b = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    w = torch.tensor([0.5, 1.5, -1.0], dtype=torch.float64)
    task = dense(h, slope=b, at=w)

    assert task.mean_loss() == pytest.approx((w @ h @ w / 2 + b @ w).item(), abs=1e-14)
    torch.testing.assert_close(task.gradients()["weight"][0], h @ w + b, rtol=0, atol=1e-14)
    columns = [task.gradients({"weight": (w + e)[None]})["weight"][0] - (h @ w + b) for e in torch.eye(3).double()]
    torch.testing.assert_close(torch.stack(columns), h, rtol=0, atol=1e-13)


def test_the_second_order_forecast_is_exact():
    task = diagonal([1.0, 4.0, 9.0], slope=[1.0, 0.0, -3.0])
    step = torch.tensor([[-1.0, 0.5, 2.0]], dtype=torch.float64)
    first, second = task.taylor({"weight": step})
    moved = task.mean_loss({"weight": task.params()["weight"].detach() + step})
    assert first + second == pytest.approx(moved - task.mean_loss(), abs=1e-12)


def test_batches_differ_so_that_weighing_them_alike_shows():
    task = diagonal([1.0, 4.0, 9.0])
    losses = [task.loss_at(batch).item() for batch in task.data]
    assert losses == [10.5, 5.25]
    assert sum(losses) / 2 != task.mean_loss() == 7.0


@pytest.mark.parametrize(
    ("hessian", "slope"),
    [
        ([[1.0, 2.0], [0.0, 1.0]], None),
        ([[1.0, 2.0]], None),
        ([[1.0, 0.0], [0.0, 1.0]], [1.0, 2.0, 3.0]),
    ],
)
def test_what_is_no_quadratic_is_refused(hessian, slope):
    with pytest.raises(UsageError, match="Hessian"):
        dense(hessian, slope)
