"""Values that should not be there: NaN, subnormals, near-zeros, constant weights, types that do not agree."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from secateur.engine.doctor.findings import Check, Finding, listed
from secateur.engine.doctor.subject import Subject, real, zeros

NEAR = 1e-6
"""Relative to the root mean square of a tensor: what is smaller counts as nearly zero."""
_BEGINS_ZERO = re.compile(r"(^|[._])lora_(B|up|embedding_A)([._]|$)")
"""Halves of adapters that are zero until they are trained, so that the network begins as it was."""
_FLOAT16 = 2.0**-14  # its smallest normal number
_BAND = 100.0  # a smooth density holds this many times more values between NEAR and _BAND * NEAR than below NEAR


def row(name: str, tensor: Tensor) -> dict[str, Any]:
    """What is counted of every tensor.

    Cost: about ten passes over it.
    """
    values, floating = real(tensor), tensor.is_floating_point()
    halves = floating and tensor.element_size() > 2
    # all that is counted of small numbers is among those below the smallest normal one of float16
    small = values[values.abs() < _FLOAT16].abs() if floating else torch.zeros(zeros(tensor))
    some = small[small > 0]
    none = small.numel() - some.numel()
    finite = _finite(values)
    return {
        "name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype), "numel": tensor.numel(), "zeros": none,
        "share": none / max(1, tensor.numel()),
        "near_zeros": int(near_zeros(values).sum()) if floating and tensor.dim() >= 2 and some.numel() else 0,
        "not_finite": 0 if finite else int((~values.isfinite()).sum()),
        "subnormal": int((some < torch.finfo(tensor.dtype).tiny).sum()) if floating else 0,
        "subnormal_in_float16": some.numel() if halves else 0,
        "subnormal_in_bfloat16": int((some < torch.finfo(torch.bfloat16).tiny).sum()) if halves else 0,
    }  # fmt: skip


def near_zeros(values: Tensor) -> Tensor:
    """Where values are not zero but far below all others of their tensor; nowhere if these are of every size.

    A smooth density around zero leaves ever fewer values the closer one looks. Weights that were pruned by a mask that
    is gone, and then decayed, are the contrary: many far below, few or none in between.
    """
    level = _level(values) * NEAR
    magnitude = values.abs()
    low = magnitude[magnitude < level * _BAND]
    count, between = int(((low > 0) & (low < level)).sum()), int((low >= level).sum())
    if count < max(4, values.numel() // 1000) or count <= between:
        return torch.zeros_like(values, dtype=torch.bool)
    return (magnitude > 0) & (magnitude < level)


def _level(values: Tensor) -> float:
    """Root mean square of the finite values."""
    norm = float(torch.linalg.vector_norm(values))
    if not math.isfinite(norm):
        values = torch.where(values.isfinite(), values, 0).double()
        norm = float(torch.linalg.vector_norm(values))
    return norm / math.sqrt(max(1, values.numel()))


def _subnormal(values: Tensor, dtype: torch.dtype) -> Tensor:
    return (values != 0) & (values.abs() < torch.finfo(dtype).tiny)


def _finite(values: Tensor) -> bool:
    """Whether all values are finite; whole numbers are."""
    if not values.is_floating_point() and not values.is_complex():
        return True
    return math.isfinite(float(torch.linalg.vector_norm(values))) or bool(values.isfinite().all())


def _not_finite(subject: Subject) -> list[Finding]:
    """Of the network, its averages, and whatever else lies in the file as tensors."""
    own = {id(tensor) for tensor in subject.tensors.values()}  # an average may lie among them
    tables = [("", subject.tensors), *subject.averages.items(), *subject.others.items()]
    found = []
    for place, tensors in tables:
        for name, tensor in tensors.items():
            if (place and id(tensor) in own) or _finite(real(tensor)) or _attention_mask(tensor):
                continue
            bad = int((~real(tensor).isfinite()).sum())
            found.append(Finding(
                "not finite", (name,),
                f"`{name}`{f' in `{place}`' if place else ''}: {bad:,} of {tensor.numel():,} values are NaN or "
                "infinite", bad,
                "take an earlier checkpoint, or train again with a lower rate (`--lr`) or `-s clip=1.0`",
            ))  # fmt: skip
    return found


def _attention_mask(tensor: Tensor) -> bool:
    """A table of minus infinity and one other value is how attention is told where not to look."""
    values = real(tensor)
    if tensor.dim() < 2 or tensor.is_complex() or bool((values.isnan() | (values == torch.inf)).any()):
        return False
    return int(values[values.isfinite()].unique().numel()) <= 1 and bool(values.isfinite().any())


def _subnormals(subject: Subject) -> list[Finding]:
    found = []
    for name, tensor in subject.tensors.items():
        # half floats reach so low that every network has some, and no processor is slow with them
        if not tensor.is_floating_point() or tensor.dtype == torch.float16 or tensor.element_size() == 1:
            continue
        count = int(_subnormal(tensor, tensor.dtype).sum())
        if count:
            found.append(Finding(
                "subnormal", (name,), f"`{name}`: {count:,} values are subnormal, which makes many processors slow",
                count, "set them to zero: `tensor[tensor.abs() < torch.finfo(tensor.dtype).tiny] = 0`", True, "warning",
            ))  # fmt: skip
    return found


def _flush(subject: Subject, finding: Finding) -> Subject:
    (name,) = finding.tensors
    tensor = subject.tensors[name]
    return subject.changed({name: tensor.masked_fill(_subnormal(tensor, tensor.dtype), 0.0)})


def _leaked(subject: Subject) -> list[Finding]:
    found = []
    for name, tensor in subject.matrices().items():
        values = real(tensor)
        near = near_zeros(values) & ~_subnormal(values, tensor.dtype)
        if name in subject.masks and subject.masks[name].shape == near.shape:
            near &= subject.masks[name]  # what the masks prune is told by the check of masks
        count = int(near.sum())
        largest = float(values[near].abs().max()) if count else 0.0
        if count and _decayed(near, values):
            found.append(Finding(
                "decayed units", (name,),
                f"`{name}`: {count:,} values are not zero but at most {largest:.1e}, and they fill whole rows or "
                "columns: units that died and decayed, or that pruning took and nothing holds", count,
                "nothing computes with them; in Python, with the network and these set to zero: "
                "`secateur.surgery.shrink_dead(model, example)`", severity="note",
            ))  # fmt: skip
        elif count:
            found.append(Finding(
                "near zero", (name,),
                f"`{name}`: {count:,} values are not zero but at most {largest:.1e}, with a gap up to the others: "
                f"a mask leaked, and pruned weights only decayed (true zeros: {zeros(tensor):,})", count,
                f"set them to zero: `tensor[tensor.abs() <= {largest * 1.001:.3e}] = 0`", True,
            ))  # fmt: skip
    return found


def _decayed(near: Tensor, values: Tensor) -> bool:
    """Whether near-zeros fill rows or columns: weight decay kills units whole, a mask that leaked hardly ever does."""
    low = near | (values == 0)
    rows = low.flatten(1).all(1).reshape(-1, *[1] * (near.dim() - 1))
    columns = low.transpose(0, 1).flatten(1).all(1).reshape(1, -1, *[1] * (near.dim() - 2))
    return not bool((near & ~(rows | columns)).any())


def _zero_near(subject: Subject, finding: Finding) -> Subject:
    (name,) = finding.tensors
    tensor = subject.tensors[name]
    values = real(tensor)
    return subject.changed({name: values.masked_fill(near_zeros(values), 0.0).to(tensor.dtype)})


def _constant(subject: Subject) -> list[Finding]:
    found = []
    for name, tensor in subject.weights().items():
        values = real(tensor).flatten()
        mask = subject.masks.get(name)
        closed = mask is not None and not bool(mask.any())  # the check of masks tells it
        if tensor.numel() < 2 or closed or not bool((values == values[0]).all()):
            continue
        if _same(subject.dense.get(name), tensor) or (_BEGINS_ZERO.search(name) and not bool(values[0])):
            continue
        value = float(values[0])
        why = "every weight of it is zero, so nothing passes through" if value == 0 else f"every weight is {value:g}"
        found.append(Finding(
            "constant", (name,), f"`{name}`: {why}; it was never initialised, or pruned away entirely", tensor.numel(),
            "take the layer from an earlier checkpoint, or prune again so that each layer keeps some weights "
            "(`--allocation erk`)",
        ))  # fmt: skip
    return found


def _same(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.shape == other.shape and bool((real(one) == real(other)).all())


def _dtypes(subject: Subject) -> list[Finding]:
    matrices = subject.matrices()
    found = []
    double = [name for name, tensor in matrices.items() if tensor.dtype == torch.float64]
    if double:
        found.append(Finding(
            "float64", tuple(double), f"{listed(double)}: weights of 64 bits take twice the room and time of float32",
            len(double), "cast the network before saving: `model.float()`", severity="warning",
        ))  # fmt: skip
    kinds = Counter(tensor.dtype for tensor in matrices.values() if tensor.dtype != torch.float64)
    if len(kinds) > 1:
        usual = kinds.most_common(1)[0][0]
        odd = [name for name, tensor in matrices.items() if tensor.dtype not in (usual, torch.float64)]
        said = ", ".join(sorted({str(matrices[name].dtype).removeprefix("torch.") for name in odd}))
        found.append(Finding(
            "mixed types", tuple(odd),
            f"{listed(odd)}: {said}, while the other weights are {str(usual).removeprefix('torch.')}", len(odd),
            f"cast them before saving: `model.to({usual})`", severity="warning",
        ))  # fmt: skip
    return found


CHECKS = {
    "not finite": Check(_not_finite),
    "near zero": Check(_leaked, _zero_near),
    "subnormal": Check(_subnormals, _flush),
    "constant": Check(_constant),
    "types": Check(_dtypes),
}
