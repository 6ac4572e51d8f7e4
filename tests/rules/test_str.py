"""STR against autograd through its formula, and thresholds that move as they should."""

import pytest
import torch
from torch import nn
from torch.nn.functional import relu

from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.sockets import Rule
from secateur.core.streams import stream
from secateur.data import Loader, Split
from secateur.engine.binding import table_of, value_of
from secateur.engine.loop import Training
from secateur.engine.optimize import rate
from secateur.engine.recipe import TrainStep
from secateur.rules.str import Str, soft_threshold
from secateur.testing.rules_contract import check_rule

NAMES = ["0.weight", "2.weight"]


def data(kind=torch.float64, shape=(6,)):
    x = torch.randn(12, *shape, generator=stream(0, "data"), dtype=kind)
    return Loader(Split(x, torch.arange(12) % 3), 4, shuffle=True, dtype=kind)


def net(kind=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(kind)


class Watched(Str):
    """Writes down thresholds and what is shown after every step."""

    diary = []

    def after_step(self, run):
        super().after_step(run)
        shown = {name: w.detach().clone() for name, w in run.weights().items()}
        theta = {name: run.state(self)[f"theta:{name}"].clone() for name in shown}
        self.diary.append((run.state(self)["thresholds"].clone(), shown, theta, dict(run.notes)))


def train(rule, epochs=4, loss=None, model=None, loader=None, **options):
    step = TrainStep(epochs=epochs, rules=(rule,) if rule else (), **{"lr": 0.1, "weight_decay": 0.05, **options})
    training = Training(model or net(), loader or data(), step, loss=loss)
    Watched.diary.clear()
    return training.model, training.fit()


def plainly(weight, s, g):
    """The card's formula."""
    return weight.sign() * relu(weight.abs() - g(s))


def test_threshold_of_nothing_and_of_everything():
    """Card test (a)."""
    w = torch.randn(5, 7, generator=stream(0, "w"), dtype=torch.float64)

    assert torch.equal(soft_threshold(w, torch.tensor(0.0)), w)
    assert not soft_threshold(w, w.abs().max()).any()


def test_it_is_the_proximal_operator_of_the_l1_norm():
    """Card test (e): the minimum of ``(x - w)^2 / 2 + alpha |x|`` over a fine grid."""
    grid = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    for w in torch.linspace(-2.5, 2.5, 21, dtype=torch.float64):
        for alpha in (0.0, 0.3, 1.0):
            best = grid[((grid - w).square() / 2 + alpha * grid.abs()).argmin()]
            found = soft_threshold(w, torch.tensor(alpha, dtype=torch.float64))
            assert abs(float(found - best)) <= 1e-4


GS = {"sigmoid": torch.sigmoid, "exp": torch.exp}
OPTIONS = [
    {"momentum": 0.0},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "schedule": "cosine", "warmup": 1.0},
]


@pytest.mark.parametrize("function", ["sigmoid", "exp"])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "momentum", "nesterov"])
def test_weights_and_thresholds_move_as_autograd_and_torch_move_them(function, options):
    """Card test (b), and all of the method: both gradients by autograd, one optimizer for W and s."""
    model, masks = train(Watched(-3.0, function=function), **options)

    dense, s = net(), [torch.tensor(-3.0, dtype=torch.float64, requires_grad=True) for _ in NAMES]
    step, done = TrainStep(epochs=4, **{"lr": 0.1, "weight_decay": 0.05, **options}), 0
    kinds = {"momentum": step.momentum, "nesterov": step.nesterov, "weight_decay": 0.05}
    optimizer = torch.optim.SGD([*dense.parameters(), *s], 0.1, **kinds)

    def shown():
        own = dict(dense.named_parameters())
        return {**own, **{n: plainly(own[n], s[i], GS[function]) for i, n in enumerate(NAMES)}}

    for epoch in range(4):
        for x, y in data().epoch(epoch):
            for group in optimizer.param_groups:
                group["lr"] = rate(step, done, 12, 3)
            nn.functional.cross_entropy(torch.func.functional_call(dense, shown(), (x,)), y).backward()
            assert all(float(one.grad.abs()) > 1e-6 for one in s)
            optimizer.step()
            optimizer.zero_grad()
            torch.testing.assert_close(Watched.diary[done][0], torch.stack(s).detach(), rtol=0, atol=1e-12)
            done += 1
    for name, weight in shown().items():
        torch.testing.assert_close(model.state_dict()[name], weight.detach(), rtol=0, atol=1e-12)
    assert 0.02 < masks.sparsity < 0.9


def test_the_network_at_the_end_is_the_one_in_training():
    """Card test (c): no difference; the shrunk weights stay, and the masks are their zeros."""
    model, masks = train(Watched(-2.5))

    s, shown, theta, _ = Watched.diary[-1]
    for i, name in enumerate(NAMES):
        weight = model.get_parameter(name).detach()
        assert torch.equal(weight, shown[name])
        torch.testing.assert_close(weight, plainly(theta[name], s[i], torch.sigmoid), rtol=0, atol=0)
        assert torch.equal(masks[name], theta[name].abs() > torch.sigmoid(s[i]))
    assert 0 < masks.kept < masks.total


@pytest.mark.parametrize("start", [-12.0, -3200.0])
def test_thresholds_without_gradient_decay(start):
    """Card test (d): ``s_t = s_0 (1 - lr * decay)^t``."""
    nothing = lambda output, target: 0 * output.sum()  # noqa: E731
    train(Watched(start, 0.5), momentum=0.0, schedule="constant", loss=nothing)

    for t, (s, *_) in enumerate(Watched.diary, 1):
        torch.testing.assert_close(s, torch.full_like(s, start * (1 - 0.1 * 0.5) ** t), rtol=1e-13, atol=0)


def test_weights_below_the_threshold_have_no_gradient_of_the_loss():
    """They stand still without decay, and others move."""
    train(Watched(-2.5, 0.1), weight_decay=0.0, momentum=0.0)

    still = moved = 0
    for (_, shown, before, _), (_, _, after, _) in zip(Watched.diary, Watched.diary[1:], strict=False):
        for name in NAMES:
            zero = shown[name] == 0
            assert torch.equal(before[name][zero], after[name][zero])
            still, moved = still + int(zero.sum()), moved + int((before[name] != after[name]).sum())
    assert still > 100 and moved > 100


def test_a_threshold_of_nothing_is_plain_training():
    """sigmoid(-3200) is 0 in float64 too; equal to the bit."""
    plain, _ = train(None)
    model, masks = train(Str(-3200.0, 1e-3))

    assert masks.kept == masks.total
    assert all(torch.equal(w, model.state_dict()[name]) for name, w in plain.state_dict().items())


def test_decay_drives_the_sparsity():
    found = [train(Str(-12.0, decay), epochs=20)[1].sparsity for decay in (0.005, 0.05, 0.1)]
    assert found == sorted(found) and found[0] < 0.1 < 0.3 < found[-1]


def test_frozen_thresholds_stand_still():
    train(Watched(-6.0, 0.1, freeze_at=0.5), epochs=30)

    zeros = [1 - sum(int((w != 0).sum()) for w in shown.values()) / 144 for _, shown, *_ in Watched.diary]
    first = next(i for i, share in enumerate(zeros) if share >= 0.5)
    assert 5 < first < 60
    assert all(torch.equal(s, Watched.diary[first][0]) for s, *_ in Watched.diary[first:])
    assert not torch.equal(Watched.diary[first - 1][0], Watched.diary[first][0])


def test_the_share_of_zeros_is_noted_after_every_epoch():
    train(Watched(-2.5))

    for number, (_, shown, _, notes) in enumerate(Watched.diary, 1):
        wanted = {f"sparsity/{name}": float((w == 0).double().mean()) for name, w in shown.items()}
        assert notes == (pytest.approx(wanted) if number % 3 == 0 else {})


def test_thresholds_are_float32_at_least_and_layers_may_vanish():
    _, masks = train(Watched(-0.1, 1.0), model=net(torch.bfloat16), loader=data(torch.bfloat16))
    assert Watched.diary[-1][0].dtype == torch.float32
    assert Watched.diary[-1][3]["sparsity/0.weight"] == 1.0
    assert masks.kept < masks.total / 10


def test_a_network_with_norms_in_mixed_precision():
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    )
    _, masks = train(
        Str(-3.0, 0.2),
        model=model,
        loader=data(torch.float32, (2, 6, 6)),
        amp=True,
        clip=1.0,
        optimizer="adamw",
        lr=0.01,
    )
    assert set(masks) == {"0.weight", "3.weight", "5.weight"} and 0 < masks.sparsity < 1
    assert bool((model[1].weight != 0).all())


def test_thresholds_that_nothing_moves_are_refused():
    with pytest.raises(UsageError, match=r"begin at 6.1e-06 \(initial = -12\).*Set `decay"):
        train(Str(), weight_decay=0.0)
    with pytest.raises(UsageError, match="begin at 0 "):
        train(Str(-3200.0, 0.0))
    train(Str(-3.0), weight_decay=0.0, epochs=1)  # the loss moves them


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"initial": float("nan")}, "initial is nan"),
        ({"initial": float("-inf")}, "initial is -inf"),
        ({"decay": -1.0}, "decay is -1.0"),
        ({"freeze_at": 1.0}, "freeze_at is 1.0"),
        ({"freeze_at": 0.0}, "freeze_at is 0.0"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        Str(**options)


def test_it_goes_into_a_recipe_and_back():
    rule = Str(-8.0, 1e-3, "exp", 0.9)
    table = {"use": "str", "initial": -8.0, "decay": 1e-3, "function": "exp", "freeze_at": 0.9}

    assert table_of(rule) == table and value_of(Rule, table, "rule") == rule
    assert table_of(Str()) == {"use": "str"}
    with pytest.raises(UsageError, match="sparsity"):
        value_of(Rule, {"use": "str", "sparsity": 0.9}, "rule")


@pytest.mark.parametrize("rule", [Str(-2.5, 0.3), Str(-3.0, 0.5, "exp", 0.3)])
def test_thresholds_that_bite_keep_the_contract(rule):
    """All networks and optimizers, with and without decay of the weights."""
    check_rule(rule, epochs=4)


def test_weights_that_are_zero_stay_zero():
    """As by autograd: the slope of ``sign(w) relu(|w| - alpha)`` at 0 is 0. So what was pruned stays pruned."""
    model = net()
    masks = Masks({name: torch.rand_like(m.double()) < 0.4 for name, m in Masks.dense(model).items()})
    masks.apply_(model)
    step = TrainStep(epochs=2, lr=0.1, weight_decay=0.05, rules=(Str(-3200.0),))

    assert Training(model, data(), step, masks=masks).fit() == masks
