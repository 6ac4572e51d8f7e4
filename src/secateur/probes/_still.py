"""Looking without touching: the process is left as it was found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.core.errors import UsageError
from secateur.core.streams import global_state, set_global_state
from secateur.core.task import Task


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """No gradients, and torch's random state put back: loaders and random modules draw from it."""
    state = global_state()
    try:
        with torch.no_grad():
            yield
    finally:
        set_global_state(state)


@contextlib.contextmanager
def in_single_operations() -> Iterator[None]:
    """Transformer layers without their fast path, which runs a whole layer as one operation."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def first_examples(task: Task, count: int) -> Any:
    """The inputs of ``count`` examples of the first batch, over and over when it holds fewer.

    Tensors whose length is not the number of examples, such as position numbers, are left whole.

    Raises:
        DataError: when the data is empty or spent.
    """
    inputs, _, n = next(task.batches())
    return _take(inputs, n, torch.arange(count) % n)


def _take(inputs: Any, n: int, rows: Tensor) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[rows.to(inputs.device)] if inputs.dim() and inputs.shape[0] == n else inputs
    if isinstance(inputs, Mapping):
        return {key: _take(value, n, rows) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(_take(value, n, rows) for value in inputs)
    return inputs


def check_whole(name: str, value: Any) -> None:
    """Refuse anything but a whole number of at least 1.

    Raises:
        UsageError: naming the argument, its value and what to type.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name}={value!r} must be a whole number of at least 1; write `{name} = 1` or more.")
