"""The order of columns for N:M: counts of groupings, brute force, and packing."""

import itertools
import math

import pytest
import torch

from secateur.core.errors import UsageError
from secateur.core.patterns import NM
from secateur.core.streams import stream
from secateur.linalg.permutation import count_groupings, efficacy, groupings, kept_sum, pack, search, unpack


def scores(rows, columns, seed=0):
    return torch.rand(rows, columns, generator=stream(seed, "scores"), dtype=torch.float64)


def best_by_hand(score, m, n):
    """The most that any grouping keeps: the sum of the n largest of each group, entry by entry, over all of them."""
    rows, columns = score.tolist(), range(score.shape[1])
    of = {g: sum(sum(sorted(row[c] for c in g)[-n:]) for row in rows) for g in itertools.combinations(columns, m)}
    return max(sum(of[group] for group in way) for way in groupings(len(columns), m))


@pytest.mark.parametrize(("columns", "count"), [(4, 1), (8, 35), (12, 5775), (16, 2_627_625)])
def test_number_of_groupings(columns, count):
    """Card test (c)."""
    assert count_groupings(columns, 4) == count


@pytest.mark.parametrize(("columns", "m"), [(4, 4), (8, 4), (12, 4), (6, 2), (9, 3), (6, 1)])
def test_groupings_are_all_and_each_once(columns, m):
    found = list(groupings(columns, m))

    assert len(found) == len({frozenset(map(frozenset, way)) for way in found}) == count_groupings(columns, m)
    assert all(sorted(itertools.chain(*way)) == list(range(columns)) for way in found)


def test_columns_that_do_not_divide_are_refused():
    with pytest.raises(UsageError, match="10 columns do not divide into groups of 4"):
        groupings(10, 4)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 4), NM(1, 2), NM(2, 3), NM(4, 8)])
def test_what_is_kept_is_the_sum_over_the_mask(pattern):
    """In any order; convolutions have their groups along the input channels."""
    score = torch.rand(5, pattern.m * 3, 2, generator=stream(1, "conv"), dtype=torch.float64)
    order = torch.randperm(pattern.m * 3, generator=stream(2, "order"))

    for given, moved in ((None, score), (order, score[:, order])):
        mask = pattern.mask(moved, pattern.fixed(tuple(score.shape)))
        assert kept_sum(score, pattern, given) == pytest.approx(float(moved[mask].sum()), rel=1e-13)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 4)])
@pytest.mark.parametrize("seed", range(5))
def test_two_groups_are_parted_in_the_best_way(pattern, seed):
    """Brute force over all 35; the first step alone finds it."""
    score = scores(7, 8, seed)

    found = kept_sum(score, pattern, search(score, pattern))

    assert found == pytest.approx(best_by_hand(score, 4, pattern.n), rel=1e-13)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(1, 2), NM(2, 3)])
def test_small_matrices_against_brute_force(pattern):
    """Three to six groups: never above the best of all groupings, and at it with escapes in nearly all."""
    columns = {4: 12, 3: 9, 2: 8}[pattern.m]
    hits = 0
    for seed in range(6):
        score = scores(6, columns, seed)
        best = best_by_hand(score, pattern.m, pattern.n)
        order = search(score, pattern, stream(seed, "escapes"), 40)
        found = kept_sum(score, pattern, order)
        assert torch.equal(order.sort().values, torch.arange(columns))
        assert kept_sum(score, pattern) <= found <= best * (1 + 1e-12)
        assert found >= kept_sum(score, pattern, search(score, pattern))
        hits += math.isclose(found, best, rel_tol=1e-12)
    assert hits >= 5


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 4), NM(4, 8), NM(1, 2)])
def test_no_exchange_of_two_columns_gains(pattern):
    """The result is at least that local optimum."""
    score = scores(9, 16)
    order = search(score, pattern)
    reached = kept_sum(score, pattern, order)

    for i, j in itertools.combinations(range(16), 2):
        other = order.clone()
        other[i], other[j] = order[j], order[i]
        assert kept_sum(score, pattern, other) <= reached * (1 + 1e-12)


def test_efficacy_counts_from_no_change_to_a_free_choice():
    score = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0]])

    assert efficacy(score, NM(2, 4), torch.arange(8)) == 0.0
    assert efficacy(score, NM(2, 4), torch.tensor([0, 4, 5, 1, 2, 6, 7, 3])) == 1.0
    assert efficacy(score, NM(2, 4), torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])) == 1.0
    assert efficacy(score, NM(2, 4), torch.tensor([0, 1, 2, 4, 3, 5, 6, 7])) == pytest.approx(1 / 3)
    assert efficacy(torch.ones(2, 8), NM(2, 4), torch.arange(8)) == 1.0


def test_search_keeps_single_groups_and_sparse_matrices():
    assert search(scores(3, 4), NM(2, 4)).tolist() == [0, 1, 2, 3]
    score = torch.zeros(3, 8)
    score[:, :3] = 1.0
    assert kept_sum(score, NM(2, 4), search(score, NM(2, 4))) == 9.0
    with pytest.raises(UsageError, match="not a multiple of 4"):
        search(scores(3, 6), NM(2, 4))


def test_search_is_a_function_of_its_stream():
    score = scores(20, 32)
    one, other = (search(score, NM(2, 4), stream(3, "x"), 10) for _ in range(2))

    assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [torch.float16, torch.float32, torch.int8])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8), NM(1, 2), NM(2, 3)])
def test_pack_and_unpack(pattern, kind):
    """Card test (e): a round trip, and the bytes that the card counts."""
    score = scores(8, pattern.m * 8) + 0.1
    mask = pattern.mask(score, pattern.fixed(tuple(score.shape)))
    dense = ((score - 0.5) * 100).to(kind) * mask

    values, places = pack(dense, mask, pattern)

    assert torch.equal(unpack(values, places, pattern), dense) and values.dtype == kind
    if pattern == NM(2, 4):
        share = {torch.float16: 9 / 16, torch.int8: 10 / 16, torch.float32: 17 / 32}[kind]
        assert values.nbytes + places.nbytes == share * dense.nbytes


def test_packing_refuses_what_is_not_in_the_pattern():
    mask = NM(2, 4).mask(scores(2, 8), 8)
    mask[0, 0] = ~mask[0, 0]
    with pytest.raises(UsageError, match="exactly 2 kept of every 4"):
        pack(scores(2, 8), mask, NM(2, 4))
