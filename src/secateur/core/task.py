"""Task: a network, its loss and its data; all that a method may look at."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.core.calls import split_inputs
from secateur.core.errors import DataError, ModelError
from secateur.core.names import Named, parameters, unwrap

Batch = tuple[Any, Any]
"""Inputs (a tensor, a tuple of tensors or a mapping of keyword arguments) and their targets."""

Statistics = Literal["running", "fresh", "auto"]


@dataclass(frozen=True)
class Task:
    """A network with the loss and the data it is judged by.

    Args:
        model: the network. Wrappers (DDP, ``torch.compile``) are looked through.
        loss: ``loss(output, target)``, a scalar, the MEAN over the examples of a batch.
        data: batches ``(inputs, target)``, re-iterable (a list or a loader, not a generator).
    """

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    data: Iterable[Batch]

    def params(self) -> Named:
        """The network's own parameters (not copies) by plain name."""
        return dict(parameters(self.model))

    def batches(self) -> Iterator[tuple[Any, Any, int]]:
        """Inputs and target on the network's device, and the number of examples.

        Raises:
            DataError: when there is no batch, or when the data is an iterator that can be read only once.
        """
        if iter(self.data) is self.data:
            raise DataError(
                "the data is an iterator that can be read only once; a method reads it several times. "
                "Pass a list of batches or a DataLoader instead (`list(batches)`)."
            )
        where = device_of(self.model)
        empty = True
        for batch in self.data:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise DataError(
                    f"a batch must be a pair (inputs, target), this one is {type(batch).__name__}"
                    f"{f' of length {len(batch)}' if isinstance(batch, tuple | list) else ''}. "
                    "Wrap the data so that it yields (inputs, target)."
                )
            inputs, target = to(batch[0], where), to(batch[1], where)
            count = examples(inputs)
            if count:
                empty = False
                yield inputs, target, count
        if empty:
            raise DataError("the data holds no example; pass at least one non-empty batch of (inputs, target).")

    def loss_at(self, batch: Batch, at: Named | None = None, statistics: Statistics = "running") -> Tensor:
        """Mean loss of one batch, with the parameters replaced by ``at`` where it names them."""
        inputs, target = batch
        with frozen(self.model, statistics) as buffers:
            return self.loss(call(self.model, inputs, {**buffers, **(at or {})}), target)

    @torch.no_grad()
    def mean_loss(self, at: Named | None = None) -> float:
        """Mean loss over all examples, in evaluation mode. Cost: one forward pass over the data."""
        total, count = 0.0, 0
        for inputs, target, n in self.batches():
            total += self.loss_at((inputs, target), at).item() * n
            count += n
        return total / count

    @torch.enable_grad()
    def gradients(self, at: Named | None = None, statistics: Statistics = "running") -> Named:
        """Gradient of the mean loss over all of the data; every example weighs the same.

        The network, its buffers, its ``.grad`` and its modes are left as they were.

        Args:
            at: values at which to differentiate instead of the network's own.
            statistics: what normalisation layers use: their ``"running"`` statistics, ``"fresh"`` ones of
                each batch, or ``"auto"``: fresh for layers that have never been trained.

        Returns:
            A gradient for every parameter (zeros where the loss does not depend on it).

        Cost: one forward and backward pass over the data; memory of one gradient.
        """
        own = self.params()
        points = {name: (at or {}).get(name, p).detach().requires_grad_() for name, p in own.items()}
        # fresh memory, since autograd may return one tensor for two parameters; half types add up in float32
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in points.values()]
        total = 0
        with frozen(self.model), recurrent(self.model):  # once, not for every batch
            for inputs, target, n in self.batches():
                value = self.loss_at((inputs, target), points, statistics)
                check_loss(value)
                slopes = torch.autograd.grad(value, list(points.values()), allow_unused=True, materialize_grads=True)
                torch._foreach_add_(sums, list(slopes), alpha=n)
                total += n
        torch._foreach_div_(sums, float(total))
        return {name: g.to(p.dtype) for (name, p), g in zip(points.items(), sums, strict=True)}

    @torch.enable_grad()
    def taylor(self, direction: Named) -> tuple[float, float]:
        """First and second order change of the mean loss along ``direction``: ``(g·d, d·Hd / 2)``.

        Their sum is the forecast of ``loss(w + d) - loss(w)``. Cost: two backward passes over the data.

        Raises:
            ModelError: when an operator of the network cannot be differentiated twice.
        """
        points = {name: p.detach().requires_grad_() for name, p in self.params().items() if name in direction}
        along = [direction[name] for name in points]
        first = second = 0.0
        total = 0
        for inputs, target, n in self.batches():
            with sdpa_kernel(SDPBackend.MATH), recurrent(self.model):  # fused attention has no second derivative
                value = self.loss_at((inputs, target), points)
            slopes = torch.autograd.grad(value, list(points.values()), create_graph=True, materialize_grads=True)
            slope = torch.stack([(g * d).sum() for g, d in zip(slopes, along, strict=True)]).sum()
            first += slope.item() * n
            total += n
            if not slope.requires_grad:
                continue
            check_twice(slope)
            try:
                curved = torch.autograd.grad(slope, list(points.values()), materialize_grads=True)
            except RuntimeError as error:
                raise ModelError(f"the loss cannot be differentiated twice: {error}") from error
            second += torch.stack([(c * d).sum() for c, d in zip(curved, along, strict=True)]).sum().item() * n
        return first / total, second / total / 2

    @torch.no_grad()
    def collect(self, modules: Mapping[str, nn.Module], fold: Callable[[str, Any, Any, Any], Any]) -> dict[str, Any]:
        """One pass over the data with forward hooks.

        Args:
            modules: the modules to listen to, by any name.
            fold: ``fold(name, value so far or None, inputs, output)`` returns the new value.

        Returns:
            What ``fold`` returned last, by name. Cost: one forward pass.
        """
        values: dict[str, Any] = {}

        def listen(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, inputs: Any, output: Any) -> None:
                values[name] = fold(name, values.get(name), inputs, output)

            return hook

        handles = [module.register_forward_hook(listen(name)) for name, module in modules.items()]
        try:
            with frozen(self.model, "running"):
                for inputs, _, _ in self.batches():
                    call(self.model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        return values

    def outputs(self) -> Iterator[tuple[Tensor, Any, int]]:
        """Outputs (logits) in evaluation mode, batch by batch, with target and number of examples."""
        for inputs, target, n in self.batches():
            with torch.no_grad(), frozen(self.model, "running"):
                output = call(self.model, inputs)
            yield output, target, n

    def check_deterministic(self) -> None:
        """Two passes over the data must agree to the bit.

        Raises:
            DataError: when they do not; the message gives both losses.
        """
        one, two = self.mean_loss(), self.mean_loss()
        if one != two:
            raise DataError(
                f"two passes over the same data gave losses {one:.9g} and {two:.9g}. Switch off shuffling and "
                "augmentation, or fix the random module that stays active in eval mode."
            )


def check_twice(slope: Tensor) -> None:
    """Refuse a gradient that passed through a function which can be differentiated only once.

    Torch leaves such a function's node out of the way to the weights, so its part would silently count as zero.
    """
    seen: set[Any] = set()
    waiting = [slope.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name().rpartition("::")[2] == "Error":
            raise ModelError("the loss cannot be differentiated twice: a function in it is marked once_differentiable.")
        seen.add(node)
        waiting += [after for after, _ in node.next_functions]


def call(model: nn.Module, inputs: Any, at: Named | None = None) -> Any:
    """The network's output for one batch of inputs; Hugging Face outputs give their ``logits``."""
    model = unwrap(model)
    args, kwargs = split_inputs(inputs)
    output = _replaced(model, _original(model, at), args, kwargs) if at else model(*args, **kwargs)
    return getattr(output, "logits", output)


def _replaced(model: nn.Module, at: Named, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``functional_call``, which a module under two names would leave with plain tensors for parameters."""
    every = [id(module) for _, module in model.named_modules(remove_duplicate=False)]
    if len(every) == len(set(every)):
        return functional_call(model, at, args, kwargs)
    return functional_call(model, _once(model, at), args, kwargs, tie_weights=False)


def _once(model: nn.Module, at: Named) -> Named:
    """The new values under one name for every place that holds the tensor."""
    own = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    modules = dict(model.named_modules(remove_duplicate=False))
    places: dict[int, dict[tuple[int, str], str]] = {}
    for name, tensor in own.items():
        path, _, key = name.rpartition(".")
        places.setdefault(id(tensor), {}).setdefault((id(modules[path]), key), name)
    return {place: value for name, value in at.items() for place in places[id(own[name])].values()}


def _original(model: nn.Module, at: Named) -> Named:
    """Plain names back to the names behind parametrizations."""
    if not any("parametrizations" in module._modules for module in model.modules()):  # looking up names costs time
        return at
    by_plain = dict(zip(parameters(model), (n for n, _ in model.named_parameters()), strict=True))
    return {by_plain.get(name, name): value for name, value in at.items()}


@contextlib.contextmanager
def frozen(model: nn.Module, statistics: Statistics = "running") -> Iterator[Named]:
    """Evaluation mode, undone at the end; yields copies of the buffers that fresh statistics would change."""
    model = unwrap(model)
    modes = {module: module.training for module in model.modules()}
    buffers: Named = {}
    try:
        if any(modes.values()):
            model.eval()
        if statistics != "running":
            for name, module in model.named_modules():
                if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
                    seen = module.num_batches_tracked
                    if statistics == "fresh" or seen is None or int(seen) == 0:
                        module.training = True
                        prefix = f"{name}." if name else ""
                        buffers |= {prefix + key: b.clone() for key, b in module.named_buffers(recurse=False)}
        yield buffers
    finally:
        for module, mode in modes.items():
            if module.training != mode:  # setting an attribute of a module is slow
                module.training = mode


@contextlib.contextmanager
def recurrent(model: nn.Module) -> Iterator[None]:
    """On CUDA, recurrent layers without cuDNN, which has no backward pass for them in evaluation mode."""
    model = unwrap(model)
    with contextlib.ExitStack() as stack:
        if device_of(model).type == "cuda" and any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def device_of(model: nn.Module) -> torch.device:
    """The device of the network's first parameter or buffer (the CPU for a network without any)."""
    for tensor in (*unwrap(model).parameters(), *unwrap(model).buffers()):
        return tensor.device
    return torch.device("cpu")


def to(thing: Any, where: torch.device) -> Any:
    """Tensors inside tuples, lists and mappings moved to a device; anything else unchanged."""
    if isinstance(thing, Tensor):
        return thing.to(where, non_blocking=True)
    if isinstance(thing, Mapping):
        return {key: to(value, where) for key, value in thing.items()}
    if isinstance(thing, tuple) and hasattr(thing, "_fields"):
        return type(thing)(*(to(value, where) for value in thing))
    if isinstance(thing, tuple | list):
        return type(thing)(to(value, where) for value in thing)
    return thing


def examples(inputs: Any) -> int:
    """Number of examples in a batch: the length of its first tensor."""
    while not isinstance(inputs, Tensor):
        if not isinstance(inputs, Mapping | tuple | list) or not inputs:
            raise DataError(f"the inputs of a batch are {type(inputs).__name__} without any tensor; pass tensors.")
        inputs = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs[0]
    return inputs.shape[0] if inputs.dim() else 1


def check_loss(value: Tensor) -> None:
    """Refuse a loss that is not one finite number.

    Raises:
        ModelError: for a loss of several values.
        DataError: for a loss that is not finite.
    """
    if value.dim():
        raise ModelError(f"the loss has shape {tuple(value.shape)}; it must be one number, the mean over the batch.")
    if not torch.isfinite(value):
        raise DataError(
            f"the loss is {value.item()}: the inputs, the targets or the weights hold NaN or infinity. "
            "Run `secateur doctor` on the file to see which."
        )
