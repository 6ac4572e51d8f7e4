"""Optimal brain damage: the diagonal of the curvature times the squared weight."""

import pytest
import torch
from torch import nn

from secateur.core.errors import ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.task import Task
from secateur.criteria.obd import Obd
from secateur.linalg.products import Operator
from secateur.testing import CASES
from secateur.testing.quadratics import dense, diagonal


def chain(*modules, inputs=(7, 5), outputs=3, seed=0):
    """A network of these modules with a squared loss that does not mix its outputs, and its first masks."""
    random = torch.Generator().manual_seed(seed)
    net = nn.Sequential(*modules).double().eval()
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=random, dtype=torch.float64) * 0.7
    x = torch.randn(inputs, generator=random, dtype=torch.float64)
    y = torch.randn(inputs[0], outputs, generator=random, dtype=torch.float64)
    task = Task(net, nn.functional.mse_loss, [(x[:4], y[:4]), (x[4:], y[4:])])
    return task, Masks({n: torch.ones_like(p, dtype=torch.bool) for n, p in net.named_parameters()})


def true_scores(task, masks, kind):
    """From the whole matrix, one product with every axis."""
    op = Operator(task, masks, kind)
    return op.unflatten(op.dense().diagonal() * op.flatten(task.params()).square() / 2)


ONE_HIDDEN = {
    "tanh": lambda: chain(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)),
    "sigmoid output": lambda: chain(nn.Linear(5, 6), nn.GELU(), nn.Dropout(), nn.Linear(6, 3), nn.Sigmoid()),
    "linear": lambda: chain(nn.Linear(5, 3)),
}


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("name", ONE_HIDDEN)
@pytest.mark.filterwarnings("ignore:the curvature is negative")
def test_the_recursion_is_exact_for_one_hidden_layer(name, kind):
    task, masks = ONE_HIDDEN[name]()
    scores, expected = Obd("recursion", kind)(task, masks), true_scores(task, masks, kind)
    for key in masks:
        torch.testing.assert_close(scores[key], expected[key], rtol=0, atol=1e-14)


def test_the_recursion_drops_cross_terms_of_two_hidden_layers():
    task, masks = chain(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    scores, expected = Obd("recursion")(task, masks), true_scores(task, masks, "ggn")
    torch.testing.assert_close(scores["4.weight"], expected["4.weight"], rtol=0, atol=1e-14)
    torch.testing.assert_close(scores["2.weight"], expected["2.weight"], rtol=0, atol=1e-14)
    assert (scores["0.weight"] - expected["0.weight"]).abs().max() > 1e-3


def test_the_last_layer_is_exact_under_cross_entropy_and_convolutions_pass_the_recursion():
    task, masks = chain(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(True), nn.MaxPool2d(2), nn.Flatten(),
                        nn.Linear(12, 3), inputs=(7, 2, 6, 6))  # fmt: skip
    masks = Masks({name: masks[name] for name in ("0.weight", "5.weight")})
    task = Task(task.model, lambda out, y: nn.functional.cross_entropy(out, y.argmax(1)), task.data)
    scores, expected = Obd()(task, masks), true_scores(task, masks, "ggn")
    torch.testing.assert_close(scores["5.weight"], expected["5.weight"], rtol=0, atol=1e-14)
    assert (scores["0.weight"] >= 0).all()
    assert scores["0.weight"].flatten(1).any(1).sum() >= 2  # BatchNorm and ReLU leave at least two filters alive


def test_a_shared_weight_counts_the_sum_over_its_uses_and_the_truth_adds_twice_the_mixed_term():
    shared = nn.Linear(1, 1, bias=False)
    task, masks = chain(shared, shared, inputs=(6, 1), outputs=1)  # y = w² x, so L = (w² x - t)²
    h = 0.0
    w = shared.weight.detach().item()
    for x, _ in task.data:
        h += (2 * (w * x) ** 2).sum().item() * 2 / 6  # either use alone: 2 (w x)²
    score = Obd("recursion")(task, masks)["0.weight"].item()
    assert score == pytest.approx(h * w**2 / 2, rel=1e-12)
    assert Obd("exact")(task, masks)["0.weight"].item() == pytest.approx(2 * score, rel=1e-12)


@pytest.mark.parametrize("kind", ["exact", "hutchinson"])
def test_predicted_is_actual_for_a_diagonal_quadratic_at_its_minimum(kind):
    """Random signs are exact for a diagonal matrix. The minimum of the loss is at the weights."""
    task = diagonal([1.0, 4.0, 9.0], slope=[-2.0, -4.0, 9.0], at=[2.0, 1.0, -1.0])
    w, before = task.params()["weight"].detach(), task.mean_loss()
    score = Obd(kind, "hessian", samples=2)(task, Masks.dense(task.model))["weight"]
    for i in range(3):
        gone = w.clone()
        gone[0, i] = 0.0
        assert task.mean_loss({"weight": gone}) - before == pytest.approx(score[0, i].item(), abs=1e-10)


@pytest.mark.filterwarnings("ignore:the curvature is negative")
def test_random_signs_come_closer_with_more_of_them_and_do_not_see_pruned_weights():
    task = CASES["attention"]()
    masks = Masks.dense(task.model, only=["up.weight", "head.weight"])
    exact = Obd("exact", "hessian")(task, masks)["up.weight"]
    found = [Obd("hutchinson", "hessian", n)(task, masks)["up.weight"] for n in (16, 256)]
    off = [(score - exact).norm() / exact.norm() for score in found]
    assert off[1] < 0.5
    assert 2 < off[0] / off[1] < 8  # by the square root of 16, give or take
    assert all((score > 0).all() for score in Obd("hutchinson")(task, masks).values())  # ggn: noise sends none away
    half = masks & Masks({name: task.params()[name] > 0 for name in masks})
    scores = Obd("exact")(task, half)
    assert all(not scores[name][~half[name]].any() and scores[name][half[name]].all() for name in half)


@pytest.mark.parametrize("name", ["attention", "tied", "conv_bn"])
def test_signs_at_the_outputs_come_closer_with_more_of_them_and_are_what_auto_takes(name):
    task = CASES[name]()
    half = Masks({n: p > -0.1 for n, p in task.params().items() if p.dim() > 1})
    exact = Obd("exact")(task, half)

    def off(draws, seed):
        found = Obd("outputs", seed=seed, draws=draws)(task, half)
        assert all((found[key] >= 0).all() and not found[key][~half[key]].any() for key in half)
        return torch.stack([(found[key] - exact[key]).norm() / exact[key].norm() for key in half])

    few, many = (torch.stack([off(draws, seed) for seed in range(6)]).mean(0) for draws in (4, 64))
    assert (many < 0.25).all()
    assert 2.5 < (few / many).mean() < 6.5  # by the root of 16, give or take
    few = Obd("outputs", draws=4)(task, half)
    for key, score in Obd(draws=4)(task, half).items():
        torch.testing.assert_close(score, few[key], rtol=0, atol=0)


def test_a_blank_input_scores_zero_and_permuted_channels_keep_their_scores():
    task, masks = chain(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    for x, _ in task.data:
        x[:, 2] = 0.0
    before = Obd("recursion")(task, masks)
    assert not before["0.weight"][:, 2].any()
    assert before["0.weight"][:, [0, 1, 3, 4]].all()
    for key, dim in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
        task.params()[key].data = task.params()[key].data.flip(dim)
    torch.testing.assert_close(Obd("recursion")(task, masks)["0.weight"], before["0.weight"].flip(0))


def test_bad_input_is_refused_and_negative_curvature_is_told():
    task = CASES["attention"]()
    with pytest.raises(UsageError, match="samples must be at least 2 and draws at least 1, not 1 and 1"):
        Obd(samples=1)
    with pytest.raises(UsageError, match="'outputs' is that of curvature 'ggn'"):
        Obd("outputs", "hessian")
    ranking = Task(task.model, lambda out, y: out.square().mean().sqrt(), task.data)  # mixes the examples
    with pytest.raises(ModelError, match="not known.*hutchinson"):
        Obd("outputs")(ranking, Masks.dense(task.model))
    with pytest.raises(ModelError, match="_Transformer is none"):
        Obd("recursion")(task, Masks.dense(task.model))
    task = dense([[1.0, 2.0], [2.0, -3.0]])
    with pytest.warns(UserWarning, match="negative for 1 of 2 weights"):
        score = Obd("exact", "hessian")(task, Masks.dense(task.model))["weight"]
    torch.testing.assert_close(score, torch.tensor([[0.5, -1.5]], dtype=torch.float64))
