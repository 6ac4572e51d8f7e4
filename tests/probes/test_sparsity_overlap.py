"""Overlap of masks: counted by hand, and random masks against what is expected of them."""

import math

import pytest
import torch
from torch import nn

from secateur.core.errors import FileError, MaskError
from secateur.core.masks import Masks
from secateur.core.select import top_mask
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.probes.sparsity_overlap import SparsityOverlap


def net():
    return nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 5))


def task(model=None):
    return Task(model or net(), nn.functional.cross_entropy, [])


def drawn(counts, seed):
    shapes = {"0.weight": (6, 10), "2.weight": (5, 6)}
    return Masks({
        n: top_mask(torch.rand(shapes[n], generator=stream(seed, "test", n)), count) for n, count in counts.items()
    })  # fmt: skip


def rows(one, two):
    a, b = torch.zeros(60, dtype=torch.bool), torch.zeros(30, dtype=torch.bool)
    a[list(one)], b[list(two)] = True, True
    return Masks({"0.weight": a.view(6, 10), "2.weight": b.view(5, 6)})


def test_a_case_counted_by_hand():
    first, second = rows(range(0, 20), range(0, 6)), rows(range(15, 30), range(3, 12))
    reading = SparsityOverlap(second)(task(), first)
    assert reading.value == (5 + 3) / (30 + 12)
    parts = reading.parts
    assert (parts["intersection"], parts["union"]) == (8, 42)
    assert (parts["iou:0.weight"], parts["iou:2.weight"]) == (5 / 30, 3 / 12)
    assert parts["expected:0.weight"] == pytest.approx((20 * 15 / 60) / (35 - 20 * 15 / 60))
    average = 20 * 15 / 60 + 6 * 9 / 30
    assert parts["expected"] == pytest.approx(average / (20 + 15 + 6 + 9 - average))
    variance = 20 * 15 * 40 * 45 / (60**2 * 59) + 6 * 9 * 24 * 21 / (30**2 * 29)
    assert parts["deviations"] == pytest.approx((8 - average) / math.sqrt(variance))


def test_equal_masks_overlap_wholly_and_complements_not_at_all():
    masks = drawn({"0.weight": 30, "2.weight": 15}, 0)
    assert SparsityOverlap(masks)(task(), masks).value == 1.0
    assert SparsityOverlap(~masks)(task(), masks).value == 0.0
    alone = SparsityOverlap()(task(), masks)
    assert alone.value == 1.0 and "compared with themselves" in alone.note
    empty = rows((), ())
    assert SparsityOverlap(empty)(task(), empty).value == 1.0


def test_random_masks_of_the_same_counts_overlap_as_expected():
    counts, other = {"0.weight": 24, "2.weight": 6}, {"0.weight": 15, "2.weight": 20}
    found = [SparsityOverlap(drawn(other, 1000 + s))(task(), drawn(counts, s)).parts for s in range(300)]
    shared = torch.tensor([p["intersection"] for p in found], dtype=torch.float64)
    average = 24 * 15 / 60 + 6 * 20 / 30
    assert abs(float(shared.mean()) - average) < 4 * float(shared.std()) / 300**0.5
    scores = torch.tensor([p["deviations"] for p in found], dtype=torch.float64)
    assert abs(float(scores.mean())) < 4 / 300**0.5 and 0.85 < float(scores.std()) < 1.15


def test_dense_masks_leave_chance_no_choice():
    masks = rows(range(60), range(30))
    assert "deviations" not in SparsityOverlap(masks)(task(), masks).parts


def test_masks_may_be_read_from_zeros_files_and_folders(tmp_path):
    first, second = drawn({"0.weight": 30, "2.weight": 15}, 0), drawn({"0.weight": 20, "2.weight": 10}, 1)
    expected = SparsityOverlap(second)(task(), first)
    second.save(tmp_path / "masks.safetensors")
    one, two = net(), net()
    first.apply_(one)
    second.apply_(two)
    for other in (two, tmp_path, str(tmp_path / "masks.safetensors")):
        assert SparsityOverlap(other)(task(one), first) == expected
    assert SparsityOverlap(second)(task(one)) == expected
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="holds no `masks.safetensors`"):
        SparsityOverlap(tmp_path / "empty")(task(), first)


def test_masks_of_another_network_are_refused():
    masks = drawn({"0.weight": 30, "2.weight": 15}, 0)
    with pytest.raises(MaskError, match="`2.weight` is only here"):
        SparsityOverlap(Masks({"0.weight": masks["0.weight"]}))(task(), masks)
    with pytest.raises(MaskError, match="have shapes"):
        SparsityOverlap(Masks({**masks, "2.weight": masks["2.weight"].T}))(task(), masks)
