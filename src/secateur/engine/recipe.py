"""Recipes: what a network goes through, as data. Every command is a recipe of one step."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from secateur.core.errors import FileError, UsageError, nearest
from secateur.engine.binding import bind, table_of
from secateur.engine.steps import ExportStep, MeasureStep, PruneStep, RewindStep, ShrinkStep, TrainStep
from secateur.engine.toml import dump

FORMAT = "0.1"


@dataclass(frozen=True)
class ModelSpec:
    """The network: a name of ``secateur.nets``, ``module:function``, a ``.pt2`` file, and weights to begin with.

    Args:
        use: which network; empty to take the one of the folder given in ``load``.
        load: a run folder, a step folder or a ``.safetensors`` file with weights to begin with.
        options: widths and depths, as the constructor takes them.
    """

    use: str = ""
    load: str = ""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSpec:
    """The data.

    Args:
        use: a name of ``secateur.data``, a folder, or ``module:function``.
        batch: examples in a training batch (on each process).
        augment: ``"none"``, ``"flip"`` or ``"crop-flip"``.
        train: use only this many training examples (0: all).
        test: use only this many test examples (0: all).
        validation: hold out this many training examples to choose the best checkpoint.
        evaluation_batch: examples in a batch of evaluation.
        options: further arguments of the data set.
    """

    use: str = ""
    batch: int = 128
    augment: Literal["none", "flip", "crop-flip"] = "none"
    train: int = 0
    test: int = 0
    validation: int = 0
    evaluation_batch: int = 500
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("train", 0), ("test", 0), ("validation", 0), ("evaluation_batch", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"data: {name} is {getattr(self, name)}; it must be at least {least}.")


Step = TrainStep | PruneStep | ShrinkStep | RewindStep | MeasureStep | ExportStep
STEPS: dict[str, type[Any]] = {
    kind.do: kind for kind in (TrainStep, PruneStep, ShrinkStep, RewindStep, MeasureStep, ExportStep)
}
LOOKING = (MeasureStep, ExportStep)
"""Steps that leave the network as it is: what comes after them does not need them."""


@dataclass(frozen=True)
class Recipe:
    """A network, its data and the steps it goes through."""

    model: ModelSpec
    data: DataSpec
    steps: tuple[Any, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        for number, step in enumerate(self.steps, 1):
            if not isinstance(step, RewindStep):
                continue
            if step.to >= number or (step.to and isinstance(self.steps[step.to - 1], LOOKING)):
                raise UsageError(
                    f"step {number}: rewind to {step.to} names no step before it that has a network as its result; "
                    "0 is the network that the recipe began with."
                )
            if any(isinstance(between, ShrinkStep) for between in self.steps[step.to : number - 1]):
                raise UsageError(
                    f"step {number}: units are removed between step {step.to} and this rewind, so weights of then do "
                    "not fit. Rewind to a step after the shrink step."
                )

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Recipe:
        """Build and check a recipe.

        Raises:
            UsageError: naming the key, the value and the nearest known name.
        """
        known = ("secateur", "seed", "model", "data", "step")
        for key in table:
            if key not in known:
                raise UsageError(f"the recipe has no entry {key!r}. {nearest(key, known)}")
        version = str(table.get("secateur", FORMAT))
        if version != FORMAT:
            raise UsageError(f"the recipe is of format {version!r}; this version reads {FORMAT!r}. Update secateur.")
        seed = table.get("seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise UsageError(f"seed is {seed!r}; it must be a whole number.")
        steps = table.get("step", [])
        if not isinstance(steps, list) or not steps:
            raise UsageError(
                'the recipe has no steps; add a [[step]] with do = "train", "prune", "shrink", "rewind", "measure" or '
                '"export".'
            )
        return cls(
            bind(ModelSpec, _with_options(ModelSpec, table.get("model", {}), "model"), "model"),
            bind(DataSpec, _with_options(DataSpec, table.get("data", {}), "data"), "data"),
            tuple(_step(entry, i + 1) for i, entry in enumerate(steps)),
            seed,
        )

    def to_table(self, defaults: bool = False) -> dict[str, Any]:
        """The recipe as plain values, ready for :func:`secateur.engine.toml.dump`."""
        table: dict[str, Any] = {"secateur": FORMAT, "seed": self.seed}
        for name, spec in (("model", self.model), ("data", self.data)):
            entry = table_of(spec, defaults)
            options = entry.pop("options", {})
            table[name] = {**entry, **options}
        table["step"] = [{"do": step.do, **table_of(step, defaults)} for step in self.steps]
        return table

    def to_toml(self, defaults: bool = False) -> str:
        """The recipe as TOML."""
        return dump(self.to_table(defaults))

    def keys(self, origin: str) -> list[str]:
        """A key for every step: a hash of all that was asked up to it, and of the data and weights it began from.

        Fields at their default are left out, so a new option with a default leaves old results valid.
        """
        table = self.to_table()
        above = hashlib.sha256(json.dumps([table["model"], table["data"], self.seed, origin], sort_keys=True).encode())
        keys = []
        for entry in table["step"]:
            above.update(json.dumps(entry, sort_keys=True).encode())
            keys.append(above.hexdigest()[:12])
        return keys


def read_recipe(path: Path) -> dict[str, Any]:
    """The table in a TOML file.

    Raises:
        FileError: when the file is missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"cannot read the recipe {path}: {error.strerror or error}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FileError(f"{path} is not TOML: {error}.") from error


def _with_options(kind: type[Any], table: Any, where: str) -> dict[str, Any]:
    """Keys that are no field of the spec are options of the network or the data set."""
    if not isinstance(table, Mapping):
        raise UsageError(f'{where} is {table!r}; it must be a table with `use = "name"`.')
    fields = set(kind.__dataclass_fields__)
    inner = table.get("options", {})
    if not isinstance(inner, Mapping):
        raise UsageError(f"{where}.options is {inner!r}; it must be a table, or leave it out: `{where}.NAME = ...`.")
    options = {**inner, **{k: v for k, v in table.items() if k not in fields}}
    return {**{k: v for k, v in table.items() if k in fields and k != "options"}, "options": options}


def _step(entry: Any, number: int) -> Any:
    if not isinstance(entry, Mapping) or "do" not in entry:
        raise UsageError(f"step {number} needs `do`: one of {', '.join(STEPS)}.")
    if entry["do"] not in STEPS:
        raise UsageError(f"step {number}: there is no step {entry['do']!r}. {nearest(str(entry['do']), STEPS)}")
    table = {key: value for key, value in entry.items() if key != "do"}
    return bind(STEPS[entry["do"]], table, f"step {number}")
