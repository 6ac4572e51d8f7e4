"""Finished runs as points of trade-off curves: what each kept, costs and gets right. Reads folders, never networks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from secateur.core.errors import FileError, UsageError, nearest
from secateur.report.recipes import curve_of, method_of, read_toml, setting_of, targets
from secateur.report.sections import Number
from secateur.report.source import (
    RunRecord,
    StepRecord,
    as_finite,
    as_table,
    as_whole,
    cleaned,
    doubts,
    interval,
    read_json,
    read_run,
)  # fmt: skip
from secateur.report.views.cells import in_percent, milliseconds, readings

DEPTH = 2
"""Runs are looked for so many folders below one that is no run itself."""

CONTROLS = ("magnitude", "random", "small-dense")
"""Always in a comparison."""

REWRITTEN = "torch.fx:GraphModule"

COSTS = ("params", "macs", "disk", "packed", "ms", "fast")
"""What a network costs, in the order in which pages offer it."""


@dataclass(frozen=True)
class Point:
    """One finished run.

    Args:
        name: how the page calls it: its folder, below what all of them share.
        folder: where it is.
        network: the network's name.
        data: the data set's name.
        examples: test examples behind the accuracy.
        params: parameters of the dense network.
        method: what pruned it.
        curve: equal for runs that differ in seed and target only.
        setting: equal for runs that differ in the seed only.
        target: what was asked for, as the recipe says it.
        seed: its seed.
        key: equal for copies of one network.
        accuracy: test accuracy in per cent.
        span: 95 % interval of it over test examples.
        change: from the dense network, in points.
        dense: accuracy of the dense network in per cent; ``origin`` tells dense networks apart.
        costs: dense network's (None when unknown) and this one's, by the names in ``COSTS``.
        layers: weights kept and all weights of the dense network, by tensor.
        machine: processor and threads of its timings.
        control: drawn in grey.
        home: folder of the comparison that made it.
    """

    name: str
    folder: Path
    network: str
    data: str
    examples: int
    params: Number | None
    method: str
    curve: str
    setting: str
    target: str
    seed: int | None
    key: str
    accuracy: Number
    span: tuple[Number, Number] | None = None
    change: Number | None = None
    dense: Number | None = None
    origin: str = ""
    costs: Mapping[str, tuple[Number | None, Number]] = field(default_factory=dict)
    layers: Mapping[str, tuple[Number, Number]] = field(default_factory=dict)
    machine: str = ""
    control: bool = False
    home: str = ""

    @property
    def is_dense(self) -> bool:
        """Whether it is the dense network of a comparison, which is a reference and no point."""
        return self.method == "dense"


@dataclass(frozen=True)
class Gathered:
    """All points found, and sentences about what was left out."""

    points: tuple[Point, ...]
    notes: tuple[str, ...]


def gather(places: Sequence[str | Path]) -> Gathered:
    """Read run folders, and folders with runs in them.

    Args:
        places: run folders with a finished measure step, folders of comparisons, or folders that hold such.

    Raises:
        FileError: when a place is missing or holds no run.
        UsageError: when there is nothing to compare, or runs of one name were tested on different data.

    Cost: reads the JSON files only; about a second for 300 runs.
    """
    if not places:
        raise UsageError("no folder is named; pass run folders, such as `secateur compare-report runs/*`.")
    points: dict[Path, Point] = {}
    homes: dict[Path, Number | None] = {}
    notes: list[str] = []
    for place in map(Path, places):
        found = list(folders(place))
        if not found:
            raise FileError(_no_run(place))
        for run in found:
            if run.resolve() in points:
                continue
            point = _point(run, notes, homes)
            if point is not None:
                points[run.resolve()] = point
    kept = _without_copies(list(points.values()), notes)
    if not [point for point in kept if not point.is_dense]:
        why = f" {notes[0]}" if notes else ""
        raise UsageError(f"there is nothing to compare: no pruned run among the folders is finished.{why}")
    _same_data(kept)
    return Gathered(tuple(_briefly(kept)), tuple(dict.fromkeys(notes)))


def folders(place: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The run folders in a place: itself, or those below it, in the order of their names."""
    if (place / "run.json").is_file():
        yield place
    elif (place / "card.json").is_file() and (place.resolve().parent / "run.json").is_file():
        yield place.resolve().parent
    elif depth and place.is_dir():
        for below in sorted(place.iterdir()):
            if below.is_dir() and not below.is_symlink() and not below.name.startswith("."):
                yield from folders(below, depth - 1)


def _no_run(place: Path) -> str:
    cure = "Pass folders made by `secateur prune`, `run` or `compare`, for example `secateur compare-report runs/*`."
    if place.is_file():
        return f"{place} is a file, not a run folder. {cure}"
    if not place.is_dir():
        near = [p.name for p in place.parent.iterdir() if p.is_dir()] if place.parent.is_dir() else []
        hint = f" {nearest(place.name, near)}" if near else ""
        return f"there is no folder {place}.{hint} {cure}"
    return f"{place} is not a run folder, and none lies in it: there is no run.json. {cure}"


def _point(folder: Path, notes: list[str], homes: dict[Path, Number | None]) -> Point | None:
    """The point of one run; None with a note where it has none."""
    try:
        run = read_run(folder, metrics=False)
    except FileError as error:
        notes.append(f"{folder} is left out: {error}")
        return None
    result, made = as_table(read_json(folder / "result.json", [])), None
    if result:
        made = _of_comparison(run, result, homes)
        why = "its result.json holds no accuracy"
    else:
        unfinished = next((step for step in run.steps if not step.done), None)
        measured = run.measured()
        why = (
            "it has begun no step yet"
            if not run.steps
            else f"{unfinished.name} is not finished; run the same command again to go on"
            if unfinished is not None
            else "it has no finished measurement; add one with `secateur measure`"
            if measured is None
            else f"{measured.folder.name}/verdict.json is damaged or holds no accuracy"
        )
        whole = (
            measured is not None and unfinished is None and not doubts(measured.folder, measured.card, measured.verdict)
        )
        made = _of_verdict(run, measured) if whole and measured is not None else None
    if made is None:
        notes.append(f"{folder} is left out: {why}.")
    return made


def _of_verdict(run: RunRecord, step: StepRecord) -> Point | None:
    """From a measure step."""
    dense, pruned, change = (readings(step.verdict.get(group)) for group in ("dense", "pruned", "change"))
    accuracy, before, delta = pruned.get("accuracy"), dense.get("accuracy"), change.get("accuracy")
    if accuracy is None or as_finite(accuracy.value) is None:
        return None
    recipe, net, about = _origin(run, step)
    made_by, factor, ends = as_table(step.card.get("made_by")), in_percent(accuracy), interval(accuracy)
    return Point(
        name=str(run.folder),
        folder=run.folder,
        network=about or "network",
        data=_data(recipe),
        examples=accuracy.n,
        params=_part(dense, "cost", "params"),
        method=method_of(recipe),
        curve=curve_of(recipe),
        setting=setting_of(recipe),
        target=targets(recipe),
        seed=run.seed,
        key=_key(net, run),
        accuracy=factor * accuracy.value,
        span=None if ends is None else (factor * ends[0], factor * ends[1]),
        change=None if delta is None else in_percent(delta) * delta.value,
        dense=None if before is None else in_percent(before) * before.value,
        origin=str(step.card.get("dense", run.folder)),
        costs=_costs(dense, pruned),
        layers=_layers(net, step, run),
        machine=f"{made_by.get('cpu', 'unknown processor')}, {made_by.get('threads', '?')} threads",
    )


def _costs(dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> dict[str, tuple[Number | None, Number]]:
    pairs = {
        "params": [_part(side, "cost", "params_kept") for side in (dense, pruned)],
        "macs": [_part(side, "cost", "macs_effective") for side in (dense, pruned)],
        "disk": [as_finite(side["disk"].value) if "disk" in side else None for side in (dense, pruned)],
        "packed": [_part(side, "disk", "weights compressed") for side in (dense, pruned)],
        "ms": [milliseconds(side.get("latency")) for side in (dense, pruned)],
        "fast": [None, milliseconds(pruned.get("compiled"))],  # beside it stands dense torch, which is not compiled
    }
    return {name: (one, two) for name, (one, two) in pairs.items() if two is not None and two > 0}


def _part(side: Mapping[str, Any], name: str, part: str) -> Number | None:
    return as_finite(side[name].parts.get(part)) if name in side else None


def _origin(run: RunRecord, step: StepRecord) -> tuple[dict[str, Any], StepRecord | None, str]:
    """The recipe that pruned, the step that made the network, and the network's name.

    A run that only measures points to the folder of another one.
    """
    recipe, net = read_toml(run.recipe), run.last_net()
    place = step.card.get("pruned")
    if net is None and isinstance(place, str) and (Path(place).parent / "run.json").is_file():
        other = read_run(Path(place).parent, metrics=False)
        recipe = {**read_toml(other.recipe), "data": recipe.get("data")}
        net = next((s for s in other.steps if s.folder.name == Path(place).name), None)
    names = [as_table(s.structure.get("model")).get("use") for s in (net, *run.steps) if s is not None]
    names += [as_table(recipe.get("model")).get("use"), Path(str(as_table(recipe.get("model")).get("load", ""))).name]
    return recipe, net, next((n for n in names if isinstance(n, str) and n and n != REWRITTEN), "")


def _key(net: StepRecord | None, run: RunRecord) -> str:
    """Digests of the weights and masks; runs that tell none are told apart by their folders."""
    files = as_table(net.card.get("files")) if net is not None else {}
    digests = [str(files[name]) for name in ("weights.safetensors", "masks.safetensors") if name in files]
    return " ".join(digests) or str(run.folder.resolve())


def _zeros(sparsity: Any) -> str:
    value = as_finite(sparsity)
    return "" if value is None else f"sparsity {value:g}"


def _layers(net: StepRecord | None, step: StepRecord, run: RunRecord) -> dict[str, tuple[Number, Number]]:
    """Kept and all weights by tensor; of one that lost units, all are those of the dense network where it is known."""
    found: dict[str, tuple[Number, Number]] = {}
    rows = step.verdict.get("layers")
    for row in map(as_table, rows if isinstance(rows, list) else []):
        name, kept, total = row.get("name"), as_finite(row.get("kept")), as_finite(row.get("weights"))
        if isinstance(name, str) and kept is not None and total:
            found[name] = (kept, total)
    found = found or (net.counts if net is not None else {})
    dense = next((s.counts for s in run.of("train") if s.done and s.density == 100 and not s.shrunk), {})
    return {name: (kept, max(total, dense.get(name, (0, 0))[1])) for name, (kept, total) in found.items()}


def _of_comparison(run: RunRecord, result: Mapping[str, Any], homes: dict[Path, Number | None]) -> Point | None:
    """From ``result.json`` of a run that `secateur compare` made; it is paired with its dense network later."""
    accuracy, method = as_finite(result.get("accuracy")), result.get("method")
    if accuracy is None or not isinstance(method, str):
        return None
    low, high, net = as_finite(result.get("low")), as_finite(result.get("high")), run.last_net()
    recipe, home = read_toml(run.recipe), run.folder.resolve().parent
    if home not in homes:
        homes[home] = _reference(home)
    reading = net.accuracy if net is not None else None
    found = {"params": "params_kept", "macs": "macs", "disk": "bytes"}
    costs = {name: as_finite(result.get(key)) for name, key in found.items()}
    names = [as_table(s.structure.get("model")).get("use") for s in run.steps]
    names.append(as_table(recipe.get("model")).get("use"))
    return Point(
        name=str(run.folder),
        folder=run.folder,
        network=next((n for n in names if isinstance(n, str) and n and n != REWRITTEN), "network"),
        data=_data(recipe),
        examples=reading.n if reading is not None else 0,
        params=homes[home],
        method=method,
        curve=f"{home} {method}",
        setting=f"{home} {method} {result.get('sparsity')} {result.get('epochs')}",
        target=_zeros(result.get("sparsity")),
        seed=as_whole(result.get("seed")),
        key=_key(net, run),
        accuracy=accuracy,
        span=None if low is None or high is None else (low, high),
        origin=str(home),
        costs={name: (None, value) for name, value in costs.items() if value is not None and value > 0},
        layers=dict(net.counts) if net is not None else {},
        control=method in CONTROLS,
        home=home.name,
    )


def _reference(home: Path) -> Number | None:
    """Parameters of the dense network of a comparison."""
    table = as_table(read_json(home / "compare.json", []))
    found = as_finite(as_table(table.get("reference")).get("params"))
    if found is None:
        made = (as_table(read_json(path, [])) for path in sorted(home.glob("dense*/result.json")))
        found = next((n for result in made if (n := as_finite(result.get("params"))) is not None), None)
    return found


def _data(recipe: Mapping[str, Any]) -> str:
    return str(as_table(recipe.get("data")).get("use") or "data")


def _without_copies(points: list[Point], notes: list[str]) -> list[Point]:
    """The same network twice is one run, not two seeds."""
    seen: dict[str, Point] = {}
    for point in points:
        first = seen.setdefault(point.key, point)
        if first is not point:
            notes.append(f"{point.name} is left out: its network is the same, bit for bit, as that of {first.name}.")
    return list(seen.values())


def _briefly(points: Sequence[Point]) -> list[Point]:
    """Names without the folders that all of them lie in."""
    homes = [point.folder.resolve() for point in points]
    try:
        shared = os.path.commonpath([home.parent for home in homes])
    except ValueError:  # on several drives
        return list(points)
    return [replace(p, name=cleaned(str(home.relative_to(shared)))) for p, home in zip(points, homes, strict=True)]


def _same_data(points: Sequence[Point]) -> None:
    """Refuse accuracies that cannot be compared.

    Raises:
        UsageError: when runs of one data set were tested on different numbers of examples.
    """
    first: dict[tuple[str, str, Number | None], Point] = {}
    for point in points:
        other = first.setdefault((point.network, point.data, point.params), point)
        if other.examples and point.examples and other.examples != point.examples:
            raise UsageError(
                f"{other.name} was tested on {other.examples:,} examples of {point.data} and {point.name} on "
                f"{point.examples:,}; their accuracies cannot be compared. Leave one out, or make a page for each."
            )
