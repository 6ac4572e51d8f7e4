"""Where removing channels of ResNet-20 pays: three cuts to half of the multiply-adds and one beyond, without training.

Run: ``python benchmarks/bench_cuts.py`` from the project's root. Weights are random; only times are compared, and each
file of ONNX Runtime is first compared with torch. Candidates take turns in one process, one thread, and a ratio is the
median over the rounds. The last lines are ONNX Runtime's own times of the slowest convolutions of each network.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

import torch
from bench_shrunk import BATCHES, ENGINES, candidates
from timing import measure, medians, ratio
from torch import nn

from secateur.nets import build
from secateur.surgery import analyse, shrink

STAGE = "layer{}.{}.conv1.weight"
STREAM = ("conv1.weight", "layer2.0.conv2.weight", "layer3.0.conv2.weight")
EARLY = dict.fromkeys((*STREAM[:2], *(STAGE.format(1, i) for i in range(3))), 0.5)
CUTS = {
    "dense": {},
    "inside the blocks": {STAGE.format(s, i): 0.5 for s in (1, 2, 3) for i in range(3)},
    "residual stream": dict.fromkeys(STREAM, 0.5),
    "early": EARLY,
    "early and more": {**EARLY, **{STAGE.format(3, i): 0.75 for i in range(3)}},
}
"""The share of channels that each group keeps; the others keep all."""


def network(keep: dict[str, float]) -> nn.Module:
    model, x = build("resnet20", (3, 32, 32), 10).eval(), torch.randn(2, 3, 32, 32)
    if not keep:
        return model
    found = analyse(model, x)
    sizes = {name: len(found.group(name)) for name in keep}
    gone = {name: range(int(sizes[name] * share), sizes[name]) for name, share in keep.items()}
    return shrink(model, x, gone, analysis=found).model


def convolutions(file: Path, x: torch.Tensor, rounds: int = 10) -> dict[str, float]:
    """Milliseconds of the slowest convolutions of a file, by ONNX Runtime's profiler."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = 1, True
    options.profile_file_prefix = str(file.with_suffix(""))
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    for _ in range(rounds):
        session.run(None, {session.get_inputs()[0].name: x.numpy()})
    taken: Counter[str] = Counter()
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["args"].get("op_name") == "Conv":
            taken[event["name"].removesuffix("_kernel_time")] += event["dur"] / 1e3 / rounds
    return dict(taken.most_common(6))


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=25)
    request = options.parse_args()
    torch.set_num_threads(1)
    nets = {name: network(keep) for name, keep in CUTS.items()}
    with tempfile.TemporaryDirectory() as place:
        for batch in BATCHES:
            x = torch.randn(batch, 3, 32, 32)
            times = measure(candidates(nets, x, Path(place)), request.rounds)
            for engine in ENGINES:
                for name in nets:
                    ms = 1e3 * medians(times)[f"{engine} {name}"]
                    faster = ratio(times, f"{engine} dense", f"{engine} {name}")
                    print(f"batch {batch:<3} {engine:<12} {name:<18} {ms:7.2f} ms  {faster:.2f}x", flush=True)
        for name in nets:
            found = convolutions(Path(place) / f"{name}-{BATCHES[-1]}.onnx", x)
            print(name, ", ".join(f"{where} {ms:.2f} ms" for where, ms in found.items()))


if __name__ == "__main__":
    main()
