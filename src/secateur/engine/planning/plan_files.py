"""Plans on disk: JSON, written whole or not at all; nothing in a file that is read is believed."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, get_args

from secateur.core.errors import FileError, SecateurError
from secateur.core.files import read_json, write_json
from secateur.core.patterns import parse_pattern
from secateur.core.sockets import Criterion, Solver
from secateur.engine.binding import table_of, value_of
from secateur.engine.compensating import Inputs
from secateur.engine.planning.plans import UNITS, Figure, LayerChoice, LayerPlan, Other, Removal
from secateur.engine.planning.targets import parse_aim

__all__ = ["FORMAT", "plan_of_table", "read_plan_file", "table_of_plan", "write_plan_file"]

FORMAT = "secateur.layer-plan/1"
KINDS = ("channels", "heads", "depth")
MOST_THREADS = 256
"""As many as the compiled core starts."""
_LARGEST = 64 << 20
"""Bytes: a plan has some hundred for each tensor."""


def write_plan_file(path: str | PathLike[str], plan: LayerPlan) -> None:
    """Write a plan, whole or not at all.

    Raises:
        FileError: when it cannot be written.
    """
    write_json(Path(path), table_of_plan(plan))


def read_plan_file(path: str | PathLike[str]) -> LayerPlan:
    """Read a plan.

    Raises:
        FileError: when it is missing, damaged, of another format, or says what no plan says.
    """
    place = Path(path)
    try:
        size = place.stat().st_size
    except OSError as error:
        raise FileError(f"cannot read the plan {place}: {error.strerror or error}.") from error
    if not place.is_file() or size > _LARGEST:
        raise FileError(f"{place} is no plan: it is {'no file' if not place.is_file() else f'{size:,} bytes large'}.")
    try:
        return plan_of_table(read_json(place))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError, SecateurError) as error:
        if isinstance(error, FileError):
            raise
        why = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise FileError(f"{place} is not a sound plan: {why}. Make it again with `secateur plan`.") from error


def table_of_plan(plan: LayerPlan) -> dict[str, Any]:
    """A plan as plain values."""
    removal = plan.removal
    return {
        "format": FORMAT, "target": plan.target, "patterns": list(plan.patterns), "weights": plan.weights,
        "criterion": _named(plan.criterion), "solver": None if plan.solver is None else _named(plan.solver),
        "inputs": plan.inputs, "machine": dict(plan.machine), "exact": plan.exact,
        "figures": {name: dict(vars(figure)) for name, figure in plan.figures.items()},
        "layers": [_layer_table(layer) for layer in plan.layers], "left_alone": dict(plan.left_alone),
        "removal": None if removal is None else {
            "to": removal.to, "kinds": list(removal.kinds), "criterion": _named(removal.criterion),
            "groups": {name: list(pair) for name, pair in removal.groups.items()}, "rise": removal.rise,
            "blocks": list(removal.blocks), "units": {name: list(gone) for name, gone in removal.units.items()},
        },
        "others": [dict(vars(other)) for other in plan.others], "notes": list(plan.notes),
        "data": dict(plan.data), "masks": plan.masks,
    }  # fmt: skip


def plan_of_table(table: Any) -> LayerPlan:
    """The inverse of :func:`table_of_plan`.

    Raises:
        ValueError, KeyError, SecateurError: when the table is none of a plan.
    """
    top = _table(table, "it")
    if top.get("format") != FORMAT:
        raise ValueError(f"its format is {str(top.get('format'))[:40]!r}; this version reads {FORMAT}")
    layers = tuple(_layer(row) for row in _list(top["layers"], "layers"))
    if not layers:
        raise ValueError("it names no layer")
    if len({layer.name for layer in layers}) != len(layers):
        raise ValueError("a tensor stands in it twice")
    solver, inputs, figures = top["solver"], top["inputs"], _table(top["figures"], "figures")
    if not {"loss", "macs", "params"} <= set(figures) <= set(UNITS):
        raise ValueError("its figures are not those of a plan")
    if inputs not in get_args(Inputs):
        raise ValueError(f"inputs is {str(inputs)[:40]!r}")
    words = tuple(word if word in KINDS else _word(word) for word in _list(top["patterns"], "patterns"))
    parse_aim(_text(top["target"], "target"))
    return LayerPlan(
        target=top["target"], patterns=words,
        layers=layers, left_alone=_texts(top["left_alone"], "left_alone"),
        figures={name: _figure(row, name) for name, row in figures.items()},
        others=tuple(_other(row) for row in _list(top["others"], "others")), weights=_text(top["weights"], "weights"),
        criterion=_method(Criterion, top["criterion"], "criterion"),
        solver=None if solver is None else _method(Solver, solver, "solver"), inputs=inputs,
        removal=None if top["removal"] is None else _removal(_table(top["removal"], "removal")),
        exact=bool(top["exact"]), machine=_machine(_table(top["machine"], "machine")),
        notes=tuple(_text(note, "a note") for note in _list(top["notes"], "notes")),
        data=_data(_table(top.get("data", {}), "data")), masks=_text(top.get("masks", ""), "masks"),
    )  # fmt: skip


def _named(method: Any) -> Any:
    return table_of(method)


def _method(kind: type[Any], value: Any, what: str) -> Any:
    """A criterion or solver by its name; of classes from outside only those whose module is imported already."""
    for word in _strings(value):
        module, apart, _ = word.partition(":")
        if apart and not module.isdigit() and module not in sys.modules:
            raise ValueError(
                f"its {what} is {word[:80]!r}, and nothing is imported because a file says so. Name it yourself with "
                f"`--{what.rpartition('.')[2]} {word[:80]}`, or import {module[:80]} first in Python"
            )
    return value_of(kind, value, what)


def _strings(thing: Any) -> Iterator[str]:
    """All texts in nested tables and lists."""
    if isinstance(thing, str):
        yield thing
    elif isinstance(thing, dict | list):
        for entry in thing.values() if isinstance(thing, dict) else thing:
            yield from _strings(entry)


def _machine(table: Mapping[str, Any]) -> dict[str, Any]:
    """What milliseconds are of: numbers of which a session can be opened, and texts."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        what = f"machine.{key[:40]}"
        if key == "threads" and value is None:
            found[key] = None
        elif key in ("batch", "threads"):
            found[key] = _count(value, what, 1)
        else:
            plain = isinstance(value, int | float) and key not in ("engine", "isa", "name")
            found[key] = _number(value, what) if plain else _text(value, what)
    if (found.get("threads") or 1) > MOST_THREADS:
        raise ValueError(f"machine.threads is {found['threads']:,}, more than {MOST_THREADS:,}")
    return found


def _data(table: Mapping[str, Any]) -> dict[str, Any]:
    """Which examples it was made with; an empty table where that is not told."""
    if not table:
        return {}
    if not isinstance(table["seed"], int) or isinstance(table["seed"], bool):
        raise ValueError(f"data.seed is {str(table['seed'])[:40]!r}, no whole number")
    count = _count(table["examples"], "data.examples", 1)
    return {"examples": count, "seed": table["seed"], "digest": _text(table["digest"], "data.digest")}


def _layer_table(layer: LayerChoice) -> dict[str, Any]:
    about = {"name": layer.name, "shape": list(layer.shape), "pattern": layer.pattern, "kept": layer.kept}
    return {
        **about,
        "loss": layer.loss,
        "before": dict(layer.before),
        "after": dict(layer.after),
        **({"why": layer.why} if layer.why else {}),
    }


def _layer(row: Any) -> LayerChoice:
    table = _table(row, "a layer")
    name = _text(table["name"], "the name of a layer")
    shape = tuple(_count(size, f"the shape of {name[:80]!r}", 1) for size in _list(table["shape"], "a shape"))
    total = math.prod(shape)
    kept = _count(table["kept"], f"the weights kept of {name[:80]!r}", 1)
    word = _text(table["pattern"], "a pattern")
    if kept > total or (not word and kept != total):
        raise ValueError(f"{name[:80]!r} keeps {kept:,} of {total:,} weights")
    costs = [{key: _number(n, key) for key, n in _table(table[when], when).items()} for when in ("before", "after")]
    if not all({"bytes", "macs"} <= set(cost) for cost in costs):
        raise ValueError(f"{name[:80]!r} lacks bytes or macs")
    why = _text(table.get("why", ""), "a reason")
    return LayerChoice(
        name, shape, _word(word) if word else "", kept, _number(table["loss"], "loss"), costs[0], costs[1], why
    )


def _figure(row: Any, name: str) -> Figure:
    table = _table(row, name)
    fields = ("before", "forecast", "low", "high", "measured")
    return Figure(**{key: None if table.get(key) is None else _number(table[key], f"{name}.{key}") for key in fields})


def _other(row: Any) -> Other:
    table = _table(row, "another choice")
    rise, low, high = (
        None if table[key] is None else float(_number(table[key], key)) for key in ("rise", "low", "high")
    )
    what, quantity = _text(table["what"], "what"), _text(table["quantity"], "quantity")
    if quantity not in UNITS:
        raise ValueError(f"another choice is told in {quantity[:40]!r}")
    figure = float(_number(table["figure"], "figure"))
    return Other(what, bool(table["met"]), quantity, figure, rise, low, high)


def _removal(table: Mapping[str, Any]) -> Removal:
    groups = {}
    for name, pair in _table(table["groups"], "groups").items():
        kept, units = (_count(n, "units", 0) for n in _list(pair, "units"))
        if kept > units:
            raise ValueError(f"{name[:80]!r} keeps {kept:,} of {units:,} units")
        groups[name] = (kept, units)
    units = {}
    for name, gone in _table(table.get("units", {}), "units").items():
        units[name] = tuple(_count(n, "a unit", 0) for n in _list(gone, "units"))
        kept, every = groups.get(name, (0, 0))
        if len(set(units[name])) != every - kept or any(n >= every for n in units[name]):
            raise ValueError(f"{name[:80]!r} loses other units than its counts say")
    kinds = tuple(_text(kind, "a kind of units") for kind in _list(table["kinds"], "kinds"))
    criterion = _method(Criterion, table["criterion"], "removal.criterion")
    blocks = tuple(_text(path, "a block") for path in _list(table["blocks"], "blocks"))
    rise = float(_number(table["rise"], "rise"))
    return Removal(_text(table["to"], "to"), kinds, criterion, groups, rise, blocks, units)


def _word(thing: Any) -> str:
    return str(parse_pattern(_text(thing, "a pattern")))


def _table(thing: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(thing, dict):
        raise ValueError(f"{what} is no table")
    return thing


def _list(thing: Any, what: str) -> list[Any]:
    if not isinstance(thing, list):
        raise ValueError(f"{what} is no list")
    return thing


def _text(thing: Any, what: str) -> str:
    if not isinstance(thing, str):
        raise ValueError(f"{what} is no text")
    return thing


def _texts(thing: Any, what: str) -> dict[str, str]:
    return {name: _text(value, what) for name, value in _table(thing, what).items()}


def _count(thing: Any, what: str, least: int) -> int:
    if not isinstance(thing, int) or isinstance(thing, bool) or not least <= thing < 2**48:
        raise ValueError(f"{what} is {str(thing)[:40]!r}, no whole number of at least {least}")
    return thing


def _number(thing: Any, what: str) -> float | int:
    if not isinstance(thing, int | float) or isinstance(thing, bool) or not math.isfinite(thing):
        raise ValueError(f"{what} is {str(thing)[:40]!r}, no finite number")
    return thing
