"""All kept weights move together: the exact minimum of the quadratic model, against a dense solve."""

import pytest
import torch
from torch import nn

from secateur.core.errors import DataError, MaskError, ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.engine.recovering import Recovery
from secateur.engine.surviving import refit_survivors


class Normed(nn.Module):
    """Convolution, BatchNorm with statistics that are not those of a batch, dropout, and a linear layer used twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.mid, self.again, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.again.weight = self.mid.weight

    def forward(self, x):
        x = self.drop(torch.relu(self.norm(self.conv(x)))).mean((2, 3))
        return self.head(torch.tanh(self.again(torch.tanh(self.mid(x)))))


def made(examples=30, sizes=(13, 17)):
    random = stream(0, "surviving")
    torch.manual_seed(0)
    net = Normed().double()
    net.norm.running_mean.uniform_(-0.5, 0.5, generator=random)
    net.norm.running_var.uniform_(0.5, 2.0, generator=random)
    x = torch.randn(examples, 2, 5, 5, generator=random, dtype=torch.float64)
    y = torch.randint(0, 3, (examples,), generator=random)
    task = Task(net.train(), nn.functional.cross_entropy, list(zip(x.split(sizes), y.split(sizes), strict=True)))
    masks = Masks({n: torch.rand(m.shape, generator=random) < 0.5 for n, m in Masks.dense(net).items()})
    return task, masks


def by_the_book(task, masks, damping):
    """The Fisher matrix entry by entry from one backward pass for each example, and one dense solve."""
    net, names = task.model, list(masks)
    weights = [p for n, p in net.named_parameters() if n in masks]
    net.eval()
    rows = []
    for x, y in task.data:
        for one, target in zip(x, y, strict=True):
            loss = nn.functional.cross_entropy(net(one[None]), target[None])
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    net.train()
    fisher = torch.stack(rows).T @ torch.stack(rows) / len(rows)
    fisher += damping * fisher.diagonal().mean() * torch.eye(len(fisher), dtype=torch.float64)
    kept = torch.cat([masks[n].flatten() for n in names])
    w = torch.cat([p.detach().flatten() for p in weights])
    new = torch.zeros_like(w)
    new[kept] = w[kept] + torch.linalg.solve(fisher[kept][:, kept], fisher[kept][:, ~kept] @ w[~kept])
    return dict(zip(names, new.split([masks[n].numel() for n in names]), strict=True)), fisher, new - w


@pytest.mark.parametrize("damping", [1e-3, 0.1])
def test_kept_weights_go_to_the_minimum_that_a_dense_solve_gives(damping):
    """With BatchNorm in evaluation mode, dropout off, and a tied tensor that counts once."""
    task, masks = made()
    expected, _, _ = by_the_book(task, masks, damping)
    others = {n: p.clone() for n, p in task.model.state_dict().items() if n not in masks and n != "again.weight"}
    assert "mid.weight" in masks and "again.weight" not in masks

    before = {n: p.detach().clone() for n, p in task.params().items()}
    change = refit_survivors(task, masks, damping)

    for name, mask in masks.items():
        p = task.params()[name].detach()
        torch.testing.assert_close(p.flatten(), expected[name], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(before[name] + change[name], p, rtol=0, atol=1e-12)
        assert bool((p[~mask] == 0).all()) and not bool(p[~mask].signbit().any())
    assert task.model.again.weight is task.model.mid.weight and task.model.training and task.model.norm.training
    assert all(torch.equal(task.model.state_dict()[n], old) for n, old in others.items())


def test_any_other_change_of_the_kept_weights_is_worse_in_the_model():
    task, masks = made()
    _, fisher, least = by_the_book(task, masks, 0.01)
    change = refit_survivors(task, masks, 0.01)
    found = torch.cat([change[n].flatten() for n in masks])
    kept = torch.cat([m.flatten() for m in masks.values()])
    assert float(found @ fisher @ found) == pytest.approx(float(least @ fisher @ least), rel=1e-9)
    zeroing = torch.where(kept, 0.0, found)
    assert float(found @ fisher @ found) < 0.9 * float(zeroing @ fisher @ zeroing)
    for seed in range(5):
        push = torch.randn(len(found), generator=stream(seed, "push"), dtype=torch.float64) * kept * 1e-3
        assert float((found + push) @ fisher @ (found + push)) > float(found @ fisher @ found)


def test_the_weights_before_decide_whatever_became_of_them_since():
    """As after a pruning that has set zeros and moved the rest."""
    one, masks = made()
    two, _ = made()
    refit_survivors(one, masks, 0.01)
    before = {n: p.detach().clone() for n, p in two.params().items()}
    with torch.no_grad():
        for name, p in masks.match(two.model).items():
            p.mul_(masks[name]).mul_(3)
    refit_survivors(two, masks, 0.01, before)
    assert all(torch.equal(p, two.params()[n]) for n, p in one.params().items())


def test_weights_that_were_zero_before_go_for_nothing():
    """Pruned weights of an earlier step neither move others nor count in the damping."""
    task, masks = made()
    with torch.no_grad():
        masks.apply_(task.model)
    old = {n: p.detach().clone() for n, p in task.params().items()}
    change = refit_survivors(task, masks, 0.01)
    assert all(not bool(c.any()) for c in change.values())
    assert all(torch.equal(p, old[n]) for n, p in task.params().items())


def test_the_order_and_the_size_of_batches_do_not_matter():
    one, masks = made()
    two, _ = made(sizes=(5, 5, 20))
    two = Task(two.model, two.loss, two.data[::-1])
    refit_survivors(one, masks, 0.01), refit_survivors(two, masks, 0.01)
    for name, p in one.params().items():
        torch.testing.assert_close(p, two.params()[name], rtol=1e-9, atol=1e-12)


def test_in_float32_zeros_are_exact_and_the_weights_close():
    task, masks = made()
    expected, _, _ = by_the_book(task, masks, 0.1)
    net = task.model.float()
    refit_survivors(Task(net, task.loss, [(x.float(), y) for x, y in task.data]), masks, 0.1)
    for name, mask in masks.items():
        p = dict(net.named_parameters())[name].detach()
        assert p.dtype == torch.float32 and bool((p[~mask] == 0).all())
        torch.testing.assert_close(p.double().flatten(), expected[name], rtol=1e-3, atol=1e-4)


def test_errors_leave_the_network_as_it_was():
    task, masks = made()
    old = {n: p.detach().clone() for n, p in task.params().items()}
    (x, y), *rest = task.data
    holed = Task(task.model, task.loss, [(x.index_fill(0, torch.tensor([3]), torch.nan), y), *rest])
    given = {n: 2 * p for n, p in old.items()}
    with pytest.raises(DataError, match="example 3"):
        refit_survivors(holed, masks, before=given)
    with pytest.raises(ModelError, match="NaN"):
        refit_survivors(task, masks, before={**given, "head.weight": given["head.weight"] * torch.nan})
    with pytest.raises(MaskError, match="another network"):
        refit_survivors(task, Masks({"other.weight": masks["head.weight"]}))
    for damping in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="damping must be above 0"):
            refit_survivors(task, masks, damping)
    assert all(torch.equal(p, old[n]) for n, p in task.params().items())


def test_a_recovery_moves_the_weights_and_then_takes_batchnorm_anew():
    task, masks = made()
    twin, _ = made()
    recovery = Recovery("survivors", task)
    masks.apply_(task.model)
    readings = iter(range(9))

    told = recovery(masks, lambda: {"value": next(readings)})

    refit_survivors(twin, masks)
    assert all(torch.equal(p, twin.params()[n]) for n, p in task.params().items())
    assert not torch.equal(task.model.norm.running_mean, twin.model.norm.running_mean)
    assert [s["step"] for s in told["steps"]] == ["survivors", "batchnorm"] and told["batchnorm layers"] == 1
    assert [s["before"]["value"] for s in told["steps"]] == [0, 1] and told["after"]["value"] == 2
    assert told["steps"][0]["moved"] == masks.kept
