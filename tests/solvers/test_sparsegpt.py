"""SparseGPT: from the first column to the last."""

import pytest
import torch

from secateur.core.errors import DataError, UsageError
from secateur.core.patterns import NM, Unstructured
from secateur.core.streams import stream
from secateur.solvers.sparsegpt import SparseGpt


def layer(rows, width, strength=0.5):
    """Random weights and the Gram matrix of correlated inputs."""
    random = stream(5, "sparsegpt", f"{rows, width}")
    inputs = torch.randn(4 * width, width, generator=random, dtype=torch.float64)
    inputs += strength * torch.randn(len(inputs), 1, generator=random, dtype=torch.float64)
    return torch.randn(rows, width, generator=random, dtype=torch.float64), inputs.T @ inputs / len(inputs)


def error(change, gram):
    """Of each row."""
    return torch.einsum("oi,ij,oj->o", change, gram, change)


def swept(w, gram, mask):
    """A given mask, column by column, with the inverse of what is left taken anew: weights and the sum of rises."""
    w, rises = w.clone(), torch.zeros(len(w), dtype=torch.float64)
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(gram[j:, j:])
        lost = w[:, j] * ~mask[:, j]
        rises += lost.square() / inverse[0, 0]
        w[:, j:] -= (lost / inverse[0, 0])[:, None] * inverse[0]
    return w * mask, rises


def test_the_compensation_is_that_of_inverting_what_is_left():
    """The rises of a row add up to its error; a row that would be better off with zeros alone gets these."""
    w, gram = layer(12, 24)

    new, mask = SparseGpt(damping=0.0)(w, gram, Unstructured(), 144)

    expected, rises = swept(w, gram, mask)
    torch.testing.assert_close(error(expected - w, gram), rises, rtol=1e-10, atol=0)
    zeroed = error(w * ~mask, gram)
    better = rises < zeroed
    assert better.sum() >= 6
    torch.testing.assert_close(new, torch.where(better[:, None], expected, w * mask), rtol=1e-9, atol=1e-12)


def test_a_row_worse_than_zeroing_is_zeroed():
    """The sweep never looks back: a kept weight moves for the first loss, and the last one cannot put it right."""
    w, gram = layer(40, 8, strength=3.0)
    new, mask = SparseGpt(damping=0.0)(w, gram, Unstructured(), 120)
    _, rises = swept(w, gram, mask)
    worse = rises > error(w * ~mask, gram)
    assert worse.any() and not worse.all()
    assert torch.equal(new[worse], (w * mask)[worse])


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 4)])
def test_groups_are_chosen_when_they_are_reached_whatever_the_block(pattern):
    """The lazy updates change nothing but the order of sums; a block that cuts a group is made whole."""
    w, gram = layer(6, 32)
    keep = pattern.fixed((6, 32))
    first, mask = SparseGpt(block=32)(w, gram, pattern, keep)
    for block in (1, 4, 7, 12, 1000):
        new, same = SparseGpt(block=block)(w, gram, pattern, keep)
        assert torch.equal(mask, same)
        torch.testing.assert_close(new, first, rtol=1e-9, atol=1e-12)
    assert not torch.equal(mask, pattern.mask(w.abs(), keep))


def test_the_choice_of_a_group_uses_the_weights_as_they_have_become():
    """By the book: at every fourth column, w²/[inverse of what is left]² as the factor has it."""
    w, gram = layer(5, 16)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    mask = torch.ones(5, 16, dtype=torch.bool)
    for start in range(0, 16, 4):
        now = w.clone()
        for j in range(start):
            inverse = torch.linalg.inv(damped[j:, j:])
            now[:, j:] -= (now[:, j] * ~mask[:, j] / inverse[0, 0])[:, None] * inverse[0]
        pivots = torch.stack([torch.linalg.inv(damped[j:, j:])[0, 0] for j in range(start, start + 4)])
        mask[:, start : start + 4] = NM(2, 4).mask(now[:, start : start + 4].square() / pivots, 10)

    assert torch.equal(SparseGpt()(w, gram, NM(2, 4), 40)[1], mask)


@pytest.mark.parametrize(("block", "gone"), [(8, [28, 28, 28]), (24, [84]), (16, [56, 28]), (10, [35, 35, 14])])
def test_every_block_loses_the_same_share(block, gone):
    w, gram = layer(7, 24)
    mask = SparseGpt(block=block)(w, gram, Unstructured(), 84)[1]
    assert [int((~part).sum()) for part in mask.split(block, 1)] == gone


def test_bad_input_is_refused_with_the_cure():
    w, gram = layer(2, 8)
    gram[3], gram[:, 3] = gram[1], gram[:, 1]
    with pytest.raises(DataError, match="singular: its smallest eigenvalue .*damping 0 .*Raise the damping"):
        SparseGpt(damping=0.0)(w, gram, Unstructured(), 8)
    with pytest.raises(UsageError, match="block must be at least 1, not 0; 128 is usual"):
        SparseGpt(block=0)
