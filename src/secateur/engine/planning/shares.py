"""The second-order rise of the loss under every option of every layer, from one forward and a few backward passes.

A layer is linear in its weights, so a change D of the weights moves an example's loss along ``G · D``, with G the
example's gradient. Where the gradient is that of a random direction ``u`` of the output with ``E[u uᵀ] = H`` (see
:mod:`secateur.engine.planning.roots`), half the mean square of ``G · D`` is the rise of the loss to second order.
All options of a layer are columns of one matrix, so they cost one product more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from secateur.core.errors import ModelError
from secateur.core.masks import Masks
from secateur.core.names import owners
from secateur.core.streams import stream
from secateur.core.task import Task, call, frozen, recurrent
from secateur.engine.planning.pieces import pieces
from secateur.engine.planning.roots import root
from secateur.linalg.products import per_example_gradients

_MEMORY = 1 << 26
"""Floats that gradients and options of some rows of a layer may take together."""

_WEIGHTS = {nn.Conv1d: conv1d_weight, nn.Conv2d: conv2d_weight, nn.Conv3d: conv3d_weight}


@runtime_checkable
class Options(Protocol):
    """Changes of a tensor, as columns."""

    @property
    def width(self) -> int:
        """Number of columns."""
        ...

    def columns(self, rows: slice) -> Tensor:
        """Changes of the weights of some outputs, ``(weights, options)``."""
        ...


@dataclass(frozen=True)
class Shares:
    """Second-order rises.

    Args:
        rises: for each tensor the rise of the loss under each of its options.
        examples: how many examples they come from.
    """

    rises: Mapping[str, Tensor]
    examples: int


def shares(task: Task, options: Mapping[str, Options], examples: int, draws: int = 1, seed: int = 0) -> Shares:
    """Rises of the loss to second order, each option by itself.

    Args:
        task: network, loss and data; the network is left as it was.
        options: by tensor.
        examples: how many of the first examples to use, at most.
        draws: random directions for each example.
        seed: of the directions.

    Raises:
        ModelError: when the network changes a layer's inputs in place, gives no tensor, or cannot be differentiated.
        DataError: when the data is empty or spent.

    Cost: a forward pass over the examples and ``draws`` backward passes, each as long again for the gradients of the
    examples; memory of the activations of 16 examples.
    """
    places = {name: _called(name, owners(task.model)[name]) for name in options}
    layers = {name: modules for name, modules in places.items() if modules}
    sums = {name: torch.zeros(every.width, dtype=torch.float64) for name, every in options.items()}
    random, count = stream(seed, "planning", "roots"), 0
    weights = {name: p.detach() for name, p in task.params().items()}
    with frozen(task.model), recurrent(task.model):
        for inputs, target, n in pieces(task, examples):
            count += n
            heard = _Heard(options, n)
            with torch.enable_grad(), _listening(layers, heard):
                output = call(task.model, inputs, weights)
            directions = [root(task.loss, output, target, random) for _ in range(draws)]
            _backward(output, directions, heard)
            for name, total in heard.squares(draws).items():
                sums[name] += total
            for name, total in _others(task, options, set(options) - heard.found, inputs, directions).items():
                sums[name] += total
    return Shares({name: total / (2 * count * draws) for name, total in sums.items()}, count)


def _called(name: str, holders: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules that multiply their inputs by a tensor; empty when one of its holders does something else."""
    fine = all(type(m) is nn.Linear or (type(m) in _WEIGHTS and _plain(m)) for m in holders)
    return list(holders) if fine and name.rpartition(".")[2] == "weight" else []


def _plain(conv: Any) -> bool:
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


class _Heard:
    """What each example's gradient says about the options, summed over the calls of a layer."""

    def __init__(self, options: Mapping[str, Options], count: int) -> None:
        self.options, self.count = options, count
        self.along: dict[str, list[Tensor]] = {}
        self.draw = 0

    @property
    def found(self) -> set[str]:
        return set(self.along)

    def begin(self) -> None:
        """Before the backward pass of a further direction."""
        for name, every in self.along.items():
            every.append(torch.zeros(self.count, self.options[name].width))

    def add(self, name: str, module: nn.Module, x: Tensor, slope: Tensor) -> None:
        """The gradient of a layer's output arrives."""
        options = self.options[name]
        total = self.along[name][-1]
        for rows, gradients in _gradients(module, x, slope, self.count, options.width):
            total += (gradients @ options.columns(rows).to(gradients.dtype)).to(total.device, total.dtype)

    def squares(self, draws: int) -> dict[str, Tensor]:
        """Sums over the examples and the directions."""
        return {name: torch.stack(every).double().square().sum((0, 1)) for name, every in self.along.items()}


@contextlib.contextmanager
def _listening(layers: Mapping[str, Sequence[nn.Module]], heard: _Heard) -> Iterator[None]:
    """Inside, each layer's output tells its gradient; the first of them begin the graph."""

    def hook(name: str) -> Any:
        def listen(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            heard.along.setdefault(name, [])
            x = inputs[0].detach()
            version = x._version
            begins = not output.requires_grad
            if begins:
                output = output.requires_grad_().clone()  # a leaf must not be changed in place, and ReLU may

            def arrives(slope: Tensor) -> None:
                if x._version != version:
                    raise ModelError(
                        f"the inputs of the layer of `{name}` are changed in place after it has read them, so its "
                        "gradient cannot be told. Take the in-place operation out of the network."
                    )
                with torch.no_grad():
                    heard.add(name, module, x, slope)

            output.register_hook(arrives)
            return output if begins else None

        return listen

    handles = [m.register_forward_hook(hook(name)) for name, modules in layers.items() for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _backward(output: Tensor, directions: Sequence[Tensor], heard: _Heard) -> None:
    if not output.requires_grad:
        return
    for direction in directions:
        heard.begin()
        try:
            output.backward(direction, retain_graph=direction is not directions[-1])
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ModelError(f"the network cannot be differentiated: {error}") from error


def _gradients(module: nn.Module, x: Tensor, slope: Tensor, count: int, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Each example's gradient of some outputs' weights, ``(examples, weights)``."""
    weight: Any = module.weight
    rows = max(1, _MEMORY // max(1, (count + width) * weight[0].numel()))
    if isinstance(module, nn.Linear):
        x = x.reshape(count, -1, x.shape[-1])
        slope = slope.reshape(count, -1, slope.shape[-1]).mT
    elif _unfolds(module, slope):
        conv: Any = module
        x = nn.functional.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride).mT
        slope = slope.flatten(2)
    else:
        yield slice(None), _one_by_one(module, x, slope)
        return
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        yield part, (slope[:, part] @ x).flatten(1)


def _unfolds(module: Any, slope: Tensor) -> bool:
    """Whether the patches of an example are fewer numbers than the layer's weights."""
    return isinstance(module, nn.Conv2d) and module.groups == 1 and slope[0, 0].numel() < module.weight.shape[0]


def _one_by_one(module: Any, x: Tensor, slope: Tensor) -> Tensor:
    make = _WEIGHTS[type(module)]
    settings = module.stride, module.padding, module.dilation, module.groups
    shape = module.weight.shape
    return torch.stack([make(x[i : i + 1], shape, slope[i : i + 1], *settings).flatten() for i in range(len(x))])


def _others(
    task: Task, options: Mapping[str, Options], names: set[str], inputs: Any, directions: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Tensors that are used in another way than by such a layer: the gradients of the examples one tensor at a time."""
    own, found = task.params(), {}
    for name in sorted(names):
        everything = Masks({name: torch.ones_like(own[name], dtype=torch.bool)})
        found[name] = torch.zeros(options[name].width, dtype=torch.float64)
        for direction in directions:
            along = replace(task, loss=_along, data=[(inputs, direction)])
            for rows in per_example_gradients(along, everything):
                found[name] += (rows @ options[name].columns(slice(None)).to(rows.dtype)).double().square().sum(0).cpu()
    return found


def _along(output: Tensor, direction: Tensor) -> Tensor:
    return (output * direction).sum()
