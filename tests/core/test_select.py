"""Exact selection, against Python's own sort of the same numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.errors import BudgetError, ModelError
from secateur.core.select import check_scores, spread, threshold, top_counts, top_mask

FEW = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, math.inf, -math.inf, 1e-40, -1e-40, 3.0000002]
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NUMBERS = st.one_of(st.sampled_from(FEW), st.floats(allow_nan=False))


@st.composite
def tensors(draw, types=TYPES):
    """One to four tensors of one dtype, some empty, with many equal values."""
    dtype = draw(st.sampled_from(types))
    rows = draw(st.lists(st.lists(NUMBERS, max_size=25), min_size=1, max_size=4).filter(lambda rows: any(rows)))
    return {f"t{i}": torch.tensor(row, dtype=torch.float64).to(dtype) for i, row in enumerate(rows)}


def ranking(scores):
    """(value, tensor, index) from the best to the worst; equal ones in the order of tensors and indices."""
    entries = [(v, name, i) for name, t in scores.items() for i, v in enumerate(t.double().reshape(-1).tolist())]
    return sorted(entries, key=lambda entry: -entry[0])  # Python's sort is stable, and -0.0 == 0.0


@settings(deadline=None, max_examples=150)
@given(tensors(), st.data())
def test_threshold_is_the_value_of_that_rank(scores, data):
    total = sum(t.numel() for t in scores.values())
    keep = data.draw(st.sampled_from([1, total]) | st.integers(1, total))
    values = [value for value, _, _ in ranking(scores)]

    cut = threshold(list(scores.values()), keep)

    assert cut.value == values[keep - 1]
    assert cut.above == sum(v > cut.value for v in values)
    assert cut.above + cut.ties == keep


@settings(deadline=None, max_examples=150)
@given(tensors(), st.data())
def test_counts_of_each_tensor_are_those_of_a_stable_sort(scores, data):
    total = sum(t.numel() for t in scores.values())
    keep = data.draw(st.sampled_from([1, total]) | st.integers(1, total))
    best = [name for _, name, _ in ranking(scores)[:keep]]

    assert top_counts(scores, keep) == {name: best.count(name) for name in scores}


@settings(deadline=None, max_examples=150)
@given(tensors(), st.data())
def test_the_mask_keeps_the_first_entries_of_a_stable_sort(scores, data):
    score = next(t for t in scores.values() if t.numel())
    keep = data.draw(st.sampled_from([0, 1, score.numel()]) | st.integers(0, score.numel()))
    best = {i for _, _, i in ranking({"t": score})[:keep]}

    mask = top_mask(score, keep)

    assert {i for i, kept in enumerate(mask.tolist()) if kept} == best


@settings(deadline=None, max_examples=100)
@given(st.lists(NUMBERS, min_size=1, max_size=15), st.lists(NUMBERS, min_size=1, max_size=15), st.data())
def test_tensors_of_different_types_share_one_threshold(one, two, data):
    """0.1 in float32 is more than 0.1 in float64; neither may be rounded to the other's type."""
    first, second = data.draw(st.permutations(TYPES))[:2]
    scores = {"a": torch.tensor(one, dtype=torch.float64).to(first), "b": torch.tensor(two).double().to(second)}
    keep = data.draw(st.integers(1, len(one) + len(two)))
    best = [name for _, name, _ in ranking(scores)[:keep]]

    assert top_counts(scores, keep) == {name: best.count(name) for name in scores}


def test_mixed_types_count_exactly_where_rounding_would_lose_one():
    scores = {"a": torch.tensor([0.1], dtype=torch.float64), "b": torch.tensor([0.1])}

    assert top_counts(scores, 1) == {"a": 0, "b": 1}
    assert top_counts(scores, 2) == {"a": 1, "b": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("keep", [1, 7, 524_288, 524_289, 600_000, 599_999])
def test_selection_is_exact_across_chunks_and_millions_of_ties(dtype, keep):
    values = torch.randn(600_000, generator=torch.Generator().manual_seed(0)).mul(8).round().div(8).to(dtype)
    order = torch.sort(values.double(), descending=True, stable=True).indices

    mask = top_mask(values, keep)

    expected = torch.zeros_like(mask)
    expected[order[:keep]] = True
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("keep", [0, 1, 20, 71, 72])
def test_memory_layout_does_not_matter(keep):
    score = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    expected = top_mask(score, keep)

    assert torch.equal(top_mask(score.to(memory_format=torch.channels_last), keep), expected)
    assert torch.equal(top_mask(score.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), keep), expected)
    assert torch.equal(top_mask(score.repeat(1, 1, 1, 2)[..., :3], keep), expected)


def test_a_single_number_can_be_kept_or_not():
    assert top_mask(torch.tensor(3.0), 1).item() is True
    assert top_mask(torch.tensor(3.0), 0).item() is False


def test_selection_reads_scores_that_carry_gradients():
    score = torch.tensor([1.0, 3.0, 2.0], requires_grad=True)

    assert top_mask(score, 1).tolist() == [False, True, False]


@pytest.mark.parametrize("keep", [0, -1, 4])
def test_threshold_refuses_a_rank_that_does_not_exist(keep):
    with pytest.raises(BudgetError, match=rf"cannot keep {keep} of 3 scores; ask for 1 to 3"):
        threshold([torch.ones(3)], keep)


@pytest.mark.parametrize("keep", [-1, 4])
def test_top_mask_refuses_a_count_that_does_not_exist(keep):
    with pytest.raises(BudgetError, match=f"cannot keep {keep} of 3 entries"):
        top_mask(torch.ones(3), keep)


def test_nan_scores_are_refused_with_tensor_count_and_cure():
    scores = {"fine": torch.ones(2), "body.weight": torch.tensor([1.0, math.nan, math.nan])}

    with pytest.raises(ModelError, match=r"2 of 3 scores of `body.weight` are NaN.*secateur doctor.*--skip"):
        check_scores(scores)
    check_scores({"fine": torch.tensor([math.inf, -math.inf])})


def test_a_unit_s_score_is_the_mean_of_its_weights():
    """Pruned weights score 0 and the others share evenly; a unit with nothing kept scores 0."""
    kept = torch.tensor([[[True, True], [True, True]], [[True, False], [False, True]], [[False] * 2] * 2])
    scores = spread(torch.tensor([3.0, 5.0, 7.0]), kept)
    assert torch.equal(scores.flatten(1).mean(1), torch.tensor([3.0, 5.0, 0.0]))
    assert torch.equal(scores[1], torch.tensor([[10.0, 0.0], [0.0, 10.0]])) and not scores[2].any()
