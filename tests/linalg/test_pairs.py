"""Pairs of units against the whole Gauss-Newton matrix, in float64."""

import pytest
import torch

from secateur.core.masks import Masks
from secateur.core.task import Task
from secateur.linalg import pairs
from secateur.linalg.pairs import unit_pairs
from secateur.linalg.products import Operator
from secateur.testing import CASES


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["tanh_mlp", "conv_bn", "attention", "tied", "lstm"])
def test_they_are_products_with_the_whole_matrix_however_a_batch_is_cut(name, whole, monkeypatch):
    if not whole:
        monkeypatch.setattr(pairs, "_BYTES", 1)
    task = CASES[name]()
    masks = Masks({n: m & (task.params()[n] > -0.2) for n, m in list(Masks.dense(task.model).items())[-2:]})
    op, vectors = Operator(task, masks, "ggn"), []
    for key, mask in masks.items():
        for i in range(len(mask)):
            zeros = {n: torch.zeros(m.shape, dtype=torch.float64) for n, m in masks.items()}
            zeros[key][i] = task.params()[key].detach()[i]
            vectors.append(op.flatten(zeros))
    units = torch.stack(vectors)
    found = unit_pairs(task, masks)
    assert found.abs().max() > 0
    torch.testing.assert_close(found, units @ op.dense() @ units.T, rtol=1e-9, atol=1e-13)


def test_a_loss_linear_in_the_outputs_has_none():
    task = CASES["tanh_mlp"]()
    linear = Task(task.model, lambda output, _: output.mean(), task.data)
    assert not unit_pairs(linear, Masks.dense(task.model)).any()
