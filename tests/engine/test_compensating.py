"""Layer by layer: each layer gets its own inputs, exact counts, a forecast and a measured rise; nothing half done."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from secateur.core.allocations import Uniform
from secateur.core.errors import DataError, ModelError, UsageError
from secateur.core.patterns import NM, Unstructured
from secateur.core.reading import Paper
from secateur.core.select import top_mask
from secateur.core.sockets import Solver
from secateur.core.task import Task
from secateur.engine.compensating import compensate, plan_layers

SEEN = []


@dataclass(frozen=True)
class Zeroing(Solver):
    """Smallest weights to zero; remembers what it was given."""

    paper = Paper("none", "nobody", 2026, "", differs="in nothing known")

    def __call__(self, weight, gram, pattern, keep):
        SEEN.append((weight.clone(), gram.clone()))
        mask = pattern.mask(weight.abs(), keep) if isinstance(pattern, NM) else top_mask(weight.abs(), keep)
        return weight * mask, mask


class Failing(Zeroing):
    def __call__(self, weight, gram, pattern, keep):
        if len(SEEN) == 1:
            raise ModelError("the matrix is singular")
        return super().__call__(weight, gram, pattern, keep)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 3)
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, groups=4)
        self.inner = nn.LSTM(8, 6, batch_first=True)

    def forward(self, x):
        x = torch.relu(self.middle(torch.relu(self.first(x))))
        return self.last(self.inner(x.flatten(2).transpose(1, 2))[0][:, -1])


@pytest.fixture
def task():
    SEEN.clear()
    torch.manual_seed(0)
    data = [(torch.randn(n, 4, 5, 5), torch.randint(0, 3, (n,))) for n in (6, 3)]
    return Task(Net().eval(), nn.functional.cross_entropy, data)


def carried_out(task, solver, to="sparsity 0.5", pattern=None, **options):
    pattern = pattern or Unstructured()
    made = plan_layers(task, solver, to, None, Uniform(), pattern)
    return made, *compensate(task, made, solver, pattern, **options)


def test_layers_in_the_order_in_which_they_run(task):
    dense = {name: p.clone() for name, p in task.params().items()}
    before = task.mean_loss()
    made, done, layers = carried_out(task, Zeroing())
    assert [layer.name for layer in layers] == ["first.weight", "middle.weight", "last.weight"]
    assert {"inner.weight_ih_l0", "inner.weight_hh_l0"} <= set(made.left_alone)
    assert done.counts == made.counts and done.masks.kept == sum(kept for kept, _ in made.counts.values())
    for name, p in task.params().items():
        if name in done.masks:
            assert torch.equal(p, dense[name] * done.masks[name])
        else:
            assert torch.equal(p, dense[name])
    assert done.forecast.before == before and done.forecast.after == task.mean_loss()
    assert sum(layer.rise for layer in layers) == pytest.approx(task.mean_loss() - before, abs=1e-6)
    assert sum(layer.forecast for layer in layers) == pytest.approx(done.forecast.rise)
    assert all(layer.error == layer.zeroed and 0 < layer.error < 1 for layer in layers)


@pytest.mark.parametrize("inputs", ["sequential", "dense"])
def test_the_inputs_of_a_layer(task, inputs):
    """One group of a grouped convolution sees its own channels, of the network as pruned so far or of the dense one."""
    dense = Net()
    dense.load_state_dict(task.model.state_dict())
    _, done, _ = carried_out(task, Zeroing(), inputs=inputs, forecast=False)
    assert done.forecast is None and len(SEEN) == 1 + 4 + 1
    net = dense.eval() if inputs == "dense" else task.model
    with torch.no_grad():
        xs = torch.cat([x for x, _ in task.data])
        hidden = torch.relu(net.first(xs))
        for group in range(4):
            columns = nn.functional.unfold(hidden[:, 2 * group : 2 * group + 2], 3)
            wanted = torch.einsum("nil,njl->ij", columns, columns)
            found = SEEN[1 + group][1]
            torch.testing.assert_close(found / found.trace(), wanted / wanted.trace(), rtol=1e-4, atol=1e-6)


def test_groups_of_two_in_four_run_along_the_channels(task):
    pattern = NM(2, 4)
    _, done, _ = carried_out(task, Zeroing(), to="2:4", pattern=pattern)
    weight = SEEN[0][0]
    assert weight.shape == (8, 36)
    assert torch.equal(done.masks["first.weight"], pattern.mask(task_weight(weight).abs(), 8 * 36 // 2))


def task_weight(columns):
    """The weight whose columns run along the channels, as stored."""
    return columns.view(8, 9, 4).transpose(1, 2).reshape(8, 4, 3, 3)


def test_a_failure_restores_the_network(task):
    dense = {name: p.clone() for name, p in task.params().items()}
    made = plan_layers(task, Failing(), "sparsity 0.5")
    with pytest.raises(ModelError, match="singular"):
        compensate(task, made, Failing(), Unstructured())
    assert all(torch.equal(p, dense[name]) for name, p in task.params().items())


def test_what_cannot_be_solved_is_refused(task):
    with pytest.raises(ModelError, match="only linear and convolution layers"):
        plan_layers(task, Zeroing(), "sparsity 0.5", only=("inner.*",))
    made = plan_layers(task, Zeroing(), "sparsity 0.5")
    with pytest.raises(UsageError, match="pruned already"):
        plan_layers(task, Zeroing(), "sparsity 0.9", masks=made.masks)
    task.data[0][0][0, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        compensate(task, made, Zeroing(), Unstructured(), forecast=False)


def test_a_solver_that_keeps_too_many_is_refused(task):
    @dataclass(frozen=True)
    class Keeps(Zeroing):
        def __call__(self, weight, gram, pattern, keep):
            return weight, torch.ones_like(weight, dtype=torch.bool)

    made = plan_layers(task, Keeps(), "sparsity 0.5")
    with pytest.raises(UsageError, match="were asked"):
        compensate(task, made, Keeps(), Unstructured(), forecast=False)
