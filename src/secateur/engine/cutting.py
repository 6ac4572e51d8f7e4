"""Pruning once: scores, counts, masks, and the forecast of the loss beside the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.core.allocations import Allocation, Global
from secateur.core.budget import Target, keep_for, parse_target
from secateur.core.choose import broadcast, choose, keep_counts
from secateur.core.errors import BudgetError, ModelError, UsageError
from secateur.core.hold import Hold
from secateur.core.masks import Masks
from secateur.core.names import Named
from secateur.core.patterns import NM, Pattern, Unstructured
from secateur.core.prunable import check_finite, coverage
from secateur.core.sockets import Criterion
from secateur.core.task import Task
from secateur.criteria.magnitude import Magnitude
from secateur.probes.cost import weight_costs


@dataclass(frozen=True)
class Forecast:
    """What pruning is expected to do to the mean loss, and what it did.

    Args:
        before: loss before.
        slope: first-order change ``g·d`` of setting the pruned weights to zero (``d = -w`` there).
        curvature: second-order change ``d·Hd / 2``; None when the network cannot be differentiated twice.
        after: measured loss after; None before it is known.
    """

    before: float
    slope: float
    curvature: float | None
    after: float | None = None

    @property
    def rise(self) -> float:
        """The forecast rise of the loss."""
        return self.slope + (self.curvature or 0.0)

    def to_json(self) -> dict[str, float | None]:
        """Plain values with the measured rise beside the forecast one."""
        measured = None if self.after is None else self.after - self.before
        return {
            "loss_before": self.before, "loss_after": self.after, "rise_forecast": self.rise,
            "rise_measured": measured, "slope": self.slope, "curvature": self.curvature,
        }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What will be pruned; nothing has changed yet.

    Args:
        masks: the masks that will be applied.
        counts: weights kept and all, by tensor.
        left_alone: the reason for every tensor that is not pruned.
        target: what was asked for.
        forecast: the expected change of the loss.
        costs: MACs for one weight of each tensor.
    """

    masks: Masks
    counts: Mapping[str, tuple[int, int]]
    left_alone: Mapping[str, str]
    target: Target
    forecast: Forecast | None
    costs: Mapping[str, int]

    def __str__(self) -> str:
        """A table: one row a tensor, then the totals and what is left alone."""
        width = max(len(name) for name in self.counts)
        rows = [
            f"{name:<{width}}  {kept:>11,} of {total:>11,}  {kept / total:7.2%}"
            for name, (kept, total) in self.counts.items()
        ]
        rows.append(
            f"{'all':<{width}}  {self.masks.kept:>11,} of {self.masks.total:>11,}  {1 - self.masks.sparsity:7.2%}"
        )
        if self.forecast is not None:
            rows.append(f"forecast: the loss rises by {self.forecast.rise:.4g} from {self.forecast.before:.4g}")
        rows += [f"left alone: {name} ({why})" for name, why in self.left_alone.items()]
        return "\n".join(rows)


@dataclass(frozen=True)
class Cut:
    """A pruned network.

    Args:
        model: the network, changed in place; its pruned weights are zero.
        masks: which weights are kept.
        plan: what was done, with the measured loss in its forecast.
        optimizer: the optimizer handed in, its state cleared where weights were pruned.
        hold: keeps the zeros while you train; release it when done. None without an optimizer.
    """

    model: nn.Module
    masks: Masks
    plan: Plan
    optimizer: Optimizer | None = None
    hold: Hold | None = None


def plan(
    task: Task,
    to: str | Target = "sparsity 0.9",
    criterion: Criterion | None = None,
    allocation: Allocation | None = None,
    pattern: Pattern | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    forecast: bool = True,
    masks: Masks | None = None,
) -> Plan:
    """Decide what to prune, without changing anything.

    Args:
        task: network, loss (mean over examples) and data for scores and forecast.
        to: the target, such as ``"params 5%"``, ``"sparsity 0.9"``, ``"macs 0.5x"``, ``"keep 13000"`` or ``"2:4"``.
        criterion: which weights matter; magnitude by default.
        allocation: how the budget is shared out; one global threshold by default.
        pattern: which shapes zeros may take; single weights by default.
        only: globs of tensors to prune.
        skip: globs of tensors to leave alone.
        forecast: also forecast the rise of the loss (two more backward passes).
        masks: what an already pruned network keeps; its zeros are then never brought back.

    Raises:
        SecateurError: for targets that cannot be met, NaN weights, spent data, patterns that do not fit.
    """
    target = parse_target(to) if isinstance(to, str) else to
    pattern = _pattern(target, pattern)
    found = coverage(task.model, only, skip, pattern)
    check_finite(found.prunable)
    costs = {name: cost for name, cost in weight_costs(task).items() if name in found.prunable}
    dense = Masks({name: torch.ones_like(p, dtype=torch.bool) for name, p in found.prunable.items()})
    scores = _held((criterion or Magnitude())(task, dense), masks, pattern)
    by_cost = {name: float(max(1, costs.get(name, 0))) for name in scores}
    keep = keep_of(target, scores, pattern, allocation or Global(), costs, by_cost)
    chosen = broadcast(choose(scores, keep, pattern, allocation, by_cost))
    _check_nested(chosen, masks, pattern, target)
    counts = {name: (int(mask.sum()), mask.numel()) for name, mask in chosen.items()}
    guess = _forecast(task, chosen) if forecast else None
    return Plan(chosen, counts, found.left_alone, target, guess, costs)


def prune(
    task: Task,
    plan_or_to: Plan | str = "sparsity 0.9",
    *,
    optimizer: Optimizer | None = None,
    also: Sequence[nn.Module] = (),
    **options: Any,
) -> Cut:
    """Prune the task's network in place: pruned weights become zero and stay zero in training.

    Args:
        task: network, loss and data.
        plan_or_to: a plan, or the target of one.
        optimizer: the optimizer that will go on training; its state is cleared where weights go, and hooks keep
            the zeros.
        also: averaged copies (EMA) to prune along.
        **options: as for :func:`plan`, when a target is given.

    Raises:
        SecateurError: as :func:`plan`; nothing was changed then.
    """
    made = plan_or_to if isinstance(plan_or_to, Plan) else plan(task, plan_or_to, **options)
    held = made.masks.hold(task.model, optimizer, also) if optimizer is not None else None
    if held is None:
        made.masks.apply_(task.model)
        for copy in also:
            made.masks.apply_(copy)
    after = made.forecast
    if after is not None:
        after = Forecast(after.before, after.slope, after.curvature, task.mean_loss())
    done = Plan(made.masks, made.counts, made.left_alone, made.target, after, made.costs)
    return Cut(task.model, made.masks, done, optimizer, held)


def _held(scores: Named, masks: Masks | None, pattern: Pattern) -> Named:
    """Scores in which weights that are pruned already come last (in units of several weights: add nothing)."""
    if masks is None or masks.kept == masks.total:
        return scores
    single = isinstance(pattern, Unstructured | NM)
    held = {}
    for name, score in scores.items():
        gone = ~masks[name].to(score.device) if name in masks else torch.zeros_like(score, dtype=torch.bool)
        held[name] = score.masked_fill(gone, float("-inf") if single else 0.0)
    return held


def _check_nested(chosen: Masks, masks: Masks | None, pattern: Pattern, target: Target) -> None:
    """A network that is pruned already cannot keep more weights than it has.

    Raises:
        BudgetError: naming the tensor and the cure.
    """
    if masks is None or not isinstance(pattern, Unstructured | NM):
        return
    for name, mask in chosen.items():
        back = int((mask & ~masks[name].to(mask.device)).sum()) if name in masks else 0
        if back:
            raise BudgetError(
                f"{target} would bring back {back:,} weights of `{name}` that are pruned already: the network keeps "
                f"{masks.kept:,} of {masks.total:,}. Ask for fewer, or begin with the dense network."
            )


def _pattern(target: Target, pattern: Pattern | None) -> Pattern:
    if target.kind == "nm":
        wanted = NM(int(target.value), target.m)
        if pattern is not None and not isinstance(pattern, Unstructured) and pattern != wanted:
            raise UsageError(f"the target {target} and the pattern {pattern} contradict each other; leave one out.")
        return wanted
    return pattern or Unstructured()


def keep_of(
    target: Target,
    scores: Named,
    pattern: Pattern,
    allocation: Allocation,
    costs: Mapping[str, int],
    by_cost: Mapping[str, float],
) -> int:
    """The number of weights to keep that a target means.

    For a target in MACs the largest number is searched whose MACs do not exceed it.

    Raises:
        BudgetError: when the target cannot be met.
    """
    total = sum(score.numel() for score in scores.values())
    if target.kind == "nm":
        return total
    if target.kind == "sparsity":
        return keep_for(target.value, total)
    if target.kind == "params":
        return keep_for(1 - target.value, total)
    if target.kind == "keep":
        if target.value > total:
            raise BudgetError(f"cannot keep {target.value:,.0f} weights: only {total:,} are prunable.")
        return int(target.value)
    dense = sum(costs.get(name, 0) * score.numel() for name, score in scores.items())
    if not dense:
        raise ModelError("no prunable weight is used in a product, so MACs cannot be a target; use `params 10%`.")
    least = sum(pattern.unit_size(tuple(s.shape)) for s in scores.values())

    def macs(keep: int) -> int:
        counts = keep_counts(scores, keep, pattern, allocation, by_cost)
        return sum(costs.get(n, 0) * counts[n] * pattern.unit_size(tuple(scores[n].shape)) for n in scores)

    low, high = least, total
    if macs(low) > target.value * dense:
        raise BudgetError(
            f"{target} cannot be met: with one unit left in every tensor {macs(low) / dense:.2%} of the MACs remain. "
            "Ask for at least that."
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if macs(middle) <= target.value * dense else (low, middle - 1)
    return low


def _forecast(task: Task, masks: Masks) -> Forecast:
    every = task.params()
    direction: dict[str, Tensor] = {
        name: torch.where(mask, 0.0, -every[name].detach()).to(every[name].dtype) for name, mask in masks.items()
    }
    before = task.mean_loss()
    try:
        slope, curvature = task.taylor(direction)
        return Forecast(before, slope, curvature)
    except ModelError:
        gradients = task.gradients()
        slope = sum(float((gradients[n] * d).sum()) for n, d in direction.items())
        return Forecast(before, slope, None)
