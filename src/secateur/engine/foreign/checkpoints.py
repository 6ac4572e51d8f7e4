"""Which of the tables in a checkpoint is the network, and what lies beside it: nothing is passed over in silence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.engine.foreign.guard import check_name, limit, refusal

_STATES = ("state_dict", "model_state_dict", "model_state", "model_weights")
UNDER = (*_STATES, "model", "net", "network", "net_state_dict", "module", "weights", "params")
"""Entries of a checkpoint that hold the network, the first one found being taken; within them only the first four."""
_AVERAGE = re.compile(r"(^|[._-])(ema|swa|shadow|averaged?|avg|teacher)([._-]|$)", re.IGNORECASE)
_OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optim", "optimizer_states", "opt")
_DEEPEST = 8
_FEW = 1000
_AGAIN = 16

Keys = tuple[Any, ...]
"""The keys that lead from the outermost table to something."""


def is_average(name: str) -> bool:
    """Whether an entry of a checkpoint is called like an averaged copy of the network.

    >>> is_average("model_ema"), is_average("shadow_params"), is_average("semantic")
    (True, True, False)
    """
    return _AVERAGE.search(name) is not None


def table_of(value: Any) -> Mapping[Any, Any] | None:
    """A table as it is, and a list of tensors or tables by its numbers."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list | tuple) and any(isinstance(entry, Tensor | Mapping) for entry in value):
        return dict(enumerate(value))
    return None


def _optimizes(value: Any) -> bool:
    """Whether this is the state of an optimizer, or of several; whatever name it has, it is no network."""
    some = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(entry, Mapping) and "param_groups" in entry for entry in some)


@dataclass
class Network:
    """Tensors that belong together, and where each lies.

    Args:
        tensors: by name; tables in tables are joined by dots.
        leaves: the keys that lead to each.
        tables: the keys that lead to each table of them, by what its names begin with.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    leaves: dict[str, Keys] = field(default_factory=dict)
    tables: dict[str, Keys] = field(default_factory=dict)


@dataclass
class Parts:
    """What a checkpoint holds.

    Args:
        path: the file, for messages.
        size: its bytes.
        network: the network.
        under: the keys that lead to it.
        joined: tables in it whose names begin those of its tensors, when no single one of them is the network.
        others: other tables of tensors, by name.
        averages: which of them are averaged copies.
        numbers: single numbers and short texts.
        optimizer: the key of the optimizer's state.
        left: what was not looked at, and why.
    """

    path: Path
    size: int
    network: Network = field(default_factory=Network)
    under: Keys = ()
    joined: list[str] = field(default_factory=list)
    others: dict[str, Network] = field(default_factory=dict)
    averages: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    optimizer: Any = None
    left: dict[str, str] = field(default_factory=dict)
    _weights: dict[int, int | None] = field(default_factory=dict)
    _listed: int = 0
    _visited: int = 0
    _bytes: int = 0

    def weight(self, value: Any) -> int | None:
        """Floating-point numbers in a table, however deep (single ones do not count); None when it has no tensor."""
        if isinstance(value, Tensor):
            return value.numel() if value.is_floating_point() and value.dim() else 0
        table = table_of(value)
        if table is None or _optimizes(value):
            return None
        if id(value) not in self._weights:
            self._weights[id(value)] = None  # for a table that holds itself
            self._listed += len(table)
            found = [held for entry in table.values() if (held := self.weight(entry)) is not None]
            self._weights[id(value)] = sum(found) if found else None
        return self._weights[id(value)]

    def choose(self, table: Mapping[Any, Any], keys: Keys = ()) -> None:
        """Take the network out of a table, or out of the tables in it."""
        inner = {k: w for k, v in table.items() if not isinstance(v, Tensor) and (w := self.weight(v)) is not None}
        plain = {key: weight for key, weight in inner.items() if not is_average(str(key))}
        direct = [self.weight(value) or 0 for value in table.values() if isinstance(value, Tensor)]
        names = UNDER if not keys else _STATES
        named = next((key for name in names for key in plain if str(key) == name), None)
        rivals = plain or (inner if not any(direct) else {})
        if named is None and direct and sum(direct) >= max(rivals.values(), default=0):
            taken = [key for key in table if key not in inner or key in plain]
            taken = [key for key in taken if not (_optimizes(table[key]) or (not keys and str(key) in _OPTIMIZERS))]
            self.under = keys
            self.flatten(self.network, {key: table[key] for key in taken}, keys, self.left)
        else:
            taken = self._tables(table, keys, plain or inner, named)
        for key, value in table.items():
            if key not in taken:
                self.beside(value, (*keys, key))

    def _tables(self, table: Mapping[Any, Any], keys: Keys, inner: Mapping[Any, int], named: Any) -> list[Any]:
        """The network is one of these tables, or all of them together; returns the keys that were taken."""
        if not inner:
            raise refusal(self.path, "it holds no tensors by name", "Save `model.state_dict()`.")
        plain = [key for key in inner if not is_average(str(key))]
        if named is None and len(plain) < 2:
            named = max(inner, key=lambda key: inner[key])
        if named is not None:
            found = table_of(table[named])
            self.choose({} if found is None else found, (*keys, named))
            return [named]
        self.under, self.joined = keys, [str(key) for key in plain]
        self.flatten(self.network, {key: table[key] for key in plain}, keys, self.left)
        return plain

    def beside(self, value: Any, keys: Keys) -> None:
        """Something that is not the network."""
        name = check_name(self.path, ".".join(map(str, keys)))
        self._spend(name, None)
        if _optimizes(value) or (len(keys) == 1 and name in _OPTIMIZERS):
            if self.optimizer is None and len(keys) == 1 and name in _OPTIMIZERS and isinstance(value, Mapping):
                self.optimizer = keys[0]
            elif value:
                self.left[name] = "the state of an optimizer that is not known to be the network's"
        elif isinstance(value, Tensor) and value.numel() == 1 and value.layout == torch.strided and not value.is_meta:
            self.numbers[name] = value.item()
        elif isinstance(value, Tensor):
            self.left[name] = "a tensor beside the network"
        elif isinstance(value, int | float) or _short(value):
            self.numbers[name] = value
        elif self.weight(value) is not None:
            self._other(name, value, keys)
        elif value is not None and value != {} and value != [] and value != ():
            self.left[name] = "no state dict"

    def _other(self, name: str, value: Any, keys: Keys) -> None:
        """A further table of tensors; of one with settings around it, as ``torch_ema`` writes it, the inner one."""
        table, average = table_of(value) or {}, is_average(str(keys[-1]))
        while not any(isinstance(entry, Tensor) for entry in table.values()) and len(keys) < _DEEPEST:
            inner = [key for key in table if self.weight(table[key]) is not None]
            averages = [key for key in inner if is_average(str(key))]
            chosen = averages if average and len(averages) == 1 else inner
            if len(chosen) != 1:
                break
            for key in table:
                if key != chosen[0]:
                    self.beside(table[key], (*keys, key))
            keys, table = (*keys, chosen[0]), table_of(table[chosen[0]]) or {}
        found, left = Network(), dict[str, str]()
        self.flatten(found, table, keys, left)
        self.left |= {f"{name}.{inner}": why for inner, why in left.items()}
        if not found.tensors:
            return
        self.others[name] = found
        self.averages += [name] if average else []

    def flatten(
        self, into: Network, table: Mapping[Any, Any], keys: Keys, left: dict[str, str], prefix: str = "", deep: int = 0
    ) -> None:
        """Tensors by name; tables in tables are joined by dots."""
        into.tables.setdefault(prefix, keys)
        for key, value in table.items():
            name = check_name(self.path, f"{prefix}{key}")
            self._spend(name, value)
            inner = table_of(value)
            if isinstance(value, Tensor) and _readable(value):
                if name in into.tensors:
                    raise refusal(self.path, f"two of its tensors are called `{name}`")
                into.tensors[name], into.leaves[name] = value.detach(), (*keys, key)
            elif isinstance(value, Tensor):
                left[name] = "a tensor that is quantised, sparse or without data"
            elif inner is not None and _optimizes(value):
                left[name] = "the state of an optimizer that is not known to be the network's"
            elif inner is not None and deep < _DEEPEST:
                self.flatten(into, inner, (*keys, key), left, f"{name}.", deep + 1)
            else:
                left[name] = f"no tensor but a {type(value).__name__}"

    def _spend(self, name: str, value: Any) -> None:
        """Refuse tables and tensors that are named over and over: they take no room in the file, but here they do."""
        self._visited += 1
        if isinstance(value, Tensor):
            self._bytes += value.numel() * value.element_size()
        if self._visited > _FEW + _AGAIN * self._listed:
            raise refusal(self.path, f"its tables of {self._listed:,} entries unfold to more than {self._visited:,}")
        if self._bytes > limit(self.size):
            raise refusal(self.path, f"`{name}` and others unfold to more than {limit(self.size):,} bytes")


def _readable(value: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_quantized and not value.is_meta


def _short(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) < 200


def split(path: Path, whole: Any, size: int) -> Parts:
    """The network in what a file of ``torch.save`` holds, and everything beside it.

    Args:
        path: the file, for messages.
        whole: what torch read.
        size: bytes of the file, which bound what its tables may unfold to.

    Raises:
        FileError: when it holds no tensors by name, or names the same ones over and over.
    """
    if not isinstance(whole, Mapping):
        raise refusal(path, f"it holds a {type(whole).__name__}, not tensors by name", "Save `model.state_dict()`.")
    for key in whole:
        check_name(path, str(key))
    parts = Parts(path, size)
    if parts.weight(whole) is None:
        raise refusal(path, "it holds no tensors by name", "Save `model.state_dict()`.")
    parts.choose(whole)
    if not parts.network.tensors:
        raise refusal(path, "it holds no tensors by name", "Save `model.state_dict()`.")
    return parts
