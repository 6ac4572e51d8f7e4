"""From flags to a recipe: every verb that runs something builds one and hands it on."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from secateur.core.errors import FileError, UsageError
from secateur.engine.binding import set_option
from secateur.engine.recipe import Recipe, read_recipe

_TOP = ("model", "data", "step", "seed")


def table_of(request: argparse.Namespace, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The recipe that flags describe, with the settings of ``-s`` carried out."""
    model: dict[str, Any] = {}
    if getattr(request, "net", None):
        model["use"] = request.net
    if getattr(request, "start", None):
        model["load"] = request.start
    data: dict[str, Any] = {"use": request.data} if request.data is not None else {}
    table: dict[str, Any] = {"seed": request.seed or 0, "model": model, "data": data, "step": steps}
    if not data and model.get("load"):
        table["data"] = _inherited(Path(model["load"]))
    settle(table, request.settings)
    return table


def _inherited(start: Path) -> dict[str, Any]:
    """The data section of the recipe that made a folder."""
    from secateur.engine.folder import RECIPE, Artefact

    if start.is_file():
        return {}
    return dict(read_recipe(Artefact.open(start).folder / RECIPE).get("data", {}))


def settle(table: dict[str, Any], settings: list[str]) -> None:
    """Carry out ``-s a.b=value``; a key that is no section belongs to the first step that is not a measurement.

    Raises:
        UsageError: when a setting has no ``=``, or puts something else in the place of a section.
    """
    for setting in settings:
        path, sign, value = setting.partition("=")
        if not sign or not path:
            raise UsageError(f"`-s {setting}` has no value; write `-s a.b=value`, for example `-s criterion.seed=3`.")
        path = re.sub(r"(^|\.)score\b", r"\1criterion", path.strip())
        if path.split(".")[0] in _TOP:
            set_option(table, path, value.strip())
        else:
            set_option(table["step"][0], path, value.strip())
        _check_sections(table, setting)


def _check_sections(table: dict[str, Any], setting: str) -> None:
    for name in ("model", "data"):
        if not isinstance(table.get(name, {}), dict):
            raise UsageError(f"`-s {setting}`: {name} is a table; set one of its keys, such as `-s {name}.use=...`.")
    steps = table.get("step", [])
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise UsageError(f"`-s {setting}`: step is a list of tables; set a key of one, such as `-s step.1.lr=0.05`.")
    if not steps:
        raise UsageError(f"`-s {setting}`: no step is left; name what to do.")


def default_out(start: str, *words: str) -> Path:
    """A folder beside the one the run begins with, named after what is done."""
    root = Path(start)
    if (root / "card.json").is_file():
        root = root.parent
    slug = "-".join(re.sub(r"[^a-z0-9.]+", "-", w.lower().replace("%", "pct")).strip("-") for w in words if w)
    return root.with_name(f"{root.name.removesuffix('.safetensors')}-{slug}")


def execute(request: argparse.Namespace, table: dict[str, Any], out: Path) -> int:
    """Print the recipe, plan it, or run it and show the result, as the flags ask."""
    from secateur.cli import screen
    from secateur.engine import distributed
    from secateur.engine.runner import Runner

    recipe = Recipe.from_table(table)
    if request.print_config:
        print(recipe.to_toml(defaults=True), end="")
        return 0
    if out.exists() and not out.is_dir():
        raise FileError(f"{out} is a file; name a folder with `-o`.")
    distributed.start()
    try:
        listener = screen.listener(request)
        runner = Runner(recipe, out, request.data_dir, listener, getattr(request, "dense", None) or "")
        if request.dry_run:
            screen.plan(runner, request.json)
            return 0
        with listener:
            runner.run()
        if distributed.rank() == 0:
            screen.result(out, request.json)
    finally:
        distributed.stop()
    return 0


def dump(thing: Any) -> None:
    """Print JSON."""
    print(json.dumps(thing, indent=2, ensure_ascii=False))
