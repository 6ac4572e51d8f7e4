"""How much faster a network with units removed is than the dense one, in torch and in ONNX Runtime, by batch.

Run: ``python benchmarks/bench_shrunk.py runs/half-macs-resnet20-* [--write docs/results/resnet20-half-macs.md]`` from
the project's root; every folder is that of a recipe with ``train``, ``shrink`` (once or more) and ``measure`` steps.
Both networks are read from their folders; each file of ONNX Runtime is first compared with torch. Candidates take turns
in one process, and a ratio is the median over the rounds. The floor is the same network with one unit left in every
group that lost some: what it still takes is not in the layers that shrink.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timing
import torch
from torch import Tensor, nn

from secateur.engine import racing
from secateur.engine.folder import Artefact
from secateur.surgery import analyse, shrink

BATCHES = (1, 64)
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
ENGINES = ("torch", "ONNX Runtime")


def steps(folder: Path) -> tuple[Artefact, Artefact]:
    """The dense network and the smallest."""
    done = json.loads((folder / "run.json").read_text())["steps"]
    at = [Artefact.open(folder / s["folder"]) for s in done if s["do"] in ("train", "shrink")]
    return at[0], at[-1]


def floor_of(dense: nn.Module, small: nn.Module, example: Tensor) -> nn.Module:
    """The network with one unit in every group in which ``small`` has fewer than ``dense``."""
    found = analyse(small, example)
    before, after = dense.state_dict(), small.state_dict()
    thin = {(name, d) for name, t in after.items() for d, n in enumerate(t.shape) if n != before[name].shape[d]}
    chosen = [g for g in found.groups if thin & set(g.tensors)]
    return shrink(small, example, {g.name: range(1, len(g)) for g in chosen if len(g) > 1}).model


def in_torch(model: nn.Module, x: Tensor) -> Callable[[], object]:
    def call() -> np.ndarray:
        with torch.inference_mode():
            return model(x).numpy()

    return call


def candidates(nets: dict[str, nn.Module], x: Tensor, folder: Path) -> dict[str, Callable[[], object]]:
    """One call for each network and engine; what ONNX Runtime gives must be what torch gives."""
    made: dict[str, Callable[[], object]] = {}
    for name, model in nets.items():
        file = folder / f"{name}-{len(x)}.onnx"
        racing.to_onnx(model, [x], file)
        made[f"torch {name}"] = in_torch(model, x)
        made[f"ONNX Runtime {name}"] = other = racing.onnxruntime(file, [x], 1)
        one, two = made[f"torch {name}"](), other()
        apart = float(np.abs(np.asarray(one) - two).max() / np.abs(two).max())
        if apart > 1e-4:
            raise SystemExit(f"{name}: ONNX Runtime differs by {apart:.2g}")
    return made


def clock(folder: Path, batch: int, rounds: int) -> dict[str, Any]:
    """Milliseconds and ratios of one run."""
    dense, small = steps(folder)
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    nets = {"dense": dense.build().eval(), "small": small.build().eval()}
    nets["floor"] = floor_of(dense.build().eval(), small.build().eval(), x[:2] if batch > 1 else x.repeat(2, 1, 1, 1))
    with tempfile.TemporaryDirectory() as place:
        times = timing.measure(candidates(nets, x, Path(place)), rounds)
    ms = {name: 1e3 * seconds for name, seconds in timing.medians(times).items()}
    ratios = {
        f"{engine} {other}": timing.ratio(times, f"{engine} dense", f"{engine} {other}")
        for engine in ENGINES
        for other in ("small", "floor")
    }
    return {"batch": batch, "ms": ms, "ratio": ratios}


def verdict(folder: Path) -> tuple[float, float, int, int]:
    """Per cent of test examples right, dense and small; multiply-adds of both."""
    done = json.loads((folder / "run.json").read_text())["steps"][-1]["folder"]
    found = json.loads((folder / done / "verdict.json").read_text())
    a, b = found["dense"], found["pruned"]
    macs = [int(x["cost"]["parts"]["macs_dense"]) for x in (a, b)]
    return a["accuracy"]["value"], b["accuracy"]["value"], macs[0], macs[1]


def accuracies(folders: Sequence[Path]) -> list[str]:
    """A row for each run, and the mean of those of one recipe, whose names differ in their last number alone."""
    lines = ["| run | dense % | smaller % | points | multiply-adds |", "|---|---|---|---|---|"]
    groups: dict[str, list[tuple[float, float]]] = {}
    for folder in folders:
        dense, small, before, after = verdict(folder)
        groups.setdefault(folder.name.rpartition("-")[0], []).append((dense, small))
        cost = f"{before:,} -> {after:,} ({after / before:.3f}x)"
        lines.append(f"| {folder.name} | {dense:.2f} | {small:.2f} | {small - dense:+.2f} | {cost} |")
    for name, pairs in groups.items():
        if len(pairs) > 1:
            means = [statistics.mean(column) for column in zip(*pairs, strict=True)]
            spread = statistics.stdev(small - dense for dense, small in pairs)
            points = f"{means[1] - means[0]:+.2f} (sd {spread:.2f})"
            lines.append(f"| {name}, mean | {means[0]:.2f} | {means[1]:.2f} | {points} | |")
    return lines


def page(folders: Sequence[Path], rounds: int) -> list[str]:
    """The tables."""
    lines = accuracies(folders)
    lines += [
        "",
        "| run | batch | engine | dense ms | smaller ms | times as fast | floor ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for folder in folders:
        for batch in BATCHES:
            found = clock(folder, batch, rounds)
            ms, ratio = found["ms"], found["ratio"]
            for engine in ENGINES:
                took = [ms[f"{engine} {name}"] for name in ("dense", "small", "floor")]
                lines.append(
                    f"| {folder.name} | {batch} | {engine} | {took[0]:.2f} | {took[1]:.2f} | "
                    f"{ratio[f'{engine} small']:.2f} | {took[2]:.2f} |"
                )
                print(lines[-1], flush=True)
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folders", nargs="+", type=Path)
    options.add_argument("--rounds", type=int, default=40)
    options.add_argument("--write", type=Path, help="put the tables between the page's two marks")
    request = options.parse_args(argv)
    torch.set_num_threads(1)
    about = timing.machine()
    lines = [*page(request.folders, request.rounds), "", ", ".join(f"{k} {v}" for k, v in about.items() if v)]
    print("\n".join(lines))
    if request.write:
        head, mark, rest = request.write.read_text().partition(BEGIN)
        _, end, tail = rest.partition(END)
        if not mark or not end:
            raise SystemExit(f"{request.write} lacks {BEGIN} or {END}")
        request.write.write_text("\n".join((head + BEGIN, "", *lines, "", END)) + tail)


if __name__ == "__main__":
    main()
