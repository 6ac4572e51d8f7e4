"""Ticket search by model size: counts on tables written by hand, and trials that are those of rewinding."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import nn

from secateur.core.errors import DataError, FileError, UsageError
from secateur.core.masks import Masks
from secateur.core.streams import stream
from secateur.data import Loader, Split
from secateur.engine.recipe import TrainStep
from secateur.engine.studies.lth_model_size import (
    Budget,
    Trial,
    check_budgets,
    null,
    rank_correlation,
    resampled,
    search,
    success,
    summary,
    trajectory_length,
)
from secateur.engine.studies.rewind import Way, prune_and_rewind

DENSITIES = (1.0, 0.8, 0.64, 0.5)
TABLE = [
    (90.0, 91.0, 92.5, 89.0),  # gains 2.5, sparsest match 0.64
    (90.0, 89.0, 88.0, 90.0),  # a tie matches, at 0.5
    (91.0, 90.5, 90.0, 88.0),  # no match: 0.5 points short
    (89.0, 88.9, 85.0, 80.0),  # no match: 0.1 points short
]


def trial(accuracies, **options):
    return Trial(tuple(accuracies), DENSITIES[: len(accuracies)], **options)


def split():
    random = stream(0, "test", "model size")
    return Split(torch.randn(24, 4, generator=random), torch.randint(2, (24,), generator=random))


def way(seed=0, **options):
    return Way(Loader(split(), 8, shuffle=True, seed=seed), TrainStep(**{"epochs": 2, "lr": 0.1, **options}))


def fresh(width=8, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2))


def judge(net):
    with torch.no_grad():
        return 100 * float((net(split().x).argmax(1) == split().y).double().mean())


def test_success_gain_and_sparsest_match_are_those_counted_by_hand():
    trials = [trial(row) for row in TABLE]
    assert [t.matches() for t in trials] == [True, True, False, False]
    assert [t.sparsest() for t in trials] == [0.64, 0.5, None, None]
    assert [t.best for t in trials] == [92.5, 90.0, 91.0, 89.0]
    found = summary(trials)
    assert (found.success.matched, found.success.trials, found.success.share) == (2, 4, 0.5)
    assert found.gain == (2.5 + 0 + 0 + 0) / 4
    # dense accuracies 90, 90, 91, 89: deviation sqrt(2/3), within which the last two match as well
    assert found.tolerance == pytest.approx((2 / 3) ** 0.5, rel=1e-12)
    assert found.within.matched == 4 and success(trials, 0.2).matched == 3
    assert trials[3].sparsest(0.2) == 0.8 and found.collapsed == 0


def test_intervals_of_success_are_wilsons():
    found = success([trial(row) for row in TABLE])
    # roots of (p - s)^2 = z^2 p (1 - p) / n
    z2 = 1.959963984540054**2
    for p in (found.low, found.high):
        assert (p - 0.5) ** 2 == pytest.approx(z2 * p * (1 - p) / 4, rel=1e-12)
    assert success([trial(TABLE[0])] * 5).low < 1 and success([trial(TABLE[0])] * 5).high == 1


def test_a_constant_added_to_all_accuracies_changes_nothing():
    before, after = (summary([trial([a + more for a in row]) for row in TABLE]) for more in (0.0, 4.0))
    assert (before.success, before.within, before.gain) == (after.success, after.within, after.gain)


def test_without_rounds_there_is_no_success_to_speak_of():
    with pytest.raises(UsageError, match="0 rounds can neither"):
        summary([trial([90.0])])
    with pytest.raises(UsageError, match="no trials"):
        success([])


def test_a_trial_that_lost_a_layer_at_once_is_a_failure_and_stays_in_the_count():
    budget = Budget(3, 0.2, 10, TrainStep())
    lost = trial([90.0], budget=budget, collapsed=True)
    fine = trial(TABLE[0], budget=budget)
    found = summary([lost, fine])
    assert (found.success.matched, found.success.trials, found.collapsed, found.gain) == (1, 2, 1, 1.25)
    assert lost.sparsest() is None


def test_validation_data_chooses_the_round_that_test_data_reports():
    found = trial((90.0, 91.0, 95.0, 89.0), chosen=(80.0, 85.0, 82.0, 84.0))
    assert (found.best, found.gain, found.matches()) == (91.0, 1.0, True)
    unlucky = trial((90.0, 91.0, 95.0, 89.0), chosen=(80.0, 81.0, 82.0, 84.0))
    assert (unlucky.best, unlucky.gain, unlucky.matches()) == (89.0, -1.0, False)


def test_the_length_of_a_straight_way_is_its_steps_and_of_no_way_zero():
    direction = torch.randn(3, 4, dtype=torch.float64, generator=stream(0, "direction"))
    direction /= direction.norm()
    parts = {"a": direction[:2], "b": direction[2]}
    for rate, steps in ((0.25, 12), (0.0, 12)):
        points = [{n: i * rate * d for n, d in parts.items()} for i in range(steps + 1)]
        assert trajectory_length(points) == pytest.approx(steps * rate, rel=1e-12)
    corner = [{"a": torch.tensor(p)} for p in ([0.0, 0.0], [3.0, 0.0], [3.0, 4.0])]
    assert trajectory_length(corner) == 7 and trajectory_length([corner[0], corner[2]]) == 5
    assert trajectory_length(corner[:1]) == 0


def test_a_search_is_rewinding_to_the_beginning_judged_every_round(tmp_path):
    found = search(fresh(), way(), tmp_path / "one", judge, rounds=3, chooser=judge, points=2)
    rounds = list(prune_and_rewind(fresh(), way(), tmp_path / "two", rounds=3))
    assert found.accuracies == tuple(judge(each.net) for each in rounds) == found.chosen
    assert found.densities == tuple(each.masks.kept / each.masks.total for each in rounds)
    assert rounds[0].masks.total == 4 * 8 + 8 * 2  # BatchNorm is not counted
    assert found.budget == Budget(3, 0.2, 6, way().step) and found.rounds == 3 and not found.collapsed
    for number, each in enumerate(rounds):
        start = fresh()
        each.masks.apply_(start)
        pairs = zip(start.parameters(), each.net.parameters(), strict=True)
        straight = math.sqrt(sum(float((p - q).detach().double().square().sum()) for p, q in pairs))
        assert found.lengths[number] >= straight > 0


def test_the_length_between_all_steps_of_plain_descent_is_that_of_its_updates(tmp_path):
    plain = way(momentum=0.0, schedule="constant", epochs=1)
    (length,) = search(fresh(), plain, tmp_path, judge, rounds=0, points=3).lengths
    net, total = fresh().train(), 0.0
    for x, y in plain.loader.epoch(0):
        gradient = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), list(net.parameters()))
        total += 0.1 * math.sqrt(sum(float(g.double().square().sum()) for g in gradient))
        with torch.no_grad():
            for p, g in zip(net.parameters(), gradient, strict=True):
                p -= 0.1 * g
    assert length == pytest.approx(total, rel=1e-5)


def test_the_same_seed_is_the_same_trial_and_finished_rounds_are_read(tmp_path):
    one, two = (search(fresh(), way(), tmp_path / n, judge, rounds=2, points=2) for n in ("a", "b"))
    assert one == two
    stamps = {f: f.stat().st_mtime_ns for f in (tmp_path / "a").rglob("*.pt")}
    assert search(fresh(), way(), tmp_path / "a", judge, rounds=2, points=2) == one
    assert {f: f.stat().st_mtime_ns for f in stamps} == stamps
    other = search(fresh(), way(1), tmp_path / "c", judge, rounds=2, points=2)
    assert other.lengths != one.lengths
    with pytest.raises(FileError, match="past step"):  # points that were not kept on the way
        search(fresh(), way(), tmp_path / "a", judge, rounds=2, points=3)


def test_a_layer_that_would_be_lost_ends_the_search_as_a_failure(tmp_path):
    masks = Masks.dense(fresh(1))
    found = search(fresh(1), way(), tmp_path, judge, rounds=6, share=0.5, masks=masks)
    # half of a single weight rounds to none, so that it stays
    assert not found.collapsed and found.rounds == 6
    assert found.densities == tuple(n / 6 for n in (4 + 2, 2 + 1, *[1 + 1] * 5))
    certain = search(fresh(1), way(), tmp_path / "certain", judge, rounds=2, share=0.8, masks=masks)
    assert certain.collapsed and len(certain.accuracies) == 1 and not certain.matches()


def test_the_null_trains_densely_in_every_order(tmp_path):
    orders = [way(seed) for seed in range(3)]
    found = null(fresh(), orders, tmp_path / "null", judge, chooser=judge)
    assert found.densities == (1.0, 1.0, 1.0) and found.rounds == 2
    first = search(fresh(), way(), tmp_path / "search", judge, rounds=0)
    assert found.accuracies[0] == first.accuracies[0]
    again = [null(fresh(), [order], tmp_path / str(i), judge).accuracies[0] for i, order in enumerate(orders)]
    assert found.accuracies == tuple(again) == found.chosen
    with pytest.raises(UsageError, match="no ways"):
        null(fresh(), [], tmp_path, judge)


def gains(sizes):
    """Trials that all gain so much, by size."""
    return {size: [trial((50.0, 50.0 + gain))] * 3 for size, gain in sizes.items()}


def gain(trials):
    return summary(trials).gain


def test_ranks_fall_with_size_or_rise_and_ties_count_half():
    assert rank_correlation(gains({10: 3.0, 100: 2.0, 50: 2.5}), gain, draws=20) == (-1.0, -1.0, -1.0)
    assert rank_correlation(gains({10: 1.0, 50: 2.0, 100: 4.0}), gain, draws=20)[0] == 1.0
    # ranks 1, 2, 3 against 1.5, 1.5, 3
    value, *_ = rank_correlation(gains({10: 1.0, 50: 1.0, 100: 4.0}), gain, draws=20)
    assert value == pytest.approx(float(Fraction(3, 2)) / math.sqrt(2 * 1.5), rel=1e-12)
    assert rank_correlation(gains({10: 1.0, 50: 1.0}), gain, draws=20)[0] == 0.0


def test_the_bootstrap_covers_a_mean_by_its_known_quantiles():
    # of two values a draw of two has the mean 0, 1/2 or 1 with probabilities 1/4, 1/2 and 1/4
    def middle(parts):
        return sum(parts[0]) / len(parts[0])

    assert resampled([[0.0, 1.0]], middle, 2000, 0.6) == (0.0, 1.0)
    assert resampled([[0.0, 1.0]], middle, 2000, 0.4) == (0.5, 0.5)
    assert resampled([[3.0]], middle) == (3.0, 3.0)
    low, high = resampled([list(range(100))], middle, 2000, 0.9, seed=1)
    half = 1.6449 * (sum((i - 49.5) ** 2 for i in range(100)) / 100 / 100) ** 0.5
    assert low == pytest.approx(49.5 - half, abs=0.5) and high == pytest.approx(49.5 + half, abs=0.5)


def test_unequal_budgets_are_refused_unless_they_are_meant():
    budget = Budget(3, 0.2, 10, TrainStep())
    trials = [trial(TABLE[0], budget=budget), trial(TABLE[1], budget=replace(budget, steps=20))]
    with pytest.raises(UsageError, match="unequal budgets"):
        check_budgets(trials)
    with pytest.raises(UsageError, match="unequal=True"):
        summary(trials)
    assert summary(trials, unequal=True).success.matched == 2


def test_numbers_that_mean_nothing_are_refused(tmp_path):
    with pytest.raises(DataError, match="2 accuracies, 1 densities"):
        Trial((1.0, 2.0), (1.0,))
    with pytest.raises(DataError, match="not all finite"):
        trial((1.0, math.nan))
    with pytest.raises(UsageError, match="at least two"):
        rank_correlation(gains({10: 1.0}), gain)
    with pytest.raises(UsageError, match="a level of 1.5"):
        resampled([[1.0]], lambda parts: 0.0, level=1.5)
    with pytest.raises(UsageError, match="7 points of a training of 6 steps"):
        search(fresh(), way(), tmp_path, judge, rounds=1, points=7)
    with pytest.raises(UsageError, match="share=1.0"):
        search(fresh(), way(), tmp_path, judge, rounds=1, share=1.0)
    assert not any(tmp_path.iterdir())
