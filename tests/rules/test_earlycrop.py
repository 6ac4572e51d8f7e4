"""EarlyCroP: when it prunes, what of single weights and of whole channels is left, and what it refuses."""

import copy

import pytest
import torch

from secateur import train
from secateur.core.budget import keep_for
from secateur.core.errors import BudgetError, ModelError, UsageError
from secateur.core.hold import Hold
from secateur.core.masks import Masks
from secateur.core.names import parameters
from secateur.core.patterns import NM, Unit
from secateur.core.run import Run
from secateur.core.sockets import Rule
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.criteria.earlycrop import EarlyCrop
from secateur.engine.binding import table_of, value_of
from secateur.nets import build
from secateur.rules._channels import best_channels, gate_slopes
from secateur.rules._survivors import best_left
from secateur.rules.earlycrop import Earlycrop
from secateur.surgery.dead import shrink_dead
from secateur.testing.cases import CASES
from secateur.testing.quadratics import dense
from secateur.testing.rules_contract import check_rule


class Moved:
    """A run without a loop: after epoch ``t`` all weights lie ``distances[t]`` from the start, on a line."""

    def __init__(self, rule, distances, per_epoch=2, net=None, task=None, masks=None):
        self.rule, self.distances, self.history = rule, distances, []
        case = CASES["tanh_mlp"]()
        self.net = net or case.model
        task = task or Task(self.net, case.loss, case.data)
        self.start = copy.deepcopy(self.net.state_dict())
        optimizer = torch.optim.SGD(self.net.parameters(), 0.1, 0.9)
        hold = Hold(masks or Masks.dense(self.net), self.net, optimizer, hooks=False)
        total = per_epoch * len(distances)
        self.run = Run(self.net, optimizer, hold, total, per_epoch, sample=lambda n: task, rules=(rule,))

    def go(self):
        self.rule.begin(self.run)
        random = stream(0, "direction")
        way = {n: torch.randn(p.shape, generator=random, dtype=p.dtype) for n, p in self.net.named_parameters()}
        size = sum(float(w.square().sum()) for w in way.values()) ** 0.5
        self.history.append(self.run.masks)
        for distance in self.distances:
            for _ in range(self.run.steps_per_epoch):
                with torch.no_grad():
                    for name, p in self.net.named_parameters():
                        p.copy_(self.start[name] + way[name] * (distance / size))
                self.run.hold.mask_weights_()
                self.run.step += 1
                self.rule.after_step(self.run)
            self.history.append(self.run.masks)
        self.rule.end(self.run)
        return self

    @property
    def pruned_after(self):
        """The epoch after which weights are gone."""
        return next(i for i, masks in enumerate(self.history) if masks.kept < masks.total)


@pytest.mark.parametrize(
    ("distances", "threshold", "epoch"),
    [
        ((1.0, 1.0, 1.0, 1.0, 1.0), 0.05, 2),  # card test (d): one move, then rest
        ((1.0, 1.2, 1.32, 1.4, 1.44), 0.25, 2),
        ((1.0, 1.2, 1.32, 1.4, 1.44), 0.2, 3),  # 0.2 is not below 0.2 but for rounding
        ((1.0, 1.3, 1.5, 1.6, 1.6), 0.15, 4),
        ((2.0, 2.6, 2.2, 2.1, 2.1), 0.22, 3),  # of the first epoch's distance, and going back counts too
        ((1.0, 2.0, 3.0, 4.0, 5.0), 0.9, 4),  # never: at the latest, 0.8 of five epochs
    ],
)
def test_it_prunes_at_the_first_epoch_that_changes_little(distances, threshold, epoch):
    threshold -= 1e-9 if threshold == 0.2 else 0

    moved = Moved(Earlycrop(sparsity=0.8, threshold=threshold, latest=0.8), distances).go()

    assert moved.pruned_after == epoch
    assert moved.run.masks.kept == keep_for(0.8, moved.run.masks.total)
    assert len({masks.digest for masks in moved.history}) == 2, "it prunes once"


def test_the_paper_s_thresholds():
    """1 - s for weights, 0.9 - s for channels; the latter is negative above 0.9, and only the latest epoch counts."""
    assert Earlycrop(sparsity=0.98).rest == pytest.approx(0.02)
    assert Earlycrop(sparsity=0.5, pattern=Unit()).rest == pytest.approx(0.4)
    assert Earlycrop(sparsity=0.95, pattern=Unit()).rest < 0
    assert Earlycrop(sparsity=0.95, threshold=0.3).rest == 0.3


def test_weights_that_do_not_move_are_an_error():
    """Card test (d): d_1 = 0."""
    with pytest.raises(ModelError, match="no weight has moved in the first epoch"):
        Moved(Earlycrop(sparsity=0.8), (0.0, 0.0, 0.0, 0.0)).go()


@pytest.mark.parametrize(("sparsity", "total"), [(0.9, 100), (0.98, 266_200), (0.987, 12_345), (0.3, 50)])
def test_rounds_halve_the_way_and_end_before_they_repeat(sparsity, total):
    counts = Earlycrop(sparsity=sparsity).counts(total)
    keep = keep_for(sparsity, total)

    assert all(a > b for a, b in zip([total, *counts], [*counts, keep], strict=True))
    assert counts == [keep_for(sparsity - (sparsity - 0.5) / 2**i, total) for i in range(1, len(counts) + 1)]
    assert counts == [] if sparsity <= 0.5 else counts[-1] - keep <= 2
    assert Earlycrop(sparsity=sparsity, rounds=3).counts(total) == counts[:3]


def test_single_weights_go_by_the_criterion_scored_anew_each_round():
    """Before the first step, against the rounds by hand with a plain sort."""
    task = CASES["tanh_mlp"]()
    twin = copy.deepcopy(task.model)
    total = Masks.dense(twin).total
    masks = Masks.dense(twin)
    for few in (keep_for(0.6, total), keep_for(0.65, total), keep_for(0.675, total), keep_for(0.7, total)):
        scores = EarlyCrop()(Task(twin, task.loss, task.data), masks)
        flat = torch.cat([s.where(masks[n], -torch.tensor(1.0).double()).flatten() for n, s in scores.items()])
        cut = flat.sort(descending=True).values[few - 1]
        masks = Masks({n: (s >= cut) & masks[n] for n, s in scores.items()})
        masks.apply_(twin)
        assert masks.kept == few

    found = Moved(Earlycrop(sparsity=0.7, latest=0.0, rounds=3), (1.0,), net=task.model, task=task)
    found.rule.begin(found.run)

    assert found.run.masks == masks
    masks.check(task.model)


def test_a_network_that_was_pruned_keeps_its_zeros_even_those_of_an_empty_layer():
    task = CASES["tanh_mlp"]()
    first = {n: torch.arange(m.numel()).reshape(m.shape) % 5 > 0 for n, m in Masks.dense(task.model).items()}
    first["2.weight"][:] = False
    moved = Moved(Earlycrop(sparsity=0.8, latest=0.0), (1.0,), net=task.model, task=task, masks=Masks(first))

    moved.rule.begin(moved.run)

    assert (moved.run.masks - Masks(first)).kept == 0
    assert moved.run.masks.kept == keep_for(0.8, moved.run.masks.total)


def test_the_best_that_are_left_are_those_of_a_sort():
    random = stream(0, "scores")
    scores = {n: torch.randn(6, 7, generator=random) for n in "ab"}
    masks = Masks({n: torch.rand(6, 7, generator=random) < 0.7 for n in "ab"})
    flat = torch.cat([scores[n][masks[n]] for n in "ab"]).sort(descending=True).values

    chosen = best_left(masks, scores, 20)

    assert chosen == Masks({n: masks[n] & (scores[n] >= flat[19]) for n in "ab"})


def test_slopes_along_a_gate_of_a_quadratic():
    """Card test (e): |sum over the channel of g² + w · (A²w)|, with g = Aw; not the sum of absolute values."""
    random = stream(0, "quadratic")
    a = torch.randn(6, 6, generator=random, dtype=torch.float64)
    a, w = a + a.T, torch.randn(6, generator=random, dtype=torch.float64)
    task = dense(a, at=w)
    slopes = gate_slopes(task, Masks.dense(task.model))["weight"][0]

    torch.testing.assert_close(slopes, (a @ w).square() + w * (a @ (a @ w)), rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", ["tanh_mlp", "conv_bn", "residual_bn"])
def test_slopes_along_a_gate_on_every_channel(name):
    """Card test (e) by autograd: a gate multiplies the rows, and the flow is stopgrad(g) · gradient by raw weights."""
    task = CASES[name]()
    masks = Masks.dense(task.model)
    own = {n: p.detach() for n, p in task.params().items()}
    raw = {n: own[n].clone().requires_grad_() for n in masks}
    gates = {n: torch.ones(len(own[n]), dtype=torch.float64, requires_grad=True) for n in masks}
    shape = {n: (-1, *[1] * (own[n].dim() - 1)) for n in masks}
    losses, total = [], 0
    for x, y in task.data:
        at = {**own, **{n: gates[n].reshape(shape[n]) * raw[n] for n in masks}}
        losses.append(len(x) * task.loss(torch.func.functional_call(task.model.eval(), at, (x,)), y))
        total += len(x)
    slopes = torch.autograd.grad(torch.stack(losses).sum() / total, list(raw.values()), create_graph=True)
    flow = torch.stack([(g.detach() * g).sum() for g in slopes]).sum()
    wanted = dict(zip(gates, torch.autograd.grad(flow, list(gates.values())), strict=True))

    for n, part in gate_slopes(task, masks).items():
        torch.testing.assert_close(part.flatten(1).sum(1), wanted[n], rtol=1e-9, atol=1e-13)


def test_channels_that_a_sum_joins_go_together_and_outputs_stay():
    """The stream of a residual network: one decision for all tensors that add to it; the exact greedy choice."""
    task = CASES["residual_bn"]()
    masks = Masks.dense(task.model)
    slopes = gate_slopes(task, masks)
    rows = {n: s.flatten(1).sum(1) for n, s in slopes.items()}

    chosen = best_channels(task, slopes, keep_for(0.5, masks.total))

    alive = {n: m.flatten(1).any(1) for n, m in chosen.items()}
    assert all(torch.equal(m, alive[n].reshape(-1, *[1] * (m.dim() - 1)).expand_as(m)) for n, m in chosen.items())
    assert torch.equal(alive["second.weight"], alive["shortcut.weight"]) and bool(alive["head.weight"].all())
    both = slopes["second.weight"][0].numel() + slopes["shortcut.weight"][0].numel()
    units = [(abs(float(rows[n][i])), n, i, slopes[n][0].numel()) for n in ("stem.weight", "first.weight")
             for i in range(len(rows[n]))]  # fmt: skip
    joined = (rows["second.weight"] + rows["shortcut.weight"]).abs()
    units += [(float(s), "second.weight", i, both) for i, s in enumerate(joined)]
    units.sort(reverse=True)
    best = {n: next(unit for unit in units if unit[1] == n) for n in ("stem.weight", "first.weight", "second.weight")}
    order = [*sorted(best.values(), reverse=True), *[unit for unit in units if unit not in best.values()]]
    left, kept = keep_for(0.5, masks.total) - slopes["head.weight"].numel(), set()
    for _, n, i, size in order:
        if size > left:
            break
        kept.add((n, i))
        left -= size
    assert {(n, i) for n in best for i in alive[n].nonzero().flatten().tolist()} == kept
    assert chosen.kept <= keep_for(0.5, masks.total) < chosen.kept + both


def test_channels_of_zeros_can_be_removed_afterwards():
    """After the rule the dead units go, their constants move into the biases behind them, and the outputs stay."""
    case = CASES["tanh_mlp"]()
    x, _ = next(iter(case.data))
    rule = Earlycrop(sparsity=0.4, pattern=Unit())
    masks = train(case.model, list(case.data), rules=[rule], epochs=4, lr=0.02, loss=case.loss)
    gone = {n: int((~m.any(1)).sum()) for n, m in masks.items()}
    before = case.model.eval()(x)

    small = shrink_dead(case.model, x).model

    assert gone["0.weight"] + gone["2.weight"] > 0 and gone["4.weight"] == 0
    assert {n: len(masks[n]) - len(parameters(small)[n]) for n in masks} == gone
    torch.testing.assert_close(small(x), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["conv_bn", "attention", "residual_bn", "depthwise"])
def test_whole_channels_of_ordinary_networks(name):
    """Masks are whole rows, at most the budget, and they hold to the end of training."""
    case = CASES[name]()
    masks = train(
        case.model, list(case.data), loss=case.loss, epochs=3, lr=0.01,
        rules=[Earlycrop(sparsity=0.3, pattern=Unit(), latest=0.4)],
    )  # fmt: skip

    assert 0 < masks.kept <= keep_for(0.3, masks.total)
    for mask in masks.values():
        flat = mask.flatten(1)
        assert torch.equal(flat.any(1), flat.all(1))
    masks.check(case.model)


def test_a_network_in_bfloat16_autocast_with_residuals():
    """An ordinary ResNet under autocast: the count is exact."""
    torch.manual_seed(0)
    net = build("resnet20", outputs=2)
    random = stream(0, "images")
    x = torch.randn(24, 3, 16, 16, generator=random)
    batches = [(x[i : i + 8], (x[i : i + 8, 0].mean((1, 2)) > 0).long()) for i in range(0, 24, 8)]

    masks = train(net, batches, rules=[Earlycrop(sparsity=0.8, latest=0.5, rounds=2)], epochs=2, lr=0.05, amp=True)

    assert masks.kept == keep_for(0.8, masks.total)
    assert all(bool(p.isfinite().all()) for p in net.parameters())


def test_channels_keep_the_contract():
    check_rule(Earlycrop(sparsity=0.4, pattern=Unit()), ["conv_bn"], epochs=3)


def test_before_training_keeps_the_contract():
    check_rule(Earlycrop(sparsity=0.4, latest=0.0), ["conv_bn", "tied"], epochs=3)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sparsity": 1.0}, BudgetError, r"sparsity is 1.0; it must be in \(0, 1\)"),
        ({"sparsity": 0.0}, BudgetError, "sparsity is 0.0"),
        ({"sparsity": float("nan")}, BudgetError, "sparsity is nan"),
        ({"threshold": -0.1}, UsageError, "threshold is -0.1"),
        ({"latest": 1.0}, UsageError, "latest is 1.0"),
        ({"pattern": NM(2, 4)}, UsageError, "must be `unstructured` or `unit`"),
        ({"rounds": -1}, UsageError, "rounds is -1"),
        ({"examples": 0}, UsageError, "examples 0"),
    ],
)
def test_values_out_of_range_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        Earlycrop(**options)


def test_runs_that_do_not_fit_are_refused_before_training():
    task = CASES["tanh_mlp"]()
    half = Masks({n: torch.arange(m.numel()).reshape(m.shape) % 2 > 0 for n, m in Masks.dense(task.model).items()})
    with pytest.raises(UsageError, match="train for 2 or more"):
        Moved(Earlycrop(sparsity=0.5), (1.0,)).go()
    with pytest.raises(BudgetError, match="pruned already. Set a higher"):
        Moved(Earlycrop(sparsity=0.3), (1.0, 1.0), masks=half).go()
    with pytest.raises(BudgetError, match="Begin from a dense network"):
        Moved(Earlycrop(sparsity=0.7, pattern=Unit()), (1.0, 1.0), masks=half).go()
    with pytest.raises(BudgetError, match="would empty whole layers"):
        Moved(Earlycrop(sparsity=0.999), (1.0, 1.0)).go()
    with pytest.raises(BudgetError, match="lie in channels that can go"):
        Moved(Earlycrop(sparsity=0.9, pattern=Unit(), latest=0.0), (1.0, 1.0)).go()
    moved = Moved(Earlycrop(sparsity=0.5), (1.0, 1.0))
    moved.run.sample = None
    with pytest.raises(UsageError, match="no data sample"):
        moved.go()


def test_a_dead_network_is_refused():
    """All scores zero: an error, not a choice by index."""
    case = CASES["relu_mlp"]()
    with torch.no_grad():
        case.params()["0.bias"].fill_(-1e3)
    for pattern in ({}, {"pattern": Unit()}):
        dead = Task(case.model, lambda output, target: output.sum() * 0, case.data)
        with pytest.raises(ModelError, match="all scores are zero"):
            Moved(Earlycrop(sparsity=0.5, latest=0.0, **pattern), (1.0,), net=case.model, task=dead).go()


def test_recipes_can_hold_it():
    rule = Earlycrop(sparsity=0.5, threshold=0.25, latest=0.5, pattern=Unit(), rounds=3)

    assert value_of(Rule, table_of(rule), "rule") == rule
    assert value_of(Rule, "earlycrop", "rule") == Earlycrop()
