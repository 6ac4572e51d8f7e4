"""SynFlow: the flow through a network whose parameters are all positive."""

import pytest
import torch
from torch import nn

from secateur.core.choose import choose
from secateur.core.errors import DataError, ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.select import threshold
from secateur.core.task import Task
from secateur.criteria.synflow import Synflow
from secateur.testing import CASES


def given(net, *inputs):
    return Task(net, lambda output, target: output.mean(), [(x, 0) for x in inputs])


def chain(bias=True):
    random = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 4, 3, bias=bias), nn.ReLU6(),
        nn.Flatten(), nn.Linear(16, 7, bias=bias), nn.GELU(), nn.Linear(7, 3, bias=bias),
    ).double()  # fmt: skip
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=random, dtype=torch.float64)
    return given(net, torch.zeros(2, 2, 8, 8).double())


def every(task):
    return Masks({name: torch.ones_like(p, dtype=torch.bool) for name, p in task.params().items()})


def test_every_layer_passes_on_the_whole_flow_with_biases_of_later_layers():
    """sum S(W_l) + sum over j >= l of S(b_j) = R, with R from the layers run by hand on |θ|."""
    task = chain()
    x = torch.ones(1, 2, 8, 8).double()
    for layer in task.model:
        if isinstance(layer, nn.Conv2d):
            x = nn.functional.conv2d(x, layer.weight.abs(), layer.bias.abs(), padding=layer.padding)
        elif isinstance(layer, nn.Linear):
            x = x @ layer.weight.abs().T + layer.bias.abs()
        elif isinstance(layer, nn.MaxPool2d | nn.Flatten):
            x = layer(x)
    scores = {name: s.sum() for name, s in Synflow()(task, every(task)).items()}
    for layer in ("0", "3", "6", "8"):
        biases = sum(s for name, s in scores.items() if name.endswith("bias") and name >= layer)
        torch.testing.assert_close(scores[f"{layer}.weight"] + biases, x.detach().sum(), rtol=1e-13, atol=0)


def test_what_flows_into_a_unit_flows_out_of_it():
    task = chain()
    s = Synflow()(task, every(task))
    torch.testing.assert_close(s["6.weight"].sum(1) + s["6.bias"], s["8.weight"].sum(0), rtol=1e-13, atol=0)
    into = s["0.weight"].sum((1, 2, 3)) + s["0.bias"]
    torch.testing.assert_close(into, s["3.weight"].sum((0, 2, 3)), rtol=1e-13, atol=0)


def test_signs_do_not_matter_and_two_linear_layers_have_a_closed_form():
    net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)).double()
    first, second = (p.detach().clone() for p in net.parameters())
    scores = Synflow()(given(net), Masks.dense(net))
    torch.testing.assert_close(scores["0.weight"], first.abs() * second.abs().sum(0)[:, None], rtol=1e-13, atol=0)
    net[0].weight.data[1:3] *= -1
    again = Synflow()(given(net), Masks.dense(net))
    assert all(torch.equal(scores[name], again[name]) for name in scores)


def test_a_round_of_pruning_leaves_the_flow_of_what_is_kept():
    """A pruned weight scores 0 though its value is still there, and the others as if it were 0."""
    task = chain()
    masks = choose(Synflow()(task, Masks.dense(task.model)), 60)
    scores = Synflow()(task, masks)
    assert all(not scores[name][~masks[name]].any() for name in masks)
    masks.apply_(task.model)
    zeroed = Synflow()(task, Masks.dense(task.model))
    for name in masks:
        torch.testing.assert_close(scores[name], zeroed[name], rtol=1e-13, atol=0)


def test_rounds_keep_every_layer_alive_where_one_cut_does_not():
    """The point of the method: 2 % kept of a chain without biases."""
    task = chain(bias=False)
    least = {}
    for rounds in (1, 100):
        masks = Masks.dense(task.model)
        for k in range(1, rounds + 1):
            scores = Synflow()(task, masks)
            cut = threshold(list(scores.values()), round(masks.total * 0.02 ** (k / rounds))).value
            masks = Masks({name: (score >= cut) & (score > 0) for name, score in scores.items()})
        least[rounds] = min(masks.counts().values())
    assert least[1] == 0 < least[100]


@pytest.mark.parametrize("name", CASES)
def test_no_part_of_a_layer_is_cut_off(name):
    """With softmax, LayerNorm or an affine norm left as they are, queries and keys would score nothing."""
    task = CASES[name]()
    scores = Synflow()(task, Masks.dense(task.model))
    assert all(bool((s > 0).all()) for s in scores.values())


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(5, 4), nn.Linear(4, 12, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, words):
        q, k, v = self.mix(self.embed(words)).chunk(3, -1)
        hidden = torch.full((3, 3), -torch.inf).triu(1)
        mixed = torch.softmax(q @ k.mT + hidden, -1) @ v
        return nn.functional.log_softmax(self.head(nn.functional.relu6(mixed)), -1)


def test_words_and_masked_attention_have_a_closed_form():
    """Every word at once at each of 3 positions; position i sees i + 1 of them, each with weight q k / 3."""
    net = Words().double()
    e, m, h = (p.detach().abs() for p in net.parameters())
    q, k, v = (e.sum(0) @ m.T).chunk(3)
    task = given(net, torch.zeros(2, 3, dtype=torch.int64))
    scores = Synflow()(task, every(task))
    torch.testing.assert_close(scores["head.weight"], h * v * (q @ k) * (1 + 2 + 3) / 3, rtol=1e-12, atol=0)
    torch.testing.assert_close(scores["embed.weight"].sum(), 3 * scores["head.weight"].sum(), rtol=1e-12, atol=0)


def test_bad_input_is_refused():
    task = chain()
    with pytest.raises(UsageError, match="whole numbers"):
        Synflow(shape=(2, 0))
    with pytest.raises(DataError, match="give it as `shape`"):
        Synflow()(given(task.model), Masks.dense(task.model))
    with pytest.raises(ModelError, match="does not run"):
        Synflow(shape=(3, 8, 8))(task, Masks.dense(task.model))
    with pytest.raises(ModelError, match="no path is left"):
        Synflow()(task, ~every(task))
