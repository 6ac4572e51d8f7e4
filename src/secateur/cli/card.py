"""The card of one method: what, cost, options, paper."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from secateur.core.errors import UsageError
from secateur.core.reading import Paper
from secateur.core.sockets import SOCKETS, Method, blame, check_plug_in, find, load_object


def card_of(socket: str, name: str) -> dict[str, Any]:
    """The card of a method of a socket, or of ``module:Class``.

    Raises:
        UsageError: when it is no method.
    """
    kind: Any = find(socket, name) if socket else load_object(name)
    if not (inspect.isclass(kind) and issubclass(kind, Method)):
        raise UsageError(f"{name!r} is not a method; derive it from {', '.join(k.__name__ for k in SOCKETS.values())}.")
    check_plug_in(kind, Method, name)
    with blame(kind):
        fields = [_option(f) for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
        needs = sorted(kind.needs)
    paper = getattr(kind, "paper", None)
    if not isinstance(paper, Paper | None):
        raise UsageError(f"{name!r}: its paper is {paper!r}; write `paper = Paper(...)`, or leave it out.")
    return {
        "name": name,
        "socket": socket,
        "about": inspect.getdoc(kind) or "",
        "needs": needs,
        "options": fields,
        "paper": dataclasses.asdict(paper) if paper is not None else None,
    }


def _option(f: dataclasses.Field[Any]) -> dict[str, Any]:
    if f.default is not dataclasses.MISSING:
        default = repr(f.default)
    else:
        default = repr(f.default_factory()) if f.default_factory is not dataclasses.MISSING else None
    return {"name": f.name, "type": getattr(f.type, "__name__", str(f.type)), "default": default}


def show(card: dict[str, Any]) -> None:
    """Print a card."""
    print(f"{card['name']} ({card['socket'] or 'from outside'})\n\n{card['about']}\n")
    for option in card["options"]:
        print(f"option {option['name']}: {option['type']} = {option['default']}")
    print(f"needs {', '.join(card['needs']) or 'nothing'}")
    if card["paper"]:
        p = card["paper"]
        print(f"paper {p['authors']}: {p['title']}, {p['year']}, {p['where']}\ndiffers {p['differs']}")
