# Networks are indexed by layer here, which the type checker cannot follow.
# pyright: reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOptionalOperand=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
"""Flatness: eigenvalue, trace, sharpness and noise against dense Hessians and direct evaluation, in float64."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from secateur.core.errors import DataError, MaskError, ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.streams import global_state, stream
from secateur.core.task import Task
from secateur.linalg.products import Operator
from secateur.probes._flatness import filter_noise, free, signed_sums, spread_of_mean, top_eigenvalue
from secateur.probes.flatness import Flatness
from secateur.testing.cases import CASES, attention, conv_bn, lstm, relu_mlp, tanh_mlp, tied

QUICK = Flatness(draws=5, sizes=(0.1, 0.3))


def half(task, seed=0):
    """Masks that keep about half of every matrix, and the network pruned by them."""
    random = stream(seed, "test", "masks")
    masks = Masks({n: torch.rand(p.shape, generator=random) > 0.5 for n, p in task.params().items() if p.dim() > 1})
    masks.apply_(task.model)
    return masks


def places(task, masks):
    """The entries of each parameter that are free, by name."""
    every = {name: torch.ones_like(p, dtype=torch.bool) for name, p in task.params().items()}
    return every | dict(masks or {})


def dense_hessian(task, masks=None):
    """The Hessian of the mean loss over all data by torch's own second derivatives, entry by entry, kept ones only."""
    own, kept = task.params(), places(task, masks)
    model, sizes = copy.deepcopy(task.model).eval(), [p.numel() for p in own.values()]
    count = sum(len(x) for x, _ in task.data)

    def loss(flat):
        parts = zip(own.items(), flat.split(sizes), strict=True)
        at = {name: part.reshape(p.shape) for (name, p), part in parts}
        return sum(task.loss(functional_call(model, at, (x,)), y) * len(x) for x, y in task.data) / count

    flat = torch.cat([p.detach().flatten() for p in own.values()])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        full = torch.autograd.functional.hessian(loss, flat)
    chosen = torch.cat([kept[name].flatten() for name in own])
    return full[chosen][:, chosen]


def loss_with(task, change):
    """Mean loss of a copy whose tensors were changed by hand."""
    model = copy.deepcopy(task.model).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += change.get(name, 0.0)
        n = sum(len(x) for x, _ in task.data)
        return float(sum(task.loss(model(x), y) * len(x) for x, y in task.data) / n)


@pytest.mark.parametrize("make", [tanh_mlp, conv_bn, attention, tied], ids=lambda m: m.__name__)
@pytest.mark.parametrize("pruned", [False, True])
def test_the_eigenvalue_is_that_of_the_dense_matrix_of_kept_weights(make, pruned):
    task = make()
    masks = half(task) if pruned else None
    values = torch.linalg.eigvalsh(dense_hessian(task, masks))
    reading = Flatness(draws=5, sizes=(0.1,), products=200)(task, masks)
    assert reading.parts["weights"] == len(values)
    assert reading.value == pytest.approx(float(values[-1]), rel=1e-4)
    assert reading.value <= float(values[-1]) * (1 + 1e-10)
    assert float((values - reading.value).abs().min()) <= reading.parts["residual"] + 1e-12
    assert (reading.low, reading.high) == pytest.approx(
        (reading.value - reading.parts["residual"], reading.value + reading.parts["residual"]), rel=1e-12
    )


def test_masks_give_exactly_the_submatrix_and_tied_weights_are_there_once():
    for make in (tanh_mlp, tied):
        task = make()
        masks = half(task)
        found = Operator(task, free(task, masks)).dense()
        torch.testing.assert_close(found, dense_hessian(task, masks), rtol=1e-9, atol=1e-11)


class Known:
    """A symmetric matrix as an operator."""

    def __init__(self, matrix):
        self.matrix, self.size, self.dtype, self.device = matrix, len(matrix), matrix.dtype, matrix.device
        self.calls = 0

    def __matmul__(self, v):
        self.calls += 1
        return self.matrix @ v


def spectrum(values, seed=0):
    """A matrix with these eigenvalues."""
    random = torch.randn(len(values), len(values), generator=stream(seed, "test", "basis"), dtype=torch.float64)
    basis = torch.linalg.qr(random)[0]
    return Known(basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T)


@pytest.mark.parametrize(
    "values",
    [
        [3.0, 2.9, *torch.linspace(-1, 2, 98).tolist()],
        [-50.0, *torch.linspace(-1, 2, 60).tolist()],
        [*[-1.0] * 30, -0.5],
        [5.0] * 12,
        [0.0] * 20,
        [7.0],
        [4.0, 1.0, -9.0, 0.0, 2.0],
    ],
)
def test_restarted_lanczos_finds_the_largest_whatever_else_is_there(values):
    op = spectrum(values)
    found = top_eigenvalue(op, 400, stream(0, "t"), tolerance=1e-9)
    assert found.value == pytest.approx(max(values), rel=1e-8, abs=1e-10)
    assert found.residual <= 1e-8 * max(map(abs, values)) + 1e-12
    assert found.products == op.calls


def test_the_residual_tells_when_lanczos_was_stopped_early():
    values = torch.linspace(0, 1, 300).tolist()
    op = spectrum(values)
    found = top_eigenvalue(op, 6, stream(0, "t"), tolerance=1e-9)
    assert found.products == op.calls == 6
    assert found.residual > 1e-3
    assert found.value < 1.0
    assert min(abs(value - found.value) for value in values) <= found.residual


def test_the_signs_give_the_trace_as_their_mean_over_all_and_with_the_exact_variance():
    matrix = dense_hessian(tanh_mlp())[:10, :10]
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=10)), dtype=torch.float64)
    sums = torch.einsum("ni,ij,nj->n", signs, matrix, signs)
    off = matrix - torch.diag(matrix.diagonal())
    assert float(sums.mean()) == pytest.approx(float(matrix.trace()), rel=1e-9)
    assert float(sums.var(unbiased=False)) == pytest.approx(float(2 * off.square().sum()), rel=1e-9)
    drawn = signed_sums(Known(matrix), 4000, stream(0, "t"))
    every = sums.sort().values
    near = every[torch.searchsorted(every, drawn - 1e-12).clamp(max=len(every) - 1)]
    assert float((near - drawn).abs().max()) < 1e-9  # each is one of the values that signs can give
    assert float(drawn.mean()) == pytest.approx(float(matrix.trace()), abs=5 * float(sums.std()) / 4000**0.5)
    assert float(drawn.var()) == pytest.approx(float(sums.var()), rel=0.15)


def test_signs_are_exact_at_once_for_a_diagonal_matrix_and_do_not_depend_on_how_many_go_together(monkeypatch):
    diagonal = Known(torch.diag(torch.arange(1.0, 8.0, dtype=torch.float64)))
    assert signed_sums(diagonal, 5, stream(0, "t")).tolist() == pytest.approx([28.0] * 5, abs=1e-12)
    full = spectrum(torch.linspace(-1, 3, 20).tolist())
    together = signed_sums(full, 7, stream(0, "t"))
    monkeypatch.setattr("secateur.probes._flatness._HELD", 40)
    torch.testing.assert_close(signed_sums(full, 7, stream(0, "t")), together, rtol=1e-12, atol=1e-12)


def test_the_trace_of_a_network_is_that_of_its_hessian_within_its_error():
    task = tanh_mlp()
    masks = half(task)
    matrix = dense_hessian(task, masks)
    trace = Flatness(draws=200, sizes=(0.1,)).measure(task, masks)["trace"]
    off = matrix - torch.diag(matrix.diagonal())
    exact = float((2 * off.square().sum() / 200).sqrt())
    assert trace.stderr == pytest.approx(exact, rel=0.25)
    assert abs(trace.value - float(matrix.trace())) < 4 * exact
    assert trace.parts["per weight"] == pytest.approx(trace.value / len(matrix), rel=1e-12)


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
@pytest.mark.parametrize("pruned", [False, True])
def test_sharpness_is_the_rise_at_the_point_along_the_gradient(make, pruned):
    task = make()
    masks = half(task) if pruned else None
    kept, model = places(task, masks), copy.deepcopy(task.model).eval()
    n = sum(len(x) for x, _ in task.data)
    sum(task.loss(model(x), y) * len(x) / n for x, y in task.data).backward()
    slopes = {name: p.grad * kept[name] for name, p in model.named_parameters()}
    length = float(sum(g.square().sum() for g in slopes.values()).sqrt())
    rise = loss_with(task, {name: 0.2 * g / length for name, g in slopes.items()}) - loss_with(task, {})
    found = Flatness(rho=0.2, draws=5, sizes=(0.1,), products=1).measure(task, masks)["sharpness"]
    assert found.value == pytest.approx(rise, rel=1e-9)
    assert found.parts == pytest.approx({"rho": 0.2, "gradient": length}, rel=1e-9)


def test_a_slope_has_no_part_in_the_rise_under_noise():
    net = nn.Linear(6, 1).double()
    data = [(torch.randn(8, 6, generator=stream(0, "x"), dtype=torch.float64), torch.zeros(8, 1).double())]
    found = QUICK.measure(Task(net, lambda output, _: 3 * output.mean(), data))
    assert found["sharpness"].value > 0.01
    assert [abs(found[f"noise {size}"].value) < 1e-12 for size in ("0.1", "0.3")] == [True, True]


@pytest.mark.parametrize("make", [conv_bn, tied, lstm], ids=lambda m: m.__name__)
def test_the_rise_under_noise_is_the_mean_over_networks_changed_by_hand(make):
    task = make()
    masks = half(task)
    kept = free(task, masks)
    found = QUICK.measure(task, masks)
    for size in QUICK.sizes:
        noises = [filter_noise(task.params(), kept, 0, draw) for draw in range(5)]
        losses = [
            [loss_with(task, {k: way * size * z for k, z in noise.items()}) for way in (1, -1)] for noise in noises
        ]
        rises = [(one + two) / 2 - loss_with(task, {}) for one, two in losses]
        reading = found[f"noise {size:g}"]
        mean = sum(rises) / 5
        stderr = math.sqrt(sum((rise - mean) ** 2 for rise in rises) / 4 / 5)
        assert reading.value == pytest.approx(mean, rel=1e-9)
        assert reading.stderr == pytest.approx(stderr, rel=1e-9)
        assert (reading.high - reading.low) / 2 == pytest.approx(2.776 * stderr, rel=4e-3)  # Student's t of 4
        assert reading.n == 5


def test_noise_is_as_long_as_each_filter_stays_off_pruned_weights_and_is_shared_by_name():
    task = conv_bn()
    whole = filter_noise(task.params(), free(task, None), 0, 0)
    masks = half(task)
    noise = filter_noise(task.params(), free(task, masks), 0, 0)
    assert set(noise) == {"first.weight", "second.weight", "head.weight"}
    for name, z in noise.items():
        assert not z[~masks[name]].any()
        torch.testing.assert_close(z.flatten(1).norm(dim=1), task.params()[name].flatten(1).norm(dim=1))
        kept = z[0].ne(0) & whole[name][0].ne(0)
        ratio = z[0][kept] / whole[name][0][kept]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))  # one draw, other lengths
    again = filter_noise(task.params(), free(task, None), 0, 1)
    assert not torch.equal(again["first.weight"], whole["first.weight"])


def test_noise_of_filters_does_not_see_a_rescaling_that_sharpness_and_curvature_see():
    task = relu_mlp()
    other = Task(copy.deepcopy(task.model), task.loss, task.data)
    with torch.no_grad():
        other.model[0].weight *= 10
        other.model[0].bias *= 10
        other.model[3].weight /= 10
    one, two = QUICK.measure(task), QUICK.measure(other)
    assert two["loss"].value == pytest.approx(one["loss"].value, rel=1e-12)
    for size in ("0.1", "0.3"):
        assert two[f"noise {size}"].value == pytest.approx(one[f"noise {size}"].value, rel=1e-9)
    for name in ("top_eigenvalue", "trace", "sharpness"):
        assert two[name].value > 2 * one[name].value


def test_student_s_interval_is_that_of_tables():
    for n, t in ((5, 2.7764), (10, 2.2622), (20, 2.0930), (200, 1.9720)):
        values = torch.arange(n, dtype=torch.float64)
        spread = spread_of_mean(values)
        assert (spread.high - float(values.mean())) / spread.stderr == pytest.approx(t, rel=3e-3)


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_network_random_state_and_modes_stay_and_a_seed_gives_the_same(make):
    task = make()
    task.model.train()
    before, state = copy.deepcopy(task.model.state_dict()), global_state()["cpu"].clone()
    first = QUICK(task)
    assert task.model.training and all(m.training for m in task.model.modules())
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in task.model.parameters())
    assert torch.equal(global_state()["cpu"], state)
    torch.manual_seed(5)
    assert QUICK(task) == first
    other = Flatness(draws=5, sizes=(0.1, 0.3), seed=1)(task)
    assert other.parts["noise 0.1"] != first.parts["noise 0.1"]
    assert other.parts["trace"] != first.parts["trace"]
    assert other.value == pytest.approx(first.value, rel=1e-2)


def test_large_batches_are_cut_without_a_change_of_any_figure():
    task = attention(batches=(150,))
    cut = Task(task.model, task.loss, [(x, y) for x, y in zip(*(t.split(10) for t in task.data[0]), strict=True)])
    one, two = QUICK.measure(task), QUICK.measure(cut)
    assert one["loss"].n == 150
    for name, reading in two.items():
        assert one[name].value == pytest.approx(reading.value, rel=1e-7), name
    assert one["loss"].value == pytest.approx(loss_with(task, {}), rel=1e-12)


def test_only_so_many_examples_count():
    task = tanh_mlp(batches=(4, 3, 5))
    x, y = (torch.cat(parts) for parts in zip(*task.data, strict=True))
    first = Task(task.model, task.loss, [(x[:5], y[:5])])
    few, same = Flatness(examples=5, draws=5).measure(task), Flatness(draws=5).measure(first)
    assert few["loss"].n == 5
    for name, reading in same.items():
        assert few[name].value == pytest.approx(reading.value, rel=1e-9), name


def test_a_half_type_is_measured_in_a_float32_copy_and_stays_as_it_is():
    task = conv_bn(torch.bfloat16)
    wide = Task(copy.deepcopy(task.model).float(), task.loss, [(x.float(), y) for x, y in task.data])
    one, two = QUICK.measure(task), QUICK.measure(wide)
    assert all(p.dtype == torch.bfloat16 for p in task.model.parameters())
    assert "float32 copy" in one["loss"].note and not two["loss"].note
    assert {name: r.value for name, r in one.items()} == {name: r.value for name, r in two.items()}


def test_a_half_network_that_cannot_be_copied_is_refused_with_the_cure():
    task = tanh_mlp(torch.bfloat16)
    task.model.hidden = task.model[0].weight * 2  # no leaf of the graph, so torch refuses to copy it
    with pytest.raises(ModelError, match=r"model\.float\(\)"):
        QUICK(task)


def test_where_every_unit_is_dead_there_is_no_curvature_and_it_is_said():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)).double()
    with torch.no_grad():
        net[0].bias.fill_(-100.0)
    data = [(torch.randn(6, 3, generator=stream(0, "x"), dtype=torch.float64), torch.tensor([0, 1] * 3))]
    found = QUICK.measure(Task(net, functional.cross_entropy, data))
    assert [found[name].value for name in ("top_eigenvalue", "trace", "sharpness", "noise 0.1")] == [0.0] * 4
    assert found["top_eigenvalue"].parts["residual"] == 0.0
    assert "exactly zero" in found["sharpness"].note


def test_a_loss_that_is_not_finite_is_told_and_not_hidden():
    task = tanh_mlp()
    with torch.no_grad():
        task.model[0].weight[0, 0] = math.nan
    found = QUICK.measure(task)
    assert all(math.isnan(reading.value) for reading in found.values())
    assert all("nan" in reading.note for name, reading in found.items() if name != "loss")
    assert math.isnan(QUICK(task).value)


def test_a_loss_that_is_not_finite_under_noise_is_counted():
    task = tanh_mlp()
    limit = loss_with(task, {}) + 1e-6

    def bounded(output, target):
        value = functional.cross_entropy(output, target)
        return torch.where(value > 3 * limit, torch.inf, value)

    found = Flatness(draws=8, sizes=(1e-6, 50.0)).measure(Task(task.model, bounded, task.data))
    assert math.isfinite(found["noise 1e-06"].value)
    assert math.isnan(found["noise 50"].value)
    assert "of 8 draws gave a loss that is not finite" in found["noise 50"].note


class Once(torch.autograd.Function):
    """Doubles; its backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g


def test_without_a_second_derivative_the_rest_is_still_measured():
    task = tanh_mlp()

    def loss(output, target):
        return functional.cross_entropy(Once.apply(output), target)

    found = QUICK.measure(Task(task.model, loss, task.data))
    assert math.isnan(found["top_eigenvalue"].value) and "twice" in found["top_eigenvalue"].note
    assert found["sharpness"].value > 0 and math.isfinite(found["noise 0.1"].value)


def test_parameters_that_are_not_trained_stay():
    task = tanh_mlp()
    task.model[0].requires_grad_(False)
    assert set(free(task, None)) == {"2.weight", "2.bias", "4.weight", "4.bias"}
    task.model.requires_grad_(False)
    assert len(free(task, None)) == 6


class Restless(nn.Module):
    """Noise that stays on in evaluation mode."""

    def forward(self, x):
        return x + torch.randn_like(x)


def test_what_cannot_be_measured_is_refused():
    task = tanh_mlp()
    loud = nn.Sequential(Restless(), *task.model)
    with pytest.raises(DataError, match="evaluation mode"):
        QUICK(Task(loud, task.loss, task.data))
    with pytest.raises(ModelError, match="one number"):
        QUICK(Task(task.model, lambda o, t: functional.cross_entropy(o, t, reduction="none"), task.data))
    with pytest.raises(DataError, match="no example"):
        QUICK(Task(task.model, task.loss, []))
    with pytest.raises(MaskError, match="another network"):
        QUICK(task, Masks({"9.weight": torch.ones(2, 2, dtype=torch.bool)}))


@pytest.mark.parametrize(
    "options",
    [{"rho": 0.0}, {"rho": math.inf}, {"sizes": (0.1, -0.1)}, {"draws": 4}, {"examples": 0}, {"products": 0}],
)
def test_options_out_of_range_are_refused_by_name(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        Flatness(**options)
