"""Which layers of a compiled network compute with which prunable tensors, and what decides how long each takes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.runtime.graph import Graph, Node

__all__ = ["Layer", "Sharing", "find_layers", "milliseconds"]

PACKING = ("pack", "unpack")  # steps that turn a layer's inputs or results, and do not depend on its zeros


@dataclass(frozen=True)
class Layer:
    """A prunable tensor as the compiled network computes with it.

    Attributes:
        tensor: Its name in the network.
        weights: Names of the graph's weights that hold it.
        shape: Of the tensor.
        key: What decides its milliseconds, as text: operators, shapes and attributes, and what it is summed with.
        features: Numbers by which layers of other shapes are compared: see `distance`.
        group: Layers of one group are run in one step, and share its time.
    """

    tensor: str
    weights: tuple[str, ...]
    shape: tuple[int, ...]
    key: str
    features: tuple[float, ...]
    group: int


@dataclass(frozen=True)
class Sharing:
    """How the time of a step is shared among the tensors that it computes with.

    Attributes:
        layers: Of the network.
        works: Node to tensor to multiply-adds, were the tensor dense.
        left: Prunable tensors without a layer, and why.
    """

    layers: tuple[Layer, ...]
    works: Mapping[str, Mapping[str, float]]
    left: Mapping[str, str]


def find_layers(
    graph: Graph, dense: Mapping[str, Any], sparse: Mapping[str, Any], tensors: Mapping[str, Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
) -> Sharing:  # fmt: skip
    """The layers of a compiled network.

    Args:
        graph: Of the plan.
        dense: What `Session.explain` tells of the network as it is.
        sparse: The same with few weights left in each layer: sums of two layers may then be one step.
        tensors: Prunable tensors, with all their names.
        shapes: Of the tensors.
    """
    holding = {alias: name for name, aliases in tensors.items() for alias in aliases}
    rows = {row["node"]: row for told in (sparse, dense) for row in told["steps"] if row["path"] not in PACKING}
    works: dict[str, dict[str, float]] = {}
    held: dict[str, dict[str, None]] = {name: {} for name in tensors}
    for node in graph.nodes:
        for weight in node.weights.values():
            name = holding.get(weight)
            if name is not None and node.name in rows and _same(graph.weights[weight].shape, shapes[name]):
                works.setdefault(node.name, {})[name] = _work(node, shapes[name], rows[node.name])
                held[name][weight] = None
    groups = _groups(works, [*dense["steps"], *sparse["steps"]])
    facts = {node.name: _facts(node, rows[node.name]) for node in graph.nodes if node.name in works}
    layers = []
    for name, weights in held.items():
        if not weights:
            continue
        alike = sorted(node for node, by in works.items() if groups[next(iter(by))] == groups[name])
        own = sorted(node for node in alike if name in works[node])
        key = [[facts[node] for node in own], [facts[node] for node in alike if node not in own]]
        layout = [list(shapes[name]), dense.get("strips"), dense.get("piece")]
        text = json.dumps([*key, *layout], sort_keys=True)
        features = _features(shapes[name], [works[node][name] for node in own], rows[own[0]])
        layers.append(Layer(name, tuple(weights), shapes[name], text, features, groups[name]))
    left = {name: _why_left(graph, holding, name) for name, weights in held.items() if not weights}
    return Sharing(tuple(layers), works, left)


def milliseconds(told: Mapping[str, Any], sharing: Sharing) -> tuple[dict[str, float], float]:
    """Milliseconds of each tensor's layer in one profiled run, and those of all other steps.

    Args:
        told: What `Session.explain` tells after the run.
        sharing: Of the network.
    """
    found = {layer.tensor: 0.0 for layer in sharing.layers}
    within = [(_summed(row), row["node"]) for row in told["steps"] if _summed(row)]
    rest = 0.0
    for row in told["steps"]:
        parts = dict(sharing.works.get(row["node"], {}))
        for outer, inner in within:
            if outer == row["node"] and row["path"] not in PACKING:
                parts.update(sharing.works.get(inner, {}))
        whole = sum(parts.values())
        if row["path"] in PACKING or not whole:
            rest += row["ms"]
            continue
        for name, work in parts.items():
            found[name] += row["ms"] * work / whole
    return found, rest


def _same(held: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether two shapes differ only by axes of length 1, as those of convolutions over sequences do."""
    return [n for n in held if n != 1] == [n for n in shape if n != 1]


def _summed(row: Mapping[str, Any]) -> str:
    """The node within which a step is summed; empty when it is not."""
    return str(row["reason"]).split("'")[1] if "summed within '" in str(row["reason"]) else ""


def _work(node: Node, shape: tuple[int, ...], row: Mapping[str, Any]) -> float:
    """Multiply-adds of a tensor: its numbers times the places of the result that each is used for."""
    out = row.get("shape") or [1]
    if node.op == "conv":
        return float(math.prod(shape) * math.prod(out) // max(1, out[1]))
    return float(math.prod(shape) * max(1, math.prod(out[:-1])))


def _facts(node: Node, row: Mapping[str, Any]) -> list[Any]:
    attrs = {name: list(value) if isinstance(value, tuple) else value for name, value in node.attrs.items()}
    way = "plain" if row["path"] == "plain" else "lanes"
    return [node.op, way, attrs, len(node.inputs), row.get("shape")]


def _features(shape: tuple[int, ...], works: Sequence[float], row: Mapping[str, Any]) -> tuple[float, ...]:
    """Logarithms of places, inputs, outputs and taps; whether it runs in lanes, and how narrow the result is."""
    size, out = math.prod(shape), row.get("shape") or [1]
    places = max(1.0, sum(works) / max(1, size))
    taps = math.prod(shape[2:])
    logs = [math.log2(places), math.log2(max(1, shape[1])), math.log2(shape[0]), math.log2(max(1, taps))]
    return (*logs, 8.0 if row["path"] == "plain" else 0.0, math.log2(out[-1]) if row["op"] == "conv" else 0.0)


def _groups(works: Mapping[str, Mapping[str, float]], steps: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """A number for each tensor, the same for those that may share a step."""
    parent = {name: name for by in works.values() for name in by}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    pairs = [(outer, row["node"]) for row in steps if (outer := _summed(row))]
    joined = [list(by) for by in works.values()]
    joined += [[*works[a], *works[b]] for a, b in pairs if a in works and b in works]
    for first, *others in joined:
        for other in others:
            parent[root(other)] = root(first)
    roots = list(dict.fromkeys(map(root, parent)))
    return {name: roots.index(root(name)) for name in parent}


def _why_left(graph: Graph, holding: Mapping[str, str], name: str) -> str:
    if any(holding.get(weight) == name for weight in graph.weights):
        return "the compiled network holds it in another shape, so its zeros are not those of the pattern"
    return "the compiled network does not hold it as one tensor: it is cut up, joined, computed, or not used"
