"""Plans of a small network with plain numbers: targets are met, nothing is changed, and what cannot be is told."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from tests.engine.planning.plan_kit import HARM, NAMES, WORDS, WORSE, cost_of_kit, how, network, rises_of_kit, task_of
from torch import nn

import secateur
from secateur.core.errors import BudgetError, DataError, UsageError
from secateur.core.losses import CrossEntropy
from secateur.core.task import Task
from secateur.engine.planning.planner import Planner, Planning, plan_network
from secateur.engine.planning.table import Machine
from secateur.engine.planning.targets import parse_aim
from secateur.engine.planning.trying import Trial, arrays_of, batch_of, write_plan

TOTAL = 16 * 24 + 24 * 16 + 16 * 4


def bits(net):
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize(
    "to", ["ms 1.2", "latency 0.6x", "bytes 3kB", "macs 0.4x", "params 30%", "keep 123", "loss +0.1"]
)
def test_targets_are_met_by_forecast_and_nothing_is_changed(to):
    task, options = task_of(), how(compare=False)
    before, modes = bits(task.model), [m.training for m in task.model.modules()]

    plan = plan_network(task, to, options)

    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())
    assert modes == [m.training for m in task.model.modules()]
    figures = plan.figures
    goals = {
        "ms 1.2": figures["ms"].forecast <= 1.2,
        "latency 0.6x": figures["ms"].forecast <= 0.6 * options.cost.now + 1e-12,
        "bytes 3kB": figures["bytes"].forecast <= 3000,
        "macs 0.4x": figures["macs"].forecast <= 0.4 * TOTAL,
        "params 30%": figures["params"].forecast == -(-TOTAL * 3 // 10),
        "keep 123": figures["params"].forecast == 123,
        "loss +0.1": plan.rise <= 0.1 + 1e-9,
    }
    assert goals[to]
    assert [layer.name for layer in plan.layers] == list(NAMES)
    assert plan.figures["params"].forecast == sum(layer.kept for layer in plan.layers)


def test_forecasts_are_those_of_the_parts():
    """Milliseconds are the clock's lines summed, the loss the line through the sum of shares, each share its part."""
    options = how()
    plan = plan_network(task_of(), "ms 1.0", options)
    cost, rises = options.cost, options.rises
    chosen = {la.name: (la.pattern, la.kept / la.total) for la in plan.layers if la.pattern}

    assert plan.figures["ms"].forecast == pytest.approx(cost.total(chosen), abs=1e-6 * 3)
    assert plan.figures["ms"].low == pytest.approx(0.9 * plan.figures["ms"].forecast)
    assert plan.rise == pytest.approx(rises.total(chosen).value, rel=1e-9)
    assert sum(layer.loss for layer in plan.layers) == pytest.approx(plan.rise, rel=1e-9)
    assert plan.exact


def test_what_each_pattern_alone_gives_is_told():
    """The best of all is no worse than any alone, and that no worse than the same density everywhere."""
    plan = plan_network(task_of(), "ms 1.0", how())
    others = {other.what: other for other in plan.others}

    assert not others["2:4 alone"].met and others["2:4 alone"].figure > 1.0
    for word in ("unstructured", "4x1"):
        alone, even = others[f"{word} alone"], others[f"{word} at the same density everywhere"]
        assert plan.rise <= alone.rise + 1e-9 and alone.rise <= even.rise + 0.01
        assert alone.low < alone.rise < alone.high and alone.figure <= 1.0
    text = str(plan)
    assert "2:4 alone: cannot meet the target; at best" in text and "4.weight" in text
    reason = plan.left_alone["0.bias"]
    assert f"left alone 3 tensors: 0.bias, 2.bias, 4.bias ({reason})" in text.splitlines()


def test_a_layer_that_never_pays_says_so():
    slow = cost_of_kit(("unstructured",))
    curve = slow.layers["4.weight"]["unstructured"]
    dear = {**slow.layers, "4.weight": {"unstructured": type(curve)((0.02, 1.0), (0.07, 0.08))}}
    cost = type(slow)(dear, slow.dense, slow.fixed, slow.error)

    plan = plan_network(task_of(), "ms 1.0", how(("unstructured",), cost=cost))

    layer = next(layer for layer in plan.layers if layer.name == "4.weight")
    assert layer.pattern == "" and layer.kept == layer.total
    assert layer.why == "never pays: at best 0.07 ms (unstructured), as it is 0.05 ms"
    assert f"as it is: 4.weight ({layer.why})" in str(plan)


@pytest.mark.parametrize(
    ("to", "words", "said"),
    [
        ("ms 0.21", WORDS, "ms 0.21 cannot be met with unstructured, 4x1, 2:4: the best reachable is 0.33"),
        ("ms 1.0", ("2:4",), "unstructured reaches"),
        ("macs 0.001x", WORDS, "the best reachable is"),
        ("keep 2", WORDS, "weights"),
        ("bytes 100", WORDS, "lie outside of the tensors that can be pruned"),
    ],
)
def test_what_cannot_be_reached_names_the_best_and_other_patterns(to, words, said):
    options = how(words, cost=cost_of_kit())

    with pytest.raises(BudgetError) as error:
        plan_network(task_of(), to, options)

    assert said in str(error.value)


@pytest.mark.parametrize(("error", "advised"), [(0.1, True), (0.15, True), (0.25, False), (1.5, False)])
def test_a_gain_within_the_error_of_the_forecast_is_no_advice(error, advised):
    """Blocks of four would take 0.33 ms where single weights take 0.41: a fifth less."""
    with pytest.raises(BudgetError) as refused:
        plan_network(task_of(), "ms 0.21", how(("unstructured",), cost=replace(cost_of_kit(), error=error)))

    assert ("4x1 reaches" in str(refused.value)) is advised


def test_the_best_reachable_is_reachable():
    with pytest.raises(BudgetError) as error:
        plan_network(task_of(), "keep 1", how())
    best = int(str(error.value).partition("reachable is ")[2].partition(" weights")[0])

    assert plan_network(task_of(), f"keep {best}", how(compare=False)).figures["params"].forecast == best
    with pytest.raises(BudgetError):
        plan_network(task_of(), f"keep {best - 1}", how())


def test_bytes_of_the_file_are_met():
    """Measured, not forecast: the file of the pruned network takes at most so many bytes, and nearly as many."""
    task = task_of()
    plan = plan_network(task, "bytes 4000", how(measure=True, compare=False))

    cut = secateur.prune(task, plan)

    assert 3900 <= plan.figures["bytes"].measured <= 4000
    assert cut.planned.figures["bytes"]["measured"] == plan.figures["bytes"].measured


def test_losses_are_those_of_the_examples_asked_for():
    """Of a target of weights on as many examples as `tested` says; of a target of the loss on all."""
    task = task_of()
    part = Task(task.model, task.loss, [(x[:4], y[:4]) if i else (x, y) for i, (x, y) in enumerate(task.data[:2])])

    some = plan_network(task, "params 30%", how(compare=False, tested=20))
    every = plan_network(task, "loss +0.1", how(compare=False, tested=20))

    assert some.figures["loss"].before == pytest.approx(part.mean_loss(), rel=1e-6)
    assert any("first 20 examples" in note for note in some.notes)
    assert not any("examples" in note for note in every.notes)
    assert every.figures["loss"].before == task.mean_loss()


@pytest.mark.parametrize("to", ["loss +0.05", "accuracy -10"])
def test_quality_is_measured_on_a_copy_and_met(to):
    """The shares are far off on purpose; the plan goes by what the copy loses."""
    task = task_of()
    plan = plan_network(task, to, how(measure=True, compare=False, least="macs"))
    loss = task.mean_loss()

    cut = secateur.prune(task, plan)

    assert plan.figures["loss"].measured == pytest.approx(task.mean_loss(), abs=1e-12) and cut.masks.sparsity > 0
    if to.startswith("loss"):
        assert task.mean_loss() - loss <= 0.05
    else:
        assert plan.figures["accuracy"].before - plan.figures["accuracy"].measured <= 10


def test_measured_milliseconds_stay_below_the_target():
    """However wrong the forecast is: at most nine tenths of what the clock says of the network as it is."""
    plan = plan_network(
        _wide(), "latency 0.9x", how(("unstructured",), measure=True, compare=False, cost=_slow(), threads=1)
    )

    assert plan.figures["ms"].measured <= 0.9 * plan.figures["ms"].before


def test_a_share_of_the_time_is_forecast_at_the_pace_of_the_moment():
    """What comes from another pace, here a thousand times as slow, is told in the milliseconds measured now."""
    given = _slow().times(1000.0)
    plan = plan_network(_wide(), "latency 0.9x", how(("unstructured",), measure=True, compare=False, cost=given))
    ms = plan.figures["ms"]

    chosen = {layer.name: (layer.pattern, layer.kept / layer.total) for layer in plan.layers if layer.pattern}
    assert ms.before is not None and ms.forecast is not None and ms.measured is not None
    assert ms.forecast / ms.before == pytest.approx(given.total(chosen) / given.now, rel=1e-4)  # whole weights
    assert sum(layer.before["ms"] for layer in plan.layers) <= ms.before


def _wide():
    """Layers of the kit's names that the clock can tell apart."""
    wide = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 4))
    x = torch.randn((8, 512), generator=torch.Generator().manual_seed(0))
    return Task(wide.eval(), CrossEntropy(), [(x, torch.arange(8) % 4)])


def _slow():
    """Ten times too slow, and the same line for both layers."""
    cost = cost_of_kit()
    return type(cost)(cost.layers, cost.dense, 10 * cost.fixed, 0.5, threads=1)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"patterns": ()}, "no pattern"),
        ({"patterns": ("diagonal",)}, "'diagonal'"),
        ({"least": "loss"}, "least"),
        ({"batch": 0}, "batch"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, word):
    with pytest.raises(UsageError, match=word):
        Planning(**options)


def test_a_pruned_network_is_refused():
    task = task_of()
    secateur.prune(task, "sparsity 0.5")

    with pytest.raises(UsageError, match="zero already"):
        plan_network(task, "params 10%", how())


def test_the_wide_form_and_the_old_one():
    """Without patterns, and with a target of weights, all is as it was; a target in milliseconds asks for layers."""
    task, given = task_of(), {"cost": cost_of_kit(), "rises": rises_of_kit(), "measure": False}
    assert isinstance(secateur.plan(task, "params 30%"), secateur.Plan)
    assert isinstance(secateur.plan(task, "params 30%", patterns=["unstructured"], **given), secateur.LayerPlan)
    assert isinstance(secateur.plan(task, "ms 1.2", **given), secateur.LayerPlan)
    for wrong in ({"batch": 3}, {"patterns": ["4x1"], "allocation": secateur.core.allocations.Global()},
                  {"patterns": ["4x1"], "bach": 3}):  # fmt: skip
        with pytest.raises(UsageError):
            secateur.plan(task, "params 30%", **wrong)
    with pytest.raises(UsageError, match="needs a target"):
        secateur.plan(task, patterns=["4x1"])


def test_shares_of_the_kit_are_what_they_say():
    rises = rises_of_kit()
    assert rises.at("0.weight", "4x1", 0.3) == pytest.approx(HARM["0.weight"] * WORSE["4x1"] * 0.7**2)
    assert copy.deepcopy(network()).state_dict().keys() == network().state_dict().keys()


class Formula(Planner):
    """A planner whose clock is a formula: a fifth slower than forecast; what is read first is a tenth too low."""

    def trying(self):
        outer = self

        class Clock(Trial):
            def ms(self, masks=None):
                return outer.cost.now if masks is None else self.share(masks) * outer.cost.now

            def share(self, masks, anew=False):
                chosen = {n: ("unstructured", float(m.float().mean())) for n, m in masks.items() if not bool(m.all())}
                return (1.0 if anew else 0.9) * 1.2 * outer.cost.total(chosen) / outer.cost.now

        return Clock(self.judge, self.example, 1, lambda: self.captured)


def test_milliseconds_are_met_by_a_second_reading():
    """What the plan tells is the second reading; by the first alone, a plan that misses would have been taken."""
    options = how(("unstructured",), measure=True, compare=False)
    plan = Formula(task_of(), parse_aim("latency 0.7x"), options).plan()

    chosen = {la.name: (la.pattern, la.kept / la.total) for la in plan.layers if la.pattern}
    true = 1.2 * options.cost.total(chosen)
    assert 0.6 * options.cost.now < true <= 0.7 * options.cost.now
    assert plan.figures["ms"].measured == pytest.approx(true, rel=1e-6)


def test_the_proof_is_told_for_what_was_chosen_between():
    """No combination of offers that takes as little by forecast loses less; that the limit was moved is said."""
    made = Formula(task_of(), parse_aim("latency 0.7x"), how(("unstructured",), measure=True, compare=False))
    plan = made.plan()

    most = plan.figures["ms"].forecast
    assert plan.exact and f"of at most {most:.4g} ms by forecast has a lower forecast of the loss (proven)" in str(plan)
    assert any(f"was lowered from {0.7 * made.cost.now:.4g} so that" in note for note in plan.notes)
    limit, offers = round((most - made.offset("ms")) * 1e6), [s.offers for s in made.market.sellers]
    losses = [
        sum(o.loss for o in some) for some in itertools.product(*offers) if sum(o.cost("ms") for o in some) <= limit
    ]
    chosen = {la.name: (la.pattern, la.kept / la.total) for la in plan.layers if la.pattern}
    assert made.rises.share(chosen) <= min(losses) + 1e-12

    quality = plan_network(task_of(), "loss +0.1", how(least="macs"))
    assert "no choice among the offers with as low a forecast of the loss takes less (proven)" in str(quality)


def test_bytes_without_measuring_are_those_of_the_file(tmp_path):
    """The file as it is, is written: what is forecast is met within the rounding of the file's header."""
    task = _wide()
    write_plan(task.model, task.data[0][0][:1], tmp_path / "dense.safetensors")
    plan = plan_network(task, "bytes 300kB", how(("unstructured",), compare=False))

    cut = secateur.prune(task, plan)

    assert plan.figures["bytes"].before == (tmp_path / "dense.safetensors").stat().st_size
    assert 299_000 <= cut.planned.figures["bytes"]["measured"] <= 300_000
    assert "bytes 300000 is met by forecast only: nothing was measured on a copy" in plan.notes


def test_measure_means_one_thing_in_prune():
    """Nothing is weighed, neither when it is planned nor after."""
    given = {"rises": rises_of_kit(), "timed": False, "patterns": ["unstructured"]}
    quiet = secateur.prune(task_of(), "bytes 4000", measure=False, **given)
    assert quiet.planned.figures["bytes"]["measured"] is None
    loud = secateur.prune(task_of(), "bytes 4000", **given)
    assert loud.planned.figures["bytes"]["measured"] <= 4000


def test_plain_targets_below_the_rungs_are_met_and_said_to_be_extrapolated():
    """One weight in a hundred, where the forecast ends at two; nothing is said where it does not."""
    options = how(("unstructured",), compare=False)
    plan = plan_network(task_of(), "params 1%", options)

    assert sum(la.kept for la in plan.layers) == math.ceil(TOTAL / 100)
    few = [la.name for la in plan.layers if la.kept / la.total < 0.02]
    assert any(f"extrapolated: {len(few)} of 3 tensors keep less than 2.00%" in note for note in plan.notes)
    assert not plan_network(task_of(), "params 30%", options).notes
    at = options.rises.at
    assert at("0.weight", "unstructured", 0.01) == pytest.approx(
        0.5 * 0.98**2 * (0.98 / 0.95) ** (2 * math.log(2) / math.log(2.5))
    )
    with pytest.raises(BudgetError, match="best reachable is 3 weights"):
        plan_network(task_of(), "keep 2", options)


def test_why_nothing_goes_for_a_target_of_quality():
    plan = plan_network(task_of(), "loss +0.000000001", how(("unstructured",), least="params", compare=False))

    assert {la.why for la in plan.layers} == {"no choice that was found within loss +1e-09 takes less"}
    for_time = plan_network(task_of(), "latency 1x", how(("unstructured",), compare=False))
    assert "the target is met without it" in {la.why for la in for_time.layers}


def test_what_the_clock_has_to_say_is_told():
    """Notes of the forecast of milliseconds are the plan's; so are processor, core, threads and batch."""
    cost = replace(cost_of_kit(), notes=("2 of 3 layers were guessed",), isa="avx2", batch=4)
    plan = plan_network(task_of(), "ms 1.2", how(cost=cost, compare=False))

    assert "2 of 3 layers were guessed" in plan.notes
    here = Machine.here("avx2", 1)
    assert plan.machine["name"] == str(here)
    assert f"ms: compiled core, avx2, 1 thread, batch 4, {here.cpu}" in str(plan).splitlines()


def test_a_batch_is_taken_from_as_many_batches_as_it_needs():
    task = task_of()  # three batches of 16
    whole = torch.cat([x for x, _ in task.data])

    for count in (1, 16, 20, 48):
        assert torch.equal(batch_of(task, count), whole[:count])
    named = replace(task, data=[({"x": x, "pair": (x, y)}, y) for x, y in task.data])
    assert torch.equal(batch_of(named, 40)["pair"][0], whole[:40])
    with pytest.raises(DataError, match="48 examples, fewer than a batch of 49"):
        plan_network(task, "params 30%", how(batch=49))
    with pytest.raises(DataError, match="join"):
        batch_of(replace(task, data=[(x[:, : 8 + i], y) for i, (x, y) in enumerate(task.data)]), 20)


def test_halves_and_tensors_with_gradients_are_timed_and_weighed():
    """A network of bfloat16 is planned for milliseconds and bytes; its inputs are what the core takes."""
    x = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    found = arrays_of({"a": x})[0]
    assert found.dtype == "float32" and (found == x.detach().float().numpy()).all()

    wide = _wide()
    half = replace(wide, model=wide.model.bfloat16(), data=[(x.bfloat16().requires_grad_(), y) for x, y in wide.data])
    timed = plan_network(half, "latency 0.9x", how(("unstructured",), measure=True, compare=False, cost=_slow()))
    weighed = plan_network(half, "bytes 400kB", how(("unstructured",), measure=True, compare=False))
    assert timed.figures["ms"].measured <= 0.9 * timed.figures["ms"].before
    assert 390_000 < weighed.figures["bytes"].measured <= 400_000
    assert {la.before["bytes"] for la in weighed.layers} == {2 * la.total for la in weighed.layers}
