"""What wrappers leave in the names, and tensors that are stored twice."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch

from secateur.engine.doctor.findings import Check, Finding, listed
from secateur.engine.doctor.subject import Subject, real

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_GRAPHS = ("onnx", "pt2")  # whose names nobody but the graph in the file goes by
_COUNTER = "n_averaged"


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


def plain_names(
    tensors: Iterable[str], known: frozenset[str] = frozenset(), module: bool | None = None
) -> dict[str, str]:
    """Names in the file and the plain ones they stand for, where these differ; empty when two would be the same.

    Args:
        tensors: their names in the file.
        known: names of the network, which are right as they are.
        module: whether a first ``module.`` is taken off; by default where all names begin so.
    """
    tensors = list(tensors)
    names = [name for name in tensors if name != _COUNTER]
    leading = _leading(names) if module is None else module
    renamed = {name: plain_name(name, leading) for name in names if name not in known}
    changed = {name: new for name, new in renamed.items() if new != name}
    whole = [changed.get(name, name) for name in tensors]
    return changed if len(set(whole)) == len(whole) and all(whole) else {}


def _leading(names: Iterable[str]) -> bool:
    rest = [plain_name(name, False) for name in names if name != _COUNTER]
    return bool(rest) and all(name.startswith("module.") for name in rest)


def _known(subject: Subject) -> frozenset[str]:
    return frozenset(subject.net.state_dict()) if subject.net is not None else frozenset[str]()


def _told(subject: Subject) -> bool:
    """Whether something says that ``module.``, with which all names begin, is a wrapper's and no part of the class.

    An average counts its updates beside it; the network, or masks that were given, have the names without it.
    """
    if _COUNTER in subject.tensors:
        return True
    whole = plain_names(subject.tensors, _known(subject)).values()
    return bool(_known(subject).intersection(whole)) or any(
        mask not in subject.tensors and mask in whole for mask in subject.masks
    )


def _sure(subject: Subject) -> dict[str, str]:
    """Names and the plain ones, as far as it is certain that a wrapper is behind them."""
    if subject.kind in _GRAPHS:
        return {}
    leading = _leading(subject.tensors)
    return plain_names(subject.tensors, _known(subject), leading and _told(subject))


def _prefixes(subject: Subject) -> list[Finding]:
    changed, found = _sure(subject), []
    if changed:
        name, new = next(iter(changed.items()))
        found.append(Finding(
            "prefix", tuple(changed),
            f"{len(changed):,} names hold the prefix of a wrapper (DataParallel, torch.compile, an average): "
            f"`{name}` is `{new}` in the network itself", len(changed),
            "save the network inside the wrapper: `model.module.state_dict()`, or `model._orig_mod.state_dict()`", True,
        ))  # fmt: skip
    unsure = [name for name in _unsure(subject) if name != _COUNTER]
    if unsure:
        found.append(Finding(
            "module prefix", tuple(unsure),
            f"all {len(unsure):,} names begin with `module.`: DataParallel put it there, or the class has a part "
            "called `module`; the file does not say which", len(unsure),
            "name the network, `--net NAME`, and its names decide; or save `model.module.state_dict()`",
            severity="warning",
        ))  # fmt: skip
    return found


def _unsure(subject: Subject) -> dict[str, str]:
    """Names with a first ``module.`` that may be a wrapper's or the network's own, and the names without it."""
    if subject.kind in _GRAPHS or not _leading(subject.tensors) or _told(subject) or subject.net is not None:
        return {}
    return plain_names(subject.tensors)


def _rename(subject: Subject, finding: Finding) -> Subject:
    del finding
    new = _sure(subject)
    drop = {_COUNTER} if all(name in new or name == _COUNTER for name in subject.tensors) else set[str]()
    return _renamed(replace(subject, tensors={n: t for n, t in subject.tensors.items() if n not in drop}), new)


def _renamed(subject: Subject, new: Mapping[str, str]) -> Subject:
    return replace(
        subject,
        tensors={new.get(name, name): tensor for name, tensor in subject.tensors.items()},
        masks={new.get(name, name): mask for name, mask in subject.masks.items()},
        ties=tuple(tuple(new.get(name, name) for name in tie) for tie in subject.ties),
        stored={new.get(name, name): how for name, how in subject.stored.items()},
    )


def stripped(subject: Subject) -> tuple[Subject, Callable[[Subject], Subject]]:
    """The subject without a first ``module.`` that may be a wrapper's, and what puts it back.

    Masks, averages and memory of an optimizer are found by plain names; the file keeps its own.
    """
    new = _unsure(subject)
    back = {plain: name for name, plain in new.items()}
    return _renamed(subject, new), lambda other: _renamed(other, back)


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
        same = [n for n in others if torch.equal(real(subject.tensors[n]), real(subject.tensors[first]))
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


CHECKS = {"prefixes": Check(_prefixes, _rename), "duplicates": Check(_duplicates)}
