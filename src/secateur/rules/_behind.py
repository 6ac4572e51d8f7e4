"""What rules share that train numbers behind the weights: where they stand, how they go, and the size of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from secateur.core.errors import ModelError
from secateur.core.masks import Masks
from secateur.core.names import owners, unwrap
from secateur.core.run import Run
from secateur.core.sockets import Rule, name_of
from secateur.core.streams import stream


class Behind(nn.Module):
    """Stands behind the weight of one layer as a parametrization while a rule works.

    In evaluation mode the network computes with :meth:`baked`, which is what is left when the rule ends.

    Args:
        rule: the rule, for its options.
        module: a dense or convolutional layer.
        random: for first values.
    """

    mask: Tensor
    """Which weights the run keeps, in the shape of the weight."""

    def __init__(self, rule: Any, module: Any, random: torch.Generator) -> None:
        super().__init__()
        self.rule, self.mask = rule, torch.ones_like(module.weight, dtype=torch.bool)
        self.like = torch.empty(0, device=module.weight.device, dtype=fine(module.weight.dtype))
        self.parts = int(getattr(module, "groups", 1))
        self.order = list(module._parameters)
        self.handle: Any = None
        self.names: tuple[int | str, ...] = ()
        self.step = self.calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the network computes with."""
        return weight if self.training else self.baked(weight)

    def kept(self, weight: Tensor) -> Tensor:
        """Which weights are left when the rule ends."""
        raise NotImplementedError

    def baked(self, weight: Tensor) -> Tensor:
        """The weight that is left when the rule ends, with exact zeros."""
        return weight.masked_fill(~self.kept(weight), 0.0)

    def renew(self) -> None:
        """Called before every optimizer step, for random numbers that last a step."""

    def stream(self, *more: int | str) -> torch.Generator:
        """A generator for the next random numbers of this layer: a function of the step, never of the past."""
        self.calls += 1
        return stream(*self.names, self.step, self.calls, *more, device=self.like.device)  # type: ignore[arg-type]

    def spread(self, inputs: Tensor) -> Tensor:
        """One number for each input channel, in a shape that multiplies the weight (groups of channels too)."""
        out, each, *rest = self.mask.shape
        wide = inputs.view(self.parts, 1, each).expand(self.parts, out // self.parts, each)
        return wide.reshape(out, each, *[1] * len(rest))


def fine(dtype: torch.dtype) -> torch.dtype:
    """The type of trained numbers: at least float32, in which small steps are not lost."""
    return torch.promote_types(dtype, torch.float32)


def rank() -> Sequence[int]:
    """Names of streams that must differ between processes, which see different examples."""
    return [dist.get_rank()] if dist.is_available() and dist.is_initialized() else []


def attach(run: Run, rule: Rule, kind: type[Behind], called: bool = False) -> None:
    """Put one of ``kind`` behind the weight of every dense and convolutional layer that the masks cover.

    Transposed convolutions, weights that several modules share, frozen ones and those with a parametrization already
    are left alone.

    Args:
        run: the run.
        rule: whose options they take.
        kind: what stands behind the weights.
        called: leave layers alone, too, whose weight is read without a call (in ``nn.MultiheadAttention``).

    Raises:
        ModelError: when there is no such layer.
    """
    who, number = name_of(rule), 0
    for name, holders in owners(run.model).items():
        module = holders[0]
        if name not in run.masks or len(holders) > 1 or name.rpartition(".")[2] != "weight":
            continue
        known = isinstance(module, nn.Linear | _ConvNd) and not isinstance(module, _ConvTransposeNd)
        if (
            known
            and module.weight.requires_grad
            and not (called and isinstance(module, NonDynamicallyQuantizableLinear))
        ):
            behind = kind(rule, module, stream(run.seed, who, "start", number))
            behind.names = (run.seed, who, number)
            parametrize.register_parametrization(module, "weight", behind)
            number += 1
    if not number:
        raise ModelError(
            f"{who}: {type(run.model).__name__} has no dense or convolutional layer whose weight the masks cover, "
            "that is trained and not shared with another. Name more weights with `only`, or use another rule."
        )
    renew(run, kind)


def standing(run: Run, kind: type[Any]) -> dict[str, tuple[Any, Any]]:
    """Layers and what stands behind their weight, by the weight's name."""
    found = {}
    for name, module in unwrap(run.model).named_modules():
        if parametrize.is_parametrized(module, "weight"):
            behind = module.parametrizations["weight"][0]  # type: ignore[index]
            if isinstance(behind, kind):
                found[f"{name}.weight".lstrip(".")] = (module, behind)
    return found


def enlist(run: Run, kind: type[Behind]) -> None:
    """Let the optimizer train what stands behind the weights, without weight decay."""
    mine = [p for _, behind in standing(run, kind).values() for p in behind.parameters()]
    run.optimizer.add_param_group({"params": mine, "weight_decay": 0.0})


@torch.no_grad()
def renew(run: Run, kind: type[Behind]) -> None:
    """Make everything ready for the next step; once an epoch, note the share of weights that would be left."""
    every = standing(run, kind)
    for name, (_, behind) in every.items():
        behind.step, behind.calls, behind.mask = run.step, 0, run.masks[name]
        behind.renew()
    if run.step and run.step % run.steps_per_epoch == 0:
        left = sum(int((b.kept(weight(m)) & b.mask).sum()) for m, b in every.values())
        who = next(iter(every.values()))[1].names[1]
        run.note(f"{who}/kept", left / sum(b.mask.numel() for _, b in every.values()))


def weight(module: Any) -> Tensor:
    """The trained weight of a layer, not the one it computes with."""
    return module.parametrizations.weight.original


def bias(module: Any) -> list[Tensor]:
    """The trained bias of a layer, if it has one."""
    behind = parametrize.is_parametrized(module, "bias")
    found = module.parametrizations.bias.original if behind else module.bias
    return [] if found is None or not found.requires_grad else [found]


@torch.no_grad()
def bake(run: Run, kind: type[Behind]) -> None:
    """Lay everything aside: plain weights that compute what evaluation mode does, and masks that are their zeros."""
    every, masks = standing(run, kind), dict(run.masks)
    mine = {id(p): p for _, behind in every.values() for p in behind.parameters()}
    for name, (module, behind) in every.items():
        behind.eval()
        masks[name] = behind.kept(weight(module)) & behind.mask
        leaves = list(module.parametrizations)
        values = {leaf: getattr(module, leaf).clone() for leaf in leaves}
        for leaf in leaves:
            parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
            module._parameters[leaf].copy_(values[leaf])
        for leaf in behind.order:  # the network is as it was, the order of its parameters included
            module._parameters[leaf] = module._parameters.pop(leaf)
        if behind.handle is not None:
            behind.handle.remove()
    groups = run.optimizer.param_groups
    groups[:] = [group for group in groups if not any(id(p) in mine for p in group["params"])]
    for p in mine.values():
        run.optimizer.state.pop(p, None)
    run.masks = Masks(masks)


def add_gradient(penalty: Tensor, tensors: Sequence[Tensor]) -> None:
    """Add the gradient of a penalty to those of the loss; hooks of a distributed network do not hear of it."""
    for tensor, slope in zip(tensors, torch.autograd.grad(penalty, tensors, allow_unused=True), strict=True):
        if slope is not None:
            tensor.grad = slope if tensor.grad is None else tensor.grad.add_(slope)


def hear(run: Run, rule: Rule, target: Any) -> None:
    """Count the terms of the mean loss: examples, or all words, pixels, ... where every one has a class."""
    state = run.state(rule)
    classes = isinstance(target, Tensor) and not target.is_floating_point()
    state["heard"] = state.get("heard", 0) + (target.numel() if classes else len(target))


def data_size(run: Run, rule: Rule, given: int) -> int:
    """Terms of the loss in an epoch, to be asked for once a step: the number given, or counted.

    In the first epoch, before all have been seen, it is taken for as many full batches as the epoch has steps.
    """
    state = run.state(rule)
    now = state.pop("heard", 0) * (dist.get_world_size() if rank() else 1)
    if given:
        return given
    if run.step < run.steps_per_epoch:
        state["seen"], state["most"] = state.get("seen", 0) + now, max(state.get("most", 0), now)
    return state["seen"] if run.step >= run.steps_per_epoch - 1 else state["most"] * run.steps_per_epoch
