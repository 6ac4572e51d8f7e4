"""The step of a recipe that carries a plan out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from secateur.core.task import Task
from secateur.engine.cautions import heard
from secateur.engine.planning.plans import LayerPlan
from secateur.engine.planning.verbs import carry_out_plan, refuse_masks
from secateur.engine.start import State

__all__ = ["prune_by_plan"]


def prune_by_plan(path: str, task: Task, state: State, say: Callable[[str], None]) -> dict[str, Any]:
    """Prune the network of a run as a plan file says.

    Args:
        path: the plan.
        task: the network, with the examples that scores and losses are computed on.
        state: of the run; it gets the masks.
        say: hears what the user should know.

    Returns:
        What the card holds, the forecast beside what came of it among it (``planned``).

    Raises:
        FileError: when the plan cannot be read.
        UsageError: when it was made for another network, or the network is pruned already.
    """
    plan = LayerPlan.open(path)
    refuse_masks(state.masks)
    with heard() as cautions:
        cut = carry_out_plan(task, plan)
    for text in (*cautions, *cut.planned.notes):
        say(text)
    state.masks, state.left_alone = cut.masks, dict(cut.plan.left_alone)
    return {
        "forecast": cut.plan.forecast.to_json() if cut.plan.forecast else None, "target": plan.target,
        "layers": [layer.to_json() for layer in cut.layers], "rounds": [], "cautions": cautions, "scores": None,
        "planned": cut.planned.to_json(),
    }  # fmt: skip
