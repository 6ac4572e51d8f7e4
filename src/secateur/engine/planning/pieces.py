"""The first examples of a task in small pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from secateur.core.task import Task

PIECE = 16


def pieces(task: Task, most: int, skip: int = 0, size: int = PIECE) -> Iterator[tuple[Any, Any, int]]:
    """Inputs, target and number of examples of pieces of the data.

    Args:
        task: network and data.
        most: examples in all.
        skip: examples to leave out first.
        size: examples in one piece.
    """
    seen, end = 0, skip + most
    for inputs, target, n in task.batches():
        for start in range(max(0, skip - seen), min(n, end - seen), size):
            stop = min(start + size, n, end - seen)
            yield part(inputs, n, start, stop), part(target, n, start, stop), stop - start
        seen += n
        if seen >= end:
            return


def few(task: Task, most: int, skip: int = 0) -> Task:
    """The task with some of its examples only, in pieces of 64."""
    return replace(task, data=[(inputs, target) for inputs, target, _ in pieces(task, most, skip, 64)])


def part(thing: Any, count: int, start: int, stop: int) -> Any:
    """Some examples of a batch: rows of every tensor that has one for each, all else whole."""
    if isinstance(thing, Tensor):
        return thing[start:stop] if thing.dim() and thing.shape[0] == count else thing
    if isinstance(thing, Mapping):
        return {key: part(value, count, start, stop) for key, value in thing.items()}
    if isinstance(thing, tuple) and hasattr(thing, "_fields"):
        return type(thing)(*(part(value, count, start, stop) for value in thing))
    if isinstance(thing, tuple | list):
        return type(thing)(part(value, count, start, stop) for value in thing)
    return thing
