# Errors of readings are optional and layers come by index, which the type checker cannot follow here.
# pyright: reportOptionalOperand=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
"""Calibration against closed forms and a plain-Python definition."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from secateur.core.errors import DataError, UsageError
from secateur.core.reading import Reading
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.probes.calibration import Calibration, fit_temperature, reliability, temperature


def given(logits, labels, batches=1):
    data = list(zip(logits.chunk(batches), labels.chunk(batches), strict=True))
    return Task(nn.Identity(), functional.cross_entropy, data)


def drawn(n=300, classes=5, scale=2.0, seed=0):
    """Logits ``scale * z`` with labels drawn from softmax(z)."""
    z = torch.randn(n, classes, generator=stream(seed, "logits"), dtype=torch.float64)
    return scale * z, torch.multinomial(z.softmax(1), 1, generator=stream(seed, "labels"))[:, 0]


def of_probabilities(p):
    return torch.tensor(p, dtype=torch.float64).log()


def by_definition(c, a, bins):
    """Expected and largest gap over bins (k/M, (k+1)/M], in plain Python."""
    total, worst = 0.0, 0.0
    for k in range(bins):
        inside = [i for i, x in enumerate(c) if k / bins < x <= (k + 1) / bins or (k == 0 and x == 0)]
        if inside:
            gap = abs(sum(a[i] for i in inside) - sum(c[i] for i in inside)) / len(inside)
            total, worst = total + gap * len(inside) / len(c), max(worst, gap)
    return total, worst


@pytest.mark.parametrize("bins", [1, 2, 15, 40])
def test_all_errors_agree_with_their_definitions(bins):
    logits, labels = drawn()
    p = logits.softmax(1)
    c, a = p.max(1).values.tolist(), (p.argmax(1) == labels).double().tolist()
    reading = Calibration(bins)(given(logits, labels, 4))
    ece, mce = by_definition(c, a, bins)
    assert math.isclose(reading.value, ece, abs_tol=1e-12)
    assert math.isclose(reading.parts["mce"], mce, abs_tol=1e-12)
    every = [by_definition(p[:, k].tolist(), (labels == k).double().tolist(), bins)[0] for k in range(5)]
    assert math.isclose(reading.parts["classwise_ece"], sum(every) / 5, abs_tol=1e-11)
    hit = functional.one_hot(labels, 5)
    assert math.isclose(reading.parts["brier"], float((p - hit).square().sum(1).mean()), abs_tol=1e-12)
    assert math.isclose(reading.parts["nll"], float(functional.cross_entropy(logits, labels)), abs_tol=1e-12)


@pytest.mark.parametrize("bins", [1, 7, 15, 400])
def test_adaptive_error_is_that_of_equal_runs_of_the_sorted_confidences(bins):
    logits, labels = drawn()
    p = logits.softmax(1)
    ranked = sorted(zip(p.max(1).values.tolist(), (p.argmax(1) == labels).tolist(), strict=True))
    n, total = len(ranked), 0.0
    starts = [i * (n // bins) + min(i, n % bins) for i in range(bins + 1)]
    for low, high in zip(starts[:-1], starts[1:], strict=True):
        total += abs(sum(a - c for c, a in ranked[low:high])) / n
    reading = Calibration(bins)(given(logits, labels))
    assert math.isclose(reading.parts["adaptive_ece"], total, abs_tol=1e-12)


def test_adaptive_error_does_not_depend_on_the_order_of_equal_confidences():
    logits = of_probabilities([[0.7, 0.3]] * 6)
    found = {
        Calibration(4)(given(logits, torch.tensor(y))).parts["adaptive_ece"] for y in ([0, 0, 0, 1, 1, 1], [1, 0] * 3)
    }
    assert max(found) - min(found) < 1e-12


def test_one_bin_makes_adaptive_and_ordinary_error_the_same():
    reading = Calibration(1)(given(*drawn()))
    assert math.isclose(reading.parts["adaptive_ece"], reading.value, abs_tol=1e-12)


def test_equal_confidences_leave_the_gap_between_accuracy_and_confidence():
    logits, labels = of_probabilities([[0.7, 0.2, 0.1]] * 10), torch.tensor([0] * 4 + [1] * 6)
    reading = Calibration()(given(logits, labels))
    assert math.isclose(reading.value, 0.3, abs_tol=1e-12)
    assert math.isclose(reading.parts["mce"], 0.3, abs_tol=1e-12)


def test_perfect_certain_answers_have_no_error_of_any_kind():
    logits = 1e4 * torch.eye(4, dtype=torch.float64)
    reading = Calibration()(given(logits, torch.arange(4)))
    parts = reading.parts
    assert [reading.value, parts["mce"], parts["adaptive_ece"], parts["classwise_ece"]] == [0.0] * 4
    assert [parts["nll"], parts["brier"]] == [0.0, 0.0]
    assert parts["bin:14:count"] == 4  # confidence 1 falls into the last bin


def test_uniform_answers_have_log_k_and_one_minus_one_over_k():
    parts = Calibration()(given(torch.zeros(8, 5), torch.arange(8) % 5)).parts
    assert math.isclose(parts["nll"], math.log(5))
    assert math.isclose(parts["brier"], 1 - 1 / 5)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    logits = torch.zeros(2, 2)  # confidence exactly 0.5
    table = reliability(logits, torch.tensor([0, 1]), 4)
    assert [row.count for row in table] == [0, 2, 0, 0]
    assert (table[1].low, table[1].high, table[1].confidence, table[1].accuracy) == (0.25, 0.5, 0.5, 0.5)
    assert math.isnan(table[0].accuracy)


@pytest.mark.parametrize("bins", [3, 15])
def test_duplicated_data_change_nothing(bins):
    logits, labels = drawn(300)
    once, twice = (
        Calibration(bins)(given(logits, labels)),
        Calibration(bins)(given(torch.cat([logits, logits]), torch.cat([labels, labels]))),
    )
    assert math.isclose(once.value, twice.value, abs_tol=1e-12)
    for part in ("mce", "adaptive_ece", "classwise_ece", "nll", "brier"):
        assert math.isclose(once.parts[part], twice.parts[part], abs_tol=1e-12)


def test_the_table_in_the_parts_is_the_reliability_table():
    logits, labels = drawn()
    parts = Calibration(6)(given(logits, labels)).parts
    for i, row in enumerate(reliability(logits, labels, 6)):
        if row.count:
            assert parts[f"bin:{i}:count"] == row.count
            assert math.isclose(parts[f"bin:{i}:accuracy"], row.accuracy)
            assert math.isclose(parts[f"bin:{i}:confidence"], row.confidence)
        else:
            assert f"bin:{i}:count" not in parts


def test_batches_of_any_size_give_the_same():
    logits, labels = drawn(60)
    one, two = Calibration()(given(logits, labels)), Calibration()(given(logits, labels, 7))
    assert one == two


def test_the_interval_is_seeded_and_holds_the_value():
    logits, labels = drawn(100)
    one, two = Calibration()(given(logits, labels)), Calibration()(given(logits, labels))
    assert one == two and one.low <= one.value <= one.high and one.stderr > 0
    assert Reading.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_tokens_count_one_by_one_with_sequences_as_groups():
    logits, labels = drawn(60)
    flat = Calibration()(given(logits, labels))
    labels = torch.cat([labels.view(12, 5), torch.full((12, 1), -100)], dim=1)
    padded = torch.cat([logits.view(12, 5, 5), torch.zeros(12, 1, 5)], dim=1)
    tokens = Calibration()(given(padded, labels))
    assert tokens.value == flat.value and tokens.n == 12 and "60 tokens" in tokens.note


def test_half_precision_is_widened_before_the_softmax():
    logits, labels = drawn()
    rough = logits.bfloat16()
    assert Calibration()(given(rough, labels)) == Calibration()(given(rough.double(), labels))


@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0])
def test_the_fitted_temperature_is_the_true_one_within_three_standard_errors(scale):
    reading = temperature(*drawn(100_000, scale=scale))
    assert abs(reading.value - scale) < 3 * reading.stderr < 0.05 * scale
    assert reading.note == ""


def test_the_fitted_temperature_is_stationary_and_the_lowest():
    logits, labels = drawn(500, scale=2.5)
    t = fit_temperature(logits, labels)
    p = (logits / t).softmax(1)
    gap = (p * logits).sum(1) - logits.gather(1, labels[:, None])[:, 0]
    assert abs(float(gap.mean())) < 1e-6
    loss = [float(functional.cross_entropy(logits / x, labels)) for x in (0.99 * t, t, 1.01 * t)]
    assert loss[1] < min(loss[0], loss[2])


def test_a_temperature_changes_no_answer():
    logits, labels = drawn()
    t = fit_temperature(logits, labels)
    assert torch.equal((logits / t).argmax(1), logits.argmax(1))


@pytest.mark.parametrize("factor", [1e-2, 50.0])
def test_scaling_the_logits_scales_the_temperature(factor):
    logits, labels = drawn()
    assert math.isclose(
        fit_temperature(factor * logits, labels), factor * fit_temperature(logits, labels), rel_tol=1e-9
    )


def test_labels_told_apart_perfectly_give_the_lower_bound_and_say_so():
    logits = torch.eye(4) + 0.1
    assert temperature(logits, torch.arange(4)).value == 1e-3
    with pytest.warns(UserWarning, match="perfectly"):
        assert fit_temperature(logits, torch.arange(4)) == 1e-3


def test_labels_worse_than_chance_give_the_upper_bound_and_say_so():
    with pytest.warns(UserWarning, match="no better than chance"):
        assert fit_temperature(torch.eye(4), (torch.arange(4) + 1) % 4) == 1e3


def test_constant_logits_keep_temperature_one_and_say_so():
    reading = temperature(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]))
    assert reading.value == 1.0 and "equal" in reading.note


def test_impossible_classes_do_not_disturb_the_fit():
    logits, labels = drawn()
    wider = torch.cat([logits, torch.full((300, 1), -torch.inf)], dim=1)
    assert math.isclose(fit_temperature(wider, labels), fit_temperature(logits, labels), rel_tol=1e-12)
    with pytest.raises(DataError, match="-infinity"):
        temperature(wider, torch.full((300,), 5))


@pytest.mark.parametrize("bins", [0, -3])
def test_bins_below_one_are_refused(bins):
    with pytest.raises(UsageError, match="bins=.*at least 1"):
        Calibration(bins)
    with pytest.raises(UsageError, match="bins=.*at least 1"):
        reliability(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), bins)


def test_bad_logits_and_labels_are_refused():
    logits, labels = drawn(10)
    with pytest.raises(DataError, match="1 of 50 logits are NaN"):
        Calibration()(
            given(logits.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.nan).double()), labels)
        )
    with pytest.raises(DataError, match=r"not in 0\.\.4, for example 7"):
        temperature(logits, labels.index_fill(0, torch.tensor([3]), 7))
    with pytest.raises(DataError, match="Flatten"):
        temperature(logits[None], labels)
    with pytest.raises(DataError, match="whole ones"):
        temperature(logits, labels.double())
    with pytest.raises(DataError, match="no label counts"):
        Calibration()(given(torch.zeros(1, 2, 3), torch.full((1, 2), -100)))
