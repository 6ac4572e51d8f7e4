"""Comparisons: several methods at several sparsities with the same budget and several seeds, as data.

Every run of a comparison is an ordinary recipe in a folder of its own, ``METHOD-SPARSITY-SEED``, so it resumes, and is
skipped when it is there. The reporting rules are those of ShrinkBench (arXiv:2003.03033).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from secateur.core.budget import keep_for
from secateur.core.errors import UsageError, nearest
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.names import parameters
from secateur.core.task import Task
from secateur.data import Loader
from secateur.engine.binding import bind
from secateur.engine.comparing_macs import Counted
from secateur.engine.comparing_methods import (
    CONTROLS,
    DENSE,
    REST,
    Numbers,
    check,
    fill,
    steps,
    takes_sparsity,
)
from secateur.engine.recipe import FORMAT, Recipe, TrainStep
from secateur.engine.runner import Runner
from secateur.engine.training_cost import forward, moving

SEEDS, POINTS = 3, 5
"""Fewer seeds, or fewer points of a curve, are said to be few."""

COUNTED = f"{Counted.__module__}:{Counted.__name__}"


@dataclass(frozen=True)
class Spec:
    """What is compared.

    Args:
        sparsity: pruned / prunable weights, each in (0, 1).
        methods: names of criteria, rules or ``[[method]]`` tables; the controls are always in.
        seeds: seeds of whole runs: network, order of the data, and whatever a method draws.
        epochs: what each run may train.
    """

    sparsity: tuple[float, ...]
    methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 10

    def __post_init__(self) -> None:
        for name, entries in (("sparsity", self.sparsity), ("seeds", self.seeds)):
            if not entries:
                raise UsageError(f"compare.{name} is empty; name at least one, for example `{_EXAMPLES[name]}`.")
            if len(set(entries)) < len(entries):
                raise UsageError(f"compare.{name} is {list(entries)}, with one twice; name each once.")
        for value in self.sparsity:
            if not 0 < value < 1:
                raise UsageError(f"compare.sparsity has {value!r}; each must be in (0, 1), 0.9 means 90 % zeros.")
        if min(self.seeds) < 0:
            raise UsageError(f"compare.seeds is {list(self.seeds)}; seeds are whole numbers of at least 0.")
        if self.epochs < 2:
            raise UsageError(
                f"compare.epochs is {self.epochs}; it must be at least 2: magnitude, which is always in, trains half "
                "of them before pruning and half after it."
            )


_EXAMPLES = {"sparsity": "sparsity = [0.8, 0.9]", "seeds": "seeds = [0, 1, 2]"}


@dataclass(frozen=True)
class Own:
    """A method written out in the comparison.

    Args:
        name: how folders and tables call it.
        step: its steps, as in a recipe, with ``$sparsity``, ``$density``, ``$params``, ``$seed`` and ``$0.5 epochs`` in
            the place of numbers, and ``$rest epochs`` for what other train steps leave.
        epochs: what it trains in all where that is not the budget of the others; the table says so then.
    """

    name: str
    step: tuple[dict[str, Any], ...]
    epochs: int = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.+-]*", self.name) or self.name in (*CONTROLS, DENSE):
            raise UsageError(
                f"method name {self.name!r}: use letters, digits, dots, dashes and underscores, and none of "
                f"{', '.join((*CONTROLS, DENSE))}, which are always in."
            )
        if not self.step or self.epochs < 0:
            raise UsageError(f"method {self.name!r} needs a [[method.step]], and epochs of at least 0.")


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        name: its folder in the folder of the comparison.
        method: the method.
        sparsity: what it aims at; 0 for the dense network, None where the method's options decide.
        seed: the seed.
        epochs: what it trains in all.
        recipe: what it does.
    """

    name: str
    method: str
    sparsity: float | None
    seed: int
    epochs: int
    recipe: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Reference:
    """The dense network of a comparison.

    Args:
        params: all parameters.
        prunable: those that methods prune.
        macs: multiply-adds of one example.
        architecture: digest of the names and shapes of its parameters.
        data: digest of the data.
        examples: training and test examples.
    """

    params: int
    prunable: int
    macs: int
    architecture: str
    data: str
    examples: tuple[int, int]

    def kept(self, sparsity: float) -> int:
        """Parameters that a network of this sparsity keeps, those that cannot be pruned included."""
        return self.params - self.prunable + keep_for(sparsity, self.prunable)


@dataclass(frozen=True)
class Comparison:
    """What a comparison file says."""

    model: dict[str, Any]
    data: dict[str, Any]
    spec: Spec
    train: dict[str, Any] = field(default_factory=dict)
    own: tuple[Own, ...] = ()

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Comparison:
        """Build and check a comparison.

        Raises:
            UsageError: naming the key, the value and the nearest known name.
        """
        known = ("secateur", "model", "data", "compare", "train", "method")
        for key in table:
            if key not in known:
                raise UsageError(f"the comparison has no entry {key!r}. {nearest(key, known)}")
        if str(table.get("secateur", FORMAT)) != FORMAT:
            raise UsageError(f"the comparison is of format {table['secateur']!r}; this version reads {FORMAT!r}.")
        for key in ("model", "data", "compare"):
            if key not in table:
                raise UsageError(f"the comparison has no section [{key}]; {_SECTIONS[key]}.")
        parts = {key: _table(table.get(key, {}), key) for key in known[1:5]}
        methods = table.get("method", [])
        if not isinstance(methods, list | tuple):
            raise UsageError("method is not a list of tables; write [[method]].")
        own = tuple(bind(Own, _table(m, "method"), f"method {i}") for i, m in enumerate(methods, 1))
        made = cls(parts["model"], parts["data"], bind(Spec, parts["compare"], "compare"), parts["train"], own)
        made._check()
        return made

    def _check(self) -> None:
        names = [own.name for own in self.own]
        if len(set(names)) < len(names):
            raise UsageError(f"two methods have the same name among {', '.join(names)}; name each once.")
        for name in self.spec.methods:
            check(name, names)
        for key in ("do", "epochs"):
            if key in self.train:
                raise UsageError(f"train.{key} has no place here; the budget is `epochs` in [compare].")
        whole = Reference(1, 1, 1, "", "", (1, 1))
        for job in self.jobs(whole):  # what a recipe would refuse is refused before anything runs
            Recipe.from_table(job.recipe)

    @property
    def methods(self) -> list[str]:
        """All that is compared: the dense network, the controls, what is listed, and what is written out."""
        return list(dict.fromkeys((DENSE, *CONTROLS, *self.spec.methods, *(own.name for own in self.own))))

    def jobs(self, reference: Reference) -> list[Job]:
        """All runs, those of one seed in a row, each seed beginning with the dense network."""
        return [
            self._job(method, sparsity, seed, reference)
            for seed in self.spec.seeds
            for method in self.methods
            for sparsity in self._sparsities(method)
        ]

    def _sparsities(self, method: str) -> tuple[float | None, ...]:
        if method == DENSE:
            return (0.0,)
        own = self._own(method)
        return self.spec.sparsity if own is None or takes_sparsity(own.step) else (None,)

    def _own(self, method: str) -> Own | None:
        return next((own for own in self.own if own.name == method), None)

    def _job(self, method: str, sparsity: float | None, seed: int, reference: Reference) -> Job:
        own = self._own(method)
        epochs = (own.epochs if own else 0) or self.spec.epochs
        numbers = Numbers(sparsity, reference.kept(sparsity or 0.0), epochs, seed)
        named = {key: self.train[key] for key in ("only", "skip") if key in self.train}
        where = f"method {method!r}"
        table = fill(own.step, numbers, where) if own else steps(method, numbers, named)
        for kind in ("measure", "export"):
            if any(step.get("do") == kind for step in table):
                raise UsageError(f"{where} has a step to {kind}; leave it out: every run is measured alike.")
        table = [self._trained(step) if step.get("do") == "train" else step for step in table]
        table = _rest(table, epochs)
        shared = sum(step.get("epochs", 10) for step in table if step.get("do") == "train")
        if shared != epochs:
            raise UsageError(
                f"{where} trains {shared} epochs, and its budget is {epochs}. Share out the budget, for example with "
                f'`epochs = "$0.5 epochs"` and `epochs = "{REST}"`, or say `epochs = {shared}` in its [[method]].'
            )
        recipe = {"seed": seed, "model": self.model, "data": self.data, "step": table}
        told = "own" if sparsity is None else f"{sparsity:.12g}"
        return Job(f"{method}-{told}-{seed}", method, sparsity, seed, epochs, recipe)

    def _trained(self, step: dict[str, Any]) -> dict[str, Any]:
        """A train step with the shared options; its cost is counted step by step where rules change the zeros."""
        rules = [*_list(self.train.get("rules", [])), *_list(step.get("rules", []))]
        whole = {**self.train, **step}
        if rules:
            bound = bind(TrainStep, {"rules": rules}, "train").rules
            whole["rules"] = [COUNTED, *rules] if moving(bound) else rules
        return whole

    def to_table(self) -> dict[str, Any]:
        """Plain values, ready for :func:`secateur.engine.toml.dump`."""
        spec = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self.spec).items()}
        table = {"secateur": FORMAT, "model": self.model, "data": self.data, "compare": spec, "train": self.train}
        return {**table, "method": [asdict(own) for own in self.own]}

    def cautions(self) -> list[str]:
        """What a reader must know before believing the figures."""
        said, spec = [], self.spec
        if len(spec.seeds) < SEEDS:
            few = "one seed: a single figure, no mean and no interval" if len(spec.seeds) == 1 else "two seeds"
            said.append(f"Only {few}; at least {SEEDS} are needed to tell methods apart.")
        if len(spec.sparsity) < POINTS:
            said.append(f"{len(spec.sparsity)} of the {POINTS} points or more that a trade-off curve should have.")
        if self.data.get("use") in ("digits", "mnist"):
            said.append("One small data set and one network: the order of methods may be another elsewhere.")
        for own in self.own:
            if own.epochs and own.epochs != spec.epochs:
                said.append(f"`{own.name}` trains {own.epochs} epochs, the others {spec.epochs}.")
            mine = [(key, value) for s in own.step if s.get("do") == "train" for key, value in s.items()]
            changed = {key for key, value in mine if value != self.train.get(key)} - {"do", "epochs", "rules"}
            if changed:
                said.append(f"`{own.name}` trains with its own {', '.join(f'`{key}`' for key in sorted(changed))}.")
        return said


_SECTIONS = {
    "model": 'name the network, for example `use = "lenet_300_100"`',
    "data": 'name the data, for example `use = "digits"`',
    "compare": "say what is compared, for example `sparsity = [0.8, 0.9]` and `methods = [\"snip\"]`",
}  # fmt: skip


def refer(comparison: Comparison, data_dir: str | None = None) -> Reference:
    """The dense network that all runs are compared with.

    Raises:
        SecateurError: when it cannot be built or the data is missing.

    Cost: builds it once and passes one example through it.
    """
    job = comparison.jobs(Reference(1, 1, 1, "", "", (1, 1)))[0]
    runner = Runner(Recipe.from_table(job.recipe), Path("."), data_dir)
    data, state = runner.data(), runner.start()
    step = runner.recipe.steps[0]
    batches = Loader(data.test.take(torch.tensor([0])), 1, mean=data.mean, std=data.std)
    every = parameters(state.net)
    shapes = json.dumps({name: list(p.shape) for name, p in every.items()})
    return Reference(
        sum(p.numel() for p in every.values()),
        Masks.dense(state.net, step.only, step.skip).total,
        forward(Task(state.net, CrossEntropy(), batches)).dense,
        hashlib.sha256(shapes.encode()).hexdigest()[:12],
        data.digest,
        (len(data.train), len(data.test)),
    )


def _rest(table: list[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """Steps in which one train step that asks for the rest of the budget has it."""
    spent = sum(step.get("epochs", 10) for step in table if step.get("do") == "train" and step.get("epochs") != REST)
    return [{**step, "epochs": max(1, budget - spent)} if step.get("epochs") == REST else step for step in table]


def _list(entry: Any) -> list[Any]:
    return list(entry) if isinstance(entry, list | tuple) else [entry]


def _table(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise UsageError(f"{where} is {entry!r}; it must be a table.")
    return dict(entry)
