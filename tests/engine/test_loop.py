"""The training loop: it does what its options say, and stops with one clear error."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false

import copy
import importlib.util
import math
import pathlib

import pytest
import torch
from torch import nn

from secateur.core.errors import DataError, MaskError, ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import parameters
from secateur.core.reading import Paper
from secateur.core.sockets import Rule
from secateur.core.streams import stream
from secateur.data import Loader, Split
from secateur.engine.checkpoint import load_state
from secateur.engine.loop import Training
from secateur.engine.recipe import TrainStep

_spec = importlib.util.spec_from_file_location("loop_kit", pathlib.Path(__file__).with_name("loop_kit.py"))
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)
loader, mlp, busy, half, same = kit.loader, kit.mlp, kit.busy, kit.half, kit.same


def by_hand(net, batches, optimizer, loss=nn.functional.cross_entropy, after=lambda step: None):
    """Plain training."""
    net.train()
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        loss(net(x), y).backward()
        after(step)
        optimizer.step()
    return net.state_dict()


def epochs_of(data, count):
    return [batch for epoch in range(count) for batch in data.epoch(epoch)]


# What the options say


def test_it_is_plain_training_to_the_bit():
    """No rule, nothing pruned, a constant rate: the loop everybody writes."""
    net = mlp()
    Training(net, loader(), TrainStep(epochs=3, lr=0.1, schedule="constant", weight_decay=0.01)).fit()

    plain = mlp()
    by_hand(plain, epochs_of(loader(), 3), torch.optim.SGD(plain.parameters(), 0.1, 0.9, weight_decay=0.01))

    assert same(net.state_dict(), plain.state_dict())


@pytest.mark.parametrize(("count", "batch", "accumulate"), [(12, 2, 3), (14, 2, 3), (10, 4, 3)])
def test_accumulating_equals_a_big_batch(count, batch, accumulate):
    """Batches of unequal size included: every example weighs the same, also in the shorter last step of an epoch."""
    one, other = mlp(), mlp()
    first = Training(one, loader(batch, count), TrainStep(epochs=3, lr=0.1, accumulate=accumulate))
    first.fit()
    second = Training(other, loader(batch * accumulate, count), TrainStep(epochs=3, lr=0.1))
    second.fit()

    assert first.run.total == second.run.total == first.run.step
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(weight, other.state_dict()[name], rtol=0, atol=1e-13)


def test_clipping_bounds_the_norm_of_what_is_kept():
    """The step of plain SGD has at most the clipped length; gradients of pruned weights do not count."""
    net, clip = mlp(), 0.01
    masks = half(net)
    masks.apply_(net)
    before = copy.deepcopy(net.state_dict())
    step = TrainStep(epochs=1, lr=1.0, momentum=0.0, clip=clip, schedule="constant")
    Training(net, loader(12), step, masks=masks).fit()

    plain = mlp()
    masks.apply_(plain)

    def clipped(step):
        for name, mask in masks.items():
            parameters(plain)[name].grad.mul_(mask)
        nn.utils.clip_grad_norm_(plain.parameters(), clip)

    by_hand(plain, epochs_of(loader(12), 1), torch.optim.SGD(plain.parameters(), 1.0), after=clipped)
    length = math.sqrt(sum(float((net.state_dict()[n] - w).square().sum()) for n, w in before.items()))
    assert abs(length - clip) < 1e-6
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], weight * masks[name] if name in masks else weight)


def test_the_average_is_the_result():
    """EMA: e = d e + (1 - d) w after every step, beginning with the first weights; zeros stay zero."""
    net, plain = mlp(), mlp()
    masks = half(net)
    Training(net, loader(), TrainStep(epochs=3, lr=0.1, ema=0.8, schedule="constant", momentum=0.0), masks=masks).fit()

    masks.apply_(plain)
    mean = None
    for x, y in epochs_of(loader(), 3):
        plain.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        with torch.no_grad():
            for name, p in plain.named_parameters():
                p -= 0.1 * p.grad * (masks[name] if name in masks else 1)
        now = {n: p.detach().clone() for n, p in plain.named_parameters()}
        mean = now if mean is None else {n: 0.8 * mean[n] + 0.2 * now[n] for n in now}
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), mean[name], rtol=0, atol=1e-13)
    masks.check(net)


def test_label_smoothing_is_the_mean_with_the_uniform_label():
    """One step against the definition: (1 - s) CE + s times the mean CE over all classes."""
    net, plain = mlp(), mlp()
    Training(net, loader(12), TrainStep(epochs=1, lr=0.5, momentum=0.0, smoothing=0.3)).fit()

    def smooth(output, target):
        logs = output.log_softmax(1)
        return -(0.7 * logs[torch.arange(len(target)), target] + 0.3 * logs.mean(1)).mean()

    by_hand(plain, epochs_of(loader(12), 1), torch.optim.SGD(plain.parameters(), 0.5), smooth)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], weight, rtol=0, atol=1e-14)


def test_a_loss_of_one_s_own_is_used():
    net, plain = mlp(), mlp()
    brier = lambda output, target: (output.softmax(1) - nn.functional.one_hot(target, 3)).square().mean()  # noqa: E731
    Training(net, loader(), TrainStep(epochs=2, lr=0.5, momentum=0.0, schedule="constant"), loss=brier).fit()

    by_hand(plain, epochs_of(loader(), 2), torch.optim.SGD(plain.parameters(), 0.5), brier)
    assert same(net.state_dict(), plain.state_dict())


def test_mixed_precision_trains():
    """bfloat16 products, float32 weights and loss; close to full precision, not equal."""
    losses = {}
    for amp in (False, True):
        seen = []
        net = mlp(torch.float32)
        step = TrainStep(epochs=10, lr=0.1, amp=amp)
        Training(
            net, loader(dtype=torch.float32), step, watch=lambda f, seen=seen: seen.append(f.get("train/loss"))
        ).fit()
        losses[amp] = [value for value in seen if value is not None]
        assert all(p.dtype == torch.float32 for p in net.parameters())
    assert losses[True] != losses[False]
    assert losses[True][-1] < 0.8 * losses[True][0]
    assert max(abs(a - b) for a, b in zip(losses[True], losses[False], strict=True)) < 0.05


def test_channels_last_changes_the_layout_only():
    """The same training up to rounding, on weights and images in channels-last order."""
    torch.manual_seed(0)
    first = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    ).double()
    second = copy.deepcopy(first)
    x = torch.randn(8, 3, 6, 6, generator=stream(0, "x"), dtype=torch.float64)
    data = Loader(Split(x, torch.arange(8) % 3), 4, dtype=torch.float64)
    Training(first, data, TrainStep(epochs=2, lr=0.1)).fit()
    Training(second, data, TrainStep(epochs=2, lr=0.1, channels_last=True)).fit()

    assert second[0].weight.is_contiguous(memory_format=torch.channels_last)
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], weight, rtol=0, atol=1e-12)


def test_pruned_weights_stay_zero_and_frozen_ones_stay_put():
    net = busy()
    net[0].bias.requires_grad_(False)
    bias, masks = net[0].bias.detach().clone(), half(net)

    result = Training(
        net, loader(), TrainStep(epochs=3, optimizer="adamw", lr=0.01, weight_decay=0.1), masks=masks
    ).fit()

    assert result == masks and torch.equal(net[0].bias, bias)
    masks.check(net)


def test_gradients_left_over_from_before_do_not_count():
    one, other = mlp(), mlp()
    for p in one.parameters():
        p.grad = torch.ones_like(p)
    for net in (one, other):
        Training(net, loader(), TrainStep(epochs=1, lr=0.1)).fit()

    assert same(one.state_dict(), other.state_dict())


def test_only_and_skip_choose_what_is_held():
    net = mlp()
    assert set(Training(net, loader(), TrainStep(epochs=1, skip=("0.*",))).fit()) == {"2.weight"}
    assert set(Training(net, loader(), TrainStep(epochs=1, only=("0.weight",))).fit()) == {"0.weight"}


# Errors


def test_a_loss_that_becomes_nan_is_one_clear_error(tmp_path):
    """At the very step, with what to do; weights of that step are not touched; the checkpoint before it stays."""
    net = mlp(torch.float32)

    def explode(output, target):
        loss = nn.functional.cross_entropy(output, target)
        return loss * float("nan") if made.run.step == 4 else loss

    made = Training(net, loader(dtype=torch.float32), TrainStep(epochs=3, lr=0.1), folder=tmp_path, loss=explode)

    with pytest.raises(DataError, match=r"the loss became nan at step 4 \(epoch 2\)\. Lower `lr` \(0.1\), add warm-up"):
        made.fit()

    assert all(bool(p.isfinite().all()) for p in net.parameters())
    assert load_state(tmp_path)["step"] == 3


def test_a_bad_figure_in_the_evaluation_is_an_error():
    made = Training(mlp(), loader(), TrainStep(epochs=1), evaluate=lambda net: {"test/loss": math.inf})
    with pytest.raises(ModelError, match="after epoch 1, test/loss is inf"):
        made.fit()


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="accumulate is 4, but an epoch has only 3 batches.*3 or less"):
        Training(mlp(), loader(), TrainStep(epochs=1, accumulate=4)).fit()
    with pytest.raises(MaskError, match="another network"):
        Training(mlp(), loader(), TrainStep(epochs=1), masks=Masks({"odd": torch.ones(2, 2).bool()})).fit()


class Wraps(Rule):
    """Puts a parametrization in and takes it out at the end. Cost: none."""

    paper = Paper("none", "nobody", 2026, "", differs="in nothing known")

    def begin(self, run):
        nn.utils.parametrize.register_parametrization(run.model[2], "weight", nn.Identity())

    def end(self, run):
        nn.utils.parametrize.remove_parametrizations(run.model[2], "weight")
        run.model[2]._parameters["bias"] = run.model[2]._parameters.pop("bias")


def test_averages_of_parametrized_networks_are_refused():
    """An average pairs parameters by place, which a parametrization changes."""
    with pytest.raises(UsageError, match="set `ema = 0`"):
        Training(mlp(), loader(), TrainStep(epochs=1, ema=0.9, rules=(Wraps(),))).fit()


def test_the_best_checkpoint_is_never_one_behind_a_parametrization():
    """Such weights are not those of the result; the network after the end is."""
    net = mlp()
    training = Training(net, loader(), TrainStep(epochs=2, rules=(Wraps(),)), validate=lambda net: 1.0)
    training.fit()

    assert same(training.best_state, net.state_dict())


def test_the_forward_pass_goes_through_a_compiled_network():
    """What the caller compiled is what runs, and zeros are held in the network inside."""
    net, calls = mlp(), []
    compiled = torch.compile(net, backend=lambda graph, _: calls.append(1) or graph.forward)

    masks = Training(compiled, loader(), TrainStep(epochs=1), masks=half(net)).fit()

    assert calls and set(masks) == {"0.weight", "2.weight"}
    masks.check(net)
