"""Runs a graph on NumPy, one operator after the other: slow, plain, and the measure of the native core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from secateur.core.errors import DataError
from secateur.runtime.graph import Graph, InputSpec
from secateur.runtime.ops import compute
from secateur.runtime.shapes import LIMIT, infer
from secateur.runtime.weights import matched


class Reference:
    """A graph with its weights, ready to run.

    Args:
        graph: The network.
        weights: One floating array for each weight of the graph.
        dtype: The type that everything is computed in; np.float64 makes an oracle for float32 code.
        limit: Most elements that one value may have; see :func:`secateur.runtime.shapes.infer`.

    Raises:
        DataError: weights that do not belong to the graph.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, np.ndarray],
        dtype: type[np.floating] = np.float32,
        limit: int = LIMIT,
    ) -> None:
        self.graph = graph
        self.dtype = dtype
        self._limit = limit
        self._weights = matched(graph, weights, dtype)
        self._last = {name: at for at, node in enumerate(graph.nodes) for name in (*node.outputs, *node.inputs)}

    def __call__(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """The outputs for inputs in the graph's order.

        Raises:
            DataError: an input of the wrong shape or type, or a token id outside its embedding.
            GraphError: shapes that do not fit for this batch.
        """
        values = self._run(inputs, keep=False)
        return tuple(values[name] for name in self.graph.outputs)

    def trace(self, *inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Every value of the graph by name, to find where two runs part."""
        return self._run(inputs, keep=True)

    def _run(self, inputs: Sequence[np.ndarray], keep: bool) -> dict[str, np.ndarray]:
        values, batch = self._read(inputs)
        infer(self.graph, batch, self._limit)
        wanted = set(self.graph.outputs)
        for at, node in enumerate(self.graph.nodes):
            weights = {role: self._weights[name] for role, name in node.weights.items()}
            made = compute(node, [values[name] for name in node.inputs], weights, batch)
            values.update(zip(node.outputs, made, strict=True))
            for name in {*node.inputs, *node.outputs}:
                if not keep and self._last[name] == at and name not in wanted:
                    del values[name]
        return values

    def _read(self, inputs: Sequence[np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
        specs = self.graph.inputs
        if len(inputs) != len(specs):
            names = ", ".join(spec.name for spec in specs)
            raise DataError(f"{len(inputs)} inputs were given; the network reads {len(specs)}: {names}.")
        batches = {array.shape[0] for spec, array in zip(specs, inputs, strict=True) if spec.batched and array.ndim}
        if len(batches) > 1:
            raise DataError(f"the inputs have batches of {', '.join(map(str, sorted(batches)))}; give all the same.")
        batch = batches.pop() if batches else 1
        if batch < 1:
            raise DataError("the batch is empty; give at least one example.")
        return {spec.name: self._input(spec, array) for spec, array in zip(specs, inputs, strict=True)}, batch

    def _input(self, spec: InputSpec, array: np.ndarray) -> np.ndarray:
        rest = 1 if spec.batched else 0
        kinds, dtype = ("iu", np.int64) if spec.dtype == "i64" else ("f", self.dtype)
        fits = array.ndim == len(spec.shape) and array.shape[rest:] == spec.shape[rest:]
        if not fits or array.dtype.kind not in kinds:
            shape = [*("batch",) * rest, *spec.shape[rest:]]
            raise DataError(
                f"input {spec.name!r} is a {array.dtype} array of shape {list(array.shape)}; "
                f"expected {spec.dtype} of shape [{', '.join(map(str, shape))}]."
            )
        return array.astype(dtype)
