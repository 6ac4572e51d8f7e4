"""What the scores of a pruning looked like, and where the cut went through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from secateur.report.numbers import count, count_cell, many, number, number_cell, percent_cell, shorten
from secateur.report.sections import Cell, Column, Histogram, Number, Section, Table
from secateur.report.source import RunRecord, StepRecord, as_finite, as_table, as_whole, names

SMALL = 12
"""Tensors with a picture of their own; the table has all."""
_X = "|score|"
_COLUMNS = (
    Column("Tensor"), Column("Weights", True), Column("Kept", True), Column("Share", True),
    Column("Lowest score kept", True), Column("Highest pruned", True), Column("Smaller than drawn", True, True),
)  # fmt: skip


@dataclass(frozen=True)
class Counts:
    """Weights of one tensor, or of all, by the size of their score."""

    name: str
    kept: tuple[int, ...]
    pruned: tuple[int, ...]
    below: tuple[int, int]
    infinite: tuple[int, int]
    negative: int
    lowest: Number | None
    highest: Number | None

    @property
    def stay(self) -> int:
        """Weights kept."""
        return sum(self.kept) + self.below[0] + self.infinite[0]

    @property
    def go(self) -> int:
        """Weights pruned."""
        return sum(self.pruned) + self.below[1] + self.infinite[1]

    @property
    def clean(self) -> bool:
        """Whether one score parts what is kept from what goes."""
        return self.lowest is not None and self.highest is not None and self.lowest >= self.highest


def section(run: RunRecord) -> Section | str:
    """Histograms of the scores at the last pruning that recorded them; nothing where none did."""
    found = [(step, read) for step in run.of("prune") if (read := _read(step)) is not None]
    if not found:
        return ""
    step, (edges, whole, tensors) = found[-1]
    charts = [_chart("All tensors", whole, edges, False)] if edges else []
    largest = sorted(tensors, key=lambda row: -(row.stay + row.go))[:SMALL]
    if edges and len(tensors) > 1:
        charts += [_chart(row.name, row, edges, True) for row in tensors if row in largest]
    table = Table(_CAPTION, _COLUMNS, tuple(map(_row, tensors)), sortable=True) if tensors else None
    more = [_SEVERAL.format(many(len(found), "pruning step"), step.name)] if len(found) > 1 else []
    more += [_odd(whole)] if _odd(whole) else []
    more += [f"Drawn are the {SMALL} largest of {len(tensors):,} tensors."] if len(tensors) > SMALL else []
    return Section("Scores", _says(whole, tensors), table, tuple(charts), names([step]), tuple(more))


_CAPTION = (
    "Scores at the last pruning step, before the cut; what was pruned earlier is left out. Higher scores are kept."
)
_SEVERAL = "The run has {}; the scores are those of {}."


def _read(step: StepRecord) -> tuple[tuple[Number, ...], Counts, list[Counts]] | None:
    table = as_table(step.card.get("scores"))
    listed = table.get("edges")
    ends = [as_finite(edge) for edge in listed] if isinstance(listed, list) else []
    edges = tuple(edge for edge in ends if edge is not None and edge > 0)
    rising = all(a < b for a, b in zip(edges, edges[1:], strict=False))
    if len(edges) != len(ends) or not rising or len(edges) == 1:
        return None
    bins = max(0, len(edges) - 1)
    whole = _counts("all", table.get("all"), bins)
    rows = [_counts(name, entry, bins) for name, entry in as_table(table.get("tensors")).items()]
    return (
        None if whole is None or not whole.stay + whole.go else (edges, whole, [r for r in rows if r and r.stay + r.go])
    )


def _counts(name: str, entry: Any, bins: int) -> Counts | None:
    row = as_table(entry)
    kept, pruned = _whole(row.get("kept")), _whole(row.get("pruned"))
    below, infinite, negative = (_whole(row.get(key)) for key in ("below", "infinite", "negative"))
    if kept is None or pruned is None or below is None or infinite is None or negative is None:
        return None
    if not (len(below) == len(infinite) == len(negative) == 2 and (not bins or len(kept) == len(pruned) == bins)):
        return None
    ends = (as_finite(row.get("lowest_kept")), as_finite(row.get("highest_pruned")))
    return Counts(name, kept, pruned, (below[0], below[1]), (infinite[0], infinite[1]), sum(negative), *ends)


def _whole(entry: Any) -> tuple[int, ...] | None:
    """A list of counts, else None."""
    numbers = [as_whole(one) for one in entry] if isinstance(entry, list) else [None]
    return tuple(n for n in numbers if n is not None) if all(n is not None and n >= 0 for n in numbers) else None


def _chart(title: str, row: Counts, edges: tuple[Number, ...], small: bool) -> Histogram:
    says = f"{count(row.stay)} kept, {count(row.go)} pruned"
    if row.clean and row.lowest is not None:
        says += f"; kept from {number(row.lowest)} on."
        marks = ((row.lowest, f"kept from {number(row.lowest, 3)}"),)
    elif row.lowest is not None and row.highest is not None:
        says += f"; the lowest kept is {number(row.lowest)}, the highest pruned {number(row.highest)}."
        marks = ((row.lowest, "lowest kept"), (row.highest, "highest pruned"))
    else:
        says, marks = f"{says}.", ()
    shown = tuple((at, "" if small else text) for at, text in marks)
    return Histogram(title, _X, edges, row.kept, row.pruned, says, shown, small)


def _row(row: Counts) -> tuple[Cell, ...]:
    total = row.stay + row.go
    return (
        Cell(row.name, row.name), count_cell(total), count_cell(row.stay), percent_cell(100 * row.stay / total),
        number_cell(row.lowest), number_cell(row.highest), count_cell(sum(row.below)),
    )  # fmt: skip


def _says(whole: Counts, tensors: list[Counts]) -> str:
    if not whole.go:
        return "Nothing was pruned, so no score parts the weights."
    if whole.clean and whole.lowest is not None:
        return f"One threshold for all tensors: weights with a score of {number(whole.lowest)} or more are kept."
    clean = [row for row in tensors if row.clean and row.lowest is not None and row.go]
    cut = [row for row in tensors if row.go and row.stay]
    if clean and len(clean) == len(cut):
        low, high = (pick(clean, key=lambda row: row.lowest or 0.0) for pick in (min, max))
        ends = f"{number(low.lowest or 0.0)} in {shorten(low.name, 60)} to {number(high.lowest or 0.0)}"
        return f"Each tensor has a threshold of its own, from {ends} in {shorten(high.name, 60)}."
    return (
        "Kept and pruned scores overlap: weights are chosen in groups (N:M, blocks or whole units), or the scores were "
        "weighed before they were ranked."
    )


def _odd(whole: Counts) -> str:
    """What the picture does not show as it is."""
    parts = [f"{count(sum(whole.below))} scores are zero or too small to be drawn"] if any(whole.below) else []
    parts += [f"{count(sum(whole.infinite))} are infinite"] if any(whole.infinite) else []
    parts += [f"{count(whole.negative)} are negative and drawn by their size"] if whole.negative else []
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""
