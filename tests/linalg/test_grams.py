"""Gram matrices of layer inputs, against explicit patches in float64."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from secateur.core.errors import DataError, ModelError
from secateur.core.names import unwrap
from secateur.core.task import Task
from secateur.linalg import grams as module_under_test
from secateur.linalg.grams import Gram, grams, layer_matrix, layer_weight
from secateur.testing import CASES
from secateur.testing.cases import recut

CONVS = {
    "plain 2d": (nn.Conv2d(4, 6, 3), (7, 8)),
    "stride and padding": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2)), (7, 8)),
    "groups and dilation": (nn.Conv2d(4, 6, 3, groups=2, dilation=(2, 1)), (7, 8)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), (6, 6)),
    "same, even kernel": (nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)), (7, 8)),
    "valid": (nn.Conv1d(4, 6, 3, padding="valid"), (9,)),
    "1d circular": (nn.Conv1d(4, 6, 3, padding=2, stride=2, padding_mode="circular"), (9,)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (6, 7)),
    "replicate 3d": (nn.Conv3d(4, 6, (2, 3, 1), padding=1, padding_mode="replicate", groups=2), (4, 3, 5)),
    "pointwise": (nn.Conv2d(4, 6, 1, stride=2), (5, 5)),
}


def one_layer(layer, *shape, batches=(3, 2)):
    random = torch.Generator().manual_seed(0)
    data = [(torch.randn(n, *shape, generator=random, dtype=torch.float64), torch.zeros(n)) for n in batches]
    return Task(layer.double(), lambda output, target: output.mean(), data)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONVS)
def test_gram_gives_the_energy_of_the_layers_own_outputs(name):
    """trace(W G Wᵀ) for random weights is the mean over examples of the squared output that torch computes."""
    layer, shape = CONVS[name]
    task = one_layer(layer, 4, *shape)
    gram = grams(task, {"": layer})[""]
    assert gram.matrix.shape[0] == layer.groups and gram.matrix.dtype == torch.float64 and gram.examples == 5
    random, w = torch.Generator().manual_seed(1), layer.weight.detach().clone()
    for _ in range(3):
        layer.weight.data = torch.randn(w.shape, generator=random, dtype=torch.float64)
        with torch.no_grad():
            outputs = [layer(x) - layer.bias.view(-1, *[1] * len(shape)) for x, _ in task.data]
        rows = layer_matrix(layer).detach()
        energy = sum(o.square().sum() for o in outputs) / 5
        torch.testing.assert_close(((rows @ gram.matrix) * rows).sum(), energy, rtol=1e-12, atol=0)
        assert gram.positions == sum(o.shape[0] * o[0, 0].numel() for o in outputs)
    layer.weight.data = w


@pytest.mark.parametrize("name", ["plain 2d", "stride and padding", "groups and dilation", "depthwise", "pointwise"])
def test_entries_are_those_of_explicit_patches(name):
    """The off-diagonal too: torch's own unfold, group by group."""
    layer, shape = CONVS[name]
    task = one_layer(layer, 4, *shape)
    x = torch.cat([x for x, _ in task.data])
    patches = functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    patches = patches.unflatten(1, (layer.groups, -1))
    expected = torch.einsum("ngip,ngjp->gij", patches, patches) / 5
    torch.testing.assert_close(grams(task, {"a": layer})["a"].matrix, expected, rtol=1e-12, atol=1e-14)


def test_linear_on_sequences_adds_up_positions():
    """Five examples of seven words: the sum over words, the mean over examples."""
    layer = nn.Linear(4, 3)
    task = one_layer(layer, 7, 4)
    x = torch.cat([x for x, _ in task.data])
    gram = grams(task, {"a": layer})["a"]
    expected = sum(torch.outer(v, v) for v in x.reshape(-1, 4)) / 5
    torch.testing.assert_close(gram.matrix[0], expected, rtol=1e-12, atol=1e-14)
    assert (gram.examples, gram.positions, gram.rank_bound) == (5, 35, 4)


def test_a_layer_on_windows_is_divided_by_examples_not_windows():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(2, 3)

        def forward(self, x):
            return self.line(x.reshape(-1, 2)).reshape(len(x), -1) + self.line(x[:, :2]).repeat(1, 3)

    net = Windows()
    task = one_layer(net, 6)
    x = torch.cat([x for x, _ in task.data])
    gram = grams(task, {"line": net.line})["line"]
    expected = sum(p.T @ p for p in (x.reshape(-1, 2), x[:, :2])) / 5
    torch.testing.assert_close(gram.matrix[0], expected, rtol=1e-12, atol=1e-14)
    assert (gram.examples, gram.positions) == (5, 20)


@pytest.mark.parametrize("name", CASES)
def test_any_cut_into_batches_or_pieces_gives_the_same(name, monkeypatch):
    task = CASES[name]()
    layers = {n: m for n, m in unwrap(task.model).named_modules() if isinstance(m, module_under_test.LAYERS)}
    one = grams(task, layers)
    monkeypatch.setattr(module_under_test, "_PATCHES", 1)
    other = grams(recut(task, (1, 2, 3)), layers)
    assert list(one) == list(layers)
    for key, gram in one.items():
        torch.testing.assert_close(gram.matrix, other[key].matrix, rtol=1e-12, atol=1e-13)
        assert (gram.examples, gram.positions) == (other[key].examples, other[key].positions)


def test_weights_become_matrices_and_back():
    """Row o of group g is output g * (out / groups) + o."""
    for layer, _ in CONVS.values():
        rows = layer_matrix(layer)
        size = layer.out_channels // layer.groups
        for g, o in itertools.product(range(layer.groups), range(size)):
            assert torch.equal(rows[g, o], layer.weight[g * size + o].flatten())
        assert torch.equal(layer_weight(layer, rows), layer.weight)
    assert layer_matrix(nn.Linear(3, 2)).shape == (1, 2, 3)
    assert torch.equal(layer_matrix(nn.Linear(3, 2), torch.ones(2, 3)), torch.ones(1, 2, 3))


def test_half_precision_inputs_add_up_in_float32():
    layer = nn.Linear(1, 1).bfloat16()
    x = torch.ones(4096, 1, dtype=torch.bfloat16)  # bfloat16 stops counting at 256
    gram = grams(Task(layer, lambda o, t: o.mean(), [(x, torch.zeros(4096))] * 2), {"a": layer})["a"]
    assert gram.matrix.dtype == torch.float32 and gram.matrix.item() == 1.0


def test_rank_is_bounded_by_positions():
    task = one_layer(nn.Linear(9, 2), 9)
    gram = grams(task, {"a": task.model})["a"]
    assert gram.rank_bound == 5 == torch.linalg.matrix_rank(gram.matrix[0])
    assert isinstance(gram, Gram) and torch.equal(gram.matrix, gram.matrix.mT)


def test_bad_input_is_refused_by_name():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.MultiheadAttention(4, 2))
    task = one_layer(nn.Sequential(net[0], net[1]), 4)
    with pytest.raises(ModelError, match="`b` is a ReLU"):
        grams(task, {"a": net[0], "b": net[1]})
    with pytest.raises(ModelError, match="`out` is never called"):
        grams(task, {"out": net[2].out_proj})
    with pytest.raises(ModelError, match="ReLU"):
        layer_matrix(net[1])
    with pytest.raises(DataError, match="inputs of layer `a` are not finite"):
        grams(Task(task.model, task.loss, [(x / 0, y) for x, y in task.data]), {"a": net[0]})
    with pytest.raises(DataError, match="read only once"):
        grams(Task(task.model, task.loss, iter(task.data)), {"a": net[0]})
    with pytest.raises(DataError, match="no example"):
        grams(Task(task.model, task.loss, []), {"a": net[0]})
