"""BatchNorm that an exporter folded into the layer before it, put back as an identity with the folded shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.calls import first_line
from secateur.core.errors import ModelError
from secateur.core.names import unwrap
from secateur.core.task import call


def sources(net: nn.Module, example: Tensor) -> dict[str, str]:
    """The convolution or linear layer whose output each BatchNorm normalises, by their paths.

    Those are left out that are called more than once, or whose layer feeds something else that normalises.

    Raises:
        ModelError: when the class does not run on the example.
    """
    made: dict[int, tuple[str, Tensor]] = {}  # the tensors are held, so that no number is given twice
    found: dict[str, list[str]] = {}
    handles = []

    def keep(path: str) -> Any:
        def hook(_: nn.Module, given: Any, out: Tensor) -> None:
            made[id(out)] = path, out

        return hook

    def ask(path: str) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            found.setdefault(path, []).append(made[id(given[0])][0] if id(given[0]) in made else "")

        return hook

    for path, module in unwrap(net).named_modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            handles.append(module.register_forward_hook(keep(path)))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            handles.append(module.register_forward_pre_hook(ask(path)))
    try:
        with torch.no_grad():
            call(net, example)
    except Exception as error:  # it is the user's code
        raise ModelError(
            f"{type(unwrap(net)).__name__} does not run on inputs of shape {tuple(example.shape)} "
            f"({type(error).__name__}: {first_line(error)}). Check --shape and the options of the class."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    once = {norm: paths[0] for norm, paths in found.items() if len(paths) == 1 and paths[0]}
    layers = list(once.values())
    return {norm: layer for norm, layer in once.items() if layers.count(layer) == 1}


def unfold(net: nn.Module, tensors: dict[str, Tensor], example: Tensor) -> int:
    """Add what the file lacks of BatchNorm, in place: scale one, mean zero, variance one, and the folded bias as shift.

    Zeros of the weights stay zeros, since folding multiplies each output channel by a number.

    Args:
        net: a fresh network of the class.
        tensors: those of the file under the names of the class.
        example: inputs for the class.

    Returns:
        How many layers became identities; those whose layer is not in the file are left as they are.

    Raises:
        ModelError: when the class does not run on the example.
    """
    modules: dict[str, Any] = dict(unwrap(net).named_modules())
    done = 0
    for norm, layer in sources(net, example).items():
        weight = tensors.get(f"{layer}.weight")
        lacks = f"{norm}.running_var" not in tensors and f"{norm}.weight" not in tensors
        if not lacks or weight is None or not modules[norm].affine:
            continue
        turned = getattr(modules[layer], "transposed", False)
        width = weight.shape[1] * modules[layer].groups if turned else weight.shape[0]
        blank = torch.zeros(width, dtype=weight.dtype)
        if modules[layer].bias is None and f"{layer}.bias" in tensors:
            tensors[f"{norm}.bias"] = tensors.pop(f"{layer}.bias")
        tensors.setdefault(f"{norm}.bias", blank)
        tensors[f"{norm}.weight"] = torch.ones_like(blank)
        tensors[f"{norm}.running_mean"] = blank.clone()
        tensors[f"{norm}.running_var"] = torch.full_like(blank, 1.0 - modules[norm].eps)
        done += 1
    return done
