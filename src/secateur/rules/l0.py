"""L0: gates that close for good while the network trains."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.core.errors import UsageError
from secateur.core.reading import Paper
from secateur.core.run import Run
from secateur.core.sockets import Rule
from secateur.core.task import Batch
from secateur.rules import _behind

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature and ends of the stretched interval."""
LOWEST, HIGHEST = math.log(0.01), math.log(100)
"""Where log alpha is held."""


@dataclass(frozen=True)
class L0(Rule):
    """Multiply groups of weights by random gates in [0, 1], and pay for every weight whose gate is open.

    A gate has one trained number, log alpha. In each step it takes the value
    ``clip(1.2 sigmoid((log u - log(1 - u) + log alpha) / beta) - 0.1, 0, 1)`` with one uniform ``u`` for the step; in
    evaluation mode ``clip(1.2 sigmoid(log alpha) - 0.1, 0, 1)``, exactly 0 for log alpha <= -2.398. The penalty is
    ``1/N * sum over groups of P(open) (strength * weights in the group + decay / 2 * their squares)``, its gradient
    exact. At the end the gates of evaluation mode are multiplied into the weights, and closed groups are pruned.

    Gates belong to dense and convolutional layers whose weight the masks cover; other weights stay as they are, and
    masks the network came with are held. A layer never loses all its gates: the best one stays, fully open.
    There is no target: the sparsity follows from ``strength``, the learning rate and the length of the run. The
    optimizer of the run trains log alpha, at its rate and without weight decay; averages (``ema``) are refused.

    Args:
        strength: price of a weight, at least 0, in units of the summed loss: 0.1 to 1 on MNIST.
        groups: what one gate belongs to. ``inputs``: an input channel of a layer, behind norm and activation.
            ``outputs``: an output unit and its bias; a BatchNorm after it undoes such gates. ``mixed``: inputs of dense
            layers and outputs of convolutions, as in the paper. ``weights``: a single weight.
        drop: share of gates that begin closed (``alpha = (1 - drop) / drop``), between 0 and 1.
        decay: the L2 penalty of open weights and of biases, at least 0.
        examples: training examples ``N`` (terms of the mean loss); 0 counts them in the first epoch.

    Raises:
        UsageError: for values out of range.
        ModelError: when no layer can be gated.

    Cost: each step about ten passes over the weights; one number for each gate.
    """

    paper = Paper(
        "Learning Sparse Neural Networks through L0 Regularization",
        "Louizos, Welling, Kingma",
        2018,
        "arXiv:1712.01312",
        differs="convolutions are gated at their inputs by default, where a BatchNorm cannot undo it; one initial drop "
        "rate for all layers; one sample a step; no averaged parameters; gates never close a whole layer",
    )

    strength: float = 0.1
    groups: Literal["inputs", "outputs", "mixed", "weights"] = "inputs"
    drop: float = 0.5
    decay: float = 5e-4
    examples: int = 0

    def __post_init__(self) -> None:
        for name, value in (("strength", self.strength), ("decay", self.decay)):
            if not 0 <= value < math.inf:
                raise UsageError(f"l0: {name} is {value!r}; it must be at least 0 and finite.")
        if self.groups not in ("inputs", "outputs", "mixed", "weights"):
            raise UsageError(f"l0: groups is {self.groups!r}; it must be inputs, outputs, mixed or weights.")
        if not 0 < self.drop < 1:
            raise UsageError(f"l0: drop is {self.drop!r}; it must lie between 0 and 1, 0.5 is usual.")
        if self.examples < 0:
            raise UsageError(f"l0: examples is {self.examples!r}; it must be positive, or 0 to count them.")

    def begin(self, run: Run) -> None:
        """Put gates behind the weights."""
        _behind.attach(run, self, Gate)
        for module, gate in _behind.standing(run, Gate).values():
            if gate.form == "outputs" and isinstance(module.bias, nn.Parameter):
                parametrize.register_parametrization(module, "bias", _Follow(gate))
        _behind.enlist(run, Gate)

    def loss(self, run: Run, loss: Tensor, batch: Batch, output: Any) -> Tensor:
        """Unchanged; the examples are counted."""
        _behind.hear(run, self, batch[1])
        return loss

    def before_step(self, run: Run) -> None:
        """Add the gradient of the penalty, once a step."""
        size = _behind.data_size(run, self, self.examples)
        for module, gate in _behind.standing(run, Gate).values():
            weight, biases = _behind.weight(module), _behind.bias(module)
            with torch.enable_grad():
                penalty = gate.price(weight) + sum(self.decay / 2 * b.square().sum() for b in biases)
            _behind.add_gradient(penalty / size, [gate.log_alpha, weight, *biases])

    def after_step(self, run: Run) -> None:
        """Hold log alpha within its bounds, and draw the numbers of the next step."""
        for _, gate in _behind.standing(run, Gate).values():
            gate.log_alpha.data.clamp_(LOWEST, HIGHEST)
        _behind.renew(run, Gate)

    def end(self, run: Run) -> None:
        """Multiply the gates into the weights, and prune what is closed."""
        shut = [name for name, (_, gate) in _behind.standing(run, Gate).items() if not gate.open().any()]
        if shut:
            warnings.warn(f"l0: all gates of `{'`, `'.join(shut[:4])}` closed; the best one stays open.", stacklevel=2)
        _behind.bake(run, Gate)
        run.state(self).clear()


def chance(log_alpha: Tensor) -> Tensor:
    """The probability that a gate is open, in the shape of ``log_alpha``."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


class Gate(_behind.Behind):
    """The gates of one layer."""

    def __init__(self, rule: Any, module: Any, random: torch.Generator) -> None:
        super().__init__(rule, module, random)
        mixed = "inputs" if isinstance(module, nn.Linear) else "outputs"
        self.form = mixed if rule.groups == "mixed" else rule.groups
        out, each = self.mask.shape[:2]
        shape = {"inputs": (each * self.parts,), "outputs": (out,), "weights": tuple(self.mask.shape)}[self.form]
        noise = torch.randn(shape, generator=random, dtype=torch.float64)
        first = math.log((1 - rule.drop) / rule.drop) + 0.01 * noise
        self.log_alpha = nn.Parameter(first.to(self.like))
        self.uniform = torch.full_like(self.log_alpha, 0.5, requires_grad=False)

    def renew(self) -> None:
        """One uniform number for each gate, kept off 0 and 1."""
        self.uniform = torch.rand(
            self.log_alpha.shape, generator=self.stream(), dtype=self.like.dtype, device=self.like.device
        ).clamp_(1e-6, 1 - 1e-6)

    def open(self) -> Tensor:
        """The gates of evaluation mode, before the best one is kept open."""
        return (torch.sigmoid(self.log_alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def value(self) -> Tensor:
        """The gates as the network uses them now."""
        if self.training:
            noisy = torch.sigmoid((torch.logit(self.uniform) + self.log_alpha) / BETA)
            return (noisy * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
        value = self.open()
        if not (self.wide(value) * self.mask).any():  # the best gate in front of a weight that is kept
            best = self.wide(self.log_alpha).expand_as(self.mask).masked_fill(~self.mask, -math.inf).argmax()
            index = torch.arange(value.numel(), device=value.device).view_as(value)
            value = torch.where(index == self.wide(index).expand_as(self.mask).flatten()[best], 1.0, value)
        return value

    def wide(self, value: Tensor) -> Tensor:
        """One number for each gate, in a shape that multiplies the weight."""
        if self.form == "inputs":
            return self.spread(value)
        return value.view(-1, *[1] * (self.mask.dim() - 1)) if self.form == "outputs" else value

    def forward(self, weight: Tensor) -> Tensor:
        """The gated weight."""
        return weight * self.wide(self.value()).to(weight.dtype)

    def kept(self, weight: Tensor) -> Tensor:
        """Weights whose gate is open in evaluation mode."""
        was, self.training = self.training, False
        kept = (self.wide(self.value()) > 0).expand_as(weight)
        self.training = was
        return kept

    def price(self, weight: Tensor) -> Tensor:
        """The penalty times ``N``, biases left out."""
        each = self.rule.strength * self.mask.to(self.like.dtype) + self.rule.decay / 2 * weight.square()
        return (self.wide(chance(self.log_alpha)) * each).sum()


class _Follow(nn.Module):
    """Gates the bias like the outputs it belongs to."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gates = (gate,)  # in a tuple: its numbers are not this module's own

    def forward(self, bias: Tensor) -> Tensor:
        """The gated bias."""
        return bias * self.gates[0].value().to(bias.dtype)
