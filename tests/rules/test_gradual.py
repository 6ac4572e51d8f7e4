"""Gradual pruning: the schedule of counts is the paper's, and pruned weights stay pruned."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from secateur.core.allocations import Allocation, ByCost, ErdosRenyi, Lamp, Uniform
from secateur.core.budget import keep_for
from secateur.core.errors import BudgetError, ModelError, UsageError
from secateur.core.hold import Hold
from secateur.core.masks import Masks
from secateur.core.names import parameters
from secateur.core.patterns import NM, Block, Unit
from secateur.core.run import Run
from secateur.core.schedules import Levels, Linear, OneShot
from secateur.core.sockets import Criterion, Rule
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.criteria.magnitude import Magnitude
from secateur.criteria.random import Random
from secateur.criteria.taylor import Taylor
from secateur.engine.binding import table_of, value_of
from secateur.rules.gradual import Gradual
from secateur.testing.cases import tanh_mlp
from secateur.testing.rules_contract import check_rule


class Toy:
    """A run without a loop: every step moves the weights at random, as training would."""

    def __init__(self, rule, total=100, masks=None, net=None, sample=True):
        torch.manual_seed(0)
        self.rule = rule
        self.net = net or nn.Sequential(nn.Linear(20, 40), nn.Linear(40, 16), nn.Linear(16, 8)).double()
        masks = masks or Masks.dense(self.net)
        task = Task(self.net, nn.functional.cross_entropy, [(torch.randn(6, 20).double(), torch.arange(6))])
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.1, 0.9)
        hold = Hold(masks, self.net, self.optimizer, hooks=False)
        self.run = Run(
            self.net, self.optimizer, hold, total, 10, sample=(lambda n: task) if sample else None, rules=(rule,)
        )
        self.random = stream(0, "toy")
        self.history = []

    def go(self):
        self.rule.begin(self.run)
        self.history.append(self.run.masks)
        while self.run.step < self.run.total:
            with torch.no_grad():
                for w in self.net.parameters():
                    w.add_(torch.randn(w.shape, generator=self.random).to(w), alpha=0.05)
            self.run.hold.mask_weights_()
            self.run.step += 1
            self.rule.after_step(self.run)
            self.history.append(self.run.masks)
        self.rule.end(self.run)
        self.run.masks.check(self.net)
        return self


def nested(history):
    """Whether no weight ever comes back."""
    return all((new - old).kept == 0 for old, new in zip(history, history[1:], strict=False))


def test_sparsity_at_the_quarters_is_the_paper_s():
    """Card test (a): 0.9 in four rounds passes 0, 0.5203, 0.7875, 0.8859, 0.9, each an exact integer count."""
    toy = Toy(Gradual(sparsity=0.9, start=0.0, stop=1.0, updates=4)).go()
    total = toy.run.masks.total

    counts = [toy.history[step].kept for step in (0, 25, 50, 75, 100)]

    cubic = [0.9 - 0.9 * (1 - i / 4) ** 3 for i in range(5)]
    assert [round(s, 4) for s in cubic] == [0.0, 0.5203, 0.7875, 0.8859, 0.9]
    assert counts == [keep_for(s, total) for s in cubic]
    assert counts[0] == total == 1568 and counts[-1] == 1568 - 1411


@pytest.mark.parametrize("allocation", [Uniform(), Lamp(), ErdosRenyi()])
@pytest.mark.parametrize("criterion", [Magnitude(), Taylor(), Random(3)])
def test_every_round_is_exact_and_never_gives_back(criterion, allocation):
    """Card test (d): integer counts of the closed formula after every round, whatever ranks and shares out."""
    rule = Gradual(
        sparsity=0.873, criterion=criterion, allocation=allocation, start=0.1, stop=0.8, updates=14, initial=0.2
    )

    toy = Toy(rule).go()

    total = toy.run.masks.total
    for step, masks in enumerate(toy.history):
        done = min(14, (step - 10) // 5)
        wanted = total if done < 0 else keep_for(0.2 + 0.673 * (1 - (1 - done / 14) ** 3), total)
        assert masks.kept == wanted, step
    assert nested(toy.history)


def test_magnitude_rounds_keep_exactly_the_largest_weights_that_are_left():
    """One round against a plain sort in float64."""
    toy = Toy(Gradual(sparsity=0.5, schedule=Linear(), stop=1.0, updates=2), total=2)
    toy.rule.begin(toy.run)
    toy.run.step = 1
    toy.rule.after_step(toy.run)
    left = {n: w.detach().clone() for n, w in toy.run.weights().items()}

    toy.run.step = 2
    toy.rule.after_step(toy.run)

    flat = torch.cat([w.abs().flatten() for w in left.values()])
    cut = flat.sort(descending=True).values[toy.run.masks.kept - 1]
    for name, w in left.items():
        assert torch.equal(toy.run.masks[name], w.abs() >= cut)


def test_state_of_pruned_weights_is_cleared():
    """Card test (e): value, momentum and the next update of a pruned weight are zero."""
    toy = Toy(Gradual(sparsity=0.5, stop=0.1, updates=1), total=10)
    for _ in range(2):
        for p in toy.net.parameters():
            p.grad = torch.ones_like(p)
        toy.optimizer.step()
    toy.run.step = 1

    toy.rule.after_step(toy.run)

    for name, w in toy.run.weights().items():
        gone = ~toy.run.masks[name]
        assert gone.any() and (toy.optimizer.state[w]["momentum_buffer"][gone] == 0).all()
        assert (toy.optimizer.state[w]["momentum_buffer"][~gone] != 0).all()
        w.grad = None
        toy.optimizer.step()
        assert (w[gone] == 0).all()


def test_rounds_that_fall_on_one_step_are_one():
    """More rounds than steps: the count after each step is that of the last round due."""
    toy = Toy(Gradual(sparsity=0.8, schedule=Linear(), stop=0.5, updates=50), total=10).go()

    total = toy.run.masks.total
    assert [m.kept for m in toy.history] == [keep_for(min(0.8, 0.16 * step), total) for step in range(11)]


def test_one_shot_prunes_before_the_first_step():
    toy = Toy(Gradual(sparsity=0.7, schedule=OneShot())).go()

    assert {masks.digest for masks in toy.history} == {toy.history[0].digest}
    assert toy.history[0].kept == keep_for(0.7, toy.history[0].total)


def test_levels_are_iterative_pruning():
    toy = Toy(Gradual(sparsity=0.875, schedule=Levels(3, 0.875), stop=0.9, updates=3)).go()

    total = toy.run.masks.total
    assert [toy.history[s].kept for s in (0, 30, 60, 90)] == [total, total // 2, total // 4, total // 8]


def test_a_resumed_rule_changes_nothing():
    toy = Toy(Gradual(sparsity=0.7, schedule=OneShot()))
    toy.run.resumed = True
    toy.rule.begin(toy.run)

    assert toy.run.masks.kept == toy.run.masks.total


def test_pruned_weights_return_with_their_value_when_regrow_is_on():
    """A weight pruned at 3 of 10 comes back at its old value once the others have become smaller."""
    net = nn.Linear(10, 1, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.arange(1.0, 11.0).double())
    toy = Toy(Gradual(sparsity=0.3, schedule=OneShot(), stop=1.0, updates=4, regrow=True), total=4, net=net)
    toy.rule.begin(toy.run)
    assert net.weight[0].tolist() == [0, 0, 0, 4, 5, 6, 7, 8, 9, 10]
    with torch.no_grad():
        net.weight[0, 5] = 2.5
        net.weight[0, 6] = -0.5
    toy.run.step = 1

    toy.rule.after_step(toy.run)

    assert net.weight[0].tolist() == [0, 0, 3, 4, 5, 2.5, 0, 8, 9, 10]
    check_rule(toy.rule, ["tanh_mlp"], epochs=4)


def test_nm_ramps_through_whole_numbers():
    """2:4 goes through 4:4 and 3:4; every group keeps exactly that many; nothing comes back."""
    toy = Toy(Gradual(sparsity=0.5, pattern=NM(2, 4), stop=1.0, schedule=Linear(), updates=10)).go()

    for step, masks in enumerate(toy.history):
        per_group = 4 if step < 50 else 3 if step < 100 else 2
        for mask in masks.values():
            assert (mask.reshape(-1, 4).sum(1) == per_group).all()
    assert nested(toy.history)


@pytest.mark.parametrize("pattern", [Block(2, 2), Unit()])
def test_blocks_stay_whole_and_nested(pattern):
    """Counts are rounded down to whole units; every mask is one of the pattern."""
    toy = Toy(Gradual(sparsity=0.8, pattern=pattern, allocation=Uniform())).go()

    largest = max(pattern.unit_size(tuple(m.shape)) for m in toy.run.masks.values())
    for masks in toy.history:
        for mask in masks.values():
            sums = pattern.unit_scores(mask.double())
            assert ((sums == 0) | (sums == pattern.unit_size(tuple(mask.shape)))).all()
    assert keep_for(0.8, masks.total) - largest < toy.run.masks.kept <= keep_for(0.8, masks.total)
    assert nested(toy.history)


def test_going_on_from_a_pruned_network_keeps_its_zeros():
    """One layer nearly empty, uniform shares: it keeps what it has, the others carry the rest, the total is exact."""
    net = nn.Sequential(nn.Linear(20, 40), nn.Linear(40, 16)).double()
    dense = Masks.dense(net)
    first = {name: mask.clone() for name, mask in dense.items()}
    first["0.weight"].view(-1)[5:] = False
    toy = Toy(Gradual(sparsity=0.7, allocation=Uniform(), schedule=Linear()), masks=Masks(first), net=net).go()

    assert nested(toy.history)
    assert toy.run.masks.counts() == {"0.weight": 5, "1.weight": keep_for(0.7, dense.total) - 5}


def test_scores_without_any_difference_are_refused():
    """All gradients zero: an error, not a choice by index."""
    toy = Toy(Gradual(sparsity=0.7, criterion=Taylor(), stop=1.0, updates=3, initial=0.2), total=3)
    toy.rule.begin(toy.run)
    with torch.no_grad():
        parameters(toy.net)["2.weight"].zero_()
        parameters(toy.net)["2.bias"].zero_().add_(torch.tensor([50.0]).double())
        parameters(toy.net)["1.weight"].zero_()
    toy.run.sample = lambda n: Task(
        toy.net, lambda output, target: output.sum() * 0, [(torch.ones(1, 20).double(), None)]
    )
    toy.run.step = 1

    with pytest.raises(ModelError, match="scores of all weights that are left are zero"):
        toy.rule.after_step(toy.run)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sparsity": 1.0}, BudgetError, r"sparsity is 1.0; it must be in \[0, 1\)"),
        ({"sparsity": 0.5, "initial": 0.6}, BudgetError, "initial is 0.6"),
        ({"sparsity": float("nan")}, BudgetError, "sparsity is nan"),
        ({"start": 0.7, "stop": 0.5}, UsageError, "start is 0.7 and stop 0.5"),
        ({"stop": 1.5}, UsageError, "0 <= start < stop <= 1"),
        ({"updates": 0}, UsageError, "updates is 0; it must be at least 1"),
        ({"examples": 0}, UsageError, "examples is 0"),
        ({"allocation": ByCost()}, UsageError, "needs MACs"),
        (
            {"sparsity": 0.8, "schedule": Levels(3)},
            UsageError,
            "lead to final = 0.9, sparsity is 0.8; set `final = 0.8`",
        ),
        ({"initial": 0.5, "schedule": Levels(3)}, UsageError, "from initial = 0.5; set `final = 0.8`"),
        ({"pattern": NM(2, 4)}, UsageError, "set `sparsity = 0.5`"),
    ],
)
def test_values_out_of_range_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        Gradual(**options)


def test_networks_that_do_not_fit_are_refused_before_training():
    """All tensors that cannot take the pattern at once; a target that is met already; an impossible count; no data."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    with pytest.raises(UsageError, match=r"can take the pattern .*`skip = \['0.weight'\]`"):
        Toy(Gradual(sparsity=0.5, pattern=NM(2, 4)), net=net).go()
    half = Masks({name: torch.arange(m.numel()).reshape(m.shape) % 2 == 0 for name, m in Masks.dense(net).items()})
    with pytest.raises(BudgetError, match="0.5 of the network is pruned already"):
        Toy(Gradual(sparsity=0.3), masks=half, net=net).go()
    with pytest.raises(BudgetError, match="would empty whole layers"):
        Toy(Gradual(sparsity=0.999), net=net).go()
    with pytest.raises(UsageError, match="data-free"):
        Toy(Gradual(sparsity=0.5, criterion=Taylor()), net=net, sample=False).go()
    with pytest.raises(BudgetError, match="Begin from a dense network"):
        Toy(Gradual(sparsity=0.6, pattern=Block(1, 2)), masks=half, net=net).go()
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="NaN"):
        Toy(Gradual(sparsity=0.5), net=net).go()


@dataclass(frozen=True)
class BySlope(Gradual):
    """Gradual pruning that reads data. Cost: a gradient each round."""

    criterion: Criterion = field(default_factory=Taylor)
    allocation: Allocation = field(default_factory=Lamp)


def test_criteria_with_data_keep_the_contract():
    check_rule(BySlope(sparsity=0.5), ["conv_bn"], epochs=4)


def test_patterns_keep_the_contract():
    check_rule(Gradual(sparsity=0.5, pattern=NM(2, 4)), ["attention"], epochs=4)
    check_rule(Gradual(sparsity=0.5, pattern=Unit(), allocation=Uniform()), ["attention"], epochs=4)


def test_recipes_can_hold_it():
    """Through plain values and back."""
    rule = Gradual(
        sparsity=0.5, criterion=Random(3), allocation=Lamp(), pattern=NM(2, 4), schedule=Levels(4, 0.5), regrow=True
    )

    assert value_of(Rule, table_of(rule), "rule") == rule
    assert value_of(Rule, "gradual", "rule") == Gradual()


def test_bfloat16_weights_are_ranked_without_ties_lost():
    """Counts stay exact although many bfloat16 magnitudes are equal."""
    net = tanh_mlp(torch.bfloat16).model
    toy = Toy(Gradual(sparsity=0.77), net=net).go()

    assert toy.run.masks.kept == keep_for(0.77, toy.run.masks.total) and nested(toy.history)
