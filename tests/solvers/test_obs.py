"""OBS: one weight at a time, all survivors move."""

import pytest
import torch

from secateur.core.errors import DataError, UsageError
from secateur.core.patterns import NM, Unstructured
from secateur.core.streams import stream
from secateur.solvers.exact_obs import ExactObs
from secateur.solvers.obs import Obs


def layer(rows, width, examples=0):
    """Random weights and the Gram matrix of correlated inputs."""
    random = stream(3, "obs", f"{rows, width}")
    inputs = torch.randn(examples or 4 * width, width, generator=random, dtype=torch.float64)
    inputs += torch.randn(len(inputs), 1, generator=random, dtype=torch.float64)
    return torch.randn(rows, width, generator=random, dtype=torch.float64), inputs.T @ inputs / len(inputs)


def error(change, gram):
    return torch.einsum("oi,ij,oj->", change, gram, change).item()


def by_the_book(w, hessian, count):
    """One row as in the paper, but the inverse is taken anew of the submatrix before each loss."""
    w, left, rises = w.clone(), list(range(len(w))), []
    for _ in range(count):
        inverse = torch.linalg.inv(hessian[left][:, left])
        rise = w[left].square() / inverse.diagonal()
        q = int(rise.argmin())
        rises.append(rise[q].item())
        w[left] -= w[left[q]] / inverse[q, q] * inverse[:, q]
        w[left.pop(q)] = 0.0
    return w, rises


@pytest.mark.parametrize("keep", [11, 6, 1])
def test_the_downdated_inverse_is_the_inverse_of_the_submatrix(keep):
    """All of a run agrees with one that inverts from scratch at every step."""
    w, gram = layer(1, 12)
    expected, _ = by_the_book(w[0], gram, 12 - keep)

    new, mask = Obs(damping=0.0)(w, gram, Unstructured(), keep)

    torch.testing.assert_close(new[0], expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(mask[0], expected != 0)


def test_the_saliency_is_the_true_rise_of_a_quadratic():
    """One loss raises ``δ·H·δ`` by w²/[H⁻¹]; losses add up, since each starts from a minimum on the survivors."""
    w, hessian = layer(1, 9)
    least = (w[0].square() / torch.linalg.inv(hessian).diagonal()).min().item()
    for count in (1, 4, 7):
        new, _ = Obs(damping=0.0)(w, hessian, Unstructured(), 9 - count)
        rises = by_the_book(w[0], hessian, count)[1]
        assert rises[0] == pytest.approx(least, rel=1e-12)
        assert error(new - w, hessian) == pytest.approx(sum(rises), rel=1e-9)


def test_linear_least_squares_at_its_minimum_needs_no_refit():
    """The rise is that of deleting the weight and solving the regression again, for every single weight."""
    random = stream(0, "regression")
    x, y = torch.randn(40, 6, generator=random).double(), torch.randn(40, 1, generator=random).double()
    w = torch.linalg.lstsq(x, y).solution.T
    loss = [(x[:, [j for j in range(6) if j != q]], q) for q in range(6)]
    refit = [((part @ torch.linalg.lstsq(part, y).solution - y) ** 2).mean().item() for part, _ in loss]

    new, mask = Obs(damping=0.0)(w, x.T @ x / 40, Unstructured(), 5)

    assert int((~mask[0]).nonzero()) == refit.index(min(refit))
    assert ((x @ new.T - y) ** 2).mean().item() == pytest.approx(min(refit), rel=1e-12)


def test_a_diagonal_hessian_gives_the_saliency_of_obd_and_moves_nothing():
    w = torch.tensor([[3.0, -2.0, 1.0, 0.5]], dtype=torch.float64)
    curvature = torch.tensor([0.1, 1.0, 9.0, 100.0], dtype=torch.float64)  # w² h: 0.9, 4, 9, 25
    new, _ = Obs()(w, torch.diag(curvature), Unstructured(), 2)
    assert torch.equal(new, torch.tensor([[0.0, 0.0, 1.0, 0.5]], dtype=torch.float64))


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), NM(1, 4)])
def test_one_weight_at_a_time_ends_where_the_counts_by_recorded_losses_end(pattern):
    """Two algorithms, one result: downdated inverses and the cheapest row next, against panels, traces and a refit."""
    w, gram = layer(7, 24)
    for keep in (150, 84, 20) if pattern == Unstructured() else (pattern.fixed((7, 24)),):
        one, other = (solver(damping=0.003)(w, gram, pattern, keep) for solver in (Obs, ExactObs))
        assert torch.equal(one[1], other[1])
        torch.testing.assert_close(one[0], other[0], rtol=1e-8, atol=1e-10)


def test_a_row_can_lose_all_of_its_weights():
    """Its inverse has then shrunk to nothing."""
    random = torch.Generator().manual_seed(0)
    w, x = torch.randn(2, 128, generator=random), torch.randn(512, 128, generator=random)
    w[0] *= 1e-6
    new, mask = Obs()(w, x.T @ x / 512, Unstructured(), 100)
    assert not mask[0].any() and int(mask[1].sum()) == 100
    assert not new[0].any() and new[1].any()


def test_bad_input_is_refused_with_the_value_and_the_cure():
    w, gram = layer(2, 8, examples=5)
    with pytest.raises(DataError, match="singular: its smallest eigenvalue is .* damping 0 .*to 0.01, or use more"):
        Obs(damping=0.0)(w, gram, Unstructured(), 8)
    with pytest.raises(UsageError, match="damping must be a finite number of at least 0, not -1.0"):
        Obs(damping=-1.0)
    with pytest.raises(UsageError, match="of 30,000 rows of 2,000 inputs.* needs 894.1 GB.*exact_obs"):
        Obs()(torch.ones(30000, 2000), torch.eye(2000), Unstructured(), 1)
