"""WoodFisher: the least rise of a quadratic loss with the empirical Fisher as its curvature."""

import pytest
import torch
from torch import nn

from secateur.core.errors import DataError, ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.task import Task
from secateur.criteria.woodfisher import WoodFisher
from secateur.testing import CASES


def rows_of(task, masks):
    """The gradient of every example by itself, one backward pass each."""
    rows = []
    for x, y in task.data:
        for i in range(len(x)):
            g = Task(task.model, task.loss, [(x[i : i + 1], y[i : i + 1])]).gradients()
            rows.append(torch.cat([g[name][masks[name]] for name in masks]))
    return torch.stack(rows)


def fisher(rows, damping=0.01):
    matrix = rows.T @ rows / len(rows)
    return matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)


def joined(named, masks):
    return torch.cat([named[name].detach()[masks[name]] for name in masks])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batches", [(4, 2), (90, 40)], ids=["few examples", "many examples"])
def test_one_block_is_the_inverse_of_the_whole_fisher(name, batches):
    """Few examples go the way of M-FAC, many that of the recursion; the inverse of the matrix is the reference."""
    task = CASES[name](batches=batches)
    masks = Masks.dense(task.model)
    first = list(masks)[-1]
    masks = Masks({first: masks[first]})
    inverse = torch.linalg.inv(fisher(rows_of(task, masks)))
    expected = joined(task.params(), masks).square() / (2 * inverse.diagonal())

    score = joined(WoodFisher(None)(task, masks), masks)

    torch.testing.assert_close(score, expected, rtol=1e-8, atol=1e-12)


def test_the_score_is_the_rise_of_the_quadratic_when_the_others_make_up_for_it():
    """Minimise d·F d / 2 over all d with d_q = -w_q, by a solve over the others."""
    task = CASES["tanh_mlp"]()
    masks = Masks.dense(task.model)
    f, w = fisher(rows_of(task, masks), 0.1), joined(task.params(), masks)
    score = joined(WoodFisher(None, 0.1)(task, masks), masks)
    for q in (0, 31, 60, len(w) - 1):
        rest = torch.arange(len(w)) != q
        move = torch.zeros_like(w)
        move[q] = -w[q]
        move[rest] = torch.linalg.solve(f[rest][:, rest], f[rest, q] * w[q])
        assert score[q].item() == pytest.approx((move @ f @ move / 2).item(), rel=1e-9)


def test_blocks_are_runs_of_kept_weights_within_a_tensor():
    task = CASES["tanh_mlp"]()
    masks = Masks.dense(task.model)
    masks = masks & Masks({name: task.params()[name] > -0.3 for name in masks})
    f, w = fisher(rows_of(task, masks)), joined(task.params(), masks)
    expected, start = [], 0
    for count in masks.counts().values():
        for first in range(start, start + count, 4):
            part = slice(first, min(first + 4, start + count))
            expected.append(w[part].square() / (2 * torch.linalg.inv(f[part, part]).diagonal()))
        start += count

    scores = WoodFisher(4)(task, masks)

    torch.testing.assert_close(joined(scores, masks), torch.cat(expected), rtol=1e-9, atol=1e-14)
    assert all(not scores[name][~masks[name]].any() for name in masks)
    whole = WoodFisher(2000)(task, masks)
    assert all(torch.equal(whole[name], WoodFisher(max(masks.counts().values()))(task, masks)[name]) for name in masks)


def test_blocks_of_one_are_the_damped_diagonal():
    task = CASES["lstm"]()
    masks = Masks.dense(task.model)
    expected = fisher(rows_of(task, masks)).diagonal() * joined(task.params(), masks).square() / 2
    torch.testing.assert_close(joined(WoodFisher(1)(task, masks), masks), expected, rtol=1e-10, atol=0)


def test_with_much_damping_the_ranking_is_that_of_magnitude():
    task = CASES["tanh_mlp"]()
    masks = Masks.dense(task.model)
    score, w = joined(WoodFisher(damping=1e9)(task, masks), masks), joined(task.params(), masks)
    assert torch.equal(score.argsort(), w.abs().argsort())
    assert not torch.equal(joined(WoodFisher()(task, masks), masks).argsort(), w.abs().argsort())


def test_weights_without_any_gradient_score_zero():
    task = CASES["tanh_mlp"]()
    blank = [(x * torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]), y) for x, y in task.data]
    scores = WoodFisher()(Task(task.model, task.loss, blank), Masks.dense(task.model))
    assert not scores["0.weight"][:, 2].any()
    assert scores["0.weight"][:, [0, 1, 3, 4]].all()
    deaf = Task(task.model, lambda output, target: 0.0 * output.sum(), task.data)
    assert not any(score.any() for score in WoodFisher()(deaf, Masks.dense(task.model)).values())


def test_bad_input_is_refused_by_name():
    with pytest.raises(UsageError, match="damping must be above 0, not 0"):
        WoodFisher(damping=0.0)
    with pytest.raises(UsageError, match="block must be at least 1, not 0"):
        WoodFisher(block=0)
    task = CASES["tanh_mlp"]()
    masks = Masks.dense(task.model)
    cliff = Task(task.model, lambda out, y: nn.functional.cross_entropy((out - out.detach()).sqrt(), y), task.data)
    with pytest.raises(DataError, match="not finite"):
        WoodFisher()(cliff, masks)
    with torch.no_grad():
        task.params()["4.weight"][0, 0] = float("inf")
    with pytest.raises(ModelError, match="`4.weight`"):
        WoodFisher()(task, masks)
