"""Removing units: targets met and counted anew, the units of the lowest scores gone, and nothing done by halves."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

import copy
import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import secateur
from secateur.core.errors import BudgetError, DataError, ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.sockets import Criterion
from secateur.core.task import Task
from secateur.criteria.flap import Flap
from secateur.criteria.magnitude import Magnitude
from secateur.criteria.taylor_filter import TaylorFilter
from secateur.engine.removing import Choice, few, survey
from secateur.engine.shrinking import shrink, thin
from secateur.probes.cost import Cost
from secateur.surgery import Costs, analyse
from secateur.testing.snapshot import changes, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export:UserWarning")


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def convolutional():
    """Two convolutions with BatchNorm and two linear layers, in float64; batches of unequal size."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 10, 3, bias=False), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 12, 3), nn.BatchNorm2d(12),
        nn.ReLU(), nn.Flatten(), nn.Linear(48, 14), nn.ReLU(), nn.Linear(14, 5),
    ).double()  # fmt: skip
    data = [(tensor(n, 3, 6, 6, seed=n), torch.arange(n) % 5) for n in (9, 6)]
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return Task(net, secateur.CrossEntropy(), data)


def linear():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    return Task(net, secateur.CrossEntropy(), [(tensor(8, 6), torch.arange(8) % 3)])


@pytest.fixture
def task():
    return convolutional()


def counted(net, data):
    """Figures by another way: the probe that listens to the products of one pass, and the tensors themselves."""
    parts = Cost()(Task(net, secateur.CrossEntropy(), data)).parts
    return {"params": parts["params"], "macs": parts["macs_dense"], "bytes": parts["bytes_dense"]}


def by_hand(a, b, c):
    """Figures of the convolutional network by its three widths."""
    params = 27 * a + 2 * a + 9 * a * b + b + 2 * b + 4 * b * c + c + 5 * c + 5
    macs = 16 * 27 * a + 4 * 9 * a * b + 4 * b * c + 5 * c
    return {"params": params, "macs": macs, "bytes": 8 * (params + 2 * a + 2 * b + 2)}


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("criterion", [None, TaylorFilter()], ids=["magnitude", "taylor_filter"])
@pytest.mark.parametrize(
    ("to", "share"), [("macs 0.5x", 0.5), ("params 40%", 0.4), ("bytes 0.6x", 0.6), ("params 500", 500 / 2167)]
)
def test_the_target_is_met_and_counted_anew(task, to, share, criterion, rounds):
    dense = counted(task.model, task.data)
    assert dense["params"] == 270 + 20 + 1080 + 12 + 24 + 48 * 14 + 14 + 70 + 5 == 2167
    done = shrink(task, to, criterion, rounds=rounds)
    after, quantity = counted(done.model, task.data), to.split()[0]
    assert done.model is task.model and dict(done.before) == dense and dict(done.after) == after
    limit = share * dense[quantity]
    assert after[quantity] <= limit
    assert len(done.rounds) == rounds and done.rounds[-1].cost == after[quantity]
    widths = [len(task.model[i].weight) for i in (0, 3, 7)]
    assert by_hand(*widths) == after
    one_more = [by_hand(*(w + (i == j) for j, w in enumerate(widths)))[quantity] for i in range(3)]
    assert max(one_more) > limit  # the last unit that went was needed
    assert all(record.cost <= record.limit and record.error < 1e-9 for record in done.rounds)
    assert math.isclose(done.rounds[-1].recovered, task.mean_loss(), rel_tol=1e-12)


def test_shares_fall_by_the_same_factor_and_scores_are_taken_anew(task):
    calls = []

    @dataclass(frozen=True)
    class Counting(Criterion):
        needs = frozenset({"data-free"})

        def __call__(self, task, masks):
            calls.append({name: tuple(mask.shape) for name, mask in masks.items()})
            return Magnitude()(task, masks)

    before = counted(task.model, task.data)["macs"]
    done = shrink(task, "macs 0.125x", Counting(), rounds=3)
    limits = [record.limit / before for record in done.rounds]
    torch.testing.assert_close(torch.tensor(limits), torch.tensor([0.5, 0.25, 0.125]))
    assert len(calls) == 3 and calls[0] != calls[1] != calls[2]
    units = {name: sum(record.removed.get(name, 0) for record in done.rounds) for name in done.groups}
    assert {name: size - kept for name, (kept, size) in done.groups.items()} == units
    assert {name: kept for name, (kept, _) in done.groups.items()} == {
        name: len(done.model.get_parameter(name)) for name in ("0.weight", "3.weight", "7.weight")
    }


def test_the_units_of_the_lowest_scores_go_and_the_rest_computes_the_same():
    """Magnitude: all weights of the row that makes a unit and of the column that uses it, added up by hand."""
    task = linear()
    dense, (x, _) = copy.deepcopy(task.model), task.data[0]
    row, column = dense[0].weight.detach().abs(), dense[2].weight.detach().abs()
    scores = row.sum(1) + column.sum(0)
    shrink(task, "units 12", only=["0.weight"])
    kept = scores.argsort(descending=True)[:5].sort().values
    torch.testing.assert_close(task.model[0].weight.detach(), dense[0].weight.detach()[kept])
    hidden = torch.tanh(dense[0](x))
    gone = torch.ones(9, dtype=torch.float64).index_fill(0, kept, 0).bool()
    expected = dense[2:](hidden.masked_fill(gone, 0))
    torch.testing.assert_close(task.model(x), expected)


def test_taylor_is_read_where_units_are_made_and_flap_where_they_are_used():
    """The unit that a dead consumer ignores goes first for FLAP, the one that the loss does not feel for Taylor."""
    for criterion in (Flap(), TaylorFilter()):
        task = linear()
        with torch.no_grad():
            task.model[2].weight[:, 4] = 0
        weight = task.model[0].weight.detach().clone()
        shrink(task, "units 15", criterion, only=["0.weight"])
        rest = torch.cat([weight[:4], weight[5:]])
        torch.testing.assert_close(task.model[0].weight.detach(), rest)


def test_statistics_are_those_of_the_data_in_the_smaller_network(task):
    done = shrink(task, "macs 0.5x")
    with torch.no_grad():
        seen = torch.cat([task.model[0](x) for x, _ in task.data])
    # each batch weighs by its examples
    torch.testing.assert_close(task.model[1].running_mean, seen.mean((0, 2, 3)))
    assert done.rounds[0].recovered is not None and done.rounds[0].recovered != done.rounds[0].loss

    other = convolutional()
    mean = other.model[1].running_mean.clone()
    done = shrink(other, "macs 0.5x", statistics=False)
    assert done.rounds[0].recovered is None and float(other.model[1].running_mean.abs().max()) == float(
        mean.abs().max()
    )


def test_the_optimizer_and_averaged_copies_go_along_and_training_goes_on(task):
    ema = copy.deepcopy(task.model)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.05, momentum=0.9)
    seen = []

    def train(model, given):
        assert given is optimizer
        seen.append(sum(p.numel() for p in model.parameters()))
        for x, y in task.data:
            given.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            given.step()

    train(task.model, optimizer)
    done = shrink(task, "macs 0.3x", TaylorFilter(), rounds=3, between=train, optimizer=optimizer, also=[ema])
    assert len(seen) == 3 and seen[0] > seen[1] > seen[2] > done.after["params"]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in task.model.parameters()]
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in held)
    assert [p.shape for p in ema.parameters()] == [p.shape for p in task.model.parameters()]
    train(task.model, optimizer)


@dataclass(frozen=True)
class Failing(Criterion):
    """Magnitude that fails at its nth call."""

    nth: int = 2
    calls: list = field(default_factory=list)
    needs = frozenset({"data-free"})

    def __call__(self, task, masks):
        self.calls.append(1)
        if len(self.calls) >= self.nth:
            raise DataError("no more scores")
        return Magnitude()(task, masks)


BAD = [
    (dict(to="params 40"), BudgetError, r"allows 40 params .* 56 are left"),
    (dict(to="sparsity 1.5"), UsageError, "names no known quantity"),
    (dict(to="macs 1.5x"), BudgetError, r"share must be in \(0, 1\]"),
    (dict(only=["layer*"]), UsageError, "no group matches 'layer"),
    (dict(skip=["layer*"]), UsageError, "no group matches 'layer"),
    (dict(equal=["layer*"]), UsageError, "no group matches 'layer"),
    (dict(skip=["*"]), ModelError, "all groups stay whole, skipped by name"),
    (dict(to="macs 0.1x", skip=["7*"], minimum=8), BudgetError, "stay whole: skipped by name: 7.weight"),
    (dict(rounds=0), UsageError, "rounds is 0"),
    (dict(rounds=2, minimum=0.5), UsageError, "a share of what each of 2 rounds"),
    (dict(scope="local"), UsageError, "scope"),
    (dict(granularity="units"), UsageError, "granularity"),
    (dict(criterion=Failing(1)), DataError, "no more scores"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_done_is_refused_and_nothing_is_changed(task, options, error, words):
    before = snapshot(task)
    optimizer = torch.optim.Adam(task.model.parameters())
    params = list(task.model.parameters())
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    if "scope" in options or "granularity" in options:
        error = (error, Exception)  # the annotations are checked here, the library itself says the same
    with pytest.raises(error, match=words):
        shrink(task, options.pop("to", "macs 0.5x"), options.pop("criterion", None), optimizer=optimizer, **options)
    assert not changes(before, snapshot(task))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in params]


def test_a_round_that_fails_takes_those_before_it_back(task):
    """Weights, buffers, sizes, hooks and optimizer; what was trained in between cannot be taken back."""
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1, momentum=0.9)
    nn.functional.cross_entropy(task.model(task.data[0][0]), task.data[0][1]).backward()
    optimizer.step()
    heard = []
    handle = task.model[0].register_forward_hook(lambda *_: heard.append(1))
    before, state = snapshot(task), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(DataError, match="no more scores"):
        shrink(task, "macs 0.3x", Failing(3), rounds=3, optimizer=optimizer)
    assert not changes(before, snapshot(task))
    assert task.model[0].out_channels == 10 and task.model[1].num_features == 10
    after = optimizer.state_dict()
    assert all(
        torch.equal(after["state"][k]["momentum_buffer"], v["momentum_buffer"]) for k, v in state["state"].items()
    )
    task.model(task.data[0][0])
    assert heard
    heard.clear()
    handle.remove()
    task.model(task.data[0][0])
    assert not heard

    with pytest.raises(DataError, match="no more scores"):
        shrink(task, "macs 0.3x", Failing(3), rounds=3, between=lambda *_: None)
    assert task.model[0].out_channels < 10 and torch.isfinite(torch.tensor(task.mean_loss()))


def test_a_target_that_holds_changes_nothing(task):
    before = snapshot(task)
    done = shrink(task, "macs 1x", statistics=False)
    assert not done.shrunk and "holds already" in done.notes[0] and done.before == done.after
    assert not changes(before, snapshot(task))


def test_a_plan_says_what_will_be_done_and_changes_nothing(task):
    before = snapshot(task)
    plan = survey(task, "params 0.5x", None, Choice(skip=("7.weight",)))
    assert not changes(before, snapshot(task))
    assert "22 units in 1" not in plan.brief() and "22 units in 2 groups can go" in str(plan)
    assert "1 group stays whole (skipped by name): 7.weight" in plan.brief()
    done = shrink(task, "params 0.5x", skip=("7.weight",))
    assert plan.figures() == done.after and plan.groups() == done.groups
    assert done.groups["7.weight"] == (14, 14) and done.left == {"7.weight": "skipped by name"}
    assert f"{done.after['params']:,}" in str(done)
    table = done.to_json()
    assert [row["units"] for row in table["coverage"] if row["tensor"] == "9.weight"] == [0, 14]
    assert table["figures"]["params"] == [2167, done.after["params"]]


def test_groups_of_one_unit_still_count():
    """A group that is down to one unit before the last round is no group any more; the target counts it still."""
    task = linear()
    with torch.no_grad():
        task.model[0].weight.mul_(1e-3)
        task.model[2].weight.mul_(1e-3)
    done = shrink(task, "units 5", rounds=3, normalize="none")
    assert done.groups == {"0.weight": (1, 9), "2.weight": (4, 7)}
    assert [len(task.model[i].weight) for i in (0, 2)] == [1, 4] and done.rounds[-1].cost == 5


def test_scope_minimum_multiple_and_equal():
    task = convolutional()
    shrink(task, "macs 0.4x", scope="group")
    shares = [len(task.model[i].weight) / n for i, n in ((0, 10), (3, 12), (7, 14))]
    assert max(shares) - min(shares) <= 0.2
    task = convolutional()
    shrink(task, "macs 0.5x", minimum=3, multiple=3)
    assert all(n % 3 == 0 or n == whole for n, whole in ((len(task.model[i].weight), w) for i, w in ((0, 10), (3, 12))))
    task = linear()
    task.model[2] = nn.Linear(9, 9).double()
    task.model[4] = nn.Linear(9, 3).double()
    shrink(task, "params 0.5x", rounds=2, equal=("*.weight",))
    assert len(task.model[0].weight) == len(task.model[2].weight) < 9


def test_removal_that_changes_a_normalisation_is_left_out_unless_allowed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)).double()
    task = Task(net, secateur.CrossEntropy(), [(tensor(8, 6), torch.arange(8) % 3)])
    with pytest.raises(ModelError, match="all groups stay whole, inexact"):
        shrink(task, "params 0.5x")
    done = shrink(task, "params 0.5x", inexact=True)
    assert done.after["params"] <= done.before["params"] // 2 and done.shrunk[0].inexact


def test_zeros_stay_zero(task):
    masks = secateur.plan(task, "sparsity 0.5", forecast=False).masks
    masks.apply_(task.model)
    done = shrink(task, "macs 0.5x", rounds=2)
    smaller = done.masks(masks)
    smaller.check(done.model)
    for name, mask in smaller.items():
        assert torch.equal(mask, done.model.get_parameter(name) != 0)


class Written(nn.Module):
    """A forward that writes its width down."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.two(torch.relu(self.one(x)).view(-1, 2, 4).reshape(-1, 8))


def test_a_network_that_writes_sizes_down_goes_on_as_a_graph_or_is_refused():
    torch.manual_seed(0)
    task = Task(Written().double(), secateur.CrossEntropy(), [(tensor(8, 6), torch.arange(8) % 3)])
    found = analyse(task.model, few(task))
    if not found.groups:
        pytest.skip("no unit of this network can go")
    with pytest.raises(ModelError, match="Allow rewriting"):
        shrink(task, "params 0.6x", rewriting=False)
    done = shrink(task, "params 0.6x", rounds=2)
    assert done.rewritten and isinstance(done.model, GraphModule) and any("graph" in note for note in done.notes)
    assert done.after["params"] == sum(p.numel() for p in done.model.parameters()) <= 0.6 * done.before["params"]


def test_shares_may_be_of_another_network(task):
    dense = Costs(analyse(copy.deepcopy(task.model), few(task)))
    first = thin(task, "macs 0.5x", None, Choice(), base=dense)
    again = thin(task, "macs 0.4x", None, Choice(), base=dense)
    assert first.after["macs"] <= 0.5 * dense.macs() and again.after["macs"] <= 0.4 * dense.macs()
    assert again.after["macs"] > 0.5 * first.after["macs"]  # 0.4 of what was left would be less


def test_every_score_zero_is_refused(task):
    @dataclass(frozen=True)
    class Nothing(Criterion):
        needs = frozenset({"data-free"})

        def __call__(self, task, masks):
            return {name: torch.zeros_like(mask, dtype=torch.float64) for name, mask in masks.items()}

    with pytest.raises(ModelError, match="all scores are zero"):
        shrink(task, "macs 0.5x", Nothing())
    assert Masks.dense(task.model).total == 270 + 1080 + 672 + 70
