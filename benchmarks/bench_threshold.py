"""Exact global thresholds over 100 million scores: time and extra memory of magnitude's and of LAMP's.

Beside them stand the plain ways: ``kthvalue`` on a joined copy, and LAMP scores by sorting each tensor (on a tenth
of the scores, since a sort of all takes too much memory). One thread. Bars for LAMP: 10 s and 2 GB. Ends with 1 when
one is missed.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

import torch
from timing import record

from secateur.core.allocations import Global, Lamp, lamp
from secateur.core.select import threshold

SECONDS, MEGABYTES = 10.0, 2000.0


def peak() -> float:
    """Peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def taken(name: str, run: Callable[[], object], scores: int) -> tuple[object, float, float]:
    """What a call gives, its seconds and how far it raised the peak of memory; printed and recorded."""
    base, begin = peak(), time.perf_counter()
    result = run()
    seconds, extra = time.perf_counter() - begin, peak() - base
    print(f"{name:<36} {scores / 1e6:>5.0f} M scores  {seconds:6.2f} s  {extra:6.0f} MB extra")
    record("threshold", {"case": name, "scores": scores, "seconds": round(seconds, 3), "megabytes": round(extra)})
    return result, seconds, extra


def main() -> int:
    """Measure the frugal ways first, because peak memory only rises."""
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    scores = {f"layer{i}": torch.randn(25_000_000, generator=random).abs_() for i in range(4)}
    total = sum(score.numel() for score in scores.values())
    keep = total // 20
    every = list(scores.values())
    ours, _, _ = taken("radix selection", lambda: threshold(every, keep), total)
    counts, seconds, extra = taken("LAMP by histograms", lambda: Lamp()(scores, keep), total)
    few = {name: score[: score.numel() // 10] for name, score in scores.items()}
    quick, _, _ = taken("LAMP by histograms", lambda: Lamp()(few, keep // 10), total // 10)
    slow, _, _ = taken(
        "LAMP by sorting", lambda: Global()({n: lamp(s) for n, s in few.items()}, keep // 10), total // 10
    )
    value, _, _ = taken("kthvalue on a joined copy", lambda: _joined(every, keep), total)
    print(f"same threshold: {value == ours[0]}, kept {ours[1] + ours[2]:,} exactly")  # type: ignore[index]
    print(f"same counts of LAMP: {quick == slow}, kept {sum(counts.values()):,} exactly")  # type: ignore[union-attr]
    within = value == ours[0] and quick == slow and seconds <= SECONDS and extra <= MEGABYTES  # type: ignore[index]
    return 0 if within else 1


def _joined(scores: list[torch.Tensor], keep: int) -> float:
    every = torch.cat(scores)
    return every.kthvalue(every.numel() - keep + 1).values.item()


if __name__ == "__main__":
    sys.exit(main())
