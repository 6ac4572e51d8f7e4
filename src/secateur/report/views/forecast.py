"""What pruning was forecast to do to the loss, and what it did."""

from __future__ import annotations

from secateur.report.numbers import fixed, number, number_cell, percent
from secateur.report.sections import EMPTY, Cell, Column, Lines, Number, Section, Series, Table
from secateur.report.source import RunRecord, StepRecord, as_finite, as_number, as_table, names

_COLUMNS = (
    ("Loss before", "loss_before"), ("Loss after", "loss_after"), ("Rise measured", "rise_measured"),
    ("Rise forecast", "rise_forecast"), ("Slope part", "slope"), ("Curvature part", "curvature"),
)  # fmt: skip


def section(run: RunRecord) -> Section | str:
    """Forecast and measured rise of the loss at each pruning step."""
    steps = [step for step in run.of("prune") if as_table(step.card.get("forecast"))]
    if not steps:
        return "No forecast: no pruning step has recorded one."
    rows = tuple(_row(step) for step in steps)
    columns = (
        Column("Step"),
        Column("Density", True),
        *(Column(name, True, wide="part" in name) for name, _ in _COLUMNS),
    )
    caption = "Mean loss on the sample that the pruning was decided on, just before and just after it."
    more = (
        "The forecast takes the loss as a parabola along the line from the old weights to the pruned ones: "
        "slope plus curvature. The further the pruned weights are from zero, the less it can be trusted.",
    )
    return Section("Forecast and truth", _says(steps), Table(caption, columns, rows), _chart(steps), names(steps), more)


def _row(step: StepRecord) -> tuple[Cell, ...]:
    forecast = as_table(step.card["forecast"])
    density = EMPTY if step.density is None else Cell(step.density, percent(step.density))
    return (
        Cell(step.number, str(step.number)),
        density,
        *(number_cell(as_number(forecast.get(key))) for _, key in _COLUMNS),
    )


def _rises(step: StepRecord) -> tuple[Number | None, Number | None]:
    forecast = as_table(step.card["forecast"])
    return as_finite(forecast.get("rise_forecast")), as_finite(forecast.get("rise_measured"))


def _says(steps: list[StepRecord]) -> str:
    both = [
        (step, guess, truth)
        for step in steps
        for guess, truth in [_rises(step)]
        if guess is not None and truth is not None
    ]
    if not both:
        return "A rise of the loss was forecast, but the loss after pruning was not recorded."
    step, guess, truth = both[-1]
    begin = f"At step {step.number} the loss was forecast to rise by {number(guess)}; it rose by {number(truth)}"
    if truth > 0 and guess > 0:
        return f"{begin}: the forecast was {fixed(100 * guess / truth, 0)} % of it."
    return f"{begin}."


def _chart(steps: list[StepRecord]) -> tuple[Lines, ...]:
    """A picture from two pruning steps on; one pair of numbers needs none."""
    found = [(step.number, *_rises(step)) for step in steps]
    guesses = tuple((float(n), guess) for n, guess, _ in found if guess is not None)
    truths = tuple((float(n), truth) for n, _, truth in found if truth is not None)
    if len(guesses) < 2 or len(truths) < 2:
        return ()
    says = f"Forecast and measured rise of the loss at {len(found)} pruning steps."
    series = (Series("forecast", guesses, dots=True), Series("measured", truths, dots=True))
    return (Lines("Rise of the loss", "step of the recipe", "rise of the loss", series, says),)
