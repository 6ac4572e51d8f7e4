"""Variational inference: a Gaussian for each weight; what is mostly noise goes in the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from secateur.core.allocations import Allocation, ByCost, Uniform
from secateur.core.budget import keep_for
from secateur.core.choose import broadcast, choose, keep_counts, reduce_scores
from secateur.core.errors import BudgetError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.patterns import Unstructured
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.run import Run
from secateur.core.sockets import Rule
from secateur.core.streams import stream
from secateur.core.task import Batch, examples
from secateur.linalg.diagonals import fisher_diagonal
from secateur.rules._draws import Density, Prior, draw_of, install, remove

Rank = Literal["snr", "fisher"]
_RHO = (-5.0, -4.0)


@dataclass(frozen=True)
class VariationalInference(Rule):
    """Bayes by backprop: learn a mean and a deviation for each weight, and prune by signal to noise at the end.

    In every step the prunable weights are drawn as ``w = mu + sigma * noise`` with ``sigma = exp(rho)``, once for all
    examples of the step, and mu and rho go down the slope of ``mean NLL + temperature / N * (log q(w) - log p(w))``
    with N training examples. The loss must be the mean negative log likelihood of an example. Between steps, and when
    it is evaluated, the network holds the means; all other parameters are ordinary.

    Training ends with the pruning, in the paper without any training after it. The network is left with the means, and
    ``run.state(rule)`` keeps ``rho:NAME``, minus infinity where a weight is pruned: its noise goes with it.

    Rho is trained by the run's optimizer at the run's rate, without weight decay; ``clip`` looks at the means only.
    Weight decay of the means would be a second prior. Averages (``ema``) are of the means.

    Args:
        sparsity: share of the means that go in the end, in [0, 1).
        rank: ``"snr"``: the lowest ``|mu| / sigma`` go; ``"fisher"``: the lowest mean squared slope of
            each example's own loss by the mean.
        temperature: weight of the divergence from the prior: 1 is Bayes, below it the posterior is cold, and 0 is
            maximum likelihood under noise.
        prior: of each weight, around zero.
        scale: standard deviation of Gaussians, ``b`` of Laplace's ``exp(-|w| / b) / 2b``; above 0.
        spike: the same of the narrow part of a mixture.
        share: probability of the wide part of a mixture, in (0, 1).
        allocation: how the budget is shared out; by default each tensor loses the same share, since the scores of
            layers of different noise hardly compare.
        examples: training examples for the Fisher information.

    Raises:
        BudgetError: for a sparsity out of range.
        UsageError: for other values out of range.

    Cost: a few passes over the prunable weights each step, and one draw of noise; memory of four more copies of them
    besides the optimizer's state of rho.
    """

    paper = Paper(
        "Quantifying uncertainty in deep learning approaches to radio galaxy classification",
        "Mohan, Scaife, Porter, Walmsley, Bowles",
        2022,
        "arXiv:2201.01203",
        differs="one draw a step; biases and normalisations have no noise, in the authors' code biases have; the means "
        "begin with the weights the network has; Fisher information is taken by the means, which the paper leaves "
        "open; the numbers of the mixtures are not the paper's",
    )

    sparsity: float = 0.3
    rank: Rank = "snr"
    temperature: float = 0.01
    prior: Prior = "gaussian"
    scale: float = 0.1
    spike: float = 0.0025
    share: float = 0.5
    allocation: Allocation = field(default_factory=Uniform)
    examples: int = 512

    def __post_init__(self) -> None:
        name = "variational_inference"
        if not 0 <= self.sparsity < 1:
            raise BudgetError(f"{name}: sparsity is {self.sparsity!r}; it must be in [0, 1), 0.3 means 30 % zeros.")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"{name}: temperature is {self.temperature!r}; it must be at least 0, 1 is Bayes.")
        if not (0 < self.scale < float("inf") and 0 < self.spike < float("inf") and 0 < self.share < 1):
            raise UsageError(
                f"{name}: scale is {self.scale!r}, spike {self.spike!r} and share {self.share!r}; the first two must "
                "be above 0, share in (0, 1)."
            )
        if self.prior not in get_args(Prior) or self.rank not in get_args(Rank):
            raise UsageError(
                f"{name}: prior is {self.prior!r} and rank {self.rank!r}; the prior must be one of "
                f"{', '.join(get_args(Prior))}, the rank snr or fisher."
            )
        if self.examples < 1 or isinstance(self.allocation, ByCost):
            raise UsageError(
                f"{name}: examples must be at least 1, and by-cost needs MACs, which a rule does not know."
            )

    def begin(self, run: Run) -> None:
        """Begin dense, give every weight its deviation, and let the optimizer train them."""
        state, weights = run.state(self), run.weights()
        if not run.resumed:
            if self.rank == "fisher":
                run.task(self.examples)
            magnitudes = {name: w.detach().abs() for name, w in weights.items()}
            keep_counts(magnitudes, keep_for(self.sparsity, run.masks.total), Unstructured(), self.allocation)
            if run.masks.kept < run.masks.total:
                run.masks = Masks({name: torch.ones_like(mask) for name, mask in run.masks.items()})
            for name, w in weights.items():
                random = stream(run.seed, "variational_inference", "rho", name)
                state[f"rho:{name}"] = torch.empty(w.shape, dtype=_wide(w)).uniform_(*_RHO, generator=random)
        for name, w in weights.items():
            state[f"rho:{name}"] = nn.Parameter(state[f"rho:{name}"].detach().to(w.device))
        run.optimizer.add_param_group({"params": [state[f"rho:{name}"] for name in weights], "weight_decay": 0.0})
        install(run, state)

    def loss(self, run: Run, loss: Tensor, batch: Batch, output: Any) -> Tensor:
        """Count the examples; the divergence has slopes of its own."""
        draw_of(run.model).seen += examples(batch[0])
        return loss

    @torch.no_grad()
    def before_step(self, run: Run) -> None:
        """Put the means back, and turn the slopes by the drawn weights into those by mu and rho."""
        state, draw = run.state(self), draw_of(run.model)
        prior = Density(self.prior, self.scale, self.spike, self.share)
        part = self.temperature / (run.steps_per_epoch * draw.seen * _processes())
        for name, w in run.weights().items():
            if name in draw.noise:
                rho, noise, mean = state[f"rho:{name}"], draw.noise[name], draw.means[name]
                slope = -part * prior.slope(mean.to(noise.dtype) + rho.exp() * noise)
                slope += 0 if w.grad is None else w.grad
                w.copy_(mean)
                w.grad = slope.to(w.dtype)
                rho.grad = slope * rho.exp() * noise - part  # log q of a draw is -rho, up to constants
        draw.forget()

    def end(self, run: Run) -> None:
        """Prune the means, and their deviations with them."""
        state, weights = run.state(self), run.weights()
        check_finite(weights)
        remove(run.model)
        trained = {id(state[f"rho:{name}"]) for name in weights}
        groups = run.optimizer.param_groups
        groups[:] = [group for group in groups if not trained & {id(p) for p in group["params"]}]
        for name in weights:
            run.optimizer.state.pop(state[f"rho:{name}"], None)
        keep = keep_for(self.sparsity, run.masks.total)
        if keep < run.masks.total:
            run.masks = broadcast(choose(self.scores(run), keep, allocation=self.allocation))
        for name, mask in run.masks.items():
            state[f"rho:{name}"] = state[f"rho:{name}"].detach().masked_fill(~mask, -torch.inf)

    def scores(self, run: Run) -> Named:
        """What the means are ranked by; higher = keep."""
        if self.rank == "fisher":
            return reduce_scores(fisher_diagonal(run.task(self.examples), run.masks), self.examples)
        state = run.state(self)
        return {n: w.detach().to(_wide(w)).abs() / state[f"rho:{n}"].detach().exp() for n, w in run.weights().items()}


def _wide(w: Tensor) -> torch.dtype:
    return torch.promote_types(w.dtype, torch.float32)


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
