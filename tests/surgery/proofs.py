"""What the tests of surgery compare with: definitions that use parameters and plain torch alone."""

import copy
import math
import warnings

import torch
from torch import nn
from torch.utils import _pytree as pytree

COLUMNS = {"wo": {0, 1}, "wq": {0}, "wk": {0}, "wv": {0}, "att_src": {3}, "att_dst": {3}, "text_projection": {0}}
"""Dimensions of free parameters of the zoo over which a sum is taken."""


def consumed(module: nn.Module, key: str) -> set[int]:
    """Dimensions of a parameter over which its module takes a sum; written down by hand for every kind of layer."""
    kind = type(module).__name__
    if key in COLUMNS:
        return COLUMNS[key]
    if isinstance(module, nn.RNNBase) or key == "in_proj_weight":
        return {1} if key.startswith("weight") or key == "in_proj_weight" else set()
    if key != "weight":
        return set()
    if kind.startswith("ConvTranspose") or kind == "Conv1D":  # transformers' Conv1D keeps (in, out)
        return {0}
    return {1} if isinstance(module, nn.Linear) or kind.startswith("Conv") else set()


def draw(random, analysis, kind: str, share: float = 0.3) -> dict[str, list[int]]:
    """A share of the units of the exact groups, of all groups, or of one; at least one of each stays."""
    groups = [g for g in analysis.groups if len(g) > 1 and (kind != "exact" or not g.inexact)]
    if kind == "one":
        groups = random.sample(groups, min(1, len(groups)))
    return {g.name: sorted(random.sample(range(len(g)), max(1, int(share * len(g))))) for g in groups}


@torch.no_grad()
def zeroed_by_hand(model: nn.Module, analysis, remove) -> nn.Module:
    """A copy with zeros in the columns that read the removed units.

    Where products of activations read them (queries and keys), also in the rows that make them.
    """
    made = copy.deepcopy(model)
    modules = dict(made.named_modules(remove_duplicate=False))
    for name, units in remove.items():
        group = analysis.group(name)
        places = [(*n.rpartition(".")[::2], d, i) for (n, d), i in zip(group.tensors, group.index, strict=True)]
        read = [place for place in places if place[2] in consumed(modules[place[0]], place[1])]
        fused = analysis.granularity == "dims" and any("att" in place[0].lower() for place in places)
        for path, key, d, index in places if fused else read or places:
            tensor = getattr(modules[path], key)
            if isinstance(tensor, nn.Parameter):
                tensor.index_fill_(d, index[units].reshape(-1), 0.0)
    return made


def copied(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, without torch's own warning about copies of its graphs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return copy.deepcopy(model).eval()


@torch.no_grad()
def outputs(model: nn.Module, example, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """The tensors that a copy of a network gives in evaluation mode, in another type if one is named."""
    args, kwargs = ((), example) if isinstance(example, dict) else (tuple(example), {})
    model = copied(model)
    if dtype is not None:
        model = model.to(dtype)
        args, kwargs = pytree.tree_map(
            lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, (args, kwargs)
        )
    return [x for x in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(x, torch.Tensor)]


def wider(example):
    """The example with a third row, so that a size that follows the batch is told from one that does not."""
    return pytree.tree_map(lambda x: torch.cat([x, x[:1].flip(-1)]) if isinstance(x, torch.Tensor) else x, example)


def apart(found, expected) -> float:
    """The largest difference, relative to the largest number of each output."""
    assert [x.shape for x in found] == [x.shape for x in expected]
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        size = float(other.abs().max()) or 1.0
        worst = max(worst, float((one.double() - other.double()).abs().max()) / size)
    assert math.isfinite(worst)
    return worst


def snapshot(model: nn.Module) -> list:
    """All that an edit could change: which tensors there are, their bits, and the attributes of every module."""
    found: list = []
    for path, module in model.named_modules(remove_duplicate=False):
        found.append((path, type(module), module.training))
        for table in (module._parameters, module._buffers, vars(module)):
            for key, value in table.items():
                if isinstance(value, torch.Tensor):
                    bits = value.detach().clone().contiguous().view(torch.uint8) if value.dim() else value.item()
                    grad = None if value.grad is None else value.grad.clone()
                    found.append((path, key, id(value), tuple(value.shape), value.requires_grad, bits, grad))
                elif isinstance(value, int | float | str | tuple | list | type(None)):
                    found.append((path, key, copy.copy(value)))
    return found


def unchanged(before: list, model: nn.Module) -> bool:
    """Whether a network is to the bit, and object by object, what it was."""
    after = snapshot(model)
    return len(before) == len(after) and all(
        len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
        for one, other in zip(before, after, strict=True)
    )


def _same(one, other) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and (one is other or one == other)


def reached(model: nn.Module, args, kwargs, training: bool) -> set[str]:
    """The names of parameters that a pass forward and backward gives a gradient; leaves the mode as it was."""
    mode = model.training
    if training != mode:
        model.train(training)
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]):
        leaves = pytree.tree_leaves(model(*args, **kwargs))
    results = [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]
    torch.stack([x.double().square().sum() for x in results]).sum().backward()
    if training != mode:
        model.train(mode)
    return {n for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
