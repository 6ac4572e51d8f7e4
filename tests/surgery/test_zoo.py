"""The test networks themselves: they run, learn, export, and say the same thing twice."""

import random

import pytest
import torch
from tests.surgery.hf import HF
from tests.surgery.random_nets import random_network
from tests.surgery.zoo import ARCHITECTURES
from torch.utils._pytree import tree_leaves

# Exporting nn.GRU and nn.LSTM moves their list of flat weights about and says so.
pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export:UserWarning")


# The last residual convolution of a WaveNet feeds nothing: a part that an exported program does not show.
UNREACHED = {"wavenet": ["residuals.2.weight", "residuals.2.bias"]}


def results(model, args, kwargs):
    """All floating tensors of one pass, in order."""
    return [x for x in tree_leaves(model(*args, **kwargs)) if isinstance(x, torch.Tensor) and x.is_floating_point()]


def check_eval(model, args, kwargs):
    """Two passes agree to the bit and so, up to rounding, does the exported program."""
    model.eval()
    with torch.no_grad():
        first, second = results(model, args, kwargs), results(model, args, kwargs)
    assert first and all(x.shape[0] == 2 and torch.isfinite(x).all() for x in first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    program = torch.export.export(model, args, kwargs, strict=False).module(check_guards=False)
    with torch.no_grad():
        exported = results(program, args, kwargs)
    torch.testing.assert_close(exported, first, rtol=1e-4, atol=1e-5)


def check_gradients(model, args, kwargs, train):
    """One pass forward and backward; returns the names of parameters that it does not reach."""
    model.train(train).zero_grad(set_to_none=True)
    torch.stack([x.square().sum() for x in results(model, args, kwargs)]).sum().backward()
    trained = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    assert all(torch.isfinite(grad).all() for _, grad in trained if grad is not None)
    return [name for name, grad in trained if grad is None]


def check(model, args, kwargs, unreached=()):
    assert sum(p.numel() for p in model.parameters()) < 300_000
    for train in (False, True):
        assert check_gradients(model, args, kwargs, train) == list(unreached)
    check_eval(model, args, kwargs)


def test_zoo_is_wide_enough():
    assert len(ARCHITECTURES) >= 34
    assert len(HF) >= 12


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_runs_and_exports(name):
    model, args = ARCHITECTURES[name]()

    check(model, args, {}, UNREACHED.get(name, ()))


@pytest.mark.parametrize("name", HF)
def test_hugging_face_model_runs_and_exports(name):
    pytest.importorskip("transformers")
    model, kwargs = HF[name]()

    check(model, (), kwargs)


@pytest.mark.parametrize("seed", range(20))
def test_random_network_runs_and_exports(seed):
    model, args = random_network(random.Random(seed))

    check(model, args, {})


def test_same_seed_draws_the_same_network():
    torch.manual_seed(1)
    a, (x,) = random_network(random.Random(7))
    torch.manual_seed(2)
    b, (y,) = random_network(random.Random(7))
    c, _ = random_network(random.Random(8))

    assert a.steps == b.steps != c.steps
    assert torch.equal(x, y)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    ARCHITECTURES["vgg"]()
    random_network(random.Random(0))

    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("name", ["vgg", "gqa_decoder", "swin"])
def test_building_twice_gives_equal_weights(name):
    (a, x), (b, y) = ARCHITECTURES[name](), ARCHITECTURES[name]()

    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))
