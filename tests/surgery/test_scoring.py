"""Scores of units against sums over the very weights that go with each, found one by one."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.surgery.zoo import ARCHITECTURES
from torch import nn

from secateur.core.errors import ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import parameters
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.criteria.flap import Flap
from secateur.criteria.taylor_filter import TaylorFilter
from secateur.surgery import analyse
from secateur.surgery.scoring import how, unit_scores, unscored

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export:UserWarning")

# A residual network, branches joined, heads, and tensors that lose rows and columns (square or tied).
NETWORKS = ["resnet_basic", "densenet", "vit_fused", "lstm_classifier", "tied_lm"]


@functools.cache
def case(name):
    model, example = ARCHITECTURES[name]()
    return model.eval(), analyse(model.eval(), example)


def random_scores(model, seed=0):
    random = stream(seed, "test", "scores")
    return {name: torch.randn(p.shape, generator=random, dtype=torch.float64) for name, p in parameters(model).items()}


def weights_of(model, scores, group, unit, where):
    """The scores of all weights that go with a unit, each once, by painting them on masks."""
    every = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in model.named_parameters()}
    painted = {}
    for (name, d), index in zip(group.tensors, group.index, strict=True):
        if name in every and (where == "all" or (d == 0) == (where == "producers")):
            own = first[id(every[name])]
            mask = painted.setdefault(own, torch.zeros_like(scores[own], dtype=torch.bool))
            mask.movedim(d, 0)[index[unit]] = True
    return torch.cat([scores[own][mask] for own, mask in painted.items()]) if painted else None


EXPECTED = {
    "sum": torch.sum, "mean": torch.mean, "max": torch.max, "l2": torch.linalg.vector_norm,
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("reduce", EXPECTED)
def test_every_weight_of_a_unit_counts_once(name, reduce):
    model, analysis = case(name)
    scores = random_scores(model)
    for where in ("all", "producers", "consumers"):
        found = unit_scores(analysis, scores, reduce, where=where, missing="leave")
        for group in analysis.groups:
            for unit in range(0, len(group), max(1, len(group) // 3)):
                expected = weights_of(model, scores, group, unit, where)
                assert (expected is None) == (group.name not in found)
                if expected is not None:
                    torch.testing.assert_close(found[group.name][unit], EXPECTED[reduce](expected), rtol=1e-10, atol=0)


def test_the_networks_hold_what_the_identity_is_about():
    """Some unit loses rows and columns of one tensor, and some tensor stands under two names."""
    groups = case("lstm_classifier")[1].groups
    assert any(len({name for name, _ in g.tensors}) < len(g.tensors) for g in groups)
    model, analysis = case("tied_lm")
    shared = {n for n, _ in model.named_parameters(remove_duplicate=False)} - {n for n, _ in model.named_parameters()}
    assert shared and any(name in shared for g in analysis.groups for name, _ in g.tensors)


@pytest.mark.parametrize("normalize", ["mean", "max", "l2", "standard"])
def test_scale_within_a_group(normalize):
    model, analysis = case("resnet_basic")
    scores = random_scores(model)
    plain, found = unit_scores(analysis, scores), unit_scores(analysis, scores, "sum", normalize)
    measures: dict[str, Callable[[Any], Any]] = {
        "mean": lambda s: s.abs().mean(),
        "max": lambda s: s.abs().amax(),
        "l2": lambda s: s.norm(),
        "standard": lambda s: s.std(),
    }
    for name, score in found.items():
        assert float(measures[normalize](score)) == pytest.approx(1)
        assert torch.equal(score.argsort(), plain[name].argsort())
    if normalize == "standard":
        assert all(abs(float(score.mean())) < 1e-12 for score in found.values())
    louder = unit_scores(analysis, {name: 7 * s for name, s in scores.items()}, "sum", normalize)
    assert all(torch.allclose(louder[name], found[name]) for name in found)
    equal = {name: torch.zeros_like(s) for name, s in scores.items()}
    assert not any(bool(s.any()) for s in unit_scores(analysis, equal, "sum", normalize).values())


def mlp():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = [(torch.randn(4, 5).double(), torch.randint(3, (4,))) for _ in range(3)]
    return net, Task(net, nn.functional.cross_entropy, data), analyse(net, data[0][0])


def test_criteria_of_whole_filters_are_read_as_their_own_scores():
    """A gate on each unit: the mean over examples of the slope of the loss along it."""
    net, task, analysis = mlp()
    scores = TaylorFilter(normalize=False)(task, Masks.dense(net))
    found = unit_scores(analysis, scores, **how("taylor_filter"), missing="leave")
    gate = torch.ones(8, dtype=torch.float64, requires_grad=True)
    total = torch.zeros(8, dtype=torch.float64)
    inputs, targets = (torch.cat(parts) for parts in zip(*task.data, strict=True))
    first, rest = list(net)[0], nn.Sequential(*list(net)[1:])
    for i in range(12):
        loss = nn.functional.cross_entropy(rest(first(inputs[i : i + 1]) * gate), targets[i : i + 1])
        total += torch.autograd.grad(loss, gate)[0].abs() / 12
    torch.testing.assert_close(found["0.weight"], total)
    assert sorted(found) == ["0.weight", "2.weight"]


def test_criteria_of_inputs_are_read_where_units_are_used():
    net, task, analysis = mlp()
    found = unit_scores(analysis, Flap()(task, Masks.dense(net)), **how("flap"))
    hidden = torch.cat([nn.Sequential(*list(net)[:2])(x) for x, _ in task.data]).detach()
    expected = hidden.var(0) * net.get_parameter("2.weight").detach().square().sum(0)
    torch.testing.assert_close(found["0.weight"], expected)
    assert how("magnitude") == {"reduce": "sum", "where": "all"}


def test_half_precision_adds_up_in_float64():
    net, _, analysis = mlp()
    scores = {name: torch.full_like(p, 0.1, dtype=torch.float16) for name, p in parameters(net).items()}
    found = unit_scores(analysis, scores)["0.weight"]
    assert found.dtype == torch.float64
    expected = (5 + 1 + 6) * float(torch.tensor(0.1, dtype=torch.float16))
    assert all(math.isclose(float(s), expected, rel_tol=1e-15) for s in found)


def test_groups_without_scores_are_named_or_left_out_with_the_reason():
    _, _, analysis = mlp()
    one = {"4.weight": torch.ones(3, 6)}
    with pytest.raises(ModelError, match="group '0.weight' can be scored: there are no scores for `0.weight`"):
        unit_scores(analysis, one)
    assert sorted(unit_scores(analysis, one, missing="leave")) == ["2.weight"]
    assert list(unscored(analysis, one)) == ["0.weight"]
    assert sorted(unscored(analysis, one, "producers")) == ["0.weight", "2.weight"]


def test_scores_that_do_not_fit_are_refused():
    _, _, analysis = mlp()
    with pytest.raises(UsageError, match="'0.wieght', which is no tensor. Did you mean '0.weight'"):
        unit_scores(analysis, {"0.wieght": torch.ones(8, 5)})
    with pytest.raises(UsageError, match=r"`0.weight` have shape \(5, 8\), the tensor \(8, 5\)"):
        unit_scores(analysis, {"0.weight": torch.ones(5, 8)})
    with pytest.raises(ModelError, match="1 of 40 scores of `0.weight` are NaN"):
        unit_scores(analysis, {"0.weight": torch.full((8, 5), 1.0).index_put((torch.tensor(1), torch.tensor(1)),
                                                                           torch.tensor(math.nan))})  # fmt: skip
