"""Units that go: the target holds, by the lowest scores, and not with one unit more."""

import fnmatch
import functools
from typing import Any

import pytest
import torch
from tests.surgery.zoo import ARCHITECTURES
from torch import nn
from torch.nn import functional

from secateur.core.errors import BudgetError, ModelError, UsageError
from secateur.core.streams import stream
from secateur.surgery import analyse, shrink
from secateur.surgery.choosing import Goal, choose, parse_goal
from secateur.surgery.costs import Costs
from secateur.surgery.times import LayerTimes

# Copying a GraphModule makes torch warn of its own classes.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")


@functools.cache
def case(name):
    model, example = ARCHITECTURES[name]()
    analysis = analyse(model.eval(), example)
    return model, example, analysis, Costs(analysis)


def random_scores(analysis, seed):
    random = stream(seed, "test", "scores")
    return {g.name: torch.rand(len(g), generator=random, dtype=torch.float64) for g in analysis.groups}


def all_scores(scores, removal):
    gone = torch.cat([scores[name][units] for name, units in removal.items()])
    stay = torch.cat([s[[u for u in range(len(s)) if u not in removal.get(n, ())]] for n, s in scores.items()])
    return gone, stay


@pytest.mark.parametrize("name", ["resnet_basic", "densenet", "shufflenet_v2", "gqa_decoder"])
@pytest.mark.parametrize("to", ["params 50%", "macs 0.4x", "bytes 0.6x", "units 0.7x"])
def test_the_target_holds_and_fails_with_the_best_removed_unit_back(name, to):
    _, _, analysis, costs = case(name)
    goal = parse_goal(to)
    limit = goal.value * costs.at(goal.quantity, costs.gone({}))
    for seed in range(3):
        scores = random_scores(analysis, seed)
        removal = choose(analysis, scores, to, costs)
        gone, stay = all_scores(scores, removal)
        kept = costs.kept(removal)
        assert costs.at(goal.quantity, costs.gone(kept)) <= limit
        best = max(removal, key=lambda n: float(scores[n][removal[n]].max()))
        back = {**kept, best: kept[best] + 1}
        assert costs.at(goal.quantity, costs.gone(back)) > limit
        assert all(kept[n] >= 1 for n in kept)
        lone = {n for n, left in kept.items() if left == 1}  # the last unit of a group stays whatever it scores
        others = {n: s for n, s in scores.items() if n not in lone}
        if others:
            _, stay = all_scores(others, {n: u for n, u in removal.items() if n in others})
            assert gone.max() < stay.min()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_removal_is_one_that_shrink_takes(seed):
    model, example = ARCHITECTURES["densenet"]()
    analysis = analyse(model.eval(), example)
    costs = Costs(analysis)
    removal = choose(analysis, random_scores(analysis, seed), "params 0.3x", costs)
    expected = costs.params(costs.kept(removal))
    small = shrink(model, example, removal, analysis=analysis)
    assert small.params == (costs.params(), expected) and expected <= 0.3 * costs.params()


def test_groups_lose_the_same_share_when_asked():
    _, _, analysis, costs = case("resnet_basic")
    removal = choose(analysis, random_scores(analysis, 3), "units 60%", costs, scope="group")
    for group in analysis.groups:
        assert abs(len(removal[group.name]) / len(group) - 0.4) <= 1.5 / len(group)


def test_minimum_multiple_and_equal_hold():
    _, _, analysis, costs = case("resnet_basic")
    scores = random_scores(analysis, 4)
    size = {g.name: len(g) for g in analysis.groups}
    kept = costs.kept(choose(analysis, scores, "macs 0.5x", costs, minimum=0.45))
    assert all(kept[n] >= 0.45 * size[n] for n in kept)
    kept = costs.kept(choose(analysis, scores, "macs 0.5x", costs, minimum=3, multiple=4))
    assert all(kept[n] == size[n] or kept[n] % 4 == 0 for n in kept) and min(kept.values()) >= 4
    names = sorted(n for n in size if size[n] == max(size.values()))
    glob = next(g for g in ("*conv1*", "*", names[0][:8] + "*") if _alike(g, size))
    matched = fnmatch.filter(size, glob)
    kept = costs.kept(choose(analysis, scores, "macs 0.5x", costs, equal=[glob]))
    assert len({kept[n] for n in matched}) == 1 and kept[matched[0]] < size[matched[0]]


def _alike(glob, size):
    matched = fnmatch.filter(size, glob)
    return len(matched) > 1 and len({size[n] for n in matched}) == 1


def test_heads_count_as_the_slices_they_are():
    """A unit of 12 slices fills multiples of 4 by itself; to a multiple of 24, heads go in pairs."""
    _, _, analysis, costs = case("gqa_decoder")
    scores = random_scores(analysis, 5)
    wide = max(analysis.groups, key=lambda g: g.index[0].shape[1])
    each = wide.index[0].shape[1]
    assert each > 1
    alone = choose(analysis, scores, "units 50%", costs, multiple=each)
    for group in analysis.groups:
        width = (len(group) - len(alone.get(group.name, ()))) * group.index[0].shape[1]
        assert group.name not in alone or width % each == 0


def test_skipped_groups_and_groups_without_scores_stay_whole():
    _, _, analysis, costs = case("resnet_basic")
    scores = random_scores(analysis, 6)
    first, second, *_ = names = [g.name for g in analysis.groups]
    assert first not in choose(analysis, scores, "macs 0.6x", costs, skip=[first])
    assert set(choose(analysis, scores, "macs 0.9x", costs, only=[first, second])) <= {first, second}
    assert set(choose(analysis, {n: scores[n] for n in names[2:]}, "macs 0.6x", costs)) <= set(names[2:])
    assert choose(analysis, scores, "params 100%", costs) == {}


class Shared(nn.Module):
    """Rows of one layer in two groups, of which either can go whole, and not both."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(9, 2)

    def forward(self, x):
        x = functional.relu(self.body(x))
        one, other = x[:, :3], x[:, 3:]
        return self.head(torch.cat([one, one, other], 1))


def test_a_group_may_go_whole_where_another_stays():
    model, example = Shared(), torch.randn(2, 4)
    analysis = analyse(model, example)
    costs = Costs(analysis)
    assert sorted(len(g) for g in analysis.groups) == [3, 3]
    low, high = (g.name for g in analysis.groups)
    scores = {low: torch.arange(3.0), high: torch.arange(3.0) + 10}
    assert costs.kept(choose(analysis, scores, "units 2", costs)) == {low: 1, high: 1}
    removal = choose(analysis, scores, "units 1", costs, minimum=0)
    assert costs.kept(removal) == {low: 0, high: 1}
    assert shrink(model, example, removal).params[1] == costs.params(costs.kept(removal))
    with pytest.raises(BudgetError, match="without all units that may go 1 are left"):
        choose(analysis, scores, "units 0.1x", costs, minimum=0)
    with pytest.raises(BudgetError, match="without all units that may go 2 are left"):
        choose(analysis, scores, "units 1", costs)


def test_milliseconds_are_chosen_by_the_table_of_times():
    """With multiply-adds for a clock, a target in milliseconds is one in multiply-adds."""
    _, _, analysis, costs = case("resnet_basic")

    def clock(call):
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops() / 4  # a batch of two, two operations each

    timed = Costs(analysis, LayerTimes(clock=clock))
    scores = random_scores(analysis, 7)
    removal = choose(analysis, scores, f"ms {0.5 * costs.macs()}", timed)
    assert removal == choose(analysis, scores, "macs 50%", costs) == choose(analysis, scores, "latency 0.5x", timed)


def test_words_for_goals():
    assert parse_goal("Params  0.5x") == parse_goal("params 50 %") == parse_goal("params .5") == Goal("params", 0.5)
    assert parse_goal("params 1.2M") == parse_goal("params 1,200,000") == Goal("params", 1.2e6, False)
    assert parse_goal("bytes 5MB") == Goal("bytes", 5e6, False) and parse_goal("bytes 2KiB").value == 2048
    assert parse_goal("latency 0.5x") == Goal("ms", 0.5) and parse_goal("ms 0.5") == Goal("ms", 0.5, False)
    assert parse_goal("ms 3.5s").value == 3500 and str(parse_goal("macs 40%")) == "macs 0.4x"
    assert Goal("params", 0.58).limit(12_400_000) == 7_192_000
    for text, error, words in (("half", UsageError, "not understood"), ("speed 2x", UsageError, "no known quantity"),
                               ("params 5MB", UsageError, "takes no unit 'mb'"), ("params 120%", BudgetError, "share"),
                               ("macs 0x", BudgetError, "share"), ("params -1", UsageError, "not und")):  # fmt: skip
        with pytest.raises(error, match=words):
            parse_goal(text)


def test_what_cannot_be_met_says_how_far_it_goes():
    _, _, analysis, costs = case("resnet_basic")
    scores = random_scores(analysis, 8)
    least = costs.params({g.name: 1 for g in analysis.groups})
    with pytest.raises(BudgetError, match=f"`params 0.0001x` cannot be met.*{least:,} are left"):
        choose(analysis, scores, "params 0.01%", costs)
    assert costs.params(costs.kept(choose(analysis, scores, f"params {least}", costs))) == least


def test_wrong_options_are_named():
    _, _, analysis, costs = case("resnet_basic")
    scores = random_scores(analysis, 9)
    name = analysis.groups[0].name
    other = next(g.name for g in analysis.groups if len(g) != len(analysis.groups[0]))
    wrong: list[tuple[str, dict[str, Any]]] = [("no group matches 'nothing'", {"skip": ["nothing"]}),
                           ("no group matches 'nothing'", {"equal": ["nothing"]}),
                           ("cannot lose equally many", {"equal": ["*"]}),
                           ("name it once", {"equal": [name, name]}),
                           ("stays whole", {"equal": [name], "skip": [name]}),
                           ("minimum 1.5", {"minimum": 1.5}), ("multiple 0", {"multiple": 0})]  # fmt: skip
    for words, options in wrong:
        with pytest.raises(UsageError, match=words):
            choose(analysis, scores, "macs 0.5x", costs, **options)
    with pytest.raises(UsageError, match="its scores have shape"):
        choose(analysis, {**scores, name: scores[other]}, "macs 0.5x", costs)
    with pytest.raises(UsageError, match="no group 'nothing'"):
        choose(analysis, {"nothing": scores[name]}, "macs 0.5x", costs)
    with pytest.raises(ModelError, match="are NaN or infinite"):
        choose(analysis, {**scores, name: scores[name] / 0}, "macs 0.5x", costs)
    with pytest.raises(UsageError, match="another analysis"):
        choose(case("densenet")[2], {}, "macs 0.5x", costs)
