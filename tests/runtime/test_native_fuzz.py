"""Random small networks: the compiled core gives what the float64 reference gives, to 1e-5 of the largest value."""

import importlib.util
import os
import pathlib

import numpy as np
import pytest

from secateur.core.errors import SecateurError


def _kit(name):
    spec = importlib.util.spec_from_file_location(name, pathlib.Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kit, growing = _kit("native_kit"), _kit("native_grow")
pytestmark = kit.needs_native

CHUNK = 10  # networks in one test
SHORT = int(os.environ.get("SECATEUR_FUZZ", "150"))
LONG = 2000


def one(seed, path):
    """Grows, writes and checks the network of a seed."""
    random = np.random.default_rng(seed)
    net = kit.Net(seed)
    grower = growing.Grower(net, random)
    outputs = grower.grow(int(random.integers(3, 11)))
    case = kit.Case(net, outputs, path)
    isa = grower.pick(kit.ISAS)
    strips = grower.pick((0, 0, *(1 << n for n in range(5) if 1 << n <= kit.lanes(isa))))
    tuning = {"strips": strips, "vectors": grower.pick((0, 0, 1, 3)), "piece": grower.pick((0, 0, 1, 2, 3))}
    names = [node.name for node in net.nodes if node.op in ("conv", "linear")]
    if random.random() < 0.4:
        tuning["layers"] = {
            name: {
                "path": grower.pick(("lists", "blocks")),
                "p": grower.pick((0, 1, 3)),
                "chunk": grower.pick((0, 1, 900)),
            }
            for name in names
        }
    batches = [int(n) for n in random.choice((1, 2, 3, 4, 5, 8, 9, 17), 3, replace=False)]
    case.check(isa, batches, (grower.pick((1, 1, 2, 3)),), tuning, rounding=True)


def several(first, folder):
    for seed in range(first, first + CHUNK):
        try:
            one(seed, folder / f"{seed}.safetensors")
        except (AssertionError, SecateurError) as error:
            raise AssertionError(f"network {seed}: {error}") from error


@pytest.mark.parametrize("first", range(0, SHORT, CHUNK))
def test_networks(first, tmp_path):
    several(first, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("first", range(1000, 1000 + LONG, CHUNK))
def test_many_networks(first, tmp_path):
    several(first, tmp_path)
