"""Peak memory of a session at batch 1 beside ONNX Runtime's on the dense form of the same network.

Run: ``python benchmarks/bench_memory.py [--rows WORDS]``. Each engine opens its file and runs three times in a process
of its own that imports nothing else; what counts is by how much the peak resident set rises from just before the file
is opened. Two threads. The rows are those of bench_runtime.py.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from bench_runtime import ROWS, prepared

from secateur.engine import racing
from secateur.runtime.compiled import compile_network

MEASURE = """
import sys, numpy as np
path, shape = sys.argv[1], tuple(map(int, sys.argv[2].split(",")))
x = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)
def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
if path.endswith(".onnx"):
    import onnxruntime
    before = status("VmRSS")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = 2, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    call = lambda: session.run(None, {name: x})
else:
    from secateur.runtime import Session
    before = status("VmRSS")
    session = Session(path, threads=2)
    call = lambda: session(x)
for _ in range(3):
    call()
print((status("VmHWM") - before) / 1024)
"""


def peak(path: Path, shape: tuple[int, ...]) -> float:
    """MiB that opening and running a network adds to the peak of a process."""
    command = [sys.executable, "-c", MEASURE, str(path), ",".join(map(str, shape))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """One line for each network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", help="words that a row's name must contain (any of them)")
    words = parser.parse_args().rows
    print(f"{'network':40s} {'ours, MiB':>10s} {'ONNX Runtime':>13s} {'plan file':>10s} {'onnx file':>10s}")
    for name, row in ROWS.items():
        if words and not any(word in name for word in words):
            continue
        net, example = prepared(row), torch.randn(2, *row.shape)
        with tempfile.TemporaryDirectory() as temporary:
            onnx = Path(temporary) / "net.onnx"
            racing.to_onnx(copy.deepcopy(net), [example], onnx)
            plan = compile_network(net, example, threads=1).save(Path(temporary) / "plan.safetensors")
            sizes = [path.stat().st_size / 2**20 for path in (plan, onnx)]
            found = [peak(plan, row.shape), peak(onnx, row.shape), *sizes]
            print(f"{name:40s} {found[0]:10.1f} {found[1]:13.1f} {found[2]:10.2f} {found[3]:10.2f}")


if __name__ == "__main__":
    main()
