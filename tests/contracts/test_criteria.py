"""Every criterion found keeps the contract, and sloppy ones are caught breaking it."""

from dataclasses import dataclass, field

import pytest
import torch

from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.reading import Paper
from secateur.core.sockets import Criterion, find, names
from secateur.testing import ContractError, check_criterion

PAPER = Paper("none: a test", "nobody", 2026, "", differs="in nothing known")


@pytest.mark.parametrize("name", names("criteria"))
def test_criterion_keeps_the_contract(name):
    check_criterion(find("criteria", name)())


class Sloppy(Criterion):
    """|w·g| done well; each subclass spoils one thing. Cost: one pass."""

    paper = PAPER

    def __call__(self, task, masks):
        slopes = task.gradients()
        return {name: (w.detach() * slopes[name]).abs() for name, w in masks.match(task.model).items()}


@dataclass(frozen=True)
class Clean(Sloppy):
    """Cost: one pass."""


@dataclass(frozen=True)
class AveragesBatches(Sloppy):
    """Every batch weighs the same. Cost: one pass."""

    def __call__(self, task, masks):
        scores = {name: torch.zeros_like(w) for name, w in task.params().items() if name in masks}
        batches = list(task.data)
        for batch in batches:
            one = type(task)(task.model, task.loss, [batch]).gradients()
            scores = {name: s + one[name] / len(batches) for name, s in scores.items()}
        return {name: (s * task.params()[name]).abs().detach() for name, s in scores.items()}


@dataclass(frozen=True)
class AbsOfEveryBatch(Sloppy):
    """Takes the absolute value before the sum over batches. Cost: one pass."""

    def __call__(self, task, masks):
        total = {name: torch.zeros_like(w) for name, w in task.params().items() if name in masks}
        for inputs, target, n in task.batches():
            one = type(task)(task.model, task.loss, [(inputs, target)]).gradients()
            total = {name: s + n * (one[name] * task.params()[name]).abs().detach() for name, s in total.items()}
        return total


@dataclass(frozen=True)
class LeavesGradients(Sloppy):
    """Calls backward. Cost: one pass."""

    def __call__(self, task, masks):
        task.loss_at(next(iter(task.data))).backward()
        return super().__call__(task, masks)


@dataclass(frozen=True)
class UsesGlobalRandomNumbers(Sloppy):
    """Breaks ties with the global generator. Cost: one pass."""

    def __call__(self, task, masks):
        return {name: s + 1e-3 * torch.rand_like(s) for name, s in super().__call__(task, masks).items()}


@dataclass(frozen=True)
class SeedsFromTheGlobalState(Sloppy):
    """Puts the global generator back, but its numbers depend on where it stood. Cost: one pass."""

    def __call__(self, task, masks):
        with torch.random.fork_rng(devices=[]):
            return {name: s + 1e-3 * torch.rand_like(s) for name, s in super().__call__(task, masks).items()}


@dataclass(frozen=True)
class NaNForDeadUnits(Sloppy):
    """Divides every score by the sum of its row. Cost: one pass."""

    def __call__(self, task, masks):
        return {n: s / s.sum(1, keepdim=True) for n, s in super().__call__(task, masks).items()}


@dataclass(frozen=True)
class DeadUnitsScoreMore(Sloppy):
    """Adds a constant. Cost: one pass."""

    def __call__(self, task, masks):
        return {name: s + 1e-3 for name, s in super().__call__(task, masks).items()}


@dataclass(frozen=True)
class ChangesTheNetwork(Sloppy):
    """Normalises the weights in place. Cost: one pass."""

    @torch.no_grad()
    def __call__(self, task, masks):
        for w in masks.match(task.model).values():
            w.div_(w.norm())
        with torch.enable_grad():
            return super().__call__(task, masks)


@dataclass(frozen=True)
class LeavesEvaluationMode(Sloppy):
    """Forgets the training flags. Cost: one pass."""

    def __call__(self, task, masks):
        task.model.eval()
        return super().__call__(task, masks)


@dataclass(frozen=True)
class LeavesHooks(Sloppy):
    """Listens for ever. Cost: one pass."""

    def __call__(self, task, masks):
        next(task.model.children()).register_forward_hook(lambda *_: None)
        return super().__call__(task, masks)


@dataclass(frozen=True)
class TrainsNorms(Sloppy):
    """Runs the network in training mode. Cost: one pass."""

    @torch.no_grad()
    def __call__(self, task, masks):
        flags = {module: module.training for module in task.model.modules()}
        task.model.train()
        with torch.random.fork_rng(devices=[]):
            task.model(next(iter(task.data))[0])
        for module, flag in flags.items():
            module.training = flag
        with torch.enable_grad():
            return super().__call__(task, masks)


@dataclass(frozen=True)
class ListensToTrainingFlags(Sloppy):
    """Scores with dropout active. Cost: one pass."""

    def __call__(self, task, masks):
        return {n: s * (2 if task.model.training else 1) for n, s in super().__call__(task, masks).items()}


@dataclass(frozen=True)
class SkipsFrozen(Sloppy):
    """Leaves frozen parameters out. Cost: one pass."""

    def __call__(self, task, masks):
        return {n: s * task.params()[n].requires_grad for n, s in super().__call__(task, masks).items()}


@dataclass(frozen=True)
class KeepsTheGraph(Sloppy):
    """Not detached. Cost: one pass."""

    def __call__(self, task, masks):
        return {name: w.abs() for name, w in masks.match(task.model).items()}


@dataclass(frozen=True)
class SharesMemory(Sloppy):
    """Gives the weights themselves. Cost: one pass."""

    def __call__(self, task, masks):
        return {name: w.detach() for name, w in masks.match(task.model).items()}


@dataclass(frozen=True)
class DependsOnPlace(Sloppy):
    """Spares the first channels. Cost: one pass."""

    def __call__(self, task, masks):
        scores = super().__call__(task, masks)
        return {n: s * torch.arange(1, len(s) + 1).reshape(-1, *[1] * (s.dim() - 1)) for n, s in scores.items()}


@dataclass(frozen=True)
class AddsTheLoss(Sloppy):
    """Mixes units, so that a factor on the loss changes the ranking. Cost: one pass."""

    def __call__(self, task, masks):
        scores = super().__call__(task, masks)
        return {n: s * s + 0.01 * s.sum(0, keepdim=True) * s for n, s in scores.items()} | {
            n: s for i, (n, s) in enumerate(scores.items()) if i % 2
        }


@dataclass(frozen=True)
class OnlyFloat64(Sloppy):
    """Adds what float32 cannot hold. Cost: one pass."""

    def __call__(self, task, masks):
        return {n: (s + 2.0**24) - 2.0**24 for n, s in super().__call__(task, masks).items()}


@dataclass(frozen=True)
class ScoresEverything(Sloppy):
    """Scores biases as well. Cost: one pass."""

    def __call__(self, task, masks):
        return super().__call__(
            task, Masks({n: torch.ones_like(p, dtype=torch.bool) for n, p in task.params().items()})
        )


@dataclass(frozen=True)
class AcceptsEmptyData(Sloppy):
    """Zeros without data. Cost: one pass."""

    def __call__(self, task, masks):
        if not list(task.data):
            return {name: torch.zeros_like(mask, dtype=torch.float64) for name, mask in masks.items()}
        return super().__call__(task, masks)


@dataclass(frozen=True)
class AcceptsSpentData(Sloppy):
    """Reads an iterator once. Cost: one pass."""

    def __call__(self, task, masks):
        return super().__call__(type(task)(task.model, task.loss, list(task.data)), masks)


@dataclass(frozen=True)
class ReadsData(Sloppy):
    """Says it needs no data, and reads it. Cost: one pass."""

    needs = frozenset({"data-free"})


@dataclass(frozen=True)
class WithoutCosts(Sloppy):
    """Says nothing of what it takes."""


@dataclass
class NotFrozen(Sloppy):
    """Can be changed. Cost: one pass."""


@dataclass(frozen=True)
class HidesAField(Sloppy):
    """Cost: one pass."""

    seed: int = field(default=0, repr=False)


@dataclass(frozen=True)
class WithoutPaper(Criterion):
    """Cost: one pass."""

    def __call__(self, task, masks):
        raise NotImplementedError


@dataclass(frozen=True)
class NeedsMagic(Sloppy):
    """Cost: one pass."""

    needs = frozenset({"magic"})


@dataclass(frozen=True)
class Fails(Sloppy):
    """Cost: one pass."""

    def __call__(self, task, masks):
        raise ZeroDivisionError("by zero")


def test_a_clean_criterion_passes():
    check_criterion(Clean())


@pytest.mark.parametrize(
    ("sloppy", "promise"),
    [
        (AveragesBatches(), "cut into batches"),
        (AbsOfEveryBatch(), "cut into batches"),
        (LeavesGradients(), "changed: .*`.grad` of"),
        (UsesGlobalRandomNumbers(), "changed: the global random state"),
        (SeedsFromTheGlobalState(), "same twice"),
        (NaNForDeadUnits(), "finite scores"),
        (DeadUnitsScoreMore(), "dead unit the score 0"),
        (ChangesTheNetwork(), "changed: parameter `0.weight`"),
        (LeavesEvaluationMode(), "changed: the training flag"),
        (LeavesHooks(), "changed: the hooks"),
        (TrainsNorms(), "changed: buffer"),
        (ListensToTrainingFlags(), "ignores training flags"),
        (SkipsFrozen(), "scores frozen parameters"),
        (KeepsTheGraph(), "detached"),
        (SharesMemory(), "share memory with `0.weight`"),
        (DependsOnPlace(), "channels that change places"),
        (AddsTheLoss(), "loss is multiplied by 8"),
        (OnlyFloat64(), "float32 and float64"),
        (ScoresEverything(), "tensors of the masks"),
        (AcceptsEmptyData(), "refuses empty data"),
        (AcceptsSpentData(), "refuses an iterator"),
        (ReadsData(), "works without data"),
        (WithoutCosts(), "says its cost"),
        (NotFrozen(), "frozen dataclass"),
        (HidesAField(seed=1), "repr that rebuilds"),
        (WithoutPaper(), "names its paper"),
        (NeedsMagic(), "declares its needs"),
        (Fails(), "ZeroDivisionError: by zero"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Criterion) else "",
)
def test_a_sloppy_criterion_is_caught(sloppy, promise):
    with pytest.raises(ContractError, match=promise):
        check_criterion(sloppy)


def test_the_message_names_method_network_and_tensor():
    with pytest.raises(ContractError, match=r"SharesMemory\(\) breaks the promise: .*\(tanh_mlp, `0.weight`\)"):
        check_criterion(SharesMemory(), networks=["tanh_mlp"])


def test_only_the_networks_asked_for_are_used():
    with pytest.raises(ContractError, match="lstm"):
        check_criterion(KeepsTheGraph(), networks=["lstm"])
    with pytest.raises(UsageError, match="Did you mean 'lstm'"):
        check_criterion(Clean(), networks=["lstn"])


def test_the_check_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    check_criterion(Clean(), networks=["tanh_mlp"])
    assert torch.equal(torch.get_rng_state(), before)
