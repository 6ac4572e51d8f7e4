"""What a network costs in milliseconds, layer by layer: everything that a forecast of any plan of it needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

from torch import nn

from secateur.core.errors import UsageError, nearest
from secateur.core.patterns import parse_pattern
from secateur.core.streams import stream
from secateur.engine.planning.curves import Curve

__all__ = ["Curve", "NetworkCost", "network_cost", "random_plans"]


@dataclass(frozen=True)
class NetworkCost:
    """Milliseconds of a network's layers against their density.

    Attributes:
        layers: Prunable tensor to pattern (``unstructured``, ``4x1``, ``2:4``) to curve.
        dense: Milliseconds of each layer as it is now.
        fixed: Milliseconds of everything else, what a call costs in itself included.
        error: Relative error that nine of ten plans stay within, from plans that were opened anew and timed, and
            shapes that were held out; no less than a tenth while such plans of this network are few.
        engine: ``secateur``, ``torch`` or ``onnxruntime``.
        isa: Instruction set of the compiled core; the device of torch.
        threads: Threads.
        batch: Examples in a call.
        left: Tensors without a curve, and why.
        factor: What the table's milliseconds were multiplied by, so that they agree with the machine's speed now.
        notes: What a user may want to know.
        network: Name of the network in the table; empty for engines that are not kept there.
        measured: Figures of layers that were measured for it now; all others were known.
        engines: What a call takes, as it is, in other engines, where `secateur calibrate --engine` measured them.
    """

    layers: Mapping[str, Mapping[str, Curve]]
    dense: Mapping[str, float]
    fixed: float
    error: float
    engine: str = "secateur"
    isa: str = ""
    threads: int = 1
    batch: int = 1
    left: Mapping[str, str] = field(default_factory=dict)
    factor: float = 1.0
    notes: tuple[str, ...] = ()
    network: str = ""
    measured: int = 0
    engines: Mapping[str, float] = field(default_factory=dict)

    @property
    def now(self) -> float:
        """Milliseconds of the network as it is."""
        return self.fixed + sum(self.dense.values())

    def total(self, chosen: Mapping[str, tuple[str, float]]) -> float:
        """Milliseconds of a plan: tensor to pattern and density. Tensors that it does not name stay as they are.

        Raises:
            UsageError: a tensor or pattern without a curve.
        """
        taken = {name: self.at(name, *choice) for name, choice in chosen.items()}
        return self.now + sum(ms - self.dense[name] for name, ms in taken.items())

    def at(self, name: str, pattern: str, density: float) -> float:
        """Milliseconds of one layer under a pattern at a density.

        Raises:
            UsageError: a tensor or pattern without a curve.
        """
        curves = self.layers.get(name)
        if curves is None:
            why = self.left.get(name)
            raise UsageError(
                f"there is no forecast of milliseconds for {name!r}: {why}."
                if why
                else f"no tensor with a forecast is called {name!r}. {nearest(name, self.layers)}"
            )
        if pattern not in curves:
            raise UsageError(f"{name!r} has no forecast for the pattern {pattern!r}. {nearest(pattern, curves)}")
        return curves[pattern].at(density)

    def times(self, factor: float) -> NetworkCost:
        """The cost on a machine that takes so many times as long."""
        layers = {name: {word: curve.times(factor) for word, curve in by.items()} for name, by in self.layers.items()}
        dense = {name: factor * ms for name, ms in self.dense.items()}
        return replace(self, layers=layers, dense=dense, fixed=factor * self.fixed, factor=factor * self.factor)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        single = ("fixed", "error", "engine", "isa", "threads", "batch", "factor", "network", "measured")
        plain = {name: getattr(self, name) for name in single}
        curves = {n: {p: curve.to_json() for p, curve in by.items()} for n, by in self.layers.items()}
        several = {name: dict(getattr(self, name)) for name in ("dense", "left", "engines")}
        return {**plain, **several, "notes": list(self.notes), "layers": curves}


def network_cost(
    model: nn.Module,
    example: Any,
    *,
    threads: int | None = None,
    patterns: Sequence[str] = ("unstructured",),
    engine: str = "secateur",
    measure: bool = True,
    cache: str | PathLike[str] | None = None,
    captured: Any = None,
) -> NetworkCost:
    """Milliseconds of every layer of a network against density and pattern, as it runs compiled from a file.

    What is not yet known is measured in the network itself, with random zeros, and remembered for each processor,
    layer and pattern: another plan, or another network with the same layers, measures only a few calls, by which the
    remembered figures are brought to the machine's speed of the moment.

    Args:
        model: The network, on the CPU; left as it is.
        example: One batch as it takes it.
        threads: Threads of the engine; None takes one for each core that this process may use.
        patterns: In words: ``unstructured``, ``4x1``, ``2:4``.
        engine: ``secateur``, or an engine that zeros do not make faster: ``torch``, ``onnxruntime``.
        measure: Whether layers that are not known may be measured; else their curves come from known shapes.
        cache: Folder of the memory; None takes ``$SECATEUR_CACHE`` or ``~/.cache/secateur``.
        captured: The network as `secateur.runtime.capture.capture` gives it, where that was done already.

    Raises:
        UsageError: an unknown engine or pattern; or no compiled core, without which there is no clock.
        CaptureError: the network cannot be captured.
        ModelError: it has no layer that can be pruned.

    Cost: what is not known takes about twenty versions of the network, packed and called some dozen times each; else
    one capture and some calls.
    """
    from secateur.engine.planning import engines, measuring

    words = tuple(dict.fromkeys(str(parse_pattern(word)) for word in patterns))
    if not words:
        raise UsageError("no pattern is given; name at least one, such as `unstructured`.")
    if engine == "secateur":
        return measuring.forecast(model, example, threads, words, measure, cache, captured=captured)
    return engines.forecast(engine, model, example, threads, words)


def random_plans(
    cost: NetworkCost, count: int, seed: int = 0, least: float = 0.005, dense: float = 0.2
) -> list[dict[str, tuple[str, float]]]:
    """Plans drawn at random, each a function of the seed and its number: to compare forecasts with the clock.

    Args:
        cost: Of the network.
        count: How many.
        seed: Of everything random.
        least: Densities lie between this and 1, log-uniform.
        dense: Share of the layers that are left as they are.
    """
    import torch

    plans = []
    for number in range(count):
        generator = stream(seed, "random plan", number)
        chosen: dict[str, tuple[str, float]] = {}
        for name, curves in cost.layers.items():
            stay, which, place = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
            pattern = sorted(curves)[int(which * len(curves))]
            fixed = curves[pattern].densities if ":" in pattern else ()
            if stay >= dense:
                chosen[name] = (pattern, fixed[0] if fixed else math.exp(place * math.log(least)))
        plans.append(chosen)
    return plans
