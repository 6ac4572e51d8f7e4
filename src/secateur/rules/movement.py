"""Movement pruning: learn a score for every weight while the network is fine-tuned, and keep the best."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from secateur.core.allocations import Allocation, ByCost, Lamp, Uniform
from secateur.core.budget import keep_for
from secateur.core.choose import keep_counts
from secateur.core.errors import BudgetError, ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.patterns import Unstructured
from secateur.core.reading import Paper
from secateur.core.run import Run
from secateur.core.schedules import Cubic
from secateur.core.select import top_mask
from secateur.core.sockets import Rule
from secateur.core.streams import stream
from secateur.rules._dense import adam_, clear, lay_aside


@dataclass(frozen=True)
class Movement(Rule):
    """Fine-tune a trained network, and keep the weights that this moves away from zero.

    The network computes with ``W * M``; every weight has a score ``S``, whose gradient is ``dL/d(W * M) * W`` (straight
    through the mask, pruned weights included), so that with ``scores = "sgd"`` it is minus the sum of that times the
    rate. Hard: ``M`` keeps the highest scores, as many as the sparsity of this step leaves. Soft: ``M`` keeps scores
    with ``sigmoid(S) > tau``, and ``penalty * mean sigmoid(S)``, the mean within each tensor and then over tensors, is
    added to the loss (not to the one that is shown). Sparsity, or tau and penalty, rise along a cubic curve between
    ``start`` and ``stop``; scores and masks stand still from ``settle`` on.

    Pruned weights keep their values behind the network, to the bit and without optimizer state, and return with them.
    Between steps the network itself holds ``W * M``; ``run.masks`` become ``M`` at the end (dense until then; masks it
    came with are lifted). Scores begin at seeded noise of 1e-30, which breaks ties by chance and else counts nothing.

    Args:
        sparsity: pruned / prunable weights at the end, in [0, 1), 0.9 by default; hard only.
        variant: ``"hard"`` or ``"soft"``. What soft leaves follows from threshold and penalty.
        scores: what moves the scores: ``"adam"`` as the authors, or ``"sgd"``; no decay, no momentum.
        rate: learning rate of the scores; it follows the run's schedule. Of no effect on hard with SGD.
        start: share of the run before the first cut.
        stop: share of the run after which the target is reached.
        settle: share of the run after which the masks stand still.
        allocation: how the budget is shared out over tensors; hard only. ``uniform`` cuts each by itself.
        threshold: last tau of soft, in (0, 1).
        penalty: last weight of the penalty of soft, at least 0.
        least: share of each tensor that soft keeps in any case.

    Raises:
        BudgetError: for a sparsity out of range, or one that would empty layers.
        UsageError: for other values out of range.
        ModelError: for weights that are not trained.

    Cost: each step a few passes over the prunable weights and a selection among them; memory of two more copies of
    them (four with Adam) and a mask.
    """

    paper = Paper(
        "Movement Pruning: Adaptive Sparsity by Fine-Tuning",
        "Sanh, Wolf, Rush",
        2020,
        "arXiv:2005.07683",
        differs="pruned weights stand still, without decay and momentum; scores and masks stand still in the last "
        "tenth; ties go by chance; counts are rounded as everywhere here, so that a share of 0.03 keeps one weight "
        "more where it is not whole; distillation is a rule of its own",
    )

    sparsity: float | None = field(default=None, metadata={"default": lambda r: 0.9 if r.variant == "hard" else None})
    variant: Literal["hard", "soft"] = "hard"
    scores: Literal["adam", "sgd"] = "adam"
    rate: float = 1e-2
    start: float = 0.1
    stop: float = 0.8
    settle: float = 0.9
    allocation: Allocation = field(default_factory=Uniform)
    threshold: float = 0.1
    penalty: float = 400.0
    least: float = 0.005

    def __post_init__(self) -> None:
        if self.sparsity is None and self.variant == "hard":
            object.__setattr__(self, "sparsity", 0.9)
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise BudgetError(f"movement: sparsity is {self.sparsity!r}; it must be in [0, 1), 0.9 means 90 % zeros.")
        shares = 0 <= self.start < self.stop <= self.settle <= 1
        checks = {
            "variant": (self.variant in ("hard", "soft"), "'hard' or 'soft'"),
            "sparsity": (self.variant == "hard" or self.sparsity is None, "left out for soft, which has `threshold`"),
            "scores": (self.scores in ("adam", "sgd"), "'adam' or 'sgd'"),
            "rate": (0 < self.rate < math.inf, "a positive number"),
            "start": (shares, f"a share of the run, 0 <= start < stop = {self.stop} <= settle = {self.settle} <= 1"),
            "allocation": (not isinstance(self.allocation, ByCost | Lamp), "`uniform`, `global` or `erk`"),
            "threshold": (0 < self.threshold < 1, "in (0, 1)"),
            "penalty": (0 <= self.penalty < math.inf, "at least 0"),
            "least": (0 <= self.least <= 1, "in [0, 1]"),
        }
        for name, (fine, wanted) in checks.items():
            if not fine:
                raise UsageError(f"movement: {name} is {getattr(self, name)!r}; it must be {wanted}.")

    def begin(self, run: Run) -> None:
        """Give every weight its score."""
        frozen = [name for name, w in run.weights().items() if not w.requires_grad]
        if frozen:
            raise ModelError(f"movement: `{frozen[0]}` is not trained, so it never moves; `skip = {frozen}`.")
        state = run.state(self)
        if not lay_aside(run, state):
            return
        if self.sparsity is not None:
            keep = keep_for(self.sparsity, run.masks.total)
            keep_counts({n: w.detach().abs() for n, w in run.weights().items()}, keep, Unstructured(), self.allocation)
        for name, w in run.weights().items():
            kind = torch.promote_types(w.dtype, torch.float32)
            noise = torch.rand(w.shape, generator=stream(run.seed, "movement", name), dtype=torch.float64)
            state[f"score:{name}"] = (noise * 1e-30).to(w.device, kind)
            state[f"mask:{name}"] = torch.ones_like(w, dtype=torch.bool)

    @torch.no_grad()
    def before_step(self, run: Run) -> None:
        """Move the scores, and put ``W`` with the gradient of what is kept into the network."""
        state = run.state(self)
        rate = self.rate * run.optimizer.param_groups[0]["lr"] / run.optimizer.defaults["lr"]
        pull = self.penalty * self._way(run) / len(run.masks) if self.variant == "soft" else 0.0
        for name, w in run.weights().items():
            theta, score = state[f"theta:{name}"], state[f"score:{name}"]
            slope = torch.zeros_like(score) if w.grad is None else w.grad.to(score.dtype) * theta
            if pull:
                share = score.sigmoid()
                slope.add_(share * (1 - share), alpha=pull / score.numel())
            if run.step < round(self.settle * run.total):
                score.sub_(adam_(state, name, slope, run.step) if self.scores == "adam" else slope, alpha=rate)
            if w.grad is not None:
                w.grad.mul_(state[f"mask:{name}"])
            w.copy_(theta)

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Keep ``W``, undo what moved where it is pruned, and choose again."""
        state = run.state(self)
        for name, w in run.weights().items():
            theta = state[f"theta:{name}"]
            theta.copy_(torch.where(state[f"mask:{name}"], w, theta))
        if run.step <= round(self.settle * run.total):
            self._choose(run, state)
        for name, w in run.weights().items():
            clear(run, w, ~state[f"mask:{name}"])
            w.copy_(state[f"theta:{name}"].masked_fill(~state[f"mask:{name}"], 0))

    def end(self, run: Run) -> None:
        """``M`` becomes the masks of the network."""
        state = run.state(self)
        run.masks = Masks({name: state[f"mask:{name}"] for name in run.masks})
        state.clear()

    def _way(self, run: Run) -> float:
        first, last = round(self.start * run.total), round(self.stop * run.total)
        return Cubic()((run.step - first) / max(1, last - first))

    @torch.no_grad()
    def _choose(self, run: Run, state: dict[str, Any]) -> None:
        way = self._way(run)
        scores = {name: state[f"score:{name}"] for name in run.masks}
        if self.sparsity is not None:
            keep = keep_for(self.sparsity if way == 1 else self.sparsity * way, run.masks.total)
            counts = keep_counts(scores, keep, Unstructured(), self.allocation)
        else:
            above = {name: int((s.sigmoid() > self.threshold * way).sum()) for name, s in scores.items()}
            counts = {name: max(n, math.ceil(self.least * scores[name].numel())) for name, n in above.items()}
        state.update({f"mask:{name}": top_mask(score, counts[name]) for name, score in scores.items()})
