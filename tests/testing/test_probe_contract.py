"""The contract of probes passes an honest probe and catches sloppy ones."""

import time
from dataclasses import dataclass

import pytest
import torch

from secateur.core.reading import Paper, Reading
from secateur.core.sockets import Probe
from secateur.testing import ContractError, check_probe


class Base(Probe):
    """The mean loss. Cost: one pass."""

    paper = Paper("none: a test", "nobody", 2026, "", differs="in nothing known")
    needs = frozenset()

    def __call__(self, task, masks=None):
        return Reading(task.mean_loss(), "nat")


@dataclass(frozen=True)
class Clean(Base):
    """Cost: one pass."""


@dataclass(frozen=True)
class CountsWeights(Base):
    """Cost: none."""

    needs = frozenset({"data-free"})

    def __call__(self, task, masks=None):
        return Reading(float(sum(p.numel() for p in task.params().values())), "weights", parts={"all": 1.0})


@dataclass(frozen=True)
class ReadsTheClock(Base):
    """Cost: one pass."""

    needs = frozenset({"clock"})

    def __call__(self, task, masks=None):
        begin = time.perf_counter()
        task.mean_loss()
        return Reading(time.perf_counter() - begin, "s")


@dataclass(frozen=True)
class HidesTheClock(ReadsTheClock):
    """Cost: one pass."""

    needs = frozenset()


@dataclass(frozen=True)
class UsesGlobalRandomNumbers(Base):
    """Cost: one pass."""

    def __call__(self, task, masks=None):
        return Reading(task.mean_loss() + torch.rand(()).item(), "nat")


@dataclass(frozen=True)
class HidesItsError(Base):
    """Cost: one pass."""

    needs = frozenset({"random"})


@dataclass(frozen=True)
class NotFinite(Base):
    """Cost: one pass."""

    def __call__(self, task, masks=None):
        return Reading(task.mean_loss() * float("inf"), "nat")


@dataclass(frozen=True)
class GivesANumber(Base):
    """Cost: one pass."""

    def __call__(self, task, masks=None):
        return task.mean_loss()


@dataclass(frozen=True)
class GivesATensor(Base):
    """Cost: one pass."""

    def __call__(self, task, masks=None):
        return Reading(torch.tensor(task.mean_loss()), "nat")


@dataclass(frozen=True)
class OutsideItsInterval(Base):
    """Cost: one pass."""

    def __call__(self, task, masks=None):
        return Reading(task.mean_loss(), "nat", low=-2.0, high=-1.0)


@dataclass(frozen=True)
class AveragesBatches(Base):
    """Cost: one pass."""

    def __call__(self, task, masks=None):
        losses = [task.loss_at((inputs, target)).item() for inputs, target, _ in task.batches()]
        return Reading(sum(losses) / len(losses), "nat")


@dataclass(frozen=True)
class AppliesMasks(Base):
    """Cost: one pass."""

    def __call__(self, task, masks=None):
        if masks is not None:
            masks.apply_(task.model)
            next(iter(task.params().values())).data.neg_()
        return super().__call__(task, masks)


@dataclass(frozen=True)
class MeasuresTraining(Base):
    """Cost: one pass."""

    def __call__(self, task, masks=None):
        return Reading(task.mean_loss() + task.model.training, "nat")


@dataclass(frozen=True)
class AcceptsEmptyData(Base):
    """Cost: one pass."""

    def __call__(self, task, masks=None):
        return super().__call__(task, masks) if list(task.data) else Reading(0.0, "nat")


@dataclass(frozen=True)
class WithoutCosts(Base):
    """Says nothing."""


@pytest.mark.parametrize("probe", [Clean(), CountsWeights(), ReadsTheClock()], ids=repr)
def test_an_honest_probe_passes(probe):
    check_probe(probe)


@pytest.mark.parametrize(
    ("probe", "promise"),
    [
        (HidesTheClock(), "same twice"),
        (UsesGlobalRandomNumbers(), "changed: the global random state"),
        (HidesItsError(), "an error with a random value"),
        (NotFinite(), "finite value"),
        (GivesANumber(), "gives a Reading"),
        (GivesATensor(), "survives JSON|works"),
        (OutsideItsInterval(), "own interval"),
        (AveragesBatches(), "cut into batches"),
        (AppliesMasks(), "changed: parameter"),
        (MeasuresTraining(), "ignores training flags"),
        (AcceptsEmptyData(), "refuses empty data"),
        (WithoutCosts(), "says its cost"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Probe) else "",
)
def test_a_sloppy_probe_is_caught(probe, promise):
    with pytest.raises(ContractError, match=promise):
        check_probe(probe)
