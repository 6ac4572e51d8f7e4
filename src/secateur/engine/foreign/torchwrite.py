"""Checkpoints of ``torch.save`` written back: what did not change is the very object that torch read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.core.errors import FileError
from secateur.core.files import writing
from secateur.engine.foreign.checkpoints import Keys, Network, split
from secateur.engine.foreign.guard import same
from secateur.engine.foreign.tensorfile import check_back
from secateur.engine.foreign.torchfile import load, load_object

if TYPE_CHECKING:
    from secateur.engine.foreign.record import Foreign

_Plan = dict[Keys, dict[Any, Any]]


def write(
    source: Foreign,
    path: Path,
    tensors: dict[str, Tensor],
    others: Mapping[str, Mapping[str, Tensor]] | None = None,
    optimizer: Mapping[str, Any] | None = None,
) -> None:
    """Write the checkpoint with these tensors in their place and order, all other entries as they were."""
    whole, old = load_object(source.path)
    parts = split(source.path, whole, source.path.stat().st_size)
    plan, gone = _Plan(), dict[Keys, set[Any]]()
    known: Mapping[str, Mapping[str, Tensor]] = source.facts["others"]
    _place(source, whole, parts.network, source.tensors, tensors, plan, gone)
    for name, new in (others or {}).items():
        if name in parts.others:
            _place(source, whole, parts.others[name], known[name], {**known[name], **new}, plan, gone)
    whole = _filled(source.path, whole, (), plan, gone)
    if optimizer is not None and parts.optimizer is not None:
        whole = _filled(source.path, whole, (), {(): {parts.optimizer: _like_table(whole[parts.optimizer], optimizer)}},
                        {(): {parts.optimizer}})  # fmt: skip
    with writing(path) as temporary:
        with open(temporary, "wb") as file:
            torch.save(whole, file, _use_new_zipfile_serialization=not old)
        found = load(temporary)
        check_back(path, tensors, found["tensors"])
        for name, new in (others or {}).items():
            check_back(path, new, found["facts"]["others"].get(name, {}))


def _place(
    source: Foreign, whole: Any, network: Network, before: Mapping[str, Tensor], after: Mapping[str, Tensor],
    plan: _Plan, gone: dict[Keys, set[Any]],
) -> None:  # fmt: skip
    """Note for each table of a network which entries it gets, and which of its own go."""
    for keys in network.leaves.values():
        gone.setdefault(keys[:-1], set()).add(keys[-1])
        plan.setdefault(keys[:-1], {})
    tied = {name: names[0] for names in source.ties for name in names} if before is source.tensors else {}
    origin = {id(tensor): name for name, tensor in before.items()}
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for name, tensor in after.items():
        old = origin.get(id(tensor), name)
        like = _at(whole, network.leaves[old]) if old in network.leaves else None
        if isinstance(like, Tensor) and (tensor is before.get(old) or same(tensor, before[old])):
            value = like
        else:
            shared = made.get(tied.get(name, name))
            if shared is None or not same(shared[0], tensor):
                shared = made[tied.get(name, name)] = tensor, _like(tensor, like)
            value = shared[1]
        table, key = _home(source.path, network, name)
        plan.setdefault(table, {})[key] = value


def _home(path: Path, network: Network, name: str) -> tuple[Keys, Any]:
    """The table that a name belongs into, and its key there."""
    if name in network.leaves:
        return network.leaves[name][:-1], network.leaves[name][-1]
    direct = {keys[:-1] for keys in network.leaves.values()}
    fits = [start for start, keys in network.tables.items() if name.startswith(start) and keys in direct]
    if not fits:
        raise FileError(
            f"{path} holds tables within tables, and none that `{name}` belongs into. Save its `state_dict` alone, or "
            "as safetensors."
        )
    start = max(fits, key=len)
    return network.tables[start], name.removeprefix(start)


def _at(whole: Any, keys: Keys) -> Any:
    for key in keys:
        whole = whole[key]
    return whole


def _like(tensor: Tensor, like: Any) -> Tensor:
    """A copy of a tensor that is a parameter, or takes part in gradients, where the one in its place did."""
    made = tensor.detach().cpu().clone()
    if not isinstance(like, Tensor) or not (made.is_floating_point() or made.is_complex()):
        return made
    if isinstance(like, nn.Parameter):
        made = nn.Parameter(made, like.requires_grad)
        vars(made).update(vars(like))
    return made.requires_grad_(like.requires_grad)


def _like_table(like: Any, table: Mapping[Any, Any]) -> Any:
    """A copy of a table of the same type, with what else hangs on it, that has these entries."""
    made = copy.copy(like)
    if not isinstance(made, dict):
        return dict(table)
    made.clear()
    made.update(table)
    return made


def _filled(path: Path, table: Any, here: Keys, plan: _Plan, gone: Mapping[Keys, set[Any]]) -> Any:
    """A copy of a table, and of those in it that change: new entries stand where the old ones stood, in their order."""
    inner = {keys[len(here)] for keys in plan if len(keys) > len(here) and keys[: len(here)] == here}
    if here not in plan and not inner:
        return table
    new, left = dict(plan.get(here, {})), gone.get(here, set[Any]())
    if not isinstance(table, Mapping):
        if set(new) != set(left):
            raise FileError(f"{path} holds a list of tensors, whose number cannot change. Save a state dict instead.")
        rows = [new.get(i, _filled(path, v, (*here, i), plan, gone) if i in inner else v) for i, v in enumerate(table)]
        return type(table)(rows)
    waiting = iter(list(new.items()))
    entries: dict[Any, Any] = {}
    for key, value in table.items():
        if key in left:
            entries.update([entry] if (entry := next(waiting, None)) is not None else [])
        elif key not in new:
            entries[key] = _filled(path, value, (*here, key), plan, gone) if key in inner else value
    entries.update(waiting)
    return _like_table(table, entries)
