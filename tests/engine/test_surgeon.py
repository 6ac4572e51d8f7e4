"""Whole networks as one vector: on a quadratic loss forecast, rise and refit agree exactly; nothing half done."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from secateur.core.errors import BudgetError, DataError, UsageError
from secateur.core.masks import Masks
from secateur.core.reading import Paper
from secateur.core.select import top_mask
from secateur.core.sockets import Solver
from secateur.core.task import Task
from secateur.engine.surgeon import operate
from secateur.linalg.products import Operator
from secateur.solvers.exact_obs import ExactObs
from secateur.solvers.obs import Obs


def half_square(output, target):
    return (output - target).square().sum(1).mean() / 2


@pytest.fixture
def regression():
    """Linear least squares at its minimum, float64; the bias counts as a weight."""
    torch.manual_seed(0)
    x = torch.randn(40, 6, dtype=torch.float64) * torch.linspace(0.3, 2, 6, dtype=torch.float64)
    y = x @ torch.randn(6, 1, dtype=torch.float64) + torch.randn(40, 1, dtype=torch.float64)
    model = nn.Linear(6, 1, dtype=torch.float64)
    best = torch.linalg.lstsq(torch.cat([x, torch.ones(40, 1)], 1), y).solution[:, 0]
    with torch.no_grad():
        model.weight.copy_(best[None, :6])
        model.bias.copy_(best[6:])
    return Task(model, half_square, [(x[:25], y[:25]), (x[25:], y[25:])]), x, y


def refitted(x, y, kept):
    """Smallest loss with these columns (the last is the bias)."""
    wide = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)[:, kept]
    return float((wide @ torch.linalg.lstsq(wide, y).solution - y).square().sum(1).mean() / 2)


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_a_quadratic_loss_rises_as_forecast_and_no_refit_is_better(regression, kind, rounds):
    task, x, y = regression
    masks = Masks.dense(task.model, only=["*"])
    dense = task.mean_loss()
    new, records = operate(task, masks, 4, Obs(damping=0.0), kind, rounds)
    assert new.kept == 4 == records[-1].kept and len(records) == rounds
    assert sum(record.forecast for record in records) == pytest.approx(task.mean_loss() - dense, rel=1e-9)
    kept = torch.cat([new["weight"][0], new["bias"]])
    assert task.mean_loss() == pytest.approx(refitted(x, y, kept), rel=1e-9)
    weights = torch.cat([task.model.weight[0], task.model.bias])
    assert bool((weights[~kept] == 0).all()) and bool((weights[kept] != 0).all())


def test_one_weight_is_the_one_whose_refit_is_best(regression):
    task, x, y = regression
    new, _ = operate(task, Masks.dense(task.model, only=["*"]), 6, Obs(damping=0.0))
    losses = [refitted(x, y, torch.arange(7) != out) for out in range(7)]
    gone = torch.cat([new["weight"][0], new["bias"]]).logical_not().nonzero().item()
    assert gone == losses.index(min(losses))


def test_pruned_weights_stay_and_others_are_left_alone():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    task = Task(model, nn.functional.cross_entropy, [(torch.randn(30, 5).double(), torch.randint(0, 3, (30,)))])
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = Masks.dense(model)
    masks = Masks({name: torch.rand(mask.shape) < 0.7 for name, mask in masks.items()})
    masks.apply_(model)
    new, _ = operate(task, masks, masks.kept // 2, ExactObs(), "fisher", rounds=2)
    assert new.kept == masks.kept // 2
    for name, mask in new.items():
        assert not bool((mask & ~masks[name]).any())
        assert torch.equal(task.params()[name] != 0, mask)
    for name in ("0.bias", "2.bias"):
        assert torch.equal(task.params()[name], old[name])


def test_the_fisher_as_a_matrix_is_its_products(regression):
    task, _, _ = regression
    op = Operator(task, Masks.dense(task.model, only=["*"]), "fisher")
    torch.testing.assert_close(op.dense(), op @ torch.eye(7, dtype=torch.float64), rtol=1e-12, atol=1e-14)


@dataclass(frozen=True)
class Failing(Solver):
    paper = Paper("none", "nobody", 2026, "", differs="in nothing known")
    short: bool = False

    def __call__(self, weight, gram, pattern, keep):
        if gram.shape[0] < 7:
            if not self.short:
                raise DataError("the matrix is singular")
            keep -= 1
        mask = top_mask(weight.abs(), keep)
        return weight * mask, mask


@pytest.mark.parametrize(("short", "error"), [(False, DataError), (True, UsageError)])
def test_an_error_in_a_later_round_restores_everything(regression, short, error):
    task, _, _ = regression
    old = {name: p.detach().clone() for name, p in task.params().items()}
    with pytest.raises(error):
        operate(task, Masks.dense(task.model, only=["*"]), 3, Failing(short), rounds=2)
    assert all(torch.equal(old[name], p) for name, p in task.params().items())


@pytest.mark.parametrize(("keep", "rounds", "error"), [(0, 1, BudgetError), (8, 1, BudgetError), (3, 0, UsageError)])
def test_counts_out_of_range(regression, keep, rounds, error):
    task, _, _ = regression
    with pytest.raises(error):
        operate(task, Masks.dense(task.model, only=["*"]), keep, Obs(), rounds=rounds)
