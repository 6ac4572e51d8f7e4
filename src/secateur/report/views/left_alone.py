"""What pruning left alone, and why."""

from __future__ import annotations

from secateur.report.numbers import count_cell, many
from secateur.report.sections import Cell, Column, Section, Table
from secateur.report.source import RunRecord, StepRecord, as_table, names


def section(run: RunRecord) -> Section | str:
    """Tensors that were not pruned, grouped by the reason."""
    found = [(step, reasons) for step in run.of("prune", "train") if step.done and (reasons := _reasons(step))]
    found.sort(key=lambda pair: (pair[0].do == "prune", pair[0].number))
    if not found:
        return "Nothing was left alone: every tensor could be pruned, or no finished step recorded it."
    step, reasons = found[-1]
    rows = tuple(_row(why, tensors) for why, tensors in reasons.items())
    total = sum(map(len, reasons.values()))
    says = f"Pruning left {many(total, 'tensor')} alone, for {many(len(reasons), 'reason')}."
    table = Table(
        "Tensors that keep all their values.", (Column("Why"), Column("Tensors", True), Column("Names")), rows
    )
    return Section("Left alone", says, table, source=names([step]))


def _row(why: str, tensors: list[str]) -> tuple[Cell, ...]:
    listed = ", ".join(tensors)
    return Cell(why, why), count_cell(len(tensors)), Cell(listed, listed)


def _reasons(step: StepRecord) -> dict[str, list[str]]:
    left = as_table(step.card.get("left_alone")) or as_table(step.structure.get("left_alone"))
    reasons: dict[str, list[str]] = {}
    for name, why in left.items():
        reasons.setdefault(str(why), []).append(name)
    return reasons
