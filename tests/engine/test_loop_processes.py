"""The training loop is interrupted, and runs in several processes."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false

import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from secateur.engine.checkpoint import load_state
from secateur.engine.loop import Training
from secateur.engine.recipe import TrainStep

_spec = importlib.util.spec_from_file_location("loop_kit", pathlib.Path(__file__).with_name("loop_kit.py"))
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)
loader, mlp, same = kit.loader, kit.mlp, kit.same


# Interrupting

PROGRAM = textwrap.dedent("""
    import sys
    from pathlib import Path
    import torch
    from torch import nn
    from secateur.core.streams import stream
    from secateur.data import Loader, Split
    from secateur.engine.loop import Training
    from secateur.engine.recipe import TrainStep

    def fit(folder, watch=None):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 3))
        x = torch.randn(11, 6, generator=stream(0, "x"))
        data = Loader(Split(x, torch.arange(11) % 3), 3, shuffle=True, seed=2)
        Training(net, data, TrainStep(epochs=3, lr=0.1, ema=0.9), folder=folder, watch=watch).fit()
        return net.state_dict()

    def wait(figures):
        if figures["step"] == 6:
            print("ready", flush=True)
            sys.stdin.readline()  # the signal arrives before the line does

    if __name__ == "__main__":
        try:
            fit(Path(sys.argv[1]), wait)
        except KeyboardInterrupt:
            sys.exit(130)
""")


@pytest.mark.processes
def test_ctrl_c_ends_after_a_whole_step_and_the_run_goes_on_to_the_bit(tmp_path):
    """SIGINT in step 6 of 12, in a process of its own: exit after a checkpoint; the next start ends as if uncut."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "cut")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as cut:
        assert cut.stdout.readline() == "ready\n"
        os.kill(cut.pid, signal.SIGINT)
        _, errors = cut.communicate("\n", timeout=60)
    assert cut.returncode == 130, errors
    assert load_state(tmp_path / "cut")["step"] == 6
    here = {"__name__": "program"}
    exec(PROGRAM, here)

    again = here["fit"](tmp_path / "cut")

    assert same(again, here["fit"](tmp_path / "whole"))


def test_ctrl_c_in_the_last_evaluation_is_not_swallowed(tmp_path):
    """The signal comes after the last step: the checkpoint is whole, and the caller hears of it."""

    def evaluate(net):
        if made.run.step == 6:
            signal.raise_signal(signal.SIGINT)
        return {}

    made = Training(mlp(), loader(), TrainStep(epochs=2, lr=0.1), folder=tmp_path, evaluate=evaluate)
    before = signal.getsignal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        made.fit()

    assert load_state(tmp_path)["epoch"] == 2
    assert signal.getsignal(signal.SIGINT) is before


# Several processes

RANKS = textwrap.dedent("""
    import os
    import sys
    from pathlib import Path
    import torch
    from torch import nn
    from secateur.core.losses import CrossEntropy
    from secateur.core.streams import stream
    from secateur.core.task import Task
    from secateur.criteria.taylor import Taylor
    from secateur.data import Loader, Split
    from secateur.engine import distributed
    from secateur.engine.loop import Training
    from secateur.engine.recipe import TrainStep
    from secateur.rules.gradual import Gradual

    x = torch.randn(24, 6, generator=stream(0, "x"), dtype=torch.float64)
    y = torch.arange(24) % 3

    def fit(drop, folder=None, stop=99, every=0):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(drop), nn.Linear(16, 3)).double()
        rank, world = distributed.rank(), distributed.world()
        data = Loader(Split(x, y), 8 // world, shuffle=True, seed=1, dtype=torch.float64, rank=rank, world=world)

        def watch(figures):
            if figures["step"] > stop:
                raise InterruptedError

        step = TrainStep(epochs=4, lr=0.1, clip=0.5, rules=(Gradual(0.7, Taylor()),), save_every=every)
        sample = lambda examples, model: Task(model, CrossEntropy(), [(x, y)])
        masks = Training(net, data, step, folder=folder, sample=sample, watch=watch).fit()
        return net.state_dict(), masks

    if __name__ == "__main__":
        torch.set_num_threads(1)
        out = Path(sys.argv[1])
        distributed.start()
        smooth = fit(0.0)
        whole, _ = fit(0.5, out / "whole")
        try:
            fit(0.5, out / "cut", 7, 1)
        except InterruptedError:
            distributed.barrier()
        again, _ = fit(0.5, out / "cut")
        result = {"smooth": smooth[0], "masks": dict(smooth[1]), "whole": whole, "again": again}
        torch.save(result, out / f"{distributed.rank()}.pt")
        distributed.barrier()
        distributed.stop()
        os._exit(0)  # what gloo's threads do while the interpreter goes down is not under test
""")


@pytest.mark.processes
def test_two_processes_train_as_one_and_resume_to_the_bit(tmp_path):
    """Half batches on two ranks: the masks of one process, its weights to 1e-13; with dropout, resumed = uncut."""
    path = tmp_path / "ranks.py"
    path.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    here = {"__name__": "program"}
    exec(RANKS, here)

    alone, masks = here["fit"](0.0)

    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert same(first["masks"], dict(masks)) and masks.kept < masks.total
    for name, weight in alone.items():
        torch.testing.assert_close(first["smooth"][name], weight, rtol=0, atol=1e-13)
    for result in (first, second):
        assert same(result["whole"], result["again"]) and same(result["whole"], first["whole"])
