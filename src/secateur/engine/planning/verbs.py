"""Planning and carrying out, in Python: the wide forms of ``secateur.plan`` and ``secateur.prune``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from secateur.core.allocations import Allocation
from secateur.core.budget import Target
from secateur.core.errors import UsageError, nearest
from secateur.core.masks import Masks
from secateur.core.names import parameters
from secateur.core.patterns import Pattern
from secateur.core.prunable import coverage
from secateur.core.sockets import Criterion
from secateur.core.task import Task
from secateur.criteria.magnitude import Magnitude
from secateur.engine.cutting import Cut, Plan, forecast_of
from secateur.engine.cutting import plan as plan_weights
from secateur.engine.cutting import prune as prune_weights
from secateur.engine.planning.carrying import Gone, digest_of, masks_of, plan_of, scored, solve_choice, take_out
from secateur.engine.planning.outcomes import Watch, compare_plan, elsewhere
from secateur.engine.planning.plans import LayerPlan
from secateur.engine.planning.sealing import data_of, differences
from secateur.engine.planning.targets import Aim, is_aim
from secateur.engine.undoing import Undo

__all__ = ["carry", "carry_out_plan", "check_plan", "plan", "refuse_masks"]


def plan(
    task: Task,
    to: str | Target | Aim | None = None,
    criterion: Criterion | None = None,
    allocation: Allocation | None = None,
    pattern: Pattern | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    forecast: bool = True,
    masks: Masks | None = None,
    record: bool = False,
    *,
    patterns: Sequence[str | Pattern] | None = None,
    **how: Any,
) -> Plan | LayerPlan:
    """Decide what to prune, without changing anything.

    With one budget of weights (``"params 5%"``, the default) an allocation shares it out over the tensors, as scores
    decide. With ``patterns``, or a target in milliseconds, bytes, loss or accuracy, every tensor gets a pattern and a
    density of its own, so that what is forecast to be lost is least; see
    :func:`secateur.engine.planning.planner.plan_network`.

    One budget: targets count the weights that are kept in the end: exactly for single weights, rounded down to whole
    blocks or output units. Of a network that is pruned already, a unit keeps what is left of it, and as many units are
    kept as the target allows; N:M groups with fewer weights left than N keep those. The plan's counts say what that
    gives.

    Args:
        task: network, loss (mean over examples) and data for scores and forecast.
        to: the target, such as ``"params 5%"``, ``"sparsity 0.9"``, ``"macs 0.5x"``, ``"keep 13000"`` or ``"2:4"``;
            by default the density of an N:M pattern, else ``"sparsity 0.9"``. Layer by layer: ``"ms 3.5"``, ``"latency
            0.5x"``, ``"bytes 200kB"``, ``"macs 0.5x"``, ``"params 10%"``, ``"loss +0.05"`` or ``"accuracy -0.5"``.
        criterion: which weights matter; magnitude by default.
        allocation: how one budget is shared out; one global threshold by default.
        pattern: which shapes zeros may take, with one budget; single weights by default.
        only: globs of tensors to prune.
        skip: globs of tensors to leave alone.
        forecast: with one budget, also forecast the rise of the loss (two more backward passes).
        masks: what an already pruned network keeps; its zeros are then never brought back, also in tensors that are
            left alone now. A plan layer by layer begins with a dense network.
        record: with one budget, also count the weights by their scores, for a report.
        patterns: what each tensor may take, in words or as patterns: ``["unstructured", "4x1", "2:4"]``.
        **how: of a plan layer by layer, fields of :class:`secateur.engine.planning.planner.Planning`, such as
            ``batch=8, threads=1`` or ``solver=SparseGpt()``.

    Raises:
        SecateurError: for targets that cannot be met, NaN weights, spent data, patterns that do not fit; for a network
            that is random in evaluation mode, when the criterion needs a curvature.

    Warns:
        Caution: for such a network with another criterion, a loss that is no mean, or a network away from a minimum
            when the criterion leaves the slope out.
    """
    if patterns is None and not isinstance(to, Aim) and not (isinstance(to, str) and is_aim(to)):
        if how:
            name = next(iter(how))
            raise UsageError(f"{name} is for plans layer by layer; pass patterns=[...] too, or leave it out.")
        return plan_weights(task, to, criterion, allocation, pattern, only, skip, forecast, masks, record)
    _refuse(allocation, pattern, masks, to)
    words = tuple(str(word) for word in patterns) if patterns is not None else ("unstructured",)
    given = {**how, "patterns": words, "criterion": criterion or Magnitude(), "only": tuple(only), "skip": tuple(skip)}
    from secateur.engine.planning.planner import plan_network

    return plan_network(task, to if isinstance(to, Aim) else str(to), _planning(given))


def carry_out_plan(
    task: Task,
    plan: LayerPlan,
    *,
    optimizer: Optimizer | None = None,
    also: Sequence[nn.Module] = (),
    example: Any = None,
    measure: bool = True,
) -> Cut:
    """Prune the task's network in place as a plan says, and put what came of it beside the forecast.

    Args:
        task: network, loss and data; scores, layers and the loss are computed on it.
        plan: what to do.
        optimizer: the one that goes on training; its state is cleared where weights go.
        also: averaged copies to prune along; not with a solver.
        example: one batch of inputs to time the file with; by default the first of the task's data, as large as that
            of the plan.
        measure: write the pruned network's file, weigh it and time it.

    Raises:
        UsageError: when the plan was made for other weights; nothing was changed then.
        SecateurError: as the parts; nothing was changed then.
    """
    return carry(task, plan, optimizer=optimizer, also=also, example=example, measure=measure)[0]


def carry(
    task: Task,
    plan: LayerPlan,
    *,
    optimizer: Optimizer | None = None,
    also: Sequence[nn.Module] = (),
    example: Any = None,
    measure: bool = True,
) -> tuple[Cut, Gone | None]:
    """What :func:`carry_out_plan` does, with the record of the units that went first."""
    check_weights(task.model, plan)
    if plan.solver is not None and also:
        raise UsageError("a solver moves weights, so averaged copies cannot follow; begin a new average afterwards.")
    if plan.removal is None:
        check_shapes(task.model, plan)
    start = None if plan.removal is None else task.mean_loss()
    with Watch(plan, task, example, measure) as watch:
        if plan.removal is None:
            return _carried(task, plan, optimizer, also, watch, start), None
        undo = Undo((task.model, *also), optimizer)
        try:
            gone = take_out(task, plan.removal, optimizer, also)
            return _carried(replace(task, model=gone.model), plan, optimizer, also, watch, start), gone
        except BaseException:
            undo()
            raise


def _carried(
    task: Task,
    plan: LayerPlan,
    optimizer: Optimizer | None,
    also: Sequence[nn.Module],
    watch: Watch,
    start: float | None,
) -> Cut:
    """The part of a plan that sets weights to zero, once all that can fail is behind it.

    ``start`` is the loss before units went.
    """
    check_shapes(task.model, plan)
    found = coverage(task.model, only=[layer.name for layer in plan.layers]).prunable
    kept = {layer.name: (layer.pattern, layer.kept) for layer in plan.layers}
    masks = masks_of(scored(task, found, plan.criterion), kept)
    moved = plan.solver is not None
    notes = [*elsewhere(plan), *differences(plan, data_of(task, 0), "" if moved else masks.digest)]
    cut = _solved(task, plan, masks, optimizer, watch) if moved else _scored(task, plan, masks, optimizer, also, watch)
    before, after = _losses(cut)
    loss = (before if start is None else start, after)
    return replace(cut, planned=compare_plan(plan, watch, task, cut.plan.counts, cut.layers, loss, notes))


def check_plan(model: nn.Module, plan: LayerPlan) -> None:
    """Refuse a network that a plan was not made for.

    Raises:
        UsageError: with what differs.
    """
    if plan.removal is None:
        check_shapes(model, plan)
    check_weights(model, plan)


def check_shapes(model: nn.Module, plan: LayerPlan) -> None:
    """Refuse a network without the tensors of a plan.

    Raises:
        UsageError: with what differs.
    """
    shapes = {name: tuple(p.shape) for name, p in parameters(model).items()}
    for layer in plan.layers:
        if shapes.get(layer.name) != layer.shape:
            there = f"of shape {shapes[layer.name]}" if layer.name in shapes else "not there"
            raise UsageError(
                f"the plan prunes `{layer.name}` of shape {layer.shape}, which is {there} in this network. Pass the "
                "network (and the data) that it was made for, or make a plan for this one."
            )


def check_weights(model: nn.Module, plan: LayerPlan) -> None:
    """Refuse other weights than those that a plan was made for.

    Raises:
        UsageError: when they differ.
    """
    if digest_of(model) != plan.weights:
        if plan.removal is None:
            check_shapes(model, plan)  # which says more
        raise UsageError(
            "the plan was made for other weights of this network: it was trained or pruned since. Make the plan again "
            "with `secateur plan`."
        )


def _scored(
    task: Task,
    plan: LayerPlan,
    masks: Masks,
    optimizer: Optimizer | None,
    also: Sequence[nn.Module],
    watch: Watch,
) -> Cut:
    made = replace(plan_of(masks, plan.left_alone), forecast=forecast_of(task, masks))
    watch.read(task.model, masks)
    return prune_weights(task, made, optimizer=optimizer, also=also, layers=True)


def _solved(task: Task, plan: LayerPlan, masks: Masks, optimizer: Optimizer | None, watch: Watch) -> Cut:
    before = {name: p.detach().clone() for name, p in task.params().items()}
    kept = {layer.name: (layer.pattern, layer.kept) for layer in plan.layers}
    if plan.solver is None:
        raise UsageError("the plan names no solver.")
    try:
        done, layers = solve_choice(task, masks, kept, plan.solver, plan.inputs, forecast=True)
        watch.read(task.model)
        done = replace(done, left_alone=plan.left_alone)
        cut = prune_weights(task, replace(done, forecast=None), optimizer=optimizer)
    except BaseException:  # such as an optimizer of another network
        with torch.no_grad():
            for name, p in task.params().items():
                p.copy_(before[name])
        raise
    return replace(cut, plan=done, layers=tuple(layers))


def _losses(cut: Cut) -> tuple[float, float]:
    told = cut.plan.forecast
    if told is None or told.after is None:
        raise UsageError("the loss was not measured.")
    return told.before, told.after


def _planning(given: Mapping[str, Any]) -> Any:
    from secateur.engine.planning.planner import Planning

    known = Planning.__dataclass_fields__
    for name in given:
        if name not in known:
            raise UsageError(f"a plan layer by layer has no option {name!r}. {nearest(name, known)}")
    return Planning(**given)


def _refuse(allocation: Any, pattern: Any, masks: Masks | None, to: Any) -> None:
    """Options of one budget have no meaning layer by layer."""
    if to is None:
        raise UsageError('a plan layer by layer needs a target, such as "ms 3.5" or "loss +0.05".')
    if isinstance(to, Target):
        raise UsageError(f"pass the target of a plan layer by layer in words: {str(to)!r}.")
    for name, value in (("allocation", allocation), ("pattern", pattern)):
        if value is not None:
            raise UsageError(f"{name} is for one budget of weights; a plan layer by layer takes patterns=[...].")
    refuse_masks(masks)


def refuse_masks(masks: Masks | None) -> None:
    """Refuse masks with zeros: what layers cost and lose is forecast from the dense network.

    Raises:
        UsageError: with how many weights are pruned.
    """
    if masks is not None and masks.kept < masks.total:
        raise UsageError(
            f"a plan layer by layer begins with a dense network; {masks.total - masks.kept:,} weights of this one are "
            "pruned already. Pass the dense one, or prune further with one budget."
        )
