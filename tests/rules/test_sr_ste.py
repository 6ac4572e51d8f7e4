"""SR-STE against a plain rendering of the paper, and the pattern holds after every step."""

import pytest
import torch
from torch import nn

from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.patterns import NM
from secateur.core.sockets import Rule
from secateur.core.streams import stream
from secateur.data import Loader, Split
from secateur.engine.binding import table_of, value_of
from secateur.engine.loop import Training
from secateur.engine.optimize import rate
from secateur.engine.recipe import TrainStep
from secateur.rules.sr_ste import SrSte
from secateur.testing.rules_contract import check_rule


def data(kind=torch.float64, shape=(8,)):
    x = torch.randn(12, *shape, generator=stream(0, "data"), dtype=kind)
    return Loader(Split(x, torch.arange(12) % 3), 4, shuffle=True, dtype=kind)


def net(kind=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).to(kind)


class Watched(SrSte):
    """Writes down the weights, gradients and masks of every step."""

    diary = []

    def before_step(self, run):
        shown = {name: w.detach().clone() for name, w in run.weights().items()}
        masks = {name: run.state(self)[f"mask:{name}"].clone() for name in shown}
        grads = {name: w.grad.clone() for name, w in run.weights().items()}
        super().before_step(run)
        after = {name: w.grad.clone() for name, w in run.weights().items()}
        theta = {name: w.detach().clone() for name, w in run.weights().items()}
        self.diary.append((shown, masks, grads, after, theta))


def train(rule, model=None, loader=None, epochs=4, **options):
    step = TrainStep(epochs=epochs, rules=(rule,) if rule else (), **{"lr": 0.1, **options})
    training = Training(model or net(), loader or data(), step)
    Watched.diary.clear()
    return training.model, training.fit()


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(1, 2), NM(3, 4), NM(2, 8)])
def test_every_group_keeps_n(pattern):
    """Card test (a), at every step and at the end."""
    model, masks = train(Watched(pattern))

    for shown, *_ in Watched.diary:
        for weight in shown.values():
            assert (weight.unflatten(1, (-1, pattern.m)) != 0).sum(2).max() <= pattern.n
    for name, mask in masks.items():
        assert (mask.unflatten(1, (-1, pattern.m)).sum(2) == pattern.n).all()
        assert not model.get_parameter(name)[~mask].any()


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_gradient_is_straight_through_with_the_pull(decay):
    """Card test (b): g by autograd at W * m, plus decay (1 - m) W."""
    train(Watched(decay=decay), momentum=0.0, weight_decay=0.01)

    changed = 0
    for shown, masks, grads, after, theta in Watched.diary:
        for name, mask in masks.items():
            assert torch.equal(shown[name], theta[name] * mask)
            assert torch.equal(mask, NM().mask(theta[name].abs(), mask.numel() // 2))
            wanted = grads[name] + decay * (1 - mask.double()) * theta[name]
            torch.testing.assert_close(after[name], wanted, rtol=1e-12, atol=1e-16)
            changed += int((grads[name] != 0)[~mask].sum())
    assert changed > 100  # pruned weights have gradients


class _Straight(torch.autograd.Function):
    """The authors' layer: masks forward, passes the gradient on and adds the pull."""

    @staticmethod
    def forward(ctx, weight, decay):
        groups = weight.abs().unflatten(1, (-1, 4))
        least = groups.sort(2).values[..., 2:3]
        mask = (groups >= least).flatten(1)
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx, slope):
        weight, mask = ctx.saved_tensors
        return slope + ctx.decay * (weight * ~mask), None


OPTIMIZERS = [
    ({"momentum": 0.9, "nesterov": True, "weight_decay": 0.05}, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ({"optimizer": "adamw", "lr": 0.02, "weight_decay": 0.05}, torch.optim.AdamW, {}),
]


@pytest.mark.parametrize(("options", "kind", "more"), OPTIMIZERS, ids=["sgd", "adamw"])
def test_the_run_is_that_of_the_authors_layer(options, kind, more):
    """Autograd through a layer of its own, torch's own optimizer on the dense weights."""
    model, masks = train(SrSte(decay=0.1), **options)

    dense = net()
    optimizer = kind(dense.parameters(), 0.1, weight_decay=0.05, **more)
    step, done = TrainStep(epochs=4, **{"lr": 0.1, **options}), 0
    shown = lambda: {n: _Straight.apply(p, 0.1) if p.dim() > 1 else p for n, p in dense.named_parameters()}  # noqa: E731
    for epoch in range(4):
        for x, y in data().epoch(epoch):
            for group in optimizer.param_groups:
                group["lr"] = rate(step, done, 12, 3)
            nn.functional.cross_entropy(torch.func.functional_call(dense, shown(), (x,)), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
    for name, weight in shown().items():
        torch.testing.assert_close(model.state_dict()[name], weight.detach(), rtol=0, atol=1e-12)
        assert name not in masks or torch.equal(masks[name], weight != 0)


def test_the_pull_draws_what_is_left_out_to_zero():
    """With no gradient of the loss a pruned weight shrinks by 1 - lr * decay a step, and a kept one stays."""
    model = net()
    before = {name: w.detach().clone() for name, w in model.named_parameters()}
    step = TrainStep(epochs=4, lr=0.1, momentum=0.0, schedule="constant", rules=(Watched(decay=0.5),))
    Watched.diary.clear()
    Training(model, data(), step, loss=lambda output, target: 0 * output.sum()).fit()

    *_, theta = Watched.diary[-1]
    for name, mask in Watched.diary[0][1].items():
        wanted = torch.where(mask, before[name], before[name] * 0.95**11)
        torch.testing.assert_close(theta[name], wanted, rtol=1e-12, atol=0)


def test_masks_it_came_with_are_lifted():
    model = net()
    masks = Masks({name: torch.rand_like(m.double()) < 0.4 for name, m in Masks.dense(model).items()})
    masks.apply_(model)
    training = Training(model, data(), TrainStep(epochs=2, lr=0.1, rules=(SrSte(),)), masks=masks)

    assert training.fit().kept == masks.total // 2


def test_convolutions_group_along_input_channels():
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    )
    step = TrainStep(epochs=2, lr=0.05, rules=(SrSte(),), amp=True, clip=1.0)
    masks = Training(model, data(torch.float32, (4, 6, 6)), step).fit()

    for name in ("0.weight", "3.weight"):
        groups = masks[name].permute(0, 2, 3, 1).unflatten(3, (-1, 4))
        assert (groups.sum(4) == 2).all()
        assert (model.get_parameter(name) != 0).logical_or(~masks[name]).all()


def test_tensors_that_cannot_take_the_pattern_are_named_with_the_cure():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.LazyLinear(3))
    model(torch.zeros(1, 3, 8, 8))
    with pytest.raises(UsageError, match=r"width 3 is not a multiple of 4; `1.weight`.*skip = \['0.weight', '1.wei"):
        train(SrSte(), model, data(torch.float32, (3, 8, 8)))

    _, masks = train(SrSte(), model, data(torch.float32, (3, 8, 8)), epochs=1, skip=("0.*", "1.*"))
    assert masks.kept == masks.total // 2


@pytest.mark.parametrize("decay", [-1e-4, float("nan"), float("inf")])
def test_a_bad_decay_is_refused(decay):
    with pytest.raises(UsageError, match="decay is"):
        SrSte(decay=decay)


def test_it_goes_into_a_recipe_and_back():
    rule = SrSte(NM(1, 4), 1e-3)
    table = {"use": "sr_ste", "pattern": {"use": "nm", "n": 1}, "decay": 1e-3}

    assert table_of(rule) == table and value_of(Rule, table, "rule") == rule
    assert rule.sparsity == 0.75


def test_other_patterns_keep_the_contract():
    check_rule(SrSte(NM(1, 2), 0.05), ["tanh_mlp", "conv_bn", "attention", "tied"], epochs=4)
