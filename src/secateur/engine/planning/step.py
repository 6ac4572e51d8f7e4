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
    step: PruneStep,
    task: Task,
    state: State,
    recovery: Recovery,
    say: Callable[[str], None],
    draw: Callable[[int, int], Task],
) -> dict[str, Any]:
    """Prune the network of a run as a plan file says, by the examples that it was made with.

    Args:
        step: names the plan.
        task: the network, with the examples that statistics are taken on.
        state: of the run; it gets the masks, and the smaller network where units went.
        recovery: of the network before; it goes on with the smaller network.
        say: hears what the user should know.
        draw: the network with so many examples, drawn with a seed.

    Returns:
        What the card holds, the forecast beside what came of it among it (``planned``).

    Raises:
        FileError: when the plan cannot be read.
        UsageError: when it was made for another network, or the network is pruned already.
    """
    plan = LayerPlan.open(step.plan)
    refuse_masks(state.masks)
    _refuse_methods(step, plan)
    if plan.removal is not None and step.recover not in ("batchnorm", "nothing"):
        raise UsageError(
            f'prune: recover = "{step.recover}" goes by the network before, and the plan removes units of it. Use '
            '"batchnorm" or "nothing".'
        )
    with heard() as cautions:
        drawn = draw(int(plan.data["examples"]), int(plan.data["seed"])) if plan.data else task
        cut, gone = carry(drawn, plan)
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


def _refuse_methods(step: PruneStep, plan: LayerPlan) -> None:
    """A criterion or solver beside a plan says only that the plan may use that class.

    Raises:
        UsageError: when the plan uses another one.
    """
    for name, usual in (("criterion", PruneStep().criterion), ("solver", None)):
        given, own = getattr(step, name), getattr(plan, name)
        scores = plan.removal.criterion if name == "criterion" and plan.removal is not None else own
        if given not in (usual, own, scores):
            raise UsageError(f"prune: {name} has no effect with this plan, which uses {own}; leave it out.")
