"""Races: the compiled network against dense torch, ONNX Runtime and DeepSparse, taken in turn on one machine."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur import _native
from secateur.core.errors import ModelError, UsageError
from secateur.runtime.paths import cpu_name

__all__ = ["Race", "Runner", "deepsparse", "onnxruntime", "race", "round_trip", "to_onnx"]

Runner = Callable[[], np.ndarray]
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Race:
    """What a race measured.

    Attributes:
        rounds: For each candidate the median milliseconds of each round.
        best: For each candidate the fastest call.
        error: For each candidate the largest difference from the first one's result, over its largest value.
        about: Threads, machine, versions, the load of the machine before and after, and what `round_trip` gave before
            the first round and after each.
    """

    rounds: dict[str, list[float]]
    best: dict[str, float]
    error: dict[str, float]
    about: dict[str, Any] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Milliseconds: the median of the rounds' medians."""
        return float(np.median(self.rounds[name]))

    def ratio(self, slow: str, fast: str) -> tuple[float, float, float]:
        """How many times as fast ``fast`` is: of the medians, and the lowest and highest of one round."""
        each = [a / b for a, b in zip(self.rounds[slow], self.rounds[fast], strict=True)]
        return self.median(slow) / self.median(fast), min(each), max(each)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"rounds": self.rounds, "best": self.best, "error": self.error, "about": self.about}


class _Timed:
    """A candidate in this process."""

    def __init__(self, call: Runner) -> None:
        self.call = call

    def result(self) -> np.ndarray:
        return self.call()

    def round(self, seconds: float, least: int) -> list[float]:
        times: list[float] = []
        self.call()
        began = time.perf_counter()
        while time.perf_counter() - began < seconds or len(times) < least:
            start = time.perf_counter_ns()
            self.call()
            times.append((time.perf_counter_ns() - start) / 1e6)
        return times


def race(
    candidates: Mapping[str, Any], *, rounds: int = 5, seconds: float = 0.5, least: int = 5, threads: int | None = None
) -> Race:
    """Time several ways to compute the same result.

    First each gives its result: one that differs from the first candidate's by more than 1e-3 of the largest value
    voids the race. Then every round calls each candidate for ``seconds``, beginning with another one each time.

    Args:
        candidates: A function that returns an array, or an object with ``result()`` and ``round(seconds, least)``.
        rounds: Rounds; at least 1.
        seconds: Time of a candidate in a round.
        least: Fewest calls of a candidate in a round.
        threads: Threads of torch meanwhile.

    Raises:
        ModelError: a candidate computes something else.
    """
    if rounds < 1:
        raise UsageError(f"rounds is {rounds}; give at least 1.")
    runners = {name: c if hasattr(c, "round") else _Timed(c) for name, c in candidates.items()}
    names = list(runners)
    with _torch_threads(threads) as count:
        error = _compare({name: runner.result() for name, runner in runners.items()})
        before, trips = os.getloadavg(), [round_trip()]
        medians: dict[str, list[float]] = {name: [] for name in names}
        best = dict.fromkeys(names, float("inf"))
        for turn in range(rounds):
            at = turn % len(names)
            for name in names[at:] + names[:at]:
                times = runners[name].round(seconds, least)
                medians[name].append(float(np.median(times)))
                best[name] = min(best[name], *times)
            trips.append(round_trip())
        load = {"load before": before, "load after": os.getloadavg()}
        about = {"threads": count, "rounds": rounds, "seconds": seconds, "round trip ns": trips, **load}
    return Race(medians, best, error, {**about, **_machine()})


def round_trip() -> float:
    """Nanoseconds that a word takes from one thread to another and back; 0.0 without the compiled core.

    About a hundred where two processors share a cache, several hundred where they do not, as when a virtual machine's
    processors are moved apart. Threads that share one example's layers then wait for each other's results.
    """
    library = _native.library()
    return float(library.sec_round_trip()) if library is not None else 0.0


def _compare(results: Mapping[str, np.ndarray]) -> dict[str, float]:
    (name, first), *_ = results.items()
    if not np.isfinite(first).all():
        raise ModelError(
            f"the network's own result ({name}) holds NaN or infinity, so nothing can be compared with it. Look at its "
            "weights (`secateur doctor FILE`) and at the inputs."
        )
    scale = float(np.abs(first).max()) if first.size else 1.0
    error = {}
    for name, found in results.items():
        error[name] = float(np.abs(found - first).max()) / max(scale, 1e-30) if first.size else 0.0
        if not error[name] <= TOLERANCE:
            raise ModelError(f"{name} computes something else: off by {error[name]:.2g} of the largest value. No race.")
    return error


@contextlib.contextmanager
def _torch_threads(count: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _machine() -> dict[str, Any]:
    versions = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
    with contextlib.suppress(ImportError):
        import onnxruntime as ort

        versions["onnxruntime"] = ort.__version__
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "versions": versions}


def dense(model: nn.Module, inputs: Sequence[Tensor]) -> Runner:
    """The network in torch, eager, in evaluation mode."""
    model.eval()

    def call() -> np.ndarray:
        with torch.inference_mode():
            return model(*inputs).numpy()

    return call


def to_onnx(model: nn.Module, inputs: Sequence[Tensor], path: Path) -> None:
    """Export for ONNX Runtime and DeepSparse; the batch stays free.

    Raises:
        UsageError: the packages that exporting needs are missing.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise UsageError("exporting to ONNX needs `pip install 'secateur[bench]'`.") from error
    names = [f"x{i}" for i in range(len(inputs))]
    free = {name: {0: "batch"} for name in names}
    # The exporter by tracing writes files that DeepSparse's last release can still read.
    with warnings.catch_warnings(), contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(), tuple(inputs), str(path), input_names=names, output_names=["y"], dynamic_axes=free,
            opset_version=14, dynamo=False,
        )  # fmt: skip


def onnxruntime(path: Path, inputs: Sequence[Tensor], threads: int) -> Runner:
    """The exported network in ONNX Runtime on the CPU.

    Raises:
        UsageError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise UsageError("racing ONNX Runtime needs `pip install 'secateur[bench]'`.") from error
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {spec.name: x.numpy() for spec, x in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: np.asarray(session.run(None, feed)[0])


_WORKER = """
import json, sys, time
import numpy as np
from deepsparse import Engine
model, batch, threads, arrays, result = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
held = np.load(arrays)
inputs = [held[name] for name in held.files]
engine = Engine(model, batch_size=batch, num_cores=threads)
np.save(result, engine.run(inputs)[0])
print("ready", flush=True)
for line in sys.stdin:
    seconds, least = json.loads(line)
    engine.run(inputs)
    times, began = [], time.perf_counter()
    while time.perf_counter() - began < seconds or len(times) < least:
        start = time.perf_counter_ns()
        engine.run(inputs)
        times.append((time.perf_counter_ns() - start) / 1e6)
    print(json.dumps(times), flush=True)
"""


class deepsparse:  # noqa: N801 - the rival's own spelling
    """DeepSparse in another environment's Python, as a process that waits for its turn.

    Args:
        python: The interpreter of an environment with ``deepsparse`` installed.
        path: The exported network.
        inputs: Its inputs.
        threads: Cores to use.

    Raises:
        UsageError: it does not start.
    """

    def __init__(self, python: str, path: Path, inputs: Sequence[Tensor], threads: int) -> None:
        self._folder = folder = Path(tempfile.mkdtemp(prefix="secateur-"))
        arrays: dict[str, Any] = {f"x{i}": x.numpy() for i, x in enumerate(inputs)}
        np.savez(folder / "in.npz", **arrays)
        given, made = str(folder / "in.npz"), str(folder / "out.npy")
        words = [python, "-c", _WORKER, str(path), str(len(inputs[0])), str(threads), given, made]
        self._log = open(folder / "log", "w+")  # noqa: SIM115 - closed with the process
        try:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
            )
        except OSError as error:
            raise UsageError(f"cannot start {python}: {error.strerror}. Give an environment's Python.") from error
        while (line := self._read()).strip() != "ready":
            if not line:
                self._log.seek(0)
                last = (self._log.read().strip().splitlines() or ["it ended"])[-1]
                self.close()
                raise UsageError(f"deepsparse does not start in {python}: {last[:300]}")
        self._result = np.load(folder / "out.npy")

    def _read(self) -> str:
        return self._process.stdout.readline() if self._process.stdout is not None else ""

    def result(self) -> np.ndarray:
        """What it computed at the start."""
        return self._result

    def round(self, seconds: float, least: int) -> list[float]:
        """Milliseconds of the calls of one turn."""
        if self._process.stdin is not None:
            self._process.stdin.write(json.dumps([seconds, least]) + "\n")
            self._process.stdin.flush()
        return [float(t) for t in json.loads(self._read())]

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=30)
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)
