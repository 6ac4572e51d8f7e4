"""Reports: sections as data, written as a page, as JSON and in the terminal. Reads run folders only, never networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.core.errors import UsageError
from secateur.report.compose import build, verdict_lines
from secateur.report.page import to_html, to_json
from secateur.report.sections import Report, Section

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Report", "Section", "build", "show", "verdict_lines", "write", "write_many"]


def write(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run folder as one HTML page, with the same figures as JSON beside it.

    Args:
        folder: a run folder, or one of its step folders.
        out: the page to write (``.html``), or a folder to write ``report.html`` in; the run folder by default.

    Returns:
        The path of the page; the JSON file has the same name with ``.json``.

    Raises:
        FileError: when the folder is missing or not of a run, or the files cannot be written.
        UsageError: when ``out`` is neither a folder nor a ``.html`` file.
    """
    from secateur.core.files import write_bytes  # brings torch along, which printing does not need

    page = _target(Path(folder), None if out is None else Path(out))
    report = build(folder)
    write_bytes(page.with_suffix(".json"), (to_json(report) + "\n").encode())
    write_bytes(page, to_html(report).encode())
    return page


def _target(folder: Path, out: Path | None) -> Path:
    if out is None:
        return folder / "report.html"
    if out.is_dir() or not out.suffix:
        return out / "report.html"
    if out.suffix.lower() not in (".html", ".htm"):
        example = out.with_suffix(".html")
        raise UsageError(f"the report cannot be written to {out}: name a folder or a .html file, such as {example}.")
    return out


def write_many(places: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the trade-off curves, the Pareto fronts, the figures and the layers of many runs as one HTML page.

    Args:
        places: run folders with a finished measurement, folders of comparisons, or folders that hold such.
        out: the page to write (``.html``), or a folder for ``compare-report.html``; this folder by default.

    Returns:
        The path of the page; the JSON file has the same name with ``.json``.

    Raises:
        FileError: when a place is missing or holds no run, or the files cannot be written.
        UsageError: when there is nothing to compare, runs of one name were tested on different data, or ``out`` is
            neither a folder nor a ``.html`` file.

    Cost: reads JSON files only, without the figures of training; about two seconds for 300 runs.
    """
    from secateur.report import overlook

    return overlook.save(overlook.build(places), out)


def show(folder: str | Path, console: Console, brief: bool = False) -> None:
    """Print the report of a run folder in the terminal; ``brief`` stops after the verdict.

    Raises:
        FileError: when the folder is missing or not of a run.
    """
    from secateur.report import text

    text.show(build(folder), console, brief)
