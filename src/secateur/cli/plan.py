"""``secateur plan``."""

import argparse
import os
from pathlib import Path
from typing import Any

from secateur.cli.request import dump, table_of
from secateur.core.errors import FileError, UsageError
from secateur.core.patterns import parse_pattern
from secateur.engine.planning.targets import parse_aim

UNITS = ("channels", "heads", "depth")
_OWN = {"to": "--to", "pattern": "--patterns", "patterns": "--patterns", "batch": "--batch", "threads": "--threads",
        "least": "--least"}  # fmt: skip
"""Settings that a plan has flags for."""
_STEP = ("criterion", "solver", "inputs", "only", "skip", "examples")


def run(request: argparse.Namespace) -> int:
    """Say what to prune layer by layer for a target, and change nothing; the plan can be kept in a file."""
    aim = parse_aim(request.to)
    words = _patterns(request.patterns)
    for name in ("batch", "threads", "examples"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}; it must be at least 1.")
    if request.inputs and not request.solver:
        raise UsageError("--inputs has no effect without a solver; add `--solver sparsegpt`, or leave it out.")
    if request.out is not None:
        _check_place(Path(request.out))
    step = {key: value for key in _STEP if (value := getattr(request, key))}
    table = table_of(request, [{"do": "prune", **step}])
    _refuse_settings(table["step"])
    return _make(request, table, aim, words)


def _check_place(path: Path) -> None:
    """Refuse a place where no file can be written: told at the end, all work would be lost.

    Raises:
        FileError: saying why.
    """
    if path.is_dir():
        raise FileError(f"{path} is a folder; name a file, such as `-o plan.json`.")
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not folder.is_dir():
        raise FileError(f"cannot write {path}: {folder} is no folder; name a file elsewhere with `-o`.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise FileError(f"cannot write {path}: the folder {folder} cannot be written; name another with `-o`.")


def _refuse_settings(steps: list[dict[str, Any]]) -> None:
    """Refuse settings of the step that a plan does not go by.

    Raises:
        UsageError: naming the first.
    """
    if len(steps) > 1 or steps[0].get("do") != "prune":
        raise UsageError("a plan has no steps; `-s` sets its own keys, such as `-s criterion.seed=3`.")
    for key in steps[0]:
        if key not in ("do", *_STEP):
            cure = f"use {_OWN[key]}" if key in _OWN else "leave it out"
            raise UsageError(f"`-s {key}=...` has no effect on a plan layer by layer; {cure}.")


def _configuration(request: argparse.Namespace, recipe: Any, aim: Any, words: tuple[str, ...]) -> str:
    """All that a plan goes by, defaults included, as TOML."""
    from secateur.engine.toml import dump as toml

    table = recipe.to_table(True)
    step = table.pop("step")[0]
    asked = {"to": str(aim), "patterns": list(words), **{key: step[key] for key in _STEP if key in step}}
    asked |= {"batch": request.batch or 1, "threads": request.threads, "least": request.least or "ms"}
    return toml({**table, "plan": {**asked, "measure": not request.no_measure}})


def _patterns(given: list[str] | None) -> tuple[str, ...]:
    """Words, apart by commas, of one or several flags."""
    words = [word.strip() for entry in given or ["unstructured"] for word in entry.split(",")]
    return tuple(dict.fromkeys(word if word in UNITS else str(parse_pattern(word)) for word in words))


def _make(request: argparse.Namespace, table: dict[str, Any], aim: Any, words: tuple[str, ...]) -> int:
    from secateur.cli import screen
    from secateur.engine.cautions import heard
    from secateur.engine.planning.planner import Planning, plan_network
    from secateur.engine.planning.verbs import refuse_masks
    from secateur.engine.recipe import Recipe
    from secateur.engine.runner import Runner

    recipe = Recipe.from_table(table)
    if request.print_config:
        print(_configuration(request, recipe, aim, words), end="")
        return 0
    step = recipe.steps[0]
    runner = Runner(recipe, Path("."), request.data_dir, screen.listener(request))
    state = runner.start()
    refuse_masks(state.masks)
    how = Planning(
        words, step.criterion, step.solver, step.inputs, step.only, step.skip, batch=request.batch or 1,
        threads=request.threads, least=request.least or "ms", measure=not request.no_measure, seed=recipe.seed,
    )  # fmt: skip
    with heard() as cautions:
        made = plan_network(runner.sample(runner.data(), step.examples, state.net), aim, how)
    for text in dict.fromkeys(cautions):
        runner.listener.say(text)
    written = request.out is not None and not request.dry_run
    if written:
        made.save(request.out)
    if request.json:
        dump(made.to_json())
        return 0
    print(made)
    if written:
        command = f"secateur prune {request.start} --plan {request.out}{_own(request)}"
        print(f"\nplan {request.out}; carry it out: {command}")
    return 0


def _own(request: argparse.Namespace) -> str:
    """Classes of the user's own, which are to be named again: a plan file alone imports nothing."""
    given = {name: str(getattr(request, name) or "") for name in ("criterion", "solver")}
    return "".join(f" --{name} {value}" for name, value in given.items() if ":" in value)
