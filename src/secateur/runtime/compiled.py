"""A PyTorch network made into plans for the compiled core, callable on tensors and arrays."""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.core.errors import ModelError, UsageError
from secateur.runtime import planfile
from secateur.runtime.capture import Captured, NativeSegment, TorchSegment, capture
from secateur.runtime.paths import measured
from secateur.runtime.session import Session

__all__ = ["Compiled", "compile_network"]

TOLERANCE = 1e-4


class _Native:
    """A native segment with its session."""

    def __init__(self, part: NativeSegment, folder: Path, index: int, options: Mapping[str, Any]) -> None:
        path = folder / f"part{index}.safetensors"
        planfile.write(path, part.graph, part.weights)
        self.inputs = tuple(spec.name for spec in part.graph.inputs)
        self.outputs = tuple(part.graph.outputs)
        self._path, self._options = path, dict(options)
        self.session = Session(path, **options)

    def measure_paths(self, values: Mapping[str, Any]) -> None:
        """Chooses lists or blocks for each layer by the clock."""
        arrays = [_array(values[name]) for name in self.inputs]
        told = {key: self._options[key] for key in ("threads", "isa") if key in self._options}
        tuning = {**(self._options.get("tuning") or {}), **measured(self._path, *arrays, **told)}
        self.session.close()
        self.session = Session(self._path, **{**self._options, "tuning": tuning})

    def __call__(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        found = self.session(*(_array(values[name]) for name in self.inputs))
        return found if isinstance(found, tuple) else (found,)


class _Torch:
    """A part that stays in torch."""

    def __init__(self, part: TorchSegment) -> None:
        self.inputs, self.outputs, self.ops = part.inputs, part.outputs, part.ops
        self.module = part.module
        self.last_ms = 0.0

    def __call__(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        start = time.perf_counter()
        with torch.no_grad():
            found = self.module(*(_tensor(values[name]) for name in self.inputs))
        self.last_ms = (time.perf_counter() - start) * 1e3
        return found if isinstance(found, tuple) else (found,)


def _array(value: Any) -> np.ndarray:
    return value.detach().contiguous().numpy() if isinstance(value, Tensor) else np.ascontiguousarray(value)


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))


class Compiled:
    """A network that runs on the compiled core.

    Call it with tensors or arrays, in the order of the network's inputs; it gives tensors when the first input is one,
    else arrays, and a tuple when there are several results. CPU only: a tensor on another device is refused rather
    than copied behind your back. It holds copies of the weights; the network it came from may go.

    Attributes:
        notes: What capture had to say: a fixed batch, weights that changed type, parts that stay in torch.
    """

    def __init__(self, captured: Captured, options: Mapping[str, Any]) -> None:
        self._captured = captured
        folder = Path(tempfile.mkdtemp(prefix="secateur-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._parts = [
            _Native(part, folder, index, options) if isinstance(part, NativeSegment) else _Torch(part)
            for index, part in enumerate(captured.segments)
        ]
        self.notes = captured.notes

    @property
    def whole(self) -> bool:
        """Whether nothing stays in torch."""
        return len(self._parts) == 1 and isinstance(self._parts[0], _Native)

    def __call__(self, *inputs: Any) -> Any:
        """The network's result: a tensor or an array, or a tuple of them."""
        specs = self._captured.inputs
        if len(inputs) != len(specs):
            raise UsageError(
                f"{len(inputs)} inputs given, the network takes {len(specs)}: {', '.join(s.name for s in specs)}."
            )
        for spec, value in zip(specs, inputs, strict=True):
            if isinstance(value, Tensor) and value.device.type != "cpu":
                raise UsageError(f"input '{spec.name}' is on {value.device}; this runs on the CPU: pass `.cpu()`.")
        values: dict[str, Any] = dict(zip((spec.name for spec in specs), inputs, strict=True))
        for part in self._parts:
            values.update(zip(part.outputs, part(values), strict=True))
        as_tensors = bool(inputs) and isinstance(inputs[0], Tensor)
        found = tuple((_tensor if as_tensors else _array)(values[name]) for name in self._captured.outputs)
        return found[0] if len(found) == 1 else found

    def measure_paths(self, *inputs: Any) -> None:
        """Times both ways to run each layer, on these inputs, and keeps the faster: `secateur.runtime.measured`."""
        values: dict[str, Any] = dict(zip((spec.name for spec in self._captured.inputs), inputs, strict=True))
        for part in self._parts:
            if isinstance(part, _Native):
                part.measure_paths(values)
            values.update(zip(part.outputs, part(values), strict=True))

    def prepare(self, batch: int = 1) -> None:
        """Plans a batch size ahead of its first call."""
        for part in self._parts:
            if isinstance(part, _Native):
                part.session.prepare(batch)

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes the plan, as ``plan.safetensors`` when ``path`` is a folder; running it needs no torch.

        Raises:
            ModelError: when parts of the network stay in torch.
            FileError: when it cannot be written; nothing is left half-written.
        """
        if not self.whole:
            ops = sorted({op for part in self._parts if isinstance(part, _Torch) for op, _ in part.ops})
            raise ModelError(f"parts of this network stay in torch and cannot go into a file: {', '.join(ops)}.")
        target = Path(path)
        if target.is_dir() or not target.suffix:
            target = target / "plan.safetensors"
        planfile.write(target, self._captured.graph, self._captured.weights)
        return target

    def explain(self, *inputs: Any, rounds: int = 5) -> list[dict[str, Any]]:
        """One row a step: node, op, path, reason, zeros, milliseconds and share of the whole.

        Args:
            inputs: Inputs to time it with; without them the milliseconds are zero and batch 1 is described.
            rounds: Timed runs; the median counts.
        """
        rows = self._rows(1) if not inputs else self._timed(inputs, rounds)
        total = sum(row["ms"] for row in rows) or 1.0
        return [{**row, "share": row["ms"] / total} for row in rows]

    def _timed(self, inputs: tuple[Any, ...], rounds: int) -> list[dict[str, Any]]:
        batch = int(np.shape(inputs[0])[0]) if np.ndim(inputs[0]) else 1
        self(*inputs)
        sessions = [part.session for part in self._parts if isinstance(part, _Native)]
        for session in sessions:
            session.profile(True)
        try:
            tables = []
            for _ in range(max(1, rounds)):
                self(*inputs)
                tables.append(self._rows(batch))
        finally:
            for session in sessions:
                session.profile(False)
        return [{**rows[0], "ms": float(np.median([row["ms"] for row in rows]))} for rows in zip(*tables, strict=True)]

    def _rows(self, batch: int) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for part in self._parts:
            if isinstance(part, _Native):
                steps = part.session.explain(batch)["steps"]
                rows += [{"ms": 0.0, "nonzeros": 0, "weights": 0, **step} for step in steps]
            else:
                names = ", ".join(dict.fromkeys(op for op, _ in part.ops))
                where = ", ".join(dict.fromkeys(where for _, where in part.ops if where))
                rows.append({"node": where, "op": names, "path": "torch", "reason": "the runtime has no such operator",
                             "ms": part.last_ms, "nonzeros": 0, "weights": 0})  # fmt: skip
        return rows


def compile_network(
    model: nn.Module,
    example_inputs: Any,
    *,
    threads: int | None = None,
    strict: bool = False,
    verify: bool = True,
    measure_paths: bool = False,
    **options: Any,
) -> Compiled:
    """Make a network run on the compiled core.

    Args:
        model: A network, as it acts in evaluation mode; left as it is.
        example_inputs: One batch as the network takes it. The batch size is free wherever torch can trace it so.
        threads: Threads of the core; None takes one for each core that this process may use.
        strict: Refuse operators that the core lacks, instead of running them in torch.
        verify: Compare the result with torch's on the example, and refuse a difference above 1e-4 of the largest value.
        measure_paths: Choose between lists and blocks for each layer by the clock, on the example, instead of by rule.
        options: Further options of `secateur.runtime.Session`.

    Raises:
        CaptureError: the network cannot be captured, or ``strict`` finds an unknown operator.
        ModelError: the compiled network does not compute what torch does.
    """
    compiled = Compiled(capture(model, example_inputs, strict=strict), {"threads": threads, **options})
    if measure_paths:
        compiled.measure_paths(*(_single(t.detach()) for t in _flat(example_inputs)))
    if verify:
        _verify(model, compiled, example_inputs)
    return compiled


def _single(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _flat(example: Any) -> tuple[Any, ...]:
    if isinstance(example, Tensor):
        return (example,)
    return tuple(example.values() if isinstance(example, Mapping) else example)


def _verify(model: nn.Module, compiled: Compiled, example: Any) -> None:
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            raw = model(**example) if isinstance(example, Mapping) else model(*_flat(example))
    finally:
        for module, flag in training.items():
            module.training = flag
    wanted = [t.float() for t in pytree.tree_leaves(raw) if isinstance(t, Tensor)]
    low = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    found = compiled(*(_single(t.detach()) for t in _flat(example)))
    for index, (a, b) in enumerate(zip(wanted, found if isinstance(found, tuple) else (found,), strict=True)):
        worst, scale = float((a - b).abs().max()) if a.numel() else 0.0, float(a.abs().max()) if a.numel() else 1.0
        if not worst <= (0.05 if low else TOLERANCE) * max(scale, 1e-3) and not bool(a.isnan().any()):
            raise ModelError(
                f"result {index} of the compiled network differs from torch's by {worst:.3g} (largest value "
                f"{scale:.3g}). Please report the network; `verify=False` skips this check."
            )
