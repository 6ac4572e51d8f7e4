"""Network slimming: a channel matters by the scale that BatchNorm gives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.core.errors import ModelError
from secateur.core.masks import Masks
from secateur.core.names import Named, owners, unwrap
from secateur.core.prunable import check_finite
from secateur.core.reading import Paper
from secateur.core.select import spread
from secateur.core.sockets import Criterion
from secateur.core.task import Task

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class BnScale(Criterion):
    """``|γ|`` of the BatchNorm that a layer's output goes into, for each output unit.

    Train with an L1 penalty on the scales first; without it few are near zero and the ranking says little. Scores
    have the shape of each weight, float32 or wider, at least 0. Every weight carries the score of its unit (in a unit
    pruned in part the kept weights share it evenly and pruned ones score 0), so ``Unit`` with ``global`` is the
    paper's one threshold over all layers; for single weights the score says nothing more.

    A tensor without a BatchNorm behind it (a head, attention, a recurrent layer) scores the norm of each unit: like
    ``|γ|`` the standard deviation of the unit's output, if its inputs had variance 1 and were uncorrelated. The
    layer in front of a norm is found by tracing the network symbolically; where its control flow forbids that, it is
    the last one of fitting width registered before the norm.

    Args:
        strict: refuse tensors without a BatchNorm.

    Raises:
        ModelError: when a weight or a scale is NaN or infinite, or ``strict`` and a tensor has no BatchNorm.
        MaskError: when ``masks`` belong to another network.

    Cost: one pass over the weights and one symbolic trace; no data, no gradient.
    """

    strict: bool = False

    paper = Paper(
        "Learning Efficient Convolutional Networks through Network Slimming",
        "Liu, Li, Shen, Huang, Yan, Zhang",
        2017,
        "arXiv:1708.06519",
        differs="scores only; the penalty on the scales belongs to training. Layers without BatchNorm, which the "
        "paper does not prune, are scored by the norm of their units",
    )
    needs = frozenset({"data-free"})

    def __call__(self, task: Task, masks: Masks) -> Named:
        """Scores for every tensor of ``masks``; higher = keep."""
        weights = masks.match(task.model)
        check_finite(dict(weights))
        holders, norms = owners(task.model), _norms(unwrap(task.model))
        scores = {}
        for name, w in weights.items():
            kept = masks[name].to(w.device)
            wide = w.detach().to(torch.promote_types(w.dtype, torch.float32)) * kept
            found = [norms[module] for module in holders[name] if module in norms]
            if self.strict and not found:
                raise ModelError(
                    f"no BatchNorm follows `{name}`, so its channels have no scale. Leave it out with "
                    f"`--skip '{name}'`, or rank it by another criterion."
                )
            scales = [torch.ones(len(w)) if norm.weight is None else norm.weight.detach() for norm in found]
            check_finite({f"the BatchNorm behind {name}": scale for scale in scales})
            units = wide.reshape(len(w), -1).norm(dim=1)
            if found:
                units = torch.stack([scale.to(units).abs() for scale in scales]).amax(0)
            scores[name] = spread(units, kept)
        return scores


class _Tracer(fx.Tracer):
    """Layers are leaves whoever wrote them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*_LAYERS, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)


def _norms(model: nn.Module) -> dict[nn.Module, _BatchNorm]:
    """The BatchNorm that the output of each layer goes into."""
    modules = dict(model.named_modules())
    try:
        nodes = list(_Tracer().trace(model).nodes)
    except Exception:  # whatever a network does to a stand-in for its input, it can still be read by its modules
        return _by_order(list(modules.values()))
    pairs: dict[nn.Module, _BatchNorm] = {}
    for node in nodes:
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        before = next(iter(node.all_input_nodes), None)
        if isinstance(norm, _BatchNorm) and before is not None and before.op == "call_module":
            layer = modules[str(before.target)]
            if isinstance(layer, _LAYERS) and len(layer.weight) == norm.num_features:
                pairs[layer] = norm
    return pairs


def _by_order(modules: list[nn.Module]) -> dict[nn.Module, _BatchNorm]:
    pairs: dict[nn.Module, _BatchNorm] = {}
    waiting: list[Any] = []
    for module in modules:
        if isinstance(module, _LAYERS):
            waiting.append(module)
        elif isinstance(module, _BatchNorm):
            fits = [layer for layer in waiting if len(layer.weight) == module.num_features]
            if fits:
                pairs[fits[-1]] = module
                waiting.remove(fits[-1])
    return pairs
