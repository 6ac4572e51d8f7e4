# Errors of readings are optional and layers come by index, which the type checker cannot follow here.
# pyright: reportOptionalOperand=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
"""Intervals against closed forms, exact probabilities and their promised coverage."""

import math
from itertools import pairwise

import pytest
import torch

from secateur.core.errors import DataError
from secateur.core.streams import stream
from secateur.probes._statistics import Z, bootstrap, median_interval, paired_difference, ratio_of_sums, wilson


def binomial(n, k):
    return math.comb(n, k) / 2**n


@pytest.mark.parametrize(("right", "n"), [(0, 5), (1, 7), (37, 100), (9_791, 10_000), (12, 12)])
def test_wilson_ends_are_where_the_score_test_just_accepts(right, n):
    """The definition: |p̂ - p| = z sqrt(p (1 - p) / n) at both ends."""
    share = right / n
    for end in wilson(right, n):
        if 0 < end < 1:
            assert math.isclose(abs(share - end), Z * math.sqrt(end * (1 - end) / n), rel_tol=1e-9)
        else:
            assert share == end


@pytest.mark.parametrize("n", [6, 7, 10, 11, 30, 101, 1500])
def test_median_interval_is_the_tightest_with_95_per_cent(n):
    low, high = median_interval([float(i) for i in range(1, n + 1)])
    rank = int(low)
    assert high == n + 1 - rank
    missed = 2 * sum(binomial(n, k) for k in range(rank)) if n < 1000 else 0.04
    more = missed + 2 * binomial(n, rank) if n < 1000 else 0.06
    assert missed <= 0.05 < more
    if n == 1500:  # the normal approximation, by far near enough at this size
        assert abs(rank - (n / 2 - Z * math.sqrt(n) / 2)) < 2


def test_median_interval_of_few_values_is_their_range():
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert median_interval([4.0]) == (4.0, 4.0)


def test_bootstrap_of_a_mean_has_its_standard_error_and_interval():
    values = torch.randn(400, generator=stream(0, "test"), dtype=torch.float64)
    mean = float(values.mean())
    spread = bootstrap(ratio_of_sums(values, torch.ones(400)), mean, 400, stream(1, "test"))
    stderr = float(values.std()) / 20
    assert spread is not None
    assert math.isclose(spread.stderr, stderr, rel_tol=0.1)
    assert math.isclose(spread.high - spread.low, 2 * Z * stderr, rel_tol=0.1)


def test_bootstrap_of_equal_values_has_no_width_and_one_group_no_interval():
    same = ratio_of_sums(torch.full((8,), 3.0), torch.full((8,), 4.0))
    assert bootstrap(same, 0.75, 8, stream(0, "test")) == (0.0, 0.75, 0.75)
    assert bootstrap(same, 0.75, 1, stream(0, "test")) is None


def pair(both, only_a, only_b, neither):
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return torch.tensor(a), torch.tensor(b)


def test_paired_difference_is_a_minus_b_in_points_with_mcnemars_standard_error():
    a, b = pair(80, 3, 9, 8)
    reading = paired_difference(a, b)
    assert math.isclose(reading.value, -6.0) and reading.unit == "points" and reading.n == 100
    gains = a.double() - b.double()
    assert math.isclose(reading.stderr, 100 * float(gains.std(correction=0)) / 10)
    assert reading.low < reading.value < reading.high
    assert (reading.parts["only_a"], reading.parts["only_b"]) == (3, 9)


@pytest.mark.parametrize(("one", "two"), [(0, 0), (3, 9), (9, 3), (5, 5), (0, 12), (400, 600)])
def test_the_probability_is_mcnemars_exact_two_sided_one(one, two):
    n = one + two
    expected = min(1.0, 2 * sum(math.comb(n, k) for k in range(min(one, two) + 1)) / 2**n)
    assert math.isclose(paired_difference(*pair(10, one, two, 10)).parts["p"], expected, rel_tol=1e-9)


def test_swapping_the_networks_turns_the_sign():
    a, b = pair(50, 4, 11, 10)
    one, two = paired_difference(a, b), paired_difference(b, a)
    assert (one.value, one.low, one.high) == (-two.value, -two.high, -two.low)
    assert one.stderr == two.stderr


def test_equal_answers_differ_by_zero_within_an_interval_that_shrinks_with_the_data():
    widths = []
    for n in (10, 100, 1000):
        reading = paired_difference(*pair(n, 0, 0, 0))
        assert reading.value == 0 and reading.low < 0 < reading.high
        widths.append(reading.high - reading.low)
    assert all(later < earlier for earlier, later in pairwise(widths))


def test_the_paired_interval_holds_the_truth_about_as_often_as_it_says():
    random, held, trials = stream(0, "coverage"), 0, 400
    for _ in range(trials):
        draw = torch.rand(200, generator=random)
        a, b = draw < 0.85, (draw < 0.77) | (draw > 0.96)  # a beats b by 85 - 81 = 4 points
        reading = paired_difference(a, b)
        held += reading.low <= 4.0 <= reading.high
    assert 0.91 <= held / trials <= 0.99


def test_groups_widen_the_interval_when_their_answers_go_together():
    a, b = pair(60, 20, 10, 10)
    alone = paired_difference(a, b, torch.arange(100))
    grouped = paired_difference(a.repeat_interleave(5), b.repeat_interleave(5), torch.arange(100).repeat_interleave(5))
    naive = paired_difference(a.repeat_interleave(5), b.repeat_interleave(5))
    assert grouped.value == alone.value == naive.value
    assert grouped.stderr == alone.stderr and grouped.n == 100
    assert math.isclose(grouped.stderr, math.sqrt(5) * naive.stderr, rel_tol=0.1)


def test_groups_give_the_same_interval_every_time_and_none_for_a_single_group():
    a, b = pair(6, 3, 2, 1)
    groups = torch.arange(12) // 3
    assert paired_difference(a, b, groups) == paired_difference(a, b, groups)
    assert paired_difference(a, b, torch.zeros(12, dtype=torch.long)).stderr is None


def test_answers_that_do_not_pair_are_refused():
    with pytest.raises(DataError, match="as many answers.*3 and 4.*same data"):
        paired_difference(torch.ones(3), torch.ones(4))
    with pytest.raises(DataError, match="at least one"):
        paired_difference(torch.ones(0), torch.ones(0))
