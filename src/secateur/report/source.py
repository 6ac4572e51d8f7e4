"""Reads run folders with a tolerant eye: what is missing or damaged becomes a note, never a crash. Needs no torch."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from secateur.core.errors import FileError, nearest
from secateur.core.reading import Reading
from secateur.report.numbers import many
from secateur.report.sections import Number

LONGEST = 255
"""Bytes in the name of a folder."""
# Control, bidirectional and lone surrogate characters: in a name they can fool a terminal or a reader's eye.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


@dataclass(frozen=True)
class StepRecord:
    """What one step folder tells.

    Args:
        number: its place in the run, from 1.
        do: ``"train"``, ``"prune"``, ``"shrink"`` or ``"measure"``.
        folder: where it is.
        card: ``card.json``; empty when the step is unfinished.
        metrics: the whole lines of ``metrics.jsonl``.
        verdict: ``verdict.json`` of a measure step.
        structure: ``structure.json``.
        damage: ``damage.json`` of a measure step.
    """

    number: int
    do: str
    folder: Path
    card: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...] = ()
    verdict: Mapping[str, Any] = field(default_factory=dict)
    structure: Mapping[str, Any] = field(default_factory=dict)
    damage: Mapping[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether the step is finished: its card is written last."""
        return bool(self.card)

    @property
    def name(self) -> str:
        """How sentences call it."""
        return f"step {self.number} ({self.do})"

    @property
    def accuracy(self) -> Reading | None:
        """Test accuracy at its end, from the card."""
        return as_reading(as_table(self.card.get("readings")).get("accuracy"))

    @property
    def density(self) -> Number | None:
        """Kept weights in per cent of the prunable ones."""
        kept, total = as_number(self.card.get("kept")), as_number(self.card.get("total"))
        return 100 * kept / total if kept is not None and total else None

    @property
    def shrunk(self) -> dict[str, tuple[Number, Number]]:
        """Figures of the dense network and of this one, by name, where units were removed."""
        found = {}
        for name, pair in as_table(self.card.get("shrunk")).items():
            if isinstance(pair, list) and len(pair) == 2:
                dense, now = as_finite(pair[0]), as_finite(pair[1])
                if dense and now is not None:
                    found[name] = (dense, now)
        return found

    @property
    def counts(self) -> dict[str, tuple[Number, Number]]:
        """Kept and all weights by tensor."""
        found = {}
        for name, pair in as_table(self.card.get("counts")).items():
            if isinstance(pair, list) and len(pair) == 2:
                kept, total = as_number(pair[0]), as_number(pair[1])
                if kept is not None and total:
                    found[name] = (kept, total)
        return found


@dataclass(frozen=True)
class RunRecord:
    """What a run folder tells: its steps in order and what could not be read."""

    folder: Path
    title: str
    seed: int | None
    recipe: str
    steps: tuple[StepRecord, ...]
    notes: tuple[str, ...]

    def of(self, *kinds: str) -> list[StepRecord]:
        """The steps of some kinds, in order."""
        return [step for step in self.steps if step.do in kinds]

    def measured(self) -> StepRecord | None:
        """The last measure step with a verdict."""
        found = [step for step in self.of("measure") if step.verdict]
        return found[-1] if found else None

    def last_net(self) -> StepRecord | None:
        """The last finished step that made a network."""
        made = [step for step in self.of("train", "prune", "shrink") if step.done]
        return made[-1] if made else None


def read_run(folder: Path, metrics: bool = True) -> RunRecord:
    """Read a run folder; a step folder stands for the run it lies in, or for itself when it lies in none.

    ``metrics=False`` leaves the figures of training out, which take most of the time.

    Raises:
        FileError: when the folder is missing or neither of a run nor of a step.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileError(_absent(folder))
    if (folder / "run.json").is_file():
        return _run(folder, metrics)
    if not any((folder / name).is_file() for name in ("card.json", "metrics.jsonl", "verdict.json")):
        raise FileError(
            f"{folder} is not a run folder: it holds no run.json. "
            "Pass a folder made by `secateur train`, `prune` or `run`, for example `secateur report runs/NAME`."
        )
    parent = folder.resolve().parent
    if (parent / "run.json").is_file():
        run = _run(parent, metrics)
        if any(step.folder.name == folder.resolve().name for step in run.steps):
            return run
    notes: list[str] = []
    step = _step(folder.resolve(), 1, "", notes, metrics)
    return RunRecord(
        folder,
        folder.resolve().name,
        as_whole(step.card.get("seed")),
        _text(folder / "recipe.toml", notes),
        (step,),
        tuple(notes),
    )


def _run(folder: Path, metrics: bool) -> RunRecord:
    notes: list[str] = []
    table = read_json(folder / "run.json", notes)
    if not isinstance(table, dict):
        raise FileError(
            f"{folder / 'run.json'} is damaged. Run the same command again to write it anew; finished steps are kept."
        )
    steps = []
    listed = table.get("steps")
    for row in listed if isinstance(listed, list) else []:
        number, name = as_whole(as_table(row).get("number")), as_table(row).get("folder")
        if number is None or not is_step_name(name) or not (folder / name).is_dir():
            continue
        steps.append(_step(folder / name, number, str(row.get("do", "")), notes, metrics))
    title = table.get("title")
    recipe = _text(folder / "recipe.toml", notes)
    return RunRecord(
        folder,
        title if isinstance(title, str) and title else folder.resolve().name,
        as_whole(table.get("seed")),
        recipe,
        tuple(steps),
        tuple(notes),
    )


def _step(folder: Path, number: int, do: str, notes: list[str], metrics: bool) -> StepRecord:
    card = as_table(read_json(folder / "card.json", notes))
    before = len(notes)
    verdict = as_table(read_json(folder / "verdict.json", notes))
    if card.get("do") == "measure" and len(notes) == before:
        notes += doubts(folder, card, verdict)
    rows = _metrics(folder / "metrics.jsonl", notes) if metrics else ()
    do = do or (card.get("do") if isinstance(card.get("do"), str) else "") or ("measure" if verdict else "train")
    if not card:
        notes.append(
            f"Step {number} ({do}) is not finished; what it has written so far is shown. "
            "Run the same command again to go on."
        )
    structure, damage = (as_table(read_json(folder / f"{name}.json", notes)) for name in ("structure", "damage"))
    return StepRecord(number, str(do), folder, card, rows, verdict, structure, damage)


def is_step_name(name: Any) -> TypeGuard[str]:
    """Whether this library may have written a name as that of a step's folder: none leads out of the run's folder."""
    plain = isinstance(name, str) and _UNSAFE.search(name) is None and name not in ("", ".", "..")
    return plain and Path(name).name == name and len(name.encode()) <= LONGEST


def doubts(folder: Path, card: Mapping[str, Any], verdict: Mapping[str, Any]) -> list[str]:
    """What is wrong with the verdict of a finished measurement."""
    place, again = f"{folder.name}/verdict.json", "Delete the folder and run the same command again to measure anew."
    if not any(as_table(verdict.get(group)) for group in ("dense", "pruned", "change")):
        return [f"{place} is missing or holds no readings, although the step is finished. {again}"]
    digest = as_table(card.get("files")).get("verdict.json")
    if digest is not None and hashlib.sha256((folder / "verdict.json").read_bytes()).hexdigest() != digest:
        return [f"{place} was changed after it was measured (its digest differs from the card's). {again}"]
    return []


def read_json(path: Path, notes: list[str]) -> Any:
    """Content of a JSON file; None with a note when it is damaged, None when it is absent."""
    try:
        return _clean(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.parent.name}/{path.name} could not be read ({type(error).__name__}) and is left out.")
        return None


def _text(path: Path, notes: list[str]) -> str:
    try:
        return _clean(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return ""
    except OSError as error:
        notes.append(f"{path.name} could not be read ({type(error).__name__}) and is left out.")
        return ""


def _metrics(path: Path, notes: list[str]) -> tuple[Mapping[str, Any], ...]:
    """The whole lines; of others, such as a half-written one, a note tells."""
    rows, spoilt = [], 0
    for line in _text(path, notes).split("\n"):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            spoilt += 1
            continue
        if isinstance(row, dict):
            rows.append({_name(key): value for key, value in row.items()})
    if spoilt:
        what = f"{many(spoilt, 'line')} of {path.parent.name}/{path.name}"
        notes.append(f"{what} could not be read and {'is' if spoilt == 1 else 'are'} left out.")
    return tuple(rows)


@functools.lru_cache(256)
def _name(key: str) -> str:
    """A figure's name, cleaned once and not on every line; its values are only ever read as numbers."""
    return _UNSAFE.sub("\ufffd", key)


def _clean(entry: Any) -> Any:
    if isinstance(entry, str):
        return _UNSAFE.sub("\ufffd", entry)
    if isinstance(entry, dict):
        return {_clean(key): _clean(value) for key, value in entry.items()}
    if isinstance(entry, list):
        return [_clean(value) for value in entry]
    return entry


def cleaned(name: str) -> str:
    """A text from a file without characters that fool a terminal or a reader's eye."""
    return _UNSAFE.sub("\ufffd", name)


def as_table(entry: Any) -> dict[str, Any]:
    """The entry when it is a table, else an empty one."""
    return entry if isinstance(entry, dict) else {}


def as_number(entry: Any) -> Number | None:
    """The entry as a number (``"nan"`` and ``"inf"`` included), else None. Whole numbers stay whole."""
    if isinstance(entry, bool) or entry is None:
        return None
    if isinstance(entry, int):
        return entry if abs(entry) < 1 << 63 else None
    if isinstance(entry, float):
        return entry
    return float(entry) if entry in ("nan", "inf", "-inf") else None


def as_finite(entry: Any) -> Number | None:
    """The entry as a finite number, else None."""
    found = as_number(entry)
    return found if found is not None and math.isfinite(found) else None


def as_whole(entry: Any) -> int | None:
    """The entry when it is a whole number, else None."""
    return entry if isinstance(entry, int) and not isinstance(entry, bool) and abs(entry) < 1 << 63 else None


def as_reading(entry: Any) -> Reading | None:
    """The entry as a reading, else None; parts that are no numbers are dropped."""
    table = as_table(entry)
    value, stderr, low, high = (_float(table.get(key)) for key in ("value", "stderr", "low", "high"))
    if value is None:
        return None
    parts = {name: n for name, part in as_table(table.get("parts")).items() if (n := _float(part)) is not None}
    unit, note = (text if isinstance(text := table.get(key), str) else "" for key in ("unit", "note"))
    return Reading(value, unit, stderr, low, high, as_whole(table.get("n")) or 1, parts, note)


def _float(entry: Any) -> float | None:
    found = as_number(entry)
    return None if found is None else float(found)


def interval(reading: Reading) -> tuple[Number, Number] | None:
    """The 95 % interval of a reading: its own, or 1.96 standard errors either way, or None."""
    if reading.low is not None and reading.high is not None:
        found = (reading.low, reading.high)
    elif reading.stderr is not None:
        found = (reading.value - 1.96 * reading.stderr, reading.value + 1.96 * reading.stderr)
    else:
        return None
    return found if all(map(math.isfinite, found)) else None


def names(steps: Iterable[StepRecord]) -> tuple[str, ...]:
    """Folder names, for a section's source."""
    return tuple(step.folder.name for step in steps)


def _absent(folder: Path) -> str:
    if folder.is_file():
        return f"{folder} is a file; pass the run folder it lies in: `secateur report {folder.parent}`."
    near = sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
    hint = f" {nearest(folder.name, near)}" if near else ""
    return f"there is no folder {folder}.{hint} Pass a run folder made by `secateur train`, `prune` or `run`."
