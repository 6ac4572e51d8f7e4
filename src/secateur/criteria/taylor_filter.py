"""Taylor expansion of filters: the change of each example's loss when a whole feature map goes, to first order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import DataError
from secateur.core.masks import Masks
from secateur.core.names import Named, owners
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.select import spread
from secateur.core.sockets import Criterion
from secateur.core.task import Task, check_loss
from secateur.linalg.products import per_example_gradients

_Slopes = dict[str, tuple[Tensor, Tensor]]
"""By tensor: slopes of the loss of each example along a gate on each unit, and which weights matter."""


@dataclass(frozen=True)
class TaylorFilter(Criterion):
    """``mean over examples of |Σ z · dC/dz|``, z the feature map of an output unit, C the example's own loss.

    The map is what the layer gives, bias included, before BatchNorm and activation; with ReLU alone between them the
    score of the map after it is the same. The sum runs over positions before the absolute value is taken, and that
    before the mean over examples. It is the slope of the loss along a gate on the unit, as one hears it in layers
    called as Linear or convolution modules that see examples along their first dimension; for other tensors
    (recurrent layers, attention) the gate stands on the weights and the bias of the unit, which is the same number.

    Every weight carries the score of its unit, float32 or wider, so ``Unit`` ranks units as the method does; for
    single weights the score says nothing more. Weights that ``masks`` prune, or whose input is zero everywhere (that
    of a dead unit), score 0, and the others of the unit share their part evenly. Evaluation mode.

    Args:
        normalize: divide the scores of each tensor by the root of the sum of their units' squares, as the paper does
            to compare layers.

    Raises:
        ModelError: when a weight is NaN or infinite.
        DataError: when the data is empty or spent, or a loss or a slope is not finite.
        MaskError: when ``masks`` belong to another network.

    Cost: one forward and backward pass over the data; tensors not heard take a gradient of every example.
    """

    normalize: bool = True

    paper = Paper(
        "Pruning Convolutional Neural Networks for Resource Efficient Inference",
        "Molchanov, Tyree, Karras, Aila, Kautz",
        2017,
        "arXiv:1611.06440",
        differs="the sum over a map is not divided by its positions (no difference once normalised); measured over the "
        "data given, not over the updates since the last removal; no term for FLOPs, which is the allocation by cost",
    )
    needs = frozenset({"gradients", "activations"})

    def __call__(self, task: Task, masks: Masks) -> Named:
        """Scores for every tensor of ``masks``; higher = keep."""
        check_finite(dict(masks.match(task.model)))
        units: Named = {}
        live: Named = {}
        total = 0
        for inputs, target, n in task.batches():
            one = Task(task.model, task.loss, [(inputs, target)])
            found = _by_layer(one, masks, n)
            rest = [name for name in masks if name not in found]
            for name, (slopes, reached) in (found | (_by_example(one, masks, rest) if rest else {})).items():
                units[name] = units[name] + slopes.abs().sum(0) if name in units else slopes.abs().sum(0)
                live[name] = live[name] | reached if name in live else reached
            total += n
        scores = {}
        for name, unit in units.items():
            if not bool(unit.isfinite().all()):
                raise DataError(f"slopes of the loss at `{name}` are NaN or infinite; check data and network.")
            norm = unit.norm() if self.normalize else unit.new_tensor(total)
            scores[name] = spread(unit / torch.where(norm > 0, norm, 1), live[name] & masks[name].to(unit.device))
        return scores


class _Gates:
    """Gates on the outputs of the layers that hold a tensor, one for each example and unit, all at 1."""

    def __init__(self, weight: Tensor, n: int) -> None:
        self.weight, self.n = weight, n
        self.gate: Tensor | None = None
        self.live = torch.zeros_like(weight, dtype=torch.bool)
        self.heard = True

    def hook(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        """The output behind the gates; inputs that are not always zero make their weights live."""
        units, dim = len(self.weight), output.dim() - 1 if isinstance(module, nn.Linear) else 1
        self.heard &= len(inputs) == 1 and output.dim() > 1 and len(output) == self.n and output.shape[dim] == units
        if not self.heard:
            return output
        if self.gate is None:
            self.gate = torch.ones(self.n, units, dtype=output.dtype, device=output.device, requires_grad=True)
        seen = inputs[0].detach().movedim(dim, -1).flatten(0, -2).ne(0).any(0)
        seen = seen.reshape(-1, self.weight.shape[1]).repeat_interleave(units * self.weight.shape[1] // len(seen), 0)
        self.live |= seen.reshape(*self.weight.shape[:2], *[1] * (self.weight.dim() - 2))
        return output * self.gate.reshape(self.n, *[units if i == dim else 1 for i in range(1, output.dim())])


@torch.enable_grad()
def _by_layer(task: Task, masks: Masks, n: int) -> _Slopes:
    """The slopes of tensors whose layers can all be heard; the loss of a batch is the mean of its examples' own."""
    weights, gates, handles = masks.match(task.model), dict[str, _Gates](), []
    for name, modules in owners(task.model).items():
        if name in weights and all(isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) for m in modules):
            gates[name] = _Gates(weights[name].detach(), n)
            handles += [m.register_forward_hook(gates[name].hook) for m in modules]
    try:
        own = {name: p.detach() for name, p in task.params().items()}  # kernels round otherwise for frozen ones
        value = task.loss_at(next(iter(task.data)), own)
    finally:
        for handle in handles:
            handle.remove()
    check_loss(value)
    heard = {name: (g.gate, g.live) for name, g in gates.items() if g.heard and g.gate is not None}
    if not (heard and value.requires_grad):
        return {}
    wanted = [gate for gate, _ in heard.values()]
    slopes = torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)
    return {name: (_wide(slope) * n, live) for (name, (_, live)), slope in zip(heard.items(), slopes, strict=True)}


def _by_example(task: Task, masks: Masks, names: list[str]) -> _Slopes:
    """The same from gradients of single examples: a gate on a unit is one on its weights and its bias."""
    own = task.params()
    biases = {name: _bias(name) for name in names if _bias(name) != name and _bias(name) in own}
    wanted = [*names, *biases.values()]
    sizes = [own[name].numel() for name in wanted]
    whole = Masks({name: torch.ones_like(own[name], dtype=torch.bool) for name in wanted})
    flows: dict[str, list[Tensor]] = {name: [] for name in wanted}
    live = {name: torch.zeros_like(own[name], dtype=torch.bool) for name in wanted}
    for rows in per_example_gradients(task, whole):
        for name, slope in zip(wanted, rows.split(sizes, 1), strict=True):
            slope = slope.detach().reshape(len(rows), *own[name].shape)
            flows[name].append((slope * own[name].detach()).reshape(len(rows), len(own[name]), -1).sum(2))
            live[name] |= slope.ne(0).any(0)
    whole_flows = {name: torch.cat(parts) for name, parts in flows.items()}
    return {
        name: (whole_flows[name] + whole_flows[biases[name]] if name in biases else whole_flows[name], live[name])
        for name in names
    }


def _bias(name: str) -> str:
    """The name of the bias of the same units: ``cell.bias_ih_l0`` for ``cell.weight_ih_l0``."""
    head, dot, leaf = name.rpartition(".")
    return f"{head}{dot}{leaf.replace('weight', 'bias')}"


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
