"""A plan is loaded and run where torch does not exist."""

import subprocess
import sys

import numpy as np

from secateur.runtime.graph import Graph, InputSpec, Node, WeightSpec
from secateur.runtime.planfile import write

SCRIPT = """
import sys
sys.modules["torch"] = None  # importing it fails from here on
import pathlib
import numpy as np
import secateur.runtime
from secateur.runtime import Graph, GraphError, InputSpec, Node, Reference, RuntimeFileError, WeightSpec
from secateur.runtime import planfile
for name in ("Graph", "Reference", "RuntimeFileError"):
    if name not in dir(secateur.runtime):
        raise SystemExit(name)
graph, weights = planfile.read(pathlib.Path(sys.argv[1]))
print(*Reference(graph, weights)(np.array([[2.0, -3.0, 5.0]], np.float32))[0].ravel())
loaded = [name for name in sys.modules if name.partition(".")[0] == "torch" and sys.modules[name] is not None]
raise SystemExit(str(loaded) if loaded else 0)
"""


def test_a_plan_runs_without_torch(tmp_path):
    node = Node("linear", "a", ("x",), ("y",), {"weight": "w"}, {"act": "relu"})
    graph = Graph((InputSpec("x", "f32", (0, 3)),), ("y",), {"w": WeightSpec((2, 3))}, (node,))
    write(tmp_path / "p", graph, {"w": np.array([[1, 1, 1], [0, 1, 0]], np.float32)})
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "p")], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["4.0", "0.0"]


def test_importing_the_package_loads_nothing_else():
    script = (
        "import secateur.runtime, sys; print(sorted(m for m in ('numpy', 'torch', 'safetensors') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
