"""Carrying a plan out: exactly the counts and patterns that it says, by scores and by a solver, or nothing at all."""

import copy
from dataclasses import replace

import pytest
import torch
from tests.engine.planning.plan_kit import how, network, task_of
from torch import nn

import secateur
from secateur.core.errors import SecateurError, UsageError
from secateur.core.masks import Masks
from secateur.core.patterns import parse_pattern
from secateur.core.streams import stream
from secateur.engine.planning.carrying import digest_of, masks_of
from secateur.engine.planning.planner import plan_network
from secateur.solvers.sparsegpt import SparseGpt


def mixed(task, **options):
    """One tensor under each pattern, whatever is best."""
    plan = plan_network(task, "params 50%", how(compare=False, **options))
    wanted = {"0.weight": ("4x1", 96), "2.weight": ("2:4", 192), "4.weight": ("unstructured", 7)}
    layers = tuple(replace(la, pattern=wanted[la.name][0], kept=wanted[la.name][1]) for la in plan.layers)
    return replace(plan, layers=layers)


def test_counts_and_patterns_are_those_of_the_plan():
    task = task_of()
    plan, magnitude = mixed(task), {n: p.detach().abs() for n, p in task.params().items()}

    cut = secateur.prune(task, plan)

    for layer in plan.layers:
        mask, weight = cut.masks[layer.name], task.params()[layer.name].detach()
        assert int(mask.sum()) == layer.kept and bool((weight[~mask] == 0).all())
        pattern = parse_pattern(layer.pattern)
        units = layer.kept // pattern.unit_size(layer.shape)
        assert torch.equal(mask, pattern.mask(magnitude[layer.name], units))
    groups = cut.masks["2.weight"].reshape(-1, 4).sum(1)
    blocks = cut.masks["0.weight"].reshape(6, 4, 16).sum(1)
    assert bool((groups == 2).all()) and set(blocks.unique().tolist()) <= {0, 4}


def test_a_solver_keeps_counts_and_patterns_and_moves_what_stays():
    task = task_of()
    plan = mixed(task, words=("unstructured", "2:4"))
    layers = tuple(replace(la, pattern="unstructured") if la.pattern == "4x1" else la for la in plan.layers)
    plan = replace(plan, layers=layers, solver=SparseGpt())
    before = {n: p.detach().clone() for n, p in task.params().items()}

    cut = secateur.prune(task, plan)

    assert {n: k for n, (k, _) in plan.counts.items()} == cut.masks.counts()
    assert bool((cut.masks["2.weight"].reshape(-1, 4).sum(1) == 2).all())
    moved = cut.masks["0.weight"] & (task.params()["0.weight"].detach() != before["0.weight"])
    assert bool(moved.any()) and len(cut.layers) == 3


def test_forecast_stands_beside_truth():
    task = task_of()
    loss = task.mean_loss()
    plan = mixed(task)

    outcome = secateur.prune(task, plan).planned

    assert outcome.figures["loss"]["before"] == loss and outcome.figures["loss"]["measured"] == task.mean_loss()
    assert sum(layer.loss for layer in outcome.layers) == pytest.approx(task.mean_loss() - loss, abs=1e-5)
    assert outcome.figures["params"]["measured"] == 96 + 192 + 7
    assert outcome.figures["ms"]["measured"] > 0 and outcome.figures["bytes"]["measured"] > 0
    assert [(la.pattern, la.kept) for la in outcome.layers] == [(la.pattern, la.kept) for la in plan.layers]


def test_other_weights_are_refused_and_left_as_they_are():
    task, other = task_of(), task_of()
    plan = mixed(task)
    with torch.no_grad():
        other.params()["4.bias"][0] += 1e-3
    before = copy.deepcopy(other.model.state_dict())

    with pytest.raises(UsageError, match="other weights"):
        secateur.prune(other, plan)
    with pytest.raises(UsageError, match="4.weight"):
        secateur.prune(task_of(torch.nn.Sequential(*list(network())[:3])), plan)

    assert all(torch.equal(before[n], t) for n, t in other.model.state_dict().items())
    assert digest_of(task.model) == plan.weights != digest_of(other.model)


def test_options_of_one_budget_do_not_go_with_a_plan():
    task = task_of()
    plan = mixed(task)
    before = digest_of(task.model)

    for wrong in ({"solver": SparseGpt()}, {"rounds": 2}):
        with pytest.raises(UsageError):
            secateur.prune(task, plan, **wrong)
    assert digest_of(task.model) == before


@pytest.mark.parametrize(("word", "kept"), [("4x1", 95), ("2:4", 190), ("unstructured", 385), ("unstructured", 0)])
def test_counts_that_a_pattern_cannot_keep_are_refused(word, kept):
    with pytest.raises(SecateurError, match="cannot keep"):
        masks_of({"0.weight": torch.rand(24, 16)}, {"0.weight": (word, kept)})


def test_the_optimizer_goes_on_and_holds_the_zeros():
    task = task_of()
    plan, optimizer = mixed(task), torch.optim.SGD(task.model.parameters(), 0.1, momentum=0.9)

    cut = secateur.prune(task, plan, optimizer=optimizer, measure=False)
    for _ in range(3):
        inputs, target, _ = next(task.batches())
        optimizer.zero_grad()
        task.loss(task.model(inputs), target).backward()
        optimizer.step()

    cut.masks.check(task.model)
    assert isinstance(cut.masks, Masks) and cut.hold is not None and cut.planned.figures["ms"]["measured"] is None


class Around(nn.Module):
    """A residual block."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        """``x`` and a little more."""
        return torch.relu(x + 0.2 * self.inner(x))


def deep():
    """Three residual blocks between two layers, and the network's own answers."""
    net, random = nn.Sequential(nn.Linear(16, 12), *(Around(12) for _ in range(3)), nn.Linear(12, 4)), stream(2, "deep")
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=random) * 0.4)
    return task_of(net.eval())


@pytest.mark.parametrize(("kind", "to"), [("channels", "params 40%"), ("depth", "params 70%"), ("depth", "loss +0.2")])
def test_units_go_first_and_the_figures_are_those_of_both(kind, to, tmp_path):
    """The plan is made on copies; carried out it gives the shapes, counts and the loss that it says."""
    task = deep() if kind == "depth" else task_of()
    before, loss = digest_of(task.model), task.mean_loss()
    plan = secateur.plan(task, to, patterns=[kind], timed=False, compare=False, least="params", threads=1)
    assert digest_of(task.model) == before == plan.weights and plan.removal is not None
    plan.save(tmp_path / "plan.json")

    cut = secateur.prune(task, secateur.LayerPlan.open(tmp_path / "plan.json"), measure=False)

    own = {name: tuple(p.shape) for name, p in cut.model.named_parameters()}
    assert {layer.name: layer.shape for layer in plan.layers}.items() <= own.items()
    assert cut.planned.figures["loss"]["before"] == pytest.approx(loss, abs=1e-12)
    assert cut.planned.figures["loss"]["measured"] == pytest.approx(plan.figures["loss"].measured, abs=1e-6)
    assert loss + plan.removal.rise == pytest.approx(cut.planned.figures["loss"]["measured"], abs=1e-6)
    total, goal = plan.figures["params"].before, plan.figures["params"].forecast
    assert goal < total and (not to.startswith("params") or goal <= -(-total * int(to[7:9]) // 100))


def test_a_failure_after_surgery_gives_the_network_back():
    task = deep()
    plan = secateur.plan(task, "params 70%", patterns=["depth"], timed=False, compare=False, threads=1)
    wrong = replace(plan, layers=(replace(plan.layers[0], shape=(3, 3)), *plan.layers[1:]))
    before = digest_of(task.model)

    with pytest.raises(UsageError, match=r"of shape \(3, 3\)"):
        secateur.prune(task, wrong)
    assert digest_of(task.model) == before and len(list(task.model.parameters())) == 10

    with pytest.raises(SecateurError, match="can go as heads"):
        secateur.plan(task, "params 70%", patterns=["heads"], timed=False)
