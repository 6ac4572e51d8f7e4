"""Networks for the tests of the compiled core: built by hand, written as plans, compared with the float64 reference."""

import contextlib
import ctypes
import functools
import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from secateur import _native
from secateur.runtime import planfile
from secateur.runtime.graph import Graph, InputSpec, Node, WeightSpec
from secateur.runtime.operators import OPS, cell_role
from secateur.runtime.reference import Reference

TOLERANCE = 1e-5  # of the largest value
THREADS = (1, 3)
_LIBRARY = _native.library()
ISAS = _LIBRARY.sec_isas().decode().split() if _LIBRARY else []
LANES = {"base": 4, "neon": 4, "avx512-wide": 16}  # all others have 8

needs_native = pytest.mark.skipif(_LIBRARY is None, reason=_native.why_not() or "none")

_UNIT = {"stride": (1, 1), "pad": (0, 0, 0, 0), "dilation": (1, 1)}
_DEFAULTS = {
    "conv": {**_UNIT, "groups": 1, "act": "none"},
    "linear": {"act": "none"},
    "binary": {"act": "none"},
    "affine": {"act": "none"},
    "max_pool": _UNIT,
    "avg_pool": {"stride": (1, 1), "pad": (0, 0, 0, 0), "count_pad": True},
    "layer_norm": {"axes": 1, "eps": 1e-5},
    "rms_norm": {"axes": 1, "eps": 1e-5},
    "group_norm": {"eps": 1e-5},
    "attention": {"causal": False},
    "slice": {"step": 1},
}


def lanes(isa):
    """How many lanes the kernels of an instruction set have."""
    return LANES.get(isa, 8)


class Net:
    """A network under construction: every method adds something and returns the name of its value."""

    def __init__(self, seed=0):
        self.random = np.random.default_rng(seed)
        self.inputs, self.nodes, self.weights, self.ids, self.stores = [], [], {}, {}, {}

    def input(self, *shape, ids=0):
        """An input; ``ids`` makes it token ids below that number."""
        name = f"x{len(self.inputs)}"
        self.inputs.append(InputSpec(name, "i64" if ids else "f32", shape))
        self.ids[name] = ids
        return name

    def numbers(self, *shape, density=1.0, block=1):
        """A weight whose products keep the size of what they read; ``block`` rows share their zeros."""
        keep = self.random.random((-(-shape[0] // block), *shape[1:])) < density
        keep = np.repeat(keep, block, 0)[: shape[0]]
        size = math.sqrt(max(1.0, density * math.prod(shape[1:])))
        return (self.random.standard_normal(shape) * keep / size).astype(np.float32)

    def add(self, op, *inputs, store="f32", **given):
        """A node; arrays among the options are its weights, the rest its attributes."""
        number = len(self.nodes)
        arrays = {role.replace("__", "."): w for role, w in given.items() if isinstance(w, np.ndarray)}
        attrs = {**_DEFAULTS.get(op, {}), **{k: v for k, v in given.items() if not isinstance(v, np.ndarray)}}
        names = {role: f"{op}{number}.{role}" for role in arrays}
        self.weights.update({names[role]: w for role, w in arrays.items()})
        self.stores.update({name: store for name in names.values()})
        made = tuple(f"{op}{number}_{at}" for at in range(OPS[op].outputs))
        self.nodes.append(Node(op, f"{op}{number}", inputs, made, names, attrs))
        return made[0] if len(made) == 1 else made

    def conv(self, x, outs, ins, *kernel, residual=None, bias=True, density=1.0, block=1, **attrs):
        """A convolution of ``outs`` by ``ins`` channels (of one group)."""
        given = {"weight": self.numbers(outs, ins, *(kernel or (3, 3)), density=density, block=block)}
        if bias:
            given["bias"] = self.numbers(outs)
        return self.add("conv", x, *([residual] if residual else []), **given, **attrs)

    def linear(self, x, outs, ins, residual=None, bias=True, density=1.0, block=1, **attrs):
        """A linear layer."""
        given = {"weight": self.numbers(outs, ins, density=density, block=block)}
        if bias:
            given["bias"] = self.numbers(outs)
        return self.add("linear", x, *([residual] if residual else []), **given, **attrs)

    def const(self, *shape):
        """A value that is a weight."""
        return self.add("const", value=self.random.standard_normal(shape).astype(np.float32))

    def cell(self, op, features, hidden, layers, directions):
        """The weights of a recurrent layer, with the dots of their roles doubled low lines."""
        gates, made = OPS[op].gates * hidden, {}
        for layer in range(layers):
            reads = features if layer == 0 else directions * hidden
            for direction in range(directions):
                shapes = {"w_ih": (gates, reads), "w_hh": (gates, hidden), "b_ih": (gates,), "b_hh": (gates,)}
                for kind, shape in shapes.items():
                    made[cell_role(kind, layer, direction).replace(".", "__")] = self.numbers(*shape, density=0.6)
        return made

    def graph(self, *outputs):
        """The graph with these outputs."""
        specs = {name: WeightSpec(w.shape, self.stores[name]) for name, w in self.weights.items()}
        return Graph(tuple(self.inputs), outputs, specs, tuple(self.nodes))


class Core:
    """A session through the C interface itself: what `Session` does, without reading the plan in Python."""

    def __init__(self, path, threads=1, isa="auto", tuning=None, memory_limit=0):
        self._plan, self._session = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("sec_plan_open", str(path).encode(), ctypes.byref(self._plan))
        chosen = json.dumps(tuning).encode() if tuning else None
        options = _native.Options(threads, 0, memory_limit, isa.encode(), chosen)
        self._call("sec_session_create", self._plan, ctypes.byref(options), ctypes.byref(self._session))

    def _call(self, name, *arguments):
        text = ctypes.create_string_buffer(1024)
        assert getattr(_LIBRARY, name)(*arguments, text, 1024) == 0, text.value.decode()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        _LIBRARY.sec_session_free(self._session)
        _LIBRARY.sec_plan_free(self._plan)

    def __call__(self, *inputs):
        """The outputs, always as a tuple."""
        batches = [array.shape[0] for at, array in enumerate(inputs) if self._shape(at)[:1] == [0]]
        found = [self._empty(batches[0] if batches else 1, at) for at in range(_LIBRARY.sec_plan_outputs(self._plan))]
        given, wanted = [(_native.Tensor * len(side))(*map(tensor, side)) for side in (inputs, found)]
        self._call("sec_session_run", self._session, given, len(inputs), wanted, len(found))
        return tuple(found)

    def _shape(self, index):
        spec = _native.Tensor()
        _LIBRARY.sec_plan_input(self._plan, index, None, ctypes.byref(spec))
        return spec.shape[: spec.ndim]

    def _empty(self, batch, index):
        spec = _native.Tensor()
        self._call("sec_session_output", self._session, batch, index, ctypes.byref(spec))
        return np.full(spec.shape[: spec.ndim], 1e30, np.float32)

    def explain(self, batch=1):
        """The steps, as `Session.explain` gives them."""
        self._call("sec_session_prepare", self._session, batch)
        size = _LIBRARY.sec_session_explain(self._session, batch, None, 0) + 1
        text = ctypes.create_string_buffer(size)
        _LIBRARY.sec_session_explain(self._session, batch, text, size)
        return json.loads(text.value)


def tensor(array):
    """An array as the C interface takes it."""
    made = _native.Tensor(array.ctypes.data, int(array.dtype == np.int64), array.ndim)
    made.shape[: array.ndim] = array.shape
    return made


class Case:
    """A network as a plan file, and what it must give."""

    def __init__(self, net, outputs, path):
        self.path, self.ids = path, net.ids
        planfile.write(path, net.graph(*outputs), net.weights)
        self.graph, weights = planfile.read(path)  # stores round
        self.exact = Reference(self.graph, weights, np.float64)
        self.wanted = functools.cache(lambda batch: self.exact(*self.inputs(batch)))
        self.rounding = functools.cache(self._rounding)

    def inputs(self, batch, seed=0):
        """Arrays for the inputs: normal numbers, or ids."""
        random = np.random.default_rng([seed, batch])
        made = []
        for spec in self.graph.inputs:
            shape = tuple(size or batch for size in spec.shape)
            high = self.ids[spec.name]
            normal = random.standard_normal(shape).astype(np.float32)
            made.append(random.integers(0, high, shape) if high else np.asarray(normal))
        return made

    def _rounding(self, batch):
        """One rounding of the largest value on the way, which a small output of large values may be off by."""
        values = self.exact.trace(*self.inputs(batch)).values()
        return 2.0**-23 * max(float(np.abs(value).max(initial=0)) for value in values)

    def check(self, isa, batches, threads=THREADS, tuning=None, rounding=False):
        """The core gives what the reference gives, for each number of threads and each batch."""
        for count in threads:
            with Core(self.path, threads=count, isa=isa, tuning=tuning) as session:
                for batch in batches:
                    found = session(*self.inputs(batch))
                    where = f"{isa}, {count} threads, batch {batch}, tuning {tuning}"
                    floor = self.rounding(batch) if rounding else 0.0
                    for name, got, want in zip(self.graph.outputs, found, self.wanted(batch), strict=True):
                        assert_close(got, want, f"{name} with {where}", floor)


def assert_close(found, wanted, what="", floor=0.0):
    """Equal where the reference is NaN or infinite, elsewhere off by a share of the largest value or by ``floor``."""
    assert found.shape == wanted.shape, what
    with np.errstate(over="ignore"):
        calm = np.isfinite(wanted.astype(np.float32))
        np.testing.assert_array_equal(found[~calm], wanted.astype(np.float32)[~calm], what)
    assert np.isfinite(found[calm]).all(), f"{what}: a result is not finite"
    top = np.abs(wanted[calm]).max(initial=0.0)
    error = np.abs(found[calm] - wanted[calm]).max(initial=0.0)
    assert error <= max(TOLERANCE * top, floor), (
        f"{what}: off by {error:.3g}, {error / max(top, 1e-300):.3g} of the largest value"
    )


def batches_of(isa):
    """One example, some, a full set of lanes, and one more."""
    return sorted({1, 3, lanes(isa), lanes(isa) + 1})


def child(code, *arguments, timeout=120, **options):
    """Runs a script in a process of its own, without the type checks of the tests."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **options)


def crash(done):
    """What a finished process died of, or an empty text."""
    if done.returncode >= 0:
        return ""
    with contextlib.suppress(ValueError):
        return signal.Signals(-done.returncode).name
    return str(done.returncode)


def steps(session, batch=1):
    """The paths that the steps of each node took."""
    found = {}
    for step in session.explain(batch)["steps"]:
        found.setdefault(step["node"], []).append(step["path"])
    return found


def text(value):
    """A value as a script's argument."""
    return json.dumps(value)


def threads_now():
    """How many threads this process has."""
    return len(os.listdir("/proc/self/task"))
