"""``secateur plan``."""

import argparse
from pathlib import Path
from typing import Any

from secateur.cli.request import dump, table_of
from secateur.core.errors import FileError, UsageError
from secateur.core.patterns import parse_pattern
from secateur.engine.planning.targets import parse_aim

UNITS = ("channels", "heads", "depth")
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
    if request.out is not None and Path(request.out).is_dir():
        raise FileError(f"{request.out} is a folder; name a file, such as `-o plan.json`.")
    step = {key: value for key in _STEP if (value := getattr(request, key))}
    table = table_of(request, [{"do": "prune", **step}])
    return _make(request, table, aim, words)


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
        print(recipe.to_toml(defaults=True), end="")
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
    if request.out is not None:
        made.save(request.out)
    if request.json:
        dump(made.to_json())
        return 0
    print(made)
    if request.out is not None:
        print(f"\nplan {request.out}; carry it out: secateur prune {request.start} --plan {request.out}")
    return 0
