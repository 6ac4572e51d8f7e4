"""Every rule keeps the contract of rules, and the suite catches rules that do not."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from secateur.core.masks import Masks
from secateur.core.names import owners
from secateur.core.reading import Paper
from secateur.core.select import top_mask
from secateur.core.sockets import Rule, find, names
from secateur.testing.rules_contract import ContractError, check_rule

_NONE = Paper("none: an example", "nobody", 2026, "", differs="in nothing known")
NETWORKS = {
    "slimming": ["conv_bn", "residual_bn", "depthwise"],
    "str": ["relu_mlp", "conv_bn", "residual_bn"],
}
"""Rules that refuse networks of other kinds, which their own tests show."""


@pytest.mark.filterwarnings("ignore:variational_bernoulli. all inputs of")  # few examples, so the penalty rules
@pytest.mark.parametrize("name", names("rules"))
def test_rule_keeps_the_contract(name):
    """Found by its file name, so a new rule is tested the moment it exists."""
    kind = find("rules", name)

    check_rule(kind(sparsity=0.6) if "sparsity" in kind.__dataclass_fields__ else kind(), NETWORKS.get(name))


@dataclass(frozen=True)
class Nothing(Rule):
    """Does nothing. Cost: none."""

    paper = _NONE


def test_a_rule_that_does_nothing_keeps_the_contract():
    check_rule(Nothing(), ["relu_mlp", "residual_bn"])


class _Scaled(nn.Module):
    def __init__(self, like):
        super().__init__()
        self.register_buffer("scale", torch.full_like(like, 0.5))

    def forward(self, weight):
        return weight * self.scale


@dataclass(frozen=True)
class Gated(Rule):
    """A soft gate behind a parametrization, pruned and baked at the end. Cost: one product a step."""

    sparsity: float = 0.5
    paper = _NONE

    def begin(self, run):
        for name, modules in owners(run.model).items():
            if name in run.masks:
                leaf = name.rpartition(".")[2]
                parametrize.register_parametrization(modules[0], leaf, _Scaled(run.weights()[name]))

    def after_step(self, run):
        for module in run.model.modules():
            if isinstance(module, _Scaled):
                module.scale.mul_(1.01)

    def end(self, run):
        modules = [m for m in run.model.modules() if parametrize.is_parametrized(m)]
        for module in modules:
            order = ["weight", *module._parameters]
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            for leaf in order:
                module._parameters[leaf] = module._parameters.pop(leaf)
        masks = {}
        total = run.masks.total
        budget = total - int(self.sparsity * total)
        for name, w in run.weights().items():
            count = min(budget, w.numel())
            masks[name] = top_mask(w.detach().abs(), count)
            budget -= count
        run.masks = Masks(masks)


def test_a_rule_with_a_parametrization_can_keep_the_contract():
    """Checkpoints hold what stands behind parametrizations; averages refuse it, which the suite accepts."""
    check_rule(Gated(), ["tanh_mlp", "residual_bn"])


@dataclass(frozen=True)
class Forgetful(Rule):
    """Keeps a count outside ``run.state``. Cost: none."""

    paper = _NONE
    seen = []

    def begin(self, run):
        self.seen.clear()

    def after_step(self, run):
        self.seen.append(run.step)
        if len(self.seen) == 7:
            with torch.no_grad():
                next(iter(run.weights().values())).mul_(0.5)


@dataclass(frozen=True)
class Leftover(Rule):
    """Leaves a hook. Cost: none."""

    paper = _NONE

    def end(self, run):
        next(run.model.children()).register_forward_hook(lambda *_: None)


@dataclass(frozen=True)
class Inexact(Rule):
    """Prunes one weight too few. Cost: one selection."""

    sparsity: float = 0.5
    paper = _NONE

    def end(self, run):
        weights = run.weights()
        run.masks = Masks({name: top_mask(w.detach().abs(), w.numel() // 2 + 1) for name, w in weights.items()})


@dataclass(frozen=True)
class Noisy(Rule):
    """Draws from the global generator. Cost: none."""

    paper = _NONE

    def after_step(self, run):
        torch.rand(1)


@dataclass(frozen=True)
class Escaping(Rule):
    """Writes to pruned weights at the end. Cost: none."""

    paper = _NONE

    def end(self, run):
        run.masks = Masks({name: torch.zeros_like(mask) for name, mask in run.masks.items()})
        with torch.no_grad():
            next(iter(run.weights().values())).fill_(1.0)


@dataclass(frozen=True)
class Costless(Rule):
    """Does not say what it takes."""

    paper = _NONE


@dataclass(frozen=True)
class Failing(Rule):
    """Raises. Cost: none."""

    paper = _NONE

    def before_step(self, run):
        raise ZeroDivisionError("oops")


@pytest.mark.parametrize(
    ("rule", "promise"),
    [
        (Forgetful(), "resumes to the bit .*stopped after step"),
        (Leftover(), "leaves a plain network behind .*the hooks of"),
        (Inexact(), "keeps its count exactly"),
        (Noisy(), "draws no global random numbers"),
        (Escaping(), "leaves zeros that are the masks"),
        (Costless(), "says its cost"),
        (Failing(), "works .*ZeroDivisionError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Rule) else "",
)
def test_a_broken_promise_is_found(rule, promise):
    """One sloppy rule for each promise."""
    with pytest.raises(ContractError, match=promise):
        check_rule(rule, ["relu_mlp"])


def test_the_global_random_state_is_left_alone():
    """Checking must not change the numbers a caller draws next."""
    torch.random.manual_seed(1)
    before = torch.get_rng_state()

    check_rule(Nothing(), ["relu_mlp"], epochs=2)

    assert torch.equal(before, torch.get_rng_state())
