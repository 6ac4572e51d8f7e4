"""Magnitude: |w|, and nothing else."""

import pytest
import torch

from secateur.core.choose import choose
from secateur.core.errors import MaskError, ModelError
from secateur.core.masks import Masks
from secateur.core.task import Task
from secateur.criteria.magnitude import Magnitude
from secateur.testing import CASES


def test_scores_are_the_absolute_weights():
    task = CASES["conv_bn"]()
    masks = Masks.dense(task.model)

    scores = Magnitude()(task, masks)

    for name in masks:
        assert torch.equal(scores[name], task.params()[name].detach().abs())


def test_the_largest_weights_survive():
    """Definition of the order: no pruned weight is larger than a kept one."""
    task = CASES["tanh_mlp"]()
    scores = Magnitude()(task, Masks.dense(task.model))

    masks = choose(scores, 20)

    kept = torch.cat([task.params()[n].detach().abs()[m] for n, m in masks.items()])
    pruned = torch.cat([task.params()[n].detach().abs()[~m] for n, m in masks.items()])
    assert kept.min() >= pruned.max()
    assert len(kept) == 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_scores_keep_the_type_of_the_weights(dtype):
    """|w| is exact in every type."""
    task = CASES["relu_mlp"](dtype)
    scores = Magnitude()(task, Masks.dense(task.model))
    assert {score.dtype for score in scores.values()} == {dtype}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad):
    task = CASES["tanh_mlp"]()
    with torch.no_grad():
        task.params()["2.weight"][1, 1] = bad
    with pytest.raises(ModelError, match="`2.weight`"):
        Magnitude()(task, Masks.dense(task.model))


def test_masks_of_another_network_are_refused():
    task = CASES["tanh_mlp"]()
    with pytest.raises(MaskError, match="another network"):
        Magnitude()(task, Masks.dense(CASES["conv_bn"]().model))


def test_data_are_never_read():
    whole = CASES["tanh_mlp"]()
    Magnitude()(Task(whole.model, whole.loss, iter([])), Masks.dense(whole.model))


def test_a_network_of_zeros_cannot_be_ranked():
    task = CASES["tanh_mlp"]()
    with torch.no_grad():
        for p in task.params().values():
            p.zero_()
    with pytest.raises(ModelError, match="all scores are zero"):
        choose(Magnitude()(task, Masks.dense(task.model)), 5)
