"""Time and extra memory of the exact global threshold over 100 million scores, beside kthvalue on a joined copy."""

from __future__ import annotations

import resource
import time

import torch

from secateur.core.select import threshold


def peak() -> float:
    """Peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    """Measure ours first, because peak memory only rises."""
    random = torch.Generator().manual_seed(0)
    scores = [torch.randn(25_000_000, generator=random) for _ in range(4)]
    keep = 5_000_000
    base, begin = peak(), time.perf_counter()
    ours = threshold(scores, keep)
    print(f"radix selection: {time.perf_counter() - begin:.2f} s, {peak() - base:.0f} MB extra")
    base, begin = peak(), time.perf_counter()
    joined = torch.cat(scores)
    value = joined.kthvalue(joined.numel() - keep + 1).values.item()
    print(f"kthvalue on a joined copy: {time.perf_counter() - begin:.2f} s, {peak() - base:.0f} MB extra")
    print(f"same threshold: {value == ours.value}, kept {ours.above + ours.ties:,} exactly")


if __name__ == "__main__":
    main()
