"""Runs a plan file: on the compiled core, or on the NumPy reference where there is none."""

from __future__ import annotations

import ctypes
import json
import threading
import weakref
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np

from secateur import _native
from secateur.core.errors import FileError, ModelError, UsageError
from secateur.runtime import planfile
from secateur.runtime.graph import Graph, InputSpec
from secateur.runtime.reference import Reference

__all__ = ["Session", "load"]

_F32, _I64 = np.dtype(np.float32), np.dtype(np.int64)
_TYPES = {0: _F32, 1: _I64}
_CODES = {dtype: code for code, dtype in _TYPES.items()}
_ERRORS: dict[int, type[Exception]] = {1: FileError, 2: ModelError, 3: UsageError, 4: UsageError}
_MESSAGE = 1024


class _Call:
    """Calls one function of the core with room for its message; a code that is not 0 becomes an exception."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._texts = threading.local()

    def __call__(self, name: str, *arguments: Any) -> None:
        text = getattr(self._texts, "text", None)
        if text is None:
            text = self._texts.text = ctypes.create_string_buffer(_MESSAGE)
        code = getattr(self._library, name)(*arguments, text, _MESSAGE)
        if code:
            kind = _ERRORS.get(code, RuntimeError)
            raise kind(text.value.decode("utf-8", "replace"))


def _address(array: np.ndarray) -> int:
    if array.nbytes and array.flags.writeable:  # three times as fast as ctypes.data
        return ctypes.addressof(ctypes.c_char.from_buffer(cast(Any, array)))
    return array.ctypes.data


def _tensors(arrays: Sequence[np.ndarray]) -> ctypes.Array[_native.Tensor]:
    described = [_native.Tensor(_address(a), _CODES[a.dtype], a.ndim, a.shape) for a in arrays]
    return (_native.Tensor * max(1, len(described)))(*described)


class _Frame:
    """The descriptions of some arrays, made once: a call fills in only the addresses."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        described = _tensors(arrays)
        self._kind, self._blank = type(described), bytes(described)
        self.count = len(arrays)

    def __call__(self, arrays: Sequence[np.ndarray]) -> ctypes.Array[_native.Tensor]:
        filled = self._kind.from_buffer_copy(self._blank)
        for tensor, array in zip(filled, arrays, strict=False):
            tensor.data = _address(array)
        return filled


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
        self._frames: dict[int, tuple[_Frame, _Frame, list[tuple[tuple[int, ...], np.dtype]]]] = {}
        self._handle = ctypes.c_void_p()
        library = _native.library()
        self.graph, weights = _open(self.path, library is None or reference)
        self._free = [tuple(spec.shape[:1]) == (0,) for spec in self.graph.inputs]
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
        """One array, or a tuple where the network has several results."""
        arrays = self._inputs(inputs)
        if self._reference is not None:
            outputs = self._reference(*arrays)
            return outputs[0] if len(outputs) == 1 else outputs
        frame = self._frames.get(batch := self._batch(arrays)) or self._frame(batch, arrays)
        given, wanted, shapes = frame
        outputs = tuple([np.empty(shape, dtype) for shape, dtype in shapes])
        self._check_open()
        self._call("sec_session_run", self._handle, given(arrays), given.count, wanted(outputs), wanted.count)
        return outputs[0] if len(outputs) == 1 else outputs

    def _frame(self, batch: int, arrays: Sequence[np.ndarray]) -> tuple[_Frame, _Frame, list[Any]]:
        if len(self._frames) > 64:
            self._frames.clear()
        shapes = self._outputs(batch)
        frame = _Frame(arrays), _Frame([np.empty(shape, dtype) for shape, dtype in shapes]), shapes
        self._frames[batch] = frame
        return frame

    def run(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        """Reads ``inputs`` and writes ``outputs``: contiguous arrays of the right shapes; nothing is allocated."""
        self._check_open()
        for array in (*inputs, *outputs):
            if not array.flags.c_contiguous or array.dtype not in _CODES or array.ndim > _native.MAX_DIMS:
                raise UsageError(f"an array is {array.dtype} {array.shape}; give contiguous float32 or int64 arrays.")
        self._call("sec_session_run", self._handle, _tensors(inputs), len(inputs), _tensors(outputs), len(outputs))

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
            why = _native.why_not() or "asked for"
            steps = [{"node": n.name, "op": n.op, "path": "reference", "reason": why} for n in self.graph.nodes]
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
        return [_fitting(spec, np.asarray(value)) for spec, value in zip(self.graph.inputs, inputs, strict=True)]

    def _batch(self, arrays: Sequence[np.ndarray]) -> int:
        sizes = {array.shape[0] for array, free in zip(arrays, self._free, strict=True) if free}
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


def _fitting(spec: InputSpec, array: np.ndarray) -> np.ndarray:
    """The array as the core reads it: the right type and shape, contiguous; copied only where it is not."""
    wanted = _F32 if spec.dtype == "f32" else _I64
    if array.dtype != wanted:
        if array.dtype.kind not in ("fiu" if wanted is _F32 else "iu"):
            raise UsageError(f"input '{spec.name}' is {array.dtype}; the network takes {wanted}.")
        array = array.astype(wanted)
    shape, given = tuple(spec.shape), array.shape
    free = shape[:1] == (0,)
    fits = given[1:] == shape[1:] and len(given) > 0 and given[0] > 0 if free else given == shape
    if not fits:
        wants = ["batch", *shape[1:]] if free else list(shape)
        raise UsageError(f"input '{spec.name}' has shape {list(given)}; the network takes {wants}.")
    return np.ascontiguousarray(array)


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
