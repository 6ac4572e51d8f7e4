"""Real runs, made once by the command line for all workers: one with everything that a report shows, and many."""

import contextlib
import fcntl
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

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


SMALL = """secateur = "0.1"
{seed}
[model]
use = "mlp"
widths = [32, 16]

[data]
use = "digits"
batch = 50
train = 600
test = 300
"""
COMPARED = """
[compare]
sparsity = [0.6, 0.9]
methods = ["gradual"]
seeds = [0, 1]
epochs = 8

[train]
lr = 0.1
"""
MEASURED = """
[[step]]
do = "train"
epochs = 6
lr = 0.1

[[step]]
do = "prune"
to = "sparsity 0.8"

[[step]]
do = "train"
epochs = 4
lr = 0.05

[[step]]
do = "measure"
"""


def real_run(base: pathlib.Path) -> pathlib.Path:
    """The run of ``recipes/mnist-report.toml``, or of digits where MNIST is not here.

    The folder is shared: a worker waits for the one that makes it, and running again does nothing.
    """
    places = (os.environ.get("SECATEUR_DATA"), ROOT.parent / "shared" / "data")
    data = next((str(place) for place in places if place and (pathlib.Path(place) / "mnist").is_dir()), None)
    recipe = ROOT / "recipes" / "mnist-report.toml"
    with locked(base / "real.lock"):
        if data is None:
            recipe = base / "digits.toml"
            recipe.write_text(DIGITS)
        told("run", recipe, "-o", base / "real", *(["--data-dir", data] if data else []))
    return base / "real"


def real_runs(base: pathlib.Path) -> pathlib.Path:
    """A comparison of four methods, two runs of a fifth setting, and ``page.html`` about all eighteen.

    Shared as :func:`real_run`; about twenty seconds of one core.
    """
    home = base / "many"
    with locked(base / "many.lock"):
        if (home / "page.html").is_file():
            return home
        home.mkdir(exist_ok=True)
        (home / "tiny.toml").write_text(SMALL.format(seed="") + COMPARED)
        told("compare", home / "tiny.toml", "-o", home / "tiny")
        for seed in (0, 1):
            (home / f"run-{seed}.toml").write_text(SMALL.format(seed=f"seed = {seed}\n") + MEASURED)
            told("run", home / f"run-{seed}.toml", "-o", home / f"run-{seed}")
        told("compare-report", *(home / name for name in ("tiny", "run-0", "run-1")), "-o", home / "page.html")
    return home


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Waits until no other worker holds the file."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def told(*words: str | pathlib.Path) -> None:
    """Carries out a command of ``secateur``."""
    line = [sys.executable, "-m", "secateur.cli.main", *map(str, words)]
    alone = {"OMP_NUM_THREADS": "1", **os.environ}  # threads that wait for one another are slow on a busy machine
    made = subprocess.run(line, capture_output=True, text=True, env=alone)
    assert made.returncode == 0, made.stdout + made.stderr
