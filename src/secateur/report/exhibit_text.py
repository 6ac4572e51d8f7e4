"""Galleries and explorers in words, for the terminal."""

from __future__ import annotations

from secateur.report.exhibits import Explorer, Gallery, Item
from secateur.report.numbers import shorten

SHOWN, NAME = 10, 40


def lines(gallery: Gallery | None, explorer: Explorer | None) -> list[str]:
    """What the page shows as pictures and points, a line each; of a gallery its beginning."""
    said = []
    if gallery is not None:
        said += [gallery.caption, *map(_item, gallery.items[:SHOWN])]
        rest = len(gallery.items) - SHOWN
        said += [f"{rest:,} more on the page."] if rest > 0 else []
    if explorer is not None:
        said += [explorer.says, "The page shows them side by side, to be chosen, filtered and coloured."]
    return said


def _item(item: Item) -> str:
    answers = "; ".join(f"{shorten(a.network, NAME)} {shorten(a.answer, NAME)} ({a.text})" for a in item.answers)
    before = f", after “{item.text}”" if item.text else ""
    return f"{item.name}{before}: label {shorten(item.label, NAME)}; {answers}"
