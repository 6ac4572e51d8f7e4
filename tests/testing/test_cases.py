"""The small networks that contracts run on are what they say."""

import pytest
import torch

from secateur.core.masks import Masks
from secateur.testing import CASES, HIDDEN
from secateur.testing.cases import conv_bn, recut, reorder, reordered


@pytest.mark.parametrize("name", CASES)
def test_the_same_arguments_give_the_same_task_and_leave_the_global_generator_alone(name):
    before = torch.get_rng_state()
    one, other = CASES[name](), CASES[name]()
    assert torch.equal(torch.get_rng_state(), before)
    assert one.mean_loss() == other.mean_loss()
    assert one.model.state_dict().keys() == other.model.state_dict().keys()
    assert CASES[name](seed=1).mean_loss() != one.mean_loss()


@pytest.mark.parametrize("name", CASES)
def test_float32_is_the_same_network_rounded(name):
    exact, single = CASES[name](), CASES[name](torch.float32)
    for key, value in exact.model.state_dict().items():
        assert torch.equal(value.to(single.model.state_dict()[key].dtype), single.model.state_dict()[key])
    assert single.mean_loss() == pytest.approx(exact.mean_loss(), rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_batches_are_unequal_and_their_losses_differ(name):
    task = CASES[name]()
    sizes = [n for _, _, n in task.batches()]
    losses = [task.loss_at(batch).item() for batch in task.data]
    assert sizes == [4, 2]
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_every_gradient_is_alive(name):
    """Nothing in these networks is dead by accident: every prunable tensor has a slope."""
    task = CASES[name]()
    slopes = task.gradients()
    for key in Masks.dense(task.model):
        assert slopes[key].abs().max() > 1e-6


@pytest.mark.parametrize("name", CASES)
def test_hidden_channels_may_change_places(name):
    """The twin computes the same outputs, with other weights."""
    task, hidden = CASES[name](), HIDDEN[name]
    twin = reordered(task, hidden, torch.arange(hidden.width).roll(1))
    for (one, _, _), (other, _, _) in zip(task.outputs(), twin.outputs(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    first = hidden.places[0][0]
    assert not torch.equal(task.params()[first], twin.params()[first])


def test_a_recut_task_has_the_same_loss():
    task = CASES["attention"]()
    order = torch.tensor([5, 4, 3, 2, 1, 0])
    for other in (recut(task, (6,)), recut(task, (1, 1, 4)), recut(task, (3, 3), order)):
        assert other.mean_loss() == pytest.approx(task.mean_loss(), abs=1e-14)


def test_reordering_back_gives_the_tensor_back():
    tensor, order = torch.arange(24.0).reshape(2, 12), torch.tensor([2, 0, 3, 1])
    assert torch.equal(reorder(reorder(tensor, 1, 3, order), 1, 3, torch.argsort(order)), tensor)


def test_trained_norms_have_seen_data_and_untrained_ones_have_not():
    assert int(conv_bn().model.first_norm.num_batches_tracked) == 3
    fresh = conv_bn(trained=False).model.first_norm
    assert int(fresh.num_batches_tracked) == 0
    assert not fresh.running_mean.any()
