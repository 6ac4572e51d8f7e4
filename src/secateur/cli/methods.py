"""``secateur methods``."""

import argparse
import ast
import importlib.util
import json
from pathlib import Path

from secateur.core.errors import UsageError, nearest
from secateur.core.sockets import SOCKETS, names


def run(request: argparse.Namespace) -> int:
    """List all methods (without importing them), or show one card."""
    listed = {socket: {name: _first_line(socket, name) for name in names(socket)} for socket in SOCKETS}
    listed = {socket: methods for socket, methods in listed.items() if methods}
    if request.name is None:
        if request.json:
            print(json.dumps(listed, indent=2))
            return 0
        for socket, methods in listed.items():
            print(socket)
            for name, line in methods.items():
                print(f"  {name:<12} {line}")
        print("\nsecateur methods NAME shows the card of one; a method of your own is `module:Class`.")
        return 0
    from secateur.cli.card import card_of, show

    found = [socket for socket, methods in listed.items() if request.name in methods]
    if not found and ":" not in request.name:
        every = [name for methods in listed.values() for name in methods]
        raise UsageError(f"no method is called {request.name!r}. {nearest(request.name, every)}")
    card = card_of(found[0] if found else "", request.name)
    print(json.dumps(card, indent=2)) if request.json else show(card)
    return 0


def _first_line(socket: str, name: str) -> str:
    spec = importlib.util.find_spec(f"secateur.{socket}")
    place = Path(next(iter(spec.submodule_search_locations or []))) if spec else Path()
    return (ast.get_docstring(ast.parse((place / f"{name}.py").read_text(encoding="utf-8"))) or "").partition("\n")[0]
