"""What training took: multiply-adds with and without the zeros, and what the optimizer remembers."""

from __future__ import annotations

from secateur.report.numbers import count_cell, percent, percent_cell, scaled, scaled_cell
from secateur.report.sections import EMPTY, Cell, Column, Section, Table
from secateur.report.source import RunRecord, StepRecord, as_finite, as_table, names

_CAPTION = (
    "A step costs three forward passes, two without the pruned weights' products and one without those of weights that "
    "may not change; a step that asks for the dense gradient, as RigL's updates do, has that pass whole. This is "
    "arithmetic: torch computes with dense tensors."
)
_COLUMNS = (
    Column("Step"), Column("Examples", True), Column("MACs, dense", True), Column("MACs, sparse", True),
    Column("Share", True), Column("Optimizer state", True), Column("Seconds", True),
)  # fmt: skip


def section(run: RunRecord) -> Section | str:
    """A row for each train step that was counted; nothing where there is none."""
    found = [step for step in run.of("train") if step.done]
    if not any(map(_macs, found)):
        return ""
    dense = sum(as_finite(_macs(step).get("dense")) or 0 for step in found)
    sparse = sum(as_finite(_macs(step).get("sparse")) or 0 for step in found)
    open_ = [step for step in found if as_finite(_macs(step).get("dense")) is None]
    says = "The multiply-adds of training were not counted."
    if dense:
        rest = "" if not open_ else f", {_listed(open_)} not counted"
        says = (
            f"Training took {scaled(sparse)} multiply-adds with the zeros left out, {percent(100 * sparse / dense)} of "
            f"the {scaled(dense)} of the dense network{rest}."
        )
    more = tuple(
        f"Step {step.number}: {', '.join(map(str, _macs(step)['uncounted']))} changes how many weights are left, so "
        "the cost does not follow from the zeros at the end; `secateur compare` counts it step by step."
        for step in open_
        if _macs(step).get("uncounted")
    )
    more += tuple(f"Step {step.number}: {_macs(step)['why']}." for step in open_ if _macs(step).get("why"))
    return Section("Training cost", says, Table(_CAPTION, _COLUMNS, tuple(map(_row, found))), source=names(found),
                   more=more)  # fmt: skip


def _macs(step: StepRecord) -> dict:
    return as_table(step.card.get("training_macs"))


def _listed(steps: list[StepRecord]) -> str:
    return ", ".join(f"step {step.number}" for step in steps)


def _row(step: StepRecord) -> tuple[Cell, ...]:
    macs, name = _macs(step), f"{step.number} {step.do}"
    dense, sparse = as_finite(macs.get("dense")), as_finite(macs.get("sparse"))
    share = None if not dense or sparse is None else 100 * sparse / dense
    examples, seconds = as_finite(macs.get("examples")), as_finite(step.card.get("seconds"))
    return (
        Cell(name, name),
        EMPTY if examples is None else count_cell(examples),
        scaled_cell(dense), scaled_cell(sparse), percent_cell(share),
        scaled_cell(as_finite(step.card.get("optimizer_bytes")), "B"),
        EMPTY if seconds is None else Cell(seconds, f"{seconds:,.1f}"),
    )  # fmt: skip
