"""Which classes suffer, which answers flip: exact integers by hand, intervals by an independent formula."""

import math

import pytest
import torch
from tests.engine.damage_kit import Fixed, Tagger, answering

from secateur.core.errors import DataError
from secateur.core.losses import CrossEntropy
from secateur.core.task import Task
from secateur.data import Split
from secateur.engine.damage import classes as by
from secateur.engine.damage.outputs import outputs
from secateur.probes.accuracy import Accuracy

LABELS = [0, 0, 0, 0, 1, 1, 2, 2, 2]
BEFORE = [0, 0, 0, 1, 1, 1, 2, 0, 0]
AFTER_ = [0, 1, 1, 0, 1, 1, 2, 1, 0]
NAMES = ("ant", "bee", "cat", "dog")


def answered(answers, labels=LABELS, classes=3, name="network"):
    return outputs(Fixed(), Split(answering(answers, classes), torch.tensor(labels)), name=name)


@pytest.fixture
def pair():
    return answered(BEFORE), answered(AFTER_, name="after")


def bonett_price(n, only_after, only_before):
    """Low and high of the difference, in points."""
    p, q = (only_after + 1) / (n + 2), (only_before + 1) / (n + 2)
    half = 1.959963984540054 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return 100 * (p - q - half), 100 * (p - q + half)


def test_counts_of_each_class_by_hand(pair):
    rows = by.classes(*pair, NAMES)
    keys = ("class", "name", "count", "right_before", "right_after", "only_before", "only_after")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        (0, "ant", 4, 3, 2, 2, 1), (1, "bee", 2, 2, 2, 0, 0), (2, "cat", 3, 1, 1, 0, 0), (3, "dog", 0, 0, 0, 0, 0),
    ]  # fmt: skip


def test_changes_of_classes_have_paired_intervals(pair):
    rows = by.classes(*pair, NAMES)
    assert [None if row["change"] is None else row["change"].value for row in rows] == [-25.0, 0.0, 0.0, None]
    for row in rows[:3]:
        low, high = bonett_price(row["count"], row["only_after"], row["only_before"])
        assert row["change"].low == pytest.approx(max(-100.0, low)) and row["change"].high == pytest.approx(high)


def test_flips_by_hand(pair):
    table = by.flips(*pair, NAMES)
    assert {k: v for k, v in table.items() if isinstance(v, int)} == {
        "count": 9, "both_right": 5 - 1, "right_wrong": 2, "wrong_right": 1, "wrong_other": 1, "same_wrong": 1,
        "agree": 5,
    }  # fmt: skip
    assert sum(table[k] for k in ("both_right", "right_wrong", "wrong_right", "wrong_other", "same_wrong")) == 9
    assert table["agreement"].value == 5 / 9
    assert table["pairs"] == [{"label": 0, "answer": 1, "label_name": "ant", "answer_name": "bee", "count": 2}]


def test_the_change_in_all_is_the_sum_of_its_classes(pair):
    rows, found = by.classes(*pair, NAMES), by.change(*pair)
    gained = sum(row["right_after"] - row["right_before"] for row in rows)
    assert found.value == pytest.approx(100 * gained / 9)
    assert (found.parts["only_a"], found.parts["only_b"]) == (1.0, 2.0)


def test_the_most_hurt_class_is_the_one_that_surely_lost_and_is_told_only_then():
    # Of class 0 one of one is lost: -100 points, of which little is known. Of class 1 20 of 40.
    labels = [0] + [1] * 40 + [2] * 40
    before = answered(labels, labels)
    after = answered([1] + [1] * 20 + [2] * 20 + [2] * 38 + [0] * 2, labels)
    rows = by.classes(before, after, NAMES)
    found = by.most_hurt(rows)
    assert found["class"] == 1 and rows[0]["change"].value == -100.0
    low, high = bonett_price(40, 0, 20)
    assert found["sentence"] == (
        "Class bee is hurt most: of 40 the dense network has 40 right, the pruned one 20: -50.0 points "
        f"(95 % interval of this class alone {low:+.1f} to {high:+.1f})."
    )


def test_where_every_interval_holds_zero_nothing_is_said(pair):
    found = by.most_hurt(by.classes(*pair, NAMES))
    assert found["sentence"] == "" and found["name"] in NAMES
    assert by.most_hurt([]) is None


def test_the_most_frequent_lost_pairs_come_first():
    labels = [0] * 3 + [1] * 3
    table = by.flips(answered(labels, labels), answered([2, 1, 2, 0, 2, 0], labels), ())
    assert [(row["label_name"], row["answer_name"], row["count"]) for row in table["pairs"]] == [
        ("0", "2", 2), ("1", "0", 2), ("0", "1", 1), ("1", "2", 1),
    ]  # fmt: skip


def test_networks_with_more_outputs_than_names():
    labels = [0, 1]
    before, after = answered([0, 1], labels, 2), answered([3, 1], labels, 5)
    rows = by.classes(before, after, ("a", "b", "c"))
    assert [row["name"] for row in rows] == ["a", "b", "c", "3", "4"]
    assert by.flips(before, after, ("a",))["pairs"][0]["answer_name"] == "3"


def test_one_example_and_one_class():
    one = answered([0], [0], 1)
    assert by.classes(one, one, ())[0]["change"].value == 0.0
    assert by.flips(one, one, ())["agree"] == 1
    assert by.accuracy(one).value == 100.0 and by.accuracy(one).low < 50


def test_other_labels_are_refused(pair):
    other = answered(BEFORE, [1, *LABELS[1:]])
    for work in (lambda: by.change(pair[0], other), lambda: by.flips(pair[0], other, ()),
                 lambda: by.classes(pair[0], other, ())):  # fmt: skip
        with pytest.raises(DataError, match="different labels"):
            work()


# Tokens


def tokens(sequences=8, length=5):
    random = torch.Generator().manual_seed(2)
    x = torch.randint(7, (sequences, length), generator=random)
    y = torch.where(torch.rand(x.shape, generator=random) < 0.3, -100, torch.randint(3, x.shape, generator=random))
    return Split(x, y)


def test_accuracy_of_tokens_is_that_of_the_probe():
    net, split = Tagger(), tokens()
    found, wanted = (
        by.accuracy(outputs(net, split, batch=3)),
        Accuracy()(Task(net, CrossEntropy(), [(split.x, split.y)])),
    )
    assert (found.value, found.low, found.high, found.n) == (wanted.value, wanted.low, wanted.high, 8)


def test_classes_of_tokens_have_intervals_over_sequences():
    split = tokens()
    before, after = outputs(Tagger(seed=0), split), outputs(Tagger(seed=1), split)
    rows = by.classes(before, after, NAMES)
    assert [row["count"] for row in rows] == [int((split.y == k).sum()) for k in range(7)]
    for row in rows[:3]:
        here = split.y == row["class"]
        one, two = (net(split.x).argmax(-1) == split.y for net in (Tagger(seed=0), Tagger(seed=1)))
        assert (row["right_before"], row["right_after"]) == (int((one & here).sum()), int((two & here).sum()))
        assert "bootstrap over sequences" in row["change"].note
        assert row["change"].n == int(here.any(1).sum())
    assert by.flips(before, after, NAMES)["agreement"].low is None


def test_rare_classes_of_tokens_have_no_interval(monkeypatch):
    monkeypatch.setattr(by, "MOST", 1)
    split = tokens()
    rows = by.classes(outputs(Tagger(seed=0), split), outputs(Tagger(seed=1), split), NAMES)
    often = max(rows, key=lambda row: row["count"])["class"]
    assert [row["class"] for row in rows if row["change"] and row["change"].low is not None] == [often]
    assert "no interval" in rows[(often + 1) % 3]["change"].note
