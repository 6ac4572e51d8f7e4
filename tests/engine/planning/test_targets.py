"""Targets of plans: what is typed, what it means, and what is refused."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.errors import BudgetError, SecateurError, UsageError
from secateur.engine.planning.targets import Aim, is_aim, parse_aim


@pytest.mark.parametrize(
    ("text", "quantity", "value", "relative", "said"),
    [
        ("ms 3.5", "ms", 3.5, False, "ms 3.5"),
        ("MS 3.5ms", "ms", 3.5, False, "ms 3.5"),
        ("ms 1500us", "ms", 1.5, False, "ms 1.5"),
        ("latency 0.5x", "ms", 0.5, True, "latency 0.5x"),
        ("latency 50%", "ms", 0.5, True, "latency 0.5x"),
        ("bytes 200kB", "bytes", 200_000, False, "bytes 200000"),
        ("bytes 1,000", "bytes", 1000, False, "bytes 1000"),
        ("bytes 2MiB", "bytes", 2 * 2**20, False, "bytes 2097152"),
        ("macs 0.5x", "macs", 0.5, True, "macs 0.5x"),
        ("macs 0.5", "macs", 0.5, True, "macs 0.5x"),
        ("macs 20M", "macs", 20e6, False, "macs 20000000"),
        ("params 10%", "params", 0.1, True, "params 10%"),
        ("sparsity 0.9", "params", 0.1, True, "params 10%"),
        ("sparsity 90%", "params", 0.1, True, "params 10%"),
        ("sparsity 0", "params", 1, True, "params 100%"),
        ("latency 3", "ms", 3, False, "ms 3"),
        ("latency 0.5ms", "ms", 0.5, False, "ms 0.5"),
        ("keep 13000", "params", 13000, False, "params 13000"),
        ("loss +0.05", "loss", 0.05, False, "loss +0.05"),
        ("loss 0.05", "loss", 0.05, False, "loss +0.05"),
        ("accuracy -0.5", "accuracy", 0.5, False, "accuracy -0.5"),
    ],
)  # fmt: skip
def test_what_is_typed(text, quantity, value, relative, said):
    aim = parse_aim(text)

    assert (aim.quantity, aim.value, aim.relative, str(aim)) == (quantity, value, relative, said)
    assert parse_aim(said) == aim


@pytest.mark.parametrize(
    ("text", "kind", "word"),
    [
        ("ms -3", BudgetError, "above 0"),
        ("ms 0", BudgetError, "above 0"),
        ("latency 2x", BudgetError, "share"),
        ("sparsity 1", BudgetError, "share"),
        ("sparsity 100%", BudgetError, "share"),
        ("sparsity 0.9x", UsageError, "sparsity 90%"),
        ("keep 10%", UsageError, "params 10%"),
        ("latency 0.5", UsageError, "latency 0.5x`, or `ms 0.5"),
        ("latency 1", UsageError, "two meanings"),
        ("loss -0.1", BudgetError, "above 0"),
        ("accuracy +0.5", UsageError, "accuracy -0.5"),
        ("accuracy -100", BudgetError, "100 points"),
        ("loss 5%", UsageError, "no unit"),
        ("ms 3 kB", UsageError, "no unit 'kb'"),
        ("ms 1,5", UsageError, "not understood"),
        ("ms", UsageError, "not understood"),
        ("2:4", UsageError, "not understood"),
        ("speed 3", UsageError, "'speed'"),
        ("ms 1e999", BudgetError, "finite"),
        ("ms nan", UsageError, "not understood"),
        ("ms 1e999999999", UsageError, "not understood"),
    ],
)  # fmt: skip
def test_what_is_refused(text, kind, word):
    with pytest.raises(kind, match=word.replace("+", r"\+")):
        parse_aim(text)


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=30))
def test_any_text_is_an_aim_or_one_clear_error(text):
    try:
        aim = parse_aim(text)
    except SecateurError as error:
        assert 20 < len(str(error)) < 500
    else:
        assert aim.value > 0 and math.isfinite(aim.value)


def test_shares_are_decimal_numbers():
    """A tenth of ten million is a million, in spite of binary fractions."""
    assert Aim("bytes", 0.1, relative=True).limit(10_000_000) == 1_000_000
    assert is_aim("latency 0.5x") and is_aim(" MS 3") and not is_aim("macs 0.5x") and not is_aim("2:4")
