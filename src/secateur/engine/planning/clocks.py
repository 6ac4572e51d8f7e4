"""Several versions of one network timed in turn, so that a machine whose speed wanders is fair to all of them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from secateur.engine.planning.operators import Sharing, milliseconds
from secateur.runtime import planfile
from secateur.runtime.graph import Graph, InputSpec, Node, WeightSpec
from secateur.runtime.session import Session

__all__ = ["Timing", "in_turn", "reference_session"]

LEAST_ROUNDS, MOST_ROUNDS = 5, 25
SHORT = 1.0  # milliseconds: calls that take less are repeated within a turn
QUARTILE = 25  # of the times: what a call takes when nothing else runs, without trusting the one luckiest call


@dataclass
class Timing:
    """What the clock said of one version.

    A layer's share of a call is taken within each call, where the machine's pace cancels out; milliseconds are the
    shares of an unprofiled call.

    Attributes:
        whole: Milliseconds of calls, unprofiled.
        shares: Tensor to the share that its layer took of all steps, in each profiled call.
        gaps: Milliseconds of the profiled calls outside of all steps.
    """

    whole: list[float] = field(default_factory=list)
    shares: dict[str, list[float]] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)

    def ms(self) -> float:
        """Milliseconds of a call."""
        return _low(self.whole)

    def layer(self, name: str) -> float:
        """Milliseconds of one layer."""
        return float(np.median(self.shares[name])) * max(0.0, self.ms() - _low(self.gaps))

    def times(self, factor: float) -> Timing:
        """The same at another pace."""
        return Timing([factor * ms for ms in self.whole], self.shares, [factor * ms for ms in self.gaps])

    def others(self) -> float:
        """What a call takes beyond its layers."""
        return max(0.0, self.ms() - sum(map(self.layer, self.shares)))


def in_turn(
    sessions: Mapping[str, Session],
    arrays: Sequence[np.ndarray],
    sharing: Sharing,
    base: str,
    seconds: float = 10.0,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, Timing], float]:
    """Times every session in every round, and gives for each what it takes at the machine's median pace.

    Args:
        sessions: Versions of one network, by label.
        arrays: The batch.
        sharing: Of the network.
        base: The label whose time in a round tells the machine's pace.
        seconds: About how long; at least five rounds are made.
        stop: Asked after each round from the third on.

    Returns:
        The timings, and milliseconds of the small fixed job meanwhile.
    """
    labels = list(sessions)
    calls = {label: _calls(session, arrays) for label, session in sessions.items()}
    timings = {label: Timing(shares={layer.tensor: [] for layer in sharing.layers}) for label in labels}
    paces: list[float] = []
    jobs: list[float] = []
    began = time.perf_counter()
    with reference_session(sessions[base]) as job:
        blank = np.full((1, 16, 16, 16), 0.5, np.float32)
        for turn in range(MOST_ROUNDS):
            if turn >= LEAST_ROUNDS and time.perf_counter() - began > seconds or turn >= 3 and stop():
                break
            at = turn % len(labels)
            for label in labels[at:] + labels[:at]:
                jobs.append(min(_clocked(job, [blank]) for _ in range(3)))
                _turn(sessions[label], arrays, sharing, timings[label], calls[label])
            paces.append(min(timings[base].whole[-calls[base] :]))
    pace = [one / float(np.median(paces)) for one in paces]
    for label in labels:
        _steady(timings[label], np.repeat(pace, calls[label]))
    return timings, _low(jobs)


def _turn(session: Session, arrays: Sequence[np.ndarray], sharing: Sharing, timing: Timing, calls: int) -> None:
    """Calls of one session: some that warm the caches, some profiled, some not."""
    batch = len(arrays[0]) if arrays[0].ndim else 1
    for _ in range(max(1, calls // 4)):
        session(*arrays)
    session.profile(True)
    for _ in range(calls):
        taken = _clocked(session, arrays)
        layers, rest = milliseconds(session.explain(batch), sharing)
        steps = sum(layers.values()) + rest
        timing.gaps.append(max(0.0, taken - steps))
        for name, ms in layers.items():
            timing.shares[name].append(ms / max(steps, 1e-9))
    session.profile(False)
    session(*arrays)
    timing.whole += [_clocked(session, arrays) for _ in range(calls)]


def _clocked(session: Session, arrays: Sequence[np.ndarray]) -> float:
    began = time.perf_counter_ns()
    session(*arrays)
    return (time.perf_counter_ns() - began) / 1e6


def _calls(session: Session, arrays: Sequence[np.ndarray]) -> int:
    """How many calls make a turn: more of the short ones."""
    session(*arrays)
    once = min(_clocked(session, arrays) for _ in range(2))
    return max(5, min(20, int(3 * SHORT / once))) if once < SHORT else 2 if once < 20 * SHORT else 1


def _steady(timing: Timing, pace: np.ndarray) -> None:
    """Times as they would be at the median pace."""
    timing.whole = list(np.asarray(timing.whole) / pace)
    timing.gaps = list(np.asarray(timing.gaps) / pace)


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
