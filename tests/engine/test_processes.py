"""``torchrun`` with two processes: one run folder, written by the first process, equal in all to one run."""

import json
import os
import subprocess
import sys

import pytest

from secateur.engine.folder import Artefact

pytestmark = pytest.mark.processes

WORDS = ["train", "--net", "mlp", "--data", "digits", "--epochs", "2", "--lr", "0.05", "-s", "model.widths=[16, 8]",
         "-s", "data.train=240", "-s", "data.test=100", "-s", "data.batch=20", "--rule", "gradual",
         "-s", "rules.1.sparsity=0.8", "-s", "rules.1.updates=5", "--json"]  # fmt: skip


def torchrun(out, *more, verb=WORDS):
    """Two processes of the command line."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
             "--master_port", "0", "-m", "secateur.cli.main", *verb, *more, "-o", str(out)]  # fmt: skip
    words[5:9] = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(words, capture_output=True, text=True, timeout=240, check=False, env=quiet)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of two processes: what it said, and its folder."""
    out = tmp_path_factory.mktemp("two") / "out"
    return torchrun(out), out


def test_two_processes_end_with_one_artefact(made):
    """Exit code 0; the folder holds one whole step with the zeros that were asked for."""
    done, out = made

    assert done.returncode == 0, done.stderr
    folders = [p for p in out.iterdir() if p.is_dir()]
    assert len(folders) == 1 and folders[0].name.startswith("1-train-")
    artefact = Artefact.open(out)
    masks = artefact.masks()
    assert masks.kept == masks.total - masks.total * 8 // 10 == artefact.card["kept"]
    masks.check(artefact.build())
    assert not (folders[0] / "state.pt").exists()


def test_only_the_first_process_writes_and_prints(made):
    """One JSON on standard output, one line a step in the metrics, each example once an epoch."""
    done, out = made

    assert json.loads(done.stdout)
    rows = [json.loads(line) for line in next(out.glob("1-*/metrics.jsonl")).read_text().splitlines()]
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert len(steps) == len(set(steps)) and steps[-1] == 12
    assert [row["epoch"] for row in rows if "test/accuracy" in row] == [1, 2]
    kept = [row["kept"] for row in rows]
    assert kept == sorted(kept, reverse=True)
    assert not list(out.rglob("*.tmp"))


def test_a_finished_run_is_skipped_by_both(made):
    """Running again changes no file of the step."""
    done, out = made
    assert done.returncode == 0, done.stderr
    before = {p: p.stat().st_mtime_ns for p in out.glob("1-*/*")}

    again = torchrun(out)

    assert again.returncode == 0, again.stderr
    assert {p: p.stat().st_mtime_ns for p in out.glob("1-*/*")} == before


def test_an_error_ends_both_processes(tmp_path):
    """A mistake of the user is told, nothing hangs, and no artefact is left."""
    done = torchrun(tmp_path / "out", "-s", "epochs=0")

    assert done.returncode != 0
    assert "at least 1" in done.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("epochs", ["0", "1"])
def test_pruning_and_measuring_go_through_and_are_skipped_the_second_time(made, tmp_path, epochs):
    """Pruning at once and while training, then measuring, which the first process does alone."""
    verb = ["prune", str(made[1]), "--to", "sparsity 0.9", "--epochs", epochs, "--json"]

    done = torchrun(tmp_path / "out", verb=verb)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    verdict = json.loads(next(tmp_path.glob("out/2-measure-*/verdict.json")).read_text())
    masks = Artefact.open(tmp_path / "out").masks()
    assert masks.kept == masks.total - masks.total * 9 // 10
    assert sum(row["kept"] for row in verdict["layers"]) == masks.kept
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("out/[12]-*/*")}
    again = torchrun(tmp_path / "out", verb=verb)
    assert again.returncode == 0, again.stderr
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("out/[12]-*/*")} == before
