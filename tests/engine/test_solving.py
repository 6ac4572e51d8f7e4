"""``secateur.prune`` with a solver, from Python: the same results as its parts, held while training goes on."""

import pytest
import torch
from torch import nn

import secateur
from secateur.core.errors import UsageError
from secateur.core.task import Task
from secateur.criteria.obd import Obd
from secateur.criteria.wanda import Wanda
from secateur.engine.compensating import compensate, plan_layers
from secateur.solvers.exact_obs import ExactObs
from secateur.solvers.sparsegpt import SparseGpt

pytestmark = pytest.mark.filterwarnings("ignore:the network is not at a minimum")  # it has not been trained


@pytest.fixture
def task():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    return Task(model, nn.functional.cross_entropy, [(torch.randn(64, 12), torch.randint(0, 4, (64,)))])


def test_layers_are_those_of_compensate(task):
    other = Task(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)), task.loss, task.data)
    other.model.load_state_dict(task.model.state_dict())
    cut = secateur.prune(task, "sparsity 0.75", solver=SparseGpt())
    made = plan_layers(other, SparseGpt(), "sparsity 0.75")
    _, layers = compensate(other, made, SparseGpt(), secateur.core.patterns.Unstructured())
    assert cut.layers == tuple(layers) and cut.masks.kept == (12 * 16 + 16 * 4) // 4
    assert all(torch.equal(p, q) for p, q in zip(task.params().values(), other.params().values(), strict=True))


@pytest.mark.parametrize("curvature", ["layers", "fisher"])
def test_zeros_are_held_by_the_optimizer(task, curvature):
    optimizer = torch.optim.Adam(task.model.parameters(), lr=0.1)
    cut = secateur.prune(task, "keep 50", solver=ExactObs(), curvature=curvature, optimizer=optimizer)
    assert cut.plan.forecast is not None and cut.hold is not None
    weights = {name: task.params()[name].detach().clone() for name in cut.masks}
    assert any(not torch.equal(w[cut.masks[n]], w[cut.masks[n]] * 0) for n, w in weights.items())
    for inputs, target in task.data * 3:
        optimizer.zero_grad()
        task.loss(task.model(inputs), target).backward()
        optimizer.step()
    assert all(bool((task.params()[name][~mask] == 0).all()) for name, mask in cut.masks.items())
    assert any(not torch.equal(task.params()[name], weights[name]) for name in cut.masks)


def test_what_does_not_go_together(task):
    with pytest.raises(UsageError, match="are for solvers"):
        secateur.prune(task, "sparsity 0.5", curvature="ggn")
    with pytest.raises(UsageError, match="averaged copies cannot follow"):
        secateur.prune(task, "sparsity 0.5", solver=ExactObs(), also=[nn.Linear(1, 1)])


def test_a_plan_brings_its_pattern(task):
    made = secateur.plan(task, "2:4", only=["*weight"])
    cut = secateur.prune(task, made, solver=SparseGpt())
    assert all(int(mask.view(-1, 4).sum(1).max()) == 2 for mask in cut.masks.values())


def test_a_plan_with_tensors_that_are_no_layers_is_refused(task):
    made = secateur.plan(task, "sparsity 0.5", only=["*"])
    with pytest.raises(UsageError, match="the plan prunes `0.bias`"):
        secateur.prune(task, made, solver=SparseGpt())


def test_an_optimizer_of_another_network_changes_nothing(task):
    old = {name: p.detach().clone() for name, p in task.params().items()}
    with pytest.raises(secateur.SecateurError):
        secateur.prune(
            task, "sparsity 0.5", solver=SparseGpt(), optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters())
        )
    assert all(torch.equal(old[name], p) for name, p in task.params().items())


def test_macs_are_no_target_for_the_whole_network(task):
    with pytest.raises(UsageError, match="counts MACs"):
        secateur.prune(task, "macs 50%", solver=ExactObs(), curvature="ggn")


def test_an_indefinite_hessian_is_named(task):
    with pytest.raises(secateur.SecateurError, match="smallest eigenvalue is -"):
        secateur.prune(task, "sparsity 0.5", solver=ExactObs(damping=0.0), curvature="hessian")


class Shared(nn.Module):
    """One module under two names, used for two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.out = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(self.first(x).relu()).relu())


@pytest.mark.parametrize("method", [{"solver": SparseGpt()}, {"criterion": Wanda()}, {"criterion": Obd()}])
def test_a_module_under_two_names_is_one_layer(method):
    torch.manual_seed(0)
    task = Task(Shared(), nn.functional.cross_entropy, [(torch.randn(64, 8), torch.randint(0, 4, (64,)))])
    before = task.model.first.weight
    cut = secateur.prune(task, "sparsity 0.5", **method)
    assert set(cut.masks) == {"first.weight", "out.weight"} and cut.masks.kept == (64 + 32) // 2
    assert task.model.first.weight is before and task.model.second is task.model.first
    assert int((before != 0).sum()) == int(cut.masks["first.weight"].sum())
