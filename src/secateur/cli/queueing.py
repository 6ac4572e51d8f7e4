"""``secateur run --queue``: recipes whose stages several processes share out among themselves."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from secateur.cli import screen
from secateur.cli.request import dump
from secateur.core.errors import UsageError
from secateur.engine.queue_leases import Leases
from secateur.engine.queue_spread import Spread
from secateur.engine.queue_stopping import stoppable
from secateur.engine.queue_store import Stage, Store
from secateur.engine.queue_work import (
    Asked,
    Worker,
    check_names,
    enqueue,
    listed,
    outcome,
    plan,
    recipes_in,
    retry,
    states,
)
from secateur.engine.recipe import Recipe

_SIGNS = {"begun": "begins", "published": "done", "dropped": "done by another", "lost": "taken over by another",
          "failed": "failed", "waits": "others are at work, this process waits for them"}  # fmt: skip


def run(request: argparse.Namespace, recipes: Mapping[str, Recipe]) -> int:
    """Work on a queue, or tell in what state it is."""
    _check(request)
    folder = Path(request.queue)
    fresh = not request.status and not folder.exists()
    store = Store(folder) if fresh else Store.open(folder, make=False)
    leases = Leases(store.leases, request.lease)
    if request.status and not recipes:
        return _show(store, states(store, leases, listed(store)), request.json)
    recipes = recipes or recipes_in(store)
    if not recipes:
        raise UsageError(f"the queue {folder} holds no recipes yet; name some: `secateur run RECIPE --queue {folder}`.")
    asked = [plan(name, recipe, store, request.data_dir) for name, recipe in recipes.items()]
    stages = {one.name: one.stages for one in asked}
    if request.status or request.dry_run:
        return _show(store, states(store, leases, stages), request.json)
    Store.open(folder)  # made only now that all recipes are understood and their data are there
    enqueue(store, asked)
    if request.retry:
        retry(store, asked)
    with stoppable():
        _work(request, store, leases, asked)
    rows = states(store, leases, stages)
    _show(store, rows, request.json)
    for row in rows:
        if row["state"] == "failed":
            print(f"secateur: error: {row['stage']} ({', '.join(row['recipes'])}): {row['text']}", file=sys.stderr)
    if code := outcome(rows):
        print("secateur: what is done is kept; `--retry` tries failed stages again.", file=sys.stderr)
        return code
    return 0


def named(places: list[str]) -> list[str]:
    """Names of recipes by their files.

    Raises:
        UsageError: when two are called the same.
    """
    names = [Path(place).stem for place in places]
    check_names(names, places)
    return names


def _check(request: argparse.Namespace) -> None:
    if not (math.isfinite(request.lease) and request.lease >= 1):
        raise UsageError(f"--lease is {request.lease:g}; give at least 1 second, for example 60.")
    if request.workers < 1:
        raise UsageError(f"--workers is {request.workers}; give at least 1.")
    for flag in ("out", "log"):
        if getattr(request, flag):
            raise UsageError(
                f"--{flag} goes with one recipe without --queue; in a queue, run folders lie in its runs/."
            )
    if request.print_config:
        raise UsageError("--print-config shows one recipe; leave --queue out.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("a queue is for single processes; leave torchrun out, and use `--workers N`.")


def _work(request: argparse.Namespace, store: Store, leases: Leases, asked: list[Asked]) -> None:
    console = Console(stderr=True, quiet=bool(request.json))

    def heard(event: str, stage: Stage, told: Mapping[str, Any]) -> None:
        console.print(_line(event, stage, told), highlight=False, markup=False, soft_wrap=True)

    if request.workers > 1:
        Spread(store, request.lease, asked, request.data_dir, heard, request.workers).run()
        return
    listener = screen.listener(request)
    with listener:
        Worker(store, leases, asked, request.data_dir, heard, listener).run()


def _line(event: str, stage: Stage, told: Mapping[str, Any]) -> str:
    text = f"{stage.name}: {_SIGNS.get(event, event)}"
    if event == "begun" and told.get("resumed"):
        text += " from a checkpoint"
    if "seconds" in told:
        text += f", {told['seconds']:.1f} s"
    return f"{text}   [{', '.join(told['recipes'])}]"


def _show(store: Store, rows: list[dict[str, Any]], as_json: bool) -> int:
    if as_json:
        dump({"queue": str(store.folder), "stages": rows})
        return 0
    if not rows:
        print(f"the queue {store.folder} is empty")
        return 0
    table = [("stage", "key", "state", "seconds", "recipes")]
    for row in rows:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        table.append((f"{row['number']} {row['do']}", row["key"], _state(row), seconds, ", ".join(row["recipes"])))
    widths = [max(len(line[place]) for line in table) for place in range(5)]
    for line in table:
        left = "  ".join(f"{text:<{width}}" for text, width in zip(line[:3], widths[:3], strict=True))
        print(f"{left}  {line[3]:>{widths[3]}}  {line[4]}".rstrip())
    return 0


def _state(row: Mapping[str, Any]) -> str:
    if row["state"] == "at work":
        since = "" if row["since"] is None else time.strftime(" since %H:%M:%S", time.localtime(row["since"]))
        return f"at work by {row['by']}{since}"
    if row["behind"]:
        return f"waits for a failed one ({row['behind'].partition('-')[0]})"
    return row["state"]
