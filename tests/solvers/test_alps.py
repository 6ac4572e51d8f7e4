"""ALPS: a search for the set, then a fit on it."""

import pytest
import torch

from secateur.core.errors import DataError, UsageError
from secateur.core.patterns import NM, Unstructured
from secateur.core.streams import stream
from secateur.solvers._layer import Layer, largest, refit
from secateur.solvers.alps import Alps
from secateur.solvers.exact_obs import ExactObs
from secateur.solvers.sparsegpt import SparseGpt


def layer(rows, width, number=0):
    """Random weights and the Gram matrix of correlated inputs of different sizes."""
    random = stream(number, "alps", f"{rows, width}")
    inputs = torch.randn(3 * width, width, generator=random, dtype=torch.float64)
    inputs += torch.randn(len(inputs), 1, generator=random, dtype=torch.float64)
    inputs *= torch.rand(width, generator=random, dtype=torch.float64) + 0.5
    return torch.randn(rows, width, generator=random, dtype=torch.float64), inputs.T @ inputs / len(inputs)


def damped(gram, damping=0.01):
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def error(change, gram):
    return torch.einsum("oi,ij,oj->", change, gram, change).item()


@pytest.mark.parametrize(("pattern", "keep"), [(Unstructured(), 200), (Unstructured(), 60), (NM(2, 4), 160)])
def test_the_weights_are_the_direct_least_squares_solution_on_their_set(pattern, keep):
    """Conjugate gradients against one dense solve for each row."""
    w, gram = layer(8, 40)

    new, mask = Alps()(w, gram, pattern, keep)

    for row, kept, found in zip(w, mask, new, strict=True):
        system = damped(gram)[kept][:, kept]
        direct = torch.linalg.solve(system, damped(gram)[kept] @ row)
        torch.testing.assert_close(found[kept], direct, rtol=1e-8, atol=1e-9)


def test_a_set_that_is_never_in_doubt_is_reached_and_fitted_by_the_search_alone():
    """No fit at the end: with the right sign of V the limit of the rounds is the least-squares fit, where V is zero."""
    w, gram = layer(6, 10)
    w[:, 5:] *= 1e-3
    dense = torch.where(torch.arange(10) < 5, w, 0.0) + 1e-9 * w  # the small half costs next to nothing
    scale = damped(gram).diagonal().sqrt()
    matrix = damped(gram) / scale / scale[:, None]
    start = Layer(dense, gram, Unstructured(), 30, torch.zeros(10, dtype=torch.bool), 0.01)

    d, mask = Alps(rho=1.0, rounds=300)._search(start, largest((dense * scale).abs(), start))

    assert torch.equal(mask, (torch.arange(10) < 5).expand(6, 10))
    best = refit(dense * scale, matrix, mask)
    torch.testing.assert_close(d, best, rtol=0, atol=1e-8)


def test_the_search_beats_the_sweep_and_keeps_up_with_the_greedy_order():
    """Summed over layers; on single layers either may be ahead."""
    found = {Alps: 0.0, ExactObs: 0.0, SparseGpt: 0.0}
    for number in range(6):
        w, gram = layer(16, 48, number)
        for solver in found:
            new, _ = solver()(w, gram, Unstructured(), w.numel() // 4)
            found[solver] += error(new - w, gram)
    assert found[Alps] < found[ExactObs] < 0.7 * found[SparseGpt]


def test_the_set_of_the_start_is_kept_when_the_search_ends_worse():
    """A search of one round with next to no force ends anywhere; the result is at least the fitted start."""
    w, gram = layer(8, 20)
    scale = damped(gram).diagonal().sqrt()
    start = Unstructured().mask((w * scale).abs(), 60)
    fitted = refit(w, damped(gram), start)
    for rounds in (1, 2, 300):
        new, _ = Alps(rho=1e-7, rounds=rounds)(w, gram, Unstructured(), 60)
        assert error(new - w, damped(gram)) <= error(fitted - w, damped(gram)) * (1 + 1e-12)


def test_exactly_the_largest_with_ties_by_index():
    score = torch.tensor([[1.0, 2.0, 2.0], [2.0, 0.0, 3.0]], dtype=torch.float64)
    for keep in range(1, 6):
        ready = Layer(score, score, Unstructured(), keep, score > 9, 0.0)
        assert torch.equal(largest(score, ready), Unstructured().mask(score, keep))


def test_a_singular_matrix_needs_no_damping_and_an_indefinite_one_is_refused():
    w, gram = layer(4, 8)
    gram[0], gram[:, 0] = gram[1], gram[:, 1]
    new, mask = Alps(damping=0.0)(w, gram, Unstructured(), 12)
    assert int(mask.sum()) == 12 and error(new - w, gram) < error(w * ~mask, gram)
    with pytest.raises(DataError, match="smallest eigenvalue is -1 with damping 0.01. Raise the damping to at least"):
        Alps()(w[:, :2], torch.tensor([[1.0, 2.02], [2.02, 1.0]], dtype=torch.float64), Unstructured(), 4)


@pytest.mark.parametrize("options", [{"rho": 0.0}, {"rho": 1e7}, {"rounds": 0}, {"fit": -1}, {"damping": -0.1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UsageError, match="rho must lie|damping must be"):
        Alps(**options)
