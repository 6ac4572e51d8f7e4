"""What pruning of other libraries leaves: a weight as two tensors, its original and its mask, or only one of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.engine.doctor import momenta
from secateur.engine.doctor.findings import Check, Finding, listed
from secateur.engine.doctor.names import CHECKS as NAMES
from secateur.engine.doctor.names import plain_names, stripped
from secateur.engine.doctor.subject import Subject, prunable, real, zeros

_PARAMETRIZED = re.compile(r"(^|.*\.)parametrizations\.([^.]+)\.original$")
_NORMS = ("_u", "_v", "_g")  # beside an original: spectral or weight normalisation, which is no pruning


def parts(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Weights that lie in two tensors: by plain name, the names of the original and of the mask."""
    found = {}
    for name in tensors:
        stem = name.removesuffix("_orig")
        if stem != name and f"{stem}_mask" in tensors:
            found[stem] = (name, f"{stem}_mask")
        match = _PARAMETRIZED.fullmatch(name)
        if match:
            inside = re.compile(rf"{re.escape(name.removesuffix('original'))}\d+\.[^.]+")
            masks = [other for other in tensors if inside.fullmatch(other) and _masklike(tensors[name], tensors[other])]
            if len(masks) == 1:
                found[f"{match[1]}{match[2]}"] = (name, masks[0])
    return found


def beside(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Masks that lie beside the weight itself, by the weight; modules that multiply on the way keep them so."""
    stems = {name.removesuffix("_mask"): name for name in tensors if name.endswith("_mask")}
    return {
        stem: mask
        for stem, mask in stems.items()
        if stem in tensors and f"{stem}_orig" not in tensors and prunable(stem) and _binary(tensors[mask])
    }


def _binary(tensor: Tensor) -> bool:
    values = real(tensor)
    return bool(((values == 0) | (values == 1)).all())


def _masklike(original: Tensor, other: Tensor) -> bool:
    return original.shape == other.shape and _binary(other)


def merged(original: Tensor, mask: Tensor) -> Tensor:
    """The weight that the two stand for; exactly zero where the mask is, whatever lies there."""
    values, factor = real(original), real(mask)
    return (torch.where(factor == 0, 0.0, values * factor.to(values.dtype)) + 0.0).to(original.dtype)


def _leftovers(subject: Subject) -> list[Finding]:
    found = []
    for stem, (original, mask) in parts(subject.tensors).items():
        path, _, last = stem.rpartition(".")
        whole = subject.tensors[original].shape == subject.tensors[mask].shape and stem not in subject.tensors
        hidden = zeros(subject.tensors[mask])
        if original.endswith("_orig"):
            of, cure = "torch.nn.utils.prune", f"call `prune.remove(module, {last!r})` before saving"
        else:
            of = "torch.nn.utils.parametrize"
            cure = f"call `torch.nn.utils.parametrize.remove_parametrizations(module, {last!r})` before saving"
        at = f", with module = `model.get_submodule({path!r})`" if path else ""
        found.append(Finding(
            "leftover", (original, mask),
            f"`{original}` and `{mask}` are leftovers of {of}: the weights hold no zeros where the mask prunes "
            f"{hidden:,}", hidden, cure + at, whole,
        ))  # fmt: skip
    return found


class _Order(NamedTuple):
    """How a network without one leftover has its tensors: their names in order, and whether that is certain."""

    names: list[str]
    certain: bool


def _order(subject: Subject, stem: str, original: str, mask: str) -> _Order:
    """Torch registers what replaces a parameter after all others of its module; removed, it stands where it was.

    Modules with nothing but a weight and a bias have them in this order. Of others only the network itself can tell.
    """
    path, dot, _ = stem.rpartition(".")
    names = [stem if name == original else name for name in subject.tensors if name != mask]
    block = [name for name in names if name.startswith(f"{path}{dot}")]
    own = [name for name in block if "." not in name.removeprefix(f"{path}{dot}")]
    plain = plain_names(names)
    known = {name: index for index, name in enumerate(subject.net.state_dict())} if subject.net is not None else {}
    last = {name: name.rpartition(".")[2].removesuffix("_orig") for name in own}
    usual = {"weight": 0, "bias": 1, **dict.fromkeys(momenta.STATISTICS, 2)}
    if all(plain.get(name, name) in known for name in block):
        new = sorted(block, key=lambda name: known[plain.get(name, name)])
    elif all(what in usual or name.endswith("_mask") for name, what in last.items()):
        new = sorted(own, key=lambda name: usual.get(last[name], 2)) + [name for name in block if name not in own]
    else:
        return _Order(names, False)
    places = iter(new)
    return _Order([next(places) if name in set(block) else name for name in names], True)


def _merge(subject: Subject, finding: Finding) -> Subject:
    original, mask = finding.tensors
    stem = next(stem for stem, pair in parts(subject.tensors).items() if pair == (original, mask))
    weight = merged(subject.tensors[original], subject.tensors[mask])
    order = _order(subject, stem, original, mask)
    masks = dict(subject.masks)
    if weight.dim() >= 2:  # of biases a mask is rather an accident than a wish
        masks.setdefault(stem, real(subject.tensors[mask]) != 0)
    again = momenta.reordered(subject, {original: stem}, order.names) if order.certain else None
    return replace(
        subject, tensors={name: weight if name == stem else subject.tensors[name] for name in order.names},
        masks=masks, optimizer=again if again is not None else subject.optimizer,
    )  # fmt: skip


def _misfits(subject: Subject) -> list[Finding]:
    """Memory of an optimizer that cannot be brought into the order that the network has without leftovers.

    Torch pairs memory and parameters by their order alone, so the network could not be trained on.
    """
    names = []
    for finding in _leftovers(subject) if momenta.remembers(subject) or subject.unplaced else []:
        if not finding.fixable:
            continue
        original, mask = finding.tensors
        stem = next(stem for stem, pair in parts(subject.tensors).items() if pair == (original, mask))
        order = _order(subject, stem, original, mask)
        same = order.names == [stem if name == original else name for name in subject.tensors if name != mask]
        if not order.certain or (not same and (subject.unplaced or not momenta.optimized(subject))):
            names.append(stem)
        subject = _merge(subject, finding)
    if not names:
        return []
    return [Finding(
        "optimizer order", tuple(names),
        f"the optimizer's state fits the pruned module only: without the leftovers of {listed(names)} the parameters "
        "are in another order, into which its entries cannot be brought for certain", len(names),
        "train on with a new optimizer" + ("" if subject.unplaced else "; or name the network, `--net NAME`"),
        severity="warning",
    )]  # fmt: skip


def _halves(subject: Subject) -> list[Finding]:
    """Pruning that lost one of its two tensors."""
    tensors, found = subject.tensors, []
    lone = [name for name in tensors if name.endswith("_mask") and _lone_mask(tensors, name)]
    for name in tensors:
        stem = name.removesuffix("_orig")
        if stem == name or not prunable(stem) or stem in tensors or f"{stem}_mask" in tensors:
            continue
        if not any(f"{stem}{end}" in tensors for end in _NORMS):
            found.append(Finding(
                "mask lost", (name,),
                f"`{name}` is a weight as torch.nn.utils.prune keeps it, but its mask `{stem}_mask` is not there: "
                "what was pruned is not known", 1,
                "save both, `model.state_dict()`, or call `prune.remove` before saving; if nothing was pruned, "
                f"`state[{stem!r}] = state.pop({name!r})`",
            ))  # fmt: skip
    for name in lone if len(lone) < len(tensors) else []:  # a file of nothing but masks lacks nothing
        stem = name.removesuffix("_mask")
        found.append(Finding(
            "weight lost", (name,), f"`{name}` is a mask, but neither `{stem}` nor `{stem}_orig` is in the file", 1,
            "save both, `model.state_dict()`, or call `prune.remove` before saving",
        ))  # fmt: skip
    return found


def _lone_mask(tensors: Mapping[str, Tensor], name: str) -> bool:
    stem = name.removesuffix("_mask")
    return prunable(stem) and stem not in tensors and f"{stem}_orig" not in tensors and _binary(tensors[name])


def normalised(subject: Subject) -> Subject:
    """The subject as a plain network would hold it: leftovers merged, prefixes gone."""
    for check in (CHECKS["leftovers"], NAMES["prefixes"]):
        for finding in check.find(subject):
            subject = check.mend(subject, finding) if finding.fixable and check.mend else subject
    return stripped(subject)[0]


CHECKS = {"order": Check(_misfits), "leftovers": Check(_leftovers, _merge), "halves": Check(_halves)}
