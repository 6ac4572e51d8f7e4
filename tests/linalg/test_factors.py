"""Roots against the whole Hessian of the loss, in float64."""

import pytest
import torch
from torch.nn import functional

from secateur.core.errors import DataError
from secateur.linalg.factors import example_signs, root, signs

N, T, C = 3, 4, 5


def generator():
    return torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=generator(), dtype=torch.float64)


def labels(*shape):
    found = torch.randint(0, C, shape, generator=generator())
    found.view(-1)[1] = -100
    return found


CLASSES, TOKENS, PIXELS = labels(N), labels(N, T), labels(N, T)
WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0], dtype=torch.float64)
KNOWN = {
    "classes": (randn(N, C), lambda o: functional.cross_entropy(o, CLASSES)),
    "smoothed": (randn(N, C), lambda o: functional.cross_entropy(o, CLASSES, WEIGHTS, label_smoothing=0.1)),
    "tokens": (randn(N, T, C), lambda o: functional.cross_entropy(o.flatten(0, 1), TOKENS.flatten(), WEIGHTS)),
    "pixels": (randn(N, C, T), lambda o: functional.cross_entropy(o, PIXELS)),
    "certain": (6 * randn(N, C), lambda o: functional.cross_entropy(o, CLASSES)),
    "squared": (randn(N, C, T), lambda o: functional.mse_loss(o, torch.zeros_like(o))),
    "binary": (randn(N), lambda o: functional.binary_cross_entropy_with_logits(o, torch.ones_like(o))),
    "warm": (randn(N, C), lambda o: functional.cross_entropy(o / 2, CLASSES)),
    "pairs": (randn(N, 2, T), lambda o: (o.sum(1) + o[:, 0]).square().mean()),
    "linear": (randn(N, C), lambda o: o.mean()),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_root_times_its_transpose_is_the_hessian(name):
    output, loss = KNOWN[name]
    factor = root(lambda o, _: loss(o), output, None, generator())
    assert factor is not None
    axes = torch.eye(output.numel(), dtype=torch.float64)
    columns = torch.stack([factor(axis.view_as(output)).flatten() for axis in axes], 1)
    truth = torch.autograd.functional.hessian(loss, output).reshape(output.numel(), -1)
    assert name == "linear" or truth.abs().max() > 1e-8
    torch.testing.assert_close(columns @ columns.T, truth, rtol=1e-9, atol=1e-9 * float(truth.abs().max()))


UNKNOWN = {
    "mixes examples": (randn(N, C), lambda o: (o.sum() ** 2) / N),
    "not convex": (randn(N, C), lambda o: o.sin().mean()),
    "large and mixed": (randn(N, 65), lambda o: o.square().sum(1).sqrt().mean()),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_losses_have_none(name):
    output, loss = UNKNOWN[name]
    assert root(lambda o, _: loss(o), output, None, generator()) is None


def test_half_precision_is_widened_and_a_broken_loss_is_refused():
    output, loss = randn(N, C).bfloat16(), KNOWN["classes"][1]
    factor = root(lambda o, _: loss(o), output, None, generator())
    assert factor is not None
    found = factor(signs(output.float(), generator()))
    assert found.dtype == torch.float32
    with pytest.raises(DataError, match="the loss is nan"):
        root(lambda o, _: (o * torch.nan).sum(), output, None, generator())


def test_signs_of_an_example_are_its_own_wherever_it_stands():
    x, words = randn(2000, 3, 2), torch.randint(0, 9, (2000, 4), generator=generator())
    like = torch.zeros(2000, 5)
    whole = example_signs((x, {"ids": words}), like, 1)
    assert whole.shape == like.shape and set(whole.unique().tolist()) == {-1.0, 1.0}
    order = torch.randperm(2000, generator=generator())
    assert torch.equal(example_signs((x[order], {"ids": words[order]}), like, 1), whole[order])
    assert torch.equal(example_signs((x[7:9], {"ids": words[7:9]}), like[7:9], 1), whole[7:9])
    second = torch.cat([whole, example_signs((x, {"ids": words}), like, 2)], 1)
    together = second.T @ second / 2000  # no sign says anything about another
    assert (together - torch.eye(10)).abs().max() < 5 / 2000**0.5
    assert whole.mean(0).abs().max() < 5 / 2000**0.5
