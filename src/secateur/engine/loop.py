"""The training loop: one plain loop in which zeros are held and rules act. It resumes bit for bit."""

from __future__ import annotations

import contextlib
import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from secateur.core import streams
from secateur.core.errors import DataError, ModelError, UsageError
from secateur.core.hold import Hold
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.names import unwrap
from secateur.core.run import Run
from secateur.core.sockets import Rule
from secateur.core.task import Task, call, device_of, to
from secateur.data import Loader
from secateur.engine import distributed
from secateur.engine.checkpoint import Metrics, load_state, save_state
from secateur.engine.optimize import make_optimizer, rate
from secateur.engine.recipe import TrainStep

Watch = Callable[[dict[str, float]], None]


@dataclass
class Training:
    """One training run: network, data, options; :meth:`fit` runs it to the end.

    Args:
        model: the network, changed in place.
        loader: training batches; ``loader.epoch(number, start)`` gives those of one epoch.
        step: the options.
        masks: which weights are kept at the start; all that can be pruned by default.
        seed: for dropout and rules (the loader has its own).
        folder: where checkpoints and metrics go; None keeps nothing.
        evaluate: gives figures such as ``{"accuracy": ...}`` after every epoch.
        validate: gives one figure, higher = better, to choose the best checkpoint; None keeps no best.
        sample: gives rules a fixed sample of the training data.
        teacher: the dense network, for rules that need it.
        watch: called with the figures of every step, for progress bars and trackers.
        loss: mean loss over a batch; cross-entropy with the step's smoothing by default.
    """

    model: nn.Module
    loader: Loader
    step: TrainStep = field(default_factory=TrainStep)
    masks: Masks | None = None
    seed: int = 0
    folder: Path | None = None
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    validate: Callable[[nn.Module], float] | None = None
    sample: Callable[[int, nn.Module], Task] | None = None
    teacher: nn.Module | None = None
    watch: Watch | None = None
    loss: Callable[[Any, Any], Tensor] | None = None

    def fit(self) -> Masks:
        """Train to the end, or go on from the checkpoint in ``folder``.

        Returns:
            The masks at the end; the network's zeros are checked against them.

        Raises:
            DataError: when the loss is no longer finite.
            KeyboardInterrupt: after a checkpoint was written.
        """
        self._prepare()
        with _interrupts() as pressed:
            self._pressed = pressed
            for epoch in range(self._epoch, self.step.epochs):
                self._train_epoch(epoch)
                self._after_epoch(epoch)
        for rule in self.step.rules:
            rule.end(self.run)
        masks = self.run.masks
        result = self._ema.module if self._ema is not None else self.model
        if result is not self.model:
            unwrap(self.model).load_state_dict(result.state_dict())
        masks.check(self.model)
        return masks

    def _prepare(self) -> None:
        step, model = self.step, self.model
        if step.accumulate > len(self.loader):
            raise UsageError(f"train: accumulate is {step.accumulate}, but an epoch has only {len(self.loader)} batches.")
        if step.channels_last:
            model.to(memory_format=torch.channels_last)
        self._loss = self.loss or CrossEntropy(step.smoothing)
        self._where = device_of(model)
        self._optimizer = make_optimizer(model.parameters(), step)
        per_epoch = math.ceil(len(self.loader) / step.accumulate)
        self._ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(step.ema), use_buffers=True) if step.ema else None
        masks = self.masks or Masks.dense(model, step.only, step.skip)
        saved = load_state(self.folder) if self.folder else None
        if saved:
            masks = Masks({name: mask.to(self._where) for name, mask in saved["masks"].items()})
        also = [self._ema] if self._ema is not None else []
        hold = Hold(masks, model, self._optimizer, also, hooks=False)
        sample = self.sample
        self.run = Run(
            model, self._optimizer, hold, per_epoch * step.epochs, per_epoch, self.seed,
            (lambda n: sample(n, model)) if sample else None, self.teacher, rules=step.rules,
        )  # fmt: skip
        self._epoch = self._batch = 0
        self._best = -math.inf
        self._best_kept = masks.kept
        self._saved_at = 0
        if saved:
            self._resume(saved)
        else:
            streams.seed_global(self.seed, "train")
            for rule in step.rules:
                rule.begin(self.run)
        writes = self.folder is not None and distributed.rank() == 0
        self._metrics = Metrics(self.folder / "metrics.jsonl" if writes and self.folder else None, saved["metrics"] if saved else 0)
        self._forward = DistributedDataParallel(model) if distributed.world() > 1 else model
        self._seconds = saved["seconds"] if saved else 0.0
        self._clock = time.perf_counter()

    def _resume(self, saved: dict[str, Any]) -> None:
        run = self.run
        run.step, run.states, run.resumed = saved["step"], saved["rules"], True
        for rule in self.step.rules:
            rule.begin(run)
        run.resumed = False
        unwrap(self.model).load_state_dict(saved["model"])
        self._optimizer.load_state_dict(saved["optimizer"])
        if self._ema is not None:
            self._ema.load_state_dict(saved["ema"])
        self._epoch, self._batch = saved["epoch"], saved["batch"]
        self._best, self._best_kept = saved["best"], saved["best_kept"]
        self._saved_at = run.step
        streams.set_global_state(saved["random"])

    def _train_epoch(self, epoch: int) -> None:
        self._forward.train()
        batches = self.loader.epoch(epoch, self._batch)
        while self._batch < len(self.loader):
            self._one_step(epoch, batches)
            if self._pressed():
                self._checkpoint()
                raise KeyboardInterrupt
            every = self.step.save_every
            if every and self.run.step - self._saved_at >= every and self._batch < len(self.loader):
                self._checkpoint()
        self._epoch, self._batch = epoch + 1, 0

    def _one_step(self, epoch: int, batches: Iterator[Any]) -> None:
        run, step, optimizer = self.run, self.step, self._optimizer
        for group in optimizer.param_groups:
            group["lr"] = rate(step, run.step, run.total, run.steps_per_epoch)
        run.notes.clear()
        count = min(step.accumulate, len(self.loader) - self._batch)
        taken, total = self._take(batches, count), 0.0
        examples = sum(n for _, n in taken)
        for i, (batch, n) in enumerate(taken):
            last = i + 1 == count
            with contextlib.nullcontext() if last or distributed.world() == 1 else self._forward.no_sync():  # type: ignore[operator]
                loss = self._batch_loss(batch)
                (loss * (n / examples) if count > 1 else loss).backward()
            total += loss.item() * n / examples
        for rule in step.rules:
            rule.before_step(run)
        run.hold.mask_gradients_()
        if step.clip:
            run.note("gradient_norm", float(nn.utils.clip_grad_norm_(self.model.parameters(), step.clip)))
        if not math.isfinite(total):
            raise DataError(
                f"the loss became {total} at step {run.step} (epoch {epoch + 1}). Lower `lr` ({step.lr:g}), add warm-up or "
                "`clip = 1.0`, or look for NaN in the data. The last checkpoint is kept."
            )
        optimizer.step()
        run.hold.mask_weights_()
        optimizer.zero_grad(set_to_none=True)
        if self._ema is not None:
            self._ema.update_parameters(unwrap(self.model))
        run.step += 1
        self._batch += count
        for rule in step.rules:
            rule.after_step(run)
        self._log(epoch, total)

    def _take(self, batches: Iterator[Any], count: int) -> list[tuple[Any, int]]:
        taken = []
        for _ in range(count):
            x, y = to(next(batches), self._where)
            if self.step.channels_last and isinstance(x, Tensor) and x.dim() == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            taken.append(((x, y), len(y)))
        return taken

    def _batch_loss(self, batch: Any) -> Tensor:
        inputs, target = batch
        with torch.autocast(self._where.type, torch.bfloat16, enabled=self.step.amp):
            output = call(self._forward, inputs) if distributed.world() == 1 else self._forward(inputs)
        loss = self._loss(output, target)
        for rule in self.step.rules:
            loss = rule.loss(self.run, loss, batch, output)
        return loss

    def _log(self, epoch: int, loss: float) -> None:
        run = self.run
        last = self._batch >= len(self.loader)
        figures: dict[str, float] = {"step": run.step, "epoch": epoch + 1, "train/loss": loss, **run.notes}
        if last or run.step % 10 == 0 or run.notes:
            figures |= {"lr": self._optimizer.param_groups[0]["lr"], "kept": run.masks.kept, "sparsity": run.masks.sparsity}
            self._metrics.write(**figures)
        if self.watch is not None:
            self.watch(figures)

    def _after_epoch(self, epoch: int) -> None:
        run = self.run
        run.hold.check()
        shown = self._ema.module if self._ema is not None else self.model
        figures = self.evaluate(shown) if self.evaluate is not None else {}
        for name, value in figures.items():
            if name.endswith("loss") and not math.isfinite(value):
                raise ModelError(f"after epoch {epoch + 1}, {name} is {value}. Lower `lr`, or add warm-up.")
        if self.validate is not None:
            self._keep_best(shown, figures)
        row = {"step": run.step, "epoch": epoch + 1, **figures, "kept": run.masks.kept, "sparsity": run.masks.sparsity}
        self._metrics.write(**row, seconds=round(self.seconds(), 3))
        if self.watch is not None:
            self.watch(row)
        self._checkpoint()

    def _keep_best(self, shown: nn.Module, figures: dict[str, float]) -> None:
        """The best checkpoint among those with the fewest weights so far, so that its zeros are the ones reported."""
        value = self.validate(shown) if self.validate is not None else -math.inf
        figures["validation/accuracy"] = value
        kept = self.run.masks.kept
        if kept < self._best_kept or value > self._best:
            self._best, self._best_kept = value, kept
            self.best_state = copy.deepcopy(unwrap(shown).state_dict())
            if self.folder is not None and distributed.rank() == 0:
                from secateur.core.files import write_tensors
                from secateur.engine.folder import clean

                tensors = {k: clean(v) for k, v in self.best_state.items()}
                write_tensors(self.folder / "best.safetensors", tensors, {"step": str(self.run.step), "accuracy": str(value)})

    def seconds(self) -> float:
        """Seconds of training, interruptions left out."""
        return self._seconds + time.perf_counter() - self._clock

    def _checkpoint(self) -> None:
        if self.folder is None or distributed.rank() != 0:
            return
        run = self.run
        self._saved_at = run.step
        save_state(self.folder, {
            "model": unwrap(self.model).state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "ema": self._ema.state_dict() if self._ema is not None else {},
            "masks": dict(run.masks),
            "rules": run.states,
            "step": run.step, "epoch": self._epoch, "batch": self._batch,
            "best": self._best, "best_kept": self._best_kept,
            "metrics": self._metrics.size, "seconds": self.seconds(),
            "random": streams.global_state(),
        })  # fmt: skip


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Hold the first Ctrl-C back until a step is whole; a second one stops at once (the last checkpoint stays)."""
    pressed = False
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.getsignal(signal.SIGINT)

    def handler(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def needs_teacher(rules: tuple[Rule, ...]) -> bool:
    """Whether a rule asks for the dense network."""
    return any("teacher" in rule.needs for rule in rules)
