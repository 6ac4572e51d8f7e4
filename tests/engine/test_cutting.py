"""Pruning once: targets are met to the weight, plans change nothing, and the forecast is what calculus says."""

import copy
import math

import pytest
import torch
from torch import nn

import secateur
from secateur.core.allocations import ALLOCATIONS
from secateur.core.errors import BudgetError, MaskError, ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.patterns import NM, Block, Unit
from secateur.core.task import Task
from secateur.criteria.magnitude import Magnitude
from secateur.criteria.random import Random
from secateur.criteria.snip import Snip
from secateur.testing import quadratics
from secateur.testing.snapshot import changes, snapshot


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def task():
    """A small convolutional network with BatchNorm, in float64, and two batches of unequal size."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 4, 2), nn.Flatten(), nn.Linear(36, 8), nn.Tanh(),
        nn.Linear(8, 5),
    ).double()  # fmt: skip
    data = [(tensor(n, 3, 6, 6, seed=n), torch.arange(n) % 5) for n in (7, 4)]
    return Task(net, secateur.CrossEntropy(), data)


SIZES = {"0.weight": 8 * 27, "3.weight": 4 * 32, "5.weight": 8 * 36, "7.weight": 5 * 8}
POSITIONS = {"0.weight": 16, "3.weight": 9, "5.weight": 1, "7.weight": 1}
TOTAL = sum(SIZES.values())


def zeros(net):
    """Zeros counted in the network itself."""
    return sum(int((net.get_parameter(name) == 0).sum()) for name in SIZES)


@pytest.mark.parametrize("allocation", [kind() for kind in ALLOCATIONS.values()], ids=list(ALLOCATIONS))
@pytest.mark.parametrize(
    ("to", "kept"),
    [
        ("sparsity 0.9", TOTAL - TOTAL * 9 // 10),
        ("0.5", TOTAL - TOTAL // 2),
        ("sparsity 0", TOTAL),
        ("params 5%", TOTAL - TOTAL * 95 // 100),
        ("params 0.25", TOTAL - TOTAL * 3 // 4),
        ("keep 123", 123),
        ("keep 4", 4),
        (f"keep {TOTAL}", TOTAL),
    ],
)
def test_targets_are_met_to_the_weight(task, to, kept, allocation):
    """Whatever the allocation, the zeros in the network are as many as were asked for, and no tensor is empty."""
    cut = secateur.prune(task, to, allocation=allocation)

    assert cut.masks.kept == kept and zeros(task.model) == TOTAL - kept
    assert cut.plan.counts == {name: (cut.masks.counts()[name], size) for name, size in SIZES.items()}
    assert min(cut.masks.counts().values()) >= 1
    assert cut.model is task.model and cut.hold is None


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("allocation", [kind() for kind in ALLOCATIONS.values()], ids=list(ALLOCATIONS))
def test_a_target_in_macs_is_used_up_but_not_exceeded(task, share, allocation):
    """MACs counted by hand from the zeros: at most the share, and one weight more would exceed it."""
    dense = sum(SIZES[name] * POSITIONS[name] for name in SIZES)

    cut = secateur.prune(task, f"macs {share}x", allocation=allocation)

    macs = sum(cut.masks.counts()[name] * POSITIONS[name] for name in SIZES)
    assert macs <= share * dense
    assert share == 1.0 or macs > share * dense - max(POSITIONS.values()) * len(SIZES)
    assert cut.plan.costs == POSITIONS
    assert zeros(task.model) == TOTAL - cut.masks.kept


@pytest.mark.parametrize(("to", "n", "m"), [("2:4", 2, 4), ("1:4", 1, 4), ("1:2", 1, 2)])
def test_n_of_m_targets_keep_the_largest_of_every_group(task, to, n, m):
    """Against a loop over groups; tensors whose input width is no multiple of M are left alone with the reason."""
    whole = copy.deepcopy(task.model)
    cut = secateur.prune(task, to)

    assert set(cut.masks) | (set(cut.plan.left_alone) & set(SIZES)) == set(SIZES)
    for name in cut.masks:
        before, mask = whole.get_parameter(name).detach(), cut.masks[name]
        rows, marks = (t.movedim(1, -1).reshape(-1, m) for t in (before, mask))  # groups run along the inputs
        for row, marked in zip(rows, marks, strict=True):
            assert int(marked.sum()) == n
            assert row[marked].abs().min() >= row[~marked].abs().max()
    assert set(cut.masks) == {"3.weight", "5.weight", "7.weight"}  # three input channels are no whole group


def test_patterns_prune_whole_units(task):
    """Blocks and output units are all kept or all pruned; the budget is not exceeded."""
    dense = copy.deepcopy(task.model)
    cut = secateur.prune(task, "sparsity 0.5", pattern=Block(2, 2), only=("5.weight", "7.weight"), skip=("7.weight",))
    blocks = cut.masks["5.weight"].reshape(4, 2, 18, 2).transpose(1, 2).reshape(72, 4).sum(1)
    assert set(blocks.tolist()) == {0, 4} and cut.masks.kept == 144

    task.model.load_state_dict(dense.state_dict())
    cut = secateur.prune(task, "sparsity 0.5", pattern=Unit())
    for mask in cut.masks.values():
        assert set(mask.flatten(1).sum(1).tolist()) <= {0, mask[0].numel()}
    assert TOTAL // 2 - 36 < cut.masks.kept <= TOTAL - TOTAL // 2


def test_magnitude_keeps_the_largest_of_all(task):
    """One global threshold, against sorting all weights together."""
    every = torch.cat([task.model.get_parameter(name).detach().abs().flatten() for name in SIZES])
    threshold = every.sort(descending=True).values[199]

    masks = secateur.plan(task, "keep 200").masks

    for name in SIZES:
        assert torch.equal(masks[name], task.model.get_parameter(name).detach().abs() >= threshold)


@pytest.mark.parametrize("criterion", [Magnitude(), Random(2), Snip()])
def test_planning_changes_nothing(task, criterion):
    """Network, modes, gradients and torch's random state are as before; the plan is what prune then does."""
    task.model.train()
    task.model[5].weight.grad = torch.ones_like(task.model[5].weight)
    before = snapshot(task)

    made = secateur.plan(task, "sparsity 0.7", criterion=criterion)

    assert changes(before, snapshot(task)) == []
    assert made.forecast is not None and made.forecast.after is None
    cut = secateur.prune(task, made)
    assert cut.masks == made.masks and zeros(task.model) == TOTAL - made.masks.kept


def test_pruning_leaves_all_else_alone(task):
    """Kept weights, biases, BatchNorm and its statistics are equal to the bit; pruned ones are +0.0."""
    state = {name: value.clone() for name, value in task.model.state_dict().items()}

    cut = secateur.prune(task, "sparsity 0.8")

    for name, value in task.model.state_dict().items():
        kept = cut.masks[name] if name in cut.masks else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value[kept], state[name][kept])
        if name in cut.masks:
            assert int(value[~kept].view(torch.int64).count_nonzero()) == 0


@pytest.mark.parametrize(
    ("to", "options", "kind", "says"),
    [
        ("sparsity 1", {}, BudgetError, "sparsity"),
        ("keep 3", {}, BudgetError, "empty whole layers"),
        (f"keep {TOTAL + 1}", {}, BudgetError, f"only {TOTAL}"),
        ("macs 0.0001x", {}, BudgetError, "cannot be met"),
        ("2:4", {"pattern": Block()}, UsageError, "contradict"),
        ("2:4", {"pattern": NM(1, 4)}, UsageError, "contradict"),
        ("1:7", {}, ModelError, "nothing in this network"),
        ("0.5", {"only": ["conv*"]}, UsageError, r"conv\*"),
        ("0.5", {"skip": ["*"]}, ModelError, "nothing"),
    ],
)
def test_what_cannot_be_done_changes_nothing(task, to, options, kind, says):
    state = {name: value.clone() for name, value in task.model.state_dict().items()}

    with pytest.raises(kind, match=says):
        secateur.prune(task, to, **options)

    assert all(torch.equal(value, state[name]) for name, value in task.model.state_dict().items())


def symmetric(n, seed):
    """A symmetric matrix whose eigenvalues have both signs."""
    a = tensor(n, n, seed=seed)
    return a + a.T


@pytest.mark.parametrize("to", ["sparsity 0.25", "sparsity 0.5", "sparsity 0.875"])
@pytest.mark.parametrize("criterion", [Magnitude(), Random(1)])
def test_the_forecast_is_exact_on_a_quadratic(to, criterion):
    """``g·d + d·Hd / 2`` is the whole of Taylor's series there: the measured rise equals it."""
    h, b, w = symmetric(8, 1), tensor(8, seed=2), tensor(8, seed=3)
    task = quadratics.dense(h, b, w)

    cut = secateur.prune(task, to, criterion=criterion)

    found = cut.plan.forecast
    d = torch.where(cut.masks["weight"][0], 0.0, -w)
    assert math.isclose(found.slope, float((h @ w + b) @ d), rel_tol=1e-12, abs_tol=1e-13)
    assert math.isclose(found.curvature, float(d @ h @ d / 2), rel_tol=1e-12, abs_tol=1e-13)
    assert math.isclose(found.before, float(w @ h @ w / 2 + b @ w), rel_tol=1e-12)
    assert math.isclose(found.after - found.before, found.rise, rel_tol=1e-10, abs_tol=1e-12)
    shown = found.to_json()
    assert shown["rise_forecast"] == found.rise and shown["rise_measured"] == found.after - found.before


class Slope(torch.autograd.Function):
    """The derivative of the square, which itself has none."""

    @staticmethod
    def forward(ctx, x, slope):
        return 2 * x * slope

    @staticmethod
    def backward(ctx, slope):
        raise RuntimeError("the derivative of Slope is not implemented")


class Once(torch.autograd.Function):
    """The square, whose derivative cannot be differentiated again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, slope):
        return Slope.apply(ctx.saved_tensors[0], slope)


class Squares(nn.Module):
    """The squares of a linear layer's outputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.layer.weight.copy_(tensor(4, 6, seed=5))

    def forward(self, x):
        return Once.apply(self.layer(x))


def test_without_second_derivatives_the_forecast_is_the_slope():
    """Curvature is None, and the slope is the gradient of the mean over all examples along the pruned weights."""
    net = Squares()
    data = [(tensor(n, 6, seed=n), torch.zeros(n)) for n in (5, 2)]
    task = Task(net, lambda output, target: output.square().mean(), data)
    w, x = net.layer.weight.detach().clone(), torch.cat([inputs for inputs, _ in data])

    found = secateur.plan(task, "sparsity 0.5")

    gradient = 4 * (x @ w.T).pow(3).T @ x / (7 * 4)
    d = torch.where(found.masks["layer.weight"], 0.0, -w)
    assert found.forecast.curvature is None
    assert math.isclose(found.forecast.slope, float((gradient * d).sum()), rel_tol=1e-12)
    assert found.forecast.rise == found.forecast.slope


def test_no_forecast_when_none_is_wanted(task):
    cut = secateur.prune(task, "sparsity 0.5", forecast=False)

    assert cut.plan.forecast is None and "forecast" not in str(cut.plan)


def test_a_plan_prints_every_tensor_and_the_totals(task):
    made = secateur.plan(task, "sparsity 0.5", skip=["7.weight"])

    text = str(made)
    for name, (kept, total) in made.counts.items():
        assert any(
            line.split()[0] == name and f"{kept:,} of" in line and f"{total:,}" in line for line in text.splitlines()
        )
    assert f"{made.masks.kept:,} of" in text and "forecast: the loss rises by" in text
    assert "left alone: 7.weight (skipped by name)" in text and "left alone: 0.bias" in text
    assert set(made.left_alone) == {n for n, _ in task.model.named_parameters()} - set(made.masks)


def train(task, optimizer, steps):
    """Some plain steps."""
    for _ in range(steps):
        for x, y in task.data:
            optimizer.zero_grad()
            task.loss(task.model(x), y).backward()
            optimizer.step()


def test_the_optimizer_forgets_pruned_weights_and_remembers_the_others(task):
    """Adam's moments are zero where weights went and untouched elsewhere; zeros stay through further training."""
    optimizer = torch.optim.Adam(task.model.parameters(), lr=0.01)
    train(task, optimizer, 2)
    names = {p: name for name, p in task.model.named_parameters()}
    before = {names[p]: {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()}

    cut = secateur.prune(task, "sparsity 0.8", optimizer=optimizer)

    assert cut.optimizer is optimizer and cut.hold is not None
    for p, state in optimizer.state.items():
        mask = cut.masks[names[p]] if names[p] in cut.masks else torch.ones_like(p, dtype=torch.bool)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key], torch.where(mask, before[names[p]][key], 0.0))
    with cut.hold:
        train(task, optimizer, 3)
        cut.masks.check(task.model)
    train(task, optimizer, 1)
    assert all(
        not state["exp_avg"][~cut.masks[names[p]]].eq(0).all()
        for p, state in optimizer.state.items()
        if names[p] in cut.masks
    )
    with pytest.raises(MaskError):
        cut.masks.check(task.model)


def test_averaged_copies_are_pruned_along(task):
    twin = copy.deepcopy(task.model)

    cut = secateur.prune(task, "sparsity 0.8", also=[twin])

    cut.masks.check(twin)


def test_random_pruning_looks_at_no_data(task):
    """Other examples and other weights: the same masks; another seed: others, as many."""
    one = secateur.plan(task, "keep 200", criterion=Random(3), forecast=False).masks
    with torch.no_grad():
        for p in task.model.parameters():
            p.mul_(-2.0)
    other = Task(task.model, task.loss, [(tensor(3, 3, 6, 6, seed=99), torch.zeros(3, dtype=torch.long))])

    assert secateur.plan(other, "keep 200", criterion=Random(3), forecast=False).masks == one
    third = secateur.plan(task, "keep 200", criterion=Random(4), forecast=False).masks
    assert third != one and third.kept == 200


def test_pruning_further_by_magnitude_nests(task):
    """Weights that are gone score lowest, so a smaller target keeps a part of what a larger one kept."""
    masks = [secateur.prune(task, f"keep {keep}").masks for keep in (400, 200, 50)]

    assert [m.kept for m in masks] == [400, 200, 50] and zeros(task.model) == TOTAL - 50
    assert (masks[1] - masks[0]).kept == 0 and (masks[2] - masks[1]).kept == 0


def test_a_milder_target_brings_no_weight_back(task):
    """The mask of a milder plan allows weights again, but those pruned before are still zero in the network."""
    first = secateur.prune(task, "keep 50").masks

    second = secateur.prune(task, "keep 200").masks

    assert second.kept == 200 and (first - second).kept == 0
    assert zeros(task.model) == TOTAL - 50
    assert Masks.from_zeros(task.model) == first


def test_what_is_pruned_stays_pruned_when_its_masks_are_given(task):
    """A plan for a pruned network nests in its masks, whatever the criterion, or is refused."""
    first = secateur.prune(task, "keep 200").masks

    second = secateur.plan(task, "keep 50", Random(seed=5), masks=first).masks

    assert second.kept == 50 and (second - first).kept == 0
    with pytest.raises(BudgetError, match="pruned already.*begin with the dense network"):
        secateur.plan(task, "keep 220", masks=first)


def test_a_loss_without_products_has_no_macs():
    """A target in MACs needs weights that are multiplied with data."""

    class Gates(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(tensor(2, 3))

        def forward(self, x):
            return torch.sigmoid(self.weight) + x

    task = Task(Gates(), lambda output, target: output.square().mean(), [(tensor(4, 2, 3), torch.zeros(4))])
    assert secateur.plan(task, "keep 2").masks.kept == 2
    with pytest.raises(ModelError, match="MACs cannot be a target"):
        secateur.plan(task, "macs 0.5x")


def test_weights_that_are_not_finite_are_refused(task):
    with torch.no_grad():
        task.model[5].weight[0, 0] = float("nan")

    with pytest.raises(ModelError, match=r"1 of 288 weights of `5\.weight` are NaN"):
        secateur.plan(task, "sparsity 0.5")


def test_bfloat16_networks_are_pruned_to_the_weight(task):
    """Scores with many ties: the count is still exact."""
    task.model.to(torch.bfloat16)
    half = Task(task.model, task.loss, [(x.bfloat16(), y) for x, y in task.data])

    cut = secateur.prune(half, "keep 321")

    assert cut.masks.kept == 321 and zeros(half.model) == TOTAL - 321
    assert all(p.dtype == torch.bfloat16 for p in half.model.parameters())
    assert math.isfinite(cut.plan.forecast.rise)
