"""Lanczos against eigvalsh, in float64."""

import pytest
import torch

from secateur.core.errors import ModelError, UsageError
from secateur.core.masks import Masks
from secateur.linalg.products import Operator
from secateur.linalg.spectra import lanczos, largest
from secateur.testing import CASES
from secateur.testing.quadratics import dense, diagonal


def operator(matrix):
    task = dense(matrix)
    return Operator(task, Masks.dense(task.model))


def symmetric(n):
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return a + a.T


def random():
    return torch.Generator().manual_seed(3)


def test_all_steps_give_all_eigenvalues():
    h = symmetric(40)
    values, weights = lanczos(operator(h), 99, random())
    torch.testing.assert_close(values, torch.linalg.eigvalsh(h), rtol=1e-10, atol=1e-10)
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-12)


def test_weights_are_the_share_of_the_start_in_each_eigenvector():
    """Then the moments of few steps are exact: Σ weight · value^k = v·H^k v below degree twice the steps."""
    h = symmetric(30)
    start = torch.randn(30, generator=random(), dtype=torch.float64)
    start /= start.norm()
    values, weights = lanczos(operator(h), 30, random())
    vectors = torch.linalg.eigh(h).eigenvectors
    torch.testing.assert_close(weights, (vectors.T @ start).square(), rtol=1e-8, atol=1e-10)
    values, weights = lanczos(operator(h), 4, random())
    for k in range(8):
        moment = start @ torch.linalg.matrix_power(h, k) @ start
        torch.testing.assert_close((weights * values**k).sum(), moment, rtol=1e-9, atol=1e-9)


def test_few_distinct_eigenvalues_end_the_search_early():
    task = diagonal([2.0] * 20 + [-1.0] * 10 + [7.0])
    values, weights = lanczos(Operator(task, Masks.dense(task.model)), 25, random())
    torch.testing.assert_close(values, torch.tensor([-1.0, 2.0, 7.0]).double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_largest_eigenvalue_of_a_network(kind):
    task = CASES["conv_bn"]()
    op = Operator(task, Masks.dense(task.model), kind)
    true = torch.linalg.eigvalsh(op.dense())[-1].item()
    assert largest(op, random()) == pytest.approx(true, rel=1e-4)


def test_largest_is_not_the_largest_in_size():
    h = torch.diag(torch.tensor([-9.0, -1.0, 0.5, 2.0]))
    assert largest(operator(h), random(), tolerance=1e-9) == pytest.approx(2.0, rel=1e-9)
    assert largest(operator(-h), random(), tolerance=1e-9) == pytest.approx(9.0, rel=1e-9)


def test_a_matrix_of_zeros_has_eigenvalue_zero():
    assert largest(operator(torch.zeros(3, 3)), random()) == 0.0
    values, weights = lanczos(operator(torch.zeros(3, 3)), 3, random())
    assert values.tolist() == [0.0] and weights.tolist() == [1.0]


class Broken:
    size, dtype, device = 3, torch.float64, torch.device("cpu")

    def __matmul__(self, v):
        return v * float("nan")


def test_bad_input_is_refused():
    with pytest.raises(UsageError, match="at least 1, not 0"):
        lanczos(operator(symmetric(3)), 0, random())
    with pytest.raises(UsageError, match="at least 1, not 0"):
        largest(operator(symmetric(3)), random(), steps=0)
    with pytest.raises(ModelError, match="product 1 of Lanczos is not finite"):
        lanczos(Broken(), 3, random())
