"""The page of many runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from secateur.core.errors import UsageError
from secateur.report.page import to_html, to_json
from secateur.report.points import gather
from secateur.report.sections import Report
from secateur.report.views.tradeoffs import report

PAGE = "compare-report.html"


def build(places: Sequence[str | Path]) -> Report:
    """Read many runs into one report; no network is loaded.

    Args:
        places: run folders with a finished measurement, folders of comparisons, or folders that hold such.

    Raises:
        FileError: when a place is missing or holds no run.
        UsageError: when there is nothing to compare, or runs of one name were tested on different data.

    Cost: reads JSON files only, without the figures of training; about two seconds for 300 runs.
    """
    return report(gather(places), [str(place) for place in places])


def save(made: Report, out: str | Path | None = None) -> Path:
    """Write a report of many runs; see :func:`secateur.report.write_many`.

    Raises:
        FileError: when the files cannot be written.
        UsageError: when ``out`` is neither a folder nor a ``.html`` file.
    """
    from secateur.core.files import write_bytes  # brings torch along, which printing does not need

    page = _target(Path(PAGE if out is None else out))
    write_bytes(page.with_suffix(".json"), (to_json(made) + "\n").encode())
    write_bytes(page, to_html(made).encode())
    return page


def _target(out: Path) -> Path:
    if out.is_dir() or not out.suffix:
        return out / PAGE
    if out.suffix.lower() not in (".html", ".htm"):
        example = out.with_suffix(".html")
        raise UsageError(f"the page cannot be written to {out}: name a folder or a .html file, such as {example}.")
    return out
