"""From tables (recipes, flags) to frozen dataclasses and back, with types checked and names suggested.

A plug-in or a closed choice is a name (``criterion = "snip"``) or a table whose ``use`` is the name and
whose other keys are the fields of that dataclass (``criterion = { use = "random", seed = 3 }``).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

from secateur.core.allocations import ALLOCATIONS, Allocation
from secateur.core.errors import UsageError, nearest
from secateur.core.patterns import PATTERNS, Pattern
from secateur.core.schedules import SCHEDULES, Schedule
from secateur.core.sockets import (
    Criterion,
    Method,
    Probe,
    Rule,
    Solver,
    blame,
    check_plug_in,
    find,
    load_object,
    name_of,
)

_CLOSED: dict[type, dict[str, type]] = {Pattern: PATTERNS, Allocation: ALLOCATIONS, Schedule: SCHEDULES}  # type: ignore[dict-item]
_OPEN: dict[type, str] = {Criterion: "criteria", Rule: "rules", Probe: "probes", Solver: "solvers"}


def bind(kind: type[Any], table: Mapping[str, Any], where: str) -> Any:
    """Build a dataclass from a table.

    Args:
        kind: the dataclass.
        table: its fields; those left out take their defaults.
        where: what to call the table in messages, for example ``step 2``.

    Raises:
        UsageError: for an unknown key (the nearest is suggested), a value of the wrong type, or a missing one.
    """
    known = {f.name: f for f in dataclasses.fields(kind) if f.init}
    with blame(kind):
        hints = get_type_hints(kind)
    for key in table:
        if key not in known:
            raise UsageError(f"{where} has no option {key!r}. {nearest(key, known)}")
    given = {key: value_of(hints[key], value, f"{where}.{key}") for key, value in table.items()}
    for name, f in known.items():
        if name not in given and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UsageError(f"{where} needs {name!r}; write `{name} = ...` in the recipe, or `-s {where}.{name}=...`.")
    with blame(kind):
        return kind(**given)


def value_of(hint: Any, value: Any, where: str) -> Any:
    """A value converted to a type hint.

    Raises:
        UsageError: when it does not fit; the message names the place, the value and what is wanted.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or hint is object:
        return value
    if origin in (typing.Union, types.UnionType):
        return _union(args, value, where)
    if origin is typing.Literal:
        if value not in args:
            raise UsageError(f"{where} is {value!r}; it must be one of {', '.join(map(repr, args))}.")
        return value
    if origin in (tuple, list):
        entries = value if isinstance(value, list | tuple) else [value]
        return tuple(value_of(args[0], entry, f"{where}[{i}]") for i, entry in enumerate(entries))
    if origin in (dict, Mapping) or hint is dict:
        if not isinstance(value, Mapping):
            raise UsageError(f"{where} is {value!r}; it must be a table of options.")
        return dict(value)
    if inspect.isclass(hint):
        return _instance(hint, value, where)
    raise UsageError(f"{where}: values of type {hint} cannot be given in a recipe.")


def _union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    errors = []
    for arg in args:
        if arg is type(None):
            continue
        try:
            return value_of(arg, value, where)
        except UsageError as error:
            errors.append(error)
    raise errors[0]


def _instance(hint: type, value: Any, where: str) -> Any:
    for base, table in _CLOSED.items():
        if issubclass(hint, base):
            return _chosen(base, functools.partial(_from_table, table, where, base), value, where)
    for base, socket in _OPEN.items():
        if issubclass(hint, base):
            return _chosen(base, functools.partial(find, socket), value, where)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else bind(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and value != value:
        raise UsageError(f"{where} is NaN; it must be a number.")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        wanted = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}
        raise UsageError(f"{where} is {value!r}; it must be {wanted.get(hint.__name__, hint.__name__)}.")
    return value


def _from_table(table: dict[str, type], where: str, base: type, name: str) -> Any:
    if ":" in name:
        return load_object(name)
    if name not in table:
        raise UsageError(f"{where}: no {base.__name__.lower()} is called {name!r}. {nearest(name, table)}")
    return table[name]


def _chosen(base: type, look_up: Any, value: Any, where: str) -> Any:
    if isinstance(value, base):
        return value
    if isinstance(value, str):
        value = {"use": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("use"), str):
        raise UsageError(f'{where} is {value!r}; give a name, or a table with `use = "name"` and its options.')
    kind = look_up(value["use"])
    check_plug_in(kind, base, value["use"])
    return bind(kind, {key: entry for key, entry in value.items() if key != "use"}, where)


def table_of(thing: Any, defaults: bool = False) -> Any:
    """The inverse of :func:`bind`: plain values, fields at their default left out unless asked for."""
    if isinstance(thing, Mapping):
        return {key: table_of(value, defaults) for key, value in thing.items()}
    if isinstance(thing, tuple | list):
        return [table_of(entry, defaults) for entry in thing]
    if not dataclasses.is_dataclass(thing) or isinstance(thing, type):
        return thing
    table: dict[str, Any] = {}
    name = _name(thing)
    if name:
        table["use"] = name
    for f in dataclasses.fields(thing):
        value = getattr(thing, f.name)
        if value is None or (not defaults and _is_default(thing, f, value)):
            continue
        table[f.name] = table_of(value, defaults)
    return table


def _is_default(thing: Any, f: dataclasses.Field[Any], value: Any) -> bool:
    if "default" in f.metadata:  # one that depends on other fields
        return bool(value == f.metadata["default"](thing))
    if f.default is not dataclasses.MISSING:
        return bool(value == f.default)
    return f.default_factory is not dataclasses.MISSING and bool(value == f.default_factory())


def _name(thing: Any) -> str:
    for base, table in _CLOSED.items():
        if isinstance(thing, base):
            inside = [name for name, kind in table.items() if kind is type(thing)]
            return inside[0] if inside else f"{type(thing).__module__}:{type(thing).__qualname__}"
    return name_of(thing) if isinstance(thing, Method) else ""


def set_option(table: dict[str, Any], path: str, text: str) -> None:
    """Carry out ``-s a.b=value`` on a table; a number in the path is a place in a list, counted from 1.

    Raises:
        UsageError: when the path leads through something that is not a table.
    """
    parts = path.split(".")
    here: Any = table
    for i, part in enumerate(parts[:-1]):
        if isinstance(here, list):
            here = _entry(here, part, path)
            continue
        inner = here.get(part)
        if isinstance(inner, str):
            inner = here[part] = {"use": inner}
        elif inner is None:
            inner = here[part] = {}
        if not isinstance(inner, dict | list):
            raise UsageError(f"`-s {path}`: {'.'.join(parts[: i + 1])!r} is {inner!r}, not a table.")
        here = inner
    if isinstance(here, list):
        raise UsageError(
            f"`-s {path}`: name an option of one entry, for example `{'.'.join(parts[:-1])}.1.{parts[-1]}`."
        )
    here[parts[-1]] = parse_value(text)


def _entry(entries: list[Any], part: str, path: str) -> Any:
    if not part.isdigit() or not 1 <= int(part) <= len(entries):
        raise UsageError(f"`-s {path}`: {part!r} must be a number from 1 to {len(entries)}.")
    entry = entries[int(part) - 1]
    if isinstance(entry, str):
        entry = entries[int(part) - 1] = {"use": entry}
    if not isinstance(entry, dict):
        raise UsageError(f"`-s {path}`: entry {part} is {entry!r}, not a table.")
    return entry


def parse_value(text: str) -> Any:
    """A value as TOML reads it; bare words are text.

    >>> parse_value("1e-3"), parse_value("true"), parse_value("snip"), parse_value("[1, 2]")
    (0.001, True, 'snip', [1, 2])
    """
    import tomllib

    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
