"""Figures of a training run on their way to the metrics file and to whoever watches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secateur.engine.checkpoint import Metrics

INTERVAL = 10
"""Optimizer steps between two rows of the metrics file."""

Watch = Callable[[dict[str, int | float]], None]


class Figures:
    """Rows that wait to be sent; their numbers may still be tensors on an accelerator.

    Reading one number makes the processor wait until the accelerator has caught up, so the numbers of all waiting
    rows are read at once.

    Args:
        metrics: the file.
        watch: called with every row.
    """

    def __init__(self, metrics: Metrics, watch: Watch | None) -> None:
        self.metrics, self.watch = metrics, watch
        self._waiting: list[tuple[dict[str, Any], bool]] = []

    def add(self, row: dict[str, Any], write: bool) -> None:
        """One more row; only with ``write`` it goes to the file too."""
        self._waiting.append((row, write))

    def fetch(self) -> list[dict[str, Any]]:
        """The waiting rows, their numbers read: exact, as Python's floats. They go on waiting."""
        places = [(row, key) for row, _ in self._waiting for key, value in row.items() if isinstance(value, Tensor)]
        if places:
            numbers = torch.stack([row[key].detach().double().reshape(()) for row, key in places]).tolist()
            for (row, key), number in zip(places, numbers, strict=True):
                row[key] = number
        return [row for row, _ in self._waiting]

    def send(self) -> None:
        """Hand all waiting rows on, in their order."""
        self.fetch()
        rows, self._waiting = self._waiting, []
        for row, write in rows:
            if write:
                self.metrics.write(**row)
            if self.watch is not None:
                self.watch(row)
