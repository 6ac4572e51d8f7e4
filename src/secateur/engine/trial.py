"""A trial before a run: a few examples through the network, so that what does not fit is told at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secateur.core import streams
from secateur.core.errors import ModelError, SecateurError
from secateur.core.losses import CrossEntropy
from secateur.core.task import call, device_of, to
from secateur.data import Dataset, Loader, Split
from secateur.engine import distributed
from secateur.engine.recipe import ExportStep, MeasureStep, PruneStep, Recipe, ShrinkStep, TrainStep
from secateur.nets.captured import CAPTURE

Pass = tuple[int, bool]
"""Examples in a batch, and whether the network is in training mode."""


def check_shaped(net: nn.Module) -> None:
    """Refuse weights that get their shape from the first batch.

    Raises:
        ModelError: naming the first of them.
    """
    lazy = [name for name, p in net.named_parameters() if is_lazy(p)]
    if lazy:
        raise ModelError(
            f"`{lazy[0]}` has no shape before the network has seen a batch (a Lazy module). Use the plain module, or "
            "put one batch through the network in the function that builds it."
        )


def check_fits(recipe: Recipe, data: Dataset, net: nn.Module) -> None:
    """Put a few examples through the network and the loss; network and random numbers are left as they were.

    Batches of two and of three examples tell nearly all; only when one of them fails, batches of the very sizes that
    the recipe will meet decide, since a network may have been made for just these.

    Args:
        recipe: says which sizes these are.
        data: where the examples are taken from.
        net: the network, on the device it will run on.

    Raises:
        ModelError: when that fails, or the output is none that cross-entropy takes; the message has the shapes.
    """
    exact = _sizes(recipe, data)
    trains = any(isinstance(step, TrainStep) for step in recipe.steps)
    quick = [(2, False), *((n, True) for n in (2, 3) if trains), *(size for size in exact if size[0] == 1)]
    name = recipe.model.use or recipe.model.load
    with _untouched(net):
        try:
            _passes(name, data, net, quick)
        except ModelError:
            _passes(name, data, net, exact)


def _sizes(recipe: Recipe, data: Dataset) -> list[Pass]:
    """Batches that the recipe will meet: whole ones and the last of each kind."""
    spec, steps = recipe.data, recipe.steps
    share = -(-len(data.train) // distributed.world())
    found: list[Pass] = []
    if any(isinstance(step, TrainStep) for step in steps):
        found += [(n, True) for n in _whole_and_last(share, spec.batch)]
    for part, split in data.splits():
        if part != "train":
            found += [(n, False) for n in _whole_and_last(len(split), spec.evaluation_batch)]
    for step in steps:
        if isinstance(step, PruneStep | ShrinkStep):
            found += [(n, False) for n in _whole_and_last(min(step.examples, len(data.train)), 256)]
        if isinstance(step, MeasureStep):
            found.append((1, False))  # one example is timed
        if isinstance(step, ExportStep):
            found.append((min(step.batch, len(data.test)), False))
    return list(dict.fromkeys(found))


def _whole_and_last(count: int, batch: int) -> list[int]:
    return [n for n in (min(batch, count), count % batch) if n]


def _passes(name: str, data: Dataset, net: nn.Module, passes: Iterable[Pass]) -> None:
    for count, training in passes:
        picked = torch.arange(count) % len(data.train)
        split = Split(data.train.x[picked], data.train.y[picked])
        inputs, target = to(next(iter(Loader(split, count, mean=data.mean, std=data.std))), device_of(net))
        shapes = f"inputs {_shown(inputs)} and targets {_shown(target)}"
        try:
            net.train(training)
            output = call(net, inputs)
            wrong = _wrong(output, target, data)
            if not wrong:
                CrossEntropy()(output, target)
        except SecateurError:
            raise
        except Exception as error:  # a network of somebody else's may raise anything
            why = next(iter(str(error).strip().splitlines()), "").rstrip(".")
            mode = "in training" if training else "in evaluation"
            raise ModelError(
                f"the network {name} fails {mode} on a batch of {data.name} with {shapes}: {type(error).__name__}"
                f"{f': {why}' if why else ''}. {_cure(name, data, net, inputs, training)}"
            ) from error
        if wrong:
            raise ModelError(f"the network {name} does not fit {data.name} with {shapes}: {wrong}")


def _wrong(output: Any, target: Tensor, data: Dataset) -> str:
    """What is wrong with an output, and the cure; empty when nothing is."""
    if not isinstance(output, Tensor):
        count = f" of {len(output)}" if isinstance(output, tuple | list | dict) else ""
        return f"it returns {type(output).__name__}{count}. Let it return one tensor, the logits."
    wanted = f"({', '.join(map(str, (*target.shape, data.outputs)))})"
    if output.dim() != target.dim() + 1 or output.shape[:-1] != target.shape:
        return f"its output is {_shown(output)}. Let it return logits of shape {wanted}: one row for each target."
    if output.shape[-1] < data.outputs:
        return (
            f"its output is {_shown(output)}, logits of {output.shape[-1]} classes; the data have {data.outputs}. "
            f"Let it return logits of shape {wanted}."
        )
    return ""


def _cure(name: str, data: Dataset, net: nn.Module, inputs: Tensor, training: bool) -> str:
    if name.endswith(".pt2"):
        return f"A captured network takes the batch sizes it was captured for; capture it for all: {CAPTURE}."
    types = {p.dtype for p in net.parameters() if p.is_floating_point()}
    if inputs.is_floating_point() and types and inputs.dtype not in types:
        return f"Its weights are {', '.join(sorted(map(str, types)))}; make it {inputs.dtype}, with `.float()`."
    if training and len(inputs) == 1:
        return "If it normalises over the batch, one example is too few: choose another `data.batch`."
    return f"Let it take examples of shape {data.input_shape} and return logits of {data.outputs} classes for each."


def _shown(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype}"


@contextlib.contextmanager
def _untouched(net: nn.Module) -> Iterator[None]:
    """No gradients; modes, attributes, buffers and random numbers are put back at the end."""
    modules = list(net.modules())
    modes = [module.training for module in modules]
    attributes = [dict(vars(module)) for module in modules]
    buffers = [(module, name, b, b.clone()) for module in modules for name, b in module.named_buffers(recurse=False)]
    random = streams.global_state()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode, before in zip(modules, modes, attributes, strict=True):
            module.training = mode
            now = vars(module)
            for name in now.keys() - before.keys():
                del now[name]
            now.update({name: value for name, value in before.items() if now.get(name) is not value})
        with torch.no_grad():
            for module, name, tensor, value in buffers:
                if isinstance(module._buffers, dict):  # of a scripted network they cannot be replaced
                    module._buffers[name] = tensor
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
        streams.set_global_state(random)
