"""Top-KAST against a plain rendering of the paper, and what must stand still does."""

import pytest
import torch
from torch import nn

from secateur.core.allocations import ByCost, ErdosRenyi, Global
from secateur.core.budget import keep_for
from secateur.core.errors import BudgetError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import parameters
from secateur.core.select import top_mask
from secateur.core.sockets import Rule
from secateur.core.streams import stream
from secateur.data import Loader, Split
from secateur.engine.binding import table_of, value_of
from secateur.engine.loop import Training
from secateur.engine.recipe import TrainStep
from secateur.rules.topkast import Topkast
from secateur.testing.rules_contract import check_rule


def data():
    random = stream(0, "data")
    x = torch.randn(12, 6, generator=random, dtype=torch.float64)
    return Loader(Split(x, torch.arange(12) % 3), 4, shuffle=True, dtype=torch.float64)


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()


class Watched(Topkast):
    """Writes down theta, A, B and the optimizer's state after every step."""

    diary = []

    def after_step(self, run):
        used = {key: t.clone() for key, t in run.state(self).items()}
        super().after_step(run)
        theta = {key: t.clone() for key, t in run.state(self).items()}
        state = {n: [v.clone() for v in run.optimizer.state.get(w, {}).values()] for n, w in run.weights().items()}
        shown = {n: w.detach().clone() for n, w in run.weights().items()}
        self.diary.append((used, theta, state, shown))


def train(rule, epochs=4, masks=None, **options):
    step = TrainStep(epochs=epochs, rules=(rule,) if rule else (), **{"lr": 0.1, **options})
    training = Training(net(), data(), step, masks=masks)
    rule is None or Watched.diary.clear()
    return training.model, training.fit()


OPTIMIZERS = [
    {"weight_decay": 0.05, "nesterov": True, "clip": 0.5},
    {"optimizer": "adamw", "lr": 0.02, "weight_decay": 0.5},
    {"optimizer": "rmsprop", "lr": 0.01, "weight_decay": 0.05},
]


@pytest.mark.parametrize("options", OPTIMIZERS, ids=["sgd", "adamw", "rmsprop"])
def test_theta_outside_b_stands_still_to_the_bit(options):
    """Card test (d): no momentum, no weight decay; the state there is zero, so that newcomers start afresh."""
    train(Watched(sparsity=0.8, backward=0.6, every=2), **options)

    moved = 0
    for used, after, state, shown in Watched.diary:
        for name, weight in shown.items():
            old, new, learns = used[f"theta:{name}"], after[f"theta:{name}"], used[f"B:{name}"]
            assert torch.equal(old[~learns], new[~learns])
            moved += int((old != new)[learns].sum())
            for value in state[name]:
                assert value.dim() == 0 or (value[~after[f"B:{name}"]] == 0).all()
            assert torch.equal(weight, torch.where(after[f"A:{name}"], new, torch.zeros_like(new)))
    assert moved > 500


@pytest.mark.parametrize("allocation", [None, Global(), ErdosRenyi()])
def test_a_is_part_of_b_always(allocation):
    """Card test (e), and both are the largest weights of each tensor in exact numbers."""
    more = {} if allocation is None else {"allocation": allocation}
    _, masks = train(Watched(sparsity=0.83, backward=0.82, every=1, **more))

    total = masks.total
    for _, after, _, shown in Watched.diary:
        few = many = 0
        for name in shown:
            a, b, theta = (after[f"{kind}:{name}"] for kind in ("A", "B", "theta"))
            assert bool((b | ~a).all())
            assert torch.equal(a, top_mask(theta.abs(), int(a.sum())))
            few, many = few + int(a.sum()), many + int(b.sum())
        assert few == keep_for(0.83, total) and many >= keep_for(0.82, total)
    assert masks.kept == keep_for(0.83, total)


@pytest.mark.parametrize("penalty", [(0.0, 2), (0.01, 1), (0.01, 2)])
def test_all_weights_learn_when_backward_is_zero(penalty):
    """Card test (d): M = 1 - D. The paper by hand: gradient at theta on A, step of all of theta, with its penalty."""
    weight, power = penalty
    _, masks = train(rule := Watched(sparsity=0.75, backward=0.0, every=1, penalty=weight, power=power), momentum=0.0)

    theta, step = net(), TrainStep(epochs=4, lr=0.1)
    names = list(masks)
    params = parameters(theta)
    total, done = 12, 0
    from secateur.engine.optimize import rate

    for epoch in range(4):
        for x, y in data().epoch(epoch):
            counts = {n: int(Watched.diary[0][0][f"A:{n}"].sum()) for n in names}
            used = {n: top_mask(params[n].detach().abs(), counts[n]) for n in names}
            alpha = {n: (p.detach() * used[n] if n in used else p.detach()).requires_grad_() for n, p in params.items()}
            loss = nn.functional.cross_entropy(torch.func.functional_call(theta, alpha, (x,)), y)
            slopes = dict(zip(alpha, torch.autograd.grad(loss, list(alpha.values())), strict=True))
            point = {n: params[n].detach().clone().requires_grad_() for n in names}
            norm = sum((point[n].abs() ** power * torch.where(used[n], 1.0, 1 / 0.25)).sum() for n in names)
            extra = dict(zip(names, torch.autograd.grad(norm, list(point.values())), strict=True))
            with torch.no_grad():
                for n, p in params.items():
                    p -= rate(step, done, total, 3) * (slopes[n] + weight * extra.get(n, torch.zeros_like(p)))
            done += 1
            for n in names:
                torch.testing.assert_close(
                    Watched.diary[done - 1][1][f"theta:{n}"], params[n].detach(), rtol=0, atol=1e-13
                )
    assert rule.backward == 0.0


def test_with_nothing_pruned_it_is_plain_training():
    """D = 1: A and B are everything; equal to the bit."""
    plain, _ = train(None, weight_decay=0.01)

    model, masks = train(Topkast(sparsity=0.0, backward=0.0), weight_decay=0.01)

    assert masks.kept == masks.total
    assert all(torch.equal(w, model.state_dict()[name]) for name, w in plain.state_dict().items())


def test_only_b_learns_from_the_loss():
    """One step of SGD by hand: theta - lr * gradient on B, theta elsewhere."""
    train(Watched(sparsity=0.8, backward=0.5), epochs=1, momentum=0.0, schedule="constant")
    used, after, _, _ = Watched.diary[0]
    model = net()
    Masks({name: used[f"A:{name}"] for name in ("0.weight", "2.weight")}).apply_(model)
    x, y = next(data().epoch(0))

    nn.functional.cross_entropy(model(x), y).backward()

    for name, p in parameters(model).items():
        if f"theta:{name}" in used:
            theta = used[f"theta:{name}"] - 0.1 * p.grad * used[f"B:{name}"]
            torch.testing.assert_close(after[f"theta:{name}"], theta, rtol=0, atol=1e-15)


def test_averages_are_of_the_sparse_network():
    """An average over one step (decay 0.5 and its first update is a copy) never holds more than A's weights."""
    model, masks = train(Topkast(sparsity=0.8, backward=0.6, every=100), ema=0.5)

    masks.check(model)
    assert sum(int((parameters(model)[name] != 0).sum()) for name in masks) == masks.kept


def test_masks_it_came_with_are_lifted():
    half = Masks({name: torch.rand(m.shape) < 0.5 for name, m in Masks.dense(net()).items()})

    _, masks = train(Topkast(sparsity=0.3, backward=0.1), masks=half)

    assert masks.kept == keep_for(0.3, half.total) > half.kept


def test_tied_and_recurrent_weights_are_handled():
    """Weights are plain tensors at all times, so modules that read them in their own way see A too."""
    check_rule(Topkast(sparsity=0.6, backward=0.2, every=3, penalty=1e-3, power=1), ["tied", "lstm"], epochs=4)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sparsity": 1.0}, BudgetError, r"sparsity is 1.0; it must be in \[0, 1\)"),
        ({"sparsity": 0.5, "backward": 0.6}, BudgetError, "backward is 0.6"),
        ({"backward": -0.1}, BudgetError, "backward is -0.1"),
        ({"every": 0}, UsageError, "every is 0"),
        ({"penalty": -1.0}, UsageError, "penalty is -1.0"),
        ({"power": 3}, UsageError, "power is 3; it must be 1 or 2"),
        ({"allocation": ByCost()}, UsageError, "needs MACs"),
    ],
)
def test_values_out_of_range_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        Topkast(**options)


def test_recipes_can_hold_it():
    rule = Topkast(sparsity=0.5, backward=0.25, penalty=1e-5, power=1)

    assert value_of(Rule, table_of(rule), "rule") == rule
