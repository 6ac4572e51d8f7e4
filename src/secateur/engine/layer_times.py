"""Where the time goes: milliseconds of each layer, compiled and dense in torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from secateur.core.names import owners
from secateur.core.task import call, frozen
from secateur.engine.machine import torch_threads
from secateur.probes._still import unchanged
from secateur.runtime.session import Session

__all__ = ["layer_times"]

ROUNDS, WARMUP = 15, 3


def layer_times(
    dense: nn.Module, plan: Path, tensors: Mapping[str, Any], example: Any, threads: int, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Milliseconds of every step of a compiled network, and of the layers of the dense one in torch, taken in turn.

    Args:
        dense: the dense network, on the CPU.
        plan: file or folder of the compiled network.
        tensors: names of the tensors whose layers count.
        example: inputs of one batch.
        threads: of both.
        rounds: calls of each that count; medians are taken.

    Returns:
        ``compiled``: a row a step, with ``node``, ``op``, ``path``, ``reason``, ``nonzeros``, ``weights``, ``ms`` (None
        without the compiled core) and ``tensors``, those that the step computes with. ``dense``: a row a module that
        holds one of the tensors, with ``tensors`` and ``ms``; the clock adds a few microseconds to each. ``dense_ms``:
        of the whole network meanwhile. ``isa``, ``threads``, ``batch``, ``rounds``.

    Cost: ``WARMUP + rounds`` calls of each.
    """
    inputs = example if isinstance(example, dict) else _tuple(example)
    arrays = [t.numpy() for t in (inputs.values() if isinstance(inputs, dict) else inputs)]
    batch = len(arrays[0]) if arrays and arrays[0].ndim else 1
    steps: list[list[dict[str, Any]]] = []
    with (
        Session(plan, threads=threads) as session, torch_threads(threads), unchanged(), frozen(dense),
        _Clock(dense, tensors) as clock,
    ):  # fmt: skip
        session.profile(True)
        timed = session.isa != "reference"  # whose steps have no clock
        for turn in range(WARMUP + rounds):
            clock.round(lambda: call(dense, example))
            if timed:
                session(*arrays)
            if turn >= WARMUP:
                steps.append(session.explain(batch)["steps"])
        roles = {node.name: tuple(node.weights.values()) for node in session.graph.nodes}
        about = {"isa": session.isa, "threads": threads, "batch": batch, "rounds": rounds}
    rows = [_row(row, roles, tensors, timed) for row in zip(*steps, strict=True)]
    return {**about, "compiled": rows, "dense": clock.rows(), "dense_ms": _median(clock.whole[WARMUP:])}


class _Clock:
    """Milliseconds of each call of a network, and of the modules in it that hold some tensors."""

    def __init__(self, net: nn.Module, tensors: Mapping[str, Any]) -> None:
        self.held: dict[nn.Module, list[str]] = {}
        for name, holders in owners(net).items():
            for module in holders if name in tensors else ():
                self.held.setdefault(module, []).append(name)
        self.whole: list[float] = []
        self.parts: dict[nn.Module, list[float]] = {module: [] for module in self.held}
        self._began: dict[nn.Module, float] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> _Clock:
        for module in self.held:
            self._hooks += [module.register_forward_pre_hook(self._before), module.register_forward_hook(self._after)]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def round(self, act: Callable[[], object]) -> None:
        """One call; a module that is called several times in it has them summed."""
        for times in self.parts.values():
            times.append(0.0)
        began = time.perf_counter()
        act()
        self.whole.append((time.perf_counter() - began) * 1e3)

    def rows(self) -> list[dict[str, Any]]:
        """A row a module that was called."""
        return [
            {"tensors": self.held[module], "ms": _median(times[WARMUP:])}
            for module, times in self.parts.items()
            if any(times)
        ]

    def _before(self, module: nn.Module, *_: Any) -> None:
        self._began[module] = time.perf_counter()

    def _after(self, module: nn.Module, *_: Any) -> None:
        self.parts[module][-1] += (time.perf_counter() - self._began[module]) * 1e3


def _row(
    steps: tuple[dict[str, Any], ...], roles: Mapping[str, tuple[str, ...]], tensors: Mapping[str, Any], timed: bool
) -> dict[str, Any]:
    """One step over all rounds."""
    first = steps[0]
    node = str(first["node"])
    kept = {key: first.get(key, 0) for key in ("op", "path", "reason", "nonzeros", "weights")}
    ms = _median([float(step["ms"]) for step in steps]) if timed else None
    return {"node": node, **kept, "ms": ms, "tensors": _tensors(node, roles.get(node, ()), tensors)}


def _tensors(node: str, weights: tuple[str, ...], tensors: Mapping[str, Any]) -> list[str]:
    """Prunable tensors that a step computes with: those it names, else those of the module it is named after."""
    found = [name for name in weights if name in tensors]
    return found or ([name for name in tensors if name.rpartition(".")[0] == node] if weights else [])


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 6)


def _tuple(example: Any) -> tuple[Any, ...]:
    return tuple(example) if isinstance(example, list | tuple) else (example,)
