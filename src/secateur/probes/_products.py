"""Every matrix product and convolution of a forward pass, with the weights that take part in it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from secateur.core.names import parameters, unwrap
from secateur.core.task import Task, call, frozen
from secateur.probes._still import first_examples, in_single_operations, unchanged

_ATEN = torch.ops.aten
_PRODUCTS: dict[Any, tuple[int, int]] = {
    _ATEN.mm: (0, 1),
    _ATEN.bmm: (0, 1),
    _ATEN.mv: (0, 1),
    _ATEN.dot: (0, 1),
    _ATEN.addmm: (1, 2),
    _ATEN.baddbmm: (1, 2),
    _ATEN.addbmm: (1, 2),
    _ATEN.addmv: (1, 2),
}
"""Places of the two factors among the arguments."""

_CONVOLUTIONS = (_ATEN.convolution, _ATEN.convolution_overrideable)


@dataclass
class Products:
    """Multiply-adds (MACs) of one forward pass of one example.

    Args:
        dense: MACs that each parameter takes part in, by plain name; a tied one once, over all of its uses.
        kept: the same, without those of pruned weights.
        other: MACs between activations, such as attention's; no zero weight saves any.
        reference: half of what torch's own counter (``torch.utils.flop_counter``) found in the same pass.
    """

    dense: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    other: int = 0
    reference: int = 0


def count_products(task: Task, masks: Mapping[str, Tensor] | None = None) -> Products:
    """Count what one example of the first batch costs. Cost: one forward pass of one example, without fast kernels.

    Raises:
        DataError: when the data is empty or spent.
    """
    found, counter = Products(), FlopCounterMode(display=False)
    with unchanged(), frozen(task.model), _plain_kernels():
        inputs = first_examples(task, 1)
        with counter, _Watch(task, masks or {}, found):
            call(task.model, inputs)
    found.reference = counter.get_total_flops() // 2
    return found


@dataclass(frozen=True)
class _Weight:
    """Which parameter a piece of memory holds, and which of its places are kept.

    ``kept`` is flat and lies like the memory from ``start`` on, so that any view of the parameter finds its part.
    """

    name: str
    start: int
    kept: Tensor

    @classmethod
    def of(cls, name: str, tensor: Tensor, kept: Tensor | None) -> _Weight:
        span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        flat = torch.ones(span if tensor.numel() else 0, dtype=torch.bool, device=tensor.device)
        if kept is not None and tensor.numel():
            flat.as_strided(tensor.shape, tensor.stride()).copy_(kept)
        return cls(name, int(tensor.storage_offset()), flat)

    def part(self, view: Tensor) -> Tensor | None:
        """The kept places of a view, in its shape; None when the view lies outside."""
        start = view.storage_offset() - self.start
        span = sum((n - 1) * step for n, step in zip(view.shape, view.stride(), strict=True))
        inside = view.numel() and start >= 0 and start + span < self.kept.numel()
        return self.kept.as_strided(view.shape, view.stride(), start) if inside else None


class _Watch(TorchDispatchMode):
    """Counts products as torch runs them, so that functions count like modules.

    Memory is known as a parameter's when it is that of the parameter or of a copy computed from constants alone:
    a cast, or a parametrization.
    """

    supports_higher_order_operators = True

    def __init__(self, task: Task, masks: Mapping[str, Tensor], found: Products) -> None:
        super().__init__()
        self.found = found
        self.constant: dict[int, list[_Weight]] = {}
        self.alive: list[Tensor] = []  # so that no memory of a constant is used again
        for name, p in parameters(task.model).items():
            self._remember(p, [_Weight.of(name, p, masks[name] if name in masks else None)] if p.dim() > 1 else [])
        for buffer in unwrap(task.model).buffers():
            self._remember(buffer, [])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", func)
        if packet is func:  # control flow (`torch.cond`): torch's counter looks inside, this one does not
            return func(*args, **kwargs)
        if packet not in _PRODUCTS and packet not in flop_registry:
            with self:
                parts = func.decompose(*args, **kwargs)
                if parts is not NotImplemented:
                    return parts
        out = func(*args, **kwargs)
        if packet in _PRODUCTS:
            one, two = (args[i] for i in _PRODUCTS[packet])
            self._product(one, two)
        elif packet in _CONVOLUTIONS:
            self._convolution(args[0], args[1], args[6], out)
        elif packet in flop_registry:
            self.found.other += flop_registry[packet](*args, **kwargs, out_val=out) // 2
        else:
            self._follow(tree_leaves((args, kwargs)), tree_leaves(out))
        return out

    def _product(self, one: Tensor, two: Tensor) -> None:
        """(…, M, K) times (…, K, N), or a vector for either."""
        columns = two.shape[-1] if two.dim() > 1 else 1
        rows = one.shape[-2] if one.dim() > 1 else 1
        # A linear layer has its weight on the right, so that one is asked first.
        if not self._book(two, rows) and not self._book(one, columns):
            self.found.other += one.numel() * columns

    def _convolution(self, x: Tensor, weight: Tensor, transposed: bool, out: Tensor) -> None:
        places = x if transposed else out
        positions = places.shape[0] * prod(places.shape[2:])
        if not self._book(weight, positions):
            self.found.other += weight.numel() * positions

    def _book(self, factor: Tensor, positions: int) -> bool:
        """Count a factor that is a parameter's memory: each entry meets ``positions`` numbers."""
        for weight, part in self._parts(factor):
            self.found.dense[weight.name] += factor.numel() * positions
            self.found.kept[weight.name] += int(part.sum()) * positions
            return True
        return False

    def _parts(self, tensor: Tensor) -> Iterator[tuple[_Weight, Tensor]]:
        for weight in self.constant.get(_memory(tensor), []):
            part = weight.part(tensor)
            if part is not None:
                yield weight, part

    def _follow(self, given: list[Any], made: list[Any]) -> None:
        """Remember what was computed from constants alone; a copy of one weight in its shape is that weight."""
        tensors = [x for x in given if isinstance(x, Tensor)]
        constant = all(_memory(x) in self.constant for x in tensors)
        for out in made:
            if not isinstance(out, Tensor) or out.layout != torch.strided:
                continue
            if not constant:
                if any(out is x for x in tensors):  # written in place
                    self.constant.pop(_memory(out), None)
            elif _memory(out) not in self.constant:
                alike = [found for x in tensors if x.shape == out.shape and x.dim() > 1 for found in self._parts(x)]
                same = len({weight.name for weight, _ in alike}) == 1
                self._remember(out, [_Weight.of(alike[0][0].name, out, alike[0][1])] if same else [])

    def _remember(self, tensor: Tensor, weights: list[_Weight]) -> None:
        self.constant.setdefault(_memory(tensor), []).extend(weights)
        self.alive.append(tensor)


def _memory(tensor: Tensor) -> int:
    """A number for the memory behind a tensor and all its views; 0 for tensors without any."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else 0


@contextlib.contextmanager
def _plain_kernels() -> Iterator[None]:
    """Fused kernels (recurrent layers, attention) off: in one piece, nobody sees their products."""
    backends: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    before = [backend.enabled for backend in backends]
    try:
        for backend in backends:
            backend.enabled = False
        with in_single_operations(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for backend, enabled in zip(backends, before, strict=True):
            backend.enabled = enabled
