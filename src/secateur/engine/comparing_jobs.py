"""One run of a comparison: carried out by an ordinary runner, then read off what lies on disk."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from secateur.core.errors import BudgetError, DataError, FileError, MaskError, ModelError, UsageError
from secateur.core.files import read_json, write_json
from secateur.core.losses import CrossEntropy
from secateur.core.names import parameters
from secateur.core.task import Task
from secateur.data import Dataset, Loader
from secateur.engine.checkpoint import read_metrics
from secateur.engine.comparing import COUNTED, Comparison, Job, Reference
from secateur.engine.comparing_macs import EXAMPLES, SPARSE
from secateur.engine.folder import WEIGHTS, Artefact, origin
from secateur.engine.recipe import Recipe, TrainStep
from secateur.engine.runner import Runner
from secateur.engine.training_cost import forward, of_run, step_sizes

RESULT = "result.json"

# What a method can be refused for by the network, the data or the budget. Files are another matter: no space left, or
# a folder in use, would be the same for all runs, and the comparison stops.
REFUSED = (BudgetError, DataError, MaskError, ModelError, UsageError)

_TOLD = frozenset((
    "name", "method", "sparsity", "seed", "epochs", "accuracy", "kept", "total", "params", "params_kept", "macs_stored",
    "macs", "train_examples", "train_macs", "bytes", "steps", "seconds", "digest",
))  # fmt: skip
"""What a result must hold to be taken as it is."""

_LAST: dict[str, Dataset] = {}


class SharedData(Runner):
    """A runner that takes the data of the run before where they are the same: those of one seed come in a row."""

    def data(self) -> Dataset:
        """The data set, cut down as the recipe asks."""
        key = json.dumps([self.recipe.to_table()["data"], self.recipe.seed, self.data_dir], sort_keys=True)
        if key not in _LAST:
            _LAST.clear()
            _LAST[key] = super().data()
        return _LAST[key]


def runner_of(job: Job, out: Path, data_dir: str | None) -> SharedData:
    """The runner of a run."""
    return SharedData(Recipe.from_table(job.recipe), out / job.name, data_dir)


def state_of(job: Job, out: Path, data_dir: str | None) -> str:
    """``"done"``, ``"unfinished"`` or ``"to do"``; trains nothing."""
    runner = runner_of(job, out, data_dir)
    rows = runner.plan()
    if _there(runner.out, [row["key"] for row in rows]) is not None:
        return "done"
    return "unfinished" if any(row["state"] != "to do" for row in rows) else "to do"


def carry_out(job: Mapping[str, Any], out: str, data_dir: str | None) -> dict[str, Any]:
    """Do one run, or read its result when it is there.

    A run computes with one thread, wherever it runs, so that its figures do not depend on how runs are spread.

    Args:
        job: the fields of a :class:`secateur.engine.comparing.Job`.
        out: the folder of the comparison.
        data_dir: where data sets are looked up.

    Returns:
        The figures; or ``error``, where the network, the data or the budget refuse the method.

    Raises:
        FileError: when files cannot be read or written, or another process is at work in the folder.
        KeyboardInterrupt: after a checkpoint.
    """
    asked = Job(**job)
    about = {key: value for key, value in asdict(asked).items() if key != "recipe"}
    with _one_thread():
        runner = runner_of(asked, Path(out), data_dir)
        keys = [row["key"] for row in runner.plan()]
        found = _there(runner.out, keys)
        if found is not None:
            return found
        try:
            runner.run()
            figures = _figures(runner)
        except REFUSED as error:
            return {**about, "error": str(error)}
    result = {**about, "keys": keys, **figures}
    write_json(runner.out / RESULT, result)
    return result


def gather(comparison: Comparison, reference: Reference, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All that is known of a comparison, as plain values; runs without a result are listed as missing."""
    jobs = comparison.jobs(reference)
    table = {
        "format": "secateur.compare/1",
        "asked": comparison.to_table(),
        "reference": asdict(reference),
        "runs": [dict(results[job.name]) for job in jobs if job.name in results],
        "missing": [job.name for job in jobs if job.name not in results],
        "cautions": comparison.cautions(),
        "made_by": origin(),
    }
    return json.loads(json.dumps(table))  # the very values that a reader of the file gets: lists, no tuples


def _there(folder: Path, keys: list[str]) -> dict[str, Any] | None:
    """The result of a run that asked for the same, with the same data and code."""
    try:
        found = read_json(folder / RESULT) if (folder / RESULT).is_file() else None
    except FileError:  # damaged: the figures are read off the run's files again
        return None
    whole = isinstance(found, dict) and found.get("keys") == keys and found.keys() >= _TOLD
    return found if whole else None


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _figures(runner: Runner) -> dict[str, Any]:
    """What the report needs, from the files of a finished run."""
    folders = [Path(row["folder"]) for row in runner.plan()]
    made = [Artefact.open(folder) for folder in folders]
    last, cards = made[-1], [artefact.card for artefact in made]
    net, masks = last.build(), last.masks()
    cost = forward(_task(runner, net), masks)
    reading = last.card["readings"]["accuracy"]
    params = sum(p.numel() for p in parameters(net).values())
    examples, macs = _training(runner, made)
    return {
        "accuracy": reading["value"], "low": reading["low"], "high": reading["high"],
        "kept": masks.kept, "total": masks.total, "params": params, "params_kept": params - (masks.total - masks.kept),
        "macs_stored": cost.dense, "macs": cost.sparse,
        "train_examples": examples, "train_macs": macs,
        "bytes": (last.folder / WEIGHTS).stat().st_size,
        "steps": sum(int(card.get("steps", 0)) for card in cards),
        "seconds": round(sum(float(card["seconds"]) for card in cards), 3),
        "digest": last.digest,
    }  # fmt: skip


def _training(runner: Runner, made: list[Artefact]) -> tuple[int, int]:
    """Examples trained on and the multiply-adds that took, over all train steps."""
    spec, count = runner.recipe.data, len(runner.data().train)
    examples, macs = 0, Fraction(0)
    for step, artefact in zip(runner.recipe.steps, made, strict=True):
        if not isinstance(step, TrainStep):
            continue
        if any(f"{type(rule).__module__}:{type(rule).__name__}" == COUNTED for rule in step.rules):
            rows = [row for row in read_metrics(artefact.folder / "metrics.jsonl") if SPARSE in row]
            examples, macs = examples + int(rows[-1][EXAMPLES]), macs + int(rows[-1][SPARSE])
            continue
        told = artefact.card.get("training_macs", {})
        if "sparse" in told:
            examples, macs = examples + int(told["examples"]), macs + int(told["sparse"])
            continue
        cost = forward(_task(runner, artefact.build()), artefact.masks())
        done = of_run(cost, step_sizes(count, spec.batch, step.accumulate), step.epochs, step.rules)
        examples, macs = examples + done.examples, macs + done.sparse
    return examples, round(macs)


def _task(runner: Runner, net: torch.nn.Module) -> Task:
    data = runner.data()
    return Task(net, CrossEntropy(), Loader(data.test.take(torch.tensor([0])), 1, mean=data.mean, std=data.std))
