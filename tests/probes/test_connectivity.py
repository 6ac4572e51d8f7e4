# Networks are indexed by layer here, which the type checker cannot follow.
# pyright: reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOptionalOperand=false, reportOptionalMemberAccess=false
"""Connectivity: ends, convex losses, permuted copies, statistics and masks, each against its own definition."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from secateur.core.errors import FileError, MaskError, ModelError, UsageError
from secateur.core.files import write_tensors
from secateur.core.masks import Masks
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.linalg.alignment import permute, tensors_of
from secateur.probes.accuracy import Accuracy
from secateur.probes.connectivity import Connectivity
from secateur.surgery.symmetry import symmetries
from secateur.testing.cases import conv_bn, relu_mlp, residual_bn, tanh_mlp


def filled(model, seed):
    """A copy with other weights."""
    other, random = copy.deepcopy(model), stream(seed, "test", "other")
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.randn(p.shape, generator=random, dtype=torch.float64) / max(1, p[0].numel()) ** 0.5)
    return other


def mixed(one, two, alpha):
    """A network half way, built by hand."""
    made = copy.deepcopy(one)
    with torch.no_grad():
        for p, a, b in zip(made.parameters(), one.parameters(), two.parameters(), strict=True):
            p.copy_((1 - alpha) * a + alpha * b)
    return made


def wrong(model, task):
    x, y = torch.cat([x for x, _ in task.data]), torch.cat([y for _, y in task.data])
    with torch.no_grad():
        out = model.eval()(x)
    return 100 * float((out.argmax(1) != y).double().mean()), float(functional.cross_entropy(out, y))


def test_every_point_is_a_network_built_by_hand_and_the_barriers_are_by_definition():
    task = tanh_mlp(batches=(5, 3))
    other = filled(task.model, 1)
    reading = Connectivity(other, points=5)(task)
    errors, losses = [], []
    for alpha in (0, 0.25, 0.5, 0.75, 1):
        error, loss = wrong(mixed(task.model, other, alpha), task)
        assert reading.parts[f"error:{alpha:.4g}"] == pytest.approx(error, abs=1e-12)
        assert reading.parts[f"loss:{alpha:.4g}"] == pytest.approx(loss, rel=1e-12)
        errors.append(error)
        losses.append(loss)
    assert reading.value == pytest.approx(max(errors) - (errors[0] + errors[-1]) / 2, abs=1e-12)
    assert (reading.unit, reading.n) == ("points", 8)
    loss = Connectivity(other, points=5, of="loss")(task)
    assert loss.value == pytest.approx(max(losses) - (losses[0] + losses[-1]) / 2, rel=1e-12)
    assert loss.unit == "" and not any(name.startswith("error") for name in loss.parts)
    line = max(v - ((4 - i) * losses[0] + i * losses[-1]) / 4 for i, v in enumerate(losses))
    assert Connectivity(other, points=5, of="loss", baseline="line")(task).value == pytest.approx(line, rel=1e-12)
    pairs = zip(task.model.parameters(), other.parameters(), strict=True)
    distance = sum(float((a - b).detach().square().sum()) for a, b in pairs) ** 0.5
    assert reading.parts["distance"] == pytest.approx(distance, rel=1e-12)


def test_the_ends_are_the_networks_themselves_to_the_bit():
    task = conv_bn(batches=(5, 3))
    other = filled(task.model, 1)
    parts = Connectivity(other, points=3, batchnorm="interpolated")(task).parts
    assert parts["error:0"] == 100 - Accuracy()(task).value
    assert parts["error:1"] == 100 - Accuracy()(Task(other, task.loss, task.data)).value
    assert (parts["loss:0"], parts["loss:1"]) == (task.mean_loss(), Task(other, task.loss, task.data).mean_loss())


def test_a_network_and_its_copy_have_no_barrier_and_no_distance():
    task = residual_bn()
    for kind in ("estimated", "interpolated"):
        for baseline in ("mean", "line"):
            twin = Connectivity(copy.deepcopy(task.model), 7, "loss", baseline, kind)(task)
            assert (twin.value, twin.parts["distance"]) == (0.0, 0.0)
    alone = Connectivity()(task)
    assert alone.value == 0.0 and "compared with itself" in alone.note


def test_a_convex_loss_is_highest_at_an_end():
    random = stream(0, "test", "convex")
    data = [(torch.randn(40, 6, generator=random), torch.randint(4, (40,), generator=random))]
    for seed in range(4):
        ends = [nn.Linear(6, 4), nn.Linear(6, 4)]
        for i, net in enumerate(ends):
            with torch.no_grad():
                net.weight.copy_(torch.randn(4, 6, generator=stream(seed, "w", i)))
                net.bias.zero_()
        task = Task(ends[0], functional.cross_entropy, data)
        reading = Connectivity(ends[1], points=11, of="loss")(task)
        low, high = reading.parts["loss:0"], reading.parts["loss:1"]
        assert reading.value == pytest.approx(abs(low - high) / 2, rel=1e-6)
        assert Connectivity(ends[1], points=11, of="loss", baseline="line")(task).value == 0.0


def permuted(model, example, seed=0):
    groups = symmetries(model, example)
    orders = {g.name: torch.randperm(len(g), generator=stream(seed, "test", g.name)) for g in groups}
    other = copy.deepcopy(model)
    other.load_state_dict(permute(dict(model.state_dict()), groups, orders))
    return other


@pytest.mark.parametrize("make", [tanh_mlp, relu_mlp, conv_bn, residual_bn])
def test_a_permuted_copy_has_a_barrier_until_it_is_aligned(make):
    task = make(batches=(8, 4))
    example = next(iter(task.data))[0]
    other = permuted(task.model, example)
    # targets that the network itself gives, so that other weights are worse
    data = [(x, task.model(x).argmax(1)) for x, _ in task.data]
    task = Task(task.model, task.loss, data)
    apart = Connectivity(other, points=5, of="loss", batchnorm="interpolated")(task)
    closed = Connectivity(other, points=5, of="loss", batchnorm="interpolated", aligned=True)(task)
    assert apart.parts["loss:0"] == pytest.approx(apart.parts["loss:1"], rel=1e-12)
    assert apart.value > 1e-3
    assert closed.value == pytest.approx(0.0, abs=1e-12) and closed.parts["distance"] == 0.0


def test_statistics_are_taken_anew_at_every_point_from_the_data_given():
    task = conv_bn(batches=(5, 3))
    other = filled(task.model, 2)
    random = stream(0, "test", "calibration")
    data = [(torch.randn(n, 2, 6, 6, generator=random, dtype=torch.float64), torch.zeros(n)) for n in (4, 6)]
    before = copy.deepcopy(task.model.state_dict())
    parts = Connectivity(other, points=3, data=data)(task).parts
    for alpha in (0, 0.5, 1):
        net = mixed(task.model, other, alpha)
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        sums = [[0.0, 0.0] for _ in norms]
        for x, _ in data:  # of every batch alone, weighted by its examples
            for norm in norms:
                norm.train()
                norm.momentum = 1.0
            with torch.no_grad():
                net(x)
            for norm, total in zip(norms, sums, strict=True):
                total[0] = total[0] + norm.running_mean * len(x) / 10
                total[1] = total[1] + norm.running_var * len(x) / 10
        for norm, (mean, var) in zip(norms, sums, strict=True):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
        error, loss = wrong(net, task)
        assert parts[f"loss:{alpha:.4g}"] == pytest.approx(loss, rel=1e-10)
        assert parts[f"error:{alpha:.4g}"] == pytest.approx(error, abs=1e-12)
    after = task.model.state_dict()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert [m.momentum for m in task.model.modules() if isinstance(m, nn.BatchNorm2d)] == [0.1, 0.1]
    own = Connectivity(other, points=3)(task).parts
    assert own["loss:0.5"] != pytest.approx(parts["loss:0.5"], rel=1e-6)


def test_masks_bind_both_networks():
    task = tanh_mlp()
    other = filled(task.model, 1)
    masks = Masks(
        {n: torch.rand(p.shape, generator=stream(0, n)) > 0.5 for n, p in task.params().items() if p.dim() > 1}
    )
    with pytest.raises(MaskError, match="are not zero"):
        Connectivity(other)(task, masks)
    masks.apply_(task.model)
    with pytest.raises(MaskError, match="the other network has other masks: .* pruned here are not zero there"):
        Connectivity(other)(task, masks)
    masks.apply_(other)
    assert Connectivity(other, points=3)(task, masks).parts["distance"] > 0


def test_the_other_network_may_lie_in_a_file_or_a_folder(tmp_path):
    task = conv_bn()
    other = filled(task.model, 1)
    write_tensors(tmp_path / "weights.safetensors", other.state_dict())
    expected = Connectivity(other, points=3)(task)
    assert Connectivity(str(tmp_path), points=3)(task) == expected
    assert Connectivity(tmp_path / "weights.safetensors", points=3)(task) == expected
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match=r"holds no `weights.safetensors`"):
        Connectivity(tmp_path / "empty")(task)


def test_other_architectures_and_wrong_options_are_refused():
    task = tanh_mlp()
    with pytest.raises(ModelError, match="there is no `first.weight`"):
        Connectivity(conv_bn().model)(task)
    with pytest.raises(ModelError, match=r"`0.weight` has shape \(8, 5\), here \(7, 5\)"):
        Connectivity(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)))(task)
    with pytest.raises(ModelError, match=r"`2.weight` is missing"):
        Connectivity(nn.Sequential(nn.Linear(5, 7)))(task)
    with pytest.raises(UsageError, match="points=1"):
        Connectivity(points=1)


def test_counters_are_not_interpolated():
    task = conv_bn()
    other = filled(task.model, 1)
    other.first_norm.num_batches_tracked.fill_(1000)
    assert Connectivity(other, points=3, of="loss")(task).value >= 0.0
    assert int(task.model.first_norm.num_batches_tracked) == 3
    assert tensors_of(other)["first_norm.num_batches_tracked"] == 1000
