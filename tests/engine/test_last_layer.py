"""The last layer fitted to the dense network: the least-squares solution, and never a larger error."""

import pytest
import torch
from torch import nn

from secateur.core.errors import DataError, ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.engine.last_layer import last_layer, outputs_of, refit_last_layer
from secateur.engine.recovering import Recovery


class Net(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.fc, self.norm, self.drop = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.head = nn.Linear(8, 3, bias=bias)

    def forward(self, x):
        return self.head(self.drop(torch.relu(self.norm(self.fc(x)))))


def made(net=None, places=(), bias=True):
    """A network with its data in two batches, and masks over half of its weights."""
    random = stream(0, "last layer")
    torch.manual_seed(0)
    net = (net or Net(bias)).double()
    x = torch.randn(30, *places, 6, generator=random, dtype=torch.float64)
    y = torch.zeros(30, dtype=torch.long)
    masks = Masks({n: torch.rand(m.shape, generator=random) < 0.5 for n, m in Masks.dense(net).items()})
    return Task(net, nn.functional.cross_entropy, [(x[:13], y[:13]), (x[13:], y[13:])]), masks


def inputs_of_head(task):
    seen = []
    handle = task.model.head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach()))
    list(task.outputs())
    handle.remove()
    return torch.cat(seen).flatten(0, -2)


def by_least_squares(x, y, weight, bias, mask, damping):
    """Each output by itself: torch's own solver on its kept inputs, the ridge as rows of its own."""
    new, ridge = torch.zeros_like(weight), (damping * x.square().mean() * len(x)).sqrt()
    offset = None if bias is None else torch.zeros_like(bias)
    for i, kept in enumerate(mask):
        pulls = ridge * torch.eye(int(kept.sum()), dtype=x.dtype)
        rows, right = torch.cat([x[:, kept], pulls]), torch.cat([y[:, i], ridge * weight[i, kept]])
        if bias is not None:
            free = torch.cat([torch.ones(len(x)), torch.zeros(len(pulls))]).to(x)
            rows = torch.cat([rows, free[:, None]], 1)
        found = torch.linalg.lstsq(rows, right[:, None]).solution[:, 0]
        new[i, kept] = found[: int(kept.sum())]
        if offset is not None:
            offset[i] = found[-1]
    return new, offset


@pytest.mark.parametrize("damping", [1e-9, 0.01, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_the_fit_is_the_least_squares_solution_on_the_kept_weights(bias, damping):
    task, masks = made(bias=bias)
    head = task.model.head
    targets = outputs_of(task, "head")
    masks.apply_(task.model)
    old = {n: p.detach().clone() for n, p in task.params().items()}
    args = (head.weight.detach(), None if head.bias is None else head.bias.detach(), masks["head.weight"], damping)
    weight, offset = by_least_squares(inputs_of_head(task), torch.cat(targets), *args)

    done = refit_last_layer(task, targets, masks, damping=damping)

    torch.testing.assert_close(head.weight.detach(), weight, rtol=1e-6, atol=1e-8)
    if bias:
        torch.testing.assert_close(head.bias.detach(), offset, rtol=1e-6, atol=1e-8)
    masks.check(task.model)
    others = [n for n in old if not n.startswith("head")]
    assert others and all(torch.equal(task.params()[n], old[n]) for n in others)
    missed = (torch.cat(outputs_of(task, "head")) - torch.cat(targets)).square().sum()
    assert done.layer == "head" and done.after < done.before
    assert done.after == pytest.approx(float(missed / torch.cat(targets).square().sum()), rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("damping", [1e-12, 0.01, 1e6])
def test_no_output_is_ever_further_off(dtype, damping):
    """Even where the weights are rounded to a half type, and at a minimum where nothing can be won."""
    task, masks = made()
    net = task.model.to(dtype)
    task = Task(net, task.loss, [(x.to(dtype), y) for x, y in task.data])
    targets = outputs_of(task, "head")
    masks.apply_(net)
    for _ in range(2):
        x = inputs_of_head(task).double()
        wanted = torch.cat(targets).double()

        def error(x=x, wanted=wanted):
            w, b = net.head.weight.detach().double(), net.head.bias.detach().double()
            return (x @ w.T + b - wanted).square().sum(0)

        before = error()
        refit_last_layer(task, targets, masks, damping=damping)
        assert bool((error() <= before * (1 + 1e-12)).all())
        masks.check(net)


def test_the_dense_network_needs_no_fit_and_dead_inputs_stay():
    task, _ = made()
    with torch.no_grad():
        task.model.norm.weight[2], task.model.norm.bias[2] = 0.0, -1.0  # relu lets nothing of it through
    targets = outputs_of(task, "head")
    old = task.model.head.weight.detach().clone()
    done = refit_last_layer(task, targets)
    torch.testing.assert_close(task.model.head.weight.detach(), old, rtol=0, atol=1e-12)
    assert done.before == pytest.approx(0.0, abs=1e-25)
    with torch.no_grad():
        task.model.fc.weight.mul_(0.5)
    refit_last_layer(task, targets)
    assert torch.equal(task.model.head.weight[:, 2], old[:, 2])
    assert not torch.allclose(task.model.head.weight, old)


def test_sequences_count_every_place():
    class Words(Net):
        def forward(self, x):
            return self.head(torch.relu(self.fc(x)))

    task, masks = made(Words(), (5,))
    targets = outputs_of(task, "head")
    assert [t.shape for t in targets] == [(13, 5, 3), (17, 5, 3)]
    masks.apply_(task.model)
    args = (task.model.head.weight.detach(), task.model.head.bias.detach(), masks["head.weight"], 0.01)
    expected, _ = by_least_squares(inputs_of_head(task), torch.cat(targets).flatten(0, 1), *args)
    refit_last_layer(task, targets, masks)
    torch.testing.assert_close(task.model.head.weight.detach(), expected, rtol=1e-8, atol=1e-10)


class After(Net):
    def forward(self, x):
        return super().forward(x).log_softmax(-1)


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.mid = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8)
        self.head.weight = self.mid.weight

    def forward(self, x):
        return self.head(self.mid(self.fc(x)))


def test_the_last_layer_is_found_or_what_comes_after_is_named():
    assert last_layer(made()[0]) == "head"
    task, masks = made(After())
    with pytest.raises(ModelError, match="something comes after the last one called, `head`"):
        last_layer(task)
    assert last_layer(task, "head") == "head"
    targets = outputs_of(task, "head")
    masks.apply_(task.model)
    done = refit_last_layer(task, targets, masks, layer="head")
    assert done.after < done.before
    with pytest.raises(UsageError, match="no linear layer 'haed'. Did you mean 'head'"):
        last_layer(task, "haed")
    with pytest.raises(ModelError, match="weight of `head` is shared"):
        last_layer(made(Tied())[0])
    with pytest.raises(ModelError, match="calls no linear layer"):
        last_layer(Task(nn.Conv1d(6, 2, 1), nn.functional.cross_entropy, [(torch.zeros(3, 6, 4), None)]))
    bent = made()[0]
    nn.utils.parametrizations.weight_norm(bent.model.head)
    with pytest.raises(ModelError, match="computed from other tensors"):
        last_layer(bent)


def test_targets_of_other_data_are_refused_and_nothing_changes():
    task, masks = made()
    targets = outputs_of(task, "head")
    masks.apply_(task.model)
    old = task.model.head.weight.detach().clone()
    holed = [targets[0].index_fill(0, torch.tensor([1]), torch.nan), targets[1]]
    for given, says in (
        (targets[:1], "have shape None"), (targets[::-1], r"\(13, 3\) is needed"), ([*targets, targets[0]], "more"),
        (holed, "not finite"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=says):
            refit_last_layer(task, given, masks)
    with pytest.raises(UsageError, match="damping must be above 0"):
        refit_last_layer(task, targets, masks, damping=0.0)
    assert torch.equal(task.model.head.weight, old)


def test_a_recovery_fits_after_batchnorm_and_leaves_modes():
    task, masks = made()
    twin, _ = made()
    recovery = Recovery("last-layer", task)
    targets = outputs_of(twin, "head")
    masks.apply_(task.model), masks.apply_(twin.model)
    told = recovery(masks, lambda: {"value": 0.0})
    assert [s["step"] for s in told["steps"]] == ["batchnorm", "last-layer"] and task.model.training
    assert told["steps"][1]["error"]["after"] < told["steps"][1]["error"]["before"]
    Recovery("batchnorm", twin)(masks, lambda: {"value": 0.0})
    refit_last_layer(twin, targets, masks)
    assert all(torch.equal(p, twin.model.state_dict()[n]) for n, p in task.model.state_dict().items())
