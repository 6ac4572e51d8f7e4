"""Tensors that belong to each other and have come apart: tied weights, averaged copies, an optimizer's memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from secateur.core.names import aliases
from secateur.engine.doctor.findings import Check, Finding
from secateur.engine.doctor.masked import pruned
from secateur.engine.doctor.momenta import guessed, memory, optimized
from secateur.engine.doctor.names import plain_names
from secateur.engine.doctor.subject import Subject, real

_SAMPLE = 256
_PROBE = 4096
_ENOUGH = 16  # equal weights that two tensors must share before one can be a copy of the other
_REVIVING = ("momentum_buffer", "exp_avg", "mu", "m")


def _tied_names(subject: Subject) -> list[tuple[str, str]]:
    """Pairs that must be equal: the network ties them, or the folder says that it does."""
    groups: list[Sequence[str]] = list(aliases(subject.net).values()) if subject.net is not None else []
    groups += subject.ties if subject.net is None else ()
    names = [[name for name in group if name in subject.tensors] for group in groups]
    return [(group[0], other) for group in names for other in group[1:]]


def _alike(subject: Subject) -> Iterator[tuple[str, str]]:
    """Pairs of one shape, of different places in the network, that are equal but for some weights."""
    matrices = [(name, t) for name, t in subject.matrices().items() if t.numel() >= 4 * _ENOUGH]
    place = {name: re.sub(r"\d+", "#", name) for name, _ in matrices}
    probes = {name: real(tensor).flatten()[:: max(1, tensor.numel() // _PROBE)] for name, tensor in matrices}
    for i, (one, a) in enumerate(matrices):
        for other, b in matrices[i + 1 :]:
            if a.shape != b.shape or a.dtype != b.dtype or place[one] == place[other]:
                continue
            if _may_be(probes[one], probes[other]) and _copies(real(a), real(b)):
                yield one, other


def _may_be(a: Tensor, b: Tensor) -> bool:
    """Whether samples of two tensors agree so often that a whole comparison is worth its time."""
    least = min(int((a != 0).sum()), int((b != 0).sum()))
    return int(((a == b) & (a != 0)).sum()) * 2 >= least


def _copies(a: Tensor, b: Tensor) -> bool:
    """Whether one tensor is the other with some weights pruned, or with a few changed."""
    if torch.equal(a, b):
        return False
    one, two = a.flatten(), b.flatten()
    for x, y in ((one, two), (two, one)):
        probe = (x != 0).nonzero().flatten()[: _SAMPLE * 16 : 16]
        if not len(probe) or float((x[probe] == y[probe]).double().mean()) < 0.9:
            continue
        kept = x != 0
        if int(kept.sum()) >= _ENOUGH and bool((x[kept] == y[kept]).all()):
            return True
    differ = int((one != two).sum())
    return differ * 100 <= one.numel() and int(((one == two) & (one != 0)).sum()) >= _ENOUGH


def _winner(a: Tensor, b: Tensor) -> str:
    """Which of two tensors is the other one pruned: ``"first"``, ``"second"``, or neither."""
    one, two = real(a), real(b)
    for name, x, y in (("first", one, two), ("second", two, one)):
        if bool((x[x != 0] == y[x != 0]).all()) and bool((x == 0).any()):
            return name
    return ""


def _apart(subject: Subject) -> list[Finding]:
    known = _tied_names(subject)
    told = {frozenset(pair) for pair in known}
    pairs = known + ([pair for pair in _alike(subject) if frozenset(pair) not in told] if subject.net is None else [])
    found = []
    for one, other in pairs:
        a, b = subject.tensors[one], subject.tensors[other]
        if a.shape != b.shape or torch.equal(real(a), real(b)):
            continue
        count, which = int((real(a) != real(b)).sum()), _winner(a, b)
        sparse, dense = (one, other) if which == "first" else (other, one)
        why = f"`{sparse}` is pruned where `{dense}` is not" if which else "neither is the other one pruned"
        cure = f"`state[{dense!r}] = state[{sparse!r}]`" if which else "take both from one checkpoint"
        sure = frozenset((one, other)) in told
        said = f"the network ties `{one}` and `{other}`, but" if sure else f"`{one}` and `{other}` look tied:"
        found.append(Finding(
            "ties apart", (one, other), f"{said} {count:,} of {a.numel():,} values differ; {why}", count, cure,
            bool(which),
        ))  # fmt: skip
    return found


def _tie(subject: Subject, finding: Finding) -> Subject:
    one, other = finding.tensors
    which = _winner(subject.tensors[one], subject.tensors[other])
    if not which:
        return subject
    source, target = (one, other) if which == "first" else (other, one)
    return subject.changed({target: subject.tensors[source].clone()})


def _averaged(subject: Subject) -> list[Finding]:
    found = []
    for copy, tensors in subject.averages.items():
        there = {plain_names(tensors).get(name, name): name for name in tensors}
        outside = copy in subject.outside
        for name in subject.matrices():
            gone = pruned(subject, name)
            if gone is None or name not in there or tensors[there[name]].shape != gone.shape:
                continue
            alive = int((real(tensors[there[name]]).ne(0) & gone).sum())
            if alive:
                found.append(Finding(
                    "average not pruned", (name,),
                    f"{alive:,} of {int(gone.sum()):,} pruned weights of `{name}` are not zero in the average `{copy}`",
                    alive, "mask the average too: `masks.hold(model, optimizer, also=[ema])` in training, or now "
                    f"`ema[{there[name]!r}][state[{name!r}] == 0] = 0`", not outside,
                ))  # fmt: skip
    return found


def _mask_average(subject: Subject, finding: Finding) -> Subject:
    (name,) = finding.tensors
    gone = pruned(subject, name)
    if gone is None:
        return subject
    averages = {copy: dict(tensors) for copy, tensors in subject.averages.items()}
    for copy, tensors in averages.items():
        for old in [] if copy in subject.outside else list(tensors):
            if plain_names(tensors).get(old, old) == name and tensors[old].shape == gone.shape:
                tensors[old] = real(tensors[old]).masked_fill(gone, 0.0).to(tensors[old].dtype)
    return replace(subject, averages=averages)


def _zombies(subject: Subject) -> list[Finding]:
    found = []
    state, unsure = (subject.optimizer or {}).get("state", {}), guessed(subject)
    for key, name in optimized(subject).items():
        gone = pruned(subject, name) if subject.tensors[name].dim() >= 2 else None
        moving = [
            t
            for what, t in memory(state.get(key)).items()
            if what in _REVIVING and t.shape == subject.tensors[name].shape
        ]
        if gone is None or not moving:
            continue
        alive = int(torch.stack([(real(t) != 0) & gone for t in moving]).any(0).sum())
        if alive and name in unsure:
            found.append(Finding(
                "optimizer revives", (name,),
                f"the optimizer in the file seems to move {alive:,} of {int(gone.sum()):,} pruned weights of `{name}`; "
                "its entries have no names, and other tensors have the same shape, so it may be another's momentum",
                alive, "name the network with `--net NAME`, which tells the order; or begin training with a new "
                "optimizer", severity="warning",
            ))  # fmt: skip
        elif alive:
            found.append(Finding(
                "optimizer revives", (name,),
                f"the optimizer in the file still moves {alive:,} of {int(gone.sum()):,} pruned weights of `{name}`: "
                "its momentum there is not zero", alive,
                "clear it before saving: `masks.hold(model, optimizer)`, or begin training with a new optimizer", True,
            ))  # fmt: skip
    return found


def _forget(subject: Subject, finding: Finding) -> Subject:
    (name,) = finding.tensors
    gone = pruned(subject, name)
    if gone is None or subject.optimizer is None:
        return subject
    key = next(key for key, other in optimized(subject).items() if other == name)
    entry = dict(subject.optimizer["state"][key])
    for what, tensor in memory(entry).items():
        if tensor.shape == gone.shape:
            entry[what] = real(tensor).masked_fill(gone, 0).to(tensor.dtype)
    return replace(subject, optimizer={**subject.optimizer, "state": {**subject.optimizer["state"], key: entry}})


CHECKS = {
    "ties": Check(_apart, _tie),
    "averages": Check(_averaged, _mask_average),
    "optimizer": Check(_zombies, _forget),
}
