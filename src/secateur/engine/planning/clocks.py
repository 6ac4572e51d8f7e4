"""Several versions of one network timed in turn, so that a machine whose speed wanders is fair to all of them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from secateur.engine.planning.operators import Sharing, milliseconds
from secateur.runtime import planfile
from secateur.runtime.graph import Graph, InputSpec, Node, WeightSpec
from secateur.runtime.session import Session

__all__ = ["LEAST_ROUNDS", "Timing", "clocked", "in_turn", "reference_session", "steady"]

LEAST_ROUNDS, MOST_ROUNDS = 5, 25
SHORT = 1.0  # milliseconds: calls that take less are repeated within a turn
LONG = 20.0  # milliseconds: of calls that take more, few are made
QUARTILE = 25  # of the times: what a call takes when nothing else runs, without trusting the one luckiest call


@dataclass
class Timing:
    """What the clock said of one version.

    Steps are short, so that few of their times are disturbed; how they divide a call is read off their lower quartiles,
    and milliseconds are shares of an unprofiled call.

    Attributes:
        whole: Milliseconds of calls, unprofiled, and whether something disturbed the call.
        layers: Tensor to milliseconds of its layer in each profiled call.
        rest: Of all other steps.
        gaps: Of the profiled calls outside of all steps.
    """

    whole: list[tuple[float, bool]] = field(default_factory=list)
    layers: dict[str, list[float]] = field(default_factory=dict)
    rest: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def ms(self) -> float:
        """Milliseconds of a call."""
        return _low(steady(self.whole))

    def layer(self, name: str) -> float:
        """Milliseconds of one layer."""
        return self._milliseconds[name]

    @cached_property
    def _milliseconds(self) -> dict[str, float]:
        lows = {name: _low(times) for name, times in self.layers.items()}
        inside = max(0.0, self.ms() - (_low(self.gaps) if self.gaps else 0.0))
        steps = max(_low(self.rest) + sum(lows.values()), 1e-9)
        return {name: inside * ms / steps for name, ms in lows.items()}

    def times(self, factor: float) -> Timing:
        """The same at another pace."""
        layers = {name: [factor * ms for ms in times] for name, times in self.layers.items()}
        rest, gaps = ([factor * ms for ms in times] for times in (self.rest, self.gaps))
        return Timing([(factor * ms, by) for ms, by in self.whole], layers, rest, gaps)

    def others(self) -> float:
        """What a call takes beyond its layers."""
        return max(0.0, self.ms() - sum(self._milliseconds.values()))


def in_turn(
    sessions: Mapping[str, Session],
    arrays: Sequence[np.ndarray],
    sharing: Sharing,
    base: str,
    seconds: float = 10.0,
    stop: Callable[[], bool] = lambda: False,
    least: int = LEAST_ROUNDS,
) -> tuple[dict[str, Timing], float]:
    """Times every session in every round, and gives for each what it takes at the machine's median pace.

    Args:
        sessions: Versions of one network, by label.
        arrays: The batch.
        sharing: Of the network.
        base: The label whose time in a round tells the machine's pace.
        seconds: About how long.
        stop: Asked after each round from the third on.
        least: Rounds that are made however long they take.

    Returns:
        The timings, and milliseconds of the small fixed job meanwhile.
    """
    labels = list(sessions)
    calls = {label: _calls(session, arrays) for label, session in sessions.items()}
    timings = {label: Timing(layers={layer.tensor: [] for layer in sharing.layers}) for label in labels}
    paces: list[float] = []
    jobs: list[float] = []
    began = time.perf_counter()
    with reference_session(sessions[base]) as job:
        blank = np.full((1, 16, 16, 16), 0.5, np.float32)
        for turn in range(MOST_ROUNDS):
            if turn >= least and time.perf_counter() - began > seconds or turn >= 3 and stop():
                break
            at = turn % len(labels)
            for label in labels[at:] + labels[:at]:
                jobs.append(min(clocked(lambda: job(blank), 1)[0] for _ in range(3)))
                _turn(sessions[label], arrays, sharing, timings[label], calls[label])
            paces.append(min(ms for ms, _ in timings[base].whole[-calls[base] :]))
    pace = [one / float(np.median(paces)) for one in paces]
    for label, timing in timings.items():
        each = np.repeat(pace, calls[label])
        timing.whole = [(ms / by, flag) for (ms, flag), by in zip(timing.whole, each, strict=True)]
    return timings, _low(jobs)


def _turn(session: Session, arrays: Sequence[np.ndarray], sharing: Sharing, timing: Timing, calls: int) -> None:
    """Calls of one session: some that warm the caches, some profiled, some not."""
    batch = len(arrays[0]) if arrays[0].ndim else 1
    threads = int(session.explain(batch)["threads"])
    for _ in range(max(1, calls // 4)):
        session(*arrays)
    session.profile(True)
    for _ in range(calls):
        taken, _ = clocked(lambda: session(*arrays), threads)
        layers, rest = milliseconds(session.explain(batch), sharing)
        timing.rest.append(rest)
        for name, ms in layers.items():
            timing.layers[name].append(ms)
        steps = sum(layers.values()) + rest
        if taken >= steps:  # else a step was disturbed, and there is no telling what lies between them
            timing.gaps.append(taken - steps)
    session.profile(False)
    if calls > 1:  # long calls have no warm-up of their own
        session(*arrays)
    timing.whole += [clocked(lambda: session(*arrays), threads) for _ in range(calls)]


def clocked(act: Callable[[], object], threads: int) -> tuple[float, bool]:
    """Milliseconds of one call, and whether something else took a processor from it meanwhile.

    With one thread a disturbed call is told by the processor's time, which leaves out what others took.

    Args:
        act: The call.
        threads: That it computes with.
    """
    switches = _switches()
    began, own = time.perf_counter_ns(), time.thread_time_ns()
    act()
    took, spent = time.perf_counter_ns() - began, time.thread_time_ns() - own
    disturbed = _switches() > switches
    return (spent if disturbed and threads == 1 else took) / 1e6, disturbed and threads > 1


def steady(calls: Sequence[tuple[float, bool]]) -> list[float]:
    """The times of the calls that nothing disturbed; of all, where those are few."""
    calm = [ms for ms, disturbed in calls if not disturbed]
    return calm if len(calm) >= max(3, len(calls) // 8) else [ms for ms, _ in calls]


def _switches() -> int:
    """How often another process was given a processor that this one wanted; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _calls(session: Session, arrays: Sequence[np.ndarray]) -> int:
    """How many calls make a turn: more of the short ones."""
    session(*arrays)
    once = clocked(lambda: session(*arrays), 1)[0]
    if once >= LONG:
        return 1
    once = min(once, clocked(lambda: session(*arrays), 1)[0])
    return max(5, min(20, int(3 * SHORT / once))) if once < SHORT else 2


def _low(times: Sequence[float]) -> float:
    return float(np.percentile(times, QUARTILE))


def reference_session(like: Session) -> Session:
    """A convolution that is the same everywhere: its time tells how fast the machine is at the moment."""
    spec = InputSpec("x", "f32", (0, 16, 16, 16))
    attrs = {"stride": (1, 1), "pad": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1, "act": "relu"}
    node = Node("conv", "job", ("x",), ("y",), {"weight": "w"}, attrs)
    graph = Graph((spec,), ("y",), {"w": WeightSpec((64, 16, 3, 3))}, (node,))
    weight = np.linspace(-1, 1, 64 * 16 * 9, dtype=np.float32).reshape(64, 16, 3, 3)
    with tempfile.TemporaryDirectory(prefix="secateur-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "job.safetensors"
        planfile.write(path, graph, {"w": weight})
        return Session(path, threads=1, isa=like.isa)
