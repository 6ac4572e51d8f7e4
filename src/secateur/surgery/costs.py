"""What a network costs once units are gone: parameters, multiply-adds, bytes and forecast milliseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind

from secateur.core.errors import ModelError, UsageError, nearest
from secateur.surgery.analysis import Analysis
from secateur.surgery.products import Lengths, Sizes, Work, works
from secateur.surgery.propagate import sizes_of
from secateur.surgery.times import LayerTimes

Quantity = Literal["params", "macs", "bytes", "units", "ms"]


class Costs:
    """What a network costs, by how many units of each group stay. Exact, without shrinking anything.

    Args:
        analysis: the groups and the graph.
        times: measured times of layers, for ``"ms"``; by default a new table on the device of the network.
        batch: examples in the batch that ``"ms"`` is the time of, where the graph leaves them free; by default as many
            as the graph was traced with (two for an example of one).

    Cost: one pass over the products of the graph; then a few thousand multiplications for each question, and for
    ``"ms"`` a measurement of every shape not met before.
    """

    def __init__(self, analysis: Analysis, times: LayerTimes | None = None, batch: int | None = None) -> None:
        self.analysis, self.batch = analysis, batch
        self.units = {group.name: len(group) for group in analysis.groups}
        free = not analysis.note
        self._sizes = Sizes(analysis, 1 if free else None)
        self._one = self._sizes.place(1)
        self._examples = 1 if free else _examples(analysis)
        terms = [term for work in works(analysis, self._sizes) for term in work.macs]
        self._macs = _Sum(terms, [1] * len(terms), self._one)
        self._params, self._bytes = self._tensors()
        self._times = times
        self._timed: tuple[Sizes, list[Work]] | None = None

    def _tensors(self) -> tuple[_Sum, _Sum]:
        """Each tensor once, whatever it is called: parameters, and with saved buffers their bytes."""
        run = self.analysis.run
        seen: set[int] = set()
        shapes: list[Lengths] = []
        counts: list[int] = []
        widths: list[int] = []
        for spec in run.program.graph_signature.input_specs:
            tensor = run.program.state_dict.get(str(spec.target))
            if not isinstance(tensor, Tensor) or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            shapes.append(self._sizes.shape(run.parameters.get(str(spec.target)), tuple(tensor.shape)))
            counts.append(int(spec.kind == InputKind.PARAMETER))
            widths.append(tensor.element_size())
        return _Sum(shapes, counts, self._one), _Sum(shapes, widths, self._one)

    def params(self, kept: Mapping[str, int] | None = None) -> int:
        """Parameters, a tied one once; ``kept``: units by group, groups not named being whole."""
        return int(self.at("params", self.gone(kept or {})))

    def macs(self, kept: Mapping[str, int] | None = None) -> int:
        """Multiply-adds of one example in linear layers, products, convolutions, attention and recurrent layers.

        Where the graph does not leave the batch free, those of its batch, divided by its examples and rounded.
        """
        return round(self.at("macs", self.gone(kept or {})))

    def bytes(self, kept: Mapping[str, int] | None = None) -> int:
        """Bytes of parameters and saved buffers in their types."""
        return int(self.at("bytes", self.gone(kept or {})))

    def ms(self, kept: Mapping[str, int] | None = None) -> int | float:
        """Forecast milliseconds of one batch: the sum of the measured times of its operators, each by itself.

        Movements of elements and Python itself are not in it, and each operator finds its inputs in the cache, so it is
        less than what a batch takes; ratios of two forecasts are nearer to the truth.
        """
        return self.at("ms", self.gone(kept or {}))

    def gone(self, kept: Mapping[str, int]) -> Tensor:
        """Units gone, int64, in the order of the groups.

        Raises:
            UsageError: for an unknown group, or more units than it has.
        """
        for name, count in kept.items():
            if name not in self.units:
                raise UsageError(f"there is no group {name!r} of removable units. {nearest(name, self.units)}")
            if not 0 <= count <= self.units[name]:
                raise UsageError(f"group {name!r} has {self.units[name]} units; it cannot keep {count}.")
        return torch.tensor([n - kept.get(name, n) for name, n in self.units.items()], dtype=torch.int64)

    def kept(self, removal: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Units that stay, by group, once those of a removal are gone."""
        for name in removal:
            self.analysis.group(name)
        return {name: n - len({int(u) for u in removal.get(name, ())}) for name, n in self.units.items()}

    def at(self, quantity: Quantity, gone: Tensor) -> int | float:
        """One quantity once ``gone`` units of each group are gone (int64, in the order of the groups)."""
        if quantity == "units":
            return sum(self.units.values()) - int(gone.sum())
        if quantity == "ms":
            return self._milliseconds(gone)
        lengths = self._sizes.at(gone)
        if quantity == "macs":
            macs = self._macs(lengths)
            return macs if self._examples == 1 else macs / self._examples
        return (self._params if quantity == "params" else self._bytes)(lengths)

    def _milliseconds(self, gone: Tensor) -> int | float:
        if self._timed is None:
            if self.batch is not None and self.analysis.note:
                raise ModelError(
                    f"the graph is that of one batch only ({self.analysis.note}), so times of batches of {self.batch} "
                    "cannot be forecast; analyse the network with an example of that size."
                )
            sizes = Sizes(self.analysis, self.batch)
            self._timed = sizes, works(self.analysis, sizes, others=True)
        if self._times is None:
            self._times = LayerTimes(_device(self.analysis))
        sizes, every = self._timed
        lengths = sizes.at(gone).tolist()
        return sum(self._times.of(work, lengths) for work in every)


class _Sum:
    """A weighted sum of products of lengths."""

    def __init__(self, terms: Sequence[Lengths], weights: Sequence[int], one: int) -> None:
        width = max((len(term) for term in terms), default=1)
        padded = [[*term, *[one] * (width - len(term))] for term in terms]
        self.places = torch.tensor(padded, dtype=torch.int64).reshape(len(terms), width)
        self.weights = torch.tensor(weights, dtype=torch.int64)

    def __call__(self, lengths: Tensor) -> int:
        """The sum, exact in int64."""
        return int((lengths[self.places].prod(1) * self.weights).sum())


def _examples(analysis: Analysis) -> int:
    """The examples of the traced batch: the length of the first tensor that the network is given."""
    program = analysis.run.program
    inputs = {s.arg.name for s in program.graph_signature.input_specs if s.kind == InputKind.USER_INPUT}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in inputs and isinstance(node.meta.get("val"), Tensor):
            shape = sizes_of(node.meta["val"])
            return max(1, shape[0]) if shape else 1
    return 1


def _device(analysis: Analysis) -> torch.device:
    for tensor in analysis.run.program.state_dict.values():
        return tensor.device
    return torch.device("cpu")
