"""Which units were removed: one row a group, and what stayed whole."""

from __future__ import annotations

from typing import Any

from secateur.report.numbers import count_cell, many, percent_cell
from secateur.report.sections import EMPTY, Cell, Column, Number, Section, Table
from secateur.report.source import RunRecord, StepRecord, as_finite, as_table, names

_CAPTION = (
    "Units that go together, named after the tensor that makes them; the network no longer holds those that are gone."
)


def section(run: RunRecord) -> Section | str:
    """Units kept in each group, over all shrink steps of the run; nothing where there is none."""
    found = [(step, groups) for step in run.of("shrink") if step.done and (groups := _groups(step))]
    if not found:
        return ""
    kept, every, whys = dict[str, Number](), dict[str, Number](), dict[str, str]()
    for _, groups in found:
        for name, (left, units, why) in groups.items():
            kept[name], whys[name] = left, why
            every.setdefault(name, units)
    rows = tuple(
        (
            Cell(name, name),
            count_cell(units),
            count_cell(kept[name]),
            percent_cell(100 * kept[name] / units),
            Cell(whys[name], whys[name]) if whys[name] else EMPTY,
        )
        for name, units in every.items()
    )
    columns = (Column("Group"), Column("Units", True), Column("Kept", True), Column("Share", True), Column("Why whole"))
    gone, total = sum(every.values()) - sum(kept.values()), sum(every.values())
    says = f"{gone:,} of {total:,} units are gone, from {many(len(every), 'group')}."
    return Section("Units", says, Table(_CAPTION, columns, rows), source=names([step for step, _ in found]),
                   more=_whole(found[0][0]))  # fmt: skip


def _groups(step: StepRecord) -> dict[str, tuple[Number, Number, str]]:
    """Kept and all units by group, and why it stayed whole."""
    rows: Any = step.card.get("groups")
    found = {}
    for row in map(as_table, rows if isinstance(rows, list) else []):
        kept, units, name = as_finite(row.get("kept")), as_finite(row.get("units")), row.get("name")
        if isinstance(name, str) and kept is not None and units and units > 0:
            found[name] = (kept, units, str(row.get("why") or ""))
    return found


def _whole(step: StepRecord) -> tuple[str, ...]:
    """Tensors without a unit that could go, by reason."""
    rows: Any = step.card.get("coverage")
    table = [as_table(row) for row in (rows if isinstance(rows, list) else [])]
    free = {row.get("tensor") for row in table if row.get("units")}
    reasons: dict[str, list[str]] = {}
    for row in sorted(table, key=lambda row: row.get("size") == 1):
        name = row.get("tensor")
        if name not in free and isinstance(name, str) and not any(name in every for every in reasons.values()):
            reasons.setdefault(str(row.get("why")), []).append(name)
    return tuple(f"{many(len(every), 'tensor')} whole ({why}): {', '.join(every)}." for why, every in reasons.items())
