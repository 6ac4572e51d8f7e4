"""Measure steps of recipes: the pruned network beside the dense one, from the files of the steps before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.core.errors import UsageError
from secateur.core.files import file_digest, write_json
from secateur.core.task import Batch
from secateur.data import Dataset, Loader
from secateur.engine import distributed
from secateur.engine.compiling import PLAN
from secateur.engine.damage import damage
from secateur.engine.folder import CARD, opened, origin
from secateur.engine.measure import flatness, verdict
from secateur.engine.recipe import MeasureStep, Recipe
from secateur.engine.start import State
from secateur.probes.flatness import Flatness

VERDICT = "verdict.json"


def measure(
    step: MeasureStep,
    folder: Path,
    state: State,
    data: Dataset,
    recipe: Recipe,
    about: Mapping[str, Any],
    sample: Callable[[int], Iterable[Batch]],
    say: Callable[[str], None],
) -> None:
    """Carry out a measure step: ``verdict.json`` first, so that no later error loses it, and the card last.

    Args:
        step: what to measure.
        folder: the step's folder.
        state: what the steps before handed on.
        data: the data of the recipe.
        recipe: its seed and its batches of evaluation.
        about: facts for the card.
        sample: gives so many examples of the training data.
        say: hears what the user should know.

    Raises:
        UsageError: when there is no network yet.
        FileError: when a folder of ``beside`` is missing or changed, or files cannot be written.

    Cost: that of :func:`secateur.engine.measure.verdict`, and of what else is asked for.
    """
    pruned = state.artefact
    if pruned is None:
        raise UsageError("there is nothing to measure yet; put a train or prune step before, or pass a run folder.")
    dense, beside = state.dense or pruned, opened(step.beside)
    if state.dense is None:
        say("the dense network was not found: the network is compared with itself; pass `--dense`.")
    device, seed, batch = distributed.device(), recipe.seed, recipe.data.evaluation_batch
    tests = Loader(data.test, batch, mean=data.mean, std=data.std)
    made = verdict(
        dense, pruned, tests, device=device, probes=step.probes, baselines=step.baselines, seed=seed, plan=folder
    )
    write_json(folder / VERDICT, made.to_json())
    if step.flatness:
        flat = flatness(dense, pruned, sample(Flatness.examples), device=device, seed=seed)
        write_json(folder / VERDICT, replace(made, flatness=flat).to_json())
    files = {name: file_digest(folder / name) for name in (VERDICT, PLAN) if (folder / name).is_file()}
    if step.damage:
        one, two = (artefact.build().to(device) for artefact in (dense, pruned))
        others = [(name, other.build().to(device)) for name, other in beside]
        report = damage(one, two, data, others=others, examples=step.samples, seed=seed, batch=batch)
        files |= report.write(folder)
    card = {
        "format": "secateur.card/1",
        **about,
        "dense": str(dense.folder),
        "dense_missing": state.dense is None,
        "pruned": str(pruned.folder),
        "files": files,
        "made_by": origin(),
    }
    write_json(folder / CARD, card)
