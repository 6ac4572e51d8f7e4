"""Choosing among what is left: nothing comes back, and counts are those of a slow list of what units still hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.allocations import ALLOCATIONS, Global, Lamp, Uniform
from secateur.core.errors import BudgetError, ModelError, UsageError
from secateur.core.ground import Ground
from secateur.core.masks import Masks
from secateur.core.patterns import NM, Block, Unit, Unstructured

EVERY = [kind() for kind in ALLOCATIONS.values()]


@st.composite
def grounds(draw, pattern, allocation=None, sign=False):
    """A few matrices with scores (often equal), and which of their weights an earlier pruning has left."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores, old = {}, {}
    for i in range(draw(st.integers(1, 4))):
        shape = (draw(st.sampled_from([4, 8])), draw(st.sampled_from([4, 8])))
        score = torch.rand(shape, generator=random, dtype=torch.float64)
        if draw(st.booleans()):
            score = (score * 4).floor()
        scores[f"t{i}"] = score - (score.max() / 2 if sign else 0)
        mask = torch.rand(shape, generator=random) < draw(st.sampled_from([0.1, 0.5, 0.9, 1.0]))
        mask[draw(st.integers(0, shape[0] - 1)), 0] = True
        scores[f"t{i}"][mask & (scores[f"t{i}"] == 0)] = 0.125
        old[f"t{i}"] = mask
    cost = {name: float(2**i) for i, name in enumerate(scores)}
    return Ground(scores, pattern, allocation or Global(), cost, Masks(old))


def masked(ground):
    """The masks of the earlier pruning."""
    assert ground.old is not None
    return ground.old


@pytest.mark.parametrize("allocation", EVERY, ids=list(ALLOCATIONS))
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_single_weights_are_kept_to_the_number_and_none_comes_back(allocation, data):
    ground = data.draw(grounds(Unstructured(), allocation))
    old = masked(ground)
    keep = data.draw(st.sampled_from([len(old), old.kept]) | st.integers(len(old), old.kept))

    masks = ground.masks(keep)

    assert masks.kept == keep and (masks - old).kept == 0
    assert masks.counts() == ground.kept(keep) and min(masks.counts().values()) >= 1


def lamp_levels(score, mask):
    """LAMP scores among the weights that are left, best first."""
    squares = score[mask].sort(descending=True).values.square()
    return squares / squares.cumsum(0)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_lamp_looks_at_what_is_left_only(data):
    ground = data.draw(grounds(Unstructured(), Lamp()))
    old = masked(ground)
    keep = data.draw(st.integers(len(old), old.kept))
    levels = {name: lamp_levels(ground.scores[name], mask) for name, mask in old.items()}
    last = torch.cat(list(levels.values())).sort(descending=True).values[keep - 1]

    counts = ground.masks(keep).counts()

    for name, level in levels.items():
        assert level[counts[name] - 1] >= last * (1 - 1e-12)
        assert counts[name] == len(level) or level[counts[name]] <= last * (1 + 1e-12)


def pieces(pattern, tensor):
    """The units of a matrix as rows, each with its weights."""
    if isinstance(pattern, Unit):
        return tensor.reshape(len(tensor), -1)
    if isinstance(pattern, Unstructured):
        return tensor.reshape(-1, 1)
    return tensor.unfold(0, pattern.rows, pattern.rows).unfold(1, pattern.cols, pattern.cols).flatten(2).flatten(0, 1)


@pytest.mark.parametrize("allocation", EVERY, ids=list(ALLOCATIONS))
@pytest.mark.parametrize("pattern", [Block(2, 2), Block(4, 1), Unit()], ids=repr)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_units_keep_all_they_have_left_or_nothing(pattern, allocation, data):
    """Nothing comes back, no unit is cut, no tensor is emptied, and the target is not exceeded but used up."""
    ground = data.draw(grounds(pattern, allocation))
    old = masked(ground)
    keep = data.draw(st.integers(1, old.kept))

    budget = ground.largest(lambda kept: float(sum(kept.values())), float(keep))

    if budget is None:
        assert ground.least(lambda kept: float(sum(kept.values()))) > keep
        return
    masks = ground.masks(budget)
    assert masks.kept <= keep and (masks - old).kept == 0
    assert masks.counts() == ground.kept(budget) and min(masks.counts().values()) >= 1
    for name, mask in masks.items():
        left, kept = pieces(pattern, old[name]), pieces(pattern, mask)
        assert ((kept == left).all(1) | ~kept.any(1)).all(), "a unit was cut"
    if keep == old.kept:
        assert masks == old


@pytest.mark.parametrize("sign", [False, True], ids=["", "signed"])
@pytest.mark.parametrize("pattern", [Unstructured(), Block(2, 2), Block(1, 4)], ids=repr)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_units_are_taken_in_the_order_of_what_they_have_left(pattern, sign, data):
    """The slow list: best unit of every tensor, then all others by the sum of scores left, until one does not fit."""
    ground = data.draw(grounds(pattern, sign=sign))
    old = masked(ground)
    units = []
    for place, (name, mask) in enumerate(old.items()):
        sums = pieces(pattern, torch.where(mask, ground.scores[name], 0)).sum(1).tolist()
        held = pieces(pattern, mask).sum(1).tolist()
        order = sorted((i for i, n in enumerate(held) if n), key=lambda i, s=sums: -s[i])
        units += [(rank > 0, -sums[i], place, i, name, held[i]) for rank, i in enumerate(order)]
    least = sum(unit[-1] for unit in units if not unit[0])
    keep = data.draw(st.integers(least, old.kept))

    def spend(ordered):
        spent, counts = 0, dict.fromkeys(old, 0)
        for *_, name, held in ordered:
            if spent + held > keep:
                return counts
            spent, counts[name] = spent + held, counts[name] + held
        return counts

    plain, guarded = spend(sorted(units, key=lambda unit: unit[1:])), spend(sorted(units))
    budget = ground.largest(lambda kept: float(sum(kept.values())), float(keep))

    assert budget is not None
    assert ground.masks(budget).counts() == (plain if all(plain.values()) else guarded)


def test_groups_with_fewer_weights_left_keep_those():
    """2:4 after single weights: two of each group where there are two, else what there is."""
    score = torch.tensor([[4.0, 3.0, 2.0, 1.0, 4.0, 3.0, 2.0, 1.0]])
    old = Masks({"a": torch.tensor([[False, True, True, True, True, False, False, False]])})

    masks = Ground({"a": score}, NM(2, 4), Global(), {"a": 1.0}, old).masks(4)

    assert masks["a"].tolist() == [[False, True, True, False, True, False, False, False]]


def test_a_tensor_with_nothing_left_stays_empty():
    scores = {"a": torch.ones(4, 4), "b": torch.ones(4, 4)}
    old = Masks({"a": torch.zeros(4, 4, dtype=torch.bool), "b": torch.ones(4, 4, dtype=torch.bool)})

    for pattern, keep in ((Unstructured(), 5), (Unit(), 8), (Block(2, 2), 8)):
        masks = Ground(scores, pattern, Uniform(), {}, old).masks(keep)
        assert masks.counts() == {"a": 0, "b": keep}


def test_units_that_are_gone_rank_below_living_ones_with_negative_scores():
    scores = {"a": torch.tensor([[1.0, 1.0], [-1.0, -2.0], [-3.0, -3.0]]), "b": torch.full((2, 2), -5.0)}
    old = Masks({"a": torch.tensor([[False, False], [True, True], [True, True]]), "b": torch.ones(2, 2).bool()})

    masks = Ground(scores, Unit(), Global(), {}, old).masks(4)

    assert masks["a"].sum(1).tolist() == [0, 2, 0] and masks["b"].sum(1).tolist() == [2, 0]


def test_refusals_speak_of_what_is_left():
    score = {"a": torch.tensor([[-3.0, 1.0, 2.0, 9.0]])}
    old = Masks({"a": torch.tensor([[True, True, True, False]])})

    with pytest.raises(UsageError, match="run from -3 to 2"):
        Ground(score, Unstructured(), Lamp(), {}, old).masks(1)
    with pytest.raises(ModelError, match="all scores are zero"):
        Ground({"a": torch.tensor([[0.0, 0.0, 0.0, 9.0]])}, Unstructured(), Global(), {}, old).masks(1)
    with pytest.raises(BudgetError, match="empty whole layers"):
        Ground(score, Unstructured(), Global(), {}, old).masks(0)
