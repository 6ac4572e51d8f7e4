"""The last linear layer fitted anew, in closed form, to what it gave in the dense network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.core.errors import DataError, ModelError, UsageError, nearest
from secateur.core.masks import Masks
from secateur.core.names import owners, unwrap
from secateur.core.task import Task, call, frozen
from secateur.linalg.memory import check

__all__ = ["DAMPING", "LastFit", "last_layer", "outputs_of", "refit_last_layer"]

DAMPING = 0.01
_WORK = 1 << 25  # bytes of the systems that are solved at once, or one row's


class LastFit(NamedTuple):
    """What a fit of the last layer gave.

    Args:
        layer: its name.
        before: mean squared distance of its outputs from those of the dense network, over their mean square.
        after: the same after the fit; never more.
    """

    layer: str
    before: float
    after: float


@torch.no_grad()
def last_layer(task: Task, name: str = "") -> str:
    """The name of the linear layer whose output is the network's.

    Args:
        task: network and data, of which the first batch is looked at.
        name: take this layer instead; any linear layer that is called.

    Raises:
        ModelError: when there is no such layer, its weight is shared with another layer or computed from others.
        UsageError: when ``name`` is no linear layer of the network.
    """
    net = unwrap(task.model)
    layers = {path: module for path, module in net.named_modules() if isinstance(module, nn.Linear)}
    if name and name not in layers:
        raise UsageError(f"the network has no linear layer {name!r}. {nearest(name, layers)}")
    found = name or _that_gives_the_output(task, layers)
    weight = layers[found].weight
    if not isinstance(weight, nn.Parameter):
        raise ModelError(
            f"the weight of `{found}` is computed from other tensors (a parametrization), so it cannot be set. Remove "
            "that first (`torch.nn.utils.parametrize.remove_parametrizations`)."
        )
    held = owners(net)
    for kind in ("weight", "bias"):
        holders = {id(module) for module in held.get(f"{found}.{kind}", ())}
        if getattr(layers[found], kind) is not None and holders != {id(layers[found])}:
            raise ModelError(
                f"the {kind} of `{found}` is shared with another layer, which a fit of the last layer would change. "
                'Use recover = "batchnorm" or "survivors".'
            )
    return found


def outputs_of(task: Task, layer: str) -> list[Tensor]:
    """The outputs of a layer, one entry for each of its calls, in the order of the data; in evaluation mode.

    Args:
        task: network and data.
        layer: its name.

    Raises:
        ModelError: when the layer is never called.
        UsageError: when the outputs do not fit into memory.

    Cost: one forward pass over the data; memory of the outputs.
    """
    batches = len(task.data) if isinstance(task.data, Sized) else 1

    def fold(_: str, sofar: list[Tensor] | None, __: Any, output: Tensor) -> list[Tensor]:
        if sofar is None:
            check(output.nbytes * batches, f"the outputs of `{layer}`", "use fewer examples", output.device)
        return [*(sofar or ()), output.detach().clone()]  # what comes after may write into it

    found = task.collect({layer: unwrap(task.model).get_submodule(layer)}, fold)
    if layer not in found:
        raise ModelError(f"layer `{layer}` is never called as a module; name a linear layer that is.")
    return found[layer]


@torch.no_grad()
def refit_last_layer(
    task: Task, targets: Sequence[Tensor], masks: Masks | None = None, layer: str = "", damping: float = DAMPING
) -> LastFit:
    """Fit weight and bias of the last linear layer, in place, so that it gives what it gave in the dense network.

    Ridge regression of ``targets`` on the layer's inputs as they are now, for each output on its kept weights alone:
    ``(A_KK + λI) δ_K = B_K`` with the mean outer product ``A`` of the inputs and ``B`` of inputs and what is missing.
    The ridge pulls towards the weights as they are, not to zero, and not the bias. Pruned weights stay exactly zero.
    An output whose error would not fall in the type of the weight stays as it is.

    Args:
        task: the pruned network and the examples that the targets belong to, in the same order.
        targets: what :func:`outputs_of` gave for the dense network.
        masks: True = kept; a layer they do not name is kept whole.
        layer: its name; by default the one whose output is the network's.
        damping: ``λ`` as a share of the mean square of an input, above 0.

    Raises:
        ModelError: when there is no such layer, or it is shared (:func:`last_layer`).
        DataError: when the targets do not belong to the data, or something is not finite. The layer is then as it was.
        UsageError: for a damping not above 0.

    Cost: one forward pass, and a third of the cube of the layer's width for each output.
    """
    if not 0 < damping < float("inf"):
        raise UsageError(f"damping must be above 0, not {damping:g}: without it the fit need not exist; 0.01 is usual.")
    name = last_layer(task, layer)
    module: Any = unwrap(task.model).get_submodule(name)
    sums = _summed(task, name, module, targets)
    if not all(bool(part.isfinite().all()) for part in sums):
        raise DataError(f"inputs or targets of `{name}` are not finite. Run `secateur doctor` on the network.")
    old = _joined(module, sums.gram)
    mask = torch.ones_like(old, dtype=torch.bool)
    if masks is not None and f"{name}.weight" in masks:
        mask[:, : module.in_features] = masks[f"{name}.weight"].to(old.device)
    if masks is not None and f"{name}.bias" in masks and module.bias is not None:
        mask[:, -1] = masks[f"{name}.bias"].to(old.device)
    new = _rounded(module, old + _solved(sums, mask, module.in_features, damping), mask)
    change = new - old
    gain = ((change @ sums.gram) * change).sum(1) - 2 * (change * sums.pull).sum(1)
    better = gain < 0
    module.weight.copy_(torch.where(better[:, None], new[:, : module.in_features].to(module.weight), module.weight))
    if module.bias is not None:
        module.bias.copy_(torch.where(better, new[:, -1].to(module.bias), module.bias))
    scale = float(sums.scale.sum()) or 1.0
    before = float(sums.error.sum())
    after = float((sums.error + torch.where(better, gain, 0.0)).clamp_(min=0.0).sum())
    return LastFit(name, before / scale, after / scale)


class _Sums(NamedTuple):
    """Means over positions; the inputs have a column of ones at the end where the layer has a bias."""

    gram: Tensor  # (in, in)
    pull: Tensor  # (out, in): what is missing, times the inputs
    error: Tensor  # (out,): its square
    scale: Tensor  # (out,): the square of the targets


def _that_gives_the_output(task: Task, layers: dict[str, nn.Linear]) -> str:
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def listen(_: nn.Module, __: Any, output: Tensor) -> None:
            seen.pop(name, None)  # so that the last one called stands last
            seen[name] = output.detach().clone()

        return listen

    handles = [module.register_forward_hook(hook(name)) for name, module in layers.items()]
    try:
        inputs, _, _ = next(task.batches())
        with frozen(task.model):
            output = call(task.model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    for name in reversed(seen):
        if isinstance(output, Tensor) and output.shape == seen[name].shape and torch.equal(output, seen[name]):
            return name
    if not seen:
        raise ModelError("the network calls no linear layer (`nn.Linear`), so there is no last one to fit.")
    raise ModelError(
        "the network's output is not that of a linear layer: something comes after the last one called, "
        f"`{next(reversed(seen))}`. To fit it all the same give its name (`last_layer` of the step)."
    )


def _summed(task: Task, name: str, module: nn.Linear, targets: Sequence[Tensor]) -> _Sums:
    waiting = iter(targets)
    positions = 0

    def fold(_: str, sofar: _Sums | None, inputs: Any, __: Any) -> _Sums:
        nonlocal positions
        if not inputs:
            raise ModelError(f"layer `{name}` gets its input by keyword; call it as `layer(x)`.")
        added = _added(name, module, inputs[0], waiting)
        positions += inputs[0].numel() // module.in_features
        return added if sofar is None else _Sums(*(a.add_(b) for a, b in zip(sofar, added, strict=True)))

    found = task.collect({name: module}, fold)
    if name not in found:
        raise ModelError(f"layer `{name}` is never called as a module; name a linear layer that is.")
    if next(waiting, None) is not None:
        raise DataError(f"there are more targets for `{name}` than calls: give the outputs on the same examples.")
    return _Sums(*(part.div_(positions) for part in found[name]))


def _added(name: str, module: nn.Linear, x: Tensor, waiting: Iterator[Tensor]) -> _Sums:
    y = next(waiting, None)
    if y is None or y.shape != (*x.shape[:-1], module.out_features):
        shape = None if y is None else tuple(y.shape)
        raise DataError(
            f"the targets of `{name}` have shape {shape} where {(*x.shape[:-1], module.out_features)} is needed: give "
            "the outputs on the same examples, in the same batches."
        )
    rows, y = _wide(x.detach().reshape(-1, module.in_features)), _wide(y.detach().reshape(-1, module.out_features))
    if module.bias is not None:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    missing = y.to(rows.device) - rows @ _joined(module, rows).T
    return _Sums(rows.T @ rows, missing.T @ rows, missing.square().sum(0), y.to(rows.device).square().sum(0))


def _solved(sums: _Sums, mask: Tensor, width: int, damping: float) -> Tensor:
    """The change of each output's kept weights, zero elsewhere."""
    diagonal = sums.gram.diagonal()[:width]
    ridge = torch.zeros_like(sums.gram[0])
    ridge[:width] = damping * float(diagonal.mean()) or 1.0
    change = torch.empty_like(sums.pull)
    size = max(1, _WORK // (sums.gram.numel() * sums.gram.element_size()))
    for start in range(0, len(mask), size):
        kept = mask[start : start + size].to(sums.gram.dtype)
        system = sums.gram * kept[:, :, None] * kept[:, None, :]
        system.diagonal(dim1=1, dim2=2).add_(ridge * kept + (1 - kept))
        right = (sums.pull[start : start + size] * kept)[..., None]
        lower, failed = torch.linalg.cholesky_ex(system)
        if bool(failed.any()):
            raise ModelError(f"a damping of {damping:g} is lost to rounding; raise it tenfold.")
        change[start : start + size] = torch.cholesky_solve(right, lower)[..., 0]
    return change


def _joined(module: nn.Linear, like: Tensor) -> Tensor:
    """Weight and bias as one matrix in the type of another."""
    parts = [module.weight, *([] if module.bias is None else [module.bias[:, None]])]
    return torch.cat([part.detach().to(like) for part in parts], 1)


def _rounded(module: nn.Linear, values: Tensor, mask: Tensor) -> Tensor:
    """As the layer will hold them; pruned weights +0.0."""
    return values.masked_fill(~mask, 0.0).to(module.weight.dtype).to(values.dtype)


def _wide(values: Tensor) -> Tensor:
    return values if values.device.type == "mps" else values.double()
