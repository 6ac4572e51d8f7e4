"""Carrying a choice out: the masks of every tensor under its own pattern, by scores or by a solver."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.core.budget import Target
from secateur.core.choose import broadcast, scores_of
from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.names import Named, unwrap
from secateur.core.patterns import Pattern, parse_pattern
from secateur.core.sockets import Criterion, Solver
from secateur.core.task import Task
from secateur.engine.compensating import Inputs, compensate
from secateur.engine.cutting import Plan
from secateur.engine.layer_records import LayerCut
from secateur.engine.planning.plans import Removal
from secateur.engine.removing import Choice, Removing, few
from secateur.engine.shrinking import thin
from secateur.surgery.blocks import remove_blocks

__all__ = ["Gone", "Kept", "digest_of", "masks_of", "plan_of", "scored", "solve_choice", "take_out"]

Kept = Mapping[str, tuple[str, int]]
"""Pattern in one word (empty: as it is) and weights kept, by tensor."""


@dataclass(frozen=True)
class _Chosen:
    pattern: Pattern
    units: int


def scored(task: Task, names: Mapping[str, Tensor] | Named, criterion: Criterion) -> Named:
    """Scores of some tensors, as everywhere: higher = keep.

    Raises:
        SecateurError: as the criterion.
    """
    return scores_of(criterion, task, Masks({n: torch.ones_like(p, dtype=torch.bool) for n, p in names.items()}))


def masks_of(scores: Named, kept: Kept) -> Masks:
    """The masks of a choice: the best units of every tensor under its own pattern, exactly as many as it keeps.

    Raises:
        UsageError: when a tensor cannot take its pattern, or cannot keep so many weights under it.
    """
    found = {}
    for name, (word, count) in kept.items():
        score = scores[name]
        if not word:
            found[name] = torch.ones_like(score, dtype=torch.bool)
            continue
        chosen = _chosen(name, tuple(score.shape), word, count)
        found[name] = chosen.pattern.mask(score, chosen.units)
    return broadcast(Masks(found))


def plan_of(masks: Masks, left_alone: Mapping[str, str]) -> Plan:
    """The masks as a plan that the rest of the engine carries out."""
    counts = {name: (int(mask.sum()), mask.numel()) for name, mask in masks.items()}
    return Plan(masks, counts, left_alone, Target("keep", float(masks.kept)), None, {})


def solve_choice(
    task: Task, masks: Masks, kept: Kept, solver: Solver, inputs: Inputs, forecast: bool
) -> tuple[Plan, list[LayerCut]]:
    """Let a solver choose as many weights of each tensor under its pattern, and move the others, in place.

    Raises:
        SecateurError: as the solver; the network is then as it was.
    """
    pruned = Masks({name: mask for name, mask in masks.items() if kept[name][0]})
    if not len(pruned):
        return plan_of(masks, {}), []
    patterns = {name: parse_pattern(kept[name][0]) for name in pruned}
    done, layers = compensate(task, plan_of(pruned, {}), solver, patterns, inputs, forecast)
    whole = Masks({name: done.masks[name] if name in done.masks else mask for name, mask in masks.items()})
    made = plan_of(whole, {})
    return Plan(made.masks, made.counts, {}, made.target, done.forecast, {}), layers


def digest_of(model: nn.Module) -> str:
    """SHA-256 of all weights and buffers with their names and shapes."""
    found = hashlib.sha256()
    for name, tensor in sorted(unwrap(model).state_dict().items()):
        if isinstance(tensor, Tensor):
            whole = tensor.detach().cpu().contiguous()
            found.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
            found.update(whole.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Gone:
    """A network without some units or blocks.

    Args:
        model: the network handed in, or a graph in its place.
        figures: before and after, by name.
        groups: units kept and all, by group.
        graph: whether it can only be built again from its graph.
        units: indices of the units that went, by group.
    """

    model: nn.Module
    figures: Mapping[str, tuple[int, int]]
    groups: Mapping[str, tuple[int, int]]
    graph: bool
    units: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def take_out(task: Task, removal: Removal, optimizer: Optimizer | None = None, also: Sequence[nn.Module] = ()) -> Gone:
    """Carry a removal out, in place: the units that it names, or those that its criterion chooses where it names none.

    Raises:
        UsageError: for averaged copies where whole blocks go; for units that the network does not have.
        SecateurError: as surgery; nothing was changed then.
    """
    if removal.blocks:
        if also:
            raise UsageError("averaged copies cannot follow when blocks go; begin a new average afterwards.")
        short = remove_blocks(task.model, few(task), removal.blocks, optimizer=optimizer)
        return Gone(short.model, {"params": short.params}, {}, True)
    choice = Choice(only=tuple(removal.groups))
    went: dict[str, tuple[int, ...]] = {}

    def told(plan: Removing) -> None:
        went.update({name: tuple(sorted(units)) for name, units in plan.units.items() if units})

    done = thin(
        task, removal.to, removal.criterion, choice, optimizer=optimizer, also=also, told=told,
        units=removal.units or None,
    )  # fmt: skip
    figures = {name: (n, done.after[name]) for name, n in done.before.items()}
    return Gone(done.model, figures, done.groups, done.rewritten, went)


def _chosen(name: str, shape: tuple[int, ...], word: str, count: int) -> _Chosen:
    pattern = parse_pattern(word)
    pattern.check(name, shape)
    size, fixed = pattern.unit_size(shape), pattern.fixed(shape)
    units, rest = divmod(count, size)
    if rest or not 0 < units <= pattern.units(shape) or (fixed is not None and units != fixed):
        wanted = f"exactly {fixed * size:,}" if fixed is not None else f"a multiple of {size}"
        raise UsageError(
            f"`{name}` of shape {shape} cannot keep {count:,} weights under {word}: it keeps {wanted}. "
            "Make the plan again."
        )
    return _Chosen(pattern, units)
