"""Inverses against torch.linalg.inv and the recursions of the papers, in float64."""

import pytest
import torch

from secateur.core.errors import DataError, ModelError, UsageError
from secateur.linalg import inverses
from secateur.linalg.inverses import MFac, damped_cholesky, downdate, fisher_inverse, inverse_cholesky


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definite(n, seed=0):
    a = normal(n, n + 3, seed=seed)
    return a @ a.T


def fisher(g, damping, examples=None):
    return damping * torch.eye(g.shape[1], dtype=torch.float64) + g.T @ g / (examples or len(g))


def test_factor_of_the_damped_matrix():
    h = definite(9)
    factor, used = damped_cholesky(h, 0.1)
    assert used == 0.1 and torch.equal(factor, factor.tril())
    torch.testing.assert_close(
        factor @ factor.T, h + 0.1 * h.diagonal().mean() * torch.eye(9).double(), rtol=1e-12, atol=1e-12
    )


def test_every_matrix_of_a_batch_has_its_own_scale():
    many = torch.stack([definite(5), 1e4 * definite(5, 1)])
    factor, _ = damped_cholesky(many, 0.01)
    for one, h in zip(factor, many, strict=True):
        torch.testing.assert_close(one, damped_cholesky(h, 0.01)[0], rtol=1e-12, atol=1e-12)


def test_damping_grows_until_the_factor_exists():
    """Eigenvalues -0.02 and 2.02 around a mean diagonal of 1: 0.001 and 0.01 fail, 0.1 does."""
    h = torch.tensor([[1.0, 1.02], [1.02, 1.0]]).double()
    factor, used = damped_cholesky(h, 0.001)
    assert used == pytest.approx(0.1)
    torch.testing.assert_close(factor @ factor.T, h + 0.1 * torch.eye(2).double(), rtol=1e-12, atol=1e-12)
    assert damped_cholesky(torch.ones(2, 2, dtype=torch.float64), 0.0)[1] == pytest.approx(2**-26, rel=1e-9)


def test_what_stays_indefinite_is_refused_with_its_eigenvalue():
    h = torch.tensor([[1.0, 3.0], [3.0, 1.0]]).double()
    with pytest.raises(ModelError, match=r"lowest eigenvalue is -2 times .* from 0.01 to 0.1 .* `damping` above 2,"):
        damped_cholesky(h, 0.01, tries=2)


def test_upper_factor_of_the_inverse():
    """H⁻¹ = Uᵀ U, and U[j, j]² is the corner of the inverse of what is left from j on."""
    h = definite(8)
    upper = inverse_cholesky(h, 0.0)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(h), rtol=1e-9, atol=1e-11)
    for j in range(8):
        torch.testing.assert_close(upper[j, j] ** 2, torch.linalg.inv(h[j:, j:])[0, 0], rtol=1e-9, atol=0)
    both = inverse_cholesky(torch.stack([h, 2 * h]), 0.0)
    torch.testing.assert_close(both, torch.stack([upper, upper / 2**0.5]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("m", "n"), [(40, 12), (7, 12), (12, 12)])
@pytest.mark.parametrize("block", [1, 5, 64])
def test_recursion_is_the_inverse_in_any_order_and_block(m, n, block):
    g = normal(m, n)
    found = fisher_inverse(g, 1e-4, block=block)
    torch.testing.assert_close(found, torch.linalg.inv(fisher(g, 1e-4)), rtol=1e-7, atol=1e-7)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(fisher_inverse(g.flip(0), 1e-4, block=block), found, rtol=1e-7, atol=1e-7)


def test_recursion_of_optimal_brain_surgeon_one_row_at_a_time():
    """The paper's own formula, written out, with a divisor that is not the number of rows."""
    g, inverse = normal(10, 6), torch.eye(6, dtype=torch.float64) / 1e-2
    for x in g:
        moved = inverse @ x
        inverse = inverse - torch.outer(moved, moved) / (5 + x @ moved)
    torch.testing.assert_close(fisher_inverse(g, 1e-2, examples=5), inverse, rtol=1e-9, atol=1e-9)


def test_singular_curvature_with_the_smallest_damping_of_the_paper():
    g = normal(5, 12)
    found, true = fisher_inverse(g, 1e-8), torch.linalg.inv(fisher(g, 1e-8))
    assert (found - true).norm() < 1e-6 * true.norm()


def recursion_of_mfac(g, damping, x):
    """Frantar, Kurtic, Alistarh 2021: v_i and d_i row by row."""
    vs, ds = [], []
    for row in g:
        v = row / damping - sum(((u @ row) / d * u for u, d in zip(vs, ds, strict=True)), torch.zeros_like(row))
        vs.append(v)
        ds.append(len(g) + row @ v)
    product = x / damping - sum((v @ x) / d * v for v, d in zip(vs, ds, strict=True))
    diagonal = 1 / damping - sum(v.square() / d for v, d in zip(vs, ds, strict=True))
    return product, diagonal


@pytest.mark.parametrize("columns", [1 << 22, 7])
def test_mfac_is_the_dense_formula_and_the_papers_recursion(columns, monkeypatch):
    """All at once, and cut into pieces of one column (7 // 8 rows)."""
    monkeypatch.setattr(inverses, "_COLUMNS", columns)
    g, x = normal(8, 15), normal(15, 3, seed=1)
    fast, dense = MFac(g, 1e-3), torch.linalg.inv(fisher(g, 1e-3))
    product, diagonal = recursion_of_mfac(g, 1e-3, x[:, 0])
    torch.testing.assert_close(fast.multiply(x), dense @ x, rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(fast.multiply(x[:, 0]), product, rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(fast.diagonal(), dense.diagonal(), rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(fast.diagonal(), diagonal, rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(MFac(g, 1e-3, examples=4).diagonal(), torch.linalg.inv(fisher(g, 1e-3, 4)).diagonal())


def test_float32_gradients_keep_their_small_damping():
    g = normal(6, 20).float()
    true = torch.linalg.inv(fisher(g.double(), 1e-7))
    torch.testing.assert_close(MFac(g, 1e-7).diagonal(), true.diagonal(), rtol=1e-6, atol=0)
    torch.testing.assert_close(fisher_inverse(g, 1e-7).diagonal(), true.diagonal(), rtol=1e-6, atol=0)


def test_a_damping_lost_to_rounding_is_refused_or_bounded():
    """One weight: the diagonal of the inverse is 1 / (damping + g²), which 1 - g² / (damping + g²) cannot give."""
    g = torch.tensor([[1e6]]).double()
    torch.testing.assert_close(MFac(g, 1e-9).diagonal(), 1 / (g[0].square() + 1e-9), rtol=1e-12, atol=0)
    with pytest.raises(ModelError, match="damping of 1e-09 is lost to rounding"):
        fisher_inverse(g.expand(2, 1), 1e-9, block=1)


def test_downdates_follow_the_inverse_of_what_is_left():
    h = definite(7)
    inverse = torch.linalg.inv(h)
    left = list(range(7))
    for gone in (3, 0, 6, 4):
        assert downdate(inverse, gone) is inverse
        left.remove(gone)
        expected = torch.zeros_like(h)
        expected[torch.tensor(left)[:, None], left] = torch.linalg.inv(h[left][:, left])
        torch.testing.assert_close(inverse, expected, rtol=1e-8, atol=1e-10)
        assert not inverse[gone].any() and not inverse[:, gone].any()
    with pytest.raises(ModelError, match="cannot remove row 3 .* is 0, not positive"):
        downdate(inverse, 3)


def test_a_batch_of_inverses_is_downdated_each_at_its_own_place():
    many = torch.stack([torch.linalg.inv(definite(5, seed)) for seed in range(3)])
    each = [downdate(many[i].clone(), at) for i, at in enumerate((4, 0, 2))]
    downdate(many, torch.tensor([4, 0, 2]))
    torch.testing.assert_close(many, torch.stack(each), rtol=1e-12, atol=1e-14)


def test_bad_input_is_refused_by_value():
    g = normal(3, 4)
    with pytest.raises(UsageError, match=r"not \(3, 4\)"):
        damped_cholesky(g)
    with pytest.raises(UsageError, match="at least 0, not -1.0"):
        damped_cholesky(torch.eye(2), -1.0)
    with pytest.raises(ModelError, match="diagonal of zeros"):
        damped_cholesky(torch.zeros(2, 2))
    with pytest.raises(DataError, match="4 entries"):
        inverse_cholesky(torch.full((2, 2), float("nan")))
    for damping in (0.0, -1e-3, float("nan")):
        with pytest.raises(UsageError, match="damping must be above 0"):
            fisher_inverse(g, damping)
        with pytest.raises(UsageError, match="damping must be above 0"):
            MFac(g, damping)
    with pytest.raises(DataError, match="1 of 3 gradients"):
        MFac(torch.cat([g[:2], g[2:] / 0]), 1e-3)
    with pytest.raises(UsageError, match=r"shape \(4,\) or \(4, k\) is needed here, not \(3,\)"):
        MFac(g, 1e-3).multiply(torch.ones(3))
    with pytest.raises(UsageError, match="examples must be at least 1, not 0"):
        fisher_inverse(g, 1e-3, examples=0)
