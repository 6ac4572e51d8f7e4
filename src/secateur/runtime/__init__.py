"""Runs a planned sparse network on a CPU: a small graph, its file, a NumPy reference.

Nothing here imports torch, and names are imported when first used.
"""

import importlib
from typing import Any

_PLACES = {
    "Graph": "graph",
    "GraphError": "graph",
    "InputSpec": "graph",
    "Node": "graph",
    "WeightSpec": "graph",
    "Reference": "reference",
    "Session": "session",
    "load": "session",
    "measured": "paths",
    "RuntimeFileError": "planfile",
}

__all__ = [*_PLACES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"secateur.runtime.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'secateur.runtime' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
