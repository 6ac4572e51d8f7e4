"""Builds plan files for the native tests, byte by byte: also ones that no sound writer would make."""

import json
from pathlib import Path

import numpy as np

TYPES = {"f4": "F32", "f2": "F16", "u2": "BF16", "i1": "I8", "u1": "U8"}


def bfloat16(array):
    """The upper halves of float32 numbers that have nothing in their lower ones."""
    bits = array.astype(np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def container(metadata, tensors):
    """A safetensors file of ``{name: array}``; uint16 arrays are bfloat16."""
    table, data = {"__metadata__": metadata}, b""
    for name, array in tensors.items():
        begin, kind = len(data), TYPES[array.dtype.str[1:]]
        data += np.ascontiguousarray(array).tobytes()
        table[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [begin, len(data)]}
    return pack(json.dumps(table), data)


def pack(header, data):
    """Header and data as a file."""
    text = header if isinstance(header, bytes) else header.encode()
    return len(text).to_bytes(8, "little") + text + data


class Plan:
    """A graph and its tensors, with the shapes that each value must get."""

    def __init__(self, seed=0):
        self.random = np.random.default_rng(seed)
        self.graph = {"inputs": [], "outputs": [], "weights": {}, "nodes": []}
        self.tensors, self.dense, self.shapes = {}, {}, []

    def input(self, name, shape, dtype="f32"):
        """Adds an input; its name."""
        self.graph["inputs"].append({"name": name, "dtype": dtype, "shape": list(shape)})
        return name

    def weight(self, name, *shape, store="f32", values=None):
        """A weight of random small numbers, most of them zero, that every store holds exactly."""
        if values is None:
            values = self.random.integers(-8, 9, shape) * (self.random.random(shape) < 0.4)
        dense = np.asarray(values, np.float32)
        self.graph["weights"][name] = {"shape": list(dense.shape), "store": store.split(":")[0]}
        self.tensors.update(stored(name, dense, store))
        self.dense[name] = dense * (0.5 if store == "i8" else 1)
        return name

    def node(self, op, inputs, outputs, weights=None, **attrs):
        """Adds a node called after its first output; ``outputs`` is ``{value: shape}`` with "N", "2N" for the batch."""
        name = next(iter(outputs)) + "_node"
        self.graph["nodes"].append(
            {"op": op, "name": name, "in": list(inputs), "out": list(outputs), "weights": weights or {}, "attrs": attrs}
        )
        self.shapes.append((name, op, outputs))
        return next(iter(outputs))

    def bytes(self, graph_text=None):
        """The file; ``graph_text`` takes the place of the graph as JSON."""
        text = json.dumps(self.graph) if graph_text is None else graph_text
        return container({"format": "secateur-plan", "version": "1", "graph": text}, self.tensors)

    def expected(self):
        """A line for each node, as test_parse prints it."""
        lines = []
        for name, op, outputs in self.shapes:
            values = [f"{v} {fill(s, 1)} {fill(s, 3)}" for v, s in outputs.items()]
            lines.append(" ".join([name, op, *values]))
        return "\n".join(lines) + "\n"

    def save(self, path: Path):
        """Writes the file, and beside it what reading it must give."""
        path.write_bytes(self.bytes())
        Path(f"{path}.expect").write_text(self.expected(), encoding="utf-8")
        values = [self.dense[name].astype(np.float32).tobytes() for name in sorted(self.dense)]
        Path(f"{path}.values").write_bytes(b"".join(values))


def fill(shape, batch):
    """A shape with its batch put in, as the native code writes it."""
    sizes = [int(s[:-1] or 1) * batch if isinstance(s, str) else s for s in shape]
    return "[" + ", ".join(map(str, sizes)) + "]"


def stored(name, dense, store):
    """The tensors of one weight; ``bitmask:f16`` gives the values' type."""
    kind, _, short = store.partition(":")
    cast = {"": lambda a: a, "f32": lambda a: a, "f16": lambda a: a.astype(np.float16), "bf16": bfloat16}
    if kind == "i8":
        scale = np.full(dense.shape[0], 0.5, np.float32)
        return {name: dense.astype(np.int8), f"{name}.scale": scale}
    if kind == "bitmask":
        mask = dense.reshape(-1) != 0
        return {
            f"{name}.bits": np.packbits(mask, bitorder="little"),
            f"{name}.values": cast[short](dense.reshape(-1)[mask]),
        }
    return {name: cast[kind](dense)}
