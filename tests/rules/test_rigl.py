"""RigL against a plain rendering of its card; counts, values and optimizer state at every update."""

import math

import pytest
import torch
from torch import nn

from secateur.core.allocations import ByCost, Uniform
from secateur.core.budget import keep_for
from secateur.core.choose import choose
from secateur.core.errors import BudgetError, ModelError, SecateurError, UsageError
from secateur.core.hold import Hold
from secateur.core.masks import Masks
from secateur.core.names import parameters
from secateur.core.run import Run
from secateur.core.sockets import Rule
from secateur.core.streams import stream
from secateur.data import Loader, Split
from secateur.engine.binding import table_of, value_of
from secateur.engine.loop import Training
from secateur.engine.optimize import rate
from secateur.engine.recipe import TrainStep
from secateur.rules.rigl import Rigl
from secateur.testing.rules_contract import check_rule


def data(dtype=torch.float64):
    random = stream(0, "data")
    x = torch.randn(12, 6, generator=random, dtype=torch.float64)
    return Loader(Split(x, torch.arange(12) % 3), 4, shuffle=True, dtype=dtype)


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()


class Watched(Rigl):
    """Writes down weights, masks and state before and after every update, and the gradients it saw."""

    diary = []

    def before_step(self, run):
        weights = {name: w.detach().clone() for name, w in run.weights().items()}
        slopes = {name: run.dense_gradient(name).clone() for name in run.masks}
        state = momenta(run)
        old = run.masks
        super().before_step(run)
        if run.masks is not old:
            after = {name: w.detach().clone() for name, w in run.weights().items()}
            self.diary.append((run.step, old, run.masks, weights, after, slopes, state, momenta(run)))


def momenta(run):
    state = run.optimizer.state
    return {n: [v.clone() for v in state.get(w, {}).values() if v.dim()] for n, w in run.weights().items()}


def train(rule, epochs=8, masks=None, **options):
    step = TrainStep(epochs=epochs, rules=(rule,) if rule else (), **{"lr": 0.1, **options})
    training = Training(net(), data(), step, masks=masks)
    Watched.diary.clear()
    return training.model, training.fit()


def turned(weight, mask, slope, share):
    """An update by the card, entry by entry."""
    places = range(weight.numel())
    w, m, g = (t.reshape(-1).tolist() for t in (weight.abs(), mask, slope.abs()))
    count = math.floor(share * sum(m))
    kept = sorted((i for i in places if m[i]), key=lambda i: -w[i])[: sum(m) - count]
    grown = sorted((i for i in places if i not in kept), key=lambda i: -g[i])[:count]
    new = torch.zeros(weight.numel(), dtype=torch.bool)
    new[kept + grown] = True
    return new.reshape(weight.shape)


OPTIMIZERS = [
    {"weight_decay": 0.05, "nesterov": True, "clip": 0.5},
    {"optimizer": "adam", "lr": 0.02},
    {"optimizer": "adamw", "lr": 0.02, "weight_decay": 0.5},
    {"optimizer": "rmsprop", "lr": 0.01},
    {"accumulate": 2},
]


@pytest.mark.parametrize("options", OPTIMIZERS, ids=["sgd", "adam", "adamw", "rmsprop", "accumulate"])
def test_every_update_is_the_one_of_the_paper(options):
    """Drop by magnitude, grow by gradient, values and state of all that stays, zero for all that comes."""
    rule = Watched(sparsity=0.6, alpha=0.5, every=2, stop=0.9)
    _, masks = train(rule, **options)

    total = 8 * math.ceil(3 / options.get("accumulate", 1))
    last = 0.9 * total
    grown = 0
    assert [day[0] for day in Watched.diary] == list(range(2, round(last), 2))
    assert len(Watched.diary) == rule.updates(total)
    for step, old, new, before, after, slopes, was, became in Watched.diary:
        share = 0.25 * (1 + math.cos(math.pi * step / last))
        assert old.counts() == new.counts()
        for name, w in before.items():
            assert torch.equal(new[name], turned(w, old[name], slopes[name], share))
            stays, comes = old[name] & new[name], new[name] & ~old[name]
            assert torch.equal(after[name][stays], w[stays])
            assert not after[name][~stays].any()
            for one, other in zip(was[name], became[name], strict=True):
                assert torch.equal(other[stays], one[stays]) and not other[~stays].any()
            grown += int(comes.sum())
    assert grown > 20
    assert masks.kept == keep_for(0.6, masks.total)


def test_nothing_dense_is_kept_between_updates():
    """Gradients, weights and optimizer state are zero at all zeros after every step; the rule remembers nothing."""

    class Looks(Rigl):
        def after_step(self, run):
            assert run.state(self) == {}
            for name, w in run.weights().items():
                gone = ~run.masks[name]
                assert w.grad is None
                assert not w.detach()[gone].any()
                state = run.optimizer.state.get(w, {})
                assert all(not value[gone].any() for value in state.values() if value.dim())

    train(Looks(sparsity=0.7, every=3), optimizer="adam", lr=0.01, weight_decay=0.1)


def test_the_optimizer_skips_the_step_of_an_update():
    """Card, algorithm 3: with no zero moved it is static training that skips those steps, to the bit."""
    model, masks = train(Rigl(sparsity=0.6, alpha=1e-9, every=5), epochs=8, momentum=0.9, weight_decay=0.01)

    static, optimizer = net(), None
    masks.apply_(static)
    optimizer = torch.optim.SGD(static.parameters(), 0.1, 0.9, weight_decay=0.01)
    step, done = TrainStep(epochs=8, lr=0.1), 0
    with masks.hold(static, optimizer):
        for epoch in range(8):
            for x, y in data().epoch(epoch):
                optimizer.param_groups[0]["lr"] = rate(step, done, 24, 3)
                optimizer.zero_grad()
                nn.functional.cross_entropy(static(x), y).backward()
                if not (0 < done < 18 and done % 5 == 0):
                    optimizer.step()
                done += 1
    assert all(torch.equal(p, parameters(static)[name]) for name, p in parameters(model).items())


def test_growth_at_zero_changes_no_output_and_only_the_drops_do():
    """Card test (c)."""
    train(Watched(sparsity=0.6, alpha=0.5, every=2))
    x = data().split.x

    changed = 0
    for _, old, new, before, after, *_ in Watched.diary:
        moved, dropped = net(), net()
        for name, p in parameters(moved).items():
            if name in before:
                p.data.copy_(after[name])
                parameters(dropped)[name].data.copy_(before[name] * (old[name] & new[name]))
        assert torch.equal(moved(x), dropped(x))
        changed += sum(int((old[name] & ~new[name]).sum()) for name in old)
    assert changed > 20


def test_the_share_falls_by_a_cosine():
    """Card test (b)."""
    rule = Rigl(alpha=0.3, stop=0.75)

    assert rule.share(0, 4000) == 0.3
    assert rule.share(1500, 4000) == pytest.approx(0.15, abs=1e-15)
    assert rule.share(3000, 4000) == pytest.approx(0.0, abs=1e-15)
    assert rule.share(4000, 4000) == pytest.approx(0.0, abs=1e-15)


class Three(nn.Sequential):
    """LeNet-300-100 without the non-linearities, which do not matter here."""

    def __init__(self):
        super().__init__(nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10))


@pytest.mark.parametrize(("sparsity", "wanted"), [(0.9, (0.07957, 0.23019, 1.0)), (0.98, (0.01539, 0.04453, 0.3674))])
def test_the_first_zeros_are_shared_out_by_erdos_renyi(sparsity, wanted):
    """Card test (d)."""
    model = Three()
    run = begun(Rigl(sparsity=sparsity), model)

    for (name, mask), density in zip(run.masks.items(), wanted, strict=True):
        places = mask.numel()  # a whole number of weights, and the card rounds its densities
        assert abs(run.masks.counts()[name] - density * places) <= 1 + 6e-6 * places
    assert run.masks.kept == keep_for(sparsity, 266_200)
    run.masks.check(model)


def begun(rule, model, masks=None, **more):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    run = Run(model, optimizer, Hold(masks or Masks.dense(model), model, optimizer, hooks=False), 100, 10, **more)
    run.rules = (rule,)
    rule.begin(run)
    return run


def test_the_one_place_with_a_gradient_is_grown():
    """Card test (e)."""
    model = nn.Linear(5, 4)
    start = Masks({"weight": torch.arange(20).reshape(4, 5) % 2 == 0})
    run = begun(rule := Rigl(sparsity=0.5, alpha=0.1999, every=2), model, start)
    model.weight.data.copy_(torch.arange(1.0, 21.0).reshape(4, 5) * start["weight"])
    model.weight.grad = torch.zeros(4, 5)
    model.weight.grad[2, 1] = -1e-12
    model.bias.grad = torch.ones(4)
    run.step = 2

    rule.before_step(run)

    assert math.floor(rule.share(2, 100) * 10) == 1
    wanted = start["weight"].clone()
    wanted[0, 0], wanted[2, 1] = False, True
    assert torch.equal(run.masks["weight"], wanted)
    assert model.weight.grad is None and model.bias.grad is None
    assert run.notes["rigl/grown"] == 1


def test_a_weight_dropped_and_grown_again_keeps_value_and_momentum():
    model = nn.Linear(5, 4)
    start = Masks({"weight": torch.arange(20).reshape(4, 5) % 2 == 0})
    run = begun(rule := Rigl(sparsity=0.5, alpha=0.1999, every=2), model, start)
    model.weight.data.copy_(torch.arange(1.0, 21.0).reshape(4, 5) * start["weight"])
    run.optimizer.state[model.weight]["momentum_buffer"] = torch.full((4, 5), 3.0) * start["weight"]
    model.weight.grad = torch.zeros(4, 5)
    model.weight.grad[0, 0] = 7.0  # the smallest weight has the largest gradient
    run.step = 2

    rule.before_step(run)

    assert torch.equal(run.masks["weight"], start["weight"])
    assert model.weight[0, 0] == 1.0
    assert run.optimizer.state[model.weight]["momentum_buffer"][0, 0] == 3.0


def test_random_growth_draws_from_all_places_that_are_not_kept():
    """The same drops; what grows does not follow the gradient, and is another set for every seed and step."""
    train(Watched(sparsity=0.6, alpha=0.5, every=2, grow="random"))

    other = 0
    for step, old, new, before, _, slopes, *_ in Watched.diary:
        share = 0.25 * (1 + math.cos(math.pi * step / 18))
        assert old.counts() == new.counts()
        for name, w in before.items():
            by_gradient = turned(w, old[name], slopes[name], share)
            count = math.floor(share * int(old[name].sum()))
            kept = torch.zeros_like(old[name]).reshape(-1)
            kept[
                torch.where(old[name], w.abs(), -1.0)
                .reshape(-1)
                .argsort(descending=True)[: int(old[name].sum()) - count]
            ] = 1
            assert bool((new[name] | ~kept.reshape(w.shape)).all())
            other += int((new[name] ^ by_gradient).sum())
    assert other > 0


def test_zeros_it_came_with_are_the_first_ones():
    scores = {n: torch.rand(m.shape, generator=stream(5, n)) for n, m in Masks.dense(net()).items()}
    given = choose(scores, keep_for(0.6, 144), allocation=Uniform())

    train(rule := Watched(sparsity=0.6, every=2), masks=given)

    assert Watched.diary[0][1].digest == given.digest
    with pytest.raises(
        BudgetError, match=r"came with 58 of 144 weights, and sparsity = 0.5 keeps 72. Set `sparsity = "
    ):
        train(Rigl(sparsity=0.5), masks=given)
    assert rule.sparsity == 0.6


@pytest.mark.parametrize("kept", range(1, 12))
def test_the_sparsity_that_is_advised_is_accepted(kept):
    masks = Masks({"weight": torch.arange(12).reshape(3, 4) < kept})
    with pytest.raises(BudgetError) as error:
        begun(Rigl(sparsity=0.01), nn.Linear(4, 3), masks)

    advised = float(str(error.value).partition("Set `sparsity = ")[2].partition("`")[0])

    assert begun(Rigl(sparsity=advised), nn.Linear(4, 3), masks).masks is masks


def test_a_shorter_run_has_updates_too():
    rule = Rigl()

    assert [rule.interval(total) for total in (20, 400, 32_000)] == [2, 30, 100]
    assert [rule.updates(total) for total in (20, 400, 32_000)] == [7, 9, 239]


def test_what_it_says_in_the_metrics(tmp_path):
    seen = []
    step = TrainStep(epochs=8, rules=(Rigl(sparsity=0.7, every=4),))
    Training(net(), data(), step, watch=seen.append).fit()

    rows = [row for row in seen if "rigl/grown" in row]
    assert [row["step"] for row in rows] == [5, 9, 13, 17]  # the step of an update is the one after 4, 8, 12, 16
    assert all(row["kept"] == keep_for(0.7, 144) and row["rigl/silent_units"] >= 0 for row in rows)


def test_bfloat16_autocast_and_channels_last():
    random = stream(1, "images")
    x = torch.randn(12, 4, 6, 6, generator=random)
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 3)
    )
    step = TrainStep(epochs=6, amp=True, channels_last=True, rules=(Rigl(sparsity=0.6, alpha=0.5, every=2),))

    masks = Training(model, Loader(Split(x, torch.arange(12) % 3), 4), step).fit()

    assert masks.kept == keep_for(0.6, masks.total)
    masks.check(model)


@pytest.mark.parametrize("rule", [Rigl(sparsity=0.7, alpha=0.9, every=1, stop=1.0), Rigl(sparsity=0.5, grow="random")])
def test_other_options_keep_the_contract(rule):
    check_rule(rule, ["tanh_mlp", "tied", "lstm"], epochs=4)


def test_no_gradient_and_no_finite_gradient_are_told():
    run = begun(rule := Rigl(sparsity=0.5, every=2), nn.Linear(5, 4))
    run.step = 2
    with pytest.raises(ModelError, match="`weight` has no gradient"):
        rule.before_step(run)
    run.model.weight.grad = torch.full((4, 5), torch.nan)
    with pytest.raises(ModelError, match="scores of `weight` are NaN"):
        rule.before_step(run)


def test_tensors_that_are_not_trained_are_refused():
    model = net()
    model[0].weight.requires_grad_(False)

    with pytest.raises(UsageError, match=r"rigl: `0.weight` cannot be trained .* `skip = \['0.weight'\]`"):
        begun(Rigl(), model)


def test_a_run_too_short_for_its_interval_is_refused():
    with pytest.raises(UsageError, match="every is 18, but zeros may move only in the first 18 of 24 steps"):
        train(Rigl(sparsity=0.6, every=18))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sparsity": 1.0}, BudgetError, r"sparsity is 1.0; it must be in \(0, 1\)"),
        ({"sparsity": 0.0}, BudgetError, "leave the rule out"),
        ({"alpha": 0.0}, UsageError, "alpha is 0.0"),
        ({"alpha": 1.0}, UsageError, "alpha is 1.0"),
        ({"every": 0}, UsageError, "every is 0"),
        ({"stop": 0.0}, UsageError, "stop is 0.0"),
        ({"stop": 1.5}, UsageError, "stop is 1.5"),
        ({"allocation": ByCost()}, UsageError, "needs MACs"),
    ],
)
def test_values_out_of_range_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        Rigl(**options)


def test_a_budget_that_empties_layers_is_refused():
    with pytest.raises(SecateurError, match="would empty whole layers"):
        begun(Rigl(sparsity=0.999), net())


def test_recipes_can_hold_it():
    rule = Rigl(sparsity=0.5, every=7, grow="random", allocation=Uniform())

    assert value_of(Rule, table_of(rule), "rule") == rule
    assert value_of(Rule, "rigl", "rule") == Rigl()
