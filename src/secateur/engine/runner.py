"""Runs a recipe: skips finished steps, goes on with unfinished ones, writes one folder a step."""

from __future__ import annotations

import contextlib
import hashlib
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.core import streams
from secateur.core.errors import FileError, ModelError, UsageError
from secateur.core.files import file_digest, read_json
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.prunable import coverage
from secateur.core.task import Task
from secateur.data import Dataset, Loader
from secateur.data import load as load_data
from secateur.engine import distributed
from secateur.engine.cautions import heard
from secateur.engine.checkpoint import STATE
from secateur.engine.compensating import LayerCut
from secateur.engine.cutting import plan as make_plan
from secateur.engine.cutting import prune as carry_out
from secateur.engine.exporting_step import check_packages, export_all
from secateur.engine.folder import (
    CARD,
    REWRITTEN,
    STRUCTURE,
    WEIGHTS,
    Artefact,
    load_state,
    save,
    structure_of,
)  # fmt: skip
from secateur.engine.loop import Training, needs_teacher
from secateur.engine.measuring_step import measure
from secateur.engine.optimize import state_bytes
from secateur.engine.planning.step import prune_by_plan
from secateur.engine.rebuilding import resize
from secateur.engine.recipe import (
    LOOKING,
    ExportStep,
    MeasureStep,
    PruneStep,
    Recipe,
    RewindStep,
    ShrinkStep,
    TrainStep,
)
from secateur.engine.recovering import Recovery
from secateur.engine.removing import Choice, few, reference
from secateur.engine.rewinding import rewind
from secateur.engine.run_folder import alone, step_names, write_run
from secateur.engine.shrinking import thin
from secateur.engine.solving import solve
from secateur.engine.sources import sources
from secateur.engine.start import Listener, State, begin
from secateur.engine.surgeon import Round
from secateur.engine.training_cost import of_step, step_sizes
from secateur.probes.accuracy import Accuracy
from secateur.runtime.lower_export import quiet
from secateur.surgery.costs import Costs
from secateur.surgery.tracing import trace


@dataclass
class Runner:
    """Runs one recipe in one folder.

    Args:
        recipe: what to do.
        out: the run folder.
        data_dir: where data sets are looked up.
        listener: hears what happens.
        dense: folder of the dense network to compare with, when the recipe does not contain it.
    """

    recipe: Recipe
    out: Path
    data_dir: str | None = None
    listener: Listener = field(default_factory=Listener)
    dense: str = ""
    _places: list[Path] = field(default_factory=list, init=False)

    def run(self) -> Path:
        """Run what is missing.

        Returns:
            The run folder.

        Raises:
            SecateurError: for anything the user can mend; finished steps stay.
            KeyboardInterrupt: after a checkpoint, so that running again goes on.
        """
        check_packages(self.recipe.steps)
        data = self.data()
        keys = self._keys(data)
        data = _near(data)
        state = begin(self.recipe, data, self.listener, self.dense)
        with alone(self.out) if distributed.rank() == 0 else contextlib.nullcontext():
            write_run(self.out, self.recipe, keys)
            steps = list(zip(self.recipe.steps, keys, strict=True))
            self._places = [self.out / name for name in step_names(self.recipe, keys)]
            for number, ((step, key), folder) in enumerate(zip(steps, self._places, strict=True), 1):
                state = self._step(number, step, key, folder, state, data)
                distributed.barrier()
            write_run(self.out, self.recipe, keys)
        return self.out

    def stage(self, number: int, key: str, out: Path) -> Path:
        """Carry out one step alone; the steps before it that make a network lie finished in the run folder.

        Args:
            number: the step, from 1.
            key: its key, as :meth:`plan` gave it.
            out: where its folder is made; an unfinished one that lies there goes on.

        Returns:
            The step's folder.

        Raises:
            UsageError: when the data or the user's own code have changed since the key was made.
            FileError: when a step before is not finished, or was changed.
        """
        data = self.data()
        keys = self._keys(data)
        if keys[number - 1] != key:
            raise UsageError(f"step {number}: data or code changed since it was planned; run the same command again.")
        names = step_names(self.recipe, keys)[:number]
        self._places = [*(self.out / name for name in names[:-1]), out / names[-1]]
        data = _near(data)
        state = begin(self.recipe, data, self.listener, self.dense)
        for n, (step, own, place) in enumerate(zip(self.recipe.steps, keys, self._places, strict=False), 1):
            if n < number and isinstance(step, LOOKING):
                continue
            if n < number and not (place / CARD).is_file():
                raise FileError(f"{place} is not finished, and step {number} needs it. Run the same command again.")
            state = self._step(n, step, own, place, state, data)
        return self._places[-1]

    def data(self) -> Dataset:
        """The data set, cut down as the recipe asks."""
        spec = self.recipe.data
        if not spec.use:
            raise UsageError(
                "no data set is named; pass `--data NAME` (for example digits, mnist, cifar10) or a folder."
            )
        data = load_data(spec.use, self.data_dir, **spec.options)
        if spec.train or spec.test:
            data = data.subset(spec.train or len(data.train), spec.test or len(data.test), self.recipe.seed)
        return data.split_validation(spec.validation, self.recipe.seed) if spec.validation else data

    def plan(self) -> list[dict[str, Any]]:
        """What :meth:`run` would do: a row a step with its key, and whether it is done. Trains nothing."""
        keys, rows = self._keys(self.data()), []
        names = step_names(self.recipe, keys)
        for number, (step, key, name) in enumerate(zip(self.recipe.steps, keys, names, strict=True), 1):
            folder = self.out / name
            state = "done" if (folder / CARD).is_file() else "unfinished" if (folder / STATE).is_file() else "to do"
            rows.append({"number": number, "do": step.do, "key": key, "folder": str(folder), "state": state})
        return rows

    def start(self) -> State:
        """The network the first step begins with (for plans)."""
        return begin(self.recipe, self.data(), self.listener, self.dense)

    def sample(self, data: Dataset, examples: int, net: nn.Module, seed: int | None = None) -> Task:
        """A fixed random sample of the training data, without augmentation, as a task; by default by the run's seed."""
        count = min(examples, len(data.train))
        seed = self.recipe.seed if seed is None else seed
        order = torch.randperm(len(data.train), generator=streams.stream(seed, "sample"))[:count]
        split = data.train.take(order)
        return Task(net, CrossEntropy(), Loader(split, min(256, count), mean=data.mean, std=data.std))

    def _keys(self, data: Dataset) -> list[str]:
        """A key for every step; the user's own code in it or in a step before counts by its content."""
        keys, above = self.recipe.keys(self._origin(data)), []
        for place, entry in enumerate(self.recipe.to_table()["step"]):
            if own := sources(entry):
                above.append(own)
            if above:
                keys[place] = hashlib.sha256("/".join((keys[place], *above)).encode()).hexdigest()[:12]
        return keys

    def _origin(self, data: Dataset) -> str:
        """Digest of the data, of the weights a run begins with and of the user's own code that makes network and data.

        Results are reused only when all are the same.
        """
        load = Path(self.recipe.model.load) if self.recipe.model.load else None
        weights = "" if load is None else Artefact.open(load).digest if load.is_dir() else file_digest(load)
        teachers = [
            Artefact.open(s.teacher).digest for s in self.recipe.steps if isinstance(s, TrainStep) and s.teacher
        ]
        plans = [file_digest(Path(s.plan)) for s in self.recipe.steps if isinstance(s, PruneStep) and s.plan]
        own = sources([self.recipe.to_table()[part] for part in ("model", "data")])
        return "/".join((data.digest, weights, *teachers, *plans, *([own] if own else [])))

    def _step(self, number: int, step: Any, key: str, folder: Path, given: State, data: Dataset) -> State:
        steps, state = self._length(step, data), given
        done = (folder / CARD).is_file()
        distributed.barrier()  # all have looked before the first process writes one
        if done:
            card = read_json(folder / CARD)
            if distributed.rank() == 0:  # a process killed right after it wrote the card had no time for this
                (folder / STATE).unlink(missing_ok=True)
            if not isinstance(step, LOOKING):
                state = self._reload(folder, state, step)
            self.listener.end(number, step, card, skipped=True)
            return state
        if distributed.rank() == 0:
            for left in folder.glob(".*"):  # half-written files of a process that was killed; we hold the lock
                left.unlink()
        self.listener.begin(number, step, folder, steps)
        began = time.perf_counter()
        about = {"do": step.do, "key": key, "seed": self.recipe.seed}
        if isinstance(step, MeasureStep):
            sample = lambda n: self.sample(data, n, given.net).data  # noqa: E731
            say = self.listener.say
            distributed.first(lambda: measure(step, folder, given, data, self.recipe, about, sample, say))
        elif isinstance(step, ExportStep):
            distributed.first(lambda: export_all(step, folder, given, data, about))
        else:
            extra = self._carry_out(step, folder, given, data)
            extra.setdefault("seconds", round(time.perf_counter() - began, 3))
            facts = {**about, **extra}
            distributed.first(lambda: self._save(folder, given, data, facts, number))
            state = self._reload(folder, state, step)
        self.listener.end(number, step, read_json(folder / CARD), skipped=False)
        return state

    def _carry_out(self, step: Any, folder: Path, state: State, data: Dataset) -> dict[str, Any]:
        if isinstance(step, TrainStep):
            return self._train(step, folder, state, data)
        if isinstance(step, RewindStep):
            return rewind(step, state, self.recipe, data, self._places, self.dense)
        return self._shrink(step, state, data) if isinstance(step, ShrinkStep) else self._prune(step, state, data)

    def _length(self, step: Any, data: Dataset) -> int:
        if not isinstance(step, TrainStep):
            return 1
        batches = -(-len(data.train) // (self.recipe.data.batch * distributed.world()))
        return step.epochs * -(-batches // step.accumulate)

    def _reload(self, folder: Path, state: State, step: Any) -> State:
        """The step's result as it lies on disk: what was not saved cannot be reported."""
        artefact = Artefact.open(folder)
        where, net = distributed.device(), state.net
        if artefact.structure["model"]["use"] == REWRITTEN:
            net = artefact.build().to(where)
        else:
            resize(net, artefact.structure, artefact.buffers(), str(folder / STRUCTURE))
            load_state(net, artefact.state(), str(folder / WEIGHTS))
        masks = artefact.masks().to(where)
        masks.check(net)
        shrunk = artefact.card.get("shrunk")
        whole = masks.kept == masks.total and not shrunk and not isinstance(step, RewindStep)
        dense = artefact if whole else state.dense  # a network that was set back is none to compare with
        left = dict(artefact.structure.get("left_alone", {}))
        return State(net, masks, dict(artefact.structure["model"]), left, artefact, dense, shrunk)

    def _train(self, step: TrainStep, folder: Path, state: State, data: Dataset) -> dict[str, Any]:
        spec, seed = self.recipe.data, self.recipe.seed
        loader = Loader(
            data.train, spec.batch, shuffle=True, seed=seed, augment=spec.augment, mean=data.mean, std=data.std,
            rank=distributed.rank(), world=distributed.world(),
        )  # fmt: skip
        found = coverage(state.net, step.only, step.skip)
        masks = state.masks
        if masks.kept == masks.total and (step.only or step.skip):
            masks = Masks.dense(state.net, step.only, step.skip)
            state.left_alone = found.left_alone
        tests = Loader(data.test, spec.evaluation_batch, mean=data.mean, std=data.std)
        checks = (
            Loader(data.validation, spec.evaluation_batch, mean=data.mean, std=data.std) if data.validation else None
        )
        training = Training(
            state.net, loader, step, masks, seed, folder,
            lambda net: _figures(Task(net, CrossEntropy(), tests)),
            (lambda net: _figures(Task(net, CrossEntropy(), checks))["test/accuracy"]) if checks else None,
            lambda n, net: self.sample(data, n, net),
            self._teacher(step, state), self.listener.figures,
        )  # fmt: skip
        state.masks = training.fit()
        best = training.best_masks
        if best is not None and training.best_state is not None and best.kept <= state.masks.kept:
            load_state(state.net, training.best_state, str(folder / "best.safetensors"))
            state.masks = best
        facts = {"seconds": round(training.seconds(), 3), "steps": training.run.step}
        facts["optimizer_bytes"] = state_bytes(training.run.optimizer)
        one = Task(
            state.net, CrossEntropy(), Loader(data.test.take(torch.tensor([0])), 1, mean=data.mean, std=data.std)
        )
        sizes = step_sizes(len(data.train), spec.batch * distributed.world(), step.accumulate)
        return {**facts, "training_macs": of_step(step, one, state.masks, sizes, self._teacher(step, state))}

    def _teacher(self, step: TrainStep, state: State) -> nn.Module | None:
        if not needs_teacher(step.rules):
            return None
        source = Artefact.open(step.teacher) if step.teacher else state.dense
        if source is None:
            raise UsageError(
                "distillation needs a dense network to imitate; train one first, or name its folder in `teacher`."
            )
        return source.build().to(distributed.device()).requires_grad_(False)

    def _prune(self, step: PruneStep, state: State, data: Dataset) -> dict[str, Any]:
        task = self.sample(data, step.examples, state.net)
        choices = (step.to, step.criterion, step.allocation, step.pattern)
        names = {"only": step.only, "skip": step.skip, "masks": state.masks}
        recovery = Recovery(step.recover, task, step.last_layer)
        if step.plan:
            facts = prune_by_plan(
                step, task, state, recovery, self.listener.say,
                draw=lambda examples, seed: self.sample(data, examples, state.net, seed),
            )  # fmt: skip
            return {**facts, **self._recover(recovery, state, data)}
        layers: list[LayerCut] = []
        rounds: tuple[Round, ...] = ()
        with heard() as cautions:
            if step.solver is None:
                cut = carry_out(task, make_plan(task, *choices, **names, record=True), layers=True)
                done, layers = cut.plan, list(cut.layers)
            else:
                ways = {"inputs": step.inputs, "curvature": step.curvature, "rounds": step.rounds}
                solved = solve(task, step.solver, *choices, **names, **ways)
                done, layers, rounds = solved.plan, list(solved.layers), solved.rounds
        for text in cautions:
            self.listener.say(text)
        state.masks, state.left_alone = done.masks, dict(done.left_alone)
        return {
            "forecast": done.forecast.to_json() if done.forecast else None, "target": str(done.target),
            "layers": [layer.to_json() for layer in layers], "rounds": [r.to_json() for r in rounds],
            "cautions": cautions, "scores": done.scores, **self._recover(recovery, state, data),
        }  # fmt: skip

    def _shrink(self, step: ShrinkStep, state: State, data: Dataset) -> dict[str, Any]:
        task = self.sample(data, step.examples, state.net)
        tests = Loader(data.test, self.recipe.data.evaluation_batch, mean=data.mean, std=data.std)
        with heard() as cautions:
            done = thin(
                task, step.to, step.criterion, Choice.of(step), rounds=step.rounds, rewriting=step.rewriting,
                statistics=step.recover == "batchnorm", base=self.base(step, state, task),
                judge=lambda now: Accuracy()(Task(now.model, CrossEntropy(), tests)).to_json(),
                told=lambda plan: self.listener.say(plan.brief()),
            )  # fmt: skip
        for text in (*cautions, *done.notes):
            self.listener.say(text)
        state.net, state.masks = done.model, done.masks(state.masks)
        if done.rewritten:
            state.model = {**state.model, "use": REWRITTEN, "options": {}}
        dense = {name: pair[0] for name, pair in (state.shrunk or {}).items()} or done.before
        state.shrunk = {name: [dense[name], n] for name, n in done.after.items()}
        return {**done.to_json(), "cautions": cautions}

    def base(self, step: ShrinkStep, state: State, task: Task) -> Costs | None:
        """What shares of a target are of: the dense network, where units are gone already."""
        if state.shrunk is None or state.dense is None:
            return None
        return reference(state.dense.build().to(distributed.device()), task, step.granularity)

    def _recover(self, recovery: Recovery, state: State, data: Dataset) -> dict[str, Any]:
        """What a step asks for after pruning, with the accuracy before and after on the test data."""
        tests = Loader(data.test, self.recipe.data.evaluation_batch, mean=data.mean, std=data.std)
        judge = Task(state.net, CrossEntropy(), tests)
        done = recovery(state.masks, lambda: Accuracy()(judge).to_json())
        return {"recovered": done} if done else {}

    def _save(self, folder: Path, state: State, data: Dataset, about: dict[str, Any], number: int) -> None:
        masks = state.masks
        counts = {name: [int(mask.sum()), mask.numel()] for name, mask in masks.items()}
        tests = Loader(data.test, self.recipe.data.evaluation_batch, mean=data.mean, std=data.std)
        reading = Accuracy()(Task(state.net, CrossEntropy(), tests))
        link = lambda a: None if a is None else {"folder": str(a.folder), "digest": a.digest}  # noqa: E731
        card = {
            **about, "data": data.name, "kept": masks.kept, "total": masks.total, "sparsity": masks.sparsity,
            "counts": counts, "left_alone": state.left_alone, "readings": {"accuracy": reading.to_json()},
            "parent": link(state.artefact), "dense": link(state.dense),
            **({"shrunk": state.shrunk} if state.shrunk else {}),
        }  # fmt: skip
        program = None
        if state.model["use"] == REWRITTEN:
            with quiet():
                program = trace(state.net, few(self.sample(data, 2, state.net))).program
        recipe = replace(self.recipe, steps=self.recipe.steps[:number]).to_toml()
        save(folder, state.net, masks, structure_of(state.net, state.model, state.left_alone), recipe, card, program)
        (folder / STATE).unlink(missing_ok=True)


def _near(data: Dataset) -> Dataset:
    """The data on the CUDA device when half of its free memory holds them: then batches are made there."""
    where = distributed.device()
    if where.type != "cuda":
        return data
    size = sum(tensor.nbytes for _, split in data.splits() for tensor in (split.x, split.y))
    return data.to(where) if 2 * size < torch.cuda.mem_get_info(where)[0] else data


def _figures(task: Task) -> dict[str, float]:
    """Accuracy in per cent and mean loss over a task's data, in one pass."""
    right = count = 0
    loss = examples = 0.0
    for output, target, n in task.outputs():
        counted = target != -100
        right += int(((output.argmax(-1) == target) & counted).sum())
        count += int(counted.sum())
        loss += float(task.loss(output, target)) * n
        examples += n
    if not count:
        raise ModelError("no target counts towards accuracy: all of them are the ignored value -100.")
    return {"test/accuracy": 100.0 * right / count, "test/loss": loss / examples}
