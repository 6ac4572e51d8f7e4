"""Pruning with a solver, layer by layer or by the curvature of the whole network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.patterns import Pattern, Unstructured
from secateur.core.sockets import Solver
from secateur.core.task import Task
from secateur.engine.cautions import check_passes, check_slope
from secateur.engine.compensating import Inputs, LayerCut, check_layers, compensate, plan_layers
from secateur.engine.cutting import Forecast, Plan, aim, plan
from secateur.engine.surgeon import Curvature, Round, operate


@dataclass(frozen=True)
class Solved:
    """What a solver did.

    Args:
        plan: masks, counts and the loss before and after.
        layers: a record for each layer, where it went layer by layer.
        rounds: a record for each round, where it took the network as a whole.
    """

    plan: Plan
    layers: tuple[LayerCut, ...] = ()
    rounds: tuple[Round, ...] = ()


def solve(
    task: Task,
    solver: Solver,
    *choices: Any,
    inputs: Inputs = "sequential",
    curvature: Curvature = "layers",
    rounds: int = 1,
    heard: Callable[[Round], None] = lambda _: None,
    **options: Any,
) -> Solved:
    """Prune the task's network in place: the solver chooses what goes and moves what stays.

    Args:
        task: network, loss (mean over examples) and data.
        solver: the method.
        *choices: target, criterion, allocation and pattern, as for :func:`secateur.plan`; the target may be a plan.
        inputs: what each layer is given, as for :func:`secateur.engine.compensating.compensate`.
        curvature: ``"layers"``, or the curvature of the loss over all weights: ``"ggn"``, ``"fisher"``, ``"hessian"``;
            the solver then spreads the weights itself, and criterion and allocation have no say.
        rounds: how often the curvature of the whole network is taken anew.
        heard: called after each round.
        **options: as for :func:`secateur.plan`.

    Raises:
        SecateurError: for choices that do not go together, and as the functions behind; the network is then as it was.
    """
    made = choices[0] if choices and isinstance(choices[0], Plan) else None
    check_passes(task, solver)
    if curvature == "layers":
        if rounds != 1:
            raise UsageError(f"rounds is {rounds}, but layers are solved once; set `curvature`, for example to fisher.")
        pattern = _pattern(choices, options)
        if made is not None:
            check_layers(task, made)
        made = made or plan_layers(task, solver, *choices, **options)
        done, layers = compensate(task, made, solver, pattern, inputs)
        return Solved(done, layers=tuple(layers))
    return _whole(task, solver, made, choices, options, curvature, rounds, heard)


def _pattern(choices: tuple[Any, ...], options: dict[str, Any]) -> Pattern:
    if choices and isinstance(choices[0], Plan):
        return choices[0].pattern
    given = {**dict(zip(("to", "criterion", "allocation", "pattern"), choices, strict=False)), **options}
    return aim(given.get("to"), given.get("pattern"))[1]


def _whole(
    task: Task,
    solver: Solver,
    made: Plan | None,
    choices: tuple[Any, ...],
    options: dict[str, Any],
    curvature: Any,
    rounds: int,
    heard: Callable[[Round], None],
) -> Solved:
    if not isinstance(_pattern(choices, options), Unstructured):
        raise UsageError('the curvature of the whole network takes single weights; use `curvature = "layers"`.')
    made = made or plan(task, *choices, **{**options, "forecast": False})
    if made.target.kind == "macs":
        raise UsageError(
            f"the target {made.target} counts MACs, which depend on where weights go, and the curvature of the whole "
            'network decides that. Ask for `params 10%`, or use `curvature = "layers"`.'
        )
    before = options.get("masks") or {}
    chosen = {name: mask for name, mask in made.masks.items() if name not in made.left_alone}
    start = Masks({n: before[n] if n in before else torch.ones_like(mask) for n, mask in chosen.items()})
    loss = task.mean_loss()
    found, records = operate(task, start, Masks(chosen).kept, solver, curvature, rounds, heard)
    check_slope(solver, records[0].slope, records[0].bend)
    masks = Masks({**made.masks, **found})
    counts = {name: (int(mask.sum()), mask.numel()) for name, mask in masks.items()}
    told = Forecast(loss, sum(r.slope for r in records), sum(r.bend for r in records), task.mean_loss())
    return Solved(replace(made, masks=masks, counts=counts, forecast=told), rounds=tuple(records))
