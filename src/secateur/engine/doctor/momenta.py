"""An optimizer's memory: which tensor each entry of it belongs to, how sure that is, and its order after a change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from secateur.engine.doctor.names import plain_names
from secateur.engine.doctor.subject import Subject

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def parameters(subject: Subject) -> list[str]:
    """Names that an optimizer would be given, in the order of the file, each tied tensor once."""
    again = {name for tie in subject.ties for name in tie[1:]}
    return [
        name
        for name, tensor in subject.tensors.items()
        if tensor.is_floating_point() and not name.endswith(STATISTICS) and name not in again
        and not subject.is_mask(name)
    ]  # fmt: skip


def memory(entry: object) -> dict[str, Tensor]:
    """The tensors of one parameter's state that are as large as itself."""
    if not isinstance(entry, Mapping):
        return {}
    return {
        str(key): value for key, value in entry.items() if isinstance(value, Tensor) and value.dim() and key != "step"
    }


def groups_of(subject: Subject) -> list[Mapping[str, Any]]:
    """The groups of parameters; none where the state is not laid out as torch does."""
    state = subject.optimizer
    if state is None or not isinstance(state.get("state"), Mapping) or not isinstance(state.get("param_groups"), list):
        return []
    groups = state["param_groups"]
    sound = all(
        isinstance(group, Mapping) and _listed(group.get("params", []), int | str)
        and _listed(group.get("param_names", []), str)
        for group in groups
    )  # fmt: skip
    return groups if sound else []


def _listed(value: object, kind: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(entry, kind) for entry in value)


def _named(subject: Subject) -> tuple[list[str], bool]:
    """Names in the order of the optimizer's entries, and whether that order is told and not only that of the file."""
    groups = groups_of(subject)
    told: list[str] = [name for group in groups for name in group.get("param_names", [])]
    if told:
        plain = plain_names(told)
        return [name if name in subject.tensors else plain.get(name, name) for name in told], True
    if len(groups) != 1:  # in which order groups were filled is not told
        return [], False
    here = parameters(subject)
    net = [name for name, _ in subject.net.named_parameters()] if subject.net is not None else []
    return (net, True) if sorted(net) == sorted(here) else (here, False)


def optimized(subject: Subject) -> dict[Any, str]:
    """Which tensor each entry of the optimizer's state belongs to; empty where names and shapes do not agree."""
    names, _ = _named(subject)
    keys = [key for group in groups_of(subject) for key in group.get("params", [])]
    if len(names) != len(keys) or len(set(keys)) != len(keys) or any(name not in subject.tensors for name in names):
        return {}
    pairs = dict(zip(keys, names, strict=True))
    for key, name in pairs.items():
        shapes = {tuple(t.shape) for t in memory(_state(subject).get(key)).values()}
        if shapes - {tuple(subject.tensors[name].shape)}:
            return {}
    return pairs


def guessed(subject: Subject) -> set[str]:
    """Tensors whose entry is found by the file's order alone: another one has the same shape, and nothing names them.

    Programs that write a checkpoint anew may sort it, and then the entries of two such tensors are exchanged unseen.
    """
    pairs = optimized(subject)
    if _named(subject)[1]:
        return set()
    shapes = Counter(tuple(subject.tensors[name].shape) for name in pairs.values())
    return {name for name in pairs.values() if shapes[tuple(subject.tensors[name].shape)] > 1}


def remembers(subject: Subject) -> bool:
    """Whether the optimizer has any memory of single parameters."""
    return subject.optimizer is not None and any(memory(entry) for entry in _state(subject).values())


def _state(subject: Subject) -> Mapping[Any, Any]:
    state = (subject.optimizer or {}).get("state")
    return state if isinstance(state, Mapping) else {}


def reordered(subject: Subject, new: Mapping[str, str], order: Sequence[str]) -> Mapping[str, Any] | None:
    """The optimizer's state as it is for the same tensors in another order; None where its entries cannot be placed.

    Args:
        subject: the tensors as they were.
        new: new names, where these change.
        order: all new names, as they lie in the file from now on.
    """
    pairs, place = optimized(subject), {name: index for index, name in enumerate(order)}
    if not pairs or subject.optimizer is None:
        return None
    state, groups, moved = _state(subject), [], {}
    for group in groups_of(subject):
        keys = list(group.get("params", []))
        wanted = sorted(keys, key=lambda key: place[new.get(pairs[key], pairs[key])])
        moved |= dict(zip(keys, wanted, strict=True))
        names = {"param_names": [new.get(pairs[key], pairs[key]) for key in wanted]} if "param_names" in group else {}
        groups.append({**group, **names})
    rest = {key: entry for key, entry in state.items() if key not in moved}
    entries = {key: state[old] for key, old in moved.items() if old in state}
    return {**subject.optimizer, "state": {**entries, **rest}, "param_groups": groups}
