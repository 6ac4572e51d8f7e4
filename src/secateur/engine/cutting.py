"""Pruning once: scores, counts, masks, and the forecast of the loss beside the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.core.allocations import Allocation, Global
from secateur.core.budget import Target, keep_for, parse_target
from secateur.core.choose import broadcast, scores_of
from secateur.core.errors import BudgetError, ModelError, UsageError
from secateur.core.ground import Ground
from secateur.core.hold import Hold
from secateur.core.masks import Masks
from secateur.core.patterns import NM, Pattern, Unstructured
from secateur.core.prunable import check_finite, coverage
from secateur.core.sockets import Criterion
from secateur.core.task import Task
from secateur.criteria.magnitude import Magnitude
from secateur.engine.cautions import check_passes, check_slope
from secateur.engine.layer_records import LayerCut, rises_of
from secateur.engine.score_records import count_scores
from secateur.probes.cost import weight_costs

_ROUNDED = 5e-4
"""A share may be typed with three decimals: 0.333 for 1:3."""


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
        pattern: which shapes zeros take.
        scores: how many weights of which score stay and go, where it was asked for.
    """

    masks: Masks
    counts: Mapping[str, tuple[int, int]]
    left_alone: Mapping[str, str]
    target: Target
    forecast: Forecast | None
    costs: Mapping[str, int]
    pattern: Pattern = field(default_factory=Unstructured)
    scores: Mapping[str, Any] | None = None

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
        layers: what pruning did to each tensor, in the order in which they run, where it was asked for; a solver always
            tells.
        rounds: what a solver did to the whole network in each round.
        planned: of a plan layer by layer, the forecast beside what came of it.
    """

    model: nn.Module
    masks: Masks
    plan: Plan
    optimizer: Optimizer | None = None
    hold: Hold | None = None
    layers: tuple[LayerCut, ...] = ()
    rounds: tuple[Any, ...] = ()
    planned: Any = None


def plan(
    task: Task,
    to: str | Target | None = None,
    criterion: Criterion | None = None,
    allocation: Allocation | None = None,
    pattern: Pattern | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    forecast: bool = True,
    masks: Masks | None = None,
    record: bool = False,
) -> Plan:
    """Decide what to prune, without changing anything.

    Targets count the weights that are kept in the end: exactly for single weights, rounded down to whole blocks or
    output units. Of a network that is pruned already, a unit keeps what is left of it, and as many units are kept as
    the target allows; N:M groups with fewer weights left than N keep those. The plan's counts say what that gives.

    Args:
        task: network, loss (mean over examples) and data for scores and forecast.
        to: the target, such as ``"params 5%"``, ``"sparsity 0.9"``, ``"macs 0.5x"``, ``"keep 13000"`` or ``"2:4"``;
            by default the density of an N:M pattern, else ``"sparsity 0.9"``.
        criterion: which weights matter; magnitude by default.
        allocation: how the budget is shared out; one global threshold by default.
        pattern: which shapes zeros may take; single weights by default.
        only: globs of tensors to prune.
        skip: globs of tensors to leave alone.
        forecast: also forecast the rise of the loss (two more backward passes).
        masks: what an already pruned network keeps; its zeros are then never brought back, also in tensors that are
            left alone now.
        record: also count the weights by their scores, for a report.

    Raises:
        SecateurError: for targets that cannot be met, NaN weights, spent data, patterns that do not fit; for a network
            that is random in evaluation mode, when the criterion needs a curvature.

    Warns:
        Caution: for such a network with another criterion, a loss that is no mean, or a network away from a minimum
            when the criterion leaves the slope out.
    """
    target, pattern = aim(to, pattern)
    found = coverage(task.model, only, skip, pattern)
    check_finite(found.prunable)
    costs = {name: cost for name, cost in weight_costs(task).items() if name in found.prunable}
    dense = Masks({name: torch.ones_like(p, dtype=torch.bool) for name, p in found.prunable.items()})
    criterion = criterion or Magnitude()
    if forecast or "data-free" not in criterion.needs:
        check_passes(task, criterion)
    scores = scores_of(criterion, task, dense)
    by_cost = {name: float(max(1, costs.get(name, 0))) for name in scores}
    ground = Ground(scores, pattern, allocation or Global(), by_cost, masks)
    chosen, before = ground.masks(budget_of(target, ground, costs)), _pruned_before(masks, dense)
    chosen = broadcast(Masks({**before, **chosen}))
    told = count_scores(scores, chosen, masks) if record else None
    left = {n: f"{why}; the zeros it has stay" if n in before else why for n, why in found.left_alone.items()}
    counts = {name: (int(mask.sum()), mask.numel()) for name, mask in chosen.items()}
    guess = forecast_of(task, chosen) if forecast else None
    if guess is not None:
        check_slope(criterion, guess.slope, guess.curvature)
    return Plan(chosen, counts, left, target, guess, costs, pattern, told)


def prune(
    task: Task,
    plan_or_to: Plan | str | Target | None = None,
    *,
    optimizer: Optimizer | None = None,
    also: Sequence[nn.Module] = (),
    layers: bool = False,
    **options: Any,
) -> Cut:
    """Prune the task's network in place: pruned weights become zero and stay zero in training.

    Args:
        task: network, loss and data.
        plan_or_to: a plan, or the target of one (see :func:`plan` for the default).
        optimizer: the optimizer that will go on training; its state is cleared where weights go, and hooks keep
            the zeros.
        also: averaged copies (EMA) to prune along.
        layers: also forecast and measure the rise of the loss tensor by tensor, those before it pruned already, on the
            first 256 examples (two backward passes and one forward pass for each).
        **options: as for :func:`plan`, when a target is given.

    Raises:
        SecateurError: as :func:`plan`; nothing was changed then.
    """
    made = plan_or_to if isinstance(plan_or_to, Plan) else plan(task, plan_or_to, **options)
    records = rises_of(task, made.masks) if layers else ()
    held = made.masks.hold(task.model, optimizer, also) if optimizer is not None else None
    if held is None:
        made.masks.apply_(task.model)
        for copy in also:
            made.masks.apply_(copy)
    after = made.forecast
    if after is not None:
        after = Forecast(after.before, after.slope, after.curvature, task.mean_loss())
    done = replace(made, forecast=after)
    return Cut(task.model, made.masks, done, optimizer, held, records)


def _pruned_before(masks: Masks | None, chosen: Masks) -> dict[str, Tensor]:
    """Masks of tensors that are left alone now but have zeros already."""
    return {n: mask for n, mask in (masks or {}).items() if n not in chosen and not bool(mask.all())}


def aim(to: str | Target | None, pattern: Pattern | None = None) -> tuple[Target, Pattern]:
    """The target that is meant and the pattern that goes with it; without a target that of the pattern, or 90 %.

    Raises:
        UsageError: when the two contradict each other.
        BudgetError: when the number is out of range.
    """
    pattern = pattern or Unstructured()
    own = f"{pattern.n}:{pattern.m}" if isinstance(pattern, NM) else ""
    target = parse_target(to if to is not None else own or "sparsity 0.9") if not isinstance(to, Target) else to
    if target.kind == "nm":
        wanted = NM(int(target.value), target.m)
        if not isinstance(pattern, Unstructured) and pattern != wanted:
            raise UsageError(f"the target {target} and the pattern {pattern} contradict each other; leave one out.")
        return target, wanted
    share = {"sparsity": 1 - target.value, "params": target.value, "macs": target.value}.get(target.kind)
    if isinstance(pattern, NM) and share is not None and abs(share - pattern.n / pattern.m) > _ROUNDED:
        raise UsageError(
            f"the target {target} and the pattern {own} contradict each other: it keeps {pattern.n} of every "
            f"{pattern.m} weights. Leave the target out, or use another pattern."
        )
    return target, pattern


def budget_of(target: Target, ground: Ground, costs: Mapping[str, int]) -> int:
    """The number of weights, counted in whole units, that a target means.

    For targets in MACs, and for units of a network that is pruned already, the largest number is searched that does
    not exceed the target.

    Raises:
        BudgetError: when the target cannot be met.
    """
    total, fixed = ground.total, ground.fixed
    if fixed is not None and target.kind != "keep":
        return sum(fixed.values())
    if target.kind == "macs":
        return _budget_in_macs(target, ground, costs)
    keep = int(target.value)
    if target.kind != "keep":
        keep = keep_for(target.value if target.kind == "sparsity" else 1 - target.value, total)
    if keep > total:
        raise BudgetError(f"cannot keep {keep:,} weights: only {total:,} are prunable.")
    if keep > ground.left:
        raise BudgetError(
            f"{target} means {keep:,} of {total:,} weights, but {total - ground.left:,} are pruned already and "
            f"{ground.left:,} are left. Ask for fewer, or begin with the dense network."
        )
    if ground.single or ground.fresh or fixed is not None:
        return keep
    budget = ground.largest(lambda kept: float(sum(kept.values())), float(keep))
    if budget is None:
        raise BudgetError(
            f"{target} cannot be met: the best unit of every tensor alone keeps more than {keep:,} weights. "
            "Ask for more, or leave tensors out with `--skip`."
        )
    return budget


def _budget_in_macs(target: Target, ground: Ground, costs: Mapping[str, int]) -> int:
    dense = sum(costs.get(name, 0) * score.numel() for name, score in ground.scores.items())
    if not dense:
        raise ModelError("no prunable weight is used in a product, so MACs cannot be a target; use `params 10%`.")

    def macs(kept: Mapping[str, int]) -> float:
        return float(sum(costs.get(name, 0) * count for name, count in kept.items()))

    limit, now = target.value * dense, macs(ground.live)
    if not ground.fresh and now + min(cost for cost in costs.values() if cost) <= limit:
        raise BudgetError(
            f"{target} is more than the network has: {now / dense:.2%} of the MACs remain already. Ask for fewer, or "
            "begin with the dense network."
        )
    budget = ground.largest(macs, limit)
    if budget is None:
        raise BudgetError(
            f"{target} cannot be met: with one unit left in every tensor more of the MACs remain. "
            f"Ask for at least {ground.least(macs) / dense:.2%}."
        )
    return budget


def forecast_of(task: Task, masks: Masks) -> Forecast:
    """What setting the pruned weights to zero should do to the loss. Cost: a forward and two backward passes."""
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
