"""Multiply-adds of training against the formulas of the RigL paper, and against a run counted step by step."""

from fractions import Fraction

import pytest
import torch
from torch import nn

from secateur.core.errors import UsageError
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.streams import stream
from secateur.core.task import Task
from secateur.data import Loader, Split
from secateur.engine.folder import Artefact
from secateur.engine.loop import Training
from secateur.engine.recipe import Recipe, TrainStep
from secateur.engine.runner import Runner
from secateur.engine.training_cost import Forward, TrainingMacs, forward, of_phases, of_run, step_sizes
from secateur.rules.distill import Distill
from secateur.rules.gradual import Gradual
from secateur.rules.rigl import Rigl
from secateur.rules.set import Set

POSITIONS = {"0.weight": 25, "3.weight": 9, "6.weight": 1}
"""Where each weight of the network below is used: 7x7 images without padding, then 5x5 -> 3x3."""


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3)
    )


def split(count=23):
    x = torch.randn(count, 2, 7, 7, generator=stream(0, "x"))
    return Split(x, torch.arange(count) % 3)


def by_hand(masks):
    return sum(POSITIONS[name] * int(mask.sum()) for name, mask in masks.items())


def task(model):
    return Task(model, CrossEntropy(), list(Loader(split(), 5)))


def test_a_forward_pass_of_kept_weights():
    model = net()
    masks = Masks({n: torch.rand(m.shape, generator=stream(1, n)) < 0.4 for n, m in Masks.dense(model).items()})

    cost = forward(task(model), masks)

    assert cost == Forward(72 * 25 + 108 * 9 + 81, by_hand(masks))
    assert forward(task(model)) == Forward(cost.dense, cost.dense)


def test_the_formulas_of_the_card():
    cost = Forward(dense=1000, sparse=130)

    assert cost.dense_step == 3000
    assert cost.sparse_step == 390
    assert cost.update_step == 1260
    assert cost.rigl_step(100) == Fraction(3 * 130 * 100 + 2 * 130 + 1000, 101)
    assert cost.rigl_step(1) == Fraction(390 + 1260, 2)
    assert abs(float(cost.rigl_step(10**9)) - 390) < 1e-5


def test_without_zeros_everything_costs_the_same():
    cost = Forward(7, 7)

    assert cost.dense_step == cost.sparse_step == cost.update_step == cost.rigl_step(13) == 21


class Counted(Rigl):
    """Adds up what each step costs with the masks it computes with; the update's step by its own law."""

    spent = []

    def loss(self, run, loss, batch, output):
        masks, examples = run.masks, len(batch[1])
        before = by_hand(masks)
        self.spent.append((examples, before))
        return loss

    def before_step(self, run):
        super().before_step(run)
        moved = all(p.grad is None for p in run.model.parameters())
        dense = sum(POSITIONS[name] * mask.numel() for name, mask in run.masks.items())
        examples, sparse = zip(*self.spent, strict=True)
        self.macs.append(sum(n * (2 * f + (dense if moved else f)) for n, f in zip(examples, sparse, strict=True)))
        self.spent.clear()

    macs = []


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("options", [{}, {"every": 3, "stop": 1.0}, {"every": 1}])
def test_a_run_with_rigl_counted_step_by_step(accumulate, options):
    rule = Counted(sparsity=0.7, **options)
    Counted.macs.clear()
    model, loader = net(), Loader(split(), 5, shuffle=True)
    masks = Training(model, loader, TrainStep(epochs=6, accumulate=accumulate, rules=(rule,))).fit()

    found = of_run(forward(task(model), masks), step_sizes(23, 5, accumulate), 6, (rule,))

    assert found.sparse == sum(Counted.macs)
    assert found.dense == 3 * (72 * 25 + 108 * 9 + 81) * 23 * 6
    assert found.examples == 23 * 6


def test_a_long_run_of_equal_steps_costs_what_the_paper_says():
    """``every`` counts the update too, so the paper's interval is one less."""
    cost, rule = Forward(1000, 130), Rigl(every=101, stop=1.0)

    found = of_run(cost, [10] * 1010, 1, (rule,))

    assert found.sparse == 10 * (1010 * 390 + 9 * (1260 - 390))  # the tenth update would fall on the end
    assert Fraction(found.sparse + 10 * (1260 - 390), 10 * 1010) == cost.rigl_step(100)


def test_set_costs_what_fixed_zeros_cost_and_length_is_epochs():
    cost, sizes = Forward(1000, 130), step_sizes(23, 5)

    once = of_run(cost, sizes, 2)
    assert once == TrainingMacs(3000 * 46, 390 * 46, 46)
    assert of_run(cost, sizes, 2, (Set(), Distill())) == once
    taught = of_run(cost, sizes, 2, (Set(), Distill()), teacher=700)  # a forward pass for each example
    assert (taught.dense, taught.sparse) == (once.dense + 700 * 46, once.sparse + 700 * 46)
    assert of_run(cost, sizes, 2, (Rigl(every=2, grow="random"),)) == once
    five = of_run(cost, sizes, 10)
    assert (five.dense, five.sparse, five.share) == (5 * once.dense, 5 * once.sparse, Fraction(13, 100))


def test_masks_that_change_are_added_up_by_phase():
    """The mean over steps of ``3 f_D (1 - s_t)``, here with exact counts."""
    model = net()
    full = Masks.dense(model)
    half = Masks({n: torch.rand(m.shape, generator=stream(2, n)) < 0.5 for n, m in full.items()})

    found = of_phases(task(model), [(full, 10), (half, 30)])

    assert found == TrainingMacs(40 * 3 * by_hand(full), 30 * by_hand(full) + 90 * by_hand(half), 40)
    with pytest.raises(UsageError, match="a phase has -1 examples"):
        of_phases(task(model), [(full, -1)])


def test_rules_that_change_counts_are_refused():
    with pytest.raises(UsageError, match="training with gradual depends on how its masks changed"):
        of_run(Forward(2, 1), [5], 1, (Gradual(),))


@pytest.mark.parametrize("numbers", [(0, 1, 1), (5, 0, 1), (5, 1, 0)])
def test_steps_of_nothing_are_refused(numbers):
    with pytest.raises(UsageError, match="all must be at least 1"):
        step_sizes(*numbers)


def test_an_interval_below_one_is_refused():
    with pytest.raises(UsageError, match="interval between updates is 0"):
        Forward(2, 1).rigl_step(0)


@pytest.mark.parametrize(
    ("examples", "batch", "accumulate"), [(23, 5, 1), (23, 5, 2), (23, 5, 9), (20, 5, 2), (3, 8, 1)]
)
def test_steps_are_those_of_the_loop(examples, batch, accumulate):
    batches = [min(batch, examples - i) for i in range(0, examples, batch)]
    wanted = [sum(batches[i : i + accumulate]) for i in range(0, len(batches), accumulate)]

    assert step_sizes(examples, batch, accumulate) == wanted


def test_a_run_s_card_counts_training_by_hand_and_what_the_optimizer_remembers(tmp_path):
    """Digits: 1,437 images; an MLP of 64-16-10, whose MACs are its weights."""
    rigl = {"use": "rigl", "sparsity": 0.75, "every": 10}
    steps = [
        {"do": "train", "epochs": 1, "optimizer": "adam", "lr": 1e-3},
        {"do": "train", "epochs": 2, "rules": [rigl], "compact_state": True},
        {"do": "train", "epochs": 1, "rules": [{"use": "gradual", "sparsity": 0.9}]},
    ]
    table = {"model": {"use": "mlp", "widths": [16]}, "data": {"use": "digits", "batch": 100}, "step": steps}
    runner = Runner(Recipe.from_table(table), tmp_path)
    runner.run()
    first, second, third = (Artefact.open(row["folder"]).card for row in runner.plan())
    weights, biases, images = 64 * 16 + 16 * 10, 16 + 10, 1437
    whole = {"dense": 3 * weights * images, "sparse": 3 * weights * images, "examples": images}
    assert first["training_macs"] == whole
    assert first["optimizer_bytes"] == 4 * (2 * (weights + biases) + 4)  # two moments, and a counter for each tensor

    kept = second["kept"]
    due = [step for step in range(30) if Rigl(sparsity=0.75, every=10).due(step, 30)]
    at_updates = sum(37 if step % 15 == 14 else 100 for step in due)
    assert due and kept == weights // 4
    expected = 3 * kept * 2 * images + (weights - kept) * at_updates
    assert second["training_macs"] == {"dense": 2 * whole["dense"], "sparse": expected, "examples": 2 * images}
    assert second["optimizer_bytes"] == 4 * (2 * kept + biases)  # momentum and place of each kept weight
    assert third["training_macs"] == {"uncounted": ["gradual"]}
