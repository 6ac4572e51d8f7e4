"""Engines that zeros do not make faster: what their layers take, whatever the density."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.core.errors import UsageError, nearest
from secateur.core.names import owners, unwrap
from secateur.core.prunable import coverage
from secateur.core.task import call, frozen
from secateur.engine import racing
from secateur.engine.machine import torch_threads
from secateur.engine.planning.clocks import QUARTILE, clocked, steady
from secateur.engine.planning.costs import NetworkCost
from secateur.engine.planning.curves import Curve
from secateur.engine.planning.table import CostTable
from secateur.runtime.paths import cpu_name

__all__ = ["ENGINES", "LayerClock", "as_it_is", "forecast", "known_times", "places"]

ENGINES = ("secateur", "torch", "onnxruntime")
ROUNDS, WARMUP = 15, 3
SECONDS, MOST = 0.3, 1000  # of the calls that a time is read off: about so long, at most so many


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
    count = _count(threads)
    note = f"{engine} takes as long for zeros as for other numbers: only smaller layers make it faster"
    return NetworkCost(curves, dense, fixed, 0.0, engine, device, count, batch, left, 1.0, (note,))


def places(engine: str, threads: int | None) -> dict[str, tuple[str, torch.device]]:
    """Where an engine runs here: a label, the name under which the table keeps its times, and the device.

    Args:
        engine: ``torch``, which also runs on a CUDA device where there is one, or ``onnxruntime``.
        threads: On the CPU.
    """
    try:
        label = f"{engine} {version(engine)}"
    except PackageNotFoundError:
        return {}
    cpu = f"{label} | {cpu_name()} | {_count(threads)} threads"
    found = {label: (cpu, torch.device("cpu"))}
    if engine == "torch" and torch.cuda.is_available():
        card = torch.cuda.get_device_name()
        found[f"{label} on {card}"] = (f"{label} | {card}", torch.device("cuda"))
    return found


def known_times(table: CostTable, network: str, threads: int) -> dict[str, float]:
    """Milliseconds of a network as it is in the engines that were measured here: label to time.

    Args:
        table: Of costs.
        network: Its name there.
        threads: On the CPU.
    """
    if not table.engines:
        return {}
    here = {label: name for engine in ENGINES[1:] for label, (name, _) in places(engine, threads).items()}
    return {label: table.engines[n][network] for label, n in here.items() if network in table.engines.get(n, {})}


def as_it_is(engine: str, model: nn.Module, example: Any, threads: int | None, device: torch.device) -> float:
    """Milliseconds of a call of a network on a device; a copy is moved there, and the clock waits for its work.

    Args:
        engine: ``torch`` or ``onnxruntime``.
        model: The network, left as it is.
        example: One batch.
        threads: On the CPU.
        device: Where.
    """
    if engine == "onnxruntime":
        return _onnxruntime(model, example, threads)
    there = model if next(model.parameters()).device == device else copy.deepcopy(unwrap(model)).to(device)
    given = _moved(example, device)
    with frozen(there), torch.inference_mode(), torch_threads(_count(threads)):
        return _call_ms(lambda: call(there, given), threads, device)


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
    whole = as_it_is("torch", model, example, threads, device)
    clock = LayerClock(model, tensors, device)
    try:
        with frozen(model), torch.inference_mode(), torch_threads(_count(threads)):
            rounds = [clock.round(lambda: call(model, given)) for _ in range(WARMUP + ROUNDS)][WARMUP:]
    finally:
        clock.close()
    layers = {name: statistics.median(found.get(name, 0.0) for _, found in rounds) for name in clock.names}
    slowed = max(1.0, statistics.median(ms for ms, _ in rounds) / whole)  # the clock in each layer takes time too
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return whole, {name: ms / slowed for name, ms in layers.items() if ms > 0}, name


def _onnxruntime(model: nn.Module, example: Any, threads: int | None) -> float:
    cpu = torch.device("cpu")
    inputs = _tuple(_moved(example, cpu))
    there = model if next(model.parameters()).device == cpu else copy.deepcopy(unwrap(model)).cpu()
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder, frozen(there):
        path = Path(folder) / "net.onnx"
        racing.to_onnx(there, inputs, path)
        return _call_ms(racing.onnxruntime(path, inputs, _count(threads)), threads, cpu)


def _call_ms(act: Callable[[], object], threads: int | None, device: torch.device) -> float:
    """Lower quartile of the calls that nothing disturbed, as the compiled core's times are."""

    def whole() -> None:
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(WARMUP):
        whole()
    count = _count(threads) if device.type == "cpu" else 2  # of one thread the processor's time may be taken instead
    calls: list[tuple[float, bool]] = []
    began = time.perf_counter()
    while len(calls) < ROUNDS or time.perf_counter() - began < SECONDS and len(calls) < MOST:
        calls.append(clocked(whole, count))
    return float(np.percentile(steady(calls), QUARTILE))


def _count(threads: int | None) -> int:
    return threads or torch.get_num_threads()


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
