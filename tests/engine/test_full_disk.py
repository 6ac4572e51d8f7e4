"""A disk that fills up in training: one clear error, nothing half-written, and the run goes on when there is space.

A limit on the size of files stands in for a full disk.
"""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from secateur.cli.main import main
from secateur.engine.checkpoint import load_state
from secateur.engine.folder import Artefact

LIMITED = textwrap.dedent("""
    import resource, signal, sys
    from pathlib import Path
    import torch
    from secateur.cli.main import main
    from secateur.core.errors import FileError
    from secateur.engine.checkpoint import Metrics, load_state, save_state

    def limit(size):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def told(work):
        try:
            work()
        except FileError as error:
            print(error)

""")
TRAIN = ["train", "--net", "mlp", "--data", "digits", "--epochs", "1", "-s", "model.widths=[200, 100]",
         "-s", "data.train=200", "-s", "data.test=100", "-o"]  # fmt: skip


def limited(*lines, words=()):
    """A program of its own, with the helpers above."""
    program = LIMITED + "\n".join(lines)
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", program, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=quiet)


@pytest.mark.processes
def test_training_stops_with_one_error_and_goes_on_when_there_is_space(tmp_path):
    """The checkpoint does not fit: exit code 2, no file of the step is whole or half; then the same as undisturbed."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert main([*TRAIN, str(whole)]) == 0

    done = limited("limit(150_000)", "sys.exit(main(sys.argv[1:]))", words=[*TRAIN, out])

    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("secateur: error:") == 1
    assert "cannot write" in done.stderr and "state.pt" in done.stderr and "free some space" in done.stderr
    assert {p.name for p in next(out.glob("1-train-*")).iterdir()} <= {"metrics.jsonl"}
    assert not [p for p in out.rglob(".*") if p.name != ".lock"]
    assert main([*TRAIN, str(out)]) == 0
    assert Artefact.open(out).digest == Artefact.open(whole).digest


def test_the_older_checkpoint_stays(tmp_path):
    done = limited(
        "folder = Path(sys.argv[1])",
        "save_state(folder, {'step': 1, 'w': torch.ones(10)})",
        "limit(20_000)",
        "told(lambda: save_state(folder, {'step': 2, 'w': torch.ones(100_000)}))",
        words=[tmp_path],
    )

    assert done.returncode == 0, done.stderr
    assert "cannot write" in done.stdout and "state.pt: File too large. Nothing was changed there" in done.stdout
    state = load_state(tmp_path)
    assert state is not None and state["step"] == 1 and state["w"].sum() == 10
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_metrics_hold_whole_lines_only(tmp_path):
    """The limit falls in the midst of the third line."""
    done = limited(
        "metrics = Metrics(Path(sys.argv[1]) / 'metrics.jsonl')",
        "limit(60)",
        "for step in range(4): told(lambda: metrics.write(step=step, loss=0.12345))",
        words=[tmp_path],
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("metrics.jsonl: File too large") == 2
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [0, 1] and text.endswith("\n")
