"""Forecast beside truth: what a plan said of every layer and of the whole network, and what came of it."""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from secateur.core.errors import SecateurError
from secateur.core.names import unwrap
from secateur.engine.layer_records import LayerCut
from secateur.engine.planning.plans import LayerPlan, shown
from secateur.engine.planning.trying import arrays_of, call_ms, write_plan
from secateur.runtime.session import Session

__all__ = ["LayerOutcome", "Outcome", "compare_plan"]

_ROUNDS = 9


@dataclass(frozen=True)
class LayerOutcome:
    """One tensor.

    Args:
        name: the tensor.
        pattern: in one word; empty for a tensor that was left as it is.
        kept: weights kept.
        total: all its weights.
        loss_forecast: its share of the forecast rise of the loss.
        loss: measured rise when it was pruned, those before it pruned already; None where it was not measured.
        ms_before: forecast milliseconds of the layer as it was.
        ms_forecast: and as planned.
        ms: measured milliseconds of the step that computes with it, in the file.
    """

    name: str
    pattern: str
    kept: int
    total: int
    loss_forecast: float
    loss: float | None = None
    ms_before: float | None = None
    ms_forecast: float | None = None
    ms: float | None = None


@dataclass(frozen=True)
class Outcome:
    """A plan beside what came of it.

    Args:
        target: what was asked for.
        layers: every prunable tensor.
        figures: ``before``, ``forecast``, ``low``, ``high`` and ``measured`` of the whole network, by name.
        notes: what could not be measured, and why.
    """

    target: str
    layers: tuple[LayerOutcome, ...]
    figures: Mapping[str, Mapping[str, float | None]]
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the card."""
        layers = [asdict(layer) for layer in self.layers]
        figures = {name: dict(row) for name, row in self.figures.items()}
        return {"target": self.target, "layers": layers, "figures": figures, "notes": list(self.notes)}

    def since(self, loss: float) -> Outcome:
        """The same, told from the loss before units went."""
        return replace(self, figures={**self.figures, "loss": {**self.figures["loss"], "before": loss}})

    def __str__(self) -> str:
        """A line for each figure."""
        lines = [f"planned for {self.target}"]
        for name, row in self.figures.items():
            known = [when for when in ("before", "forecast", "measured") if row[when] is not None]
            lines.append(f"{name}: {', '.join(f'{when} {shown(name, row[when])}' for when in known)}")
        return "\n".join([*lines, *self.notes])


def compare_plan(
    plan: LayerPlan,
    measure: bool,
    model: nn.Module,
    example: Any,
    counts: Mapping[str, tuple[int, int]],
    cuts: Sequence[LayerCut],
    loss: tuple[float, float],
) -> Outcome:
    """What came of a plan: the loss tensor by tensor, the file written, timed and weighed.

    Args:
        plan: what was planned.
        measure: whether the pruned network is written as a file, weighed and timed.
        model: the pruned network.
        example: one batch of inputs on the CPU.
        counts: weights that it kept and all, by tensor.
        cuts: what pruning did to the loss, tensor by tensor.
        loss: mean loss before and after.
    """
    rises = {cut.name: cut.rise for cut in cuts}
    notes: list[str] = []
    times: dict[str, float] = {}
    figures = {name: {**vars(figure), "measured": None} for name, figure in plan.figures.items()}
    told = figures["loss"]["before"]
    apart = loss[0] - told if told is not None else 0.0  # the plan's losses may be those of fewer examples
    moved = {k: v + apart for k in ("forecast", "low", "high") if (v := figures["loss"][k]) is not None}
    figures["loss"] |= {**moved, "before": loss[0], "measured": loss[1]}
    if measure:
        try:
            found, times = _timed(model, example, plan)
            for name in ("ms", "bytes"):
                figures.setdefault(name, dict.fromkeys(("before", "forecast", "low", "high")))["measured"] = found[name]
        except SecateurError as error:
            notes.append(f"not timed: {error}")
    figures["params"]["measured"] = float(sum(counts[layer.name][0] for layer in plan.layers))
    figures["macs"]["measured"] = float(
        sum(counts[layer.name][0] * layer.before["macs"] // max(layer.total, 1) for layer in plan.layers)
    )
    layers = tuple(
        LayerOutcome(
            layer.name, layer.pattern, *counts[layer.name], layer.loss,
            rises.get(layer.name, 0.0 if not layer.pattern and rises else None),
            layer.before.get("ms"), layer.after.get("ms"), times.get(layer.name),
        )
        for layer in plan.layers
    )  # fmt: skip
    return Outcome(plan.target, layers, figures, tuple(notes))


def _timed(model: nn.Module, example: Any, plan: LayerPlan) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds and bytes of the file, and milliseconds by tensor."""
    threads = plan.machine.get("threads")
    cpu = copy.deepcopy(unwrap(model)).cpu().eval()
    with tempfile.TemporaryDirectory(prefix="secateur-plan-") as folder:
        path = Path(folder) / "plan.safetensors"
        write_plan(cpu, example, path)
        size = path.stat().st_size
        with Session(path, threads=threads) as session:
            ms = call_ms(session, example)
            by = _by_tensor(session, example, [layer.name for layer in plan.layers])
    return {"ms": ms, "bytes": float(size)}, by


def _by_tensor(session: Session, example: Any, names: Sequence[str]) -> dict[str, float]:
    """Median milliseconds of the steps that compute with each tensor; a step with several shares them equally."""
    if session.isa == "reference":  # its steps have no clock
        return {}
    arrays = arrays_of(example)
    batch = len(arrays[0]) if arrays and arrays[0].ndim else 1
    session.profile(True)
    rounds = []
    for _ in range(_ROUNDS):
        session(*arrays)
        rounds.append(session.explain(batch)["steps"])
    session.profile(False)
    weights = {node.name: tuple(node.weights.values()) for node in session.graph.nodes}
    found: dict[str, float] = {}
    for steps in zip(*rounds, strict=True):
        node = str(steps[0]["node"])
        used = weights.get(node, ())
        mine = [n for n in names if n in used] or [n for n in names if used and n.rpartition(".")[0] == node]
        for name in mine:
            found[name] = found.get(name, 0.0) + statistics.median(step["ms"] for step in steps) / len(mine)
    return found
