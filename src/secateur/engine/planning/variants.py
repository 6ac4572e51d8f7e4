"""A captured network with zeros drawn at random, opened from the file on disk: what the clock is held against."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur import _native
from secateur.core.errors import UsageError
from secateur.core.names import aliases
from secateur.core.patterns import Block, Pattern, Unstructured, parse_pattern
from secateur.core.prunable import coverage
from secateur.core.streams import stream
from secateur.engine.planning.operators import Layer, Sharing, find_layers
from secateur.runtime import planfile
from secateur.runtime.capture import Captured, capture
from secateur.runtime.session import Session

__all__ = ["DENSE", "Choice", "Variants", "arrays_of", "draw", "kept_units"]

Choice = Mapping[str, tuple[str, float]]
DENSE = "dense"
FEW = 0.1  # share of weights at which the core runs every layer as a sparse one


class Variants:
    """A network, captured once, from which plans with other zeros are made without capturing it again.

    Args:
        model: The network, on the CPU.
        example: One batch.
        threads: Of the sessions.
        captured: The network, captured with the example already; None captures it.

    Attributes:
        arrays: The batch as sessions take it.
        sharing: Which layers there are.
        isa: Instruction set of the core.
        threads: That sessions use.
        batch: Examples in the batch.
        close: Removes the files; sessions that are open go on.

    Raises:
        UsageError: without the compiled core there is nothing to time.
        CaptureError: the network cannot be captured, or parts of it stay in torch.
        ModelError: nothing in it can be pruned.
    """

    def __init__(self, model: nn.Module, example: Any, threads: int | None, captured: Captured | None = None) -> None:
        if _native.library() is None:
            raise UsageError(
                f"milliseconds cannot be forecast: {_native.why_not()}, and the NumPy reference that runs instead has "
                "no clock. Install a wheel with the compiled core, or choose a target in macs, bytes or params."
            )
        found = coverage(model)
        self._wanted = threads
        captured = captured if captured is not None else capture(model, example)
        self._graph, self._weights = captured.graph, captured.weights
        self._folder = Path(tempfile.mkdtemp(prefix="secateur-"))
        self.close = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._made = 0
        self._first: Session | None = None
        self.arrays = arrays_of(example)
        self.batch = len(self.arrays[0]) if self.arrays[0].ndim else 1
        names = {name: tuple(held) for name, held in aliases(model).items() if name in found.prunable}
        shapes = {name: tuple(found.prunable[name].shape) for name in names}
        self.sharing, self.isa, self.threads = self._share(names, shapes)
        self.layers: dict[str, Layer] = {layer.tensor: layer for layer in self.sharing.layers}

    def density(self, name: str) -> float:
        """Share of a tensor's weights that are not zero in the network as it is."""
        held = [self._weights[weight] for weight in self.layers[name].weights]
        return sum(int(np.count_nonzero(array)) for array in held) / max(1, sum(array.size for array in held))

    def as_it_is(self) -> Session:
        """The network with the zeros that it has."""
        first, self._first = self._first, None
        return first if first is not None else self._open(self._weights)

    def session(self, chosen: Choice, seed: int) -> Session:
        """The network with zeros drawn at random; layers that are not named have no zeros at all.

        Args:
            chosen: Tensor to pattern (or ``"dense"``) and density.
            seed: Of the draws.
        """
        weights = {name: array for name, array in self._weights.items()}
        for name, layer in self.layers.items():
            pattern, density = chosen.get(name, (DENSE, 1.0))
            keep = None
            if pattern != DENSE:
                keep = draw(parse_pattern(pattern), layer.shape, density, stream(seed, "zeros", name)).numpy()
            for weight in layer.weights:
                weights[weight] = _drawn(weights[weight], keep)
        return self._open(weights)

    def _open(self, weights: Mapping[str, np.ndarray]) -> Session:
        self._made += 1
        path = self._folder / f"{self._made}.safetensors"
        planfile.write(path, self._graph, weights)
        session = Session(path, threads=self._wanted)
        with contextlib.suppress(OSError):  # what is open stays, and some systems then refuse
            path.unlink()  # twenty networks at a time would fill a small disk
        return session

    def _share(
        self, names: Mapping[str, tuple[str, ...]], shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[Sharing, str, int]:
        with contextlib.ExitStack() as stack:
            self._first = own = self._open(self._weights)  # the next that asks for it has it
            dense = own.explain(self.batch)
            sparse = dict(self._weights)
            for name, held in names.items():
                for weight in held:
                    if weight in sparse:
                        few = draw(parse_pattern("unstructured"), sparse[weight].shape, FEW, stream(0, "few", name))
                        sparse[weight] = _drawn(sparse[weight], few.numpy())
            other = stack.enter_context(self._open(sparse))
            told = other.explain(self.batch)
        return find_layers(self._graph, dense, told, names, shapes), str(dense["isa"]), int(dense["threads"])


def draw(pattern: Pattern, shape: tuple[int, ...], density: float, generator: torch.Generator) -> Tensor:
    """A random mask with as many units kept as a density says, at least one."""
    keep = kept_units(pattern, shape, density)
    if not isinstance(pattern, Unstructured | Block):
        return pattern.mask(torch.rand(shape, generator=generator), keep)
    units = pattern.units(shape)  # a permutation costs a tenth of ranking scores
    chosen = torch.zeros(units, dtype=torch.bool)
    chosen[torch.randperm(units, generator=generator)[:keep]] = True
    if isinstance(pattern, Unstructured):
        return chosen.reshape(shape)
    grid = chosen.reshape(shape[0] // pattern.rows, -1)
    return grid.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.cols, 1).reshape(shape)


def kept_units(pattern: Pattern, shape: tuple[int, ...], density: float) -> int:
    """Units that stay at a density: the nearest whole number, at least one; what an N:M pattern prescribes."""
    fixed = pattern.fixed(shape)
    units = pattern.units(shape)
    return fixed if fixed is not None else min(units, max(1, round(density * units)))


def arrays_of(example: Any) -> list[np.ndarray]:
    """The inputs of one batch, in order, as sessions take them."""
    if isinstance(example, Tensor):
        given: list[Any] = [example]
    else:
        given = list(example.values() if isinstance(example, Mapping) else example)
    tensors = [t.detach().cpu() for t in given]
    return [np.ascontiguousarray((t.float() if t.is_floating_point() else t).numpy()) for t in tensors]


def _drawn(array: np.ndarray, keep: np.ndarray | None) -> np.ndarray:
    """Weights without zeros of their own, and zero where ``keep`` says; scaled so that signals keep their size."""
    typical = float(np.abs(array).mean(dtype=np.float64)) or 1e-3
    whole = np.where(array == 0, np.float32(typical), array)
    if keep is None:
        return whole
    share = max(float(keep.mean()), 1e-6)
    return np.where(keep.reshape(array.shape), whole * np.float32(share**-0.5), np.float32(0))
