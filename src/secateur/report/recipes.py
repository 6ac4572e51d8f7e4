"""What a recipe did, in a few words, and which recipes differ in seed or target only. Reads tables, builds nothing."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from secateur.report.numbers import shorten
from secateur.report.source import as_table

# Of these a run with another seed has other ones, although it asked for the same.
_OF_A_RUN = ("seed", "load", "teacher", "secateur")
# Where on a curve a run lies.
_TARGETS = ("to", "sparsity", "target", "n", "m")
_SHOWN = 3
_WIDTH = 40


def read_toml(text: str) -> dict[str, Any]:
    """A recipe's table; empty when it is damaged."""
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError):
        return {}


def method_of(recipe: Mapping[str, Any]) -> str:
    """What pruned the network, by the names that the recipe gives.

    >>> method_of({"step": [{"do": "train", "rules": [{"use": "gradual"}, "distill"]}, {"do": "measure"}]})
    'gradual + distill'
    >>> method_of({"step": [{"do": "prune", "solver": "obs"}, {"do": "shrink"}]})
    'obs + shrink magnitude'
    """
    words: list[str] = []
    for step in _steps(recipe):
        kind = step.get("do")
        if kind == "prune":
            words.append(" ".join(_named(step, ("solver", "criterion"), "magnitude")))
        elif kind == "shrink":
            words.append(" ".join(["shrink", *_named(step, ("criterion",), "magnitude")]))
        elif kind == "rewind":
            words.append("rewind")
        rules = step.get("rules")
        for rule in rules if isinstance(rules, list) else []:
            words.append(" ".join([_use(rule), *_named(as_table(rule), ("criterion",), "")]))
    return " + ".join(dict.fromkeys(word for word in words if word)) or "no pruning"


def _named(step: Mapping[str, Any], keys: Sequence[str], default: str) -> list[str]:
    """The first of some choices that is made, and the pattern and the allocation where they are."""
    first = next((_use(step[key]) for key in keys if key in step), default)
    more = [_use(step[key]) for key in ("pattern", "allocation") if key in step]
    return [word for word in (first, *more) if word]


def _use(entry: Any) -> str:
    name = entry if isinstance(entry, str) else as_table(entry).get("use")
    return name if isinstance(name, str) else ""


def setting_of(recipe: Mapping[str, Any]) -> str:
    """Equal for recipes that differ in seed and origin of the weights only; measurements do not count."""
    return json.dumps(_flat(recipe, ()), sort_keys=True)


def curve_of(recipe: Mapping[str, Any]) -> str:
    """Equal for recipes that besides differ in what they aim at."""
    return json.dumps(_flat(recipe, _TARGETS), sort_keys=True)


def targets(recipe: Mapping[str, Any]) -> str:
    """What a recipe aims at, as it is written there.

    >>> targets({"step": [{"do": "train", "rules": [{"use": "gradual", "sparsity": 0.95}]}]})
    'sparsity 0.95'
    """
    told = []
    for path, value in _walk({"step": _steps(recipe)}, ""):
        key = path.rpartition(".")[2]
        if key in _TARGETS:
            told.append(str(value) if key == "to" else f"{key} {value}")
    told = list(dict.fromkeys(told))
    return ", ".join(told if len(told) <= _SHOWN else [told[0], "…", told[-1]])


def telling(curves: Sequence[str]) -> list[str]:
    """For curves of one method, the options in which they differ; an empty text for one alone.

    >>> telling(['{"step.1.lr": 0.1, "a": 1}', '{"step.1.lr": 0.2, "a": 1}'])
    ['lr 0.1', 'lr 0.2']
    """
    tables = [as_table(_json(curve)) for curve in curves]
    keys = dict.fromkeys(key for table in tables for key in table)
    differing = [key for key in keys if len({json.dumps(table.get(key)) for table in tables}) > 1]
    told = []
    for table in tables:
        parts = list(dict.fromkeys(f"{_short(key)} {_brief(table[key])}" for key in differing if key in table))
        told.append(", ".join(parts[:_SHOWN]) + (" …" if len(parts) > _SHOWN else ""))
    return told


def _short(path: str) -> str:
    return next((word for word in reversed(path.split(".")) if not word.isdigit()), path)


def _brief(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return shorten(text, _WIDTH)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _steps(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = recipe.get("step")
    return (
        [as_table(step) for step in found if as_table(step).get("do") != "measure"] if isinstance(found, list) else []
    )


def _flat(recipe: Mapping[str, Any], without: Iterable[str]) -> dict[str, Any]:
    table = {**{key: value for key, value in recipe.items() if key != "step"}, "step": _steps(recipe)}
    left_out = {*_OF_A_RUN, *without}
    return {path: value for path, value in _walk(table, "") if path.rpartition(".")[2] not in left_out}


def _walk(entry: Any, path: str) -> Iterable[tuple[str, Any]]:
    """Leaves of a table with their dotted paths; lists count from 1."""
    if isinstance(entry, Mapping):
        for key, value in entry.items():
            yield from _walk(value, f"{path}.{key}" if path else str(key))
    elif isinstance(entry, list) and any(isinstance(item, Mapping | list) for item in entry):
        for number, value in enumerate(entry, 1):
            yield from _walk(value, f"{path}.{number}")
    else:
        yield path, entry if isinstance(entry, str | int | float | bool | list) else str(entry)
