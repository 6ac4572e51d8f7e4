"""The lines of the verdict: one quantity of the dense network, of the pruned one, and their difference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from secateur.core.reading import Reading
from secateur.report.numbers import count_cell, number, number_cell, relative_cell, scaled_cell
from secateur.report.sections import EMPTY, Cell, Number
from secateur.report.source import RunRecord, StepRecord, as_finite, as_number, as_table
from secateur.report.views.cells import accuracy_cell, points_cell, readings, speed_cell, time_cell

ACCURACY, TIME, FAST, RIGHT, FILE, PACKED, PLAN, KEPT = (
    "Accuracy",
    "Time for one example",
    "Time, compiled (from the plan file)",
    "Accuracy, compiled (from the plan file)",
    "File on disk",
    "File, compressed",
    "Plan file",
    "Weights kept",
)
_COSTS = (
    ("Parameters kept", "params_kept", count_cell),
    ("MACs", "macs_dense", scaled_cell),
    ("Effective MACs", "macs_effective", scaled_cell),
)
_FORECAST = ("loss_before", "loss_after", "rise_measured", "rise_forecast")


@dataclass(frozen=True)
class Row:
    """One line of the verdict; ``tone`` is one or two words that do not need a colour to be understood."""

    label: str
    dense: Cell
    pruned: Cell
    change: Cell
    tone: str = ""
    forecast: Cell = EMPTY


@dataclass(frozen=True)
class Pair:
    """The readings of both networks and of their difference."""

    dense: Mapping[str, Reading]
    pruned: Mapping[str, Reading]
    change: Mapping[str, Reading]

    @classmethod
    def of(cls, verdict: Mapping[str, Any]) -> Pair:
        """From the table in ``verdict.json``."""
        return cls(*(readings(verdict.get(group)) for group in ("dense", "pruned", "change")))

    def both(self, name: str) -> tuple[Reading | None, Reading | None]:
        """Dense and pruned reading of one kind."""
        return self.dense.get(name), self.pruned.get(name)

    def part(self, name: str, part: str) -> tuple[Number | None, Number | None]:
        """Dense and pruned value of a part of a reading."""
        one, two = (as_finite(r.parts.get(part)) if r else None for r in self.both(name))
        return one, two

    def rows(self) -> list[Row]:
        """Accuracy, time, and bytes."""
        return [*self._accuracy(), *self._latency(), *self._compiled(), *self._disk()]

    def costs(self) -> list[Row]:
        """All parameters, and multiply-adds as stored and with zeros left out."""
        rows = []
        for label, part, cell in _COSTS:
            one, two = self.part("cost", part)
            if one is not None or two is not None:
                row = sized(label, one, two)
                tone = {"smaller": "fewer", "larger": "more"}.get(row.tone, row.tone)
                rows.append(replace(row, dense=cell(one), pruned=cell(two), tone=tone))
        return rows

    def _accuracy(self) -> list[Row]:
        dense, pruned = self.both("accuracy")
        if dense is None and pruned is None:
            return []
        change = points_cell(self.change.get("accuracy"))
        return [Row(ACCURACY, accuracy_cell(dense), accuracy_cell(pruned), change, _tone(change, 0, "worse", "better"))]

    def _latency(self) -> list[Row]:
        dense, pruned = self.both("latency")
        if dense is None and pruned is None:
            return []
        change = speed_cell(self.change.get("latency"))
        return [Row(TIME, time_cell(dense), time_cell(pruned), change, _tone(change, 1, "slower", "faster"))]

    def _compiled(self) -> list[Row]:
        """Dense torch beside the plan on the compiled core, a race of their own."""
        dense, pruned = self.both("compiled")
        if pruned is None or as_finite(pruned.value) is None:
            return []
        change = speed_cell(self.change.get("compiled"))
        rows = [Row(FAST, time_cell(dense), time_cell(pruned), change, _tone(change, 1, "slower", "faster"))]
        right = self.pruned.get("compiled accuracy")
        if right is not None:
            change = points_cell(self.change.get("compiled accuracy"))
            dense = accuracy_cell(self.dense.get("accuracy"))
            rows.append(Row(RIGHT, dense, accuracy_cell(right), change, _tone(change, 0, "worse", "better")))
        return rows

    def _disk(self) -> list[Row]:
        dense, pruned = self.both("disk")
        rows = []
        if dense or pruned:
            one, two = (as_finite(r.value) if r else None for r in (dense, pruned))
            rows.append(sized(FILE, one, two, "B"))
        one, two = self.part("disk", "weights compressed")
        if one is not None or two is not None:
            rows.append(sized(PACKED, one, two, "B"))
        plan = self.pruned.get("plan")
        if plan is not None and dense is not None and as_finite(plan.value) is not None:
            rows.append(sized(PLAN, as_finite(dense.value), as_finite(plan.value), "B"))
        return rows


def sized(label: str, one: Number | None, two: Number | None, unit: str = "") -> Row:
    """A line for a size, with its change in per cent."""
    tone = ("smaller" if two < one else "larger" if two > one else "no change") if one and two is not None else ""
    return Row(label, scaled_cell(one, unit), scaled_cell(two, unit), relative_cell(one, two), tone)


def kept(net: StepRecord | None) -> list[Row]:
    """The line for the number of weights kept."""
    if net is None:
        return []
    left, total = as_finite(net.card.get("kept")), as_finite(net.card.get("total"))
    if left is None or not total or (net.shrunk and left == total):
        return []
    tone = "fewer" if left < total else "no change"
    return [Row(KEPT, count_cell(total), count_cell(left), relative_cell(total, left), tone)]


def smaller(net: StepRecord | None) -> list[Row]:
    """Lines for parameters, multiply-adds and bytes where units were removed, as the card tells them."""
    units = {"params": ("Parameters kept", ""), "macs": ("MACs", ""), "bytes": ("Bytes of tensors", "B")}
    found = net.shrunk if net is not None else {}
    return [sized(label, *found[name], unit) for name, (label, unit) in units.items() if name in found]


def cut(run: RunRecord) -> list[Row]:
    """The loss just before and after pruning beside its forecast, when the run prunes once."""
    cuts = [as_table(step.card.get("forecast")) for step in run.of("prune") if as_table(step.card.get("forecast"))]
    if len(cuts) != 1:
        return []
    before, after, rise, guess = (as_number(cuts[0].get(key)) for key in _FORECAST)
    change, forecast = (EMPTY if value is None else Cell(value, _signed(value)) for value in (rise, guess))
    return [Row("Loss right after pruning", number_cell(before), number_cell(after), change, "", forecast)]


def _tone(change: Cell, even: Number, below: str, above: str) -> str:
    """What an interval says about a difference; nothing when there is no interval."""
    if change.low is None or change.high is None:
        return ""
    return below if change.high < even else above if change.low > even else "no clear change"


def _signed(value: Number) -> str:
    return f"+{number(value)}" if value > 0 else number(value)
