"""Several processes of this machine at one queue; each finds its work by itself, this one starts them and listens."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.core.errors import FileError, SecateurError
from secateur.engine.queue_store import Stage, Store
from secateur.engine.queue_work import DEATHS, Asked, Heard

_Line = tuple[subprocess.Popen[str], str]


@dataclass
class Spread:
    """Processes at a queue.

    Args:
        store: the queue.
        lease: seconds of a lease.
        asked: the recipes.
        data_dir: where data sets are looked up.
        heard: hears what happens.
        count: how many processes.
    """

    store: Store
    lease: float
    asked: Sequence[Asked]
    data_dir: str | None
    heard: Heard
    count: int
    _all: list[subprocess.Popen[str]] = field(default_factory=list, init=False)
    _ears: list[threading.Thread] = field(default_factory=list, init=False)
    _lines: queue.SimpleQueue[_Line] = field(default_factory=queue.SimpleQueue, init=False)

    def run(self) -> None:
        """Work until nothing is left to do; a process that dies is followed by another one, a few times.

        Raises:
            SecateurError: when processes die again and again, or files cannot be written.
            KeyboardInterrupt: after every process has given its stage back.
        """
        deaths = 0
        try:
            for _ in range(self.count):
                self._start()
            while any(process.returncode is None for process in self._all):
                process, line = self._lines.get()
                if line.endswith("\n"):
                    self._hear(json.loads(line))
                    continue
                code = process.wait()
                if code == 0:
                    continue
                deaths += 1
                if deaths > DEATHS * self.count:
                    raise SecateurError(
                        f"{deaths} processes of the queue died (out of memory, or killed). What is done is kept; use "
                        "fewer `--workers`, and run the same command again to go on."
                    )
                self._start()
        except BaseException:
            for process in self._all:
                process.terminate()
            raise
        finally:
            self._close()

    def _start(self) -> None:
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // self.count))
        # A session of its own: Ctrl-C in a terminal reaches this process only, which tells each worker once.
        process = subprocess.Popen(
            [sys.executable, "-m", "secateur.engine.queue_worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        self._all.append(process)
        recipes = {one.name: one.recipe.to_table() for one in self.asked}
        about = {"folder": str(self.store.folder), "lease": self.lease, "data_dir": self.data_dir, "recipes": recipes}
        with contextlib.suppress(BrokenPipeError):  # dead already: its end of the other pipe says so
            _pipe(process.stdin).write(json.dumps(about) + "\n")
            _pipe(process.stdin).flush()
        self._ears.append(threading.Thread(target=self._listen, args=(process,), daemon=True))
        self._ears[-1].start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        for line in _pipe(process.stdout):
            if line.endswith("\n"):  # of a process that was killed the last line may be a part
                self._lines.put((process, line))
        self._lines.put((process, ""))

    def _hear(self, told: dict[str, Any]) -> None:
        if "bug" in told:
            raise RuntimeError(told["bug"])
        if "refused" in told:
            raise FileError(told["refused"])
        number, do, key, needs = told["stage"]
        self.heard(told["event"], Stage(number, do, key, needs), told["told"])

    def _close(self) -> None:
        try:
            for process in self._all:
                process.wait()
        except KeyboardInterrupt:
            for process in self._all:
                process.kill()
            raise
        finally:  # not sooner: a process that is interrupted and then loses its input would be interrupted twice
            for ear in self._ears:
                ear.join()
            for process in self._all:
                with contextlib.suppress(BrokenPipeError):
                    _pipe(process.stdin).close()
                _pipe(process.stdout).close()


def _pipe(pipe: Any) -> Any:
    if pipe is None:
        raise RuntimeError("a worker was started without its pipes")
    return pipe
