"""A plan beside what came of it: whether the target was met, which examples counted, and nothing left half done."""

import copy
from dataclasses import replace

import pytest
import torch
from tests.engine.planning.plan_kit import how, network, task_of

import secateur
from secateur.core.errors import FileError
from secateur.core.task import Task
from secateur.criteria.snip import Snip
from secateur.engine.planning.carrying import take_out
from secateur.engine.planning.outcomes import verdict_of
from secateur.engine.planning.plan_files import plan_of_table, table_of_plan
from secateur.engine.planning.planner import plan_network
from secateur.engine.planning.sealing import data_of
from secateur.solvers.sparsegpt import SparseGpt

QUICK = {"timed": False, "compare": False, "threads": 1}


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def thinner():
    """A plan that removes units first, and a way to the network that it was made for."""
    task = task_of()
    plan = secateur.plan(task, "macs 75%", patterns=["channels"], least="params", **QUICK)
    assert plan.removal is not None and plan.removal.units
    return plan, lambda: replace(task, model=copy.deepcopy(task.model))


def test_a_removal_counts_once_in_the_forecast(thinner):
    """Carried out on the data that it was made with, the forecast beside the truth is the one that the plan gave."""
    plan, fresh = thinner
    start = fresh().mean_loss()

    told = secateur.prune(fresh(), plan, measure=False).planned.figures["loss"]

    for when in ("before", "forecast", "low", "high"):
        assert told[when] == pytest.approx(getattr(plan.figures["loss"], when), abs=1e-6)
    assert told["before"] == pytest.approx(start, abs=1e-9)
    assert told["measured"] == pytest.approx(plan.figures["loss"].measured, abs=1e-6)


def figures(quantity, before, measured):
    return {quantity: {"before": before, "measured": measured}}


@pytest.mark.parametrize(
    ("target", "quantity", "before", "measured", "share", "met"),
    [
        ("latency 0.5x", "ms", 2.0, 0.9, 0.51, False),  # the share counts, not milliseconds of two moments
        ("latency 0.5x", "ms", 2.0, 1.2, 0.49, True),
        ("latency 0.5x", "ms", 2.0, 0.9, None, None),
        ("ms 1.5", "ms", 2.0, 1.5, None, True),
        ("ms 1.5", "ms", 2.0, 1.51, None, False),
        ("bytes 60000", "bytes", 90000.0, 60000.0, None, True),
        ("bytes 60000", "bytes", 90000.0, 60001.0, None, False),
        ("bytes 50%", "bytes", 90001.0, 45001.0, None, False),
        ("bytes 50%", "bytes", 90001.0, None, None, None),
        ("params 30%", "params", 10.0, 3.0, None, True),
        ("params 30%", "params", 10.0, 4.0, None, False),
        ("macs 0.5x", "macs", 11.0, 5.0, None, True),
        ("macs 0.5x", "macs", 11.0, 6.0, None, False),
        ("loss +0.05", "loss", 0.5, 0.55, None, True),
        ("loss +0.05", "loss", 0.5, 0.56, None, False),
        ("accuracy -0.5", "accuracy", 90.0, 89.5, None, True),
        ("accuracy -0.5", "accuracy", 90.0, 89.0, None, False),
        ("accuracy -0.5", "accuracy", None, None, None, None),
    ],
)
def test_whether_a_target_is_met(target, quantity, before, measured, share, met):
    plan = replace(plan_network(task_of(), "params 50%", how(compare=False)), target=target)

    found, verdict = verdict_of(plan, figures(quantity, before, measured), share)

    assert found is met and verdict.startswith(f"target {target}: ")
    assert {True: ": met, ", False: ": missed, ", None: "was not measured"}[met] in verdict


@pytest.mark.parametrize("to", ["latency 0.9x", "bytes 3000", "loss +0.2", "accuracy -30", "params 50%"])
def test_the_outcome_says_so(to):
    """Of a share of the time both files are called in turn; of accuracy the network before and after."""
    task = task_of()
    made = plan_network(task, "params 50%", how(compare=False))
    before = {"loss": task.mean_loss()}

    outcome = secateur.prune(task, replace(made, target=to)).planned

    assert outcome.met in (True, False) and outcome.verdict in str(outcome)
    assert outcome.to_json()["met"] is outcome.met and outcome.to_json()["verdict"] == outcome.verdict
    assert not outcome.notes
    if to == "latency 0.9x":
        assert "both called in turn" in outcome.verdict
    if to == "loss +0.2":
        assert outcome.met == (task.mean_loss() - before["loss"] <= 0.2)
    if to.startswith("accuracy"):  # the kit's targets are the network's own answers
        right = [(task.model(x).argmax(1) == y).float() for x, y in task.data]
        assert outcome.figures["accuracy"]["before"] == 100.0
        assert outcome.figures["accuracy"]["measured"] == pytest.approx(100 * float(torch.cat(right).mean()), abs=1e-4)


class Odd(torch.nn.Module):
    """A network with a part that no file can hold."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        """The inner network, by way of an operator that stays in torch."""
        return torch.special.i0e(self.inner(x)) * 0 + self.inner(x)


@pytest.mark.parametrize("solver", [None, SparseGpt()])
def test_what_cannot_be_measured_is_a_note(solver):
    """The network is pruned all the same, and everything that is known is told."""
    task = task_of(Odd().eval())
    plan = secateur.plan(task, "params 50%", solver=solver, measure=False, patterns=["unstructured"], **QUICK)
    plan = replace(plan, target="latency 0.5x")

    cut = secateur.prune(task, plan)

    assert cut.masks.kept == sum(kept for kept, _ in plan.counts.values())
    cut.masks.check(task.model)
    assert cut.planned.met is None and any(note.startswith("not timed: ") for note in cut.planned.notes)
    assert cut.planned.figures["ms"]["measured"] is None if "ms" in cut.planned.figures else True


def test_numbers_of_half_the_size_are_pruned_and_told():
    task = task_of()
    task = Task(task.model.bfloat16(), task.loss, [(x.bfloat16(), y) for x, y in task.data])
    plan = secateur.plan(task, "params 50%", patterns=["unstructured"], measure=False, **QUICK)

    cut = secateur.prune(task, plan)

    cut.masks.check(task.model)
    assert cut.masks.kept == sum(kept for kept, _ in plan.counts.values()) and cut.planned.met is True


def test_inputs_that_are_none_leave_a_note_and_a_pruned_network():
    task = task_of()
    plan = plan_network(task, "params 50%", how(compare=False))

    cut = secateur.prune(task, plan, example=object())

    cut.masks.check(task.model)
    assert any(note.startswith("not timed: ") for note in cut.planned.notes)


def test_another_machine_is_told_of():
    task = task_of()
    plan = plan_network(task, "params 50%", how(compare=False))
    there = replace(plan, machine={**plan.machine, "name": "Abacus 1 | beads | 1 threads | core 0"})

    assert not secateur.prune(task_of(), plan, measure=False).planned.notes
    notes = secateur.prune(task, there, measure=False).planned.notes

    assert len(notes) == 1 and "another machine" in notes[0] and "Abacus 1" in notes[0]


def other_data(task):
    """Half of the examples, in another order."""
    x, y = (torch.cat(parts) for parts in zip(*task.data, strict=True))
    return replace(task, data=[(x[24:].flip(0), y[24:].flip(0))])


def test_the_digest_is_that_of_the_examples_alone():
    """Neither their order nor how they lie in batches counts; every number does."""
    task = task_of()
    x, y = (torch.cat(parts) for parts in zip(*task.data, strict=True))
    turned = replace(task, data=[(x[40:], y[40:]), (x[:40].flip(0), y[:40].flip(0))])
    moved, swapped = x.clone(), y.clone()
    moved[5, 3] += 1e-6
    swapped[[0, 1]] = torch.tensor([int(y[1]) + 1, int(y[0])])

    own = data_of(task, 3)
    assert own["examples"] == 48 and own["seed"] == 3 and data_of(turned, 3) == own
    digests = {own["digest"]}
    for data in ([(moved, y)], [(x, swapped)], [(x[1:], y[1:])], [({"a": x, "b": torch.ones(2, 3)}, y)]):
        digests.add(data_of(replace(task, data=data), 3)["digest"])
    assert len(digests) == 5


@pytest.mark.parametrize(
    ("options", "word"),
    [({}, "the same weights go"), ({"criterion": Snip()}, "other weights go"), ({"solver": SparseGpt()}, "sparsegpt")],
)
def test_other_examples_than_the_plan_was_made_with_are_told_of(options, word, tmp_path):
    task = task_of()
    plan = secateur.plan(task, "params 30%", patterns=["unstructured"], measure=False, **options, **QUICK)
    plan.save(tmp_path / "plan.json")
    plan = secateur.LayerPlan.open(tmp_path / "plan.json")
    again, other = (replace(task, model=copy.deepcopy(task.model)) for _ in range(2))

    assert not secateur.prune(again, plan, measure=False).planned.notes
    notes = secateur.prune(other_data(other), plan, measure=False).planned.notes

    assert len(notes) == 1 and word in notes[0] and "(48 there, 24 here)" in notes[0]


def test_exactly_the_units_of_the_plan_go_whatever_the_data(thinner):
    """The units that other examples would have chosen stay."""
    plan, fresh = thinner
    dense = state(fresh().model)
    other = other_data(fresh())
    other = replace(other, data=[(x * torch.linspace(0, 9, 16), (y + 1) % 4) for x, y in other.data])

    for task in (fresh(), other):
        task = replace(task, model=copy.deepcopy(task.model))
        pruned = secateur.prune(task, plan_of_table(table_of_plan(plan)), measure=False).model
        left = [i for i in range(24) if i not in plan.removal.units.get("0.weight", ())]
        assert torch.equal(pruned[0].weight, dense["0.weight"][left])
    chosen = take_out(other, replace(plan.removal, units={})).units
    assert chosen and chosen != plan.removal.units


def test_units_that_a_network_does_not_have_are_refused_and_nothing_goes(thinner):
    plan, fresh = thinner
    task = fresh()
    before = state(task.model)
    for units in ({"0.weight": (99,)}, {"nothing": (1,)}, {"0.weight": (-1,)}):
        with pytest.raises(secateur.SecateurError):
            secateur.prune(task, replace(plan, removal=replace(plan.removal, units=units)))
        assert same(state(task.model), before)

    table = table_of_plan(plan)
    name = next(iter(table["removal"]["units"]))
    table["removal"]["units"][name] = table["removal"]["units"][name][1:]
    with pytest.raises((ValueError, FileError), match="other units"):
        plan_of_table(table)
