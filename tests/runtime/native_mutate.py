"""Opens and runs damaged plans through the C interface: ``native_mutate.py COUNT SEED PLAN...``.

A plan that opens must run, or be refused, with one line that says why; a crash ends this process, and the last line
printed names the case. Prints how many cases ended in which way.
"""

import collections
import ctypes
import json
import os
import random
import resource
import sys
import tempfile

import numpy as np

from secateur import _native

LIMIT = 8 << 20
NUMBERS = (0, 1, 2, 3, 5, 7, 8, 9, 16, 17, 63, 64, 65, 255, 1009, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**53, -1, 0.5)
STATUS = ("sound", "file", "unsupported", "argument", "memory", "internal")


def places(value, found):
    """Every container entry below a JSON value, as (container, key)."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in list(entries):
        found.append((value, key))
        if isinstance(entry, dict | list):
            places(entry, found)
    return found


def change(draw, value):
    """Another value in the place of one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return draw.choice((value + 1, value - 1, value * 2, value // 2, draw.randrange(12), draw.choice(NUMBERS)))
    if isinstance(value, str):
        return draw.choice(WORDS) if WORDS else value
    return [] if isinstance(value, list) else {}


WORDS = []


def edited(draw, plan):
    """The plan with some entries of its graph changed: the container stays sound."""
    size = int.from_bytes(plan[:8], "little")
    header = json.loads(plan[8 : 8 + size])
    graph = json.loads(header["__metadata__"]["graph"])
    everything = places(graph, [])
    attrs = [p for node in graph["nodes"] for p in places(node["attrs"], []) + places(node["in"], [])]
    WORDS[:] = [box[key] for box, key in everything if isinstance(box[key], str)]
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        box, key = draw.choice(attrs if draw.random() < 0.7 else everything)
        if isinstance(box, list) and key >= len(box) or isinstance(box, dict) and key not in box:
            continue
        if draw.random() < 0.05:
            del box[key]
        elif draw.random() < 0.05 and isinstance(box, list):
            box.insert(key, box[key])
        else:
            box[key] = change(draw, box[key])
    header["__metadata__"]["graph"] = json.dumps(graph)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + plan[8 + size :]


def damaged(draw, plan):
    """The plan with bytes changed, cut off, added or moved."""
    made = bytearray(plan)
    header = 8 + int.from_bytes(plan[:8], "little")
    kind = draw.random()
    if kind < 0.7:
        for _ in range(draw.choice((1, 1, 2, 8))):
            made[draw.randrange(header if draw.random() < 0.7 else len(made))] = draw.randrange(256)
    elif kind < 0.85:
        del made[draw.randrange(len(made)) :]
    else:
        at, size = draw.randrange(len(made)), draw.randrange(1, 64)
        made[at:at] = made[draw.randrange(len(made)) :][:size]
    return bytes(made)


class Core:
    """The C interface with its errors collected."""

    def __init__(self):
        self.library = _native.library()
        self.text = ctypes.create_string_buffer(1024)

    def call(self, name, *arguments):
        code = getattr(self.library, name)(*arguments, self.text, 1024)
        said = self.text.value.decode()  # a message is UTF-8 whatever the file holds
        assert bool(code) == bool(said) and "\n" not in said and code != 5, (code, said)
        return code

    def attempt(self, path, batch, threads):
        """How opening and running a file ends."""
        plan, session = ctypes.c_void_p(), ctypes.c_void_p()
        code = self.call("sec_plan_open", path.encode(), ctypes.byref(plan))
        if code:
            return code
        options = _native.Options(threads, 0, LIMIT, None, None)
        code = self.call("sec_session_create", plan, ctypes.byref(options), ctypes.byref(session))
        code = code or self.run(plan, session, batch)
        self.library.sec_session_free(session)
        self.library.sec_plan_free(plan)
        return code

    def run(self, plan, session, batch):
        inputs, outputs, arrays = [], [], []
        for index in range(self.library.sec_plan_inputs(plan)):
            spec = _native.Tensor()
            self.library.sec_plan_input(plan, index, None, ctypes.byref(spec))
            inputs.append(self.array(spec, batch, arrays))
        for index in range(self.library.sec_plan_outputs(plan)):
            spec = _native.Tensor()
            code = self.call("sec_session_output", session, batch, index, ctypes.byref(spec))
            if code:
                return code
            outputs.append(self.array(spec, batch, arrays))
        given = [(_native.Tensor * len(side))(*side) for side in (inputs, outputs)]
        return self.call("sec_session_run", session, given[0], len(inputs), given[1], len(outputs))

    @staticmethod
    def array(spec, batch, arrays):
        """The tensor with memory of exactly its size behind it."""
        shape = [spec.shape[i] or batch for i in range(spec.ndim)]
        for i, size in enumerate(shape):
            spec.shape[i] = size
        fits = float(np.prod([float(size) for size in shape])) < 1e7
        arrays.append(np.ones(shape if fits else 1, np.int64 if spec.dtype else np.float32))
        spec.data = arrays[-1].ctypes.data if fits else None
        return spec


def main():
    count, seed, paths = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    plans = [open(path, "rb").read() for path in paths]
    core, ends = Core(), collections.Counter()
    if "LD_PRELOAD" not in os.environ:  # a sanitizer reserves more than any limit
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "plan")
        for case in range(count):
            draw = random.Random(seed * 1_000_003 + case)
            plan = draw.choice(plans)
            plan = (damaged if draw.random() < 0.3 else edited)(draw, plan)
            with open(path, "wb") as file:
                file.write(plan)
            print(f"case {case} of seed {seed}", flush=True)
            ends[STATUS[core.attempt(path, draw.choice((1, 3, 9)), draw.choice((1, 2)))]] += 1
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
