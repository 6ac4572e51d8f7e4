"""CHITA: thresholded gradient steps that never raise the error, then the exact fit."""

import itertools

import pytest
import torch

from secateur.core.errors import DataError, UsageError
from secateur.core.patterns import NM, Unstructured
from secateur.core.streams import stream
from secateur.solvers._layer import refit
from secateur.solvers.chita import Chita
from secateur.solvers.sparsegpt import SparseGpt


def layer(rows, width, number=0):
    """Random weights and the Gram matrix of correlated inputs of different sizes."""
    random = stream(number, "chita", f"{rows, width}")
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
    w, gram = layer(8, 40)

    new, mask = Chita()(w, gram, pattern, keep)

    for row, kept, found in zip(w, mask, new, strict=True):
        direct = torch.linalg.solve(damped(gram)[kept][:, kept], damped(gram)[kept] @ row)
        torch.testing.assert_close(found[kept], direct, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("pattern", "keep"), [(Unstructured(), 120), (NM(1, 4), 80)])
def test_more_rounds_never_raise_the_error(pattern, keep):
    """With fits to convergence every state of the search is the exact fit on its set."""
    w, gram = layer(8, 40, 1)
    start = pattern.mask((w * damped(gram).diagonal().sqrt()).abs(), keep)
    found = []
    for rounds in range(8):
        new, mask = Chita(rounds=rounds, fit=80)(w, gram, pattern, keep)
        assert rounds or torch.equal(mask, start)
        found.append(error(new - w, damped(gram)))
    assert found[0] == pytest.approx(error(refit(w, damped(gram), start) - w, damped(gram)), rel=1e-10)
    assert all(after <= before * (1 + 1e-10) for before, after in itertools.pairwise(found))
    assert found[-1] < 0.95 * found[0]


def test_the_search_ends_by_itself():
    w, gram = layer(6, 24, 2)
    ends = [Chita(rounds=rounds)(w, gram, Unstructured(), 40) for rounds in (1, 50, 1000)]
    assert not torch.equal(ends[0][1], ends[1][1])
    assert torch.equal(ends[1][0], ends[2][0])


def test_one_row_takes_any_hessian_and_often_finds_the_best_set():
    """Against every set of four of ten weights; greedy starts are off where the search is not."""
    reached = begun = 0
    for number in range(12):
        w, gram = layer(1, 10, number)
        matrix = damped(gram)
        every = [torch.zeros(1, 10, dtype=torch.bool).index_fill(1, torch.tensor(s), True)
                 for s in itertools.combinations(range(10), 4)]  # fmt: skip
        best = min(error(refit(w, matrix, mask) - w, matrix) for mask in every)
        for rounds in (0, 50):
            new, _ = Chita(rounds=rounds)(w, gram, Unstructured(), 4)
            hit = error(new - w, matrix) <= best * (1 + 1e-9)
            assert error(new - w, matrix) >= best * (1 - 1e-9)
            reached, begun = reached + (hit and rounds > 0), begun + (hit and rounds == 0)
    assert reached > begun


def test_the_search_beats_the_sweep():
    found = {Chita: 0.0, SparseGpt: 0.0}
    for number in range(4):
        w, gram = layer(16, 48, number)
        for solver in found:
            new, _ = solver()(w, gram, Unstructured(), w.numel() // 4)
            found[solver] += error(new - w, gram)
    assert found[Chita] < 0.8 * found[SparseGpt]


def test_a_singular_matrix_is_refused_by_name():
    w, gram = layer(4, 8)
    gram[0], gram[:, 0] = gram[1], gram[:, 1]
    with pytest.raises(DataError, match="singular.*Raise the damping"):
        Chita(damping=0.0)(w, gram, Unstructured(), 12)


@pytest.mark.parametrize("options", [{"rounds": -1}, {"fit": 0}, {"damping": -0.1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UsageError, match="rounds must be|damping must be"):
        Chita(**options)
