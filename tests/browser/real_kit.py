"""A real run with everything that a report can show, made once by the command line for all workers."""

import fcntl
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
DIGITS = """secateur = "0.1"

[model]
use = "mlp"
widths = [64, 32]

[data]
use = "digits"
batch = 50

[[step]]
do = "train"
epochs = 8
lr = 0.05

[[step]]
do = "prune"
to = "sparsity 0.8"

[[step]]
do = "train"
epochs = 2
lr = 0.02

[[step]]
do = "measure"
probes = ["calibration", "dead_units"]
damage = true
flatness = true
"""


def real_run(base: pathlib.Path) -> pathlib.Path:
    """The run of ``recipes/mnist-report.toml``, or of digits where MNIST is not here.

    The folder is shared: a worker waits for the one that makes it, and running again does nothing.
    """
    places = (os.environ.get("SECATEUR_DATA"), ROOT.parent / "shared" / "data")
    data = next((str(place) for place in places if place and (pathlib.Path(place) / "mnist").is_dir()), None)
    recipe = ROOT / "recipes" / "mnist-report.toml"
    if data is None:
        recipe = base / "digits.toml"
        recipe.write_text(DIGITS)
    words = [sys.executable, "-m", "secateur.cli.main", "run", str(recipe), "-o", str(base / "real")]
    with open(base / "real.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = subprocess.run([*words, *(["--data-dir", data] if data else [])], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return base / "real"
