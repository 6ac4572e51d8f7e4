"""What a choice really gives: a copy of the network is pruned, written as a plan file, timed and judged."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.core.errors import DataError, ModelError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import aliases, unwrap
from secateur.core.task import Task, to
from secateur.engine.planning.clocks import LONG
from secateur.engine.planning.pieces import few, part
from secateur.engine.planning.variants import arrays_of
from secateur.runtime import planfile
from secateur.runtime.capture import Captured, capture
from secateur.runtime.session import Session

__all__ = [
    "Trial", "accuracy", "arrays_of", "batch_of", "call_ms", "captured_of", "judged", "refuse_pruned", "write_plan",
]  # fmt: skip

_CALLS, _FEW, _SECONDS = 7, 5, 0.4
"""A file is called so often at least (of long calls a few less), and for so long."""
WORK = 6.6e10
"""Multiply-adds of a forward pass over the examples that losses are measured on, at most about."""


class Trial:
    """A copy of a network that can be pruned again and again.

    Args:
        task: network, loss and data; left as they are.
        example: one batch of inputs on the CPU, as the network takes them.
        threads: of the compiled core; None takes one for each core.
        captured: gives the captured network; None captures it when a file is needed.

    Attributes:
        size: bytes of the last file that was written.
        beside: of whose network as it was given shares of the time are; this one, unless another is named.
    """

    def __init__(
        self, task: Task, example: Any, threads: int | None, captured: Callable[[], Captured] | None = None
    ) -> None:
        self.task = replace(task, model=copy.deepcopy(unwrap(task.model)).eval())
        self.example, self.threads = example, threads
        self._given, self._capture, self.size = task.model, captured, 0
        self._before: dict[str, Tensor] = {}
        self._there: Masks | None = None
        self.beside: Trial = self
        self._open = ExitStack()
        self._folder = tempfile.TemporaryDirectory(prefix="secateur-plan-", ignore_cleanup_errors=True)

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.close()
        self._folder.cleanup()

    def prune(self, masks: Masks) -> None:
        """Set the weights back to what they were, and those to zero that the masks prune."""
        weights = self.task.params()
        with torch.no_grad():
            for name, tensor in self._before.items():
                weights[name].copy_(tensor)
            self._before = {name: weights[name].detach().clone() for name in masks}
        masks.apply_(self.task.model)

    def loss(self) -> float:
        """Mean loss over the task's data."""
        return self.task.mean_loss()

    def accuracy(self) -> float:
        """Accuracy on the task's data, in per cent."""
        return accuracy(self.task)

    def bytes(self, masks: Masks | None = None) -> int:
        """Bytes of the plan file, as it is or with the zeros of some masks.

        Raises:
            CaptureError: when the network cannot be captured, or parts of it stay in torch.
        """
        return (self._written(masks) if masks is not None else self._whole).stat().st_size

    def ms(self, masks: Masks | None = None) -> float:
        """Median milliseconds of a call of the plan file, opened anew.

        Raises:
            CaptureError: as :meth:`bytes`.
        """
        if masks is None:
            return call_ms(self._dense, self.example)
        with Session(self._written(masks), threads=self.threads) as session:
            return call_ms(session, self.example)

    def share(self, masks: Masks, anew: bool = False) -> float:
        """Milliseconds with the zeros of some masks as a share of those without, both files called in turn.

        A machine whose pace changes meanwhile changes both alike.

        Args:
            masks: what is kept.
            anew: open the file without zeros anew too: where a file's weights lie in memory tells on its time.

        Raises:
            CaptureError: as :meth:`bytes`.
        """
        arrays = arrays_of(self.example)
        with ExitStack() as stack:
            pruned = stack.enter_context(Session(self._written(masks), threads=self.threads))
            whole = self.beside
            dense = stack.enter_context(Session(whole._whole, threads=self.threads)) if anew else whole._dense
            return in_turn(lambda: dense(*arrays), lambda: pruned(*arrays))

    @cached_property
    def _dense(self) -> Session:
        """The file of the network as it was given, open until the end."""
        session = Session(self._whole, threads=self.threads)
        self._open.callback(session.close)
        return session

    @cached_property
    def _whole(self) -> Path:
        """The file of the network as it was given."""
        return self._written(None, "dense")

    @cached_property
    def _captured(self) -> Captured:
        """The network as it was given: captured once, whatever is pruned."""
        return self._capture() if self._capture is not None else captured_of(self._given, self.example)

    def _written(self, masks: Masks | None, name: str = "pruned") -> Path:
        path = Path(self._folder.name) / f"{name}.safetensors"
        if masks is not None and masks is self._there:  # the file of these masks was the last that was written
            return path
        self._there = None
        weights = self._captured.weights
        held = aliases(self._given)
        for name, mask in (masks or {}).items():
            if bool(mask.all()):
                continue
            places = [place for place in held[name] if place in weights and weights[place].shape == mask.shape]
            if not places:  # the graph has it in another form
                self.prune(masks or Masks({}))
                write_plan(self.task.model, self.example, path)
                self.size, self._there = path.stat().st_size, masks
                return path
            for place in places:
                weights[place] = np.where(mask.cpu().numpy(), weights[place], np.float32(0))
        planfile.write(path, self._captured.graph, weights)
        self.size, self._there = path.stat().st_size, masks
        return path


def batch_of(task: Task, count: int) -> Any:
    """The inputs of the first examples of a task's data as one batch on the CPU, taken from several where it needs to.

    Raises:
        DataError: when there are fewer examples, or batches cannot be joined.
    """
    parts: list[Any] = []
    there = 0
    for inputs, _, n in task.batches():
        parts.append(to(part(inputs, n, 0, min(n, count - there)), torch.device("cpu")))
        there += min(n, count - there)
        if there == count:
            return parts[0] if len(parts) == 1 else _joined(parts, count)
    raise DataError(
        f"the data holds {there:,} examples, fewer than a batch of {count:,}; ask for a smaller batch, or more data."
    )


def _joined(parts: list[Any], count: int) -> Any:
    """Batches as one: rows of tensors below each other, in whatever holds them."""
    first = parts[0]
    if isinstance(first, Tensor):
        if len({tensor.shape[1:] for tensor in parts}) > 1 or not first.dim():
            shapes = " and ".join(str(tuple(tensor.shape)) for tensor in parts[:2])
            raise DataError(
                f"a batch of {count:,} examples would join tensors of {shapes}; ask for a smaller batch, or pass one "
                "with `example`."
            )
        return torch.cat(parts)
    if isinstance(first, Mapping):
        return {key: _joined([one[key] for one in parts], count) for key in first}
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(_joined(list(held), count) for held in zip(*parts, strict=True)))
    if isinstance(first, tuple | list):
        return type(first)(_joined(list(held), count) for held in zip(*parts, strict=True))
    return first


def captured_of(model: nn.Module, example: Any) -> Captured:
    """A network as the compiled core runs it; it stays as it is.

    Raises:
        CaptureError: when it cannot be captured.
    """
    bare = unwrap(model)
    modes = any(module.training for module in bare.modules())
    return capture(copy.deepcopy(bare).cpu().eval() if modes else bare, example)


def write_plan(model: nn.Module, example: Any, path: Path) -> None:
    """Capture a network and write its plan file.

    Raises:
        CaptureError: when it cannot be captured, or parts of it stay in torch.
        FileError: when the file cannot be written.
    """
    cpu = model if next(model.parameters()).device.type == "cpu" else copy.deepcopy(model).cpu()
    captured = capture(cpu, example)
    planfile.write(path, captured.graph, captured.weights)


def call_ms(session: Session, example: Any) -> float:
    """Median milliseconds of a call."""
    arrays, times = arrays_of(example), []
    least = _least(lambda: session(*arrays))
    end = time.perf_counter() + _SECONDS
    while len(times) < least or time.perf_counter() < end:
        began = time.perf_counter()
        session(*arrays)
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def in_turn(one: Callable[[], object], other: Callable[[], object]) -> float:
    """Median of the second's time over the first's, pair by pair."""
    ratios: list[float] = []
    least = max(_least(other), _least(one))
    end = time.perf_counter() + 2 * _SECONDS
    while len(ratios) < least or time.perf_counter() < end:
        times = []
        for act in (one, other) if len(ratios) % 2 else (other, one):
            began = time.perf_counter()
            act()
            times.append(time.perf_counter() - began)
        ratios.append(times[1] / times[0] if len(ratios) % 2 else times[0] / times[1])
    return statistics.median(ratios)


def _least(act: Callable[[], object]) -> int:
    """How often something is to be called at least, after one or two calls that warm the caches."""
    began = time.perf_counter()
    act()
    if (time.perf_counter() - began) * 1e3 > LONG:
        return _FEW
    act()
    return _CALLS


def judged(task: Task, macs: int, most: int | None) -> tuple[Task, str]:
    """The task with the examples that losses are measured on, and what is to be said of it.

    Args:
        task: network, loss and data.
        macs: multiply-adds of one example.
        most: examples at most; None takes what a pass of about :data:`WORK` multiply-adds goes over.
    """
    limit = most if most is not None else max(8, int(WORK // max(macs, 1)))
    there = 0
    for _, _, count in task.batches():
        there += count
        if there > limit:
            return few(task, limit), f"losses are those of the first {limit} examples: the network is large"
    return task, ""


def accuracy(task: Task) -> float:
    """Accuracy in per cent over a task's data.

    Raises:
        ModelError: when no target counts towards it.
    """
    right = count = 0
    for output, target, _ in task.outputs():
        if not isinstance(target, Tensor) or output.dim() != target.dim() + 1:
            raise ModelError(
                "accuracy needs logits with one row for each target; ask for `loss +0.05` with this network."
            )
        counted = target != -100
        right += int(((output.argmax(-1) == target) & counted).sum())
        count += int(counted.sum())
    if not count:
        raise ModelError("no target counts towards accuracy: all of them are the ignored value -100.")
    return 100.0 * right / count


def refuse_pruned(prunable: Mapping[str, Tensor]) -> None:
    """Refuse a network with many zeros: what its layers cost and lose is forecast from the dense one.

    Raises:
        UsageError: naming the tensor with most.
    """
    zeros = {name: float((p.detach() == 0).float().mean()) for name, p in prunable.items() if bool(p.detach().any())}
    worst = max(zeros, key=lambda name: zeros[name], default=None)
    if worst is not None and zeros[worst] >= 0.05:
        raise UsageError(
            f"a plan layer by layer begins with a dense network; {zeros[worst]:.1%} of `{worst}` are zero already. "
            'Pass the dense network, or prune further with one budget: `secateur prune --to "params 5%"`.'
        )
