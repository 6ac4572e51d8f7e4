"""``secateur.compare``: run a comparison, and write its figures, its table and its page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from secateur.core.errors import FileError, UsageError
from secateur.core.files import write_bytes, write_json
from secateur.engine.comparing import Comparison, Job, refer
from secateur.engine.comparing_jobs import gather, state_of
from secateur.engine.comparing_spread import Processes, on_ray, serial
from secateur.engine.comparing_summary import summarise
from secateur.engine.recipe import read_recipe
from secateur.engine.toml import dump
from secateur.report.page import to_html
from secateur.report.views.comparison import markdown, report

Told = Callable[[Job, Mapping[str, Any], int, int], object]


def compare(
    what: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    data_dir: str | None = None,
    workers: int = 1,
    ray: str | None = None,
    told: Told | None = None,
) -> dict[str, Any]:
    """Run several methods at several sparsities with the same budget and several seeds.

    Always in are the dense network and the controls ``random``, ``magnitude`` and ``small-dense``. Every run is a
    recipe in a folder of its own below ``out``; one that is done is skipped, one that was stopped goes on. Each takes
    one thread, so the figures do not depend on how many run at once.

    Args:
        what: a comparison file (TOML), or the table in one.
        out: the folder; gets ``compare.json`` (all figures), ``table.md`` and ``report.html``.
        data_dir: where data sets are looked up.
        workers: processes on this machine; with ``ray`` the cores of a new local cluster.
        ray: address of a Ray cluster, ``""`` for a local one, None for none.
        told: called with each run, its result, how many are done, and how many there are.

    Returns:
        The table in ``compare.json``; ``rows`` has a row for each method and sparsity, ``runs`` one for each run.

    Raises:
        UsageError: for what is wrong in the comparison; before anything runs.
        FileError: when files cannot be read or written.
        KeyboardInterrupt: when every run at hand has written a checkpoint; the files tell what is done.

    Cost: all runs; besides, for each, one forward pass of one example for every train step.
    """
    folder, comparison = Path(out), read(what)
    if workers < 1:
        raise UsageError(f"workers is {workers}; it must be at least 1.")
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder} is a file; name a folder with `-o`.")
    reference = refer(comparison, data_dir)
    jobs, results = comparison.jobs(reference), {}

    def heard(job: Job, result: Mapping[str, Any]) -> None:
        results[job.name] = result
        if told is not None:
            told(job, result, len(results), len(jobs))

    write_bytes(folder / "compare.toml", dump(comparison.to_table()).encode())
    try:
        if ray is not None:
            on_ray(jobs, folder, data_dir, heard, ray, workers if workers > 1 else 0)
        elif workers > 1:
            Processes(folder, data_dir, workers).run(jobs, heard)
        else:
            serial(jobs, folder, data_dir, heard)
    finally:
        table = gather(comparison, reference, results)
        if results:
            _write(table, folder)
    return table


def read(what: str | Path | Mapping[str, Any]) -> Comparison:
    """A comparison from a file or a table.

    Raises:
        FileError: when the file is missing or not TOML.
        UsageError: for what is wrong in it.
    """
    return Comparison.from_table(what if isinstance(what, Mapping) else read_recipe(Path(what)))


def states(what: str | Path | Mapping[str, Any], out: str | Path, data_dir: str | None = None) -> list[dict[str, Any]]:
    """All runs of a comparison with what has become of them: ``"done"``, ``"unfinished"`` or ``"to do"``.

    Raises:
        SecateurError: for what is wrong in the comparison, or missing data.
    """
    comparison = read(what)
    jobs = comparison.jobs(refer(comparison, data_dir))
    return [
        {"run": job.name, "method": job.method, "sparsity": job.sparsity, "seed": job.seed, "epochs": job.epochs,
         "state": state_of(job, Path(out), data_dir)}
        for job in jobs
    ]  # fmt: skip


def _write(table: dict[str, Any], folder: Path) -> None:
    table["rows"] = _finite(summarise(table))
    write_json(folder / "compare.json", table)
    write_bytes(folder / "table.md", markdown(table).encode())
    write_bytes(folder / "report.html", to_html(report(table, folder.resolve().name)).encode())


def _finite(thing: Any) -> Any:
    """JSON knows no infinity; what is not a number is unknown."""
    if isinstance(thing, dict):
        return {key: _finite(value) for key, value in thing.items()}
    if isinstance(thing, list):
        return [_finite(value) for value in thing]
    return None if isinstance(thing, float) and not math.isfinite(thing) else thing
