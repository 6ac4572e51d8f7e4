"""Dead units: hidden channels that are zero on all of the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.names import Named, aliases, parameters, plain, unwrap
from secateur.core.reading import Paper, Reading
from secateur.core.sockets import Probe
from secateur.core.task import Task
from secateur.probes._other import Other, tensors_like
from secateur.probes._rectifiers import listen

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


@dataclass(frozen=True)
class DeadUnits(Probe):
    """Per cent of hidden units that are dead: zero after their activation function for every example of the data.

    With ``start``, the network when its training began, each dead unit is one of two: ``static`` ones were dead then
    already (with the pruned weights zero: often nothing comes into them), ``dynamic`` ones died in training. The value
    is the sum of both. Units that came back are ``revived``.

    A unit is a channel of the output of a rectifier: ReLU, ReLU6 (and any hardtanh), threshold, leaky ReLU, PReLU,
    ELU (SELU, CELU), GELU, SiLU, Mish or Hardswish, as a module or as a function. It is dead when
    ``|output| <= eps`` for all examples and at all positions. A channel is dimension 1 after a convolution and the
    last dimension after a linear layer, whichever ran last. Not seen: clamps, and activations that are not 0 at 0
    or have no flat side (sigmoid, softplus, tanh). A unit that is dead here may live on other data.

    Beside that, from the weights alone: output channels of linear and convolution layers with no incoming weight
    (all pruned or zero), which give their bias whatever the input. Without any rectifier these are the value, as
    the note says.

    Parts: ``dead:PLACE`` and ``units:PLACE`` of each activation, named by its module or by the module that calls
    it (``block.relu#2``: the second use in a pass), and ``disconnected:NAME`` of each layer's weight that has such
    channels. ``n`` is the number of examples.

    With ``start`` also ``static``, ``dynamic`` and ``revived`` in per cent of all units, and ``static:PLACE``,
    ``dynamic:PLACE`` and ``revived:PLACE`` in units.

    Args:
        eps: largest magnitude that counts as zero; 0 suits ReLU; smooth functions are hardly ever exactly 0.
        start: the network when training began: a module, a ``.safetensors`` file, or a step's folder; ``masks`` are
            applied to it. None tells nothing of when units died.

    Raises:
        UsageError: when ``eps`` is negative or not finite.
        MaskError: when ``masks`` belong to another network.
        FileError: when ``start`` cannot be read.
        ModelError: when ``start`` is of another architecture.
        DataError: when the data is empty or spent.

    Cost: one forward pass over the data; two with ``start``.
    """

    eps: float = 0.0
    start: Other = None

    paper = Paper(
        "Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep Architectures",
        "Hu, Peng, Tai, Tang",
        2016,
        "arXiv:1607.03250",
        differs="counts units whose average percentage of zeros is 100 %, where the paper ranks by that percentage",
    )

    def __post_init__(self) -> None:
        if isinstance(self.eps, bool) or not (isinstance(self.eps, int | float) and 0 <= self.eps < math.inf):
            raise UsageError(f"eps={self.eps!r} must be a finite number of at least 0; write `eps = 0.0`.")

    def __call__(self, task: Task, masks: Masks | None = None) -> Reading:
        """Per cent of hidden units that are dead."""
        if masks is not None:
            masks.match(task.model)
        alive, examples = listen(task, self.eps)
        idle, rows = _disconnected(task, masks)
        parts: dict[str, float] = {}
        for place, lives in alive.items():
            parts |= {f"dead:{place}": float((~lives).sum()), f"units:{place}": float(lives.numel())}
        parts |= {f"disconnected:{name}": float(count) for name, count in idle.items() if count}
        if self.start is not None:
            parts |= _since(listen(task, self.eps, _started(self.start, task, masks))[0], alive)
        units, dead = sum(x.numel() for x in alive.values()), sum(int((~x).sum()) for x in alive.values())
        if units:
            return Reading(100 * dead / units, "%", n=examples, parts=parts, note=f"{dead:,} of {units:,} units")
        note = f"no rectifier was seen; output channels without any incoming weight: {sum(idle.values()):,} of {rows:,}"
        return Reading(100 * sum(idle.values()) / max(1, rows), "%", n=examples, parts=parts, note=note)


def _started(start: str | Path | nn.Module, task: Task, masks: Masks | None) -> Named:
    """The tensors that training began with, under the masks."""
    tensors = tensors_like(start, task.model)
    for name in tensors:
        if masks is not None and plain(name) in masks:
            tensors[name] = tensors[name].where(masks[plain(name)].to(tensors[name].device), 0)
    return tensors


def _since(before: dict[str, Tensor], now: dict[str, Tensor]) -> dict[str, float]:
    """Units by place that were dead and are, that have died, and that have come back; and in per cent of all."""
    parts: dict[str, float] = {}
    units = sum(alive.numel() for alive in now.values())
    for kind, lived, lives in (("static", False, False), ("dynamic", True, False), ("revived", False, True)):
        found = {
            place: int(((before[place] == lived) & (alive == lives)).sum())
            for place, alive in now.items()
            if place in before
        }
        parts[kind] = 100 * sum(found.values()) / max(1, units)
        parts |= {f"{kind}:{place}": float(count) for place, count in found.items()}
    return parts


def _disconnected(task: Task, masks: Masks | None) -> tuple[dict[str, int], int]:
    """Output channels without incoming weight in each linear or convolution layer, and channels in all."""
    model = unwrap(task.model)
    first = {alias: name for name, every in aliases(model).items() for alias in every}
    tensors, idle, rows = parameters(model), {}, 0
    for path, module in model.named_modules():
        name = first.get(f"{path}.weight".lstrip("."))
        if not isinstance(module, _LAYERS) or name is None or name in idle:
            continue
        there = tensors[name].detach() != 0
        if masks is not None and name in masks:
            there = there & masks[name].to(there.device)
        if isinstance(module, _TRANSPOSED):  # (in, out / groups, ...): channels of a group share its inputs
            there = there.unflatten(0, (module.groups, -1)).movedim(2, 1).flatten(0, 1)
        idle[name] = int((~there.flatten(1).any(1)).sum())
        rows += len(there)
    return idle, rows
