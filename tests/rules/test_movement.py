"""Movement pruning against autograd through the mask, and a run written out by hand."""

import math

import pytest
import torch
from torch import nn

from secateur.core.allocations import ByCost, Global, Lamp
from secateur.core.budget import keep_for
from secateur.core.errors import BudgetError, ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import parameters
from secateur.core.select import top_mask
from secateur.core.sockets import Rule
from secateur.core.streams import stream
from secateur.data import Loader, Split
from secateur.engine.binding import table_of, value_of
from secateur.engine.loop import Training
from secateur.engine.optimize import rate
from secateur.engine.recipe import TrainStep
from secateur.rules.movement import Movement
from secateur.testing.rules_contract import check_rule

NAMES = ["0.weight", "2.weight"]


def data(kind=torch.float64, shape=(6,)):
    x = torch.randn(12, *shape, generator=stream(0, "data"), dtype=kind)
    return Loader(Split(x, torch.arange(12) % 3), 4, shuffle=True, dtype=kind)


def net(kind=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(kind)


class Watched(Movement):
    """Writes down gradients, scores, masks and dense weights of every step."""

    diary = []

    def before_step(self, run):
        state = run.state(self)
        slopes = {name: w.grad.clone() for name, w in run.weights().items()}
        old = {key: value.clone() for key, value in state.items()}
        super().before_step(run)
        passed = {name: w.grad.clone() for name, w in run.weights().items()}
        self.diary.append({"slopes": slopes, "old": old, "passed": passed})

    def after_step(self, run):
        super().after_step(run)
        self.diary[-1]["new"] = {key: value.clone() for key, value in run.state(self).items()}
        self.diary[-1]["shown"] = {name: w.detach().clone() for name, w in run.weights().items()}
        self.diary[-1]["kept"] = [
            value[~run.state(self)[f"mask:{name}"]]
            for name, w in run.weights().items()
            for value in run.optimizer.state[w].values()
            if isinstance(value, torch.Tensor) and value.dim()
        ]


def train(rule, epochs=6, model=None, loader=None, **options):
    step = TrainStep(epochs=epochs, rules=(rule,) if rule else (), **{"lr": 0.1, **options})
    training = Training(model or net(), loader or data(), step)
    Watched.diary.clear()
    return training.model, training.fit()


def test_the_gradient_of_the_scores_is_that_of_the_mask():
    """Card test (a): by autograd through ``W * M`` it is ``dL/d(W * M) * W``, and the weights get it on M alone."""
    train(Watched(0.6, scores="sgd", rate=1.0), lr=0.1, momentum=0.0, schedule="constant")

    model, done = net(), 0
    for epoch in range(5):
        for x, y in data().epoch(epoch):
            seen, done = Watched.diary[done], done + 1
            weights = {n: seen["old"][f"theta:{n}"].requires_grad_() for n in NAMES}
            masks = {n: seen["old"][f"mask:{n}"].double().requires_grad_() for n in NAMES}
            biases = {n: p.detach() for n, p in parameters(model).items() if n not in NAMES}
            model_at = {**biases, **{n: weights[n] * masks[n] for n in NAMES}}
            loss = nn.functional.cross_entropy(torch.func.functional_call(model, model_at, (x,)), y)
            by_mask = torch.autograd.grad(loss, list(masks.values()), retain_graph=True)
            by_weight = torch.autograd.grad(loss, list(weights.values()))
            if done > 1:
                break  # biases have moved: the first step alone has those of the fresh network
            for name, slope, own in zip(NAMES, by_mask, by_weight, strict=True):
                moved = seen["old"][f"score:{name}"] - seen["new"][f"score:{name}"]
                torch.testing.assert_close(moved, slope, rtol=1e-12, atol=1e-15)
                torch.testing.assert_close(seen["passed"][name], own, rtol=1e-12, atol=1e-15)
    for seen in Watched.diary[:16]:
        for name in NAMES:
            theta, mask = seen["old"][f"theta:{name}"].detach(), seen["old"][f"mask:{name}"]
            moved = seen["old"][f"score:{name}"] - seen["new"][f"score:{name}"]
            torch.testing.assert_close(moved, seen["slopes"][name] * theta, rtol=1e-10, atol=1e-15)
            assert torch.equal(seen["passed"][name], seen["slopes"][name] * mask)


def test_scores_add_up_to_minus_the_sum_of_products():
    """The card's formula, over the whole run, at the rates of the schedule."""
    rule = Watched(0.5, scores="sgd", rate=0.3, settle=1.0, stop=1.0)
    train(rule, schedule="cosine")

    step = TrainStep(epochs=6, lr=0.1)
    for name in NAMES:
        sums = torch.zeros_like(Watched.diary[0]["slopes"][name])
        for t, seen in enumerate(Watched.diary):
            sums -= 0.3 * rate(step, t, 18, 3) / 0.1 * seen["slopes"][name] * seen["old"][f"theta:{name}"]
        torch.testing.assert_close(Watched.diary[-1]["new"][f"score:{name}"], sums, rtol=1e-12, atol=1e-15)


def way_at(t, total):
    """The card's cubic curve between a tenth and eight tenths of the run."""
    first, last = round(0.1 * total), round(0.8 * total)
    return 1 - (1 - min(1.0, max(0.0, (t - first) / (last - first)))) ** 3


def noise(name, like):
    return 1e-30 * torch.rand(like.shape, generator=stream(0, "movement", name), dtype=torch.float64)


def by_hand(soft, epochs=6):
    """The whole method in plain torch, SGD without momentum for the weights and torch's own Adam for the scores."""
    model, total, done = net(), 3 * epochs, 0
    own, step = parameters(model), TrainStep(epochs=epochs, lr=0.1, momentum=0.0)
    scores = {n: noise(n, own[n]).requires_grad_() for n in NAMES}
    adam = torch.optim.Adam(scores.values(), 0.05)
    masks = {n: torch.ones_like(own[n], dtype=torch.bool) for n in NAMES}
    for epoch in range(epochs):
        for x, y in data().epoch(epoch):
            eta = rate(step, done, total, 3)
            at = {n: (p.detach() * masks.get(n, 1)).requires_grad_() for n, p in own.items()}
            loss = nn.functional.cross_entropy(torch.func.functional_call(model, at, (x,)), y)
            slopes = dict(zip(at, torch.autograd.grad(loss, list(at.values())), strict=True))
            if done < round(0.9 * total):
                adam.zero_grad()
                penalty = sum(s.sigmoid().mean() for s in scores.values()) / 2
                (3.0 * way_at(done, total) * penalty * soft).backward()
                for n, s in scores.items():
                    s.grad += slopes[n] * own[n].detach()
                adam.param_groups[0]["lr"] = 0.05 * eta / 0.1
                adam.step()
            with torch.no_grad():
                for n, p in own.items():
                    p -= eta * slopes[n] * masks.get(n, 1)
            done += 1
            if done <= round(0.9 * total):
                masks = {n: kept(s.detach(), soft, way_at(done, total)) for n, s in scores.items()}
    return own, masks


def kept(score, soft, way):
    """The mask of one tensor at one point of the curve; hard shares a common count out by largest remainders."""
    if soft:
        return top_mask(score, max(int((score.sigmoid() > 0.4 * way).sum()), math.ceil(0.02 * score.numel())))
    third, left = divmod(keep_for(0.75 * way if way < 1 else 0.75, 144), 3)
    return top_mask(score, 2 * third + (left > 0) if score.numel() == 96 else third + (left == 2))


@pytest.mark.parametrize("soft", [True, False], ids=["soft", "hard"])
def test_the_run_is_that_of_the_paper_by_hand(soft):
    """Masks, weights and biases of the whole run."""
    options = {"threshold": 0.4, "penalty": 3.0, "least": 0.02, "variant": "soft"} if soft else {"sparsity": 0.75}
    model, masks = train(Movement(rate=0.05, **options), momentum=0.0)

    own, found = by_hand(soft)
    for name, weight in own.items():
        wanted = weight.detach() * found.get(name, 1)
        torch.testing.assert_close(model.get_parameter(name).detach(), wanted, rtol=0, atol=1e-11)
        assert name not in found or torch.equal(masks[name], found[name])
    assert 0.02 < masks.sparsity < 0.98


def test_pruned_weights_stand_still_and_their_scores_move():
    """Card test (b), with momentum and decay; the optimizer's state there is zero; values return as they were."""
    train(Watched(0.7, rate=0.1, stop=0.6), weight_decay=0.1, nesterov=True, clip=1.0, epochs=12)

    still = moved = back = 0
    for seen in Watched.diary[4:32]:
        for name in NAMES:
            out = ~seen["old"][f"mask:{name}"]
            assert torch.equal(seen["old"][f"theta:{name}"][out], seen["new"][f"theta:{name}"][out])
            still += int(out.sum())
            moved += int((seen["old"][f"score:{name}"] != seen["new"][f"score:{name}"])[out].sum())
            again = out & seen["new"][f"mask:{name}"]
            back += int(again.sum())
            assert torch.equal(seen["shown"][name][again], seen["old"][f"theta:{name}"][again])
            assert torch.equal(seen["shown"][name], seen["new"][f"theta:{name}"] * seen["new"][f"mask:{name}"])
        assert not any(value.any() for value in seen["kept"])
    assert still > 500 and moved > 0.99 * still and back > 0


@pytest.mark.parametrize(("sparsity", "counts"), [(0.75, (24, 12)), (0.5, (48, 24)), (0.9, (10, 5)), (0.0, (96, 48))])
def test_exact_numbers_survive(sparsity, counts):
    """Card test (c): per tensor, ``int(v n)`` where that is whole."""
    _, masks = train(Movement(sparsity))

    assert tuple(masks.counts().values()) == counts
    assert masks.kept == keep_for(sparsity, masks.total)


def test_the_ramp_is_cubic_and_flat_at_both_ends():
    train(Watched(0.75, start=1 / 6, stop=2 / 3, settle=5 / 6), epochs=8)

    kept = [sum(int(seen["new"][f"mask:{n}"].sum()) for n in NAMES) for seen in Watched.diary]
    for t, found in enumerate(kept, 1):
        way = 1 - (1 - min(1.0, max(0.0, (t - 4) / 12))) ** 3
        assert found == keep_for(0.75 * way, 144)
    masks = [{n: seen["new"][f"mask:{n}"] for n in NAMES} for seen in Watched.diary]
    assert all(torch.equal(one[n], masks[-1][n]) for one in masks[19:] for n in NAMES)
    assert not all(torch.equal(one[n], masks[15][n]) for one in masks[12:15] for n in NAMES)


def test_one_threshold_for_all_tensors():
    _, masks = train(Watched(0.8, allocation=Global()))

    scores = torch.cat([Watched.diary[-1]["new"][f"score:{n}"].flatten() for n in NAMES])
    found = torch.cat([masks[n].flatten() for n in NAMES])
    assert int(found.sum()) == keep_for(0.8, 144)
    assert scores[found].min() >= scores[~found].max()


@pytest.mark.parametrize("scores", ["sgd", "adam"])
def test_the_sign_of_a_hidden_unit_does_not_matter(scores):
    """Card test (d): tanh is odd; ingoing and outgoing weights change sign, scores do not."""
    found = []
    for sign in (1.0, -1.0):
        model = net()
        with torch.no_grad():
            for tensor in (model[0].weight[3], model[0].bias[3:4], model[2].weight[:, 3]):
                tensor.mul_(sign)
        train(Watched(0.6, scores=scores), model=model)
        found.append({n: Watched.diary[-1]["new"][f"score:{n}"] for n in NAMES})

    for name in NAMES:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-9, atol=1e-16)


@pytest.mark.parametrize("options", [{"nesterov": True, "weight_decay": 0.1}, {"optimizer": "adamw", "lr": 0.01}])
def test_with_nothing_pruned_it_is_plain_training(options):
    """Card test (e), to the bit."""
    plain, _ = train(None, **options)
    model, masks = train(Movement(0.0), **options)

    assert masks.kept == masks.total
    assert all(torch.equal(w, model.state_dict()[name]) for name, w in plain.state_dict().items())


def test_weights_without_gradient_go_by_chance():
    """Inputs that are always 0 tie; which of their weights stay is drawn by the seed, not by the place."""
    x = torch.randn(12, 8, generator=stream(0, "data"), dtype=torch.float64)
    x[:, :7] = 0
    loader = Loader(Split(x, torch.arange(12) % 3), 4, dtype=torch.float64)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 3)).double()
        step = TrainStep(epochs=2, lr=0.1, rules=(Movement(0.75),), only=("0.weight",))
        found.append(Training(model, loader, step, seed=seed).fit()["0.weight"])

    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert (found[0][:, :7].sum(0) > 0).all()
    assert not found[0][:, :7].flatten()[: int(found[0][:, :7].sum())].all()


def test_soft_keeps_a_share_in_any_case_and_its_penalty_prunes():
    few = train(Movement(variant="soft", rate=0.5, penalty=1e4, threshold=0.45, least=0.1))[1]
    many = train(Movement(variant="soft", rate=0.5, penalty=0.0, threshold=0.45))[1]

    assert tuple(few.counts().values()) == (10, 5)
    assert many.kept > 2 * few.kept


def test_weights_that_are_not_trained_are_refused():
    model = net()
    model[0].weight.requires_grad_(False)
    with pytest.raises(ModelError, match=r"`0.weight` is not trained.*skip = \['0.weight'\]"):
        train(Movement(0.5), model=model)

    _, masks = train(Movement(0.5), model=model, skip=("0.weight",))
    assert dict(masks.counts()) == {"2.weight": 24}


def test_a_network_with_norms_in_mixed_precision():
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    )
    masks = Masks({n: torch.rand_like(m.float()) < 0.5 for n, m in Masks.dense(model).items()})
    masks.apply_(model)
    step = TrainStep(epochs=4, lr=0.01, optimizer="adamw", amp=True, clip=1.0, rules=(Movement(0.3),))

    found = Training(model, data(torch.float32, (2, 6, 6)), step, masks=masks).fit()
    assert found.kept == keep_for(0.3, found.total) > masks.kept  # what was pruned may return


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"sparsity": 1.0}, BudgetError, "sparsity is 1.0"),
        ({"sparsity": -0.1}, BudgetError, "sparsity is -0.1"),
        ({"sparsity": 0.5, "variant": "soft"}, UsageError, "sparsity is 0.5; it must be left out for soft"),
        ({"rate": 0.0}, UsageError, "rate is 0.0"),
        ({"start": 0.8, "stop": 0.8}, UsageError, "start is 0.8; it must be a share of the run, 0 <= start < stop"),
        ({"stop": 0.95, "settle": 0.9}, UsageError, "stop = 0.95 <= settle = 0.9"),
        ({"settle": 1.1}, UsageError, "settle = 1.1 <= 1"),
        ({"allocation": Lamp()}, UsageError, "allocation is Lamp"),
        ({"allocation": ByCost()}, UsageError, "allocation is ByCost"),
        ({"threshold": 0.0}, UsageError, "threshold is 0.0"),
        ({"penalty": -1.0}, UsageError, "penalty is -1.0"),
        ({"least": 1.5}, UsageError, "least is 1.5"),
    ],
)
def test_bad_options_are_refused(options, error, said):
    with pytest.raises(error, match=said):
        Movement(**options)


def test_a_budget_that_empties_layers_is_refused_at_once():
    with pytest.raises(BudgetError, match="would empty whole layers"):
        train(Movement(0.999))


def test_it_goes_into_a_recipe_and_back():
    hard, soft = Movement(0.95, scores="sgd", start=0.2), Movement(variant="soft", penalty=100.0)
    tables = [
        {"use": "movement", "sparsity": 0.95, "scores": "sgd", "start": 0.2},
        {"use": "movement", "variant": "soft", "penalty": 100.0},
    ]

    assert [table_of(hard), table_of(soft)] == tables
    assert [value_of(Rule, table, "rule") for table in tables] == [hard, soft]
    assert Movement() == Movement(0.9) and table_of(Movement()) == {"use": "movement"}


@pytest.mark.parametrize("rule", [
    Movement(0.6, scores="sgd", allocation=Global()),
    Movement(variant="soft", rate=0.5, penalty=20.0, threshold=0.45),
])  # fmt: skip
def test_other_variants_keep_the_contract(rule):
    check_rule(rule, epochs=4)
