# Errors of readings are optional and layers come by index, which the type checker cannot follow here.
# pyright: reportOptionalOperand=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
"""Accuracy against counting by hand, and its interval."""

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
from secateur.probes._statistics import wilson
from secateur.probes.accuracy import Accuracy, answers, difference


def given(logits, labels, batches=1):
    """A task whose network answers with its inputs."""
    logits = torch.as_tensor(logits)
    data = list(zip(logits.chunk(batches), torch.as_tensor(labels).chunk(batches), strict=True))
    return Task(nn.Identity(), functional.cross_entropy, data)


LOGITS = [[3.0, 1.0, 2.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [0.0, 1.0, 0.5]]
LABELS = [0, 2, 2, 1, 0]


def test_accuracy_is_the_share_of_right_answers_in_per_cent():
    reading = Accuracy()(given(LOGITS, LABELS))
    assert (reading.value, reading.unit, reading.n) == (40.0, "%", 5)
    assert reading.parts == {"0": 50.0, "1": 0.0, "2": 50.0}
    assert math.isclose(reading.stderr, 100 * math.sqrt(0.4 * 0.6 / 5))
    assert [reading.low, reading.high] == [100 * end for end in wilson(2, 5)]
    loss = float(functional.cross_entropy(torch.tensor(LOGITS).double(), torch.tensor(LABELS)))
    assert reading.note == f"mean cross-entropy {loss:.6g}"


@pytest.mark.parametrize("top", [1, 2, 3])
def test_top_k_agrees_with_sorting(top):
    logits = torch.randn(50, 7, generator=stream(0, "test"))
    labels = torch.randint(7, (50,), generator=stream(1, "test"))
    expected = (logits.topk(top).indices == labels[:, None]).any(1).double().mean()
    assert math.isclose(Accuracy(top)(given(logits, labels)).value, 100 * float(expected))


def test_ties_rank_by_class_number():
    flat = torch.zeros(4, 3)
    assert Accuracy()(given(flat, [0, 0, 1, 2])).value == 50.0
    assert Accuracy(2)(given(flat, [0, 0, 1, 2])).value == 75.0


def test_perfect_and_hopeless_networks_have_intervals_too():
    logits = torch.eye(6)
    perfect, hopeless = Accuracy()(given(logits, range(6))), Accuracy()(given(logits, [1, 2, 3, 4, 5, 0]))
    assert (perfect.value, perfect.high, hopeless.value, hopeless.low) == (100.0, 100.0, 0.0, 0.0)
    assert perfect.low < 100 and hopeless.high > 0


def test_batches_of_any_size_give_the_same():
    logits = torch.randn(12, 4, generator=stream(0, "test"))
    labels = torch.arange(12) % 4
    assert Accuracy()(given(logits, labels, 5)) == Accuracy()(given(logits, labels))


def token_logits(right):
    """Logits (N, T, 2) that are right where asked, for labels that are all 1."""
    right = torch.as_tensor(right).float()
    return torch.stack([1 - right, right], dim=-1)


def test_tokens_count_one_by_one_and_padding_not_at_all():
    right = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0], [1, 1, 1, 1]])
    labels = torch.ones(3, 4, dtype=torch.long)
    labels[1, 2:] = -100
    reading = Accuracy()(given(token_logits(right), labels))
    assert math.isclose(reading.value, 100 * 8 / 10) and reading.n == 3
    assert reading.parts == {"1": 80.0}
    assert "10 tokens of 3 sequences" in reading.note
    expected = functional.cross_entropy(token_logits(right).double().reshape(-1, 2), labels.reshape(-1))
    assert f"mean cross-entropy {float(expected):.6g}" in reading.note


def test_the_interval_of_tokens_is_that_of_their_sequences():
    """When all tokens of a sequence are right or all wrong, it is the interval of as many examples."""
    right = (torch.rand(200, generator=stream(0, "test")) < 0.7).long()
    share = float(right.double().mean())
    reading = Accuracy()(given(token_logits(right[:, None].expand(200, 9)), torch.ones(200, 9, dtype=torch.long)))
    assert math.isclose(reading.stderr, 100 * math.sqrt(share * (1 - share) / 200), rel_tol=0.1)
    assert reading.low < reading.value < reading.high
    again = Accuracy()(given(token_logits(right[:, None].expand(200, 9)), torch.ones(200, 9, dtype=torch.long), 4))
    assert again == reading


def test_a_single_sequence_has_no_interval_and_the_note_says_so():
    reading = Accuracy()(given(token_logits([[1, 0, 1]]), torch.ones(1, 3, dtype=torch.long)))
    assert reading.low is None and "single sequence" in reading.note


def test_half_precision_logits_are_compared_as_they_are():
    logits = torch.tensor(LOGITS, dtype=torch.bfloat16)
    assert Accuracy()(given(logits, LABELS)).value == 40.0


def test_masked_classes_with_logits_of_minus_infinity_are_allowed():
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])
    assert Accuracy()(given(logits, [2])).value == 100.0


def test_answers_pair_up_for_a_difference():
    labels = torch.arange(40) % 4
    good = functional.one_hot(labels, 4).double()
    worse = good.clone()
    worse[:6] = worse[:6].roll(1, dims=1)
    reading = difference(given(worse, labels), given(good, labels))
    assert math.isclose(reading.value, -15.0)
    assert answers(given(worse, labels)).right.tolist() == [False] * 6 + [True] * 34
    with pytest.raises(DataError, match="different labels.*unshuffled"):
        difference(given(good, labels), given(good, labels.flip(0)))


def test_a_difference_of_tokens_takes_sequences_as_groups():
    labels = torch.ones(6, 4, dtype=torch.long)
    one, two = torch.ones(6, 4), torch.ones(6, 4)
    two[:2] = 0
    reading = difference(given(token_logits(two), labels), given(token_logits(one), labels))
    assert math.isclose(reading.value, -100 / 3) and reading.n == 6


def test_the_reading_survives_json():
    reading = Accuracy()(given(LOGITS, LABELS))
    assert Reading.from_json(json.loads(json.dumps(reading.to_json()))) == reading


@pytest.mark.parametrize("top", [0, -1])
def test_top_below_one_is_refused(top):
    with pytest.raises(UsageError, match="top=.*at least 1"):
        Accuracy(top)


def test_top_above_the_classes_is_refused_with_their_number():
    with pytest.raises(UsageError, match="top=4 .*3 classes.*`top = 3`"):
        Accuracy(4)(given(LOGITS, LABELS))


def test_nan_logits_are_refused_with_their_number():
    logits = torch.tensor(LOGITS)
    logits[1] = torch.nan
    with pytest.raises(DataError, match="3 of 15 logits are NaN"):
        Accuracy()(given(logits, LABELS))


@pytest.mark.parametrize("label", [3, -1, 255])
def test_labels_out_of_range_are_refused(label):
    with pytest.raises(DataError, match=rf"1 labels are not in 0\.\.2, for example {label}"):
        Accuracy()(given(LOGITS, [0, 1, 2, label, 1]))


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.zeros(4, 3), torch.zeros(4)),
        (torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.long)),
        (torch.zeros(4), torch.zeros(4, dtype=torch.long)),
        (torch.zeros(4, 3, 5, 5), torch.zeros(4, 5, 5, dtype=torch.long)),
        (torch.zeros(4, 3, dtype=torch.long), torch.zeros(4, dtype=torch.long)),
    ],
)
def test_anything_but_a_classifier_is_refused_with_the_shapes(logits, labels):
    with pytest.raises(DataError, match=r"needs logits \(N, classes\)"):
        Accuracy()(given(logits, labels))


def test_data_of_padding_only_are_refused():
    with pytest.raises(DataError, match="no label counts"):
        Accuracy()(given(torch.zeros(2, 3, 4), torch.full((2, 3), -100)))


def test_a_loader_that_shuffles_leaves_the_random_state_alone():
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.eye(8), torch.arange(8))
    before = torch.get_rng_state()
    reading = Accuracy()(Task(nn.Identity(), functional.cross_entropy, DataLoader(data, 3, shuffle=True)))
    assert reading.value == 100.0 and torch.equal(torch.get_rng_state(), before)
