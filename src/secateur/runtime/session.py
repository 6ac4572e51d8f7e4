"""Runs a plan file: on the compiled core, or on the NumPy reference where there is none."""

from __future__ import annotations

import ctypes
import json
import weakref
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from secateur import _native
from secateur.core.errors import FileError, ModelError, UsageError
from secateur.runtime import planfile
from secateur.runtime.graph import Graph
from secateur.runtime.reference import Reference

__all__ = ["Session", "load"]

_TYPES = {0: np.dtype(np.float32), 1: np.dtype(np.int64)}
_CODES = {dtype: code for code, dtype in _TYPES.items()}
_ERRORS: dict[int, type[Exception]] = {1: FileError, 2: ModelError, 3: UsageError, 4: UsageError}
_MESSAGE = 1024


class _Call:
    """Calls one function of the core with room for its message; a code that is not 0 becomes an exception."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def __call__(self, name: str, *arguments: Any) -> None:
        text = ctypes.create_string_buffer(_MESSAGE)
        code = getattr(self._library, name)(*arguments, text, _MESSAGE)
        if code:
            kind = _ERRORS.get(code, RuntimeError)
            raise kind(text.value.decode("utf-8", "replace"))


def _describe(array: np.ndarray) -> _native.Tensor:
    tensor = _native.Tensor()
    tensor.data = array.ctypes.data
    tensor.dtype = _CODES[array.dtype]
    tensor.ndim = array.ndim
    tensor.shape[: array.ndim] = array.shape
    return tensor


class Session:
    """A plan with its threads and buffers.

    Call it with one array for each input (NumPy arrays, or anything ``numpy.asarray`` takes without a copy: float32,
    or int64 for token ids); it gives one array, or a tuple when the network has several outputs. The first run at a
    batch size plans it; the last four sizes are kept. Calls from several threads take turns.

    Args:
        source: A ``plan.safetensors`` file, or a folder that holds one.
        threads: How many threads to use; None takes one for each core that this process may use.
        isa: An instruction set of `isas`, or ``"auto"``.
        memory_limit: Bytes that activations and packed weights may take together.
        tuning: Choices that override the built-in rules.
        reference: Run the NumPy reference instead of the compiled core (slow; no threads).
    """

    def __init__(
        self,
        source: str | PathLike[str],
        *,
        threads: int | None = None,
        isa: str = "auto",
        memory_limit: int = 16 << 30,
        tuning: Mapping[str, Any] | None = None,
        reference: bool = False,
    ) -> None:
        self.path = _plan_path(source)
        if threads is not None and threads < 1:
            raise UsageError(f"threads is {threads}. Give a number from 1, or None for all cores.")
        self._reference: Reference | None = None
        self._handle = ctypes.c_void_p()
        library = _native.library()
        self.graph, weights = _open(self.path, library is None or reference)
        if library is None or reference:
            self.isa = "reference"
            self._reference = Reference(self.graph, weights)
            return
        self._library = library
        self._call = _Call(library)
        plan = ctypes.c_void_p()
        self._call("sec_plan_open", str(self.path).encode(), ctypes.byref(plan))
        options = _native.Options(
            threads or 0, 0, memory_limit, isa.encode(), json.dumps(dict(tuning)).encode() if tuning else None
        )
        try:
            self._call("sec_session_create", plan, ctypes.byref(options), ctypes.byref(self._handle))
        finally:
            library.sec_plan_free(plan)
        self._close = weakref.finalize(self, library.sec_session_free, ctypes.c_void_p(self._handle.value))
        self.isa = isa if isa != "auto" else library.sec_isas().decode().split()[0]

    def close(self) -> None:
        """Ends the threads and frees the buffers; the session cannot be used afterwards."""
        if self._reference is None:
            self._close()
            self._handle = ctypes.c_void_p()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, *inputs: Any) -> Any:
        arrays = self._inputs(inputs)
        if self._reference is not None:
            outputs = self._reference(*arrays)
            return outputs[0] if len(outputs) == 1 else outputs
        batch = self._batch(arrays)
        outputs = tuple(np.empty(shape, dtype) for shape, dtype in self._outputs(batch))
        self.run(arrays, outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def run(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        """Reads ``inputs`` and writes ``outputs``: contiguous arrays of the right shapes; nothing is allocated."""
        self._check_open()
        for array in (*inputs, *outputs):
            if not array.flags.c_contiguous or array.dtype not in _CODES or array.ndim > _native.MAX_DIMS:
                raise UsageError(f"an array is {array.dtype} {array.shape}; give contiguous float32 or int64 arrays.")
        given = (_native.Tensor * max(1, len(inputs)))(*map(_describe, inputs))
        wanted = (_native.Tensor * max(1, len(outputs)))(*map(_describe, outputs))
        self._call("sec_session_run", self._handle, given, len(inputs), wanted, len(outputs))

    def prepare(self, batch: int = 1) -> None:
        """Plans one batch size ahead of its first run."""
        if self._reference is None:
            self._check_open()
            self._call("sec_session_prepare", self._handle, batch)

    def profile(self, on: bool = True) -> None:
        """Times each step of the runs that follow (slower by two clock reads a step)."""
        if self._reference is None:
            self._check_open()
            self._library.sec_session_profile(self._handle, int(on))

    def explain(self, batch: int = 1) -> dict[str, Any]:
        """What runs for this batch size: each step's node, path, reason, zeros and the time of its last profiled run.

        Returns:
            A dictionary with ``isa``, ``threads``, ``lanes``, ``bytes`` (activations and packed weights) and ``steps``.
        """
        if self._reference is not None:
            steps = [{"node": n.name, "op": n.op, "path": "reference", "reason": _native.why_not()} for n in self.graph.nodes]
            return {"isa": "reference", "threads": 1, "batch": batch, "steps": steps}
        self.prepare(batch)
        size = self._library.sec_session_explain(self._handle, batch, None, 0)
        text = ctypes.create_string_buffer(size + 1)
        self._library.sec_session_explain(self._handle, batch, text, size + 1)
        return json.loads(text.value)

    def _check_open(self) -> None:
        if self._reference is None and not self._handle.value:
            raise UsageError("the session is closed. Load the plan again.")

    def _inputs(self, inputs: Sequence[Any]) -> list[np.ndarray]:
        if len(inputs) != len(self.graph.inputs):
            names = ", ".join(i.name for i in self.graph.inputs)
            raise UsageError(f"{len(inputs)} inputs given, the network takes {len(self.graph.inputs)}: {names}.")
        arrays = []
        for spec, value in zip(self.graph.inputs, inputs, strict=True):
            array = np.asarray(value)
            wanted = np.dtype(np.int64 if spec.dtype == "i64" else np.float32)
            if array.dtype != wanted:
                kinds = "iu" if spec.dtype == "i64" else "fiu"
                if array.dtype.kind not in kinds:
                    raise UsageError(f"input '{spec.name}' is {array.dtype}; the network takes {wanted}.")
                array = array.astype(wanted)
            shape = tuple(spec.shape)
            free = [n for n, want in zip(array.shape, shape, strict=False) if want == 0]
            if len(array.shape) != len(shape) or any(w not in (0, n) for n, w in zip(array.shape, shape, strict=False)) or 0 in free:
                wants = ["batch" if n == 0 else n for n in shape]
                raise UsageError(f"input '{spec.name}' has shape {list(array.shape)}; the network takes {wants}.")
            arrays.append(np.ascontiguousarray(array))
        return arrays

    def _batch(self, arrays: Sequence[np.ndarray]) -> int:
        sizes = {a.shape[0] for a, spec in zip(arrays, self.graph.inputs, strict=True) if spec.shape and spec.shape[0] == 0}
        if len(sizes) > 1:
            raise UsageError(f"the inputs have different batch sizes: {sorted(sizes)}.")
        return sizes.pop() if sizes else 1

    def _outputs(self, batch: int) -> list[tuple[tuple[int, ...], np.dtype]]:
        self._check_open()
        found = []
        for index in range(len(self.graph.outputs)):
            spec = _native.Tensor()
            self._call("sec_session_output", self._handle, batch, index, ctypes.byref(spec))
            found.append((tuple(spec.shape[: spec.ndim]), _TYPES[spec.dtype]))
        return found


def _plan_path(source: str | PathLike[str]) -> Path:
    path = Path(source)
    if path.is_dir():
        path = path / "plan.safetensors"
    if not path.is_file():
        raise FileError(f"there is no plan at {path}. Make one with secateur.compile(...).save(...).")
    return path


def _open(path: Path, with_weights: bool) -> tuple[Graph, dict[str, np.ndarray]]:
    if with_weights:
        return planfile.read(path)
    return planfile.read_graph(path), {}


def load(source: str | PathLike[str], **options: Any) -> Session:
    """Opens a plan file, or a folder that holds one; needs no torch. For the options see `Session`."""
    return Session(source, **options)


