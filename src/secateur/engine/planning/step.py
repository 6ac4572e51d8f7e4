"""The step of a recipe that carries a plan out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from secateur.core.errors import UsageError
from secateur.core.task import Task
from secateur.engine.cautions import heard
from secateur.engine.folder import REWRITTEN
from secateur.engine.planning.plans import LayerPlan
from secateur.engine.planning.verbs import carry, refuse_masks
from secateur.engine.recovering import Recovery
from secateur.engine.start import State
from secateur.engine.steps import PruneStep

__all__ = ["prune_by_plan"]


def prune_by_plan(
    step: PruneStep, task: Task, state: State, recovery: Recovery, say: Callable[[str], None]
) -> dict[str, Any]:
    """Prune the network of a run as a plan file says.

    Args:
        step: names the plan.
        task: the network, with the examples that scores and losses are computed on.
        state: of the run; it gets the masks, and the smaller network where units went.
        recovery: of the network before; it goes on with the smaller network.
        say: hears what the user should know.

    Returns:
        What the card holds, the forecast beside what came of it among it (``planned``).

    Raises:
        FileError: when the plan cannot be read.
        UsageError: when it was made for another network, or the network is pruned already.
    """
    plan = LayerPlan.open(step.plan)
    refuse_masks(state.masks)
    if plan.removal is not None and step.recover not in ("batchnorm", "nothing"):
        raise UsageError(
            f'prune: recover = "{step.recover}" goes by the network before, and the plan removes units of it. Use '
            '"batchnorm" or "nothing".'
        )
    with heard() as cautions:
        cut, gone = carry(task, plan)
    for text in (*cautions, *cut.planned.notes):
        say(text)
    state.net, state.masks, state.left_alone = cut.model, cut.masks, dict(cut.plan.left_alone)
    recovery.task = replace(task, model=state.net)
    if gone is not None:
        if gone.graph:
            state.model = {**state.model, "use": REWRITTEN, "options": {}}
        state.shrunk = {name: list(pair) for name, pair in gone.figures.items()}
    return {
        "forecast": cut.plan.forecast.to_json() if cut.plan.forecast else None, "target": plan.target,
        "layers": [layer.to_json() for layer in cut.layers], "rounds": [], "cautions": cautions, "scores": None,
        "planned": cut.planned.to_json(),
    }  # fmt: skip
