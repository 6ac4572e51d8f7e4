"""Spreads the runs of a comparison: one after the other, over processes, or over machines with Ray."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from secateur.core.errors import FileError, SecateurError, UsageError
from secateur.engine.comparing import Job
from secateur.engine.comparing_jobs import RESULT, carry_out

DEATHS = 3
"""So often a run may take its process with it; it goes on from its last checkpoint each time."""

STARTS = 3
"""So often a local cluster is tried to start."""

Heard = Callable[[Job, Mapping[str, Any]], None]


def serial(jobs: Sequence[Job], out: Path, data_dir: str | None, heard: Heard) -> None:
    """One run after the other, in this process."""
    for job in jobs:
        heard(job, carry_out(asdict(job), str(out), data_dir))


@dataclass
class Processes:
    """Runs in processes of this machine.

    Args:
        out: the folder of the comparison.
        data_dir: where data sets are looked up.
        count: how many processes.
    """

    out: Path
    data_dir: str | None
    count: int
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector, init=False)
    _all: list[subprocess.Popen[str]] = field(default_factory=list, init=False)
    _deaths: Counter[str] = field(default_factory=Counter, init=False)

    def run(self, jobs: Sequence[Job], heard: Heard) -> None:
        """Do all runs; one whose process dies goes on in another one.

        Raises:
            SecateurError: when a run's process dies again and again, or files cannot be written.
            KeyboardInterrupt: after every process has written a checkpoint.
        """
        waiting, busy = deque(jobs), 0
        try:
            for _ in range(min(self.count, len(jobs))):
                busy += self._hand(self._start(), waiting)
            while busy:
                for key, _ in self._selector.select():
                    process, job = key.data
                    busy += self._hear(process, job, waiting, heard) - 1
        except BaseException:
            for process in self._all:
                process.send_signal(signal.SIGINT)
            raise
        finally:
            self._close()

    def _start(self) -> subprocess.Popen[str]:
        # A session of its own: Ctrl-C in a terminal reaches this process only, which tells each worker once.
        process = subprocess.Popen(
            [sys.executable, "-m", "secateur.engine.comparing_worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        self._all.append(process)
        return process

    def _hand(self, process: subprocess.Popen[str], waiting: deque[Job]) -> int:
        """Give a process its next run; 1 when there is one."""
        if not waiting:
            return 0
        job = waiting.popleft()
        asked = {"job": asdict(job), "out": str(self.out), "data_dir": self.data_dir}
        with contextlib.suppress(BrokenPipeError):  # dead already: its end of the other pipe says so
            _pipe(process.stdin).write(json.dumps(asked) + "\n")
            _pipe(process.stdin).flush()
        self._selector.register(_pipe(process.stdout), selectors.EVENT_READ, (process, job))
        return 1

    def _hear(self, process: subprocess.Popen[str], job: Job, waiting: deque[Job], heard: Heard) -> int:
        """Take an answer, or start another process when this one is dead; 1 when a run is handed out."""
        stdout = _pipe(process.stdout)
        self._selector.unregister(stdout)
        line = stdout.readline()
        if not line.endswith("\n"):
            self._deaths[job.name] += 1
            if self._deaths[job.name] > DEATHS:
                raise _died(job)
            waiting.appendleft(job)
            return self._hand(self._start(), waiting)
        answer = json.loads(line)
        if "bug" in answer:
            raise RuntimeError(f"{job.name}: {answer['bug']}")
        if "refused" in answer:
            raise FileError(answer["refused"])
        heard(job, answer["result"])
        return self._hand(process, waiting)

    def _close(self) -> None:
        for process in self._all:
            with contextlib.suppress(BrokenPipeError):
                _pipe(process.stdin).close()
        try:
            for process in self._all:
                process.wait()
        except KeyboardInterrupt:
            for process in self._all:
                process.kill()
            raise
        finally:
            for process in self._all:
                _pipe(process.stdout).close()
            self._selector.close()


def on_ray(
    jobs: Sequence[Job], out: Path, data_dir: str | None, heard: Heard, address: str = "", workers: int = 0
) -> None:
    """Runs as tasks of a Ray cluster; one whose worker dies is tried again, and goes on from its last checkpoint.

    All machines must see the folder of the comparison and the data under the same names, and have secateur installed.
    A run takes one core, and one GPU where the cluster has any.

    Args:
        jobs: the runs.
        out: the folder of the comparison.
        data_dir: where data sets are looked up.
        heard: called with each result.
        address: of a running cluster; empty for the one in ``RAY_ADDRESS``, or else a new one on this machine.
        workers: cores of the new one (0: all).

    Raises:
        UsageError: when Ray is not installed, or no cluster is at the address.
        SecateurError: when a run's worker dies again and again, or files cannot be written.
    """
    ray = _ray()
    started = not ray.is_initialized()
    with contextlib.redirect_stdout(sys.stderr):  # Ray tells of dead workers on standard output, which is for results
        if started:
            _connect(ray, address, workers)
        try:
            gpus = 1 if ray.cluster_resources().get("GPU") else 0
            remote = ray.remote(max_retries=DEATHS, num_cpus=1, num_gpus=gpus)(_on_cluster)
            where = (str(out.resolve()), str(Path(data_dir).resolve()) if data_dir else None, os.getcwd())
            pending = {remote.remote(asdict(job), *where): job for job in jobs}
            while pending:
                for task in ray.wait(list(pending))[0]:
                    job = pending.pop(task)
                    heard(job, _take(ray, task, job, out))
        finally:
            if started:
                ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UsageError("Ray is not installed; run `pip install 'secateur[ray]'`, or use `--workers N`.") from error
    return ray


def _connect(ray: Any, address: str, workers: int) -> None:
    there = address or os.environ.get("RAY_ADDRESS", "")
    own: dict[str, Any] = {} if there else {"num_cpus": workers or None, "include_dashboard": False}
    for left in range(STARTS - 1, -1, -1):
        try:
            ray.init(address=there or "local", log_to_driver=False, logging_level="error", **own)
            return
        except Exception as error:  # Ray raises bare exceptions, one of them when a busy machine is slow to start it
            ray.shutdown()
            if not there and left:
                continue
            what = f"no Ray cluster answers at {there!r}" if there else "Ray does not start here"
            raise UsageError(
                f"{what}: {error} Try `ray start --head`, or use `--workers N` without `--ray`."
            ) from error


def _take(ray: Any, task: Any, job: Job, out: Path) -> Mapping[str, Any]:
    """The result of a finished task, checked to lie where this process sees it."""
    try:
        result = ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SecateurError):
            raise error.cause from None
        raise
    except ray.exceptions.WorkerCrashedError as error:
        raise _died(job) from error
    if "error" not in result and not (out / job.name / RESULT).is_file():
        raise FileError(
            f"{job.name} was done on another machine, and its files are not in {out}. Choose a folder with `-o` that "
            "all machines of the cluster share."
        )
    return result


def _on_cluster(job: dict[str, Any], out: str, data_dir: str | None, folder: str) -> dict[str, Any]:
    if os.path.isdir(folder):  # relative paths in the comparison, and plug-ins that lie there
        os.chdir(folder)
    return carry_out(job, out, data_dir)


def _died(job: Job) -> SecateurError:
    return SecateurError(
        f"the process of {job.name} died {DEATHS + 1} times (out of memory, or killed). Runs that are done are kept; "
        "use fewer `--workers`, and run the same command again to go on."
    )


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise RuntimeError("a worker was started without its pipes")
    return pipe
