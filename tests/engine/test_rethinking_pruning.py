# Layers come by index here, which the type checker cannot follow.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
"""Pruned architectures trained from scratch: budgets, schedules, new weights, and the arms of the comparison."""

import copy
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import nn

from secateur.core.errors import ModelError, UsageError
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.data import Loader, Split
from secateur.engine.checkpoint import load_state
from secateur.engine.optimize import rate
from secateur.engine.recipe import TrainStep
from secateur.engine.shrinking import shrink
from secateur.engine.studies.rethinking_pruning import (
    Sizes,
    arms,
    original,
    scratch,
    scratch_b,
    sizes,
    spent,
    trained,
)
from secateur.engine.studies.rewind import Way, train_to

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export:UserWarning")
TUNE = TrainStep(epochs=1, lr=1e-3, schedule="constant")


def split():
    random = stream(0, "test", "rethinking")
    return Split(torch.randn(24, 3, 8, 8, generator=random), torch.randint(3, (24,), generator=random))


def way(**options):
    return Way(Loader(split(), 8, shuffle=True), TrainStep(**{"epochs": 2, "lr": 0.1, "schedule": "step", **options}))


def fresh(seed=0, widths=(4, 8, 8)):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers, wide = [], 3
        for width in widths:
            layers += [nn.Conv2d(wide, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            wide = width
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 3))


def task(net):
    return Task(net, CrossEntropy(), list(Loader(split(), 8)))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A trained network, and what surgery makes of it: half of every layer."""
    dense = fresh()
    train_to(dense, way(), tmp_path_factory.mktemp("dense"))
    found = shrink(task(copy.deepcopy(dense)), "units 0.5x", scope="group", statistics=False)
    return dense, found


def test_nothing_pruned_is_a_ratio_of_one_and_the_same_schedule(pruned):
    dense, _ = pruned
    cost = sizes(task(dense), task(copy.deepcopy(dense)))
    assert cost.ratio == 1 and not cost.theoretical
    found = arms(dense, way(warmup=0.5), cost, TUNE, seed=1)
    assert found["scratch-b"].way.step == found["scratch-e"].way.step == way(warmup=0.5).step


@pytest.mark.parametrize(("epochs", "dense", "pruned"), [(160, 1000, 290), (12, 345, 100), (7, 13, 13), (5, 19, 4)])
def test_scratch_b_spends_no_more_than_the_dense_training_and_less_than_an_epoch_less(epochs, dense, pruned):
    longer = scratch_b(TrainStep(epochs=epochs), Sizes(dense, pruned).ratio).epochs
    whole, each = spent(dense, 50, epochs), spent(pruned, 50, 1)
    assert whole - each < spent(pruned, 50, longer) <= whole
    assert spent(dense, 50, epochs) == 3 * dense * 50 * epochs


def test_the_ratio_is_exact_where_floats_are_not():
    # 10 * 0.7 / 0.1 is 69.99... in floating point
    assert scratch_b(TrainStep(epochs=10), Sizes(7, 1).ratio).epochs == 70
    assert scratch_b(TrainStep(epochs=100), Fraction(29, 10) * Fraction(10, 29) * Fraction(23, 20)).epochs == 115


def test_drops_of_the_rate_and_warm_up_keep_their_place():
    step = TrainStep(epochs=8, lr=0.4, schedule="step", warmup=2.0)
    longer = scratch_b(step, Fraction(5, 2))
    assert (longer.epochs, longer.warmup) == (20, 5.0)
    short = [rate(step, i, 8 * 10, 10) for i in range(80)]
    long = [rate(longer, i, 20 * 10, 10) for i in range(200)]
    for value in (0.4, 0.04, 0.004):
        first = [next(i for i, r in enumerate(rates) if abs(r - value) < 1e-12) for rates in (short, long)]
        assert first[1] == pytest.approx(2.5 * first[0], abs=2.5)
    assert scratch_b(step, Fraction(5, 2), most=2.0).epochs == 16
    assert scratch_b(step, Fraction(3, 2), most=2.0).epochs == 12


def test_costs_are_those_of_convolutions_by_hand_and_half_the_widths_cost_a_quarter_inside():
    whole, half = (sizes(task(fresh(0, w)), task(fresh(0, w))).dense for w in ((4, 8, 8), (2, 4, 4)))
    inner = 64 * 9 * (4 * 8 + 8 * 8)
    assert whole == 64 * 9 * 3 * 4 + inner + 8 * 3
    assert half == 64 * 9 * 3 * 2 + inner // 4 + 4 * 3
    assert inner % 4 == 0


def test_surgery_and_counting_agree_on_the_architecture(pruned):
    dense, found = pruned
    cost = sizes(task(dense), task(found.model))
    assert [m.out_channels for m in found.model if isinstance(m, nn.Conv2d)] == [2, 4, 4]
    assert (cost.dense, cost.pruned) == (found.before["macs"], found.after["macs"])


def test_costs_under_masks_are_theoretical_and_by_the_weights_left(pruned):
    dense, _ = pruned
    masks = Masks({n: torch.rand(m.shape, generator=stream(0, n)) < 0.4 for n, m in Masks.dense(dense).items()})
    cost = sizes(task(dense), task(dense), masks)
    by_hand = sum(int(m.sum()) * (64 if m.dim() == 4 else 1) for m in masks.values())
    assert cost.theoretical and cost.pruned == by_hand


def test_new_weights_share_shapes_and_nothing_else_and_statistics_are_fresh(pruned):
    _, found = pruned
    new, inherited = scratch(found.model, 3), found.model.state_dict()
    assert {n: t.shape for n, t in new.state_dict().items()} == {n: t.shape for n, t in inherited.items()}
    assert all(not torch.equal(t, inherited[n]) for n, t in new.state_dict().items())
    for layer in new:
        if isinstance(layer, nn.BatchNorm2d):
            assert bool((layer.running_mean == 0).all()) and bool((layer.running_var == 1).all())
            assert int(layer.num_batches_tracked) == 0 and bool((layer.weight == 1).all())
        if isinstance(layer, nn.Conv2d):
            assert not bool(layer.bias.any())


def test_new_weights_follow_the_seed_and_leave_the_generator_as_it_was():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, again, other = (scratch(fresh(), seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(t, again[n]) for n, t in one.items())
    assert not torch.equal(one["0.weight"], other["0.weight"])
    wide = scratch(nn.Sequential(nn.Conv2d(64, 96, 3)), 0)[0].weight
    assert float(wide.detach().double().std()) == pytest.approx((2 / (96 * 9)) ** 0.5, rel=0.02)


def test_the_arms_differ_in_what_they_should(pruned):
    dense, found = pruned
    cost = sizes(task(dense), task(found.model))
    start = original(found.model, fresh(), found.shrunk)
    every = arms(found.model, way(), cost, TUNE, seed=1, initial=start)
    assert list(every) == ["fine-tune", "scratch-e", "scratch-b", "fine-tune-b", "original-b"]
    steps = {name: arm.way.step for name, arm in every.items()}
    assert steps["fine-tune"] == TUNE and steps["scratch-e"] == way().step
    assert steps["scratch-b"] == steps["fine-tune-b"] == steps["original-b"]
    assert steps["scratch-b"] == replace(way().step, epochs=int(2 * cost.dense / cost.pruned))
    same = {name: arm.net.state_dict()["3.weight"] for name, arm in every.items()}
    assert torch.equal(same["fine-tune"], same["fine-tune-b"]) and torch.equal(same["scratch-e"], same["scratch-b"])
    assert not torch.equal(same["fine-tune"], same["scratch-e"])
    assert torch.equal(same["original-b"], start.state_dict()["3.weight"])


def test_the_original_weights_are_those_of_the_slices_that_stayed(pruned):
    _, found = pruned
    start, whole = original(found.model, fresh(), found.shrunk), fresh().state_dict()
    kept = found.shrunk[0].kept
    inner = whole["3.weight"][kept["3.weight"][0]][:, kept["3.weight"][1]]
    assert inner.shape == (4, 2, 3, 3) and torch.equal(start.state_dict()["3.weight"], inner)
    assert not torch.equal(found.model.state_dict()["3.weight"], inner)
    for other in ((4, 8, 12), (8, 4, 8)):
        with pytest.raises(ModelError, match="do not fit"):
            original(found.model, fresh(0, other), found.shrunk)


def test_a_trained_arm_begins_with_a_new_optimizer_stays_as_it_was_and_is_read_again(pruned, tmp_path):
    dense, found = pruned
    arm = arms(found.model, way(), sizes(task(dense), task(found.model)), TUNE, seed=1)["fine-tune"]
    before = copy.deepcopy(arm.net.state_dict())
    net = trained(arm, tmp_path)
    assert all(torch.equal(t, before[n]) for n, t in arm.net.state_dict().items()) and not net.training
    assert load_state(tmp_path)["step"] == 3  # one epoch of three batches, not those of the dense training too
    by_hand = copy.deepcopy(found.model)
    train_to(by_hand, replace(way(), step=TUNE), tmp_path / "by hand")
    assert all(torch.equal(t, by_hand.state_dict()[n]) for n, t in net.state_dict().items())
    stamp = (tmp_path / "state.pt").stat().st_mtime_ns
    assert all(torch.equal(t, net.state_dict()[n]) for n, t in trained(arm, tmp_path).state_dict().items())
    assert (tmp_path / "state.pt").stat().st_mtime_ns == stamp


def test_masks_cut_new_weights_too_and_hold(pruned, tmp_path):
    dense, _ = pruned
    masks = Masks({n: torch.rand(m.shape, generator=stream(0, n)) < 0.4 for n, m in Masks.dense(dense).items()})
    cost = sizes(task(dense), task(dense), masks)
    for name, arm in arms(dense, way(epochs=1), cost, TUNE, seed=1, masks=masks).items():
        masks.check(arm.net)
        if name == "scratch-e":
            masks.check(trained(arm, tmp_path))


def test_what_cannot_be_compared_is_refused(pruned):
    dense, found = pruned
    with pytest.raises(UsageError, match="the other order"):
        sizes(task(found.model), task(dense))
    with pytest.raises(UsageError, match="costs 0"):
        Sizes(5, 0)
    with pytest.raises(UsageError, match="ratio of 0.5"):
        scratch_b(TrainStep(), Fraction(1, 2))
    with pytest.raises(UsageError, match="bound of 0.5"):
        scratch_b(TrainStep(), Fraction(2), most=0.5)
    with pytest.raises(UsageError, match="no schedule of the dense training"):
        arms(found.model, None, Sizes(2, 1), TUNE, seed=0)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    with pytest.raises(ModelError, match=r"`1` \(Own\)"):
        scratch(nn.Sequential(nn.Linear(2, 2), Own()), 0)
