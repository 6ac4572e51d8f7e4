"""``secateur bench``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.cli.request import dump
from secateur.core import streams
from secateur.core.errors import UsageError
from secateur.engine import racing
from secateur.engine.compiling import PLAN
from secateur.engine.folder import RECIPE, Artefact
from secateur.engine.recipe import read_recipe
from secateur.runtime import Session, measured
from secateur.runtime.compiled import Compiled, compile_network

OURS = "secateur"


def run(request: argparse.Namespace) -> int:
    """Time a network, compiled, against dense torch and other engines, taken in turn."""
    threads = torch.get_num_threads() if request.threads is None else request.threads
    rivals = [("torch", ""), *(_rival(word) for word in request.against)]
    _check(request)
    net = _network(request)
    found = []
    with tempfile.TemporaryDirectory(prefix="secateur-") as temporary:
        folder = Path(temporary)
        for batch in request.batch or [1]:
            inputs = _inputs(request, net, batch)
            compiled, disk = _ours(request, net, inputs, threads, folder)
            candidates = _candidates(net, inputs, rivals, threads, folder)
            arrays = [x.numpy() for x in inputs]
            candidates[OURS] = lambda compiled=compiled, arrays=arrays: compiled(*arrays)
            if not request.json:
                print(f"batch {batch}: {', '.join(candidates)} in turn, {request.rounds} rounds ...", file=sys.stderr)
            try:
                made = racing.race(candidates, rounds=request.rounds, seconds=request.seconds, threads=threads)
            finally:
                for candidate in candidates.values():
                    if hasattr(candidate, "close"):
                        candidate.close()
            rows = _explained(compiled, inputs) if request.explain else []
            found.append({"batch": batch, "plan bytes": disk, **made.to_json(), "explain": rows,
                          "ratio": {n: made.ratio(n, OURS) for n in made.rounds if n != OURS}})  # fmt: skip
            if not request.json:
                _show(found[-1], made)
    if request.json:
        dump(found)
    return 0


def _check(request: argparse.Namespace) -> None:
    for name, value, least in (
        ("--rounds", request.rounds, 1),
        ("--threads", 1 if request.threads is None else request.threads, 1),
    ):
        if value < least:
            raise UsageError(f"{name} is {value}; give at least {least}.")
    if not request.seconds > 0:
        raise UsageError(f"--seconds is {request.seconds}; give a time above 0.")
    if request.zeros is not None and not 0 <= request.zeros < 1:
        raise UsageError(f"--zeros is {request.zeros}; give a share from 0 to below 1, such as 0.9.")
    if any(batch < 1 for batch in request.batch or [1]):
        raise UsageError("--batch must be at least 1.")
    if (request.start is None) == (request.net is None):
        raise UsageError("give a run folder, or a network by --net, one of the two.")
    if request.net is not None and not request.shape:
        raise UsageError("--net needs the input's shape without the batch, such as --shape 3,32,32.")


def _rival(word: str) -> tuple[str, str]:
    name, _, where = word.partition("=")
    if name not in ("torch", "onnxruntime", "deepsparse"):
        raise UsageError(f"--against {word}: known are onnxruntime and deepsparse=PYTHON.")
    if name == "deepsparse" and not where:
        raise UsageError("--against deepsparse needs the Python of an environment that has it: deepsparse=PYTHON.")
    return name, where


def _network(request: argparse.Namespace) -> nn.Module:
    if request.start is not None:
        net = Artefact.open(request.start).build()
    else:
        from secateur.nets import build

        net = build(request.net)
    if request.zeros is not None:
        for name, weight in net.named_parameters():
            if weight.ndim > 1:
                drawn = torch.rand(weight.shape, generator=streams.stream(0, "bench", name))
                weight.data.masked_fill_(drawn < request.zeros, 0.0)
    return net.cpu().eval()


def _inputs(request: argparse.Namespace, net: nn.Module, batch: int) -> list[Tensor]:
    if request.shape:
        try:
            shape = [int(part) for part in request.shape.replace("x", ",").split(",")]
        except ValueError:
            raise UsageError(f"--shape {request.shape!r} is not whole numbers such as 3,32,32.") from None
        if min(shape) < 1:
            raise UsageError(f"--shape {request.shape!r} has a size below 1.")
        if request.tokens:
            return [torch.randint(0, request.tokens, (batch, *shape))]
        return [torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))]
    from secateur import data

    spec: dict[str, Any] = dict(read_recipe(Artefact.open(request.start).folder / RECIPE).get("data", {}))
    test = data.load(spec["use"], request.data_dir, **spec.get("options", {})).test
    loader = data.Loader(test, batch)
    first = next(iter(loader))[0]
    return [first] if isinstance(first, Tensor) else list(first)


def _ours(
    request: argparse.Namespace, net: nn.Module, inputs: list[Tensor], threads: int, folder: Path
) -> tuple[Compiled | Session, int]:
    made = compile_network(net, tuple(inputs), threads=threads, isa=request.isa)
    if not made.whole:
        return made, 0
    path = made.save(folder / PLAN)
    arrays = [x.numpy() for x in inputs]
    tuning = measured(path, *arrays, threads=threads, isa=request.isa) if request.measure_paths else None
    return Session(path, threads=threads, isa=request.isa, tuning=tuning), path.stat().st_size


def _candidates(
    net: nn.Module, inputs: list[Tensor], rivals: list[tuple[str, str]], threads: int, folder: Path
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    exported = folder / "net.onnx"
    for name, where in rivals:
        if name != "torch" and not exported.is_file():
            racing.to_onnx(net, inputs, exported)
        if name == "torch":
            found[name] = racing.dense(net, inputs)
        elif name == "onnxruntime":
            found[name] = racing.onnxruntime(exported, inputs, threads)
        else:
            found[name] = racing.deepsparse(where, exported, inputs, threads)
    return found


def _explained(compiled: Compiled | Session, inputs: list[Tensor]) -> list[dict[str, Any]]:
    if isinstance(compiled, Compiled):
        return compiled.explain(*inputs)
    batch = len(inputs[0])
    arrays = [x.numpy() for x in inputs]
    compiled.profile(True)
    tables = []
    for _ in range(5):
        compiled(*arrays)
        tables.append(compiled.explain(batch)["steps"])
    compiled.profile(False)
    rows = [{**steps[0], "ms": sorted(s.get("ms", 0.0) for s in steps)[2]} for steps in zip(*tables, strict=True)]
    total = sum(row["ms"] for row in rows) or 1.0
    return [{**row, "share": row["ms"] / total} for row in rows]


def _show(line: dict[str, Any], made: racing.Race) -> None:
    about = made.about
    print(f"\nbatch {line['batch']}, {about['threads']} threads, {about['cpu']}, load {about['load before'][0]:.1f}")
    for name in made.rounds:
        beside = ""
        if name != OURS:
            ratio, low, high = line["ratio"][name]
            beside = f"   {OURS} is {ratio:.2f}x as fast (rounds {low:.2f} to {high:.2f})"
        print(f"  {name:<12} {made.median(name):10.4f} ms   best {made.best[name]:10.4f} ms{beside}")
    if line["plan bytes"]:
        print(f"  plan file    {line['plan bytes']:,} bytes")
    for row in line["explain"]:
        zeros = f"{1 - row['nonzeros'] / row['weights']:6.1%} zeros" if row.get("weights") else " " * 12
        print(f"  {row['node'][:34]:<34} {row['op'][:16]:<16} {row['path']:<7} {zeros}  {row['ms']:8.4f} ms "
              f"{row['share']:6.1%}  {row['reason']}")  # fmt: skip
