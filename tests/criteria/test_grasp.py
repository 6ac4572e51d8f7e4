"""GraSP: the signed change of the gradient flow at a high temperature."""

import pytest
import torch
from torch import nn

from secateur.core.choose import choose
from secateur.core.errors import ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.task import Task
from secateur.criteria.grasp import Grasp
from secateur.testing import CASES
from secateur.testing.cases import conv_bn
from secateur.testing.quadratics import dense


def flow(task, masks, at, temperature=200.0):
    """g·g over the tensors of the masks, at other weights."""
    calm = Task(task.model, lambda output, target: task.loss(output / temperature, target), task.data)
    slopes = calm.gradients(at)
    return sum(slopes[n].square().sum() for n in masks)


def test_score_on_a_quadratic_and_the_exact_change_of_the_flow():
    """With T = 1: g·g at w + d minus g·g at w is 2 d·Hg + d·H²d, and the score of w_k is w_k (Hg)_k."""
    random = torch.Generator().manual_seed(1)
    h = torch.randn(4, 4, generator=random, dtype=torch.float64)
    h, b, w, d = h + h.T, *torch.randn(3, 4, generator=random, dtype=torch.float64)
    task = dense(h, b, w)
    masks = Masks.dense(task.model)
    g = h @ w + b
    score = Grasp(1.0)(task, masks)["weight"][0]
    torch.testing.assert_close(score, w * (h @ g), rtol=1e-12, atol=0)
    change = flow(task, masks, {"weight": (w + d)[None]}, 1.0) - g @ g
    torch.testing.assert_close(change, 2 * d @ h @ g + d @ h @ h @ d, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["relu_mlp", "conv_bn", "attention", "tied", "lstm"])
def test_score_is_half_the_slope_of_the_flow_along_a_gate(name):
    """Central difference of g·g under w_k (1 ± e), for the entry of the largest score and the smallest one."""
    task = CASES[name]()
    masks = Masks.dense(task.model)
    scores = Grasp()(task, masks)
    scale = max(s.abs().max() for s in scores.values())
    for n in masks:
        for place in (scores[n].argmax(), scores[n].argmin()):
            flows = []
            for factor in (1 + 1e-4, 1 - 1e-4):
                moved = task.params()[n].detach().clone()
                moved.view(-1)[place] *= factor
                flows.append(flow(task, masks, {n: moved}))
            slope = (flows[0] - flows[1]) / 2e-4
            assert abs(slope / 2 - scores[n].view(-1)[place]) <= 1e-6 * scale


def test_the_most_negative_go_first_and_zeros_lie_in_the_middle():
    task = CASES["tanh_mlp"]()
    blank = [(x * torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]), y) for x, y in task.data]
    task = Task(task.model, task.loss, blank)
    scores = Grasp()(task, Masks.dense(task.model))
    every = torch.cat([s.flatten() for s in scores.values()])
    assert not scores["0.weight"][:, 2].any()
    assert (every < 0).sum() > 5 < (every > 0).sum()
    kept = choose(scores, int((every > 0).sum()))
    assert all(torch.equal(kept[n], scores[n] > 0) for n in scores)


def test_temperature_divides_the_outputs():
    """Dividing the weights of a linear last layer does the same to the loss, but not to the score of its weights."""
    task = CASES["tanh_mlp"]()
    masks = Masks.dense(task.model, only=["0.weight"])
    cool = CASES["tanh_mlp"]()
    with torch.no_grad():
        for name in ("4.weight", "4.bias"):
            cool.params()[name].div_(50.0)
    one, other = Grasp(50.0)(task, masks)["0.weight"], Grasp(1.0)(cool, masks)["0.weight"]
    torch.testing.assert_close(one, other, rtol=1e-11, atol=0)


def test_untrained_norms_use_the_statistics_of_the_batch():
    """The same network in training mode on one batch, by hand, is the reference."""
    task = conv_bn(batches=(6,), trained=False)
    masks = Masks.dense(task.model)
    twin = conv_bn(batches=(6,), trained=False)
    (inputs, target), params = twin.data[0], twin.params()
    at = [params[n] for n in masks]
    loss = twin.loss(twin.model.train()(inputs) / 200, target)
    g = torch.autograd.grad(loss, at, create_graph=True)
    curved = torch.autograd.grad(sum((a * a.detach()).sum() for a in g), at)

    scores = Grasp()(task, masks)

    scale = max(s.abs().max() for s in scores.values())
    for n, c in zip(masks, curved, strict=True):
        assert (scores[n] - params[n].detach() * c).abs().max() <= 1e-12 * scale
    assert not torch.allclose(scores["head.weight"], Grasp(statistics="running")(task, masks)["head.weight"], rtol=1e-3)
    assert int(task.model.first_norm.num_batches_tracked) == 0


def test_bad_input_is_refused_by_name():
    with pytest.raises(UsageError, match="temperature must be a positive number, not 0"):
        Grasp(0.0)
    net = nn.LSTM(3, 2).double()
    data = [(torch.ones(2, 3).double(), torch.zeros(2))]
    with pytest.raises(ModelError, match="the network gives tuple"):
        Grasp()(Task(net, lambda output, target: output[0].sum(), data), Masks.dense(net))
