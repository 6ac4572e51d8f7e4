"""Labels: unions against a plain Python one, and what layers become when they are decided."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.surgery.labels import Units, Value, along, compress, decide, spread, varied, vector

PAIRS = st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=60)


class Plain:
    """The textbook's disjoint sets."""

    def __init__(self, count):
        self.parent = list(range(count))

    def find(self, i):
        while self.parent[i] != i:
            i = self.parent[i]
        return i

    def unite(self, a, b):
        a, b = self.find(a), self.find(b)
        self.parent[max(a, b)] = min(a, b)


def listed(value, dim):
    labels = vector(value, dim)
    return None if labels is None else labels.tolist()


@given(st.lists(PAIRS, min_size=1, max_size=5))
@settings(max_examples=150, deadline=None)
def test_unions_are_those_of_plain_python(batches):
    units, plain = Units(), Plain(40)
    labels = units.fresh(40)

    for pairs in batches:
        if pairs:
            one, other = (torch.tensor(side) for side in zip(*pairs, strict=True))
            units.unite(labels[one], labels[other])
        for a, b in pairs:
            plain.unite(a, b)
        assert units.find(labels).tolist() == [plain.find(i) for i in range(40)]


def test_unions_survive_growth():
    units = Units()
    first = units.fresh(3)
    units.unite(first[0], first[2])
    later = units.fresh(1 << 15)
    units.unite(later[-1:], first[1:2])

    assert units.size == 3 + (1 << 15)
    assert units.find(first).tolist() == [0, 1, 0]
    assert units.find(later[-1:]).tolist() == [1]
    assert torch.equal(units.find(later[:-1]), later[:-1])


def test_unions_broadcast():
    units = Units()
    rows, columns = units.fresh(3), units.fresh(4)
    units.unite(rows[:, None], columns[None, :1])

    assert units.find(rows).unique().tolist() == [0]
    assert units.find(columns).tolist() == [0, 4, 5, 6]


def test_a_union_with_one_hard_label_is_hard():
    units = Units()
    soft, hard = units.fresh(3, soft=True), units.fresh(1)
    units.unite(soft[:1], soft[1:2])
    assert units.soft(soft)

    units.unite(soft[1:2], hard)

    assert not units.soft(soft[:1]) and not units.soft(soft[1:2])
    assert units.soft(soft[2:])


def test_reasons_follow_unions_made_later():
    units = Units()
    labels = units.fresh(4)
    units.freeze(labels[:1], "it is an output")
    units.freeze(labels[2:3], "no rule")
    units.freeze(labels[:1], "it is an output")
    units.mark(labels[3:], "a mean")
    units.unite(labels[1:2], labels[2:3])
    units.unite(labels[0], labels[1])

    assert units.reasons(units.frozen) == {0: ["it is an output", "no rule"]}
    assert units.reasons(units.marked) == {3: ["a mean"]}


def test_nothing_is_frozen_by_an_empty_layer():
    units = Units()
    units.freeze(torch.empty(0, dtype=torch.int64), "nothing")
    units.mark(torch.empty(0, dtype=torch.int64), "nothing")

    assert units.frozen == units.marked == []


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
@settings(max_examples=80, deadline=None)
def test_compress_keeps_what_varies_and_spread_brings_it_back(shape, data):
    over = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    thin = [n if keep else 1 for n, keep in zip(shape, over, strict=True)]
    layer = torch.arange(torch.Size(thin).numel()).reshape(thin)

    whole = spread(layer, shape)

    assert compress(whole).shape == compress(whole.clone()).shape == layer.shape
    assert torch.equal(spread(compress(whole), shape), whole)
    assert varied(layer) == [d for d, n in enumerate(thin) if n > 1]


@pytest.mark.parametrize("heads, dim", [(True, 0), (False, 1)])
def test_a_split_dimension_gives_whole_heads_or_the_same_index_in_each(heads, dim):
    units = Units(heads)
    value = Value((2, 3), [units.fresh(6).reshape(2, 3)])

    decide(units, value)

    (layer,) = value.layers
    assert varied(layer) == [dim]
    expected = [0, 3] if heads else [0, 1, 2]
    assert units.find(layer).reshape(-1).tolist() == expected
    assert len(units.find(torch.arange(6)).unique()) == len(expected)


def test_a_preferred_dimension_wins_over_the_granularity():
    units = Units(heads=True)
    value = Value((2, 3), [units.fresh(6).reshape(2, 3)])

    decide(units, value, prefer=1)

    assert listed(value, 0) is None and listed(value, 1) == [0, 1, 2]


def test_layers_along_different_dimensions_stay_apart():
    units = Units()
    value = Value((2, 3), [along(units.fresh(2), 0, 2), along(units.fresh(3), 1, 2)])

    decide(units, value)

    assert listed(value, 0) == [0, 1] and listed(value, 1) == [2, 3, 4]
    assert not units.frozen


def test_two_units_that_share_a_dimension_stay():
    units = Units()
    value = Value((3,), [units.fresh(3), units.fresh(3)])

    decide(units, value)

    assert set(units.reasons(units.frozen)) == set(range(6))


def test_labels_of_all_that_there_is_stay():
    units = Units()
    labels = units.fresh(4)
    units.unite(labels, labels[:1])
    value = Value((4,), [labels])

    decide(units, value)

    assert value.layers == [] and list(units.reasons(units.frozen)) == [0]
