"""Measured times of the layers of a network at other widths, kept in memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from secateur.surgery.products import Work
from secateur.surgery.propagate import op_name, plain_args

Clock = Callable[[Callable[[], object]], float]
"""Milliseconds that a call takes."""

_LEAST, _MOST, _ENOUGH = 5, 200, 0.005


class LayerTimes:
    """Milliseconds of operators by their shapes, each measured once, when it is first asked for.

    Args:
        device: where the operators run.
        clock: what measures a call; by default the median of five or more runs after two that do not count, with as
            many threads as torch uses then.

    Cost: of a new shape, about 5 ms or seven runs, whichever is more, and memory of its inputs and outputs.
    """

    def __init__(self, device: torch.device | str = "cpu", clock: Clock | None = None) -> None:
        self.device = torch.device(device)
        self.clock = clock or self._median
        self.table: dict[Hashable, float] = {}

    def of(self, work: Work, lengths: Sequence[int]) -> float:
        """Milliseconds of an operator once its dimensions have these lengths; 0 where one of them is empty."""
        shapes = {node: tuple(lengths[place] for place in places) for node, places in work.shapes.items()}
        if not all(all(shape) for shape in shapes.values()):
            return 0.0
        groups = lengths[work.channels[0]] // work.channels[1] if work.channels else None
        args, kwargs = _given(work.node, shapes, groups)
        known = map_arg((args, kwargs), lambda n: f"{n.meta['val'].dtype}{shapes.get(n, ())}")
        key = repr((op_name(work.node), known))
        if key not in self.table:
            self.table[key] = self._measured(work.node, shapes, args, kwargs)
        return self.table[key]

    @torch.no_grad()
    def _measured(self, node: Node, shapes: dict[Node, tuple[int, ...]], args: Any, kwargs: Any) -> float:
        def tensor(n: Node) -> Tensor:
            kind = n.meta["val"].dtype
            if kind.is_floating_point or kind.is_complex:
                return torch.full(shapes.get(n, ()), 0.5, dtype=kind, device=self.device)
            return torch.ones(shapes.get(n, ()), dtype=kind, device=self.device)

        target: Any = node.target
        made, named = map_arg(args, tensor), map_arg(kwargs, tensor)
        return self.clock(lambda: target(*made, **named))

    def _median(self, call: Callable[[], object]) -> float:
        found: list[float] = []
        for _ in range(2):
            call()
        self._wait()
        began = time.perf_counter()
        while len(found) < _LEAST or (len(found) < _MOST and time.perf_counter() - began < _ENOUGH):
            start = time.perf_counter()
            call()
            self._wait()
            found.append(time.perf_counter() - start)
        return 1e3 * statistics.median(found)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def _given(node: Node, shapes: dict[Node, tuple[int, ...]], groups: int | None) -> tuple[Any, Any]:
    """The arguments of an operator, with the sizes and the groups that stay."""
    args, kwargs = plain_args(node)
    name = op_name(node)
    if name in ("layer_norm", "rms_norm"):
        return (args[0], list(shapes[args[0]][-len(args[1]) :]), *args[2:]), kwargs
    if groups is None:
        return args, kwargs
    if "groups" in kwargs:
        return args, {**kwargs, "groups": groups}
    place = {"convolution": 8, "group_norm": 1}.get(name, 6)
    return (*args[:place], groups, *args[place + 1 :]), kwargs
