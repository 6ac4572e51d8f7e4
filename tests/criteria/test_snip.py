"""SNIP: the slope of the loss along a gate on each weight."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from secateur.core.choose import choose
from secateur.core.errors import DataError, ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.task import Task
from secateur.criteria.snip import Snip
from secateur.testing import CASES
from secateur.testing.cases import conv_bn


def gate_slopes(task):
    """dL(c·w)/dc at c = 1, through explicit gates, one backward pass over all examples."""
    gates = {n: torch.ones_like(p, requires_grad=True) for n, p in task.params().items()}
    gated = {n: gates[n] * p.detach() for n, p in task.params().items()}
    total = sum(len(x) for x, _ in task.data)
    sum(task.loss(functional_call(task.model, gated, (x,)), y) * len(x) for x, y in task.data).div(total).backward()
    return {n: gate.grad for n, gate in gates.items()}


@pytest.mark.parametrize("name", CASES)
def test_score_is_the_slope_of_the_loss_along_the_gate(name):
    """The definition: dL(c·w)/dc at c = 1. The file uses the shortcut w·dL/dw; both must agree."""
    task = CASES[name]()
    masks = Masks.dense(task.model)
    slopes = gate_slopes(task)

    scores = Snip()(task, masks)

    for key in masks:
        torch.testing.assert_close(scores[key], slopes[key].abs(), rtol=0, atol=1e-12)


def test_score_is_the_central_difference_of_the_loss():
    """A third route without any gradient: (L(1.001 w) - L(0.999 w)) / 0.002 for one weight at a time."""
    task = CASES["tanh_mlp"]()
    score = Snip()(task, Masks.dense(task.model))["2.weight"]
    w = task.params()["2.weight"].detach()
    for place in [(0, 0), (3, 5), (5, 6)]:
        losses = []
        for factor in (1.001, 0.999):
            moved = w.clone()
            moved[place] *= factor
            losses.append(task.mean_loss({"2.weight": moved}))
        assert abs(losses[0] - losses[1]) / 0.002 == pytest.approx(score[place].item(), rel=1e-5, abs=1e-9)


def test_a_tied_weight_has_one_score_from_the_sum_of_its_gradients():
    """Untie the head by hand: the gradients of both uses add up."""
    task = CASES["tied"]()
    net = CASES["tied"]().model
    net.head.weight = nn.Parameter(net.embed.weight.detach().clone())
    apart = Task(net, task.loss, task.data).gradients()
    expected = (task.params()["embed.weight"].detach() * (apart["embed.weight"] + apart["head.weight"])).abs()

    scores = Snip()(task, Masks.dense(task.model, only=["head.weight"]))

    assert list(scores) == ["embed.weight"]
    torch.testing.assert_close(scores["embed.weight"], expected, rtol=0, atol=1e-12)


def test_what_flows_into_a_relu_unit_flows_out_of_it():
    """Without biases a ReLU unit is homogeneous: the signed sums of w·dL/dw over its two sides are equal."""
    random = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9, False), nn.ReLU(), nn.Linear(9, 7, False), nn.ReLU(), nn.Linear(7, 3, False))
    net.double()
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=random, dtype=torch.float64)
    data = [(torch.randn(5, 6, generator=random, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1]))]
    task = Task(net, nn.functional.cross_entropy, data)
    flow = {n: p.detach() * g for (n, p), g in zip(task.params().items(), task.gradients().values(), strict=True)}

    scores = Snip()(task, Masks.dense(net))

    torch.testing.assert_close(flow["0.weight"].sum(1), flow["2.weight"].sum(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(flow["2.weight"].sum(1), flow["4.weight"].sum(0), rtol=0, atol=1e-12)
    assert all(torch.equal(scores[n], flow[n].abs()) for n in scores)
    assert flow["2.weight"].abs().max() > 1e-3


def test_weights_from_a_constant_zero_input_score_zero():
    task = CASES["tanh_mlp"]()
    blank = [(x * torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]), y) for x, y in task.data]

    scores = Snip()(Task(task.model, task.loss, blank), Masks.dense(task.model))

    assert not scores["0.weight"][:, 2].any()
    assert scores["0.weight"][:, [0, 1, 3, 4]].all()


@pytest.mark.parametrize("keep", [5, 17, 40, 60])
def test_exactly_as_many_survive_as_asked_even_with_ties(keep):
    """Twins (equal units) have equal scores to the bit; still the count is exact and order decides."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(0.5)
    data = [(torch.ones(3, 6, dtype=torch.float64), torch.tensor([0, 0, 1]))]
    task = Task(net, nn.functional.cross_entropy, data)
    scores = Snip()(task, Masks.dense(net))
    assert len(torch.cat([s.flatten() for s in scores.values()]).unique()) < 8

    assert choose(scores, keep).kept == keep


def test_a_factor_on_the_loss_scales_all_scores_alike():
    """Divided by their sum (as in the paper) the scores do not change at all."""
    task = CASES["attention"]()
    masks = Masks.dense(task.model)
    one = Snip()(task, masks)
    other = Snip()(Task(task.model, lambda o, t: 3.7 * task.loss(o, t), task.data), masks)
    first, second = (sum(s.sum() for s in scores.values()) for scores in (one, other))
    for name in masks:
        torch.testing.assert_close(one[name] / first, other[name] / second, rtol=1e-12, atol=1e-15)


def test_untrained_norms_use_the_statistics_of_the_batch():
    """The same network written out in training mode on one batch is the reference."""
    task = conv_bn(batches=(6,), trained=False)
    masks = Masks.dense(task.model)
    twin = conv_bn(batches=(6,), trained=False)
    (inputs, target), params = twin.data[0], twin.params()
    twin.loss(twin.model.train()(inputs), target).backward()

    scores = Snip()(task, masks)

    for name in masks:
        torch.testing.assert_close(scores[name], (params[name] * params[name].grad).detach().abs(), rtol=0, atol=1e-12)
    assert not torch.allclose(scores["first.weight"], Snip("running")(task, masks)["first.weight"])
    assert int(task.model.first_norm.num_batches_tracked) == 0


def test_trained_norms_use_their_running_statistics():
    task = conv_bn()
    masks = Masks.dense(task.model)
    auto, running, fresh = (Snip(kind)(task, masks) for kind in ("auto", "running", "fresh"))
    assert all(torch.equal(auto[name], running[name]) for name in masks)
    assert not torch.allclose(auto["first.weight"], fresh["first.weight"])


def test_half_precision_scores_are_float32_and_close():
    """|w·g| of the bfloat16 weights, multiplied in float32: no ties from rounding the product."""
    task = CASES["relu_mlp"](torch.bfloat16)
    scores = Snip()(task, Masks.dense(task.model))
    slopes = task.gradients()
    for name, score in scores.items():
        assert score.dtype == torch.float32
        exact = (task.params()[name].detach().double() * slopes[name].double()).abs()
        torch.testing.assert_close(score.double(), exact, rtol=1e-6, atol=0)


def test_bad_input_is_refused_by_name():
    task = CASES["tanh_mlp"]()
    masks = Masks.dense(task.model)
    odd = object.__new__(Snip)
    object.__setattr__(odd, "statistics", "batch")  # the constructor is type-checked in tests
    with pytest.raises(UsageError, match="'auto', 'running' or 'fresh', not 'batch'"):
        odd.__post_init__()
    with pytest.raises(DataError, match="no example"):
        Snip()(Task(task.model, task.loss, []), masks)
    with torch.no_grad():
        task.params()["0.weight"][0, 0] = float("nan")
    with pytest.raises(ModelError, match="`0.weight`"):
        Snip()(task, masks)


def test_a_loss_that_does_not_reach_the_weights_cannot_rank_them():
    task = CASES["tanh_mlp"]()
    deaf = Task(task.model, lambda output, target: 0.0 * output.sum(), task.data)
    with pytest.raises(ModelError, match="all scores are zero"):
        choose(Snip()(deaf, Masks.dense(task.model)), 10)
