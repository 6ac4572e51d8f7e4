"""Masks beside weights: do they belong together, are they carried out, does any of them close a layer."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.core.patterns import NM
from secateur.engine.doctor.findings import Check, Finding
from secateur.engine.doctor.leftovers import beside, parts
from secateur.engine.doctor.subject import Subject, prunes, real, zeros

_SHARE = 0.95  # of the groups that follow a pattern, from which on the others are taken for a fault
_SAMPLE = 16  # rows that tell whether a pattern is worth counting in full
_PATTERNS = (NM(2, 4), NM(1, 4), NM(4, 8), NM(2, 8), NM(1, 8))


def _strangers(subject: Subject) -> list[Finding]:
    odd = {n: m for n, m in subject.masks.items() if n not in subject.tensors or subject.tensors[n].shape != m.shape}
    found = [
        Finding(
            "foreign mask", (name,), f"the masks name `{name}` {list(mask.shape)}, which the weights do not hold"
            + (f": there it is {list(subject.tensors[name].shape)}" if name in subject.tensors else ""), 1,
            "the two files belong to different networks; restore the pair, or name the masks with `--masks FILE`",
        )
        for name, mask in odd.items()
    ]  # fmt: skip
    for original, mask in (*parts(subject.tensors).values(), *beside(subject.tensors).items()):
        shapes = [list(subject.tensors[name].shape) for name in (original, mask)]
        if shapes[0] != shapes[1]:
            found.append(Finding(
                "foreign mask", (mask,), f"`{mask}` has shape {shapes[1]}, its weight `{original}` {shapes[0]}", 1,
                "save the state of one network, with the masks it was pruned with",
            ))  # fmt: skip
    return found


def _closed(subject: Subject) -> list[Finding]:
    """Masks that keep nothing."""
    return [
        Finding(
            "layer collapse", (name,), f"the mask of `{name}` keeps none of {mask.numel():,} weights: the layer is cut "
            "off", mask.numel(),
            "prune again so that each layer keeps some weights: `--allocation erk`, or a smaller sparsity",
        )
        for name, mask in subject.masks.items()
        if mask.dim() >= 2 and mask.numel() and not bool(mask.any())
    ]  # fmt: skip


def fitting(subject: Subject) -> dict[str, Tensor]:
    """The masks that fit a tensor of the file."""
    tensors = subject.tensors
    return {
        n: m for n, m in subject.masks.items() if n in tensors and tensors[n].shape == m.shape and prunes(tensors[n])
    }


def _leaks(subject: Subject) -> list[Finding]:
    found = []
    for name, mask in fitting(subject).items():
        alive = int((real(subject.tensors[name]).ne(0) & ~mask).sum())
        if alive:
            found.append(Finding(
                "mask not applied", (name,),
                f"{alive:,} of {int((~mask).sum()):,} pruned weights of `{name}` are not zero", alive,
                f"`state[{name!r}] *= state[{f'{name}_mask'!r}]`" if f"{name}_mask" in subject.tensors
                else "call `secateur.Masks.load(path).apply_(model)` and save again", True,
            ))  # fmt: skip
    return found


def _apply(subject: Subject, finding: Finding) -> Subject:
    (name,) = finding.tensors
    tensor = subject.tensors[name]
    return subject.changed({name: real(tensor).masked_fill(~subject.masks[name], 0.0).to(tensor.dtype)})


def _groups(tensor: Tensor, m: int) -> Tensor:
    return real(tensor).movedim(1, -1).reshape(-1, m)


def broken_groups(tensor: Tensor) -> tuple[NM, Tensor] | None:
    """The N:M pattern that nearly all groups of a tensor follow, and which of them do not.

    To follow it a group must hold exactly ``n`` weights that are not zero in nearly all cases: groups that have fewer
    are what any high sparsity gives.

    Returns:
        The pattern and one boolean for each group (rows, then kernel positions, then groups of inputs), or None when
        there is no such pattern or no group that breaks it.
    """
    for pattern in _PATTERNS:
        if pattern.why_not(tuple(tensor.shape)):
            continue
        few = (_groups(tensor[:_SAMPLE], pattern.m) != 0).sum(1)
        if float((few == pattern.n).double().mean()) < 0.5:
            continue
        kept = (_groups(tensor, pattern.m) != 0).sum(1)
        above = kept > pattern.n
        exact = float((kept == pattern.n).double().mean())
        follow = 1 - float(above.double().mean())
        if exact >= _SHARE - 0.05 and _SHARE <= follow < 1:
            return pattern, above
    return None


def _lying(tensor: Tensor) -> tuple[Tensor, bool] | None:
    """A matrix with broken groups, its inputs along the second dimension, and whether it was turned for that.

    Some formats and layers keep a matrix the other way round.
    """
    for turned in (False, True) if tensor.dim() == 2 else (False,):
        view = tensor.t() if turned else tensor
        if broken_groups(view) is not None:
            return view, turned
    return None


def _nearly_nm(subject: Subject) -> list[Finding]:
    found = []
    for name, tensor in subject.weights().items():
        lying = _lying(tensor)
        broken = broken_groups(lying[0]) if lying is not None else None
        if broken is None:
            continue
        pattern, above = broken
        count, shown = int(above.sum()), ", ".join(map(str, above.nonzero().flatten()[:6].tolist()))
        n, m, turn = pattern.n, pattern.m, ".t()" if lying is not None and lying[1] else ""
        found.append(Finding(
            "broken N:M", (name,),
            f"`{name}` is {pattern} in {len(above) - count:,} of {len(above):,} groups, but not in {count:,} "
            f"(number {shown}{', ...' if count > 6 else ''}): kernels for {pattern} will not take it", count,
            f"keep the {n} largest of each group: `from secateur.core.patterns import NM; "
            f"w *= NM({n}, {m}).mask(w{turn}.abs(), w.numel() // {m} * {n}){turn}`", True, "warning",
        ))  # fmt: skip
    return found


def _conform(subject: Subject, finding: Finding) -> Subject:
    (name,) = finding.tensors
    lying = _lying(subject.tensors[name])
    broken = broken_groups(lying[0]) if lying is not None else None
    if lying is None or broken is None:
        return subject
    tensor, turned = lying
    pattern, _ = broken
    mask = pattern.mask(real(tensor).abs(), pattern.fixed(tuple(tensor.shape)) or 0)
    new = torch.where(mask, real(tensor), 0.0).to(tensor.dtype)
    return subject.changed({name: (new.t() if turned else new).contiguous()})


def pruned(subject: Subject, name: str) -> Tensor | None:
    """Which weights of a tensor are meant to stay zero: by its mask, else its zeros where there are many; or None."""
    mask: Mapping[str, Tensor] = subject.masks
    tensor = subject.tensors[name]
    if name in mask and mask[name].shape == tensor.shape:
        return ~mask[name] if not bool(mask[name].all()) else None
    none = zeros(tensor)
    return real(tensor) == 0 if tensor.numel() // 100 < none < tensor.numel() and none >= 4 else None


def _pruned_vectors(subject: Subject) -> list[Finding]:
    """Biases and scales that pruning took along: sure where the dense network has a value, or a mask says so."""
    found = []
    for name, tensor in subject.tensors.items():
        if not tensor.is_floating_point() or tensor.dim() > 1 or subject.is_mask(name):
            continue
        gone = real(tensor) == 0
        dense, mask = subject.dense.get(name), subject.masks.get(name)
        if mask is not None and mask.shape == tensor.shape:
            gone = gone & ~mask
        elif dense is not None and dense.shape == tensor.shape:
            gone = gone & (dense != 0)
        else:
            continue
        count = int(gone.sum())
        if count:
            found.append(Finding(
                "pruned vector", (name,),
                f"{count:,} of {tensor.numel():,} values of `{name}` are zero by pruning: biases, scales and "
                "statistics are few and each matters", count,
                f"prune the weights alone, with `--skip {shlex.quote(name)}`, or take `{name}` from the dense network",
                severity="warning",
            ))  # fmt: skip
    return found


CHECKS = {
    "strangers": Check(_strangers),
    "closed": Check(_closed),
    "leaks": Check(_leaks, _apply),
    "n:m": Check(_nearly_nm, _conform),
    "vectors": Check(_pruned_vectors),
}
