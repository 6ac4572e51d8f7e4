"""Lists or blocks for a layer: measured on this machine, remembered for each processor, shape and share of zeros."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from secateur.core.errors import UsageError
from secateur.runtime.graph import Node
from secateur.runtime.session import Session

__all__ = ["cpu_name", "measured"]

PATHS = ("lists", "blocks")
ROUNDS = 7
CLEARLY = 0.97  # a path must take less than this share of the other's time to replace what the rule says


def measured(
    source: str | PathLike[str],
    *inputs: np.ndarray,
    threads: int | None = None,
    isa: str = "auto",
    cache: str | PathLike[str] | None = None,
) -> dict[str, Any]:
    """Times both paths of every convolution and linear layer, and gives the ``tuning`` for a `Session`.

    A layer keeps what the built-in rule says unless the other path takes at least 3 % less time. Layers that the core
    runs in another way (one token, grouped, summed within another) are left to the rule. What was measured once is
    remembered in ``paths.json`` of the cache folder, under the processor's name, the instruction set, the number of
    threads, and the layer's shapes and share of non-zeros, rounded to 5 %; it is not timed again.

    Args:
        source: A plan file or a folder that holds one.
        inputs: One batch, as the network takes it.
        threads: As for `Session`.
        isa: As for `Session`.
        cache: Folder of the memory; None takes ``$SECATEUR_CACHE`` or ``~/.cache/secateur``.

    Raises:
        UsageError: without inputs.

    Cost: 14 timed runs where anything is not yet known.
    """
    if not inputs:
        raise UsageError("measuring needs one batch of the network's inputs: measured(plan, array).")
    place = Path(cache or os.environ.get("SECATEUR_CACHE") or "~/.cache/secateur").expanduser() / "paths.json"
    with Session(source, threads=threads, isa=isa) as session:
        if session.isa == "reference":
            return {}
        session(*inputs)
        told = session.explain(len(inputs[0]))
        keys = {step["node"]: _key(told, step, node) for step, node in _candidates(session, told)}
    known = _read(place)
    missing = [node for node, key in keys.items() if key not in known]
    if missing:
        for node, times in _times(source, inputs, missing, threads, isa).items():
            known[keys[node]] = times
        _write(place, {keys[node]: known[keys[node]] for node in missing})
    rule = {step["node"]: "lists" if step["path"] == "lists" else "blocks" for step in told["steps"]}
    chosen = {node: _better(known[key], rule[node]) for node, key in keys.items()}
    return {"layers": {node: {"path": path} for node, path in chosen.items() if path != rule[node]}}


def _candidates(session: Session, told: Mapping[str, Any]) -> list[tuple[dict[str, Any], Node]]:
    nodes = {node.name: node for node in session.graph.nodes}
    tied = {word for step in told["steps"] if "summed within" in step["reason"]
            for word in (step["node"], step["reason"].split("'")[1])}  # fmt: skip
    found = []
    for step in told["steps"]:
        node = nodes.get(step["node"])
        free = node is not None and node.attrs.get("groups", 1) == 1 and step["node"] not in tied
        if free and step["path"] in ("lists", "blocks", "dense"):
            found.append((step, node))
    return found


def _key(told: Mapping[str, Any], step: Mapping[str, Any], node: Node) -> str:
    """What decides the times: processor, unit, threads, layer, and the share of non-zeros in steps of 5 %."""
    attrs = {name: node.attrs[name] for name in ("stride", "dilation") if name in node.attrs}
    share = round(20 * step["nonzeros"] / max(1, step["weights"])) * 5
    facts = [cpu_name(), told["isa"], told["threads"], told["strips"], told["piece"], node.op, step["weights"]]
    pattern = "shared" if step["path"] != "lists" else "single"
    return json.dumps([*facts, step["shape"], attrs, share, pattern], sort_keys=True)


def _times(
    source: str | PathLike[str], inputs: tuple[np.ndarray, ...], nodes: list[str], threads: int | None, isa: str
) -> dict[str, dict[str, float]]:
    """Milliseconds of each node on either path: medians, both taken in turn."""
    forced = {path: {"layers": {node: {"path": path} for node in nodes}} for path in PATHS}
    with contextlib.ExitStack() as stack:
        opened = {
            path: stack.enter_context(Session(source, threads=threads, isa=isa, tuning=forced[path])) for path in PATHS
        }
        taken: dict[str, dict[str, list[float]]] = {node: {path: [] for path in PATHS} for node in nodes}
        for session in opened.values():
            session(*inputs)
            session.profile(True)
        for _ in range(ROUNDS):
            for path, session in opened.items():
                session(*inputs)
                for step in session.explain(len(inputs[0]))["steps"]:
                    if step["node"] in taken and step["path"] not in ("pack", "unpack"):
                        taken[step["node"]][path].append(step["ms"])
    return {node: {path: float(np.median(ms)) for path, ms in both.items()} for node, both in taken.items()}


def _better(times: Mapping[str, float], rule: str) -> str:
    other = PATHS[1 - PATHS.index(rule)]
    return other if times[other] < CLEARLY * times[rule] else rule


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _read(place: Path) -> dict[str, dict[str, float]]:
    """What is remembered; a damaged file counts for nothing."""
    try:
        found = json.loads(place.read_text())
        return {str(k): {path: float(v[path]) for path in PATHS} for k, v in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _write(place: Path, more: Mapping[str, Mapping[str, float]]) -> None:
    """Adds to the file, whole or not at all; a folder that cannot be written means that nothing is remembered."""
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=place.parent, prefix=".paths-")
        with os.fdopen(handle, "w") as file:
            json.dump({**_read(place), **more}, file, indent=0)
        os.replace(name, place)
