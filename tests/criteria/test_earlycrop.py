"""EarlyCroP: the change of the gradient flow when a weight goes, whatever its sign."""

import pytest
import torch
from torch.func import functional_call

from secateur.core.errors import DataError, ModelError
from secateur.core.masks import Masks
from secateur.core.task import Task
from secateur.criteria.earlycrop import EarlyCrop
from secateur.testing import CASES
from secateur.testing.quadratics import dense


def matrix(n=5):
    random = torch.Generator().manual_seed(0)
    a = torch.randn(n, n, generator=random, dtype=torch.float64)
    return a + a.T, torch.randn(n, generator=random, dtype=torch.float64)


def test_score_on_a_quadratic_and_the_true_change_of_the_flow():
    """L = w·Aw / 2: the score is |w · A²w|, and zeroing k changes g·g by -2 w_k (A²w)_k + w_k² (A²)_kk."""
    a, w = matrix()
    task = dense(a, at=w)
    masks = Masks.dense(task.model)
    square = a @ a
    score = EarlyCrop()(task, masks)["weight"][0]
    torch.testing.assert_close(score, (w * (square @ w)).abs(), rtol=1e-12, atol=0)
    flow = task.gradients()["weight"].square().sum().item()
    for k in range(5):
        gone = w.clone()
        gone[k] = 0.0
        after = task.gradients({"weight": gone[None]})["weight"].square().sum().item()
        first = -2 * w[k] * (square @ w)[k]
        assert score[k].item() == pytest.approx(abs(first.item()) / 2)
        assert after - flow == pytest.approx((first + w[k] ** 2 * square[k, k]).item(), abs=1e-10)


@pytest.mark.parametrize("name", ["tanh_mlp", "conv_bn", "attention", "tied", "lstm"])
def test_score_is_half_the_slope_of_the_flow_along_a_gate(name):
    """The definition through explicit gates: d(g·g)/dc at c = 1, with g the gradient in the gated weights."""
    task = CASES[name]()
    masks = Masks.dense(task.model)
    own = {n: p.detach() for n, p in task.params().items()}
    gates = {n: torch.ones_like(own[n], requires_grad=True) for n in masks}
    gated = {n: gates[n] * own[n] for n in masks}
    total = sum(len(x) for x, _ in task.data)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        losses = [len(x) * task.loss(functional_call(task.model, {**own, **gated}, (x,)), y) for x, y in task.data]
    g = torch.autograd.grad(torch.stack(losses).sum() / total, list(gated.values()), create_graph=True)
    torch.stack([part.square().sum() for part in g]).sum().backward()

    scores = EarlyCrop()(task, masks)

    for n in masks:
        torch.testing.assert_close(scores[n], gates[n].grad.abs() / 2, rtol=0, atol=1e-12)


def test_the_product_is_the_central_difference_of_the_gradient():
    task = CASES["tanh_mlp"]()
    masks = Masks.dense(task.model)
    g, step = task.gradients(), 1e-5
    sides = [task.gradients({n: p.detach() + s * step * g[n] for n, p in task.params().items() if n in masks})
             for s in (1, -1)]  # fmt: skip
    for n, score in EarlyCrop()(task, masks).items():
        curved = (sides[0][n] - sides[1][n]) / (2 * step)
        torch.testing.assert_close(score, (task.params()[n].detach() * curved).abs(), rtol=0, atol=1e-6)


def test_pruned_weights_take_no_part():
    """Kept entries only: the score is that of the quadratic without the rows and columns of pruned weights."""
    a, w = matrix()
    kept = torch.tensor([True, False, True, True, False])
    task = dense(a, at=w * kept)
    small = a[kept][:, kept]
    score = EarlyCrop()(task, Masks({"weight": kept[None]}))["weight"][0]
    assert not score[~kept].any()
    torch.testing.assert_close(score[kept], (w[kept] * (small @ small @ w[kept])).abs(), rtol=1e-12, atol=0)


def test_bad_input_is_refused_by_name():
    task = CASES["tanh_mlp"]()
    masks = Masks.dense(task.model)
    with pytest.raises(DataError, match="the loss is nan"):
        EarlyCrop()(Task(task.model, task.loss, [(x * float("nan"), y) for x, y in task.data]), masks)
    with torch.no_grad():
        task.params()["4.weight"][0, 0] = float("inf")
    with pytest.raises(ModelError, match="`4.weight`"):
        EarlyCrop()(task, masks)
