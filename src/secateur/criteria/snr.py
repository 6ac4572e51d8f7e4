"""Signal to noise: a weight matters by how many standard deviations of its posterior it lies from zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from secateur.core.errors import ModelError, UsageError, nearest
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.sockets import Criterion
from secateur.core.task import Task
from secateur.linalg import diagonals

Deviation = Literal["laplace", "softplus", "exp"]


@dataclass(frozen=True)
class Snr(Criterion):
    """``|μ| / σ``: the weight over the standard deviation of its posterior, a Gaussian for each weight alone.

    A network trained by variational inference holds both: μ is the tensor that is pruned, and its partner ρ gives
    σ, by ``"exp"`` or ``"softplus"``. The partner of ``w_mu`` is ``w_rho``, that of ``mu_weight`` is ``rho_weight``,
    and that of ``weight`` is ``weight_rho``; no data is read. When μ is pruned, σ must go as well: pruned weights
    left with noise spoil the network, and this method cannot see to it.

    An ordinary network has no σ. Then ``"laplace"`` takes the mean-field posterior around its weights,
    ``1 / σ² = N F + prior``, with N examples and F the mean squared slope of each example's own loss, which must be a
    negative log likelihood. Without a prior this ranks as ``|w| √F``; a weight the loss does not depend on has no
    precision and scores 0.

    Scores have the shape of each weight, float32 or wider, no units; they do not change when μ and σ scale together.
    Weights that ``masks`` prune score 0. Priors differ from layer to layer: rank within layers if they do.

    Args:
        deviation: where σ comes from.
        prior: precision of a Gaussian prior around zero, at least 0; for ``"laplace"`` only.

    Raises:
        UsageError: for another deviation, or a prior below 0.
        ModelError: when a weight is not finite, has no partner, or its σ is 0 or not finite.
        DataError: when the data is empty or spent, or the loss is not finite.
        MaskError: when ``masks`` belong to another network.

    Cost: with ``"laplace"`` a gradient for every example, memory of one batch of them; else one pass over the weights.
    """

    deviation: Deviation = "laplace"
    prior: float = 0.0

    paper = Paper(
        "Quantifying uncertainty in deep learning approaches to radio galaxy classification",
        "Mohan, Scaife, Porter, Walmsley, Bowles",
        2022,
        "arXiv:2201.01203",
        differs="scores only; a network trained without variational inference gets its deviations from a diagonal "
        "Laplace approximation with the empirical Fisher, which is not in the paper",
    )
    needs = frozenset({"gradients"})

    def __post_init__(self) -> None:
        if self.deviation not in get_args(Deviation):
            raise UsageError(f"deviation must be 'laplace', 'softplus' or 'exp', not {self.deviation!r}.")
        if not 0 <= self.prior < float("inf"):
            raise UsageError(f"prior is a precision of at least 0, not {self.prior!r}; 0 stands for no prior.")

    def __call__(self, task: Task, masks: Masks) -> Named:
        """Scores for every tensor of ``masks``; higher = keep."""
        weights = masks.match(task.model)
        check_finite(dict(weights))
        mean = {name: _wide(w) * masks[name].to(w.device) for name, w in weights.items()}
        if self.deviation == "laplace":
            fisher = diagonals.fisher_diagonal(task, masks)
            count = sum(n for _, _, n in task.batches())
            return {name: m.abs() * (fisher[name].detach() * count + self.prior).sqrt() for name, m in mean.items()}
        return {name: m.abs() / self._spread(task, name) for name, m in mean.items()}

    def _spread(self, task: Task, name: str) -> Tensor:
        """The σ of a tensor, from its partner."""
        own = task.params()
        head, dot, leaf = name.rpartition(".")
        partner = head + dot + (leaf.replace("mu", "rho") if "mu" in leaf else f"{leaf}_rho")
        if partner not in own or own[partner].shape != own[name].shape:
            raise ModelError(
                f"`{name}` has no `{partner}` of its shape to give its deviation. {nearest(partner, own)} Leave it "
                f"out with `--skip '{name}'`, or use the deviation 'laplace'."
            )
        rho = _wide(own[partner])
        sigma = rho.exp() if self.deviation == "exp" else functional.softplus(rho)
        if not bool((sigma.isfinite() & (sigma > 0)).all()):
            raise ModelError(f"`{partner}` gives deviations that are 0 or not finite; they must be above 0.")
        return sigma


def _wide(t: Tensor) -> Tensor:
    return t.detach().to(torch.promote_types(t.dtype, torch.float32))
