"""What tools leave in the names: prefixes of wrappers, and a weight as two tensors, its original and its mask."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from secateur.engine.doctor.findings import Check, Finding, listed
from secateur.engine.doctor.subject import Subject, real

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_GRAPHS = ("onnx", "pt2")  # whose names nobody but the graph in the file goes by
_COUNTER = "n_averaged"
_PARAMETRIZED = re.compile(r"(^|.*\.)parametrizations\.([^.]+)\.original$")


def plain_name(name: str, leading: bool) -> str:
    """A name without what wrappers put into it.

    >>> plain_name("module.net._orig_mod.fc.weight", True)
    'net.fc.weight'

    Args:
        name: the name in the file.
        leading: whether a first ``module.`` belongs to a wrapper too.
    """
    before = ""
    while before != name:
        before = name
        for word in _WRAPPERS:
            name = re.sub(rf"(^|\.){re.escape(word)}", r"\1", name)
        if leading:
            name = name.removeprefix("module.")
    return name


def plain_names(tensors: Mapping[str, Tensor], known: frozenset[str] = frozenset()) -> dict[str, str]:
    """Names in the file and the plain ones they stand for, where these differ; empty when two would be the same.

    Args:
        tensors: by their names in the file.
        known: names of the network, which are right as they are.
    """
    names = [name for name in tensors if name != _COUNTER]
    leading = bool(names) and all(plain_name(name, False).startswith("module.") for name in names)
    renamed = {name: plain_name(name, leading) for name in names if name not in known}
    changed = {name: new for name, new in renamed.items() if new != name}
    whole = [changed.get(name, name) for name in tensors]
    return changed if len(set(whole)) == len(whole) and all(whole) else {}


def _prefixes(subject: Subject) -> list[Finding]:
    known = frozenset(subject.net.state_dict()) if subject.net is not None else frozenset[str]()
    changed = plain_names(subject.tensors, known) if subject.kind not in _GRAPHS else {}
    if not changed:
        return []
    name, new = next(iter(changed.items()))
    return [Finding(
        "prefix", tuple(changed),
        f"{len(changed):,} names hold the prefix of a wrapper (DataParallel, torch.compile, an average): "
        f"`{name}` is `{new}` in the network itself", len(changed),
        "save the network inside the wrapper: `model.module.state_dict()`, or `model._orig_mod.state_dict()`", True,
    )]  # fmt: skip


def _rename(subject: Subject, finding: Finding) -> Subject:
    del finding
    known = frozenset(subject.net.state_dict()) if subject.net is not None else frozenset[str]()
    new = plain_names(subject.tensors, known)
    drop = {_COUNTER} if all(name in new or name == _COUNTER for name in subject.tensors) else set()
    return replace(
        subject,
        tensors={new.get(name, name): tensor for name, tensor in subject.tensors.items() if name not in drop},
        masks={new.get(name, name): mask for name, mask in subject.masks.items()},
        ties=tuple(tuple(new.get(name, name) for name in tie) for tie in subject.ties),
        stored={new.get(name, name): how for name, how in subject.stored.items()},
    )


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


def _masklike(original: Tensor, other: Tensor) -> bool:
    values = real(other)
    return original.shape == other.shape and bool(((values == 0) | (values == 1)).all())


def merged(original: Tensor, mask: Tensor) -> Tensor:
    """The weight that the two stand for; exactly zero where the mask is, whatever lies there."""
    return torch.where(mask == 0, 0.0, original * mask.to(original.dtype)).to(original.dtype) + 0.0


def _leftovers(subject: Subject) -> list[Finding]:
    found = []
    for stem, (original, mask) in parts(subject.tensors).items():
        path, _, last = stem.rpartition(".")
        whole = subject.tensors[original].shape == subject.tensors[mask].shape and stem not in subject.tensors
        hidden = int((subject.tensors[mask] == 0).sum())
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


def _merge(subject: Subject, finding: Finding) -> Subject:
    original, mask = finding.tensors
    stem = next(stem for stem, pair in parts(subject.tensors).items() if pair == (original, mask))
    weight = merged(subject.tensors[original], subject.tensors[mask])
    new = {}
    for name, tensor in subject.tensors.items():
        if name == original:
            new[stem] = weight
        elif name != mask:
            new[name] = tensor
    masks = dict(subject.masks)
    if weight.dim() >= 2:  # of biases a mask is rather an accident than a wish
        masks.setdefault(stem, subject.tensors[mask] != 0)
    return replace(subject, tensors=new, masks=masks)


def normalised(subject: Subject) -> Subject:
    """The subject as a plain network would hold it: leftovers merged, prefixes gone."""
    for find, mend in ((_leftovers, _merge), (_prefixes, _rename)):
        for finding in find(subject):
            subject = mend(subject, finding) if finding.fixable else subject
    return subject


def _duplicates(subject: Subject) -> list[Finding]:
    """Equal tensors under several names, not known to be tied: the file is larger than it need be."""
    tied = {frozenset(pair) for tie in subject.ties for pair in ((a, b) for a in tie for b in tie if a != b)}
    seen: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in subject.matrices().items():
        values = real(tensor)
        key = (tuple(tensor.shape), tensor.dtype, float(values.double().sum()), float(values.double().abs().sum()))
        seen.setdefault(key, []).append(name)
    found = []
    for names in seen.values():
        first, *others = names
        same = [n for n in others if torch.equal(subject.tensors[n], subject.tensors[first])
                and frozenset((n, first)) not in tied]  # fmt: skip
        if same and bool((real(subject.tensors[first]) != 0).any()):
            size = sum(subject.tensors[n].nbytes for n in same)
            found.append(Finding(
                "stored twice", (first, *same),
                f"{listed([first, *same])} are equal: tied weights, or layers never trained; {size:,} bytes are stored "
                "again", len(same), f"if they are tied, `del state[{same[0]!r}]` before saving and tie them on loading",
                severity="note",
            ))  # fmt: skip
    return found


CHECKS = {
    "leftovers": Check(_leftovers, _merge),
    "prefixes": Check(_prefixes, _rename),
    "duplicates": Check(_duplicates),
}
