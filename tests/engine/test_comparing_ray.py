"""Comparisons spread over processes and over a Ray cluster; a worker killed in the middle loses nothing."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.processes

FILE = """
[model]
use = "mlp"
widths = [16, 8]

[data]
use = "digits"
train = 200
test = 100
batch = 20

[compare]
sparsity = [0.75]
seeds = [0, 1]
epochs = 2

[train]
lr = 0.05
save_every = 3
rules = ["killer:Once"]
"""

# Ends the process of the first run that reaches its eighth step, once: between two checkpoints, which are every third.
PLUG_IN = """
import os
import signal
from dataclasses import dataclass

from secateur.core.reading import Paper
from secateur.core.sockets import Rule


@dataclass(frozen=True)
class Once(Rule):
    paper = Paper("none", "nobody", 2026, "", differs="ends its process once")

    def after_step(self, run):
        if run.step != 8:
            return
        try:
            mark = os.open(os.environ["KILLED"], os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return
        os.write(mark, str(os.getpid()).encode())
        os.close(mark)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def compared(folder, out, killed, *words):
    """The command line in a process of its own; gives the process and the table."""
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "KILLED": str(killed), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "secateur.cli.main", "compare", "small.toml", "-o", str(out), "--json", *words]
    done = subprocess.run(command, cwd=folder, env=quiet, capture_output=True, text=True, timeout=500, check=False)
    return done, json.loads(done.stdout) if done.returncode == 0 else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a comparison of 8 runs, and the plug-in that all of them use."""
    made = tmp_path_factory.mktemp("spread")
    (made / "small.toml").write_text(FILE)
    (made / "killer.py").write_text(PLUG_IN)
    return made


@pytest.fixture(scope="module")
def serial(folder):
    """The figures of all 8 runs, one after the other, none of them killed."""
    (folder / "before").touch()
    done, table = compared(folder, folder / "serial", folder / "before")
    assert done.returncode == 0, done.stderr
    return table


def figures(table):
    """All figures of all runs; seconds are no figure of a method."""
    return [{key: value for key, value in run.items() if key != "seconds"} for run in table["runs"]]


def check(done, table, serial, killed, out):
    assert done.returncode == 0, done.stderr
    assert killed.is_file(), "no worker was killed"
    assert len(table["runs"]) == 8 and table["missing"] == []
    assert all("accuracy" in run for run in table["runs"])
    assert figures(table) == figures(serial)
    assert not list(out.rglob("state.pt")), "an unfinished step was left"


def test_processes_of_which_one_is_killed_give_the_figures_of_a_serial_run(folder, serial):
    out, killed = folder / "processes", folder / "killed-process"
    done, table = compared(folder, out, killed, "--workers", "2")
    check(done, table, serial, killed, out)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'secateur[ray]'")
def test_ray_workers_of_which_one_is_killed_give_the_figures_of_a_serial_run(folder, serial):
    out, killed = folder / "ray", folder / "killed-ray"
    done, table = compared(folder, out, killed, "--ray", "--workers", "2")
    check(done, table, serial, killed, out)
