"""Writes `docs/methods.md` from the method files; `--check` fails when the page is stale."""

from __future__ import annotations

import pathlib
import sys

from secateur.cli.card import card_of
from secateur.core.sockets import SOCKETS, names

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "methods.md"


def page() -> str:
    """The page as text."""
    lines = ["# Methods", "", "Made by `make docs` from the method files. `secateur methods NAME` shows the same."]
    for socket in filter(names, SOCKETS):
        lines += ["", f"## {socket.capitalize()}"]
        for name in names(socket):
            card = card_of(socket, name)
            paper = card["paper"]
            lines += ["", f"### `{name}`", "", card["about"], ""]
            lines += [f"- option `{o['name']}: {o['type']} = {o['default']}`" for o in card["options"]]
            lines += [
                f"- needs: {', '.join(card['needs']) or 'nothing'}",
                f"- paper: {paper['authors']}: *{paper['title']}*, {paper['year']}, {paper['where']}",
                f"- differs: {paper['differs']}",
            ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page, or check it."""
    text = page()
    if "--check" in sys.argv:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            print(f"{PAGE.name} is stale: run `make docs`")
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
