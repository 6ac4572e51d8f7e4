"""Pruning layer by layer: which weights go, and how the others make up for them, from the inputs of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.core.errors import ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import owners
from secateur.core.patterns import NM, Pattern
from secateur.core.prunable import coverage
from secateur.core.sockets import Solver, blame
from secateur.core.task import Task
from secateur.engine.cautions import Seen, check_ranks, check_slope, seen
from secateur.engine.cutting import Forecast, Plan, aim, plan
from secateur.engine.layer_records import LayerCut, Rises
from secateur.linalg.grams import Gram, grams

Inputs = Literal["sequential", "dense"]
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NOT_A_LAYER = "only linear and convolution layers have inputs to solve with"
NOT_CALLED = "its layer is never called as a module (the weight is used in another way), so its inputs are unknown"


def plan_layers(
    task: Task, solver: Solver, *choices: Any, only: Sequence[str] = (), skip: Sequence[str] = (), **options: Any
) -> Plan:
    """How many weights each layer keeps; as :func:`secateur.plan`, for the tensors that a solver can work on.

    Criterion and allocation decide the counts only; which weights are kept is the solver's choice.

    Raises:
        UsageError: for a network that is pruned already.
        ModelError: when no tensor belongs to a linear or convolution layer that is called as a module.
        SecateurError: as :func:`secateur.plan`.
    """
    before = options.pop("masks", None)
    if before and any(not bool(mask.all()) for mask in before.values()):
        raise UsageError(
            f"{type(solver).__name__} begins with a dense network; this one is pruned already. Pass the dense one, or "
            "prune further without a solver."
        )
    given = {**dict(zip(("to", "criterion", "allocation", "pattern"), choices, strict=False)), **options}
    found = coverage(task.model, only, skip, aim(given.get("to"), given.get("pattern"))[1])
    held = owners(task.model)
    foreign = _foreign(task, {name: _layers(name, held[name]) for name in found.prunable})
    if len(foreign) == len(found.prunable):
        reasons = "; ".join(dict.fromkeys(foreign.values()))
        raise ModelError(f"none of {', '.join(foreign)} belongs to a layer that a solver can work on: {reasons}.")
    chosen = [name for name in found.prunable if name not in foreign] if only else ()
    made = plan(task, only=chosen, skip=() if chosen else (*skip, *foreign), **{**given, "forecast": False})
    left = {name: foreign.get(name, why) for name, why in made.left_alone.items()}
    return replace(made, left_alone=left)


def check_layers(task: Task, made: Plan) -> None:
    """Refuse a plan with tensors that a solver cannot work on.

    Raises:
        UsageError: naming them and the reason.
    """
    held = owners(task.model)
    foreign = _foreign(task, {name: _layers(name, held[name]) for name in made.masks})
    if foreign:
        names = ", ".join(f"`{name}`" for name in foreign)
        raise UsageError(
            f"the plan prunes {names}, but {next(iter(foreign.values()))}. Pass the target instead of the plan, or "
            "leave them out of it (`skip`)."
        )


def compensate(
    task: Task,
    made: Plan,
    solver: Solver,
    pattern: Pattern | Mapping[str, Pattern],
    inputs: Inputs = "sequential",
    forecast: bool = True,
) -> tuple[Plan, list[LayerCut]]:
    """Prune the task's network in place, layer by layer in the order in which they run.

    Args:
        task: network, loss and the examples that layers are solved on.
        made: how many weights each tensor keeps.
        solver: chooses and compensates.
        pattern: which shapes zeros may take; one for all tensors, or one for each by name.
        inputs: ``"sequential"``: what reaches a layer once those before it are pruned; ``"dense"``: what reached it
            before anything was.
        forecast: forecast and measure the rise of the loss for every layer, on the first 256 examples (two backward
            passes and one forward pass each), and on all examples together at the end.

    Returns:
        The plan with the masks that the solver chose and the loss before and after, and a record for each layer.

    Raises:
        SecateurError: as the solver; layers that were done stay done only in a copy: the network is restored.

    Cost: a pass over the data for each layer (one in all with ``"dense"``), the solver's own, and the forecasts.
    """
    held, weights = owners(task.model), task.params()
    order = _in_order(task, {name: _layers(name, held[name]) for name in made.masks})
    before, rises = (task.mean_loss(), Rises(task)) if forecast else (0.0, None)
    early = _gram_of(task, order) if inputs == "dense" else {}
    backup = {name: weights[name].detach().clone() for name in order}
    masks, records, slope, bend = dict(made.masks), [], 0.0, 0.0
    ranks: dict[str, Seen] = {}
    try:
        for name, modules in order.items():
            gram = early.pop(name, None) or _gram_of(task, {name: modules})[name]
            ranks[name] = seen(gram)
            shape = pattern if isinstance(pattern, Pattern) else pattern[name]
            new, mask = _solve(solver, weights[name].detach(), gram, shape, made.masks[name], name)
            done = _record(name, weights[name].detach(), new, mask, gram)
            if rises is not None:
                first, second = rises.forecast(name, new - weights[name].detach())
                if not records:  # the others see a network that is cut already
                    check_slope(solver, first, second)
                slope, bend = slope + first, bend + (second or 0.0)
                done = replace(done, forecast=first + (second or 0.0))
            with torch.no_grad():
                weights[name].copy_(new)
            masks[name] = mask
            if rises is not None:
                done = replace(done, rise=rises.measured())
            records.append(done)
    except BaseException:
        with torch.no_grad():
            for name, weight in backup.items():
                weights[name].copy_(weight)
        raise
    check_ranks(ranks)
    whole = Masks(masks)
    counts = {name: (int(mask.sum()), mask.numel()) for name, mask in whole.items()}
    told = Forecast(before, slope, bend, task.mean_loss()) if forecast else None
    return replace(made, masks=whole, counts=counts, forecast=told), records


def _layers(name: str, holders: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules that multiply their inputs by this tensor; empty when one of its holders does something else."""
    fits = all(isinstance(m, LAYERS) for m in holders) and name.rpartition(".")[2] == "weight"
    return list(holders) if fits else []


def _foreign(task: Task, layers: Mapping[str, list[nn.Module]]) -> dict[str, str]:
    """Why a solver leaves a tensor alone; a tied one must be called at every place that holds it."""
    places = {f"{name} {i}": module for name, every in layers.items() for i, module in enumerate(every)}
    called = task.collect(places, lambda *_: True)
    silent = {name for name, every in layers.items() if any(f"{name} {i}" not in called for i in range(len(every)))}
    return {n: NOT_CALLED if n in silent else NOT_A_LAYER for n, every in layers.items() if n in silent or not every}


def _in_order(task: Task, layers: Mapping[str, list[nn.Module]]) -> dict[str, list[nn.Module]]:
    """Sorted by when a layer is first called; layers that never are stand last and are refused later by name."""
    called = task.collect({name: modules[0] for name, modules in layers.items()}, lambda *_: True)
    missing = [name for name in layers if name not in called]
    if missing:
        raise ModelError(
            f"layer `{missing[0]}` is never called as a module (its weight is used in another way), so its inputs are "
            f"unknown. Leave it out with `--skip '{missing[0]}'`."
        )
    return {name: layers[name] for name in called}


def _gram_of(task: Task, layers: Mapping[str, list[nn.Module]]) -> dict[str, Gram]:
    """The Gram matrix of each tensor's inputs; tied tensors add up those of all places."""
    places = {name: [name, *(f"{name} (place {i})" for i in range(2, len(m) + 1))] for name, m in layers.items()}
    found = grams(task, {place: m for name in layers for place, m in zip(places[name], layers[name], strict=True)})
    summed = {}
    for name, every in places.items():
        first, *more = (found[place] for place in every)
        positions = first.positions + sum(gram.positions for gram in more)
        matrix = sum((gram.matrix for gram in more), start=first.matrix)
        summed[name] = replace(first, matrix=matrix, positions=positions)
    return summed


def _solve(
    solver: Solver, weight: Tensor, gram: Gram, pattern: Pattern, planned: Tensor, name: str
) -> tuple[Tensor, Tensor]:
    """Group by group; each keeps what was planned for it. Columns run along the channels for N:M."""
    new, mask = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.bool)
    for part, matrix in _groups(weight, gram):
        rows, columns = weight[part], _columns(weight, pattern)
        flat = rows.flatten(1)
        if columns is not None:
            flat, matrix = flat[:, columns], matrix[columns][:, columns]
        with blame(solver):
            made, kept = solver(flat, matrix, pattern, int(planned[part].sum()))
        if int(kept.sum()) != int(planned[part].sum()) or bool((made[~kept] != 0).any()):
            raise UsageError(
                f"{solver} kept {int(kept.sum()):,} weights of `{name}` where {int(planned[part].sum()):,} were asked "
                "for, or left pruned ones that are not zero. Mend the solver."
            )
        if columns is not None:
            back = torch.argsort(columns)
            made, kept = made[:, back], kept[:, back]
        new[part], mask[part] = made.reshape(rows.shape).to(weight.dtype), kept.reshape(rows.shape)
    return new, mask


def _groups(weight: Tensor, gram: Gram) -> Iterator[tuple[slice, Tensor]]:
    groups = gram.matrix.shape[0]
    size = weight.shape[0] // groups
    for group in range(groups):
        yield slice(group * size, (group + 1) * size), gram.matrix[group]


def _columns(weight: Tensor, pattern: Pattern) -> Tensor | None:
    """The order of a row's entries: as stored (None), or channels last, where N:M groups lie next to each other."""
    if not isinstance(pattern, NM) or weight.ndim <= 2:
        return None
    return torch.arange(weight[0].numel(), device=weight.device).view(weight.shape[1], -1).t().flatten()


def _record(name: str, old: Tensor, new: Tensor, mask: Tensor, gram: Gram) -> LayerCut:
    error = zeroed = scale = 0.0
    for part, matrix in _groups(old, gram):
        rows = [t[part].flatten(1).to(matrix.dtype) for t in (old, new, mask)]
        energy = [float(((d @ matrix) * d).sum()) for d in (rows[1] - rows[0], rows[0] * (1 - rows[2]), rows[0])]
        error, zeroed, scale = error + energy[0], zeroed + energy[1], scale + energy[2]
    scale = scale or 1.0
    return LayerCut(name, int(mask.sum()), mask.numel(), error / scale, zeroed / scale)
