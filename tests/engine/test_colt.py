# Layers come by name here, which the type checker cannot follow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""COLT: masks of networks trained on groups of classes, intersected round by round."""

import itertools

import pytest
import torch
from torch import nn

from secateur.core.errors import BudgetError, DataError, FileError, MaskError, ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.streams import stream
from secateur.data import Loader, Split
from secateur.engine.recipe import TrainStep
from secateur.engine.studies.colt import bounds, cyclic, examples_of, groups, headed, intersection
from secateur.engine.studies.rewind import Way, prune_and_rewind

CLASSES = 6


def split(classes=CLASSES, count=60):
    random = stream(0, "test", "colt")
    y = torch.arange(count) % classes
    return Split(torch.randn(count, 5, generator=random) + y[:, None], y)


def way(part=None, seed=0):
    data = split() if part is None else examples_of(split(), part)
    return Way(Loader(data, 10, shuffle=True, seed=seed), TrainStep(epochs=1, lr=0.1), seed)


def fresh(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential()
        net.add_module("fc1", nn.Linear(5, 20))
        net.add_module("norm", nn.BatchNorm1d(20))
        net.add_module("act", nn.ReLU())
        net.add_module("fc2", nn.Linear(20, 12))
        net.add_module("act2", nn.ReLU())
        net.add_module("head", nn.Linear(12, CLASSES))
        return net


def heads(parts, seed=0):
    return [headed(fresh(), "head", len(part), seed) for part in parts]


def study(folder, count=2, **options):
    parts = groups(CLASSES, count)
    options = {"head": "head", "rounds": 4, "share": 0.15, **options}
    return list(cyclic(heads(parts), [way(part) for part in parts], folder, **options))


def equal(one, two):
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_one_group_is_iterative_magnitude_pruning_to_the_bit(tmp_path):
    model = headed(fresh(), "head", CLASSES, 0)
    hidden = Masks.dense(model, only=["fc*.weight"])
    imp = list(
        prune_and_rewind(model, way(), tmp_path / "imp", rounds=3, share=0.15, scope="global", masks=hidden),
    )
    cycles = study(tmp_path / "colt", 1, rounds=4)
    assert all(equal(c.nets[0], r.net) and c.under == r.masks for c, r in zip(cycles, imp, strict=True))
    assert [c.masks for c in cycles[:-1]] == [r.masks for r in imp[1:]]


def test_groups_with_the_same_data_and_seed_agree_so_that_the_intersection_is_the_mask_of_each(tmp_path):
    part = range(0, 3)
    found = list(cyclic(heads([part] * 2), [way(part)] * 2, tmp_path, head="head", rounds=2))
    for cycle in found:
        assert equal(*cycle.nets)
        assert cycle.masks == cycle.own[0] == cycle.own[1]
    assert found[-1].masks.kept == 340 - round(0.15 * 340) - round(0.15 * (340 - round(0.15 * 340)))


@pytest.mark.parametrize("count", [2, 3])
def test_masks_are_nested_and_counts_stay_within_the_bounds_in_every_round(tmp_path, count):
    cycles = study(tmp_path, count)
    least = most = 340  # 5 x 20 and 20 x 12
    under = Masks.dense(fresh(), only=["fc*.weight"])
    for cycle in cycles:
        assert cycle.under == under
        gone = round(0.15 * under.kept)
        assert all(own.kept == under.kept - gone and (own & under) == own for own in cycle.own)
        assert (cycle.masks & under) == cycle.masks
        assert under.kept - count * gone <= cycle.masks.kept <= under.kept - gone
        least, most = least - count * round(0.15 * least), most - round(0.15 * most)
        low, high = bounds(0.15, count, cycle.number)
        rounding = count * cycle.number / 340  # each count is off by at most half a weight
        assert low - rounding <= cycle.masks.kept / 340 <= high + rounding
        under = cycle.masks
    assert least - 4 * count <= cycles[-1].masks.kept <= most + 4
    assert cycles[0].masks != cycles[0].own[0]  # the groups disagree somewhere, or nothing is tested


def test_what_every_network_prunes_is_smaller_than_what_it_keeps(tmp_path):
    for cycle in study(tmp_path, rounds=2):
        for net, own in zip(cycle.nets, cycle.own, strict=True):
            state = net.state_dict()
            gone = torch.cat([state[n].abs()[cycle.under[n] & ~m] for n, m in own.items()])
            kept = torch.cat([state[n].abs()[m] for n, m in own.items()])
            assert gone.max() <= kept.min()


def test_every_round_begins_at_the_initial_weights_to_the_bit(tmp_path):
    parts = groups(CLASSES, 2)
    untouched = Way(Loader(examples_of(split(), parts[0]), 10), TrainStep(epochs=1, lr=1e-30, weight_decay=0.0))
    cycles = list(cyclic(heads(parts), [untouched, way(parts[1])], tmp_path, head="head", rounds=3))
    before = heads(parts)[0].state_dict()
    for cycle in cycles:
        for name, value in cycle.nets[0].named_parameters():
            mask = cycle.under[name] if name in cycle.under else torch.ones(value.shape, dtype=torch.bool)
            # a rate of 1e-30 moves nothing but zeros, and those out of sight
            assert float((value.detach() - before[name])[mask].abs().max()) <= 1e-25 and not bool(value[~mask].any())
        # statistics of BatchNorm follow the data of one epoch only, not those of all rounds before
        assert int(cycle.nets[0].norm.num_batches_tracked) == len(untouched.loader)


def test_the_order_of_three_groups_changes_nothing(tmp_path):
    parts = groups(CLASSES, 3)
    found = []
    for order in ((0, 1, 2), (2, 0, 1)):
        chosen = [parts[i] for i in order]
        ways = [way(part) for part in chosen]
        place = tmp_path / "".join(map(str, order))
        found.append(list(cyclic(heads(chosen), ways, place, head="head", rounds=1))[-1])
    assert all(cycle.masks == found[0].masks for cycle in found)
    for own in itertools.permutations(found[0].own):
        assert intersection(own) == found[0].masks


def test_kinds_of_tensors_are_ranked_apart(tmp_path):
    (cycle,) = study(tmp_path, rounds=1, kinds={"fc1.*": 0.3})
    assert [own.counts() for own in cycle.own] == [{"fc1.weight": 70, "fc2.weight": 240}] * 2
    assert bool(cycle.masks["fc2.weight"].all())


def test_finished_rounds_are_read_and_a_stopped_study_goes_on(tmp_path):
    first = study(tmp_path / "one", rounds=1)
    stamps = {f: f.stat().st_mtime_ns for f in (tmp_path / "one").rglob("state.pt")}
    again, whole = study(tmp_path / "one", rounds=2), study(tmp_path / "two", rounds=2)
    assert {f: f.stat().st_mtime_ns for f in stamps} == stamps
    assert [c.masks for c in again] == [c.masks for c in whole] and again[0].masks == first[0].masks
    assert all(equal(a, b) for c, d in zip(again, whole, strict=True) for a, b in zip(c.nets, d.nets, strict=True))
    with pytest.raises(FileError, match="masks"):
        study(tmp_path / "one", share=0.2)


def test_classes_are_split_evenly_and_the_last_group_takes_the_rest():
    assert groups(10) == [range(0, 5), range(5, 10)]
    assert groups(7, 3) == [range(0, 2), range(2, 4), range(4, 7)]
    assert groups(3, 3) == [range(0, 1), range(1, 2), range(2, 3)]
    part = examples_of(split(), range(4, 6))
    whole = split()
    chosen = whole.y >= 4
    assert torch.equal(part.x, whole.x[chosen]) and torch.equal(part.y, whole.y[chosen] - 4)


def test_a_new_head_leaves_all_else_and_follows_the_seed():
    model = fresh()
    one, two = headed(model, "head", 4, 0), headed(model, "head", 4, 1)
    assert equal(model, fresh()) and equal(one, headed(model, "head", 4, 0))
    assert one.head.weight.shape == (4, 12) and not torch.equal(one.head.weight, two.head.weight)
    assert float(one.head.weight.detach().abs().max()) <= 12**-0.5
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in one.state_dict().items() if "head" not in n)


def test_what_cannot_be_meant_is_refused(tmp_path):
    with pytest.raises(UsageError, match="11 groups of 10 classes"):
        groups(10, 11)
    with pytest.raises(DataError, match="labels 6 to 7"):
        examples_of(split(), range(6, 8))
    with pytest.raises(UsageError, match="below 1/2"):
        study(tmp_path, share=0.5)
    with pytest.raises(UsageError, match="below 1/3"):
        bounds(0.4, 3, 1)
    with pytest.raises(UsageError, match="share=-0.1"):
        study(tmp_path, share=-0.1)
    with pytest.raises(UsageError, match=r"cover `head.weight`"):
        study(tmp_path, masks=Masks.dense(fresh()))
    with pytest.raises(UsageError, match="no linear layer"):
        headed(fresh(), "norm", 3, 0)
    with pytest.raises(UsageError, match="no layer 'heads'"):
        study(tmp_path, head="heads")
    with pytest.raises(UsageError, match="another kind"):
        study(tmp_path, kinds={"fc*": 0.1, "fc1.*": 0.2})
    with pytest.raises(UsageError, match="no tensor matches 'conv"):
        study(tmp_path, kinds={"conv*": 0.1})
    parts = groups(CLASSES, 2)
    with pytest.raises(UsageError, match="2 networks and 1 ways"):
        next(cyclic(heads(parts), [way(parts[0])], tmp_path, head="head", rounds=1))
    other = [heads(parts)[0], headed(fresh(1), "head", 3, 0)]
    with pytest.raises(ModelError, match=r"network 2 differs from the first in `fc1.weight`"):
        next(cyclic(other, [way(part) for part in parts], tmp_path, head="head", rounds=1))
    assert not any(tmp_path.iterdir())  # all of this is told before anything is trained


def test_a_layer_that_the_groups_do_not_agree_on_is_an_error():
    one, two = torch.tensor([True, True, False, False]), torch.tensor([False, False, True, True])
    rest = torch.ones(3, dtype=torch.bool)
    masks = [Masks({"a": one, "b": rest}), Masks({"a": two, "b": rest})]
    with pytest.raises(BudgetError, match="0 weights of `a` are kept by all 2 groups"):
        intersection(masks)
    assert intersection(masks, least=0).counts() == {"a": 0, "b": 3}
    with pytest.raises(BudgetError, match="3 weights of `b`"):
        intersection([Masks({"b": rest})], least=4)
    with pytest.raises(MaskError):
        intersection([masks[0], Masks({"a": one})])
    with pytest.raises(UsageError, match="no masks"):
        intersection([])
