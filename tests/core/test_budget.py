"""Targets as users type them, counts as integers, and schedules."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.budget import Target, compression, keep_for, parse_target
from secateur.core.errors import BudgetError, SecateurError, UsageError
from secateur.core.schedules import SCHEDULES, Cubic, Levels, OneShot


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 9999), st.integers(1, 10**11))
def test_keep_is_exact_for_decimal_sparsities_of_networks_of_any_size(tenthousandths, prunable):
    sparsity = tenthousandths / 10_000
    expected = prunable - math.floor(Fraction(tenthousandths, 10_000) * prunable)

    assert keep_for(sparsity, prunable) == max(1, expected)


@pytest.mark.parametrize(
    ("sparsity", "prunable", "keep"),
    [
        (0.0, 7, 7),
        (0.9, 1000, 100),
        (0.95, 266_200, 13_310),
        (0.5, 3, 2),
        (0.58, 12_400_000, 5_208_000),
        (0.999, 10, 1),
    ],
)
def test_keep_of_known_networks(sparsity, prunable, keep):
    assert keep_for(sparsity, prunable) == keep


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, math.nan, math.inf])
def test_keep_refuses_what_is_no_sparsity(sparsity):
    with pytest.raises(BudgetError, match=r"sparsity must be in \[0, 1\).*0.9 means 90 % zeros"):
        keep_for(sparsity, 100)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("0.9", Target("sparsity", 0.9)),
        ("sparsity 0.9", Target("sparsity", 0.9)),
        ("  Sparsity   90 % ", Target("sparsity", 0.9)),
        ("90%", Target("sparsity", 0.9)),
        ("sparsity 0", Target("sparsity", 0.0)),
        ("params 5%", Target("params", 0.05)),
        ("params 0.05", Target("params", 0.05)),
        ("params 100%", Target("params", 1.0)),
        ("macs 0.5x", Target("macs", 0.5)),
        ("macs 50%", Target("macs", 0.5)),
        ("keep 13000", Target("keep", 13000.0)),
        ("keep 13,000", Target("keep", 13000.0)),
        ("keep 1e6", Target("keep", 1e6)),
        ("2:4", Target("nm", 2.0, 4)),
        ("1:16", Target("nm", 1.0, 16)),
    ],
)
def test_good_phrases_are_understood(text, target):
    assert parse_target(text) == target


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("sparsity 1.5", BudgetError, r"sparsity must be in \[0, 1\), it is 1.5"),
        ("1", BudgetError, "sparsity must be in"),
        ("-0.1", BudgetError, "it is -0.1; 0.9 means 90 % zeros"),
        ("params 0%", BudgetError, r"share of params to keep must be in \(0, 1\]"),
        ("params 101%", BudgetError, "write `params 10%`"),
        ("macs 2x", BudgetError, "write `macs 10%`"),
        ("keep 0", BudgetError, "whole number of at least 1"),
        ("keep 2.5", BudgetError, "whole number"),
        ("keep -3", BudgetError, "whole number"),
        ("keep 1e999", BudgetError, "whole number"),
        ("0:4", BudgetError, "1 <= N < M; write `2:4`"),
        ("4:2", BudgetError, "1 <= N < M"),
        ("4:4", BudgetError, "1 <= N < M"),
        ("ms 12", UsageError, "plan layer by layer"),
        ("latency 0.5x", UsageError, "secateur plan RUN"),
        ("bytes 5", UsageError, "--plan plan.json"),
        ("nonsense", UsageError, "write `sparsity 0.9`, `params 5%`"),
        ("weights 5%", UsageError, "'weights'"),
        ("", UsageError, "not understood"),
        ("2:4:8", UsageError, "not understood"),
        ("0.9 sparsity", UsageError, "not understood"),
        ("params 1,5%", UsageError, "'1,5'.*is not a number"),
        ("0,9", UsageError, "is not a number"),
        ("1.2.3", UsageError, "is not a number"),
        ("keep 50%", UsageError, "keep takes no unit '%'"),
        ("keep 2x", UsageError, "keep takes no unit 'x'"),
        ("sparsity 0.5x", UsageError, "sparsity takes no unit 'x'"),
    ],
)
def test_bad_phrases_name_what_is_wrong_and_what_to_write(text, error, says):
    with pytest.raises(error, match=says):
        parse_target(text)


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="0123456789.,:%xe-+_ spramkcity", max_size=16))
def test_any_phrase_is_a_target_or_a_clear_error(text):
    try:
        target = parse_target(text)
    except SecateurError as error:
        assert text in str(error) or repr(text) in str(error)
    else:
        assert parse_target(str(target)).kind == target.kind


@pytest.mark.parametrize(
    "text", ["sparsity 0.9999999", "params 5%", "params 0.125%", "macs 0.5x", "keep 13310123", "2:4"]
)
def test_a_target_is_written_as_it_is_typed(text):
    assert str(parse_target(text)) == text


def test_compression_counts_all_parameters():
    assert compression(100, 90) == 10
    assert compression(100, 0) == 1
    assert compression(100, 100) == math.inf


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_monotone_and_end_exactly_at_the_target(name):
    schedule = SCHEDULES[name]()
    values = [schedule(i / 1000) for i in range(1001)]

    assert values == sorted(values)
    assert values[-1] == schedule(1.5) == 1.0
    assert values[0] == schedule(-0.5) == (1.0 if name == "one-shot" else 0.0)
    assert OneShot()(0.3) == 1.0


def test_the_cubic_schedule_at_the_quarters():
    """Zhu & Gupta 2017: s = s_f - s_f (1 - p)^3."""
    assert [round(0.9 * Cubic()(p / 4), 4) for p in range(5)] == [0.0, 0.5203, 0.7875, 0.8859, 0.9]


@pytest.mark.parametrize(("count", "final"), [(1, 0.5), (3, 0.875), (5, 0.9), (20, 0.99)])
def test_each_level_removes_the_same_share_of_what_is_left(count, final):
    schedule = Levels(count, final)
    left = [1 - final * schedule(level / count) for level in range(count + 1)]

    ratios = [after / before for before, after in zip(left, left[1:], strict=False)]
    assert ratios == pytest.approx([(1 - final) ** (1 / count)] * count)
    assert schedule(1 / count - 1e-6) == 0.0, "nothing happens between two levels"


@pytest.mark.parametrize(("count", "final"), [(0, 0.5), (-1, 0.5), (3, 0.0), (3, 1.0), (3, math.nan)])
def test_impossible_levels_are_refused(count, final):
    with pytest.raises(UsageError, match="count >= 1 and 0 < final < 1"):
        Levels(count, final)
