"""Diagonals against the whole matrix, in float64."""

import pytest
import torch

from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.linalg.diagonals import exact_diagonal, fisher_diagonal, hutchinson
from secateur.linalg.flat import Symmetric
from secateur.linalg.products import Operator
from secateur.testing import CASES
from secateur.testing.quadratics import dense, diagonal


def operator(matrix):
    task = dense(matrix)
    return Operator(task, Masks.dense(task.model))


def symmetric(n):
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return a + a.T


@pytest.mark.parametrize("name", CASES)
def test_fisher_diagonal_is_the_mean_square_of_single_gradients(name):
    """Task.gradients of every example by itself is the reference; pruned entries are zero."""
    task = CASES[name](batches=(1,) * 5)
    random = torch.Generator().manual_seed(0)
    masks = Masks({n: torch.rand(p.shape, generator=random) < 0.5 for n, p in task.params().items()})
    each = [type(task)(task.model, task.loss, [batch]).gradients() for batch in task.data]
    found = fisher_diagonal(CASES[name](batches=(3, 2)), masks)
    assert list(found) == list(masks)
    for key, mask in masks.items():
        expected = torch.stack([g[key].square() for g in each]).mean(0) * mask
        torch.testing.assert_close(found[key], expected, rtol=1e-9, atol=1e-13)


def test_squares_of_small_half_precision_gradients_do_not_vanish():
    """Slopes of 2**-14 are float16's smallest normal numbers; their squares are zero there."""
    net = torch.nn.Linear(1, 1, bias=False).half()
    data = [(torch.full((2, 1), 2.0**-14, dtype=torch.float16), torch.zeros(2))]
    task = type(CASES["tanh_mlp"]())(net, lambda o, t: o.mean(), data)
    assert fisher_diagonal(task, Masks.dense(net))["weight"].item() == 2.0**-28


def test_exact_diagonal_is_that_of_the_matrix():
    h = symmetric(37)
    op = operator(h)
    assert isinstance(op, Symmetric)
    torch.testing.assert_close(exact_diagonal(op), h.diagonal(), rtol=1e-13, atol=1e-13)


def test_random_signs_are_exact_on_a_diagonal_matrix():
    task = diagonal([1.0, -4.0, 9.0])
    found, error = hutchinson(Operator(task, Masks.dense(task.model)), 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, torch.tensor([1.0, -4.0, 9.0]).double(), rtol=1e-14, atol=0)
    assert error.max() < 1e-14


def test_the_error_is_what_theory_says_and_covers_the_truth():
    """The variance of an entry is the sum of squares of its row off the diagonal; errors in units of it are normal."""
    h, samples = symmetric(30), 400
    found, error = hutchinson(operator(h), samples, torch.Generator().manual_seed(1))
    off = (h - torch.diag(h.diagonal())).square().sum(1)
    torch.testing.assert_close(error, (off / samples).sqrt(), rtol=0.15, atol=0)
    assert ((found - h.diagonal()) / error).abs().max() < 4.5
    assert 0.6 < ((found - h.diagonal()) / error).square().mean().sqrt() < 1.5


def test_mean_and_error_are_those_of_the_single_estimates():
    """The same signs, one vector after the other, across more than one block of columns."""
    h, samples = symmetric(6), 37
    random = torch.Generator().manual_seed(2)
    signs = torch.cat([torch.randint(0, 2, (c, 6), generator=random) for c in (16, 16, 5)]).double() * 2 - 1
    values = signs * (signs @ h)
    found, error = hutchinson(operator(h), samples, torch.Generator().manual_seed(2))
    torch.testing.assert_close(found, values.mean(0), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(error, values.std(0) / samples**0.5, rtol=1e-12, atol=1e-13)


def test_one_sample_is_refused():
    with pytest.raises(UsageError, match="at least 2, not 1"):
        hutchinson(operator(symmetric(3)), 1, torch.Generator())
