"""SET against a plain rendering of its card: what goes sign by sign, what comes, and what stays."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from secateur.core.allocations import ByCost, Uniform
from secateur.core.budget import keep_for
from secateur.core.choose import choose
from secateur.core.errors import BudgetError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import parameters
from secateur.core.sockets import Rule
from secateur.core.streams import stream
from secateur.data import Loader, Split
from secateur.engine.binding import table_of, value_of
from secateur.engine.loop import Training
from secateur.engine.recipe import TrainStep
from secateur.rules.set import Set, erdos_renyi, removed
from secateur.testing.rules_contract import check_rule


def data():
    random = stream(0, "data")
    x = torch.randn(12, 6, generator=random, dtype=torch.float64)
    return Loader(Split(x, torch.arange(12) % 3), 4, shuffle=True, dtype=torch.float64)


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def momenta(run):
    state = run.optimizer.state
    return {n: [v.clone() for v in state.get(w, {}).values() if v.dim()] for n, w in run.weights().items()}


class Watched(Set):
    """Writes down what an evolution changes."""

    diary = []

    def after_step(self, run):
        before = {name: w.detach().clone() for name, w in run.weights().items()}
        old, was = run.masks, momenta(run)
        super().after_step(run)
        if run.masks is not old:
            after = {name: w.detach().clone() for name, w in run.weights().items()}
            self.diary.append((run.step, old, run.masks, before, after, was, momenta(run)))


def train(rule, epochs=6, masks=None, model=None, **options):
    step = TrainStep(epochs=epochs, rules=(rule,) if rule else (), **{"lr": 0.1, **options})
    training = Training(model or net(), data(), step, masks=masks)
    Watched.diary.clear()
    return training.model, training.fit()


def gone(weight, mask, zeta):
    """The card's step 3, entry by entry, for a zeta that is an exact binary fraction or checked by hand."""
    w, m = weight.reshape(-1).tolist(), mask.reshape(-1).tolist()
    plus = sorted((i for i in range(len(w)) if m[i] and w[i] > 0), key=lambda i: w[i])
    minus = sorted((i for i in range(len(w)) if m[i] and w[i] < 0), key=lambda i: -w[i])
    out = torch.zeros(len(w), dtype=torch.bool)
    out[plus[: math.floor(zeta * len(plus))] + minus[: math.floor(zeta * len(minus))]] = True
    return out.reshape(weight.shape)


OPTIMIZERS = [
    {"weight_decay": 0.05, "nesterov": True, "clip": 0.5},
    {"optimizer": "adamw", "lr": 0.02, "weight_decay": 0.5},
    {"optimizer": "rmsprop", "lr": 0.01},
    {"accumulate": 2},
]


@pytest.mark.parametrize("options", OPTIMIZERS, ids=["sgd", "adamw", "rmsprop", "accumulate"])
def test_every_evolution_is_the_one_of_the_paper(options):
    """Card tests (a), (b), (d): counts, the removed set sign by sign, and distinct places that were empty before."""
    _, masks = train(Watched(sparsity=0.6, zeta=0.25), **options)

    each = math.ceil(3 / options.get("accumulate", 1))
    assert [day[0] for day in Watched.diary] == [each * n for n in range(1, 6)]  # none after the last epoch
    grown = 0
    for _, old, new, before, after, was, became in Watched.diary:
        assert old.counts() == new.counts()
        for name, w in before.items():
            out, comes, stays = gone(w, old[name], 0.25), new[name] & ~old[name], old[name] & new[name]
            assert torch.equal(old[name] & ~new[name], out)
            assert int(comes.sum()) == int(out.sum())
            assert torch.equal(after[name][stays], w[stays])
            assert bool((after[name][comes] != 0).all()) and not after[name][~new[name]].any()
            for one, other in zip(was[name], became[name], strict=True):
                assert torch.equal(other[stays], one[stays]) and not other[~stays].any()
            grown += int(comes.sum())
    assert grown > 20
    assert masks.kept == keep_for(0.6, masks.total)


def test_what_goes_by_hand():
    """Card test (b) on a hand-made layer: two of nine positives, one of four negatives, no exact zero."""
    w = torch.tensor([[0.5, -0.1, 0.2, 0.0, 1.0, 0.1, -2.0], [0.7, 0.3, 0.9, -0.4, 0.6, 0.8, -0.3]])
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[:, 7:] = False

    out = removed(torch.cat([w, torch.zeros(2, 7)], 1), mask, Fraction(3, 10))

    assert out.nonzero().tolist() == [[0, 1], [0, 2], [0, 5]]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_layer_of_one_sign_or_of_few_weights_is_no_trouble(sign):
    w = sign * torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.0, 0.0]])
    mask = w != 0

    assert not removed(w, mask, Fraction(3, 10)).any()
    assert removed(w, mask, Fraction(1, 3)).nonzero().tolist() == [[0, 0]]
    assert not removed(w, torch.zeros_like(mask), Fraction(1, 2)).any()


@pytest.mark.parametrize("kept", range(13))
def test_no_more_goes_than_can_come(kept):
    w = torch.randn(3, 4, generator=stream(0, "w"))
    mask = torch.arange(12).reshape(3, 4) < kept

    out = removed(w, mask, Fraction(9, 10))

    assert int(out.sum()) <= 12 - kept
    assert bool((mask | ~out).all())


def test_nothing_moves_with_a_share_of_zero():
    """Card test (c): static sparse training, to the bit."""
    model, masks = train(Set(sparsity=0.6, zeta=0.0), weight_decay=0.01)

    static, again = train(None, masks=masks, weight_decay=0.01)

    assert masks.digest == again.digest and masks.kept == keep_for(0.6, 144)
    assert all(torch.equal(p, parameters(static)[name]) for name, p in parameters(model).items())


@pytest.mark.parametrize("shape", [(300, 784), (16, 8, 3, 3)])
def test_the_density_of_epsilon(shape):
    """Card test (e): within four standard deviations of the formula."""
    places = math.prod(shape)
    for epsilon in (1.0, 3.0, 11.0):
        chance = min(1.0, epsilon * sum(shape) / places)
        kept = erdos_renyi({"w": torch.empty(shape)}, epsilon, 7).kept
        assert abs(kept - chance * places) <= 4 * math.sqrt(places * chance * (1 - chance))


def test_a_large_epsilon_is_dense_and_a_tiny_one_is_refused():
    assert erdos_renyi({"w": torch.empty(30, 20)}, 12.0, 0).sparsity == 0
    with pytest.raises(BudgetError, match="epsilon = 1e-09 leaves `w` without any weight"):
        erdos_renyi({"w": torch.empty(30, 20)}, 1e-9, 0)


def test_epsilon_in_a_run_draws_other_zeros_for_another_seed():
    digests = set()
    for seed in (0, 1):
        step = TrainStep(epochs=4, rules=(Set(epsilon=1.0),))
        training = Training(net(), data(), step, seed=seed)
        masks = training.fit()
        assert 10 < masks.kept < 100
        assert masks.counts() == erdos_renyi({n: parameters(net())[n] for n in masks}, 1.0, seed).counts()
        digests.add(masks.digest)
    assert len(digests) == 2


def test_new_weights_are_drawn_from_a_normal_distribution():
    """Standard deviation ``spread``, within four of its own; all at zero when it is zero."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 400), nn.Tanh(), nn.Linear(400, 3)).double()
    train(Watched(sparsity=0.5, zeta=0.5, spread=0.02), model=model, epochs=3)
    values = torch.cat([day[4][n][day[2][n] & ~day[1][n]] for day in Watched.diary for n in day[1]])
    assert len(values) > 500
    assert float(values.std()) == pytest.approx(0.02, rel=4 / math.sqrt(2 * len(values)))
    assert abs(float(values.mean())) <= 4 * 0.02 / math.sqrt(len(values))

    train(Watched(sparsity=0.5, zeta=0.5, spread=0.0), epochs=3)
    assert all(not day[4][n][day[2][n] & ~day[1][n]].any() for day in Watched.diary for n in day[1])


def test_a_dense_tensor_stays_dense_and_zeros_it_came_with_stay_the_first():
    scores = {n: torch.rand(m.shape, generator=stream(5, n)) for n, m in Masks.dense(net()).items()}
    given = choose({"0.weight": scores["0.weight"]}, 40, allocation=Uniform())
    given = Masks({**given, "2.weight": torch.ones(3, 16, dtype=torch.bool)})

    _, masks = train(Watched(sparsity=56 / 144, zeta=0.5), masks=given)

    assert Watched.diary[0][1].digest == given.digest
    assert bool(masks["2.weight"].all()) and masks.counts() == given.counts()
    assert masks.digest != given.digest
    with pytest.raises(BudgetError, match="came with 88 of 144 weights, and sparsity = 0.5 keeps 72"):
        train(Set(sparsity=0.5), masks=given)


def test_the_interval_in_steps():
    train(Watched(sparsity=0.6, every=4), epochs=6)

    assert [day[0] for day in Watched.diary] == [4, 8, 12]  # of 18 steps: fewer than four would follow the fourth


def test_other_options_keep_the_contract():
    check_rule(Set(sparsity=0.5, zeta=0.9, every=1, spread=0.0), ["tanh_mlp", "residual_bn", "tied", "lstm"], epochs=4)


def test_tensors_that_are_not_trained_are_refused():
    model = net()
    model[2].weight.requires_grad_(False)

    with pytest.raises(UsageError, match=r"set: `2.weight` cannot be trained"):
        train(Set(), model=model)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sparsity": 1.0}, BudgetError, r"sparsity is 1.0; it must be in \(0, 1\)"),
        ({"epsilon": 0.0}, BudgetError, "epsilon is 0.0; it must be positive"),
        ({"epsilon": math.inf}, BudgetError, "epsilon is inf"),
        ({"zeta": 1.0}, UsageError, "zeta is 1.0"),
        ({"zeta": -0.1}, UsageError, "zeta is -0.1"),
        ({"every": 0}, UsageError, "every is 0"),
        ({"spread": -1.0}, UsageError, "spread is -1.0"),
        ({"allocation": ByCost()}, UsageError, "needs MACs"),
    ],
)
def test_values_out_of_range_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        Set(**options)


def test_recipes_can_hold_it():
    rule = Set(epsilon=11.0, every=7, allocation=Uniform())

    assert value_of(Rule, table_of(rule), "rule") == rule
    assert value_of(Rule, "set", "rule") == Set()
