"""The C example, built with the system's compiler against the library, prints what the Python session computes."""

import importlib.util
import pathlib
import shutil
import subprocess

import numpy as np
import pytest

from secateur import _native
from secateur.runtime.session import Session

_spec = importlib.util.spec_from_file_location("native_kit", pathlib.Path(__file__).with_name("native_kit.py"))
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)
NATIVE = pathlib.Path(__file__).resolve().parents[2] / "native"
pytestmark = [kit.needs_native, pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler called cc")]


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The program, built as its users would."""
    program = tmp_path_factory.mktemp("example") / "run_plan"
    source, library = NATIVE / "examples" / "run_plan.c", _native.library_path().resolve()
    command = ["cc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", str(source), f"-I{NATIVE / 'include'}"]
    command += [str(library), f"-Wl,-rpath,{library.parent}", "-o", str(program)]
    subprocess.run(command, check=True, timeout=120)
    return program


def network(net):
    x, ids = net.input(0, 5, 9, 7), net.input(0, 4, ids=3)
    a = net.conv(x, 8, 5, 3, 3, pad=(1, 1, 1, 1), act="relu", density=0.4)
    words = net.linear(net.add("embedding", ids, weight=net.numbers(3, 6)), 5, 6)
    return [net.add("reduce", a, fn="mean", axes=(2, 3), keepdims=False), words]


@pytest.mark.parametrize("batch", [1, 3])
def test_the_example_agrees_with_python(example, tmp_path, batch):
    """Nine digits tell floats apart, so equal text is equal bits."""
    net = kit.Net(1)
    case = kit.Case(net, network(net), tmp_path / "plan.safetensors")
    count = np.arange(batch * 5 * 9 * 7, dtype=np.float32) % np.float32(17)
    x = (count / np.float32(17) - np.float32(0.5)).reshape(batch, 5, 9, 7)
    with Session(case.path, threads=2) as session:
        found = session(x, np.zeros((batch, 4), np.int64))
    lines = [f"output {i}: " + " ".join(f"{v:.9g}" for v in array.ravel()[:8]) for i, array in enumerate(found)]
    done = subprocess.run([example, case.path, str(batch)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr, done.stdout.splitlines()) == (0, "", lines)


def test_the_example_tells_what_is_wrong(example, tmp_path):
    """No argument, no file and no plan end with one line and status 2."""
    (tmp_path / "empty").write_bytes(b"")
    for arguments in ([], [tmp_path / "nothing"], [tmp_path / "empty"]):
        done = subprocess.run([example, *arguments], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
