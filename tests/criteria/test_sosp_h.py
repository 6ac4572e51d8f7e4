"""SOSP-H: output units by slope and curvature, each with all others."""

import pytest
import torch

from secateur.core.errors import ModelError
from secateur.core.masks import Masks
from secateur.core.patterns import Unit
from secateur.criteria.sosp_h import SospH
from secateur.linalg.products import Operator
from secateur.testing import CASES
from secateur.testing.quadratics import dense


def parts(task, masks):
    """Both terms of every weight with their signs, from the whole Hessian."""
    op = Operator(task, masks)
    w = op.flatten(task.params()).mul(1.0)
    g = op.flatten(task.gradients())
    return op.unflatten(w * g), op.unflatten(w * (op.dense() @ w))


@pytest.mark.parametrize("name", CASES)
def test_a_unit_scores_the_formula(name):
    """The sum over a unit is |w_s·g| + |w_s·Hw| / 2, with H as an explicit matrix; and no share is negative."""
    task = CASES[name]()
    masks = Masks.dense(task.model)
    masks = Masks({n: m for n, m in masks.items() if m.numel() < 70})
    first, second = parts(task, masks)
    for n, score in SospH()(task, masks).items():
        expected = first[n].flatten(1).sum(1).abs() + second[n].flatten(1).sum(1).abs() / 2
        torch.testing.assert_close(Unit().unit_scores(score), expected, rtol=1e-9, atol=1e-13)
        assert (score >= 0).all()


def test_the_signed_model_is_the_true_change_of_a_quadratic():
    """All units at once: -w·g + w·Hw / 2 is L(0) - L(w); and a single unit of one weight shows both terms."""
    random = torch.Generator().manual_seed(0)
    h = torch.randn(4, 4, generator=random, dtype=torch.float64)
    task = dense(h + h.T, torch.randn(4, generator=random, dtype=torch.float64), torch.arange(1.0, 5.0).double())
    masks = Masks.dense(task.model)
    first, second = parts(task, masks)
    w = task.params()["weight"].detach()
    change = task.mean_loss({"weight": torch.zeros_like(w)}) - task.mean_loss()
    assert (-first["weight"].sum() + second["weight"].sum() / 2).item() == pytest.approx(change, abs=1e-10)
    expected = first["weight"].sum().abs() + second["weight"].sum().abs() / 2
    torch.testing.assert_close(SospH()(task, masks)["weight"].sum(), expected, rtol=1e-12, atol=0)


def test_units_see_each_other_only_through_the_curvature():
    """Layers that are scored apart get the curvature within themselves; together they get the mixed one as well."""
    task = CASES["tanh_mlp"]()
    masks = Masks.dense(task.model)
    apart = Masks({"0.weight": masks["0.weight"]})
    first, second = parts(task, apart)
    alone = Unit().unit_scores(SospH()(task, apart)["0.weight"])
    torch.testing.assert_close(alone, first["0.weight"].sum(1).abs() + second["0.weight"].sum(1).abs() / 2)
    assert not torch.allclose(alone, Unit().unit_scores(SospH()(task, masks)["0.weight"]), rtol=1e-2)


def test_pruned_weights_and_units_score_zero():
    task = CASES["conv_bn"]()
    masks = Masks({n: m & (task.params()[n] > 0) for n, m in Masks.dense(task.model).items()})
    gone = masks["first.weight"].clone()
    gone[1] = False
    masks = Masks({**masks, "first.weight": gone})
    scores = SospH()(task, masks)  # the network still holds the weights that the masks prune
    assert all(not scores[n][~masks[n]].any() for n in masks)
    assert not scores["first.weight"][1].any()
    assert Unit().unit_scores(scores["first.weight"])[[0, 2, 3, 4, 5]].all()


def test_bad_input_is_refused_by_name():
    task = CASES["tanh_mlp"]()
    masks = Masks.dense(task.model)
    with torch.no_grad():
        task.params()["4.weight"][0, 0] = float("inf")
    with pytest.raises(ModelError, match="`4.weight`"):
        SospH()(task, masks)
