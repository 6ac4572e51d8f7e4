"""What a solver would do to each layer at every density, from the inputs of the network as it is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from secateur.core.budget import Target
from secateur.core.masks import Masks
from secateur.core.names import Named, owners
from secateur.core.patterns import Pattern
from secateur.core.sockets import Solver
from secateur.core.task import Task
from secateur.engine.cautions import Caution
from secateur.engine.compensating import LAYERS, compensate
from secateur.engine.cutting import Plan
from secateur.engine.planning.changes import Solved, mask_of


def solved(
    task: Task, scores: Named, patterns: Mapping[str, Sequence[Pattern]], densities: Sequence[float], solver: Solver
) -> dict[str, Solved]:
    """The changes of every layer that a solver can work on; others are left out.

    Args:
        task: network, loss and the examples that give the inputs.
        scores: how the kept weights are spread over the groups of a convolution.
        patterns: of each tensor.
        densities: the rungs, falling.
        solver: chooses and compensates.

    Cost: for each pattern and density a pass over the examples and the solver's own for each layer; a copy of the
    network for each, without what is no layer.
    """
    names = _layers(task, patterns)
    changes: dict[str, dict[str, list[Tensor]]] = {name: {} for name in names}
    for pattern in {str(p): p for name in names for p in patterns[name]}.values():
        own = [name for name in names if pattern in patterns[name]]
        fixed = [pattern.fixed(tuple(scores[name].shape)) is not None for name in own]
        for density in densities[-1:] if all(fixed) else densities:
            masks = Masks({name: mask_of(scores[name], pattern, density) for name in own})
            for name, change in _changes(task, masks, pattern, solver).items():
                changes[name].setdefault(str(pattern), []).append(change)
    weights = task.params()
    return {name: Solved(weights[name].detach(), every) for name, every in changes.items()}


def _layers(task: Task, names: Mapping[str, Sequence[Pattern]]) -> list[str]:
    """Tensors of which every holder is a linear or convolution layer that is called as a module."""
    held = owners(task.model)
    fits = [n for n in names if n.endswith("weight") and all(isinstance(m, LAYERS) for m in held[n])]
    places = {f"{name} {i}": module for name in fits for i, module in enumerate(held[name])}
    called = task.collect(places, lambda *_: True)
    return [name for name in fits if all(f"{name} {i}" in called for i in range(len(held[name])))]


def _changes(task: Task, masks: Masks, pattern: Pattern, solver: Solver) -> Named:
    before = task.params()
    trial = replace(task, model=copy.deepcopy(task.model))
    counts = {name: (int(mask.sum()), mask.numel()) for name, mask in masks.items()}
    planned = Plan(masks, counts, {}, Target("keep", float(masks.kept)), None, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Caution)  # they are told when the choice is carried out
        compensate(trial, planned, solver, pattern, "dense", forecast=False)
    after = trial.params()
    with torch.no_grad():
        return {name: after[name].detach() - before[name].detach() for name in masks}
