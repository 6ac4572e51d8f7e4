"""The training loop: one plain loop in which zeros are held and rules act. It resumes bit for bit."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from secateur.core import streams
from secateur.core.errors import DataError, FileError, ModelError, UsageError
from secateur.core.files import read_tensors, write_tensors
from secateur.core.hold import Hold
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.names import parameters, unwrap
from secateur.core.run import Run
from secateur.core.sockets import Rule, blame
from secateur.core.task import Task, device_of, to
from secateur.engine import distributed
from secateur.engine.checkpoint import Feed, Metrics, asked_of, check_asked, load_state, save_state
from secateur.engine.figures import INTERVAL, Figures, Watch
from secateur.engine.folder import clean
from secateur.engine.machine import interrupts, pinned
from secateur.engine.optimize import make_optimizer, rate
from secateur.engine.recipe import TrainStep
from secateur.engine.start import zeros_of

BEST = "best.safetensors"


@dataclass
class Training:
    """One training run: network, data, options; :meth:`fit` runs it to the end.

    Args:
        model: the network, changed in place.
        loader: training batches; ``loader.epoch(number, start)`` gives those of one epoch.
        step: the options.
        masks: which weights are kept at the start; by default all that can be pruned, or what the zeros of a
            network say that plainly has been pruned (:func:`secateur.engine.start.zeros_of`).
        seed: for dropout and rules (the loader has its own).
        folder: where checkpoints and metrics go; None keeps nothing.
        evaluate: gives figures such as ``{"accuracy": ...}`` after every epoch.
        validate: gives one figure, higher = better, to choose the best checkpoint; None keeps no best.
        sample: gives rules a fixed sample of the training data.
        teacher: the dense network, for rules that need it.
        watch: called with the figures of every step, for progress bars and trackers; on CUDA some steps later.
        loss: mean loss over a batch; cross-entropy with the step's smoothing by default.
        say: hears what was taken for granted.
    """

    model: nn.Module
    loader: Feed
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
    say: Callable[[str], None] | None = None
    best_state: dict[str, Tensor] | None = field(default=None, init=False, repr=False)
    """Weights of the best checkpoint; only with ``validate``."""
    best_masks: Masks | None = field(default=None, init=False, repr=False)
    """The masks that belong to ``best_state``."""

    def fit(self) -> Masks:
        """Train to the end, or go on from the checkpoint in ``folder``.

        Returns:
            The masks at the end; the network's zeros are checked against them.

        Raises:
            DataError: when the loss is no longer finite, in any of the processes; on CUDA some steps later, and the
                weights are spoilt then.
            FileError: when the checkpoint was made with other options.
            KeyboardInterrupt: after a checkpoint was written.
        """
        self._prepare()
        with interrupts() as pressed:
            self._pressed = pressed
            for epoch in range(self._epoch, self.step.epochs):
                self._train_epoch(epoch)
                self._after_epoch(epoch)
                if self._stop():
                    raise KeyboardInterrupt
        for rule in self.step.rules:
            with blame(rule):
                rule.end(self.run)
        masks = self.run.masks
        result = self._ema.module if self._ema is not None else self.model
        pruned_last = masks.kept < self._best_kept or self.best_state is None
        if self.validate is not None and pruned_last:  # rules may prune, or lay aside a parametrization, at the end
            self._keep_best(result, self.validate(result))
        if result is not self.model:
            unwrap(self.model).load_state_dict(result.state_dict())
        masks.check(self.model)
        return masks

    def _prepare(self) -> None:
        step, model = self.step, self.model
        if step.accumulate > len(self.loader):
            raise UsageError(
                f"train: accumulate is {step.accumulate}, but an epoch has only {len(self.loader)} batches. "
                f"Set `accumulate` to {len(self.loader)} or less, or use smaller batches."
            )
        if step.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._loss = self.loss or CrossEntropy(step.smoothing)
        self._where = device_of(model)
        self._late = self._where.type == "cuda"  # reading a number would make the processor wait for the device
        self._optimizer = make_optimizer(model.parameters(), step)
        self._optimizer.zero_grad(set_to_none=True)  # what the caller's own backward pass left
        per_epoch = math.ceil(len(self.loader) / step.accumulate)
        average = get_ema_multi_avg_fn(step.ema)
        self._ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True) if step.ema else None
        saved = self._saved()
        masks = Masks(saved["masks"]).to(self._where) if saved else self._first_masks()
        also = [self._ema] if self._ema is not None else []
        hold = Hold(masks, model, self._optimizer, also, hooks=False)
        sample = self.sample
        self.run = Run(
            model, self._optimizer, hold, per_epoch * step.epochs, per_epoch, self.seed,
            (lambda n: sample(n, model)) if sample else None, self.teacher, rules=step.rules,
        )  # fmt: skip
        self._begin(saved)
        path = self.folder / "metrics.jsonl" if self.folder and distributed.rank() == 0 else None
        self._metrics = Metrics(path, saved["metrics"] if saved else 0)
        self._figures = Figures(self._metrics, self.watch)
        self._forward = DistributedDataParallel(model) if distributed.world() > 1 else model
        self._seconds = saved["seconds"] if saved else 0.0
        self._clock = time.perf_counter()

    def _saved(self) -> dict[str, Any] | None:
        """The checkpoint to go on from; one of a run that asked for something else is refused."""
        saved = load_state(self.folder) if self.folder else None
        if saved and self.folder and "asked" in saved:
            check_asked(self.folder, saved["asked"], self._asked())
        return saved

    def _asked(self) -> dict[str, str]:
        given = {"seed": self.seed, "masks": self.masks.digest if self.masks else None, "loss": self.loss}
        return asked_of(self.step, self.loader, **given, processes=distributed.world())

    def _first_masks(self) -> Masks:
        found = self.masks or zeros_of(self.model)
        if found is None:
            return Masks.dense(self.model, self.step.only, self.step.skip)
        if not self.masks and self.say is not None:
            self.say(
                f"the network holds {found.total - found.kept:,} zero weights; they are taken as pruned and stay zero. "
                "Pass `masks=secateur.Masks.dense(model)` to let them grow."
            )
        return found

    def _begin(self, saved: dict[str, Any] | None) -> None:
        """Everything at its start, or as the checkpoint holds it."""
        self._names = list(unwrap(self.model).state_dict())
        self._epoch = self._batch = 0
        self._best = -math.inf
        self._best_kept = self.run.masks.total
        self._saved_at = 0
        self._counted: tuple[Masks | None, int] = (None, 0)
        if saved:
            self._resume(saved)
        else:
            # Ranks see different examples, so their dropout differs too
            streams.seed_global(self.seed, "train", *([distributed.rank()] if distributed.world() > 1 else []))
            for rule in self.step.rules:
                with blame(rule):
                    rule.begin(self.run)
        if self._ema is not None and list(parameters(self._ema)) != list(parameters(self.model)):
            raise UsageError(
                "train: a rule has changed the network's parameters; they cannot be averaged, set `ema = 0`."
            )

    def _resume(self, saved: dict[str, Any]) -> None:
        run = self.run
        run.step, run.states, run.resumed = saved["step"], saved["rules"], True
        for rule in self.step.rules:
            with blame(rule):
                rule.begin(run)
        run.resumed = False
        try:
            unwrap(self.model).load_state_dict(saved["model"])
            self._optimizer.load_state_dict(saved["optimizer"])
            if self._ema is not None:
                self._ema.load_state_dict(saved["ema"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise FileError(
                f"the checkpoint in {self.folder} belongs to another network or other options ({error}). "
                "Go on with those it was made with, or delete it to begin again."
            ) from error
        self._epoch, self._batch = saved["epoch"], saved["batch"]
        self._best, self._best_kept = saved["best"], saved["best_kept"]
        self._saved_at = run.step
        if saved["best_masks"] and self.folder is not None:
            self.best_state = read_tensors(self.folder / BEST)[0]
            self.best_masks = Masks(saved["best_masks"]).to(self._where)
        states = saved["random"]
        streams.set_global_state(states[distributed.rank() % len(states)])

    def _train_epoch(self, epoch: int) -> None:
        self._forward.train()
        batches = self.loader.epoch(epoch, self._batch)
        while self._batch < len(self.loader):
            self._one_step(epoch, batches)
            if self._stop():
                self._checkpoint()
                raise KeyboardInterrupt
            every = self.step.save_every
            if every and self.run.step - self._saved_at >= every and self._batch < len(self.loader):
                self._checkpoint()
        self._epoch, self._batch = epoch + 1, 0

    def _stop(self) -> bool:
        """Whether somebody pressed Ctrl-C, in any of the processes: all stop after the same step."""
        if distributed.world() > 1 and not self._due():
            return False
        return distributed.anywhere(self._pressed(), self._where)

    def _due(self) -> bool:
        """Whether numbers on the device are read now; on the processor they always are."""
        return not self._late or self.run.step % INTERVAL == 0 or self._batch % len(self.loader) == 0

    def _one_step(self, epoch: int, batches: Iterator[Any]) -> None:
        run, step, optimizer = self.run, self.step, self._optimizer
        for group in optimizer.param_groups:
            group["lr"] = rate(step, run.step, run.total, run.steps_per_epoch)
        run.notes.clear()
        count = min(step.accumulate, len(self.loader) - self._batch)
        taken, losses = self._take(batches, count), []
        examples = sum(n for _, n in taken)
        for i, (batch, n) in enumerate(taken):
            last = i + 1 == count
            with contextlib.nullcontext() if last or distributed.world() == 1 else self._forward.no_sync():  # type: ignore[operator]
                loss = self._batch_loss(batch)
                (loss * (n / examples) if count > 1 else loss).backward()
            losses.append((loss.detach().double() if self._late else loss.item()) * n / examples)
        total = sum(losses)
        if not self._late:
            self._check_loss(total, run.step, epoch + 1)
        for rule in step.rules:
            with blame(rule):
                rule.before_step(run)
        run.hold.mask_gradients_()
        clipped = nn.utils.clip_grad_norm_(self.model.parameters(), step.clip) if step.clip else None
        optimizer.step()
        run.hold.mask_weights_()
        optimizer.zero_grad(set_to_none=True)
        run.step += 1
        self._batch += count
        for rule in step.rules:
            with blame(rule):
                rule.after_step(run)
        if self._ema is not None:  # after the rules, so that it averages the weights the network computes with
            self._ema.update_parameters(unwrap(self.model))
        self._log(epoch, total, {} if clipped is None else {"gradient_norm": clipped})

    def _check_loss(self, loss: float, step: int, epoch: int) -> None:
        """Stop, in all processes after the same step, when the loss of one is no longer finite."""
        finite = math.isfinite(loss)
        if distributed.anywhere(not finite, self._where):
            what = "of another process is not finite" if finite else f"became {loss}"
            raise DataError(
                f"the loss {what} at step {step} (epoch {epoch}). Lower `lr` ({self.step.lr:g}), add "
                "warm-up or `clip = 1.0`, or look for NaN in the data. The last checkpoint, if any, is kept."
            )

    def _take(self, batches: Iterator[Any], count: int) -> list[tuple[Any, int]]:
        taken = []
        for _ in range(count):
            batch = next(batches)
            x, y = to(pinned(batch) if self._where.type == "cuda" else batch, self._where)
            if self.step.channels_last and isinstance(x, Tensor) and x.dim() == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            taken.append(((x, y), len(y)))
        return taken

    def _batch_loss(self, batch: Any) -> Tensor:
        inputs, target = batch
        with torch.autocast(self._where.type, torch.bfloat16, enabled=self.step.amp):
            output = _call_wrapped(self._forward, inputs)
        loss = self._loss(output, target)
        for rule in self.step.rules:
            with blame(rule):
                loss = rule.loss(self.run, loss, batch, output)
        return loss

    def _log(self, epoch: int, loss: float | Tensor, more: dict[str, Tensor]) -> None:
        run = self.run
        figures: dict[str, Any] = {"step": run.step, "epoch": epoch + 1, "train/loss": loss, **more, **run.notes}
        written = self._batch >= len(self.loader) or run.step % INTERVAL == 0 or bool(run.notes)
        if written:
            figures |= {"lr": self._optimizer.param_groups[0]["lr"], **self._counts()}
        self._figures.add(figures, written)
        if self._due():
            self._send()

    def _send(self) -> None:
        """Hand the figures on that wait; on CUDA this is where a loss is noticed that is no longer finite."""
        rows = self._figures.fetch()
        if rows and self._late:
            row = next((row for row in rows if not math.isfinite(row["train/loss"])), rows[-1])
            self._check_loss(row["train/loss"], row["step"] - 1, row["epoch"])
        self._figures.send()

    def _counts(self) -> dict[str, int | float]:
        """Weights kept and sparsity; counted again only when the masks have changed."""
        masks = self.run.masks
        if self._counted[0] is not masks:
            self._counted = (masks, masks.kept)
        kept = self._counted[1]
        return {"kept": kept, "sparsity": 1 - kept / masks.total if masks.total else 0.0}

    def _after_epoch(self, epoch: int) -> None:
        run = self.run
        run.hold.check()
        shown = self._ema.module if self._ema is not None else self.model
        figures = self.evaluate(shown) if self.evaluate is not None else {}
        for name, value in figures.items():
            if name.endswith("loss") and not math.isfinite(value):
                raise ModelError(f"after epoch {epoch + 1}, {name} is {value}. Lower `lr`, or add warm-up.")
        if self.validate is not None:
            figures["validation/accuracy"] = self.validate(shown)
            self._keep_best(shown, figures["validation/accuracy"])
        row = {"step": run.step, "epoch": epoch + 1, **figures, **self._counts()}
        self._metrics.write(**row, seconds=round(self.seconds(), 3))
        if self.watch is not None:
            self.watch(row)
        self._checkpoint()

    def _keep_best(self, shown: nn.Module, value: float) -> None:
        """The best checkpoint among those with the fewest weights so far, so that its zeros are the ones reported."""
        if list(unwrap(shown).state_dict()) != self._names:
            return  # behind a parametrization the weights are not those of the result
        masks, kept = self.run.masks, self.run.masks.kept
        equal = kept == self._best_kept and self.best_state is not None
        if kept > self._best_kept or (equal and not value > self._best):
            return
        self._best, self._best_kept, self.best_masks = value, kept, masks
        self.best_state = copy.deepcopy(unwrap(shown).state_dict())
        if self.folder is not None and distributed.rank() == 0:
            tensors = {k: clean(v) for k, v in self.best_state.items()}
            write_tensors(self.folder / BEST, tensors, {"step": str(self.run.step), "accuracy": str(value)})

    def seconds(self) -> float:
        """Seconds of training, interruptions left out."""
        return self._seconds + time.perf_counter() - self._clock

    def _checkpoint(self) -> None:
        folder, run = self.folder, self.run
        if folder is None:
            return
        self._send()  # the metrics file is as long as the checkpoint says, and no NaN gets into one
        random: list[Any] = [streams.global_state()]
        if distributed.world() > 1:
            random = random * distributed.world()
            dist.all_gather_object(random, streams.global_state())
        self._saved_at = run.step
        distributed.first(lambda: save_state(folder, {
            "asked": self._asked(),
            "model": unwrap(self.model).state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "ema": self._ema.state_dict() if self._ema is not None else {},
            "masks": dict(run.masks),
            "rules": run.states,
            "step": run.step, "epoch": self._epoch, "batch": self._batch,
            "best": self._best, "best_kept": self._best_kept, "best_masks": dict(self.best_masks or {}),
            "metrics": self._metrics.size, "seconds": self.seconds(),
            "random": random,
        }))  # fmt: skip


def _call_wrapped(model: nn.Module, inputs: Any) -> Any:
    """As :func:`secateur.core.task.call`, but through wrappers: DDP and compiled networks must see the pass."""
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    else:
        output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return getattr(output, "logits", output)


def needs_teacher(rules: tuple[Rule, ...]) -> bool:
    """Whether a rule asks for the dense network."""
    return any("teacher" in rule.needs for rule in rules)
