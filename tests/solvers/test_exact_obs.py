"""Exact OBS: greedy rows, the counts from their losses."""

import pytest
import torch

from secateur.core.errors import DataError
from secateur.core.patterns import NM, Unstructured
from secateur.core.streams import stream
from secateur.solvers.exact_obs import ExactObs
from secateur.solvers.obs import Obs


def layer(rows, width, name="exact"):
    """Random weights and the Gram matrix of correlated inputs."""
    random = stream(4, name, f"{rows, width}")
    inputs = torch.randn(3 * width, width, generator=random, dtype=torch.float64)
    inputs += torch.randn(len(inputs), 1, generator=random, dtype=torch.float64)
    return torch.randn(rows, width, generator=random, dtype=torch.float64), inputs.T @ inputs / len(inputs)


def error(change, gram):
    return torch.einsum("oi,ij,oj->", change, gram, change).item()


def fitted(w, gram, support):
    """The least-squares fit of one row on its support, from the square root of the Gram matrix."""
    root = torch.linalg.cholesky(gram).T
    best = torch.zeros_like(w)
    best[support] = torch.linalg.lstsq(root[:, support], (root @ w)[:, None]).solution[:, 0]
    return best


def rise(w, gram, gone):
    """What it costs a row to lose the weights ``gone``, all others fitted."""
    support = torch.tensor([j not in gone for j in range(len(w))])
    return error((fitted(w, gram, support) - w)[None], gram) if support.any() else error(w[None], gram)


def greedy(w, gram, closed=lambda gone, q: False, steps=None):
    """The order of losses of one row by trying every weight and fitting all others: no inverse, no formula."""
    gone, rises = [], [0.0]
    for _ in range(len(w) if steps is None else steps):
        costs = {q: rise(w, gram, [*gone, q]) for q in range(len(w)) if q not in gone and not closed(gone, q)}
        gone.append(min(costs, key=lambda q: costs[q]))
        rises.append(costs[gone[-1]])
    return gone, [b - a for a, b in zip(rises, rises[1:], strict=False)]


@pytest.mark.parametrize("keep", [45, 27, 10, 3])
def test_the_masks_are_those_of_trying_every_weight(keep):
    """Rows by brute force; then the row whose next loss is cheapest goes on."""
    w, gram = layer(6, 9)
    traces = [greedy(row, gram) for row in w]
    count = [0] * 6
    for _ in range(54 - keep):
        heads = {r: traces[r][1][count[r]] for r in range(6) if count[r] < 9}
        count[min(heads, key=lambda r: heads[r])] += 1
    expected = torch.ones(6, 9, dtype=torch.bool)
    for r, (order, _) in enumerate(traces):
        expected[r, order[: count[r]]] = False

    new, mask = ExactObs(damping=0.0)(w, gram, Unstructured(), keep)

    assert torch.equal(mask, expected) and len(set(count)) > 1
    losses = sum(sum(rises[:n]) for (_, rises), n in zip(traces, count, strict=True))
    assert error(new - w, gram) == pytest.approx(losses, rel=1e-9)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(1, 3)])
def test_groups_that_lost_their_share_are_skipped(pattern):
    w, gram = layer(3, 12)

    def closed(gone, q):
        return sum(other // pattern.m == q // pattern.m for other in gone) == pattern.m - pattern.n

    expected = torch.ones(3, 12, dtype=torch.bool)
    for r, row in enumerate(w):
        expected[r, greedy(row, gram, closed, 12 // pattern.m * (pattern.m - pattern.n))[0]] = False

    assert torch.equal(ExactObs(damping=0.0)(w, gram, pattern, pattern.fixed((3, 12)))[1], expected)


@pytest.mark.parametrize(("shape", "keep"), [((9, 150), 500), ((5, 129), 60), ((4, 64), 128)])
def test_several_panels_give_the_least_squares_fit_of_every_row(shape, keep):
    """More losses than a panel holds, other sizes than whole panels; damping is part of the fit."""
    w, gram = layer(*shape)
    damped = gram + 0.02 * gram.diagonal().mean() * torch.eye(shape[1], dtype=torch.float64)

    new, mask = ExactObs(damping=0.02)(w, gram, Unstructured(), keep)

    for row, support, found in zip(w, mask, new, strict=True):
        torch.testing.assert_close(found, fitted(row, damped, support), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)])
def test_rows_solved_one_at_a_time_come_out_as_in_one_batch(pattern, monkeypatch):
    """As the rows of a wide layer are; all of them start from one inverse, which must stay as it is."""
    w, gram = layer(5, 200)
    new, mask = ExactObs()(w, gram, pattern, 500)
    monkeypatch.setattr("secateur.solvers.exact_obs.WORK", 1)

    one, same = ExactObs()(w, gram, pattern, 500)

    assert torch.equal(mask, same)
    torch.testing.assert_close(one, new, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(1, 4)])
def test_several_panels_lose_the_same_weights_as_one_loss_at_a_time(pattern):
    """`obs` downdates a full inverse at every loss."""
    w, gram = layer(2, 160)
    keep = pattern.fixed((2, 160)) or 90
    new, mask = ExactObs()(w, gram, pattern, keep)
    one, same = Obs(damping=0.01)(w, gram, pattern, keep)
    assert torch.equal(mask, same)
    torch.testing.assert_close(new, one, rtol=1e-8, atol=1e-9)


def test_a_row_whose_weights_cost_nothing_is_emptied_first():
    w, gram = layer(3, 8)
    w[1] *= 1e-3
    mask = ExactObs()(w, gram, Unstructured(), 16)[1]
    assert mask.sum(1).tolist() == [8, 0, 8]


def test_a_singular_matrix_without_damping_is_refused_with_the_cure():
    w, gram = layer(2, 8)
    gram[0], gram[:, 0] = gram[1], gram[:, 1]
    with pytest.raises(
        DataError, match="singular: its smallest eigenvalue is .*Raise the damping, for example to 0.01"
    ):
        ExactObs(damping=0.0)(w, gram, Unstructured(), 8)
