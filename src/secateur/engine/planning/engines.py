"""Engines that zeros do not make faster: what their layers take, whatever the density."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import UsageError, nearest
from secateur.core.names import owners
from secateur.core.prunable import coverage
from secateur.core.task import call, frozen
from secateur.engine import racing
from secateur.engine.machine import torch_threads
from secateur.engine.planning.costs import NetworkCost
from secateur.engine.planning.curves import Curve

__all__ = ["ENGINES", "LayerClock", "forecast"]

ENGINES = ("secateur", "torch", "onnxruntime")
ROUNDS, WARMUP = 15, 3


def forecast(engine: str, model: nn.Module, example: Any, threads: int | None, patterns: Sequence[str]) -> NetworkCost:
    """The cost of a network on an engine that computes with zeros as with other numbers: level curves.

    Args:
        engine: ``torch`` (on the network's own device) or ``onnxruntime``.
        model: The network.
        example: One batch.
        threads: On the CPU; None takes torch's.
        patterns: In words.

    Raises:
        UsageError: an unknown engine; or ONNX Runtime is not installed.
        ModelError: nothing in the network can be pruned.
    """
    tensors = coverage(model).prunable
    if engine == "torch":
        whole, dense, device = _torch(model, example, threads, list(tensors))
    elif engine == "onnxruntime":
        whole, dense, device = _onnxruntime(model, example, threads), {}, "cpu"
    else:
        raise UsageError(f"no engine is called {engine!r}. {nearest(engine, ENGINES)}")
    why = f"{engine} does not tell its time, which zeros would not change"
    left = {name: why for name in tensors if name not in dense}
    curves = {name: {pattern: Curve((0.0, 1.0), (ms, ms)) for pattern in patterns} for name, ms in dense.items()}
    fixed = max(0.0, whole - sum(dense.values()))
    batch = len(_tuple(example)[0])
    count = threads or torch.get_num_threads()
    note = f"{engine} takes as long for zeros as for other numbers: only smaller layers make it faster"
    return NetworkCost(curves, dense, fixed, 0.0, engine, device, count, batch, left, 1.0, (note,))


class LayerClock:
    """Milliseconds of the modules that hold some tensors, on any device: by events on CUDA, else by the clock.

    Args:
        net: The network.
        tensors: Names that count.
        device: Where it runs.
    """

    def __init__(self, net: nn.Module, tensors: Sequence[str], device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._open: dict[nn.Module, Any] = {}
        self._spans: list[tuple[str, Any, Any]] = []
        self._hooks: list[Any] = []
        held: dict[nn.Module, list[str]] = {}
        for name, holders in owners(net).items():
            for module in holders if name in tensors else ():
                held.setdefault(module, []).append(name)
        for module, names in held.items():
            self._hooks.append(module.register_forward_pre_hook(self._before))
            self._hooks.append(module.register_forward_hook(self._after(names[0])))
        self.names = [names[0] for names in held.values()]

    def close(self) -> None:
        """Takes the hooks off the network."""
        for hook in self._hooks:
            hook.remove()

    def round(self, act: Callable[[], object]) -> tuple[float, dict[str, float]]:
        """Milliseconds of one call, and of each module in it, under the name of its first tensor."""
        self._spans.clear()
        self._wait()
        began = self._mark()
        act()
        ended = self._mark()
        self._wait()
        found: dict[str, float] = {}
        for name, first, last in self._spans:
            found[name] = found.get(name, 0.0) + self._between(first, last)
        return self._between(began, ended), found

    def _before(self, module: nn.Module, *_: Any) -> None:
        self._open[module] = self._mark()

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, *_: Any) -> None:
            self._spans.append((name, self._open.pop(module), self._mark()))

        return hook

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, first: Any, last: Any) -> float:
        return float(first.elapsed_time(last)) if self._cuda else (last - first) * 1e3

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)


def _torch(
    model: nn.Module, example: Any, threads: int | None, tensors: Sequence[str]
) -> tuple[float, dict[str, float], str]:
    device = next(model.parameters()).device
    given = _moved(example, device)
    clock = LayerClock(model, tensors, device)
    try:
        with frozen(model), torch.inference_mode(), torch_threads(threads or torch.get_num_threads()):
            rounds = [clock.round(lambda: call(model, given)) for _ in range(WARMUP + ROUNDS)][WARMUP:]
    finally:
        clock.close()
    layers = {name: statistics.median(found.get(name, 0.0) for _, found in rounds) for name in clock.names}
    whole = statistics.median(ms for ms, _ in rounds)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return whole, {name: ms for name, ms in layers.items() if ms > 0}, name


def _onnxruntime(model: nn.Module, example: Any, threads: int | None) -> float:
    inputs = _tuple(_moved(example, torch.device("cpu")))
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        path = Path(folder) / "net.onnx"
        racing.to_onnx(model, inputs, path)
        run = racing.onnxruntime(path, inputs, threads or torch.get_num_threads())
        times = []
        for _ in range(WARMUP + ROUNDS):
            began = time.perf_counter()
            run()
            times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[WARMUP:])


def _moved(example: Any, device: torch.device) -> Any:
    if isinstance(example, Tensor):
        return example.to(device)
    if isinstance(example, Mapping):
        return {name: value.to(device) for name, value in example.items()}
    return tuple(value.to(device) for value in example)


def _tuple(example: Any) -> tuple[Tensor, ...]:
    if isinstance(example, Tensor):
        return (example,)
    return tuple(example.values() if isinstance(example, Mapping) else example)
