"""Plain weights and masks from what other pruning libraries leave in a state dict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from secateur.core.errors import FileError
from secateur.core.masks import Masks
from secateur.core.prunable import comparable
from secateur.engine.foreign.record import Foreign

_PARAMETRIZED = re.compile(r"(?:(?P<path>.*)\.)?parametrizations\.(?P<key>[^.]+)\.(?P<part>.+)")
PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")
"""What wrappers (DataParallel, ``torch.compile``, FSDP) put before every name."""
_NORMS = ("_u", "_v", "_g")


@dataclass(frozen=True)
class Orphan:
    """A network without its class.

    Args:
        tensors: plain weights and buffers; what is pruned is zero.
        masks: the masks that the file holds, True = kept; those read off zeros come later.
        notes: what was done to get there.
    """

    tensors: dict[str, Tensor]
    masks: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)


def gather(found: Foreign, entry: str = "", known: frozenset[str] = frozenset()) -> Orphan:
    """Merge masks into weights, and take off what wrappers put before the names.

    Args:
        found: the file.
        entry: another state dict of the file, such as its averaged copy; by default the network.
        known: names that the class has; what is called so stays as it is.

    Raises:
        FileError: when there is no such entry, a mask does not fit its weight or is no mask, one of the two lies there
            without the other, or a parametrization is something else than a mask.
    """
    notes = [f"{name} was not read: {why}" for name, why in found.left.items()]
    tensors = _unwrapped(_entry(found, entry, notes), notes)
    tensors, masks = _merged(found.path, tensors, notes)
    tensors, more = _applied(tensors, known, notes)
    tensors, others = _unparametrized(found.path, tensors, notes)
    _refuse_halves(found.path, tensors, known)
    return Orphan(tensors, _beside(found, tensors, {**masks, **more, **others}, notes), notes)


def _entry(found: Foreign, entry: str, notes: list[str]) -> dict[str, Tensor]:
    """The tensors of one table of the file, and a note of those that are left."""
    others, joined = found.facts.get("others", {}), found.facts.get("joined", [])
    if entry in joined:
        return {n.removeprefix(f"{entry}."): t for n, t in found.tensors.items() if n.startswith(f"{entry}.")}
    if entry and entry not in others:
        known = ", ".join([*joined, *others]) or "none"
        raise FileError(f"{found.path} has no further state dict called {entry!r}; there are: {known}.")
    if joined and not entry:
        notes.append(f"{len(joined)} tables were joined under their names; `--entry {joined[0]}` takes one alone")
    rest = [name for name in others if name != entry]
    if rest:
        notes.append(f"not taken: {', '.join(f'{name} ({len(others[name])} tensors)' for name in rest)}; see `--entry`")
    return dict(others[entry] if entry else found.tensors)


def _unwrapped(tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    for prefix in PREFIXES * 2:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
            notes.append(f"`{prefix}` was taken off every name")
    return tensors


def _merged(path: Path, tensors: dict[str, Tensor], notes: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The pairs of ``torch.nn.utils.prune``: ``weight_orig`` times ``weight_mask``."""
    plain, masks = dict(tensors), {}
    for name in tensors:
        base = name.removesuffix("_orig")
        if name.endswith("_orig") and f"{base}_mask" in tensors:
            masks[base] = _mask(path, f"{base}_mask", tensors[f"{base}_mask"], tensors[name])
            plain[base] = _masked(tensors[name], masks[base])
            if base in tensors and not torch.equal(comparable(tensors[base]), comparable(plain[base])):
                raise FileError(
                    f"{path} holds `{base}` and also `{name}` with its mask, and they differ. Remove the one that is "
                    "out of date where the file was made."
                )
            del plain[name], plain[f"{base}_mask"]
    if masks:
        notes.append(f"{len(masks)} pairs of weight_orig and weight_mask (torch.nn.utils.prune) were multiplied out")
    # The names keep the order of the file, in which the original stands where the weight should.
    order = [name.removesuffix("_orig") if name.removesuffix("_orig") in masks else name for name in tensors]
    return {name: plain[name] for name in dict.fromkeys(order) if name in plain}, masks


def _applied(
    tensors: dict[str, Tensor], known: frozenset[str], notes: list[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masks beside the weight itself, as modules keep them that multiply on the way."""
    plain, masks, alive = dict(tensors), {}, 0
    for name, mask in tensors.items():
        base = name.removesuffix("_mask")
        weight = tensors.get(base)
        if base == name or weight is None or not weight.is_floating_point() or weight.shape != mask.shape:
            continue
        values = comparable(mask)
        if not _prunable(base) or bool(((values != 0) & (values != 1)).any()):
            continue
        masks[base] = values != 0
        plain[base] = _masked(weight, masks[base])
        alive += zeros(plain[base]) - zeros(weight)
        if name not in known:
            del plain[name]
    if masks:
        notes.append(f"{len(masks)} masks beside their weights were applied: {alive:,} weights under them became zero")
    return plain, masks


def _prunable(name: str) -> bool:
    last = name.rpartition(".")[2]
    return "weight" in last or "bias" in last


def _refuse_halves(path: Path, tensors: Mapping[str, Tensor], known: frozenset[str]) -> None:
    """A weight whose mask is lost, or a mask whose weight is: nobody can tell what the network was.

    Spectral and weight normalisation call their weights so too, and have vectors beside them.
    """
    for name in tensors:
        for end, other, what in (
            ("_orig", "_mask", "what of it is pruned"),
            ("_mask", "_orig", "its weight"),
        ):
            base = name.removesuffix(end)
            beside = base in tensors or any(f"{base}{part}" in tensors for part in _NORMS)
            if base != name and _prunable(base) and name not in known and not beside:
                raise FileError(
                    f"{path} holds `{name}`, half of what torch.nn.utils.prune keeps, and not `{base}{other}`: {what} "
                    f"is lost. Restore a whole copy, or save it after `prune.remove(module, "
                    f"{base.rpartition('.')[2]!r})`."
                )


def _masked(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight, exactly zero where the mask is not set."""
    return torch.where(mask, comparable(weight), 0.0).to(weight.dtype)


def _mask(path: Path, name: str, mask: Tensor, weight: Tensor) -> Tensor:
    if mask.shape != weight.shape:
        raise FileError(
            f"{path}: `{name}` has shape {list(mask.shape)} and its weight {list(weight.shape)}. "
            "Restore a copy; the two belong to different networks."
        )
    values = comparable(mask)
    odd = int(((values != 0) & (values != 1)).sum())
    if odd:
        raise FileError(
            f"{path}: `{name}` is no mask: {odd:,} of {mask.numel():,} entries are neither 0 nor 1. Apply it where it "
            "was made, and save the plain weights."
        )
    return values != 0


def _unparametrized(
    path: Path, tensors: dict[str, Tensor], notes: list[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``parametrizations.weight.original`` and the one mask beside it."""
    groups: dict[str, dict[str, str]] = {}
    for name in tensors:
        if met := _PARAMETRIZED.fullmatch(name):
            base = f"{met['path']}.{met['key']}" if met["path"] else met["key"]
            groups.setdefault(base, {})[met["part"]] = name
    if not groups:
        return tensors, {}
    gone = {name for parts in groups.values() for name in parts.values()}
    plain, masks = {name: tensor for name, tensor in tensors.items() if name not in gone}, {}
    for base, parts in groups.items():
        others = [name for part, name in parts.items() if part != "original"]
        if "original" not in parts or len(others) != 1 or tensors[others[0]].shape != tensors[parts["original"]].shape:
            raise FileError(
                f"{path}: `{base}` is computed from {', '.join(f'`{name}`' for name in parts.values())} by code that "
                "is not in the file. Call `torch.nn.utils.parametrize.remove_parametrizations` where it was made, and "
                "save the state dict again."
            )
        masks[base] = _mask(path, others[0], tensors[others[0]], tensors[parts["original"]])
        plain[base] = _masked(tensors[parts["original"]], masks[base])
    notes.append(f"{len(masks)} parametrizations by masks were multiplied out")
    return plain, masks


def _beside(
    found: Foreign, tensors: Mapping[str, Tensor], masks: dict[str, Tensor], notes: list[str]
) -> dict[str, Tensor]:
    """Masks that lie beside ``weights.safetensors``, as this library writes them."""
    place = found.path.parent / "masks.safetensors"
    if masks or found.path.name != "weights.safetensors" or not place.is_file():
        return masks
    kept = Masks.load(place)
    for name, mask in kept.items():
        if (
            name not in tensors
            or tensors[name].shape != mask.shape
            or bool((comparable(tensors[name]).ne(0) & ~mask).any())
        ):
            raise FileError(f"{place} does not belong to {found.path}: `{name}` differs. Move it away to go by zeros.")
    notes.append(f"{len(kept)} masks were read from {place.name}")
    return dict(kept)


def zeros(tensor: Tensor) -> int:
    """Entries that are zero."""
    return int((comparable(tensor) == 0).sum())


def masks_of(orphan: Orphan) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Masks of a network without a class, by the file's masks and by zeros; and why other tensors have none.

    Without the class it is not known which tensors are multiplied and which are looked up, so only those with zeros get
    a mask. A tensor of nothing but zeros started so and counts as kept.
    """
    masks, left = dict(orphan.masks), {}
    for name, tensor in orphan.tensors.items():
        if name in masks:
            continue
        values = comparable(tensor)
        if not tensor.is_floating_point():
            left[name] = f"its type is {tensor.dtype}"
        elif tensor.dim() < 2:
            left[name] = "a bias or scale"
        elif not bool((values == 0).any()):
            left[name] = "it has no zeros"
        elif not bool(values.any()):
            left[name] = "it has nothing but zeros"
        else:
            masks[name] = values != 0
    return masks, left
