"""Puts the sections of a report together, in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from secateur.report.sections import EMPTY, Cell, Report, Section
from secateur.report.source import RunRecord, StepRecord, read_run
from secateur.report.views import (
    baselines,
    curves,
    damage,
    flatness,
    forecast,
    layer_forecast,
    layers,
    left_alone,
    masks,
    planned,
    repeat,
    scores,
    training,
    units,
    verdict,
    where_time,
)

# Each view gives a section, or one sentence why there is none (empty when nobody would miss it), or several of them.
VIEWS: tuple[Callable[[RunRecord], Section | str | tuple[Section | str, ...]], ...] = (
    verdict.section,
    baselines.section,
    layers.section,
    units.section,
    masks.section,
    where_time.section,
    forecast.section,
    layer_forecast.section,
    planned.sections,
    curves.section,
    training.section,
    scores.section,
    flatness.section,
    baselines.probes,
    damage.sections,
    left_alone.section,
    repeat.section,
)


def build(folder: str | Path) -> Report:
    """Read a run folder into a report; no network is loaded.

    Args:
        folder: a run folder, or one of its step folders.

    Raises:
        FileError: when the folder is missing or not of a run.

    Cost: reads the JSON files only; milliseconds, or about ten seconds for a million lines of metrics.
    """
    run = read_run(Path(folder))
    made = [part for view in VIEWS for part in _parts(view(run))]
    sections = tuple(part for part in made if isinstance(part, Section))
    notes = (*run.notes, *(part for part in made if isinstance(part, str) and part))
    return Report(run.title, _about(run), sections, notes)


def _parts(made: Section | str | tuple[Section | str, ...]) -> tuple[Section | str, ...]:
    return made if isinstance(made, tuple) else (made,)


def verdict_lines(folder: str | Path) -> list[str]:
    """The verdict in a few lines of plain text: one sentence, then one line a figure.

    Raises:
        FileError: when the folder is missing or not of a run.
    """
    section = verdict.section(read_run(Path(folder)))
    if isinstance(section, str):
        return [section]
    rows = section.table.rows if section.table is not None else ()
    columns = section.table.columns if section.table is not None else ()
    forecast_at = next((i for i, column in enumerate(columns) if column.name == "Forecast"), None)
    lines = [section.says]
    for row in rows:
        figures = [f"{row[0].text}: {row[2].text}"]
        figures += [f"dense {row[1].text}"] if row[1] is not EMPTY else []
        figures += [_change(row[3])] if row[3] is not EMPTY else []
        figures += [f"forecast {row[forecast_at].text}"] if forecast_at and row[forecast_at] is not EMPTY else []
        lines.append(", ".join(figures))
    return lines


def _change(cell: Cell) -> str:
    return f"{cell.text} (95 % interval {cell.span})" if cell.span else cell.text


def _about(run: RunRecord) -> str:
    steps = " → ".join(_step(step) for step in run.steps)
    return f"{run.folder.resolve().name}: {steps}" if steps else f"{run.folder.resolve().name}: no step has begun"


def _step(step: StepRecord) -> str:
    return f"{step.number} {step.do}" + ("" if step.done else " (unfinished)")
