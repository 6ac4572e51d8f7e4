"""Writing TOML (the standard library only reads it)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def dump(table: Mapping[str, Any]) -> str:
    """TOML text for plain values: scalars first, then tables, then arrays of tables; nothing else.

    >>> print(dump({"seed": 0, "model": {"use": "mlp"}, "step": [{"do": "train", "lr": 0.1}]}), end="")
    seed = 0
    <BLANKLINE>
    [model]
    use = "mlp"
    <BLANKLINE>
    [[step]]
    do = "train"
    lr = 0.1
    """
    lines = [f"{_key(k)} = {_value(v)}" for k, v in table.items() if v is not None and not _is_section(v)]
    for name, value in table.items():
        if not _is_section(value):
            continue
        for entry in value if isinstance(value, list) else [value]:
            head = f"[[{_key(name)}]]" if isinstance(value, list) else f"[{_key(name)}]"
            lines += ["", head, *(f"{_key(k)} = {_value(v)}" for k, v in entry.items() if v is not None)]
    return "\n".join(lines).lstrip("\n") + "\n"


def _is_section(value: Any) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)
    )


def _key(name: str) -> str:
    bare = name and all(c.isascii() and (c.isalnum() or c in "_-") for c in name)
    return name if bare else _text(name)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return (
            "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None) + " }"
            if value
            else "{}"
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    return _text(str(value))


def _text(text: str) -> str:
    """A basic string: as in JSON, but TOML also wants the delete character escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
