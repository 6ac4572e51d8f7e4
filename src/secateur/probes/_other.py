"""A second network of the same architecture: a file, a folder or a module, and its tensors under the first's names."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from secateur.core.errors import FileError, MaskError, ModelError, nearest
from secateur.core.files import read_tensors
from secateur.core.masks import Masks
from secateur.core.names import Named, plain, unwrap
from secateur.linalg.alignment import tensors_of

Other = str | Path | nn.Module | None
"""A network: a module, a ``.safetensors`` file, or a folder of a step that holds ``weights.safetensors``."""


def tensors_like(other: str | Path | nn.Module, model: nn.Module) -> Named:
    """The tensors of another network under the names of this one, on its device and in its types.

    Args:
        other: see :data:`Other`.
        model: the network that it must be like.

    Raises:
        FileError: when a file cannot be read.
        ModelError: when names or shapes differ.
    """
    own, found = tensors_of(model), _read(other)
    kept = set(unwrap(model).state_dict()) | set(own)
    for name in found:
        if name not in kept:
            raise ModelError(
                f"the other network is of another architecture: here there is no `{name}`. {nearest(name, kept)}"
            )
    like: Named = {}
    for name, tensor in own.items():
        there = found.get(name, tensor if name not in unwrap(model).state_dict() else None)
        if there is None or there.shape != tensor.shape:
            what = "is missing" if there is None else f"has shape {tuple(there.shape)}, here {tuple(tensor.shape)}"
            raise ModelError(
                f"the other network is of another architecture: `{name}` {what}. Name one that was built alike."
            )
        like[name] = there.detach().to(tensor.device, tensor.dtype)
    return like


def check_zeros(tensors: Named, masks: Masks) -> None:
    """The other network must be zero wherever the masks prune.

    Raises:
        MaskError: naming the tensor and the number of its weights that are not.
    """
    by_plain: dict[str, Tensor] = {plain(name): tensor for name, tensor in tensors.items()}
    for name, mask in masks.items():
        alive = int((by_plain[name].ne(0) & ~mask.to(by_plain[name].device)).sum())
        if alive:
            raise MaskError(
                f"the other network has other masks: {alive:,} weights of `{name}` that are pruned here are not zero "
                "there. Name one that was trained under the same masks, or pass no masks."
            )


def _read(other: str | Path | nn.Module) -> Named:
    if isinstance(other, nn.Module):
        return dict(unwrap(other).state_dict()) | tensors_of(other)
    path = Path(other)
    if path.is_dir():
        if not (path / _WEIGHTS).is_file():
            raise FileError(f"{path} holds no `{_WEIGHTS}`; name the folder of one step, such as `RUN/1-train-...`.")
        path = path / _WEIGHTS
    return read_tensors(path)[0]


_WEIGHTS = "weights.safetensors"
