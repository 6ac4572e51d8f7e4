"""The rise of the loss under every option of every layer by itself, from one forward and a few backward passes.

A layer is linear in its weights, so a change D of the weights moves an example's output along a direction u by
``G · D``, with G the example's gradient along u, as far as the layers behind it are linear too. Where classes are few,
each is such a direction, and the rise is the divergence between the class probabilities before and after. Else u is
random with ``E[u uᵀ] = H``, and half the mean square of ``G · D`` is the rise to second order. All options of a layer
are columns of one matrix, so they cost one product more. The slope of the loss is left out: on other examples it is
noise.
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
from secateur.engine.planning.roots import directions
from secateur.linalg.products import per_example_gradients

_MEMORY = 1 << 26
"""Floats that gradients and options of some rows of a layer may take together."""

_ALL = slice(None)

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
    """Rises of the loss.

    Args:
        rises: for each tensor the rise under each of its options.
        examples: how many examples they come from.
    """

    rises: Mapping[str, Tensor]
    examples: int


def shares(task: Task, options: Mapping[str, Options], examples: int, draws: int = 1, seed: int = 0) -> Shares:
    """Rises of the loss, each option by itself.

    Args:
        task: network, loss and data; the network is left as it was.
        options: by tensor.
        examples: how many of the first examples to use, at most.
        draws: backward passes for each example, at most.
        seed: of random directions.

    Raises:
        ModelError: when the network changes a layer's inputs in place, gives no tensor, or cannot be differentiated.
        DataError: when the data is empty or spent.

    Cost: a forward pass over the examples and up to ``draws`` backward passes, each as long again for the gradients of
    the examples; memory of the activations of 16 examples.
    """
    places = {name: _called(name, owners(task.model)[name]) for name in options}
    layers = {name: modules for name, modules in places.items() if modules}
    random, count, held = stream(seed, "planning", "roots"), 0, _held(task, options)
    weights = {name: p.detach() for name, p in task.params().items()}
    sums = {name: _zeros((every.width,), weights[name]) for name, every in options.items()}
    with frozen(task.model), recurrent(task.model):
        for inputs, target, n in pieces(task, examples):
            count += n
            heard = _Heard(options, n, held, weights)
            with torch.enable_grad(), _listening(layers, heard):
                output = call(task.model, inputs, weights)
            made = directions(task.loss, output, target, draws, random)
            _backward(output, made.along, heard)
            _others(task, options, set(options) - heard.found, inputs, made.along, heard)
            for name, moved in heard.along.items():
                sums[name] += made.rises(moved)
    return Shares({name: total.cpu().double() / count for name, total in sums.items()}, count)


def _held(task: Task, options: Mapping[str, Options]) -> dict[str, Tensor]:
    """All columns of the smallest tensors, so that they are not made again for every pass."""
    own, held, left = task.params(), dict[str, Tensor](), _MEMORY
    for name in sorted(options, key=lambda name: own[name].numel()):
        left -= own[name].numel() * options[name].width
        if left < 0:
            break
        held[name] = options[name].columns(_ALL)
    return held


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Sums where a tensor lies: moving each term to the processor would wait for the device in every layer."""
    return torch.zeros(shape, dtype=torch.float32 if like.device.type == "mps" else torch.float64, device=like.device)


def _called(name: str, holders: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules that multiply their inputs by a tensor; empty when one of its holders does something else."""
    fine = all(type(m) is nn.Linear or (type(m) in _WEIGHTS and _plain(m)) for m in holders)
    return list(holders) if fine and name.rpartition(".")[2] == "weight" else []


def _plain(conv: Any) -> bool:
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


class _Heard:
    """What each example's gradient says about the options, summed over the calls of a layer."""

    def __init__(
        self, options: Mapping[str, Options], count: int, held: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> None:
        self.options, self.count, self.held, self.weights = options, count, held, weights
        self.along: dict[str, list[Tensor]] = {}

    @property
    def found(self) -> set[str]:
        return set(self.along)

    def begin(self) -> None:
        """Before the backward pass of a further direction."""
        for name, every in self.along.items():
            every.append(_zeros((self.count, self.options[name].width), self.weights[name]))

    def add(self, name: str, module: nn.Module, x: Tensor, slope: Tensor) -> None:
        """The gradient of a layer's output arrives."""
        options = self.options[name]
        total = self.along[name][-1]
        for rows, gradients in _gradients(module, x, slope, self.count, options.width):
            columns = self.held[name] if name in self.held and rows == _ALL else options.columns(rows)
            total += (gradients @ columns.to(gradients.dtype)).to(total.dtype)


@contextlib.contextmanager
def _listening(layers: Mapping[str, Sequence[nn.Module]], heard: _Heard) -> Iterator[None]:
    """Inside, each layer's output tells its gradient; the first of them begin the graph."""

    def hook(name: str) -> Any:
        def listen(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            heard.along.setdefault(name, [])
            x = inputs[0].detach()
            version = x._version
            fresh = not output.requires_grad or output._is_view()
            if fresh:  # ReLU may change it in place: no leaf allows that, and the hook of a view would be lost
                output = output.requires_grad_().clone()

            def arrives(slope: Tensor) -> None:
                if x._version != version:
                    raise ModelError(
                        f"the inputs of the layer of `{name}` are changed in place after it has read them, so its "
                        "gradient cannot be told. Take the in-place operation out of the network."
                    )
                with torch.no_grad():
                    heard.add(name, module, x, slope)

            output.register_hook(arrives)
            return output if fresh else None

        return listen

    handles = [m.register_forward_hook(hook(name)) for name, modules in layers.items() for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _backward(output: Tensor, along: Sequence[Tensor], heard: _Heard) -> None:
    for i, direction in enumerate(along):
        heard.begin()
        if not output.requires_grad:
            continue
        try:
            output.backward(direction, retain_graph=i + 1 < len(along))
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
        yield _ALL, _one_by_one(module, x, slope)
        return
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows) if rows < weight.shape[0] else _ALL
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
    task: Task,
    options: Mapping[str, Options],
    names: set[str],
    inputs: Any,
    along: Sequence[Tensor],
    heard: _Heard,
) -> None:
    """Tensors that are used in another way than by such a layer: the gradients of the examples one tensor at a time."""
    own = task.params()
    for name in sorted(names):
        everything = Masks({name: torch.ones_like(own[name], dtype=torch.bool)})
        columns, heard.along[name] = options[name].columns(_ALL), []
        for direction in along:
            scaled = replace(task, loss=_along, data=[(inputs, direction)])
            rows = [rows @ columns.to(rows.dtype) for rows in per_example_gradients(scaled, everything)]
            every = torch.cat(rows)
            heard.along[name].append(every.to(_zeros((), every).dtype))


def _along(output: Tensor, direction: Tensor) -> Tensor:
    return (output * direction).sum()
