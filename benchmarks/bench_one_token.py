"""One token through one linear layer of 90 % zeros, from small to larger than the cache: time and bytes of a non-zero.

Run: ``python benchmarks/bench_one_token.py [--threads 1 2]``. A non-zero takes six bytes, a float and a
16-bit index. Where its time does not grow with the layer, bytes are not what bounds it: narrower weights cannot help.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from secateur.runtime import Session
from secateur.runtime.compiled import compile_network

SIZES = (512, 1024, 2048, 4096, 8192)


def main() -> None:
    """One line for each size and number of threads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    for size in SIZES:
        torch.manual_seed(0)
        layer = nn.Linear(size, size)
        layer.weight.data *= torch.rand_like(layer.weight) < 0.1
        count = int(layer.weight.count_nonzero())
        with tempfile.TemporaryDirectory() as folder:
            plan = compile_network(layer, torch.randn(1, size), threads=1).save(Path(folder))
            x = np.random.default_rng(0).standard_normal((1, size)).astype(np.float32)
            for threads in args.threads:
                with Session(plan, threads=threads) as session:
                    taken = []
                    for _ in range(200):
                        start = time.perf_counter_ns()
                        session(x)
                        taken.append(time.perf_counter_ns() - start)
                each = float(np.median(taken)) / count
                size_text = f"{size:5d} x {size:5d}  {6 * count / 2**20:7.2f} MiB"
                print(f"{size_text}  {threads} threads  {each:.3f} ns, {6 / each:5.1f} GB/s")


if __name__ == "__main__":
    main()
