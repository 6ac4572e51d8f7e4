"""Activate-while-Pruning: counts of every cycle, which weights go, what they wake, and what a cycle begins with."""

import copy
import math

import pytest
import torch
from torch import nn

from secateur.core.budget import keep_for
from secateur.core.errors import BudgetError, ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import parameters
from secateur.core.sockets import Rule
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.criteria.snip import Snip
from secateur.data import Loader, Split
from secateur.engine.binding import table_of, value_of
from secateur.engine.loop import Training
from secateur.engine.recipe import TrainStep
from secateur.nets import build
from secateur.probes.dead_units import DeadUnits
from secateur.rules._activation import awaken, dead_rate
from secateur.rules.activating_while_pruning import ActivatingWhilePruning
from secateur.testing.rules_contract import check_rule


def data(batch=4):
    random = stream(0, "data")
    x = torch.rand(12, 6, generator=random, dtype=torch.float64)
    return Loader(Split(x, torch.arange(12) % 3), batch, shuffle=True, dtype=torch.float64)


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).double()


class Watched(Rule):
    """Before the rule under test: what the network is at the end of every step."""

    paper = ActivatingWhilePruning.paper

    def __init__(self):
        self.weights, self.masks, self.rates, self.momenta = [], [], [], []

    def before_step(self, run):
        self.momenta.append(len(run.optimizer.state))

    def after_step(self, run):
        self.weights.append({n: w.detach().clone() for n, w in parameters(run.model).items()})
        self.masks.append(run.masks)
        self.rates.append(run.optimizer.param_groups[0]["lr"])


def trained(rule, epochs=6, masks=None, model=None, sample=True, **options):
    """The training, the first weights, and what was seen before and after the rule in every step."""
    model = model or net()
    first, before, after = copy.deepcopy(model.state_dict()), Watched(), Watched()
    step = TrainStep(epochs=epochs, rules=(before, rule, after), **{"lr": 0.1, **options})
    batches = list(data().epoch(0))
    given = (lambda n, m: Task(m, nn.functional.cross_entropy, batches)) if sample else None
    training = Training(model, data(), step, masks=masks, sample=given)
    training.fit()
    return training, first, before, after


def fires(weight, x, mask):
    """Which unit is awake on which sample."""
    return (x @ (weight * mask).T) > 0


def test_removing_negative_weights_puts_no_unit_to_sleep():
    """Card test (a): with inputs of at least 0 whatever fires goes on firing; with signed ones it does not."""
    random = stream(0, "layer")
    w = torch.randn(40, 30, generator=random, dtype=torch.float64)
    start = w + 0.1 * torch.randn(40, 30, generator=random, dtype=torch.float64)
    x = torch.rand(200, 30, generator=random, dtype=torch.float64)
    masks = Masks({"w": torch.rand(40, 30, generator=random) < 0.8})

    left = awaken(masks, {"w": w}, {"w": start}, masks.kept - 250)

    was, now = fires(w, x, masks["w"]), fires(w, x, left["w"])
    assert bool((now | ~was).all()) and int(now.sum()) > int(was.sum())
    signed = x - 0.5
    assert bool((fires(w, signed, masks["w"]) & ~fires(w, signed, left["w"])).any())


def test_negative_weights_go_by_how_little_they_moved():
    """Card tests (c) and (d): against a plain sort; positive and zero weights stay; unmoved ones go first."""
    random = stream(1, "layer")
    shapes = {"a": (9, 7), "b": (4, 9)}
    w = {n: torch.randn(s, generator=random, dtype=torch.float64) for n, s in shapes.items()}
    w["a"][0] = 0.0
    start = {n: v + 0.1 * torch.randn(v.shape, generator=random, dtype=torch.float64) for n, v in w.items()}
    start["a"][3], start["b"][1] = w["a"][3], w["b"][1]
    masks = Masks({n: torch.rand(s, generator=random) < 0.9 for n, s in shapes.items()})
    moved = {n: (w[n] - start[n]).abs() for n in w}
    low = {n: masks[n] & (w[n] < 0) for n in w}
    order = torch.cat([moved[n][low[n]] for n in w]).sort().values
    still = int((order == 0).sum())

    for count in (still, still + 5, len(order) - 3):
        left = awaken(masks, w, start, masks.kept - count)
        gone = masks - left
        assert gone.kept == count
        for n in w:
            assert not bool((gone[n] & ~(w[n] < 0)).any())
            assert torch.equal(gone[n], low[n] & (moved[n] <= order[count - 1]))


def test_too_few_negative_weights_are_an_error():
    w = {"w": torch.arange(-3.0, 17.0).reshape(4, 5)}
    masks = Masks({"w": torch.ones(4, 5, dtype=torch.bool)})
    assert awaken(masks, w, w, 17)["w"].sum() == 17

    with pytest.raises(ModelError, match="4 negative weights are to go, but only 3 are left"):
        awaken(masks, w, w, 16)


@pytest.mark.parametrize(("rate", "extra"), [(0.2, 0.02), (0.3, 0.1), (0.25, 0.0)])
def test_every_cycle_removes_its_share_exactly(rate, extra):
    """Card test (b): the same counts as the base pruner's own, whatever the extra; at the ends of equal parts."""
    rule = ActivatingWhilePruning(sparsity=0.7, rate=rate, extra=extra)
    counts, kept, last = [], 324, keep_for(0.7, 324)
    while kept > last:
        kept = max(last, kept - math.floor(rate * kept + 1e-9))
        counts.append(kept)

    training, _, before, after = trained(rule, epochs=8)

    assert training.run.masks.kept == last == counts[-1]
    edges = [number * 24 // (len(counts) + 1) for number in range(1, len(counts) + 1)]
    seen = [masks.kept for masks in after.masks]
    assert seen == [([324, *counts])[sum(e <= step for e in edges)] for step in range(1, 25)]
    assert all((new - old).kept == 0 for old, new in zip(before.masks, after.masks, strict=True))


def test_a_cycle_takes_the_smallest_and_then_the_stillest_negative_weights():
    """The first cycle by hand, with plain sorts; afterwards everything is as it was, and the optimizer starts anew."""
    rule = ActivatingWhilePruning(sparsity=0.2, rate=0.2, extra=0.05)

    _, first, before, after = trained(rule, epochs=4, weight_decay=0.01)

    names, at = list(before.masks[0]), 5  # the sixth of twelve steps ends the only cycle
    w = before.weights[at]
    total = sum(w[n].numel() for n in names)
    gone, extra = total - keep_for(0.2, total), total - keep_for(0.05, total)
    size = torch.cat([w[n].abs().flatten() for n in names])
    moved = torch.cat([(w[n] - first[n]).abs().flatten() for n in names])
    values = torch.cat([w[n].flatten() for n in names])
    left = size > size.sort().values[gone - extra - 1]
    low = left & (values < 0)
    left &= ~(low & (moved <= moved[low].sort().values[extra - 1]))
    found = torch.cat([after.masks[at][n].flatten() for n in names])
    assert torch.equal(found, left) and int(left.sum()) == keep_for(0.2, total)
    for name, value in after.weights[at].items():
        kept = after.masks[at][name] if name in names else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value, first[name] * kept)
    assert before.momenta[at] == 6 and after.momenta[at + 1] == 0


def test_without_rewinding_each_cycle_goes_on_from_the_last():
    rule = ActivatingWhilePruning(sparsity=0.6, rate=0.3, rewind=False)

    _, first, before, after = trained(rule)

    changed = [i for i, masks in enumerate(after.masks) if masks.kept < before.masks[i].kept]
    assert len(changed) > 1
    for i in changed:
        for name, value in after.weights[i].items():
            kept = after.masks[i][name] if name in after.masks[i] else torch.ones_like(value, dtype=torch.bool)
            assert torch.equal(value, before.weights[i][name] * kept)


def test_the_base_pruner_works_alone_at_first():
    """The authors' flag: until cycle ``after`` the masks are those of the criterion alone."""
    options = {"sparsity": 0.6, "rate": 0.3}
    plain = trained(ActivatingWhilePruning(extra=0.0, **options))[3].masks
    late = trained(ActivatingWhilePruning(extra=0.1, after=1, **options))[3].masks
    soon = trained(ActivatingWhilePruning(extra=0.1, **options))[3].masks

    first, second = list(dict.fromkeys(m.kept for m in plain))[1:3]
    assert [m for m in late if m.kept == first] == [m for m in plain if m.kept == first]
    assert [m for m in late if m.kept == second] != [m for m in plain if m.kept == second]
    assert [m for m in soon if m.kept == first] != [m for m in plain if m.kept == first]


def test_the_rate_falls_along_a_half_cosine_in_every_cycle():
    rule = ActivatingWhilePruning(sparsity=0.5, rate=0.3)  # two cycles and the rest: three parts of six steps

    _, _, before, _ = trained(rule, schedule="step")

    wanted = [0.1 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)] * 3
    assert before.rates == pytest.approx(wanted, abs=1e-15)
    _, _, before, _ = trained(ActivatingWhilePruning(sparsity=0.5, rate=0.3, anneal=False), schedule="constant")
    assert before.rates == [0.1] * 18


class TwoOfFive(nn.Module):
    """Two units whose bias keeps them below zero for inputs in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.layer, self.relu, self.head = nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)
        with torch.no_grad():
            self.layer.weight.copy_(torch.arange(1.0, 16.0).reshape(5, 3) / 10)
            self.layer.bias.copy_(torch.tensor([0.0, -9.0, 0.0, -9.0, 0.0]))

    def forward(self, x):
        return self.head(self.relu(self.layer(x)))


def test_two_dead_units_of_five():
    """Card test (e), with the probe as a second opinion; a network without ReLU has no rate."""
    x = torch.rand(50, 3, generator=stream(0, "inputs"))
    task = Task(
        TwoOfFive(), nn.functional.cross_entropy, [(x[:30], torch.zeros(30).long()), (x[30:], torch.zeros(20).long())]
    )

    assert dead_rate(task) == pytest.approx(0.4)
    assert DeadUnits()(task).value == pytest.approx(40)
    assert dead_rate(Task(nn.Linear(3, 2), nn.functional.cross_entropy, task.data)) is None


def test_rates_of_dead_units_are_among_the_metrics(tmp_path):
    """Once each cycle, both of them; without a sample of the data there are none."""
    rule = ActivatingWhilePruning(sparsity=0.6, rate=0.3)
    rows = []
    model = net()
    batches = list(data().epoch(0))
    step = TrainStep(epochs=6, lr=0.1, rules=(rule,))
    sample = lambda n, m: Task(m, nn.functional.cross_entropy, batches)  # noqa: E731
    Training(model, data(), step, sample=sample, watch=lambda row: rows.append(dict(row))).fit()

    found = [(row["step"], row["dead"], row["dead/static"]) for row in rows if "dead" in row]
    assert [step for step, *_ in found] == [18 * i // 4 for i in (1, 2, 3)]
    assert all(0 <= dead <= 1 and 0 <= static <= 1 for _, dead, static in found)
    assert trained(rule, sample=False)[0].run.masks.kept == keep_for(0.6, 324)


def test_criteria_with_data_and_autocast():
    check_rule(ActivatingWhilePruning(sparsity=0.3, rate=0.2, criterion=Snip()), ["conv_bn"], epochs=2)
    torch.manual_seed(0)
    model = build("resnet20", outputs=3)
    random = stream(0, "images")
    batches = Loader(Split(torch.randn(16, 3, 8, 8, generator=random), torch.arange(16) % 3), 8)
    training = Training(model, batches, TrainStep(
        epochs=3, lr=0.05, amp=True, rules=(ActivatingWhilePruning(sparsity=0.3),),
    ))  # fmt: skip

    masks = training.fit()

    assert masks.kept == keep_for(0.3, masks.total)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sparsity": 1.0}, BudgetError, r"sparsity is 1.0; it must be in \[0, 1\)"),
        ({"sparsity": float("nan")}, BudgetError, "sparsity is nan"),
        ({"rate": 0.0}, UsageError, "rate is 0.0"),
        ({"rate": 1.0}, UsageError, "0 <= extra < rate < 1"),
        ({"rate": 0.1, "extra": 0.1}, UsageError, "rate is 0.1 and extra 0.1"),
        ({"extra": -0.1}, UsageError, "extra -0.1"),
        ({"after": -1}, UsageError, "after is -1"),
        ({"examples": 0}, UsageError, "examples 0"),
    ],
)
def test_values_out_of_range_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        ActivatingWhilePruning(**options)


def test_runs_that_do_not_fit_are_refused_before_training():
    half = Masks({n: torch.arange(m.numel()).reshape(m.shape) % 2 > 0 for n, m in Masks.dense(net()).items()})
    with pytest.raises(BudgetError, match="pruned already"):
        trained(ActivatingWhilePruning(sparsity=0.3), masks=half)
    with pytest.raises(UsageError, match="11 cycles and the training after them do not fit into 6 steps"):
        trained(ActivatingWhilePruning(sparsity=0.9), epochs=2)
    with pytest.raises(BudgetError, match="would empty whole layers"):
        trained(ActivatingWhilePruning(sparsity=0.9999, rate=0.9), epochs=20)
    with pytest.raises(UsageError, match="data-free"):
        trained(ActivatingWhilePruning(sparsity=0.5, criterion=Snip()), sample=False)


def test_recipes_can_hold_it():
    rule = ActivatingWhilePruning(sparsity=0.5, rate=0.3, extra=0.1, criterion=Snip(), rewind=False)

    assert value_of(Rule, table_of(rule), "rule") == rule
    assert value_of(Rule, "activating_while_pruning", "rule") == ActivatingWhilePruning()
