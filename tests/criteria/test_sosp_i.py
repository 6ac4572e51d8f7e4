"""SOSP-I: output units in the order of the greedy choice."""

import itertools

import pytest
import torch
from torch import nn

from secateur.core.errors import ModelError
from secateur.core.masks import Masks
from secateur.core.patterns import Unit
from secateur.core.task import Task
from secateur.criteria.sosp_i import SospI
from secateur.linalg.products import Operator
from secateur.testing import CASES


def costs(task, masks):
    """Q of the paper from the whole Gauss-Newton matrix, a dense vector for every unit."""
    op = Operator(task, masks, "ggn")
    vectors = []
    for name, mask in masks.items():
        for i in range(len(mask)):
            zeros = {n: torch.zeros(m.shape, dtype=torch.float64) for n, m in masks.items()}
            zeros[name][i] = task.params()[name].detach()[i]
            vectors.append(op.flatten(zeros))
    units = torch.stack(vectors)
    slopes = op.flatten(task.gradients())
    return (units @ op.dense() @ units.T).abs() / 2 + torch.diag((units @ slopes).abs())


def unit_scores(scores):
    return torch.cat([Unit().unit_scores(score) for score in scores.values()])


@pytest.mark.parametrize("name", ["tanh_mlp", "conv_bn", "attention", "tied", "lstm"])
def test_scores_are_what_each_step_of_the_greedy_choice_adds(name):
    task = CASES[name]()
    masks = Masks.dense(task.model)
    masks = Masks({n: masks[n] for n in list(masks)[-2:]})
    q = costs(task, masks)
    gone, expected = [], torch.zeros(len(q), dtype=torch.float64)
    while len(gone) < len(q):
        before = q[gone][:, gone].sum()
        adds = {s: (q[[*gone, s]][:, [*gone, s]].sum() - before).item() for s in range(len(q)) if s not in gone}
        best = min(adds, key=adds.__getitem__)
        expected[best] = adds[best]
        gone.append(best)

    found = unit_scores(SospI()(task, masks))

    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-13)
    assert (found[gone].diff() >= -1e-14).all()
    assert found.sum().item() == pytest.approx(q.sum().item(), rel=1e-10)  # all units together cost the whole of Q


def test_the_choice_of_two_is_among_the_best_pairs():
    task = CASES["tanh_mlp"]()
    masks = Masks.dense(task.model)
    q = costs(task, masks)
    chosen = unit_scores(SospI()(task, masks)).argsort()[:2].tolist()
    pairs = sorted(itertools.combinations(range(len(q)), 2), key=lambda p: q[list(p)][:, list(p)].sum().item())
    assert tuple(sorted(chosen)) in pairs[:5]


def test_shares_within_a_unit_are_the_squared_changes_of_the_outputs():
    """In a linear network J w of one weight is w times its input, for one output."""
    net = nn.Linear(3, 2, bias=False).double()
    x = torch.tensor([[1.0, 2.0, 0.0], [0.5, -1.0, 0.0]]).double()
    task = Task(net, nn.functional.mse_loss, [(x, torch.zeros(2, 2).double())])
    score = SospI()(task, Masks.dense(net))["weight"]
    squares = (net.weight.detach().square()) * x.square().sum(0)
    torch.testing.assert_close(score / score.sum(1, True), squares / squares.sum(1, True), rtol=1e-12, atol=0)
    assert not score[:, 2].any()


def test_pruned_weights_score_zero():
    task = CASES["relu_mlp"]()
    masks = Masks({n: m & (task.params()[n] > 0) for n, m in Masks.dense(task.model).items()})
    scores = SospI()(task, masks)
    masks.apply_(task.model)
    assert all(not scores[n][~masks[n]].any() for n in masks)
    assert torch.equal(scores["0.weight"] > 0, masks["0.weight"])


def test_bad_input_is_refused_by_name():
    net = nn.LSTM(3, 2).double()
    data = [(torch.ones(2, 3).double(), torch.zeros(2))]
    with pytest.raises(ModelError, match="the output has type tuple.*`sosp_h`"):
        SospI()(Task(net, lambda output, target: output[0].sum(), data), Masks.dense(net))
    task = CASES["tanh_mlp"]()
    with torch.no_grad():
        task.params()["4.weight"][0, 0] = float("inf")
    with pytest.raises(ModelError, match="`4.weight`"):
        SospI()(task, Masks.dense(task.model))
