"""Signals that end a process as Ctrl-C does: what a scheduler sends before it kills, and a closed terminal."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Meanwhile SIGTERM and SIGHUP do what Ctrl-C would: a step is made whole, its state saved, its lease given back.

    Only the first of them counts. A scheduler tells all processes of a job, and a command that is told tells its
    workers: a worker that was told twice would stop at once, as at a second Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told = False

    def stop(number: int, frame: Any) -> None:
        nonlocal told
        if told:
            return
        told = True
        pressed = signal.getsignal(signal.SIGINT)  # a training's own, which waits for the end of a step
        if not callable(pressed):  # a shell had it ignored
            raise KeyboardInterrupt
        pressed(signal.SIGINT, frame)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    heard = [number for number, handler in before.items() if handler is not signal.SIG_IGN]  # as after `nohup`
    for number in heard:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number] or signal.SIG_DFL)
