"""The training loop: it does what its options say, resumes to the bit from anywhere, and stops with one clear error."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from secateur.core.errors import DataError, FileError, MaskError, ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import parameters
from secateur.core.reading import Paper
from secateur.core.select import top_mask
from secateur.core.sockets import Rule
from secateur.core.streams import global_state, stream
from secateur.data import Loader, Split
from secateur.engine.checkpoint import Metrics, load_state, read_metrics, save_state
from secateur.engine.loop import Training
from secateur.engine.optimize import make_optimizer, rate
from secateur.engine.recipe import TrainStep
from secateur.rules.gradual import Gradual


def loader(batch=4, count=12, dtype=torch.float64, width=6, **options):
    x = torch.randn(count, width, generator=stream(0, "x"), dtype=torch.float64)
    return Loader(Split(x.to(dtype), torch.arange(count) % 3), batch, shuffle=True, seed=2, dtype=dtype, **options)


def mlp(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def busy(dtype=torch.float64):
    """BatchNorm and dropout, so that a run has state outside its parameters."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 3)).to(dtype)


def half(net):
    return Masks({n: top_mask(parameters(net)[n].detach().abs(), m.numel() // 2) for n, m in Masks.dense(net).items()})


def same(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def by_hand(net, batches, optimizer, loss=nn.functional.cross_entropy, after=lambda step: None):
    """Plain training."""
    net.train()
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        loss(net(x), y).backward()
        after(step)
        optimizer.step()
    return net.state_dict()


def epochs_of(data, count):
    return [batch for epoch in range(count) for batch in data.epoch(epoch)]


# What the options say


def test_it_is_plain_training_to_the_bit():
    """No rule, nothing pruned, a constant rate: the loop everybody writes."""
    net = mlp()
    Training(net, loader(), TrainStep(epochs=3, lr=0.1, schedule="constant", weight_decay=0.01)).fit()

    plain = mlp()
    by_hand(plain, epochs_of(loader(), 3), torch.optim.SGD(plain.parameters(), 0.1, 0.9, weight_decay=0.01))

    assert same(net.state_dict(), plain.state_dict())


@pytest.mark.parametrize(("count", "batch", "accumulate"), [(12, 2, 3), (14, 2, 3), (10, 4, 3)])
def test_accumulating_equals_a_big_batch(count, batch, accumulate):
    """Batches of unequal size included: every example weighs the same, also in the shorter last step of an epoch."""
    one, other = mlp(), mlp()
    first = Training(one, loader(batch, count), TrainStep(epochs=3, lr=0.1, accumulate=accumulate))
    first.fit()
    second = Training(other, loader(batch * accumulate, count), TrainStep(epochs=3, lr=0.1))
    second.fit()

    assert first.run.total == second.run.total == first.run.step
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(weight, other.state_dict()[name], rtol=0, atol=1e-13)


def test_clipping_bounds_the_norm_of_what_is_kept():
    """The step of plain SGD has at most the clipped length; gradients of pruned weights do not count."""
    net, clip = mlp(), 0.01
    masks = half(net)
    masks.apply_(net)
    before = copy.deepcopy(net.state_dict())
    step = TrainStep(epochs=1, lr=1.0, momentum=0.0, clip=clip, schedule="constant")
    Training(net, loader(12), step, masks=masks).fit()

    plain = mlp()
    masks.apply_(plain)

    def clipped(step):
        for name, mask in masks.items():
            parameters(plain)[name].grad.mul_(mask)
        nn.utils.clip_grad_norm_(plain.parameters(), clip)

    by_hand(plain, epochs_of(loader(12), 1), torch.optim.SGD(plain.parameters(), 1.0), after=clipped)
    length = math.sqrt(sum(float((net.state_dict()[n] - w).square().sum()) for n, w in before.items()))
    assert abs(length - clip) < 1e-6
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], weight * masks[name] if name in masks else weight)


def test_the_average_is_the_result():
    """EMA: e = d e + (1 - d) w after every step, beginning with the first weights; zeros stay zero."""
    net, plain = mlp(), mlp()
    masks = half(net)
    Training(net, loader(), TrainStep(epochs=3, lr=0.1, ema=0.8, schedule="constant", momentum=0.0), masks=masks).fit()

    masks.apply_(plain)
    mean = None
    for x, y in epochs_of(loader(), 3):
        plain.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        with torch.no_grad():
            for name, p in plain.named_parameters():
                p -= 0.1 * p.grad * (masks[name] if name in masks else 1)
        now = {n: p.detach().clone() for n, p in plain.named_parameters()}
        mean = now if mean is None else {n: 0.8 * mean[n] + 0.2 * now[n] for n in now}
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), mean[name], rtol=0, atol=1e-13)
    masks.check(net)


def test_label_smoothing_is_the_mean_with_the_uniform_label():
    """One step against the definition: (1 - s) CE + s times the mean CE over all classes."""
    net, plain = mlp(), mlp()
    Training(net, loader(12), TrainStep(epochs=1, lr=0.5, momentum=0.0, smoothing=0.3)).fit()

    def smooth(output, target):
        logs = output.log_softmax(1)
        return -(0.7 * logs[torch.arange(len(target)), target] + 0.3 * logs.mean(1)).mean()

    by_hand(plain, epochs_of(loader(12), 1), torch.optim.SGD(plain.parameters(), 0.5), smooth)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], weight, rtol=0, atol=1e-14)


def test_a_loss_of_one_s_own_is_used():
    net, plain = mlp(), mlp()
    brier = lambda output, target: (output.softmax(1) - nn.functional.one_hot(target, 3)).square().mean()  # noqa: E731
    Training(net, loader(), TrainStep(epochs=2, lr=0.5, momentum=0.0, schedule="constant"), loss=brier).fit()

    by_hand(plain, epochs_of(loader(), 2), torch.optim.SGD(plain.parameters(), 0.5), brier)
    assert same(net.state_dict(), plain.state_dict())


def test_mixed_precision_trains():
    """bfloat16 products, float32 weights and loss; close to full precision, not equal."""
    losses = {}
    for amp in (False, True):
        seen = []
        net = mlp(torch.float32)
        step = TrainStep(epochs=10, lr=0.1, amp=amp)
        Training(
            net, loader(dtype=torch.float32), step, watch=lambda f, seen=seen: seen.append(f.get("train/loss"))
        ).fit()
        losses[amp] = [value for value in seen if value is not None]
        assert all(p.dtype == torch.float32 for p in net.parameters())
    assert losses[True] != losses[False]
    assert losses[True][-1] < 0.8 * losses[True][0]
    assert max(abs(a - b) for a, b in zip(losses[True], losses[False], strict=True)) < 0.05


def test_channels_last_changes_the_layout_only():
    """The same training up to rounding, on weights and images in channels-last order."""
    torch.manual_seed(0)
    first = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    ).double()
    second = copy.deepcopy(first)
    x = torch.randn(8, 3, 6, 6, generator=stream(0, "x"), dtype=torch.float64)
    data = Loader(Split(x, torch.arange(8) % 3), 4, dtype=torch.float64)
    Training(first, data, TrainStep(epochs=2, lr=0.1)).fit()
    Training(second, data, TrainStep(epochs=2, lr=0.1, channels_last=True)).fit()

    assert second[0].weight.is_contiguous(memory_format=torch.channels_last)
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], weight, rtol=0, atol=1e-12)


def test_pruned_weights_stay_zero_and_frozen_ones_stay_put():
    net = busy()
    net[0].bias.requires_grad_(False)
    bias, masks = net[0].bias.detach().clone(), half(net)

    result = Training(
        net, loader(), TrainStep(epochs=3, optimizer="adamw", lr=0.01, weight_decay=0.1), masks=masks
    ).fit()

    assert result == masks and torch.equal(net[0].bias, bias)
    masks.check(net)


def test_gradients_left_over_from_before_do_not_count():
    one, other = mlp(), mlp()
    for p in one.parameters():
        p.grad = torch.ones_like(p)
    for net in (one, other):
        Training(net, loader(), TrainStep(epochs=1, lr=0.1)).fit()

    assert same(one.state_dict(), other.state_dict())


def test_only_and_skip_choose_what_is_held():
    net = mlp()
    assert set(Training(net, loader(), TrainStep(epochs=1, skip=("0.*",))).fit()) == {"2.weight"}
    assert set(Training(net, loader(), TrainStep(epochs=1, only=("0.weight",))).fit()) == {"0.weight"}


# Rates


def rates(total=100, per_epoch=10, **options):
    step = TrainStep(epochs=10, lr=2.0, **options)
    return [rate(step, done, total, per_epoch) for done in range(total)]


def test_the_cosine_falls_from_the_rate_to_nearly_zero():
    values = rates()
    assert values[0] == 2.0
    assert values == sorted(values, reverse=True)
    for done in (25, 50, 75, 99):
        assert abs(values[done] - (1 + math.cos(math.pi * done / 100))) < 1e-12


def test_steps_are_a_tenth_at_half_and_three_quarters():
    values = rates(schedule="step")
    assert [values[i] for i in (0, 49, 50, 74, 75, 99)] == [2.0, 2.0, 0.2, 0.2, 0.02, 0.02]


def test_one_cycle_rises_for_three_tenths_and_falls():
    values = rates(schedule="one-cycle")
    assert abs(values[0] - 0.08) < 1e-12 and values.index(max(values)) == 30 and values[30] == 2.0
    assert values[:31] == sorted(values[:31]) and values[30:] == sorted(values[30:], reverse=True)
    assert values[99] < 0.01


def test_warm_up_rises_in_a_line_and_hands_over():
    """1.5 epochs of 10 steps: 1/15, 2/15, ..., 1; then the schedule over what is left."""
    values = rates(warmup=1.5)
    for done in range(15):
        assert abs(values[done] - 2.0 * (done + 1) / 15) < 1e-12
    assert values[15] == 2.0
    assert abs(values[15 + 34] - (1 + math.cos(math.pi * 34 / 85))) < 1e-12
    assert rates(warmup=0.7, per_epoch=10)[6] == 2.0
    assert rates(schedule="constant", warmup=10.0)[99] == 2.0


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step", "one-cycle"])
def test_the_loop_uses_the_rate_of_each_step(schedule):
    """The optimizer sees rate(step, done, ...) at every step."""
    seen = []

    class Spy(Rule):
        """Reads the rate. Cost: none."""

        paper = Paper("none", "nobody", 2026, "", differs="in nothing known")

        def before_step(self, run):
            seen.append(run.optimizer.param_groups[0]["lr"])

    step = TrainStep(epochs=4, lr=0.3, schedule=schedule, warmup=1.0, rules=(Spy(),))
    Training(mlp(), loader(), step).fit()

    assert seen == [rate(step, done, 12, 3) for done in range(12)]


def test_optimizers_are_those_asked_for():
    p = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2), requires_grad=False)]
    wanted = {
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "rmsprop": torch.optim.RMSprop,
    }
    for name, kind in wanted.items():
        made = make_optimizer(p, TrainStep(optimizer=name, lr=0.25, weight_decay=0.5, momentum=0.75))
        group = made.param_groups[0]
        assert type(made) is kind and group["params"] == p[:1]
        assert (group["lr"], group["weight_decay"], group.get("momentum", 0.75)) == (0.25, 0.5, 0.75)
    with pytest.raises(ModelError, match="no parameter of the network can be trained"):
        make_optimizer(p[1:], TrainStep())


# Resuming


class Stop(Exception):
    """A power cut."""


RUNS = {
    "momentum, dropout, BatchNorm": {"nesterov": True, "weight_decay": 1e-3, "clip": 1.0},
    "average": {"ema": 0.9},
    "adam, accumulating": {"optimizer": "adamw", "lr": 0.01, "accumulate": 2, "warmup": 1.0},
    "rmsprop, gradual pruning": {"optimizer": "rmsprop", "lr": 0.01, "rules": (Gradual(sparsity=0.8, updates=5),)},
    "mixed precision": {"amp": True, "schedule": "one-cycle"},
}


def run(folder, options, stop=None, every=0, net=None):
    """A run of 3 epochs of 4 batches (the last one smaller); cut after ``stop`` steps."""
    net = net or busy(torch.float32)

    def watch(figures):
        if stop is not None and figures["step"] > stop:
            raise Stop

    step = TrainStep(epochs=3, **{"lr": 0.1, **options}, save_every=every)
    training = Training(
        net, loader(3, 11, torch.float32), step, folder=folder, watch=watch,
        evaluate=lambda net: {"test/loss": 1.0},
        validate=lambda net: float(net.state_dict()["0.weight"].double().sum()),
    )  # fmt: skip
    masks = training.fit()
    return training, masks


def everything(training, folder):
    saved = load_state(folder)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(folder / "metrics.jsonl")]
    last = {k: v for k, v in saved.items() if k not in ("seconds", "metrics")}
    best = {"best": dict(sorted(training.best_state.items())), "best masks": dict(training.best_masks or {})}
    return {**last, **best, "result": training.model.state_dict(), "rows": rows, "random now": global_state()}


def alike(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(alike(a, b) for a, b in zip(one, other, strict=True))
    return one == other


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_run_resumes_to_the_bit_from_every_step(tmp_path, options):
    """Weights, averages, statistics, optimizer, masks, best checkpoint, metrics and random state, after any cut."""
    whole = everything(run(tmp_path / "whole", options)[0], tmp_path / "whole")
    per_epoch = 4 // options.get("accumulate", 1)

    for stop in range(1, 3 * per_epoch + 1):
        folder = tmp_path / str(stop)
        try:
            run(folder, options, stop, stop % per_epoch)
        except Stop:
            pass
        torch.manual_seed(99)
        other = busy(torch.float32)
        for tensor in other.state_dict().values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 7)
        again = everything(run(folder, options, net=other)[0], folder)
        for key in whole:
            assert alike(whole[key], again[key]), (stop, key)


def test_a_finished_run_is_not_trained_again(tmp_path):
    first, masks = run(tmp_path, RUNS["average"])
    state = copy.deepcopy(first.model.state_dict())

    second, again = run(tmp_path, RUNS["average"])

    assert again == masks and same(state, second.model.state_dict()) and second.run.step == 12


def test_the_best_checkpoint_is_one_of_the_sparsest(tmp_path):
    """Pruning at step 4 of 12: a better value of the dense network before it does not count."""
    values = iter([9.0, 1.0, 3.0])
    net = busy(torch.float32)
    step = TrainStep(epochs=3, lr=0.1, rules=(Gradual(sparsity=0.5, start=0.4, stop=0.5, updates=1),))
    training = Training(net, loader(3, 11, torch.float32), step, folder=tmp_path, validate=lambda net: next(values))
    masks = training.fit()

    assert training.best_masks == masks and masks.kept == masks.total // 2
    other = busy(torch.float32)
    other.load_state_dict(training.best_state)
    training.best_masks.check(other)
    assert same(training.best_state, net.state_dict())


def test_metrics_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    """Lines written after the checkpoint go, a torn one too; nothing comes twice."""
    try:
        run(tmp_path, {"clip": 1.0, "rules": (Chatty(),)}, stop=7, every=2)
    except Stop:
        pass
    path = tmp_path / "metrics.jsonl"
    steps = [row["step"] for row in read_metrics(path)]
    assert max(steps) == 8
    with open(path, "ab") as file:
        file.write(b'{"step": 999, "torn')

    run(tmp_path, {"clip": 1.0, "rules": (Chatty(),)})

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    per_step = [row["step"] for row in rows if "train/loss" in row]
    assert per_step == list(range(1, 13))
    assert [row["step"] for row in rows if "test/loss" in row] == [4, 8, 12]
    assert all("gradient_norm" in row and row["chatty"] == 1.0 for row in rows if "train/loss" in row)

    path.write_bytes(b'{"a": 1}\n{"b"')
    Metrics(path, keep=500).write(c=3)
    assert path.read_text() == '{"a": 1}\n{"c": 3}\n'


class Chatty(Rule):
    """Notes a figure in every step. Cost: none."""

    paper = Paper("none", "nobody", 2026, "", differs="in nothing known")

    def after_step(self, run):
        run.note("chatty", 1.0)


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


# Errors


def test_a_loss_that_becomes_nan_is_one_clear_error(tmp_path):
    """At the very step, with what to do; weights of that step are not touched; the checkpoint before it stays."""
    net = mlp(torch.float32)

    def explode(output, target):
        loss = nn.functional.cross_entropy(output, target)
        return loss * float("nan") if made.run.step == 4 else loss

    made = Training(net, loader(dtype=torch.float32), TrainStep(epochs=3, lr=0.1), folder=tmp_path, loss=explode)

    with pytest.raises(DataError, match=r"the loss became nan at step 4 \(epoch 2\)\. Lower `lr` \(0.1\), add warm-up"):
        made.fit()

    assert all(bool(p.isfinite().all()) for p in net.parameters())
    assert load_state(tmp_path)["step"] == 3


def test_a_bad_figure_in_the_evaluation_is_an_error():
    made = Training(mlp(), loader(), TrainStep(epochs=1), evaluate=lambda net: {"test/loss": math.inf})
    with pytest.raises(ModelError, match="after epoch 1, test/loss is inf"):
        made.fit()


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="accumulate is 4, but an epoch has only 3 batches.*3 or less"):
        Training(mlp(), loader(), TrainStep(epochs=1, accumulate=4)).fit()
    with pytest.raises(MaskError, match="another network"):
        Training(mlp(), loader(), TrainStep(epochs=1), masks=Masks({"odd": torch.ones(2, 2).bool()})).fit()


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "flipped", "folder"])
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path, damage):
    """Any cut length and any flipped byte of the numbers is noticed, with what to do."""
    run(tmp_path, {"ema": 0.9})
    path = tmp_path / "state.pt"
    content = path.read_bytes()
    weight = load_state(tmp_path)["model"]["4.weight"].numpy().tobytes()
    place = content.index(weight)
    broken = {
        "empty": [b""],
        "cut": [content[: len(content) * k // 8] for k in range(1, 8)],
        "text": [b"not a checkpoint at all\n" * 50],
        "flipped": [
            content[:i] + bytes([content[i] ^ 16]) + content[i + 1 :] for i in (place, place + 30, place + 100)
        ],
        "folder": [],
    }[damage]
    if damage == "folder":
        path.unlink()
        path.mkdir()
        assert load_state(tmp_path) is None
    for text in broken:
        path.write_bytes(text)
        with pytest.raises(FileError, match=r"state\.pt is damaged .*Delete the folder .* to begin this step again"):
            run(tmp_path, {"ema": 0.9})


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    """Other options, same shapes: the message says that the checkpoint does not belong."""
    run(tmp_path, {})
    with pytest.raises(FileError, match="belongs to another network or other options"):
        run(tmp_path, {"ema": 0.5})
    wider = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 3))
    with pytest.raises((FileError, MaskError), match="another network"):
        run(tmp_path, {}, net=wider)


def test_states_come_back_as_they_were(tmp_path):
    """Every kind of entry, bfloat16, empty and scalar tensors included."""
    state = {
        "a": torch.randn(3, 2).bfloat16(), "b": {"c": torch.tensor(3), "d": [1, 2.5, None, "x", float("-inf")]},
        "e": torch.zeros(0), "f": (0.9, 0.999), "g": torch.ones(2, 3).bool(), 7: torch.randn(4, 4).T,
    }  # fmt: skip

    save_state(tmp_path, state)

    assert alike(load_state(tmp_path), state)


class Wraps(Rule):
    """Puts a parametrization in and takes it out at the end. Cost: none."""

    paper = Paper("none", "nobody", 2026, "", differs="in nothing known")

    def begin(self, run):
        nn.utils.parametrize.register_parametrization(run.model[2], "weight", nn.Identity())

    def end(self, run):
        nn.utils.parametrize.remove_parametrizations(run.model[2], "weight")
        run.model[2]._parameters["bias"] = run.model[2]._parameters.pop("bias")


def test_averages_of_parametrized_networks_are_refused():
    """An average pairs parameters by place, which a parametrization changes."""
    with pytest.raises(UsageError, match="set `ema = 0`"):
        Training(mlp(), loader(), TrainStep(epochs=1, ema=0.9, rules=(Wraps(),))).fit()


def test_the_best_checkpoint_is_never_one_behind_a_parametrization():
    """Such weights are not those of the result; the network after the end is."""
    net = mlp()
    training = Training(net, loader(), TrainStep(epochs=2, rules=(Wraps(),)), validate=lambda net: 1.0)
    training.fit()

    assert same(training.best_state, net.state_dict())


def test_the_forward_pass_goes_through_a_compiled_network():
    """What the caller compiled is what runs, and zeros are held in the network inside."""
    net, calls = mlp(), []
    compiled = torch.compile(net, backend=lambda graph, _: calls.append(1) or graph.forward)

    masks = Training(compiled, loader(), TrainStep(epochs=1), masks=half(net)).fit()

    assert calls and set(masks) == {"0.weight", "2.weight"}
    masks.check(net)
