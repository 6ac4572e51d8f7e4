"""Rates and optimizers: each schedule against its formula, and the loop uses the rate of each step."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false

import importlib.util
import math
import pathlib

import pytest
import torch
from torch import nn

from secateur.core.errors import ModelError
from secateur.core.reading import Paper
from secateur.core.sockets import Rule
from secateur.engine.loop import Training
from secateur.engine.optimize import make_optimizer, rate
from secateur.engine.recipe import TrainStep

_spec = importlib.util.spec_from_file_location("loop_kit", pathlib.Path(__file__).with_name("loop_kit.py"))
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)
loader, mlp = kit.loader, kit.mlp


def rates(total=100, per_epoch=10, **options):
    step = TrainStep(epochs=10, lr=2.0, **options)
    return [rate(step, done, total, per_epoch) for done in range(total)]


def test_the_cosine_falls_from_the_rate_to_nearly_zero():
    values = rates()
    assert values[0] == 2.0
    assert values == sorted(values, reverse=True)
    for done in (25, 50, 75, 99):
        assert abs(values[done] - (1 + math.cos(math.pi * done / 100))) < 1e-12


def test_steps_are_a_tenth_at_half_and_three_quarters():
    values = rates(schedule="step")
    assert [values[i] for i in (0, 49, 50, 74, 75, 99)] == [2.0, 2.0, 0.2, 0.2, 0.02, 0.02]


def test_one_cycle_rises_for_three_tenths_and_falls():
    values = rates(schedule="one-cycle")
    assert abs(values[0] - 0.08) < 1e-12 and values.index(max(values)) == 30 and values[30] == 2.0
    assert values[:31] == sorted(values[:31]) and values[30:] == sorted(values[30:], reverse=True)
    assert values[99] < 0.01


def test_warm_up_rises_in_a_line_and_hands_over():
    """1.5 epochs of 10 steps: 1/15, 2/15, ..., 1; then the schedule over what is left."""
    values = rates(warmup=1.5)
    for done in range(15):
        assert abs(values[done] - 2.0 * (done + 1) / 15) < 1e-12
    assert values[15] == 2.0
    assert abs(values[15 + 34] - (1 + math.cos(math.pi * 34 / 85))) < 1e-12
    assert rates(warmup=0.7, per_epoch=10)[6] == 2.0
    assert rates(schedule="constant", warmup=10.0)[99] == 2.0


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step", "one-cycle"])
def test_the_loop_uses_the_rate_of_each_step(schedule):
    """The optimizer sees rate(step, done, ...) at every step."""
    seen = []

    class Spy(Rule):
        """Reads the rate. Cost: none."""

        paper = Paper("none", "nobody", 2026, "", differs="in nothing known")

        def before_step(self, run):
            seen.append(run.optimizer.param_groups[0]["lr"])

    step = TrainStep(epochs=4, lr=0.3, schedule=schedule, warmup=1.0, rules=(Spy(),))
    Training(mlp(), loader(), step).fit()

    assert seen == [rate(step, done, 12, 3) for done in range(12)]


def test_optimizers_are_those_asked_for():
    p = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2), requires_grad=False)]
    wanted = {
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "rmsprop": torch.optim.RMSprop,
    }
    for name, kind in wanted.items():
        made = make_optimizer(p, TrainStep(optimizer=name, lr=0.25, weight_decay=0.5, momentum=0.75))
        group = made.param_groups[0]
        assert type(made) is kind and group["params"] == p[:1]
        assert (group["lr"], group["weight_decay"], group.get("momentum", 0.75)) == (0.25, 0.5, 0.75)
    with pytest.raises(ModelError, match="no parameter of the network can be trained"):
        make_optimizer(p[1:], TrainStep())
