"""Sparse double descent: label noise, sweeps with other criteria and retrainings, learning distance, phases."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional

from secateur.core.errors import DataError, UsageError
from secateur.core.files import read_tensors, write_tensors
from secateur.core.masks import Masks
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.criteria.magnitude import Magnitude
from secateur.criteria.random import Random
from secateur.criteria.snip import Snip
from secateur.criteria.taylor import Taylor
from secateur.data import Dataset, Loader, Split
from secateur.engine.recipe import TrainStep
from secateur.engine.studies.label_noise import Corrupted, Noise, corrupt
from secateur.engine.studies.rewind import Way, prune_and_rewind, train_to
from secateur.engine.studies.sparse_double_descent import (
    Level,
    Retraining,
    measure,
    phases,
    pruned,
    rank_correlation,
    reinitialised,
    sweep,
)

CLASSES = 5
NOISES = {
    "symmetric": Noise("symmetric", 0.3),
    "pairflip": Noise("pairflip", 0.3),
    "asymmetric": Noise("asymmetric", 0.3, {1: 3, 3: 1, 4: 0}),
    "uniform": Noise("uniform", 0.3),
}


def dataset(train=40, test=20, classes=CLASSES):
    random = stream(0, "test", "descent")
    x = torch.randn(train + test, 4, generator=random)
    y = torch.arange(train + test) % classes
    names = tuple(map(str, range(classes)))
    return Dataset("toy", Split(x[:train], y[:train]), Split(x[train:], y[train:]), names, "features")


def fresh(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def way(data, epochs=2):
    return Way(Loader(data.train, 10, shuffle=True), TrainStep(epochs=epochs, lr=0.1, momentum=0.9))


def unchecked(what, **options):
    """A dataclass whose own checks see an option that the type checker of the tests would not let through."""
    odd = object.__new__(what)
    odd.__dict__.update(options)
    odd.__post_init__()


def equal(one, two):
    a, b = one.state_dict(), two.state_dict()
    return all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_rows_of_the_noise_are_probabilities(noise):
    matrix = noise.matrix(CLASSES)
    assert matrix.dtype == torch.float64 and bool((matrix >= 0).all())
    assert torch.allclose(matrix.sum(1), torch.ones(CLASSES, dtype=torch.float64), rtol=0, atol=1e-15)


def test_noise_is_what_its_name_says():
    e, c = 0.3, CLASSES
    for i in range(c):
        for j in range(c):
            of = {name: float(noise.matrix(c)[i, j]) for name, noise in NOISES.items()}
            assert of["symmetric"] == pytest.approx(1 - e if i == j else e / (c - 1), abs=1e-15)
            assert of["pairflip"] == pytest.approx(1 - e if i == j else e * (j == (i + 1) % c), abs=1e-15)
            assert of["uniform"] == pytest.approx((1 - e) * (i == j) + e / c, abs=1e-15)
            to = {1: 3, 3: 1, 4: 0}.get(i, i)
            assert of["asymmetric"] == pytest.approx((1 - e) * (i == j) + e * (j == to), abs=1e-15)


@pytest.mark.parametrize(("kind", "share"), [("symmetric", 1.0), ("pairflip", 1.0), ("uniform", 1 - 1 / CLASSES)])
@pytest.mark.parametrize("rate", [0.2, 0.4])
def test_realised_rates_lie_within_three_sigmas(kind, share, rate):
    n = 20000
    found = corrupt(dataset(n), Noise(kind, rate), 1)
    expected = rate * share
    realised = int(found.wrong.sum()) / n
    assert abs(realised - expected) <= 3 * math.sqrt(expected * (1 - expected) / n)


def test_symmetric_noise_sends_labels_to_all_other_classes_alike():
    found = corrupt(dataset(20000), Noise("symmetric", 1.0), 0)
    assert bool(found.wrong.all())
    for label in range(CLASSES):
        counts = torch.bincount(found.data.train.y[found.clean.train.y == label], minlength=CLASSES).tolist()
        assert counts.pop(label) == 0 and stats.chisquare(counts).pvalue > 1e-3


def test_pairflip_of_everything_is_a_permutation():
    found = corrupt(dataset(), Noise("pairflip", 1.0), 0)
    assert torch.equal(found.data.train.y, (found.clean.train.y + 1) % CLASSES)
    matrix = Noise("pairflip", 1.0).matrix(CLASSES)
    assert set(matrix.flatten().tolist()) == {0.0, 1.0} and matrix.sum(0).tolist() == [1.0] * CLASSES


def test_only_training_labels_change_and_the_seed_decides_which():
    data = dataset().split_validation(5)
    one, same, other = (corrupt(data, NOISES["symmetric"], seed) for seed in (0, 0, 1))
    assert torch.equal(one.data.test.y, data.test.y) and torch.equal(one.data.validation.y, data.validation.y)
    assert torch.equal(one.data.train.x, data.train.x) and not torch.equal(one.data.train.y, data.train.y)
    assert torch.equal(one.data.train.y, same.data.train.y) and not torch.equal(one.data.train.y, other.data.train.y)
    assert "symmetric noise 0.3" in one.data.note and data.note in one.data.note
    assert not bool(corrupt(data, Noise("symmetric", 0.0), 0).wrong.any())


def test_relabelled_tests_and_wrong_noise_are_refused():
    data = dataset()
    noisy = replace(data, test=Split(data.test.x, (data.test.y + 1) % CLASSES))
    with pytest.raises(DataError, match="20 of 20 test labels of 'toy' are not the clean ones"):
        Corrupted(noisy, data)
    with pytest.raises(DataError, match="same order"):
        Corrupted(replace(data, train=data.train.take(torch.arange(40).flip(0))), data)
    for rate in (-0.1, 1.1, math.nan):
        with pytest.raises(UsageError, match="rate="):
            Noise("symmetric", rate)
    with pytest.raises(UsageError, match="'symetric'.*symmetric"):
        unchecked(Noise, kind="symetric", rate=0.1, similar={})
    with pytest.raises(UsageError, match="needs `similar`"):
        Noise("asymmetric", 0.1)
    with pytest.raises(UsageError, match="takes no `similar`"):
        Noise("pairflip", 0.1, {0: 1})
    with pytest.raises(UsageError, match="from 0 to 4"):
        corrupt(data, Noise("asymmetric", 0.1, {1: 9}), 0)
    with pytest.raises(UsageError, match="at least 2"):
        NOISES["symmetric"].matrix(1)
    tokens = Split(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(DataError, match="one an example"):
        corrupt(Dataset("text", tokens, tokens, ("a", "b"), "text"), NOISES["symmetric"], 0)


def test_a_sweep_by_magnitude_from_the_initial_weights_is_that_of_rewinding(tmp_path):
    how, model = way(dataset()), fresh()
    levels = list(sweep(model, how, tmp_path / "a", rounds=3, share=0.3, retraining=Retraining(rewind=3)))
    rounds = list(prune_and_rewind(model, how, tmp_path / "b", rounds=3, share=0.3, rewind=3, scope="global"))
    assert all(a.masks == b.masks and equal(a.net, b.net) for a, b in zip(levels, rounds, strict=True))
    assert equal(model, fresh())


RETRAININGS = {
    "lottery": Retraining(),
    "fine-tune": Retraining("fine-tune", lr=1e-3, epochs=1),
    "rate": Retraining("rate"),
    "scratch": Retraining("scratch", draw=lambda number: fresh(100 + number)),
}


@pytest.mark.parametrize("kind", RETRAININGS)
def test_networks_are_trained_from_where_the_retraining_says(tmp_path, kind):
    how = way(dataset())
    levels = list(sweep(fresh(), how, tmp_path / "a", rounds=2, retraining=RETRAININGS[kind]))
    for before, level in zip(levels, levels[1:], strict=False):
        start = {"lottery": fresh(), "scratch": fresh(100 + level.number)}.get(kind, before.net)
        by_hand = copy.deepcopy(start).train()
        level.masks.apply_(by_hand)
        step = replace(how.step, lr=1e-3, epochs=1, schedule="constant") if kind == "fine-tune" else how.step
        train_to(by_hand, replace(how, step=step), tmp_path / f"hand-{level.number}", masks=level.masks)
        assert equal(by_hand, level.net)
        level.masks.check(level.net)
        began = read_tensors(level.began)[0]
        wanted = start if kind == "scratch" else fresh()
        assert all(torch.equal(began[name], p) for name, p in wanted.state_dict().items())


@pytest.mark.parametrize("kind", RETRAININGS)
def test_a_stopped_sweep_goes_on_to_the_same_end(tmp_path, kind):
    how, options = way(dataset()), {"rounds": 2, "share": 0.4, "retraining": RETRAININGS[kind]}
    study = sweep(fresh(), how, tmp_path / "a", **options)
    next(study), next(study)
    study.close()
    stamps = {f: f.stat().st_mtime_ns for f in (tmp_path / "a").rglob("state.pt")}
    again = list(sweep(fresh(), how, tmp_path / "a", **options))
    assert {f: f.stat().st_mtime_ns for f in stamps} == stamps
    whole = list(sweep(fresh(), how, tmp_path / "b", **options))
    assert all(a.masks == b.masks and equal(a.net, b.net) for a, b in zip(again, whole, strict=True))


@pytest.mark.parametrize("criterion", [Magnitude(), Random(3), Snip(), Taylor()], ids=lambda c: type(c).__name__)
def test_masks_nest_keep_exact_counts_and_take_the_lowest_scores(tmp_path, criterion):
    data = dataset()
    examples = list(Loader(data.train, 10))
    levels = list(sweep(fresh(), way(data), tmp_path, rounds=3, share=0.3, criterion=criterion, examples=examples))
    left = 72
    for level in levels:
        assert level.masks.kept == left
        left -= round(0.3 * left)
    for one, two in zip(levels, levels[1:], strict=False):
        assert (one.masks & two.masks) == two.masks
        scores = criterion(Task(one.net, functional.cross_entropy, examples), one.masks)
        gone = torch.cat([scores[n][one.masks[n] & ~m] for n, m in two.masks.items()])
        kept = torch.cat([scores[n][m] for n, m in two.masks.items()])
        assert gone.max() <= kept.min()


@pytest.mark.parametrize("criterion", [Snip("running"), Taylor()], ids=lambda c: type(c).__name__)
def test_by_gradients_of_one_size_the_ranking_is_that_of_magnitude(criterion):
    net = nn.Linear(6, 3, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.randn(3, 6, generator=stream(0, "weights")))
    signs = torch.tensor([[1.0, -1.0, 1.0, 1.0, -1.0, -1.0]])
    task = Task(net, lambda output, _: output.sum(), [(signs, torch.zeros(1, dtype=torch.int64))])
    assert bool((task.gradients()["weight"].abs() == 1).all())
    masks = Masks({"weight": torch.rand(3, 6, generator=stream(0, "mask")) > 0.3})
    for share in (0.0, 0.2, 0.5, 0.8):
        assert pruned(task, masks, share, criterion) == pruned(task, masks, share, Magnitude())


def test_the_distance_is_that_of_survivors_and_zero_without_steps(tmp_path):
    data = corrupt(dataset(), NOISES["symmetric"], 0)
    levels = list(sweep(fresh(), way(data.data), tmp_path, rounds=2, share=0.4))
    for level in levels:
        moved = sum(
            float((p.detach().double() - q.double()).mul(level.masks.get(n, torch.ones(p.shape))).square().sum())
            for (n, p), q in zip(level.net.named_parameters(), fresh().state_dict().values(), strict=True)
        )
        assert measure(level, data).distance == pytest.approx(math.sqrt(moved), rel=1e-12)
    still = fresh()
    levels[-1].masks.apply_(still)
    assert measure(replace(levels[-1], net=still), data).distance == 0


def test_errors_are_told_apart_by_wrong_and_right_labels(tmp_path):
    class Known(nn.Module):
        """Answers by a table: the first feature names the example."""

        def __init__(self, answers):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))
            self.register_buffer("answers", answers)

        def forward(self, x):
            return functional.one_hot(self.answers[x[:, 0].long()], 2).float() * self.weight.sum()

    x, own = torch.arange(8.0)[:, None], torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    labels, said = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0]), torch.tensor([0, 0, 1, 1, 1, 1, 1, 1])
    test = Split(x[:5], own[:5])
    clean = Dataset("known", Split(x, own), test, ("a", "b"), "features")
    data = Corrupted(replace(clean, train=Split(x, labels)), clean)
    net = Known(said)
    write_tensors(tmp_path / "began.safetensors", {n: t.detach() for n, t in net.state_dict().items()}, {})
    masks = Masks({"weight": torch.tensor([[True, False], [True, True]])})
    level = Level(4, net, masks, tmp_path, tmp_path / "began.safetensors")
    point = measure(level, data)
    assert (point.number, point.density) == (4, 0.75)
    assert point.test == pytest.approx(40) and point.train == pytest.approx(25)
    assert point.noisy == pytest.approx(50) and point.clean == pytest.approx(100 / 6)
    assert math.isnan(measure(level, Corrupted(clean, clean)).noisy)


def test_a_reinitialised_network_has_the_masks_and_other_weights(tmp_path):
    how = way(dataset())
    *_, last = sweep(fresh(), how, tmp_path / "a", rounds=2, share=0.5)
    other = reinitialised(last, fresh(7), how, tmp_path / "b")
    last.masks.check(other)
    assert not equal(other, last.net) and equal(other, reinitialised(last, fresh(7), how, tmp_path / "b"))
    assert equal(reinitialised(last, fresh(), how, tmp_path / "c"), last.net)


def test_phases_of_curves_by_hand():
    found = phases([36.0, 36.2, 38.0, 40.6, 30.0, 18.4, 21.0, 90.0])
    assert [list(p) for p in (found.light, found.critical, found.sweet, found.collapsed)] == [
        [0, 1], [2, 3], [4, 5], [6, 7],
    ]  # fmt: skip
    assert (found.peak, found.valley) == (3, 5)
    assert (found.rise, found.fall) == (pytest.approx(4.6), pytest.approx(22.2))
    falling = phases([30.0, 25.0, 20.0, 40.0])
    assert (falling.peak, falling.valley, falling.rise, list(falling.critical)) == (0, 2, 0.0, [])
    assert (list(falling.sweet), list(falling.collapsed)) == ([1, 2], [3])
    rising = phases([10.0, 12.0, 14.0])
    assert (rising.fall, rising.rise, list(rising.light)) == (0.0, 0.0, [0])
    assert list(rising.collapsed) == [1, 2]


def test_every_level_is_in_one_phase():
    random = stream(0, "curves")
    for _ in range(200):
        errors = torch.rand(7, generator=random, dtype=torch.float64).mul(5).round().tolist()
        found = phases(errors)
        assert [*found.light, *found.critical, *found.sweet, *found.collapsed] == list(range(7))
        falls = [errors[i] - errors[j] for i in range(7) for j in range(i, 7)]
        assert found.fall == max(falls) and found.peak <= found.valley


def test_rank_correlation_is_that_of_scipy():
    random = stream(0, "ranks")
    for _ in range(20):
        a, b = torch.randint(6, (2, 9), generator=random).double().tolist()
        assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b)[0], abs=1e-12)


def test_wrong_options_are_refused(tmp_path):
    with pytest.raises(UsageError, match="'lotery'.*lottery"):
        unchecked(Retraining, kind="lotery", rewind=0, draw=None)
    with pytest.raises(UsageError, match="rewind=3"):
        Retraining("rate", rewind=3)
    with pytest.raises(UsageError, match="needs `draw`"):
        Retraining("scratch")
    with pytest.raises(UsageError, match="takes no `draw`"):
        Retraining("rate", draw=fresh)
    with pytest.raises(UsageError, match="share="):
        next(sweep(fresh(), way(dataset()), tmp_path / "a", rounds=1, share=1.0, criterion=Random()))
    assert not (tmp_path / "a").exists()
    with pytest.raises(UsageError, match="share="):
        pruned(Task(fresh(), functional.cross_entropy, []), Masks.dense(fresh()), -0.1, Random())
    for errors in ([1.0, 2.0], [1.0, math.nan, 2.0]):
        with pytest.raises(DataError, match="three or more finite"):
            phases(errors)
    with pytest.raises(UsageError, match="tolerance="):
        phases([1.0, 2.0, 3.0], -1.0)
    with pytest.raises(DataError, match="as many of both"):
        rank_correlation([1.0, 2.0], [1.0])
    with pytest.raises(DataError, match="no order"):
        rank_correlation([1.0, 1.0], [1.0, 2.0])
