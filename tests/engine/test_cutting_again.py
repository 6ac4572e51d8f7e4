"""Pruning a pruned network once more, and targets beside patterns: what is asked is met, or refused in clear words."""

import copy

import pytest
import torch
from torch import nn

import secateur
from secateur.core.allocations import ALLOCATIONS, ByCost, Lamp
from secateur.core.errors import BudgetError, UsageError
from secateur.core.masks import Masks
from secateur.core.patterns import NM, Block, Unit, Unstructured
from secateur.core.task import Task
from secateur.engine.cutting import aim
from secateur.engine.recipe import PruneStep, Recipe

SIZES = {"0.weight": 32 * 16, "2.weight": 16 * 32, "4.weight": 4 * 16}
TOTAL = sum(SIZES.values())


@pytest.fixture
def task():
    """A small network whose every width is a multiple of four."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    random = torch.Generator().manual_seed(1)
    data = [(torch.randn(9, 16, generator=random, dtype=torch.float64), torch.arange(9) % 4)]
    return Task(net, secateur.CrossEntropy(), data)


def zeros(net):
    """Zeros counted in the network itself."""
    return sum(int((net.get_parameter(name) == 0).sum()) for name in SIZES)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(1, 2)], ids=repr)
def test_an_n_of_m_pattern_without_a_target_has_its_own(task, pattern):
    made = secateur.plan(task, pattern=pattern, forecast=False)

    assert str(made.target) == f"{pattern.n}:{pattern.m}"
    assert made.masks.kept == TOTAL // pattern.m * pattern.n
    assert secateur.prune(task, pattern=pattern).masks == made.masks


@pytest.mark.parametrize("to", ["sparsity 0.5", "params 50%", "macs 0.5x", f"keep {TOTAL // 2}", "2:4"])
def test_a_target_that_agrees_with_its_pattern_is_taken(task, to):
    assert secateur.plan(task, to, pattern=NM(2, 4), forecast=False).masks.kept == TOTAL // 2


@pytest.mark.parametrize(
    "to", ["sparsity 0.9", "params 10%", "macs 0.3x", "sparsity 0.51", "1:4", f"keep {TOTAL // 2 - 1}"]
)
def test_a_target_that_its_pattern_cannot_meet_is_refused(task, to):
    """Not pruned to another density without a word."""
    before = copy.deepcopy(task.model.state_dict())

    with pytest.raises((UsageError, BudgetError), match="contradict each other|keeps 544 of 1,088 weights, not 543"):
        secateur.prune(task, to, pattern=NM(2, 4))

    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


def test_thirds_may_be_typed_with_three_decimals():
    assert aim("sparsity 0.667", NM(1, 3))[1] == NM(1, 3)
    with pytest.raises(UsageError, match="it keeps 1 of every 3 weights"):
        aim("sparsity 0.66", NM(1, 3))


def test_a_step_of_a_recipe_refuses_it_before_anything_is_run():
    table = {"model": {"use": "mlp"}, "data": {"use": "digits"}}
    step = {"do": "prune", "pattern": {"use": "nm", "n": 1}}

    recipe = Recipe.from_table({**table, "step": [step]})

    assert recipe.steps[0].to == "1:4" and recipe.to_table()["step"] == [step]
    assert recipe.to_table(defaults=True)["step"][0]["to"] == "1:4"
    assert PruneStep().to == "sparsity 0.9"
    spelt = Recipe.from_table({**table, "step": [{**step, "to": "1:4"}]})
    assert spelt.keys("o") == recipe.keys("o")
    for to in ("sparsity 0.9", "params 50%", "macs 0.5x", "2:4"):
        with pytest.raises(UsageError, match="contradict"):
            Recipe.from_table({**table, "step": [{**step, "to": to}]})


@pytest.mark.parametrize("allocation", [kind() for kind in ALLOCATIONS.values()], ids=list(ALLOCATIONS))
def test_single_weights_again_with_every_allocation(task, allocation):
    """Also LAMP and by cost, which need scores of at least 0; the count is exact and nothing comes back."""
    first = secateur.prune(task, "sparsity 0.5").masks

    cut = secateur.prune(task, "keep 100", allocation=allocation, masks=first)

    assert cut.masks.kept == 100 and (cut.masks - first).kept == 0
    assert zeros(task.model) == TOTAL - 100


@pytest.mark.parametrize("allocation", [Lamp(), ByCost()], ids=repr)
def test_what_is_gone_has_no_say_in_what_goes_next(task, allocation):
    """The same masks as those of a network whose pruned weights are zero by themselves: their magnitudes are 0."""
    first = secateur.prune(task, "sparsity 0.5").masks

    told = secateur.plan(task, "keep 100", allocation=allocation, masks=first, forecast=False).masks
    seen = secateur.plan(task, "keep 100", allocation=allocation, forecast=False).masks

    assert told == seen


@pytest.mark.parametrize("allocation", [kind() for kind in ALLOCATIONS.values()], ids=list(ALLOCATIONS))
@pytest.mark.parametrize("pattern", [Unit(), Block(4, 1), Block(2, 2)], ids=repr)
def test_units_after_single_weights(task, pattern, allocation):
    """Half of what was left in whole units: never a weight more than asked for, none back, all figures of one count."""
    first = secateur.prune(task, "sparsity 0.5").masks
    weights = {name: task.model.get_parameter(name).detach().clone() for name in SIZES}

    cut = secateur.prune(task, "sparsity 0.75", pattern=pattern, allocation=allocation, masks=first)

    assert TOTAL // 4 - 32 <= cut.masks.kept <= TOTAL // 4
    assert (cut.masks - first).kept == 0
    assert zeros(task.model) == TOTAL - cut.masks.kept
    assert cut.plan.counts == {name: (int(mask.sum()), mask.numel()) for name, mask in cut.masks.items()}
    assert f"{cut.masks.kept:,} of" in str(cut.plan)
    for name, mask in cut.masks.items():
        assert torch.equal(task.model.get_parameter(name).detach(), torch.where(mask, weights[name], 0.0))
    direction = {name: torch.where(mask, 0.0, -weights[name]) for name, mask in cut.masks.items()}
    task.model.load_state_dict({**task.model.state_dict(), **weights})
    assert cut.plan.forecast.slope == pytest.approx(task.taylor(direction)[0], rel=1e-9)


def test_n_of_m_after_single_weights_says_what_it_leaves(task):
    first = secateur.prune(task, "sparsity 0.5").masks

    cut = secateur.prune(task, "2:4", masks=first)

    for name, mask in cut.masks.items():
        groups, before = mask.reshape(-1, 4).sum(1), first[name].reshape(-1, 4).sum(1)
        assert torch.equal(groups, before.clamp(max=2))
    assert zeros(task.model) == TOTAL - cut.masks.kept and (cut.masks - first).kept == 0


@pytest.mark.parametrize("pattern", [Unstructured(), Unit(), Block(4, 1)], ids=repr)
def test_more_than_there_is_left_is_refused(task, pattern):
    first = secateur.prune(task, "sparsity 0.75").masks

    with pytest.raises(BudgetError, match=r"816 are pruned already and 272 are left.*begin with the dense network"):
        secateur.plan(task, "sparsity 0.5", pattern=pattern, masks=first)
    with pytest.raises(BudgetError, match=r"macs 0.5x is more than the network has: 25.00% of the MACs remain"):
        secateur.plan(task, "macs 0.5x", pattern=pattern, masks=first)
    assert secateur.plan(task, "sparsity 0.75", pattern=pattern, masks=first).masks == first


@pytest.mark.parametrize("pattern", [Unstructured(), Unit(), Block(4, 1)], ids=repr)
def test_macs_count_what_is_left_of_units(task, pattern):
    """One weight is one MAC here."""
    first = secateur.prune(task, "sparsity 0.5").masks

    masks = secateur.plan(task, "macs 0.2x", pattern=pattern, masks=first, forecast=False).masks

    assert TOTAL // 5 - 32 <= masks.kept <= TOTAL // 5 and (masks - first).kept == 0


def test_a_target_below_one_unit_a_tensor_is_refused(task):
    first = secateur.prune(task, "sparsity 0.5").masks

    with pytest.raises(BudgetError, match="the best unit of every tensor alone keeps more than 5 weights"):
        secateur.plan(task, "keep 5", pattern=Unit(), masks=first)


def test_zeros_of_tensors_left_alone_stay(task):
    """``only`` prunes one tensor; the masks still cover the zeros of the others, so that training holds them."""
    first = secateur.prune(task, "sparsity 0.5", skip=["4.*"]).masks
    before = Masks({**first, "4.weight": torch.ones(4, 16, dtype=torch.bool)})

    cut = secateur.prune(task, "keep 10", only=["2.weight"], masks=before)

    assert set(cut.masks) == {"0.weight", "2.weight"}
    assert torch.equal(cut.masks["0.weight"], first["0.weight"]) and cut.masks.counts()["2.weight"] == 10
    assert cut.plan.counts["0.weight"] == (int(first["0.weight"].sum()), 512)
    assert cut.plan.left_alone["0.weight"] == "not named; the zeros it has stay"
    assert cut.plan.left_alone["4.weight"] == "not named"
    cut.masks.check(task.model)
