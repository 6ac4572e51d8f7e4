"""Several processes stop, save and fail together; which device each takes."""

import collections
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist

from secateur.core.errors import UsageError
from secateur.engine import distributed
from secateur.engine.machine import pinned

PROGRAM = textwrap.dedent("""
    import json
    import os
    import sys
    from pathlib import Path
    import torch
    from torch import nn
    from secateur.core.errors import SecateurError
    from secateur.data import Loader, Split
    from secateur.engine import distributed
    from secateur.engine.checkpoint import load_state
    from secateur.engine.loop import Training
    from secateur.engine.recipe import TrainStep

    torch.set_num_threads(1)
    distributed.start()
    rank, out, told = distributed.rank(), Path(sys.argv[1]), {}
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    data = Loader(Split(x, torch.arange(40) % 3), 4, seed=1, rank=rank, world=distributed.world())

    def attempt(name, work):
        try:
            told[name] = work()
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"

    def training(folder=None, bad=None, every=0, watch=None):
        def loss(output, target):
            value = nn.functional.cross_entropy(output, target)
            return value * float("nan") if (rank, made.run.step) == bad else value

        made = Training(net, data, TrainStep(epochs=2, lr=0.1, save_every=every), folder=folder, loss=loss, watch=watch)
        return made
""")
END = textwrap.dedent("""
    (out / f"{rank}.json").write_text(json.dumps(told))
    distributed.barrier()
    distributed.stop()
    os._exit(0)  # what gloo's threads do while the interpreter goes down is not under test
""")


def two(folder, text):
    """What two processes told."""
    path = folder / "ranks.py"
    path.write_text(PROGRAM + textwrap.dedent(text) + END)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(path)]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=120, env=quiet)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.processes
def test_a_loss_that_is_not_finite_in_one_process_stops_both_at_that_step(tmp_path):
    """Step 3, in the second process only; no weight of either has moved by it."""
    first, second = two(tmp_path, """
        made = training(bad=(1, 3))
        attempt("error", made.fit)
        told["step"] = made.run.step
        told["finite"] = all(bool(p.isfinite().all()) for p in net.parameters())
    """)  # fmt: skip

    assert first["error"].startswith("DataError: the loss of another process is not finite at step 3 (epoch 1). Lower")
    assert second["error"].startswith("DataError: the loss became nan at step 3 (epoch 1). Lower `lr` (0.1)")
    assert first["step"] == second["step"] == 3 and first["finite"] and second["finite"]


@pytest.mark.processes
def test_both_processes_save_at_the_same_steps(tmp_path):
    """Every third step and after each epoch of five: as many checkpoints as one process would write."""
    first, second = two(tmp_path, """
        made, saved = training(out / "run", every=3), []
        whole = made._checkpoint

        def checkpoint():
            whole()
            saved.append(load_state(out / "run")["step"])

        made._checkpoint = checkpoint
        attempt("fit", lambda: len(made.fit()))
        told["saved"] = saved
    """)  # fmt: skip

    assert first == second == {"fit": 2, "saved": [3, 5, 8, 10]}


@pytest.mark.processes
def test_what_fails_in_the_first_process_ends_both(tmp_path):
    """Whatever the first process does alone: the second neither hangs nor goes on."""
    first, second = two(tmp_path, """
        def refuse():
            raise SecateurError("the disk is full")

        def spoil(row):
            if rank == 0 and row["step"] == 4:
                (out / "run").chmod(0o500)
                (out / "run" / "state.pt").mkdir()

        attempt("fails", lambda: distributed.first(refuse))
        attempt("goes on", lambda: distributed.first(lambda: (out / "done").write_text(str(rank))))
        attempt("training", lambda: training(out / "run", watch=spoil).fit())
    """)  # fmt: skip

    assert first["fails"] == "SecateurError: the disk is full"
    assert second["fails"] == "SecateurError: the first process stopped: the disk is full"
    assert first["goes on"] is second["goes on"] is None and (tmp_path / "done").read_text() == "0"
    assert first["training"].startswith("FileError: cannot write")
    assert second["training"].startswith("SecateurError: the first process stopped: cannot write")


@pytest.mark.processes
def test_a_run_of_two_processes_is_not_gone_on_with_by_one(tmp_path):
    """Half as many examples in a step would follow another schedule."""
    text = """
        attempt("fit", lambda: len(training(out / "run").fit()))
    """
    assert [told["fit"] for told in two(tmp_path, text)] == [2, 2]
    program = PROGRAM + textwrap.dedent(text) + END
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    fit = json.loads((tmp_path / "0.json").read_text())["fit"]
    assert fit.startswith("FileError") and "`processes` is 1, there it is 2" in fit and "`batches` is 10" in fit


@pytest.fixture
def cuda(monkeypatch):
    """A machine with two CUDA devices, as torch would tell; gives what is asked of it, in order."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(f"device {device}"))
    monkeypatch.setattr(dist, "init_process_group", asked.append)
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    return asked


def test_each_process_takes_its_device_before_it_joins_the_others(cuda):
    distributed.start()

    assert cuda == ["device 1", "nccl"] and distributed.device() == torch.device("cuda", 1)


def test_more_processes_than_devices_are_refused(cuda, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")

    with pytest.raises(UsageError, match=r"process 3 of this machine has no CUDA device.*--nproc_per_node 2"):
        distributed.start()

    assert cuda == []


def test_every_tensor_of_a_batch_is_pinned(monkeypatch):
    """Inside tuples, named tuples, lists and mappings; what is no tensor stays as it is."""
    pair = collections.namedtuple("pair", "ids mask")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    x = torch.zeros(2)

    made = pinned(({"a": x, "b": [x, "text"]}, pair(x, 3), x))

    assert type(made) is tuple and type(made[1]) is pair and type(made[0]["b"]) is list
    tensors = [made[0]["a"], made[0]["b"][0], made[1].ids, made[2]]
    assert all(torch.equal(tensor, x + 1) for tensor in tensors)
    assert made[0]["b"][1] == "text" and made[1].mask == 3
