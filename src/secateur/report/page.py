"""Writes a report as one HTML page that needs nothing beside it: no network, no fonts, no scripts from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html import escape
from importlib.resources import files

from secateur import __version__
from secateur.report import exhibit_html
from secateur.report.counts import heat, histogram
from secateur.report.sections import Cell, Chart, Column, Heat, Histogram, Report, Section, Table, Tile, Tradeoff
from secateur.report.svg import figure

LONG = 200
EXPLORE = "words.js+explore_data.js+explore_panel.js+explore_side.js+explore.js"
_IDS = ("report", "report-title", "notes", "notes-title", "heat-large", "heat-large-title")
"""Ids that the page has beside those of its sections."""
_FOOT = "The same figures are in the JSON file beside this page and inside it."
_UNIT = re.compile(r"(\d) (?=(?:%|ms|s|[kMGTP]?B|[kMGTP]|points)\b|%)")


def to_html(report: Report) -> str:
    """The page."""
    wanted, title = _assets(report), escape(report.title)
    style = "".join(_asset(name) for name in wanted if name.endswith(".css"))
    scripts = [_asset(name) for name in wanted if name.endswith(".js")]
    # The policy lets nothing load and no script run but our own, so even a hostile layer name stays text.
    allowed = " ".join(map(_digest, scripts))
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; img-src data:"
    lines = [
        "<!doctype html>",
        '<html lang="en">',
        '<head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',
        f"<title>{title}</title>",
        f"<style>{style}</style></head>",
        f'<body><header><h1>{title}</h1><p class="where">{escape(report.folder)}</p>{_contents(report)}</header>',
        f"<main>{''.join(map(_section, report.sections, _anchors(report)))}{_notes(report)}</main>",
        f"<footer><p>Made by secateur {escape(__version__)}. {_FOOT}</p></footer>",
        f'<script type="application/json" id="report">{embedded(report)}</script>',
        *(f"<script>{script}</script>" for script in scripts),
        "</body></html>",
    ]
    return "\n".join(lines) + "\n"


def to_json(report: Report) -> str:
    """The report as one line of JSON."""
    return json.dumps(report.to_json(), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def embedded(report: Report) -> str:
    """The same JSON, safe inside a script element: no text in it can end the element or begin a comment."""
    text = to_json(report)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _assets(report: Report) -> list[str]:
    """Style sheets and scripts that the page needs, in their order."""
    wanted = ["page.css", "page.js"]
    if any(isinstance(chart, Heat) for section in report.sections for chart in section.chart):
        wanted += ["heat.css", "words.js+heat.js"]
    if any(section.gallery is not None or section.explorer is not None for section in report.sections):
        wanted.append("explore.css")
    if any(section.explorer is not None for section in report.sections):
        wanted += ["vendor/d3.min.js", EXPLORE]
    if any(isinstance(chart, Tradeoff) and chart.choice for section in report.sections for chart in section.chart):
        wanted += ["compare.css", "choose.js"]
    if any(section.overlay is not None for section in report.sections):
        wanted.append("words.js+overlay.js")
    return wanted


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    """An asset, or several joined by + as one script whose names are not seen outside."""
    folder = files("secateur.report").joinpath("assets")
    texts = [folder.joinpath(part).read_text(encoding="utf-8") for part in name.split("+")]
    return texts[0] if len(texts) == 1 else '"use strict";\n{\n' + "\n".join(texts) + "}\n"


def _contents(report: Report) -> str:
    named = zip(report.sections, _anchors(report), strict=True)
    links = "".join(f'<li><a href="#{name}">{escape(section.title)}</a></li>' for section, name in named)
    return f'<nav aria-label="Sections"><ul>{links}</ul></nav>' if links else ""


def _anchors(report: Report) -> list[str]:
    """The id of each section; titles that differ in signs alone, or not at all, are numbered."""
    taken, found = set(_IDS), []
    for section in report.sections:
        name = plain = _anchor(section.title)
        number = 1
        while not taken.isdisjoint((name, f"{name}-title")):
            number += 1
            name = f"{plain}-{number}"
        taken |= {name, f"{name}-title"}
        found.append(name)
    return found


def _anchor(title: str) -> str:
    plain = "".join(c if c.isalnum() else "-" for c in title.lower())
    return plain if plain.strip("-") else "section"


def _section(section: Section, name: str) -> str:
    parts = [f'<p class="says">{_prose(section.says)}</p>', _tiles(section.tiles), _paragraphs(section.more)]
    parts.append(_table(section.table) if section.table is not None else "")
    if section.chart:
        parts.append(f'<div class="charts">{"".join(map(_figure, section.chart))}</div>')
    parts += [exhibit_html.gallery(section.gallery)] if section.gallery is not None else []
    parts += [exhibit_html.explorer(section.explorer)] if section.explorer is not None else []
    parts += ['<div class="overlay"></div>'] if section.overlay is not None else []
    parts += [_copied(caption, text) for caption, text in section.texts]
    if section.source:
        parts.append(f'<p class="source">Read from {escape(", ".join(section.source))}</p>')
    return _frame(name, section.title, "".join(parts))


def _figure(chart: Chart) -> str:
    if isinstance(chart, Heat):
        return heat(chart)
    return histogram(chart) if isinstance(chart, Histogram) else figure(chart)


def _frame(name: str, title: str, body: str) -> str:
    head = f'<h2 id="{name}-title">{escape(title)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">{head}{body}</section>\n'


def _copied(caption: str, text: str) -> str:
    label = escape(caption, quote=True)
    return f'<h3>{label}</h3><pre tabindex="0" role="region" aria-label="{label}">{escape(text.rstrip())}</pre>'


def _tiles(tiles: tuple[Tile, ...]) -> str:
    if not tiles:
        return ""
    return '<dl class="tiles">' + "".join(map(_tile, tiles)) + "</dl>"


def _tile(tile: Tile) -> str:
    parts = (f"<span>{escape(part)}</span>" for part in tile.beside.split(" · "))
    beside = f'<dd class="beside">{" · ".join(parts)}</dd>' if tile.beside else ""
    return f'<div><dt>{escape(tile.label)}</dt><dd class="big">{escape(tile.text)}</dd>{_tone(tile.tone)}{beside}</div>'


def _tone(tone: str) -> str:
    return f'<dd class="tone {_kind(tone)}">{escape(tone)}</dd>' if tone else ""


def _kind(tone: str) -> str:
    good, bad = ("better", "faster", "smaller", "fewer"), ("worse", "slower", "larger", "more")
    return "good" if tone in good else "bad" if tone in bad else "even"


def _paragraphs(lines: tuple[str, ...]) -> str:
    if not lines:
        return ""
    return '<ul class="more">' + "".join(f"<li>{_prose(line)}</li>" for line in lines) + "</ul>"


def _prose(text: str) -> str:
    """Escaped text in which a figure is never parted from its unit at the end of a line."""
    return _UNIT.sub("\\1\u00a0", escape(text))


def _table(table: Table) -> str:
    heads = "".join(f'<th scope="col"{_class(column)}>{escape(column.name)}</th>' for column in table.columns)
    rows = "".join(f"<tr>{_cells(row, table.columns)}</tr>" for row in table.rows)
    total = f"<tfoot><tr>{_cells(table.total, table.columns)}</tr></tfoot>" if table.total else ""
    caption = f'<p class="caption">{escape(table.caption)}</p>' if table.caption else ""
    sort = " data-sortable" if table.sortable else ""
    sort += " data-tools" if table.tools else ""
    label = escape(table.caption or "Table", quote=True)
    grid = f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody>{total}"
    area = f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">'
    return f'{caption}{area}<table{sort} aria-label="{label}">{grid}</table></div>'


def _class(column: Column) -> str:
    return ' class="number"' if column.numeric else ""


def _cells(row: tuple[Cell, ...], columns: tuple[Column, ...]) -> str:
    return "".join(_cell(cell, column, i == 0) for i, (cell, column) in enumerate(zip(row, columns, strict=True)))


def _cell(cell: Cell, column: Column, first: bool) -> str:
    tag = "th" if first else "td"
    value = f' data-value="{escape(_raw(cell.value), quote=True)}"' if column.numeric and cell.value is not None else ""
    scope = ' scope="row"' if first else ""
    span = f"<small>{escape(cell.span)}</small>" if cell.span else ""
    kind = ' class="words"' if len(cell.text) > 24 and not column.numeric and not first else _class(column)
    return f"<{tag}{scope}{kind}{value}>{_body(cell.text)}{span}</{tag}>"


def _raw(value: object) -> str:
    return value if isinstance(value, str) else repr(value)


def _body(text: str) -> str:
    """A very long text folds away behind its beginning."""
    if len(text) <= LONG:
        return escape(text)
    return f"<details><summary>{escape(text[: LONG // 2].rstrip())} …</summary>{escape(text)}</details>"


def _notes(report: Report) -> str:
    if not report.notes:
        return ""
    lines = "".join(f"<li>{_prose(note)}</li>" for note in report.notes)
    return _frame("notes", "What is missing", f"<ul>{lines}</ul>")
