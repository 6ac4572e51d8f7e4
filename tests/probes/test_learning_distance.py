"""Learning distance: by hand, after no step, and with pruned coordinates."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from secateur.core.errors import ModelError
from secateur.core.files import write_tensors
from secateur.core.masks import Masks
from secateur.core.task import Task
from secateur.probes.learning_distance import LearningDistance
from secateur.testing.cases import CASES, tanh_mlp
from secateur.testing.promises import half_pruned


def pair():
    start, now = nn.Linear(2, 2), nn.Linear(2, 2)
    with torch.no_grad():
        start.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        start.bias.copy_(torch.tensor([1.0, 0.0]))
        now.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 7.0]]))
        now.bias.copy_(torch.tensor([1.0, 2.0]))
    return start, now


def test_a_case_by_hand():
    start, now = pair()
    masks = Masks({"weight": torch.tensor([[True, False], [False, True]])})
    reading = LearningDistance(start)(Task(now, functional.mse_loss, []), masks)
    assert reading.value == pytest.approx(math.sqrt(0 + 9 + 0 + 4))
    parts = reading.parts
    assert parts["all"] == pytest.approx(math.sqrt(9 + 4 + 9 + 4))
    assert (parts["l2:weight"], parts["l2:bias"]) == (3.0, 2.0)
    assert parts["all:weight"] == pytest.approx(math.sqrt(4 + 9 + 9))
    assert parts["cosine:weight"] == pytest.approx(1 - 29 / math.sqrt(50 * 17))
    assert parts["cosine:bias"] == pytest.approx(1 - 1 / math.sqrt(5))
    assert parts["cosine"] == pytest.approx(1 - 30 / math.sqrt((50 + 5) * (17 + 1)))


@pytest.mark.parametrize("name", CASES)
def test_no_step_is_no_distance_and_what_is_masked_at_both_ends_counts_nothing(name):
    task = CASES[name]()
    start = copy.deepcopy(task.model)
    same = LearningDistance(start)(task)
    assert (same.value, same.parts["all"]) == (0.0, 0.0) and same.parts["cosine"] < 1e-12
    masks = half_pruned(task)
    pruned = LearningDistance(start)(task, masks)
    assert pruned.value == 0.0
    before = dict(start.named_parameters())
    lost = sum(float(before[n].detach()[~mask].square().sum()) for n, mask in masks.items())
    assert pruned.parts["all"] == pytest.approx(math.sqrt(lost), rel=1e-12)
    masks.apply_(start)
    assert LearningDistance(start)(task, masks).parts["all"] == 0.0


def test_without_a_reference_it_is_the_norm_and_there_is_no_cosine():
    task = tanh_mlp()
    reading = LearningDistance()(task)
    norm = math.sqrt(sum(float(p.detach().square().sum()) for p in task.model.parameters()))
    assert reading.value == pytest.approx(norm, rel=1e-12) and "distance from zero" in reading.note
    assert not any("cosine" in name for name in reading.parts)


def test_a_file_and_another_architecture(tmp_path):
    start, now = pair()
    write_tensors(tmp_path / "weights.safetensors", start.state_dict())
    task = Task(now, functional.mse_loss, [])
    assert LearningDistance(tmp_path)(task) == LearningDistance(start)(task)
    with pytest.raises(ModelError, match="another architecture"):
        LearningDistance(nn.Linear(3, 2))(task)
