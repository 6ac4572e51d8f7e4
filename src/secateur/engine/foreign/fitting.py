"""Orphaned weights put into a fresh network of their class, which takes their widths where shapes alone tell them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.core.errors import FileError, MaskError
from secateur.core.masks import Masks
from secateur.core.names import aliases, unwrap
from secateur.core.prunable import coverage
from secateur.engine.folder import load_state
from secateur.engine.foreign.naming import counters, folded, renamed
from secateur.engine.foreign.orphans import Orphan
from secateur.engine.foreign.record import Foreign
from secateur.engine.foreign.unfolding import unfold
from secateur.engine.rebuilding import resize

_IGNORED = ("num_batches_tracked", "position_ids", "inv_freq")
_SHOWN = 10
_CLASS = "Name the class that it was saved from"
_UNFOLD = "Put identities in the place of BatchNorm with `--unfold` (and `--shape`)"


def fit(found: Foreign, orphan: Orphan, net: nn.Module, example: Tensor | None = None) -> Masks:
    """Fill a network with the weights of a file, in place.

    Args:
        found: the file.
        orphan: its plain weights and masks; what was done is added to its notes.
        net: a fresh instance of the class, as wide as before units were removed or smaller.
        example: inputs for the class; with them BatchNorm that was folded becomes an identity, else it is refused.

    Returns:
        Masks of everything that can be pruned: those of the file, and the zeros.

    Raises:
        FileError: when names or shapes do not fit; the message lists them, with the reason where one is seen.
    """
    tensors = dict(orphan.tensors)
    moved: dict[str, str] = {}
    if found.kind == "onnx":
        tensors, moved = renamed(found, tensors, net)
        if moved:
            orphan.notes.append(f"{len(moved)} tensors were named after the nodes that use them")
    own = unwrap(net).state_dict()
    for name in [n for n, how in found.stored.items() if how == "constant" and n in tensors and n not in own]:
        del tensors[name]
        orphan.notes.append(f"`{name}` is a constant of the graph, which the class makes itself")
    tensors, prefix = _prefixed(tensors, net)
    if prefix:
        orphan.notes.append(f"`{prefix}` was taken off the names")
    if example is not None and (count := unfold(net, tensors, example)):
        orphan.notes.append(
            f"{count} BatchNorm layers that were folded into the layers before them are identities now: scale and "
            "variance 1, mean 0; take their statistics anew before training"
        )
    _complete(tensors, net, orphan.notes)
    _check_names(found.path, tensors, net)
    _check_types(tensors, net, orphan.notes)
    _widths(found.path, tensors, net, orphan.notes)
    load_state(net, tensors, str(found.path))
    explicit = {moved.get(name, name).removeprefix(prefix): mask for name, mask in orphan.masks.items()}
    return _masks(found.path, net, explicit)


def _prefixed(tensors: dict[str, Tensor], net: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Take off what stands before all names, when the class then has them."""
    own = set(unwrap(net).state_dict())
    if any(name in own for name in tensors):
        return tensors, ""
    for name in tensors:
        for other in own:
            prefix = name.removesuffix(other)
            if prefix != name and prefix.endswith(".") and all(n.startswith(prefix) for n in tensors):
                return {n.removeprefix(prefix): t for n, t in tensors.items()}, prefix
    return tensors, ""


def _complete(tensors: dict[str, Tensor], net: nn.Module, notes: list[str]) -> None:
    """Tied tensors that the file has once, and counters that do not matter."""
    own = unwrap(net).state_dict()
    for names in aliases(net).values():
        there = next((name for name in names if name in tensors), None)
        lacking = [name for name in names if name in own and name not in tensors]
        if there is not None and lacking:
            tensors.update(dict.fromkeys(lacking, tensors[there]))
            notes.append(f"`{lacking[0]}` is tied to `{there}`")
    if filled := counters(net, tensors):
        notes.append(f"{len(filled)} counters of batches that the file lacks begin at 0")
    for name in [n for n in tensors if n not in own and n.rpartition(".")[2] in _IGNORED]:
        del tensors[name]


def _check_names(path: Path, tensors: Mapping[str, Tensor], net: nn.Module) -> None:
    own = unwrap(net).state_dict()
    missing = [name for name in own if name not in tensors]
    unknown = [name for name in tensors if name not in own]
    shapes = [
        f"`{name}` is {list(tensors[name].shape)} in the file and {list(own[name].shape)} in the class"
        for name in own if name in tensors and tensors[name].dim() != own[name].dim()
    ]  # fmt: skip
    if not missing and not unknown and not shapes:
        return
    rows = [*(f"`{n}` is not in the file" for n in missing), *(f"the class has no `{n}`" for n in unknown), *shapes]
    reason = folded(net, missing, tensors)
    more = f"; and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    raise FileError(
        f"{path} does not fit {type(unwrap(net)).__name__}: {reason + ': ' if reason else ''}"
        f"{'; '.join(rows[:_SHOWN])}{more} ({len(missing)} missing, {len(unknown)} unknown, {len(shapes)} of other "
        f"dimensions). {_UNFOLD if reason else _CLASS}, or leave the class out to keep plain weights and masks."
    )


def _check_types(tensors: Mapping[str, Tensor], net: nn.Module, notes: list[str]) -> None:
    own = unwrap(net).state_dict()
    other = {name: tensor for name, tensor in tensors.items() if tensor.dtype != own[name].dtype}
    if other:
        name, tensor = next(iter(other.items()))
        notes.append(
            f"{len(other)} tensors take the types of the class (`{name}`: {tensor.dtype} to {own[name].dtype})"
        )


def _widths(path: Path, tensors: Mapping[str, Tensor], net: nn.Module, notes: list[str]) -> None:
    """Give the network the widths of the file, where every module that differs tells its own by its shapes."""
    plain = unwrap(net)
    own = plain.state_dict()
    odd = [name for name, tensor in tensors.items() if tensor.shape != own[name].shape]
    if not odd:
        return
    modules = dict(plain.named_modules(remove_duplicate=False))
    sizes: dict[str, dict[str, Any]] = {}
    for name in odd:
        holder, _, key = name.rpartition(".")
        told = _sizes(modules[holder], key, tuple(tensors[name].shape), tuple(own[name].shape))
        if told is None:
            raise FileError(
                f"{path} does not fit {type(plain).__name__}: `{name}` is {list(tensors[name].shape)} in the file and "
                f"{list(own[name].shape)} in the class ({len(odd)} tensors differ), and the shapes of a "
                f"{type(modules[holder]).__name__} do not tell how it was cut. Pass the options of the class by `-s`."
            )
        sizes.setdefault(holder, {}).update(told)
    shapes = {name: {"shape": list(tensor.shape)} for name, tensor in tensors.items()}
    told_ties = {first: names[1:] for first, names in aliases(net).items() if len(names) > 1}
    resize(net, {"parameters": shapes, "sizes": sizes, "tied": told_ties}, {}, str(path))
    notes.append(f"{len(odd)} tensors are smaller or larger than in the class, which took their widths")


def _sizes(module: nn.Module, key: str, shape: tuple[int, ...], own: tuple[int, ...]) -> dict[str, Any] | None:
    """The sizes in a module's attributes that a shape tells; None when it does not."""
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    if key == "bias" and (convolution or isinstance(module, nn.Linear)):
        return {}
    if isinstance(module, nn.Linear) and key == "weight":
        return {"in_features": shape[1], "out_features": shape[0]}
    if convolution and key == "weight" and shape[2:] == own[2:]:
        return _convolution(module, shape)  # type: ignore[arg-type]
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return {"num_features": shape[0]}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": shape}
    if isinstance(module, nn.Embedding):
        return {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": shape[0]}
    return None


def _convolution(module: nn.modules.conv._ConvNd, shape: tuple[int, ...]) -> dict[str, Any] | None:
    groups = module.groups
    if module.transposed:
        return {"in_channels": shape[0], "out_channels": shape[1] * groups} if groups == 1 else None
    if groups > 1 and groups == module.in_channels and shape[1] == 1:  # one filter for each channel
        widths = module.out_channels // groups
        groups = shape[0] // widths
        return {"groups": groups, "in_channels": groups, "out_channels": shape[0]}
    if shape[0] % groups:
        return None
    return {"in_channels": shape[1] * groups, "out_channels": shape[0]}


def _masks(path: Path, net: nn.Module, explicit: Mapping[str, Tensor]) -> Masks:
    """Masks of everything that can be pruned: the file's own, else the zeros."""
    first = {name: names[0] for names in aliases(net).values() for name in names}
    prunable = coverage(net).prunable
    masks = {name: p.detach() != 0 for name, p in prunable.items()}
    masks = {name: mask if bool(mask.any()) else ~mask for name, mask in masks.items()}
    for name, mask in explicit.items():
        if name not in first:
            raise MaskError(f"{path}: the mask of `{name}` belongs to no parameter of {type(unwrap(net)).__name__}.")
        masks[first[name]] = mask
    made = Masks(masks)
    made.check(net)
    return made
