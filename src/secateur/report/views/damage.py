"""Damage: which classes a pruned network has unlearnt, and how often it answers otherwise than the dense one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.report.damage import NAME, DamageRecord, read, whole
from secateur.report.numbers import count, count_cell, fixed, percent, shorten
from secateur.report.sections import EMPTY, Bars, Cell, Column, Section, Table, Tile
from secateur.report.source import RunRecord, as_finite, as_reading, as_table, interval, names
from secateur.report.views import calibration, corruptions, features, flips
from secateur.report.views.cells import points_cell

CLASSES, BARS = 200, 30
_CAPTION = (
    "Test examples of each class that the networks have right. Change: paired difference in percentage points; figures "
    "in small print are 95 % intervals of one class alone, of which one in twenty misses by chance."
)


def sections(run: RunRecord) -> tuple[Section | str, ...]:
    """All that `measure --damage` found: classes, changed answers, calibration, corruptions, features."""
    found = read(run)
    if isinstance(found, str):
        return (found,)
    made: list[Section | str] = []
    for name in found.networks[1:]:
        made += [section(found, name), flips.section(found, name)]
    return (*made, calibration.section(found), corruptions.section(found), features.section(found), *found.notes)


def section(found: DamageRecord, name: str) -> Section | str:
    """Agreement, the most hurt class and a line a class, for one pruned network."""
    table = as_table(as_table(found.table.get("changes")).get(name))
    rows = _classes(table)
    counts = as_table(table.get("flips"))
    if not rows and not counts:
        return f"No damage: {found.step.folder.name}/damage.json holds no changes of network {shorten(name, NAME)}."
    says = " ".join(part for part in (_agreement(found, counts), _most_hurt(table, rows)) if part)
    shown = _chosen(rows)
    return Section(
        found.title("Damage", name), says or "What changed, class by class.",
        _table(found, table, rows, shown) if rows else None, _chart(shown), names([found.step]),
        _more(counts, rows), _tiles(counts),
    )  # fmt: skip


def _classes(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    listed = table.get("classes")
    return [
        row for row in map(as_table, listed if isinstance(listed, list) else []) if isinstance(row.get("name"), str)
    ]


def _chosen(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All classes in their order; of very many those that lost most."""
    if len(rows) <= CLASSES:
        return list(rows)
    return sorted((row for row in rows if whole(row.get("count"))), key=_upper)[:CLASSES]


def _upper(row: Mapping[str, Any]) -> float:
    """The upper end of a class's interval: the surest losses come first."""
    found = as_reading(row.get("change"))
    ends = interval(found) if found is not None else None
    return float(ends[1]) if ends is not None else 1e9


def _table(
    found: DamageRecord, table: Mapping[str, Any], rows: Sequence[dict[str, Any]], shown: Sequence[dict[str, Any]]
) -> Table:
    heads = ("Examples", "Right before", "Right after", "Lost", "Gained", "Change")
    if found.tokens:
        heads = ("Tokens", *heads[1:])
    columns = (Column("Class"), *(Column(head, True, head in ("Lost", "Gained")) for head in heads))
    keys = ("count", "right_before", "right_after", "only_before", "only_after")
    total = [count_cell(sum(whole(row.get(key)) for row in rows)) for key in keys]
    lines = tuple(
        (Cell(row["name"], row["name"]), *(count_cell(whole(row.get(key))) for key in keys), _change(row.get("change")))
        for row in shown
    )
    caption = _CAPTION
    if len(shown) < len(rows):
        caption += f" The {len(shown)} of {len(rows):,} classes that lost most surely; the last line counts all."
    every = (Cell("all", "all"), *total, _change(table.get("accuracy")))
    return Table(caption, columns, lines, every, sortable=True)


def _change(entry: Any) -> Cell:
    found = as_reading(entry)
    return points_cell(found) if found is not None else EMPTY


def _chart(shown: Sequence[dict[str, Any]]) -> tuple[Bars, ...]:
    """Changes of the classes, the largest loss first."""
    cells = {row["name"]: _change(row.get("change")) for row in shown}
    values = {
        name: (value, cell.text.removesuffix(" points"))
        for name, cell in cells.items()
        if (value := as_finite(cell.value)) is not None
    }
    order = sorted(values, key=lambda name: values[name][0])[:BARS]
    if not order or not any(value for value, _ in values.values()):
        return ()
    title = "Change by class" if len(order) == len(values) else f"The {len(order)} classes that lost most"
    first = order[0]
    says = f"From {values[first][1]} points ({shorten(first, NAME)}) to {values[order[-1]][1]}."
    drawn = [values[name] for name in order]
    return (Bars(title, "points", tuple(order), tuple(v for v, _ in drawn), tuple(t for _, t in drawn), says),)


def _agreement(found: DamageRecord, counts: Mapping[str, Any]) -> str:
    share, n = as_reading(counts.get("agreement")), whole(counts.get("count"))
    if share is None or not n:
        return ""
    ends = interval(share)
    span = f" (95 % interval {fixed(100 * ends[0])} to {fixed(100 * ends[1])})" if ends is not None else ""
    what = "tokens" if found.tokens else "test examples"
    begin = f"The pruned network answers as the dense one does on {percent(100 * share.value)}{span} of {n:,} {what}"
    lost, won = whole(counts.get("right_wrong")), whole(counts.get("wrong_right"))
    return f"{begin}: {lost:,} right answers were lost and {won:,} won."


def _most_hurt(table: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The class that lost most surely, or most where chance could explain every loss."""
    hurt = as_table(table.get("most_hurt"))
    row = next((row for row in rows if row.get("class") == hurt.get("class")), None)
    if row is None or not hurt.get("sentence"):
        return _perhaps_hurt(rows)
    cell = _change(row.get("change"))
    return (
        f"Class {shorten(row['name'], NAME)} is hurt most: of {count(whole(row.get('count')))} the dense network has "
        f"{count(whole(row.get('right_before')))} right, the pruned one {count(whole(row.get('right_after')))}: "
        f"{cell.text} (95 % interval of this class alone {cell.span})."
    )


def _tiles(counts: Mapping[str, Any]) -> tuple[Tile, ...]:
    if not counts:
        return ()
    share = as_reading(counts.get("agreement"))
    agree = f"{whole(counts.get('agree')):,} of {whole(counts.get('count')):,}"
    tiles = [Tile("Same answer", percent(100 * share.value), agree)] if share is not None else []
    labels = {
        "right_wrong": "Right, now wrong",
        "wrong_right": "Wrong, now right",
        "wrong_other": "Wrong in another way",
    }
    return (*tiles, *(Tile(label, count(whole(counts.get(key))), "") for key, label in labels.items()))


def _more(counts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    said = []
    if counts:
        said.append(
            f"Of {whole(counts.get('count')):,} answers {whole(counts.get('both_right')):,} are right in both networks "
            f"and {whole(counts.get('same_wrong')):,} wrong in the same way."
        )
    empty = sum(1 for row in rows if not whole(row.get("count")))
    if empty:
        said.append(f"{empty:,} class{'es have' if empty > 1 else ' has'} no test example.")
    return tuple(said)


def _perhaps_hurt(rows: Sequence[dict[str, Any]]) -> str:
    """The class with the largest loss, which its interval does not tell from chance."""
    cells = [(_change(row.get("change")), row) for row in rows]
    losses = [(value, cell, row) for cell, row in cells if (value := as_finite(cell.value)) is not None and value < 0]
    if not losses:
        return "No class has fewer right answers than before." if rows else ""
    _, cell, row = min(losses, key=lambda loss: loss[0])
    told = f" (95 % interval of this class alone {cell.span}); chance alone could explain that" if cell.span else ""
    return f"Class {shorten(row['name'], NAME)} loses most, {cell.text}{told}."
