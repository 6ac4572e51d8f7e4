"""Writes galleries and the place of the explorer into the page."""

from __future__ import annotations

from html import escape

from secateur.report.exhibits import Answer, Explorer, Gallery, Item
from secateur.report.numbers import shorten

NAME, LARGEST = 40, 64
"""Characters of a name that a card has room for; longest side of a picture on the page."""
NOSCRIPT = "The points are drawn by a script, which this browser does not run; the figures are in the table above."


def gallery(found: Gallery) -> str:
    """Cards with the picture, the label and what each network answers."""
    cards = "".join(f"<li>{_card(item)}</li>" for item in found.items)
    return f'<p class="caption">{escape(found.caption)}</p><ul class="gallery">{cards}</ul>'


def _card(item: Item) -> str:
    answers = "".join(f"<dt>{_named(a.network)}</dt><dd>{_answer(a)}</dd>" for a in item.answers)
    lines = f'<dl><dt>label</dt><dd>{_named(item.label)}</dd>{answers}</dl><p class="place">{escape(item.name)}</p>'
    text = f'<p class="before">{escape(item.text)}</p>' if item.text else ""
    return f"{_picture(item)}<div>{text}{lines}</div>"


def _picture(item: Item) -> str:
    if not item.picture:
        return ""
    factor = LARGEST / max(item.width, item.height, 1)
    width, height = (max(1, round(side * factor)) for side in (item.width, item.height))
    label = escape(f"{item.name}, label {shorten(item.label, NAME)}", quote=True)
    source = escape(item.picture, quote=True)
    return f'<img src="{source}" alt="{label}" width="{width}" height="{height}" loading="lazy" decoding="async">'


def _answer(answer: Answer) -> str:
    tone = "good" if answer.right else "bad"
    word = "right" if answer.right else "wrong"
    return f'{_named(answer.answer)} <span class="{tone}">{word}</span> <small>{escape(answer.text)}</small>'


def _named(name: str) -> str:
    """A name that fits; the whole one is told when it is pointed at."""
    if len(name) <= NAME:
        return escape(name)
    return f'<span title="{escape(name, quote=True)}">{escape(shorten(name, NAME))}</span>'


def explorer(found: Explorer) -> str:
    """The place that the script fills, and what there is to know without it."""
    more = "".join(f"<li>{escape(line)}</li>" for line in found.more)
    about = f'<p class="caption">{escape(found.says)}</p>' + (f'<ul class="more">{more}</ul>' if more else "")
    return f'<div class="explore"><noscript><p>{escape(NOSCRIPT)}</p></noscript></div>{about}'
