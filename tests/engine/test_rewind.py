# Layers come by index here, which the type checker cannot follow.
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportAttributeAccessIssue=false
"""Rewinding: states at step k, trainings that go on from them under masks, twins, and iterative pruning."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from secateur.core.errors import BudgetError, FileError, UsageError
from secateur.core.masks import Masks
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.data import Loader, Split
from secateur.engine.checkpoint import load_state
from secateur.engine.loop import Training
from secateur.engine.recipe import TrainStep
from secateur.engine.studies.rewind import (
    Way,
    fewer,
    prune_and_rewind,
    reached,
    shuffled,
    train_from,
    train_to,
)
from secateur.probes.connectivity import Connectivity
from secateur.probes.learning_distance import LearningDistance
from secateur.probes.sparsity_overlap import SparsityOverlap

OPTIONS = {
    "momentum and decay": {"lr": 0.1, "weight_decay": 1e-2, "nesterov": True},
    "adam": {"optimizer": "adam", "lr": 0.01},
    "rmsprop": {"optimizer": "rmsprop", "lr": 0.01},
}


def split():
    random = stream(0, "test", "rewind")
    return Split(torch.randn(22, 5, generator=random), torch.randint(3, (22,), generator=random))


def way(order=0, seed=0, **options):
    """Three epochs of four batches, the last one smaller; dropout, BatchNorm and a falling rate."""
    step = TrainStep(epochs=3, **{"lr": 0.1, **options})
    return Way(Loader(split(), 6, shuffle=True, seed=order), step, seed)


def fresh(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 3))


def equal(one, two):
    a, b = one.state_dict(), two.state_dict()
    return all(torch.equal(a[n], b[n]) for n in a)


def some(model, share=0.5, seed=0):
    return Masks({n: torch.rand(m.shape, generator=stream(seed, n)) >= share for n, m in Masks.dense(model).items()})


def plain(options):
    """The whole training by the loop alone."""
    model = fresh()
    how = way(**options)
    Training(model, how.loader, how.step, Masks.dense(model), 0).fit()
    return model.eval()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("k", [0, 3, 4, 9, 12])
def test_a_training_rewound_to_a_step_with_nothing_pruned_ends_as_the_whole_training(tmp_path, options, k):
    model, how = fresh(), way(**options)
    if k < how.steps:
        train_to(model, how, tmp_path / "start", k)
        assert reached(tmp_path / "start") == k
        assert equal(model, fresh()) == (k == 0)
    else:
        train_to(model, how, tmp_path / "start")
        assert equal(model, plain(options))
    end = train_from(tmp_path / "start", fresh(), how, tmp_path / "end", Masks.dense(model))
    assert equal(end, plain(options))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("k", [0, 5])
def test_survivors_are_those_of_the_step_to_the_bit_and_pruned_weights_stay_zero(tmp_path, options, k):
    model, how = fresh(), way(**options)
    train_to(model, how, tmp_path / "start", k)
    masks = some(model)
    rewound = train_from(tmp_path / "start", fresh(), how, tmp_path / "round", masks, at=k)
    for name, p in rewound.state_dict().items():
        kept = masks[name] if name in masks else torch.ones(p.shape, dtype=torch.bool)
        assert torch.equal(p[kept], model.state_dict()[name][kept]) and not bool(p[~kept].any())
    end = train_from(tmp_path / "start", fresh(), how, tmp_path / "round", masks)
    masks.check(end)
    assert not equal(end, rewound)
    optimizer = load_state(tmp_path / "round")["optimizer"]["state"]
    names = list(dict(end.named_parameters()))
    for place, entries in optimizer.items():
        mask = masks.get(names[place]) if names[place] in masks else None
        for value in entries.values():
            if mask is not None and isinstance(value, torch.Tensor) and value.shape == mask.shape:
                assert not bool(value[~mask].any()) and bool(value[mask].any())


def test_a_state_with_momentum_forgets_that_of_pruned_weights(tmp_path):
    model, how = fresh(), way()
    train_to(model, how, tmp_path / "start", 5)
    masks = some(model)
    train_from(tmp_path / "start", fresh(), how, tmp_path / "round", masks, at=5)
    before, after = (load_state(tmp_path / n)["optimizer"]["state"][0]["momentum_buffer"] for n in ("start", "round"))
    assert bool(before[~masks["0.weight"]].any()) and not bool(after[~masks["0.weight"]].any())
    assert torch.equal(before[masks["0.weight"]], after[masks["0.weight"]])


def test_masks_are_nested_counts_are_exact_and_the_last_layer_loses_half_as_much(tmp_path):
    found = list(
        prune_and_rewind(fresh(), way(), tmp_path, rounds=4, share=0.3, shares={"4.*": 0.15}),
    )
    left = {"0.weight": 60, "4.weight": 36}
    for number, each in enumerate(found):
        assert each.number == number and each.masks.counts() == left
        each.masks.check(each.net)
        left = {"0.weight": left["0.weight"] - round(0.3 * left["0.weight"]),
                "4.weight": left["4.weight"] - round(0.15 * left["4.weight"])}  # fmt: skip
    for one, two in itertools.pairwise(found):
        assert (one.masks & two.masks) == two.masks
        for name, mask in two.masks.items():  # what went is smaller than what stayed
            size = one.net.state_dict()[name].abs()
            assert size[one.masks[name] & ~mask].max() <= size[mask].min()


def test_pruning_all_tensors_together_keeps_an_exact_count(tmp_path):
    found = list(prune_and_rewind(fresh(), way(), tmp_path, rounds=3, share=0.35, rewind=2, scope="global"))
    left = 96
    for each in found:
        assert each.masks.kept == left
        left -= round(0.35 * left)
    for one, two in itertools.pairwise(found):
        assert (one.masks & two.masks) == two.masks
        state = one.net.state_dict()
        gone = torch.cat([state[n].abs()[one.masks[n] & ~m] for n, m in two.masks.items()])
        kept = torch.cat([state[n].abs()[m] for n, m in two.masks.items()])
        assert gone.max() <= kept.min()


def test_a_share_of_nothing_trains_the_dense_network_again_to_the_bit(tmp_path):
    found = list(prune_and_rewind(fresh(), way(), tmp_path, rounds=2, share=0.0, rewind=3))
    assert all(equal(each.net, plain({})) for each in found)


def test_finished_rounds_are_read_and_a_stopped_study_goes_on_to_the_same_end(tmp_path):
    study = prune_and_rewind(fresh(), way(), tmp_path / "one", rounds=3, rewind=3)
    first = [next(study) for _ in range(2)]
    study.close()
    stamps = {f: f.stat().st_mtime_ns for f in (tmp_path / "one").rglob("state.pt")}
    again = list(prune_and_rewind(fresh(), way(), tmp_path / "one", rounds=3, rewind=3))
    assert {f: f.stat().st_mtime_ns for f in stamps} == stamps
    whole = list(prune_and_rewind(fresh(), way(), tmp_path / "two", rounds=3, rewind=3))
    assert all(equal(a.net, b.net) and a.masks == b.masks for a, b in zip(again, whole, strict=True))
    assert all(equal(a.net, b.net) for a, b in zip(first, whole, strict=False))


def test_a_round_stopped_in_the_middle_goes_on_bit_for_bit(tmp_path):
    model, how = fresh(), way()
    train_to(model, how, tmp_path / "start", 2)
    masks = some(model)
    for at in (4, 7):
        train_from(tmp_path / "start", fresh(), how, tmp_path / "parts", masks, at=at)
        assert reached(tmp_path / "parts") == at
    parts = train_from(tmp_path / "start", fresh(), how, tmp_path / "parts", masks)
    assert equal(parts, train_from(tmp_path / "start", fresh(), how, tmp_path / "whole", masks))


def test_twins_of_one_order_are_one_and_of_two_orders_lie_apart(tmp_path):
    how, other = way(), way(order=1)
    train_to(fresh(), how, tmp_path / "start", 4)
    masks = Masks.dense(fresh())
    same = [train_from(tmp_path / "start", fresh(), how, tmp_path / n, masks, seed=5) for n in ("a", "b")]
    task = Task(same[0], functional.cross_entropy, [(split().x, split().y)])
    reading = Connectivity(same[1])(task)
    assert (reading.value, reading.parts["distance"]) == (0.0, 0.0)
    twin = train_from(tmp_path / "start", fresh(), other, tmp_path / "c", masks, seed=5)
    assert Connectivity(twin)(task).parts["distance"] > 0
    dropout = train_from(tmp_path / "start", fresh(), how, tmp_path / "d", masks, seed=6)
    assert Connectivity(dropout)(task).parts["distance"] > 0


def test_twins_that_part_at_the_end_are_one(tmp_path):
    how = way()
    train_to(fresh(), how, tmp_path / "start")
    masks = Masks.dense(fresh())
    ends = [train_from(tmp_path / "start", fresh(), w, tmp_path / str(i), masks) for i, w in enumerate((how, way(1)))]
    reading = Connectivity(ends[1])(Task(ends[0], functional.cross_entropy, [(split().x, split().y)]))
    assert (reading.value, reading.parts["distance"]) == (0.0, 0.0)


def test_folders_hold_what_probes_read(tmp_path):
    first, last = list(prune_and_rewind(fresh(), way(), tmp_path, rounds=1, share=0.25))
    task = Task(last.net, functional.cross_entropy, [])
    overlap = SparsityOverlap(first.folder)(task, last.masks)
    assert overlap.parts["intersection"] == last.masks.kept and overlap.parts["union"] == first.masks.kept
    moved = LearningDistance(tmp_path / "start-0")(task, last.masks)
    before = fresh()
    by_hand = sum(
        float((p.detach() - q.detach()).mul(last.masks[n] if n in last.masks else 1).double().square().sum())
        for (n, p), q in zip(last.net.named_parameters(), before.parameters(), strict=True)
    )
    assert moved.value == pytest.approx(by_hand**0.5, rel=1e-6)


def test_random_masks_keep_the_counts_of_every_tensor_and_follow_the_seed():
    masks = some(fresh(), 0.7)
    one, two = shuffled(masks, 0), shuffled(masks, 1)
    assert one.counts() == two.counts() == masks.counts()
    assert one != two and one != masks and one == shuffled(masks, 0)


def test_what_has_been_pruned_is_not_ranked_again():
    net = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, 5.0, -3.0, 0.0], [0.0, 1.0, -2.0, 4.0]]))
    masks = Masks({"weight": torch.tensor([[False, True, True, False], [True, True, True, True]])})
    assert fewer(net, masks, 1 / 3)["weight"].tolist() == [[False, True, True, False], [False, False, True, True]]
    assert fewer(net, masks, 1 / 3, "global") == fewer(net, masks, 1 / 3)


def test_other_beginnings_and_wrong_numbers_are_refused(tmp_path):
    how = way()
    with pytest.raises(UsageError, match="steps 0 to 12"):
        train_to(fresh(), how, tmp_path / "x", 13)
    with pytest.raises(UsageError, match="ema"):
        way(ema=0.9)
    with pytest.raises(FileError, match="holds no state"):
        train_from(tmp_path / "nothing", fresh(), how, tmp_path / "y", Masks.dense(fresh()))
    list(prune_and_rewind(fresh(), how, tmp_path / "study", rounds=1, rewind=2))
    with pytest.raises(FileError, match="begun"):
        list(prune_and_rewind(fresh(1), how, tmp_path / "study", rounds=1, rewind=2))
    with pytest.raises(FileError, match="`lr`"):
        list(prune_and_rewind(fresh(), way(lr=0.2), tmp_path / "study", rounds=1, rewind=2))
    with pytest.raises(FileError, match="begun"):
        list(prune_and_rewind(fresh(), how, tmp_path / "study", rounds=1, rewind=3))
    with pytest.raises(FileError, match="masks"):
        list(prune_and_rewind(fresh(), how, tmp_path / "study", rounds=1, share=0.3, rewind=2))
    with pytest.raises(FileError, match="past step 1"):
        train_to(fresh(), how, tmp_path / "study" / "start-2", 1)
    masks = Masks.dense(fresh())
    for share in (1.0, -0.1):
        with pytest.raises(UsageError, match="share="):
            fewer(fresh(), masks, share)
    with pytest.raises(UsageError, match="no tensor matches 'head'"):
        fewer(fresh(), masks, 0.2, shares={"head": 0.1})
    with pytest.raises(BudgetError, match="would lose all"):
        fewer(fresh(), masks, 0.999)


def test_the_network_given_stays_as_it_is(tmp_path):
    model = fresh()
    list(prune_and_rewind(model, way(), tmp_path, rounds=1, rewind=1))
    assert equal(model, fresh()) and model.training == copy.deepcopy(fresh()).training
