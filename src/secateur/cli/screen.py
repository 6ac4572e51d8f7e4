"""What the terminal shows: progress, plans and results."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from secateur.cli.request import dump
from secateur.core.files import read_json
from secateur.engine import distributed
from secateur.engine.compensating import plan_layers
from secateur.engine.cutting import plan as make_plan
from secateur.engine.planning.plans import LayerPlan, shown
from secateur.engine.planning.verbs import check_plan
from secateur.engine.recipe import PruneStep, ShrinkStep
from secateur.engine.removing import Choice, Removing, survey
from secateur.engine.runner import Runner
from secateur.engine.start import Listener
from secateur.engine.trackers import tracker


class Screen(Listener):
    """A progress bar on standard error; standard output is for results."""

    def __init__(self, quiet: bool, other: Listener | None = None) -> None:
        self.console = Console(stderr=True, quiet=quiet or distributed.rank() != 0)
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"), console=self.console, transient=True,
        )  # fmt: skip
        self.other = other or Listener()
        self._task: Any = None
        self._shown: dict[str, float] = {}

    def __enter__(self) -> Screen:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        close = getattr(self.other, "close", None)
        if close is not None:
            close()

    def begin(self, number: int, step: Any, folder: Path, steps: int) -> None:
        """Show a bar."""
        self._shown = {}
        if self._task is not None:  # of a step that failed, in a queue that goes on
            self.bar.remove_task(self._task)
        self._task = self.bar.add_task(f"{number} {step.do}", total=steps, figures="")
        self.other.begin(number, step, folder, steps)

    def figures(self, figures: Mapping[str, int | float]) -> None:
        """Move the bar."""
        self._shown |= {k: v for k, v in figures.items() if k in ("train/loss", "test/accuracy", "sparsity")}
        words = {"train/loss": "loss {:.3f}", "test/accuracy": "accuracy {:.2f} %", "sparsity": "sparsity {:.3f}"}
        text = "  ".join(words[k].format(v) for k, v in self._shown.items())
        self.bar.update(self._task, completed=int(figures.get("step", 0)), figures=text)
        self.other.figures(figures)

    def end(self, number: int, step: Any, card: Mapping[str, Any], skipped: bool) -> None:
        """One line for a finished step."""
        if self._task is not None:
            self.bar.remove_task(self._task)
            self._task = None
        if "kept" in card:
            accuracy = card["readings"]["accuracy"]
            kept = f"kept {card['kept']:,} of {card['total']:,} exactly   " if "figures" not in card else ""
            text = (
                f"accuracy {accuracy['value']:.2f} % ({accuracy['low']:.2f} to {accuracy['high']:.2f})   "
                f"{kept}{card['seconds']:.1f} s"
            )
        elif "exports" in card:
            files = (f"{row['file']} {row['bytes']:,} bytes" for row in card["exports"])
            text = f"{', '.join(files)}   {card['seconds']:.1f} s"
        else:
            text = "measured"
        self.console.print(
            f"[bold]{number} {step.do:<8}[/bold]{text}{'   (done before)' if skipped else ''}", highlight=False
        )
        for line in _layers(card):
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self.other.end(number, step, card, skipped)

    def say(self, text: str) -> None:
        """A remark."""
        self.console.print(f"[yellow]note[/yellow] {text}", highlight=False)


def _layers(card: Mapping[str, Any]) -> list[str]:
    """What pruning did to each layer, and what new statistics of BatchNorm gave."""
    layers = card.get("layers") or []
    lines = _units(card)
    width = max((len(layer["name"]) for layer in layers), default=0)
    for layer in layers:
        text = f"  {layer['name']:<{width}}  {layer['kept']:>10,} of {layer['total']:>10,}"
        if layer.get("error") is not None:
            text += f"   output off by {layer['error']:6.2%} (zeroing alone {layer['zeroed']:6.2%})"
        if layer.get("rise") is not None:
            text += f"   loss {layer['rise']:+.4g} (forecast {layer['forecast']:+.4g})"
        lines.append(text)
    return [*lines, *_planned(card.get("planned") or {}), *_recovered(card.get("recovered") or {})]


def _planned(planned: Mapping[str, Any]) -> list[str]:
    """A line for each figure that a plan forecast and that was measured."""
    lines = []
    for name, row in (planned.get("figures") or {}).items():
        if row.get("forecast") is not None and row.get("measured") is not None:
            before, forecast, measured = (shown(name, row.get(when)) for when in ("before", "forecast", "measured"))
            lines.append(f"  {name} {before} before, {forecast} planned, {measured} measured")
    return [*lines, *([f"  {planned['verdict']}"] if planned.get("verdict") else [])]


def _units(card: Mapping[str, Any]) -> list[str]:
    """What removal left: figures of the network, and units of each group that lost some."""
    figures, groups = card.get("figures") or {}, card.get("groups") or []
    lines = [f"  {name} {was:,} -> {now:,} ({now / max(was, 1):.4g}x)" for name, (was, now) in figures.items()]
    width = max((len(group["name"]) for group in groups), default=0)
    lost = [group for group in groups if group["kept"] < group["units"]]
    return lines + [f"  {g['name']:<{width}}  {g['kept']:>6,} of {g['units']:>6,} units" for g in lost]


_RECOVERED = {
    "survivors": "{moved:,} kept weights moved together",
    "batchnorm": "BatchNorm's statistics taken anew",
    "last-layer": "{layer} fitted to the dense network",
}


def _recovered(recovered: Mapping[str, Any]) -> list[str]:
    """One line for each step of a recovery; cards of older versions have one step and no list of them."""
    steps = recovered.get("steps") or ([{"step": "batchnorm", **recovered}] if recovered else [])
    lines = []
    for step in steps:
        before, after = (step[when]["value"] for when in ("before", "after"))
        words = _RECOVERED[step["step"]].format_map(step)
        lines.append(f"  {words}: accuracy {before:.2f} % before, {after:.2f} % after")
    return lines


def listener(request: argparse.Namespace) -> Screen:
    """The screen, with a tracker behind it when one is asked for."""
    chosen = getattr(request, "log", None)
    out = getattr(request, "out", None) or "runs"
    return Screen(bool(request.json), tracker(chosen, Path(out)) if chosen else None)


def plan(runner: Runner, as_json: bool) -> None:
    """What a run would do; the first pruning step is planned in full when the network is at hand."""
    rows = runner.plan()
    first = runner.recipe.steps[0]
    made = None
    removed = _survey(runner, first) if isinstance(first, ShrinkStep) else None
    if isinstance(first, PruneStep) and first.plan:
        made = LayerPlan.open(first.plan)
        check_plan(runner.start().net, made)
    elif isinstance(first, PruneStep):
        state = runner.start()
        task = runner.sample(runner.data(), first.examples, state.net)
        choices = (first.to, first.criterion, first.allocation, first.pattern)
        names = {"only": first.only, "skip": first.skip, "masks": state.masks}
        solver = first.solver
        made = make_plan(task, *choices, **names) if solver is None else plan_layers(task, solver, *choices, **names)
    if as_json:
        table: dict[str, Any] = {"steps": rows}
        if isinstance(made, LayerPlan):
            table["plan"] = {**made.to_json(), "counts": made.counts}
        elif made is not None:
            table["plan"] = {"counts": made.counts, "left_alone": made.left_alone,
                             "forecast": made.forecast.to_json() if made.forecast else None}  # fmt: skip
        if removed is not None:
            table["plan"] = {"groups": removed.groups(), "left": removed.left, "figures": removed.figures()}
        return dump(table)
    print(runner.recipe.to_toml(), end="\n")
    for row in rows:
        print(f"step {row['number']}: {row['do']:<8} {row['state']:<10} {row['folder']}")
    if made is not None:
        print(f"\n{made}")
    if removed is not None:
        print(f"\n{removed}")
    return None


def _survey(runner: Runner, step: ShrinkStep) -> Removing:
    """What the step would remove if it took one round."""
    state = runner.start()
    task = runner.sample(runner.data(), step.examples, state.net)
    return survey(task, step.to, step.criterion, Choice.of(step), runner.base(step, state, task))


def result(out: Path, as_json: bool) -> None:
    """The figures of a finished run, and where the files are."""
    from secateur.report import show, write

    page = write(out)
    if as_json:
        return dump({**read_json(page.with_suffix(".json")), "folder": str(out), "report": str(page)})
    console = Console()
    show(out, console, brief=True)
    console.print(f"\nfolder {out}   page {page}", soft_wrap=True, highlight=False, markup=False)
    return None
