"""Forecast and truth tensor by tensor: exact where the loss is a parabola in each, in the order of the network."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import secateur
from secateur.core.allocations import Uniform
from secateur.core.masks import Masks
from secateur.core.patterns import NM, Block, Unit
from secateur.core.task import Task
from secateur.criteria.obd import Obd
from secateur.criteria.random import Random
from secateur.engine.cautions import Caution
from secateur.engine.cutting import prune
from secateur.engine.layer_records import in_order, rises_of
from secateur.solvers.exact_obs import ExactObs


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Backwards(nn.Module):
    """Three linear layers without anything between them, registered in the reverse of the order in which they run."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 4)
        self.middle = nn.Linear(8, 8)
        self.first = nn.Linear(12, 8)

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


@pytest.fixture
def task():
    """Squared errors: the loss is a parabola in the weights of each layer, though not in all of them."""
    torch.manual_seed(0)
    data = [(tensor(n, 12, seed=n), tensor(n, 4, seed=n + 1)) for n in (7, 4)]
    return Task(Backwards().double(), nn.functional.mse_loss, data)


def one_by_one(task, masks, names):
    """The loss before and after each tensor in turn, with plain tensors."""
    net, losses = copy.deepcopy(task.model), [task.mean_loss()]
    for name in names:
        with torch.no_grad():
            net.get_parameter(name).mul_(masks[name])
        losses.append(Task(net, task.loss, task.data).mean_loss())
    return losses


CASES = [
    ({}, "sparsity 0.7"),
    ({"criterion": Obd(), "allocation": Uniform()}, "sparsity 0.5"),
    ({"pattern": Unit()}, "sparsity 0.5"),
    ({"pattern": Block(2, 2)}, "sparsity 0.6"),
    ({"pattern": NM(2, 4)}, "2:4"),
    ({"criterion": Random(3), "skip": ["middle*"]}, "sparsity 0.5"),
]


@pytest.mark.filterwarnings("ignore:the network is not at a minimum")  # obd does not say more than the truth does
@pytest.mark.parametrize(("options", "to"), CASES)
def test_on_a_parabola_in_each_layer_every_forecast_is_the_truth(task, options, to):
    dense = copy.deepcopy(task.model)

    cut = prune(task, to, layers=True, **options)

    names = [name for name in ("first.weight", "middle.weight", "last.weight") if name in cut.masks]
    losses = one_by_one(Task(dense, task.loss, task.data), cut.masks, names)
    assert [layer.name for layer in cut.layers] == names
    for layer, before, after in zip(cut.layers, losses[:-1], losses[1:], strict=True):
        assert (layer.kept, layer.total) == cut.plan.counts[layer.name]
        assert layer.rise == pytest.approx(after - before, rel=1e-9, abs=1e-13)
        assert layer.forecast == pytest.approx(layer.rise, rel=1e-9, abs=1e-12)
        assert layer.error is None and layer.zeroed is None
    found = cut.plan.forecast
    assert sum(layer.rise for layer in cut.layers) == pytest.approx(found.after - found.before, rel=1e-9)
    assert abs(found.rise - (found.after - found.before)) > 1e-6  # in all layers at once it is no parabola


@pytest.mark.filterwarnings("ignore:the network is not at a minimum")
@pytest.mark.parametrize(("options", "to"), CASES)
@pytest.mark.parametrize("trained_on", [False, True])
def test_the_same_weights_go_with_records_and_without(task, options, to, trained_on):
    task.model.float()
    plain = Task(copy.deepcopy(task.model), task.loss, [(x.float(), y.float()) for x, y in task.data])
    told = Task(task.model, task.loss, plain.data)

    def go_on(task):
        return torch.optim.SGD(task.model.parameters(), 0.1, momentum=0.9) if trained_on else None

    one = prune(plain, to, optimizer=go_on(plain), **options)
    two = prune(told, to, optimizer=go_on(told), layers=True, **options)

    assert one.masks == two.masks and one.layers == () and len(two.layers) == len(two.masks)
    for (name, a), b in zip(plain.params().items(), told.params().values(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a.signbit(), b.signbit()), name


def test_records_leave_the_network_as_it_was(task):
    masks = secateur.plan(task, "sparsity 0.6").masks
    task.model.train()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    records = rises_of(task, masks)
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert task.model.training and all(layer.forecast for layer in records)


def test_an_error_half_way_leaves_the_network_as_it_was(task):
    masks = secateur.plan(task, "sparsity 0.6").masks
    before = {name: value.clone() for name, value in task.model.state_dict().items()}

    def loss(output, target):
        if not task.model.middle.weight.all():
            raise KeyboardInterrupt
        return nn.functional.mse_loss(output, target)

    with pytest.raises(KeyboardInterrupt):
        rises_of(Task(task.model, loss, task.data), masks)
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


def test_only_the_first_examples_count(task):
    """Whole batches until 256 examples are seen; those after them change nothing."""
    first = [(tensor(100, 12, seed=n), tensor(100, 4, seed=n + 9)) for n in range(3)]
    masks = secateur.plan(task, "sparsity 0.6").masks
    one = rises_of(Task(task.model, task.loss, first), masks)
    two = rises_of(Task(task.model, task.loss, [*first, (1e3 * first[0][0], first[0][1])]), masks)
    three = rises_of(Task(task.model, task.loss, first[:2]), masks)
    assert one == two != three


class Tied(nn.Module):
    """An embedding whose weight is the last layer's too; attention whose inner layer is never called itself."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 10, bias=False)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.embed = nn.Embedding(10, 8)
        self.embed.weight = self.head.weight

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return self.head(self.norm(self.recurrent(x)[0]))[:, -1]


@pytest.fixture
def tied():
    torch.manual_seed(1)
    tokens = torch.randint(0, 10, (9, 5))
    return Task(Tied().double(), nn.functional.cross_entropy, [(tokens, tokens[:, 0])])


def test_tied_and_nested_tensors_stand_where_they_first_run(tied):
    attention = ["attend.in_proj_weight", "attend.out_proj.weight"]
    recurrent = ["recurrent.weight_ih_l0", "recurrent.weight_hh_l0"]
    assert in_order(tied, ["head.weight", *recurrent, *attention]) == ["head.weight", *attention, *recurrent]


def test_a_tied_tensor_has_one_record_and_the_forecast_of_its_whole_second_derivative(tied):
    """Against the Hessian of the shared tensor, entry by entry."""
    (tokens, labels), weight = tied.data[0], tied.model.head.weight.detach().clone()
    mask = weight.abs() > weight.abs().median()

    (record,) = rises_of(tied, Masks({"head.weight": mask}))

    def loss(w):
        both = {"head.weight": w, "embed.weight": w}
        output = torch.func.functional_call(tied.model, both, (tokens,), tie_weights=False)
        return nn.functional.cross_entropy(output, labels)

    change = -(weight * ~mask)
    slope = torch.autograd.functional.jacobian(loss, weight)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        bend = torch.autograd.functional.hessian(loss, weight)
    wanted = (slope * change).sum() + torch.einsum("ij,ijkl,kl->", change, bend, change) / 2
    assert record.name == "head.weight" and record.forecast == pytest.approx(wanted.item(), rel=1e-9)
    assert record.rise == pytest.approx((loss(weight + change) - loss(weight)).item(), rel=1e-9)


def test_what_is_pruned_already_changes_nothing(task):
    first = prune(task, "sparsity 0.5", only=["first*"])
    again = prune(task, "sparsity 0.6", masks=first.masks, only=["last*"], layers=True)
    records = {layer.name: layer for layer in again.layers}
    assert (records["first.weight"].forecast, records["first.weight"].rise) == (0.0, 0.0)
    assert records["last.weight"].rise != 0.0


class Deep(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize(("depth", "some"), [(200, True), (201, False)])
def test_more_than_two_hundred_tensors_are_told_together_only(depth, some):
    torch.manual_seed(0)
    task = Task(Deep(depth), nn.functional.mse_loss, [(torch.randn(2, 4), torch.randn(2, 4))])
    masks = Masks({name: p.abs() > 0.2 for name, p in task.params().items() if p.ndim == 2})
    if some:
        assert len(rises_of(task, masks)) == depth
    else:
        with pytest.warns(Caution, match="201 tensors"):
            assert rises_of(task, masks) == ()


class Once(torch.autograd.Function):
    """The square, which can be differentiated once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return 2 * ctx.saved_tensors[0] * slope


def test_without_second_derivatives_the_slope_is_the_forecast():
    torch.manual_seed(0)
    net = nn.Linear(6, 3, bias=False).double()
    x, w = tensor(5, 6), net.weight.detach().clone()
    mask = w.abs() > 0.2
    task = Task(net, lambda output, _: Once.apply(output).mean(), [(x, torch.zeros(5))])
    (record,) = rises_of(task, Masks({"weight": mask}))
    slope = 2 * (x @ w.T).T @ x / 15
    assert record.forecast == pytest.approx(float(-(slope * w * ~mask).sum()), rel=1e-12)


@pytest.mark.filterwarnings("ignore::secateur.engine.cautions.Caution")
def test_the_verb_tells_layers_with_a_solver_and_without(task):
    told = secateur.prune(Task(copy.deepcopy(task.model), task.loss, task.data), "sparsity 0.5", layers=True)
    solved = secateur.prune(task, "sparsity 0.5", solver=ExactObs(damping=0.1), layers=True)
    names = ["first.weight", "middle.weight", "last.weight"]
    assert [layer.name for layer in told.layers] == [layer.name for layer in solved.layers] == names
    for layer in solved.layers:  # a parabola in each layer, whatever its weights become
        assert layer.error is not None and layer.forecast == pytest.approx(layer.rise, rel=1e-9, abs=1e-12)
