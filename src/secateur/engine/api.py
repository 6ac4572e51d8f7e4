"""The Python verbs for a user's own network and data: train, prune, save, load."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.optim import Optimizer

from secateur.core.budget import Target
from secateur.core.errors import DataError, SecateurError, UsageError
from secateur.core.losses import CrossEntropy
from secateur.core.masks import Masks
from secateur.core.names import unwrap
from secateur.core.prunable import coverage
from secateur.core.sockets import Rule, Solver
from secateur.core.task import Batch, Task
from secateur.engine.binding import bind
from secateur.engine.compensating import Inputs
from secateur.engine.cutting import Cut, Plan
from secateur.engine.cutting import prune as carry_out
from secateur.engine.folder import Artefact, load_state, structure_of
from secateur.engine.folder import save as save_folder
from secateur.engine.loop import Training, needs_teacher
from secateur.engine.planning.plans import LayerPlan
from secateur.engine.planning.targets import is_aim
from secateur.engine.planning.verbs import carry_out_plan, plan
from secateur.engine.rebuilding import resize
from secateur.engine.recipe import TrainStep
from secateur.engine.solving import solve
from secateur.engine.surgeon import Curvature
from secateur.surgery.tracing import trace


class Batches:
    """Any re-iterable of batches as a loader: the order is the iterable's own.

    Args:
        data: batches ``(inputs, target)``; a list, or a ``DataLoader``.

    Raises:
        DataError: when it is empty, has no length, or can be read only once.
    """

    def __init__(self, data: Iterable[Batch]) -> None:
        if iter(data) is data or not hasattr(data, "__len__"):
            raise DataError(
                "training reads the data once an epoch; pass a list of batches or a DataLoader, not an iterator."
            )
        if not len(data):  # type: ignore[arg-type]
            raise DataError("the training data holds no batch; pass at least one (inputs, target).")
        self.data = data

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.data)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from ``start`` on."""
        for index, batch in enumerate(self.data):
            if index >= start:
                yield batch


def train(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    masks: Masks | None = None,
    rules: Sequence[Rule] = (),
    loss: Any = None,
    teacher: nn.Module | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    **options: Any,
) -> Masks:
    """Train a network in place, holding its zeros.

    Args:
        model: the network.
        data: re-iterable batches ``(inputs, target)``: a list, a ``DataLoader``, or a ``secateur.data.Loader``.
        masks: which weights are kept. By default all that can be pruned; of a network that plainly has been pruned,
            a hundredth of its weights or more being zero, those that are not zero (a warning says so).
        rules: what happens during training, such as ``Gradual(sparsity=0.95)``.
        loss: ``loss(output, target)``, mean over examples; cross-entropy by default.
        teacher: the network that distillation imitates; a copy of ``model`` as it is now by default.
        folder: where checkpoints and ``metrics.jsonl`` go; calling again with the same folder goes on. Calling with
            other options is refused.
        seed: for dropout and rules.
        **options: fields of :class:`TrainStep`, such as ``epochs=10, lr=0.1``.

    Returns:
        The masks at the end; the network's zeros agree with them.

    Raises:
        SecateurError: for options, data or masks that do not fit.
    """
    if "rules" in options:
        raise UsageError("pass rules once: train(..., rules=[...]).")
    step = bind(TrainStep, {**options, "rules": tuple(rules)}, "train")
    loader: Any = data if hasattr(data, "epoch") else Batches(data)
    if needs_teacher(step.rules) and teacher is None:
        teacher = copy.deepcopy(unwrap(model)).eval().requires_grad_(False)

    taken: list[Batch] = []  # read once: a shuffling loader would give another sample each time

    def sample(count: int, net: nn.Module) -> Task:
        seen = sum(len(batch[1]) for batch in taken)
        if seen >= count:
            return Task(net, loss or CrossEntropy(), taken)
        taken.clear()
        seen = 0
        for batch in loader.epoch(0):
            taken.append(batch)
            seen += len(batch[1])
            if seen >= count:
                break
        return Task(net, loss or CrossEntropy(), taken)

    training = Training(
        model, loader, step, masks, seed, Path(folder) if folder else None, sample=sample, teacher=teacher,
        loss=loss, say=lambda text: warnings.warn(text, stacklevel=6),
    )  # fmt: skip
    return training.fit()


def prune(
    task: Task,
    plan_or_to: Plan | LayerPlan | str | Target | None = None,
    *,
    solver: Solver | None = None,
    inputs: Inputs = "sequential",
    curvature: Curvature = "layers",
    rounds: int = 1,
    optimizer: Optimizer | None = None,
    also: Sequence[nn.Module] = (),
    layers: bool = False,
    **options: Any,
) -> Cut:
    """Prune the task's network in place: pruned weights become zero and stay zero in training.

    Args:
        task: network, loss (mean over examples) and data for scores, layers and forecast.
        plan_or_to: a plan, or the target of one (see :func:`plan` for the default). With a solver a plan says only how
            many weights go. A plan layer by layer says everything itself, its solver too.
        solver: chooses which weights go and moves the others to make up for them; without one none moves.
        inputs: what a solver's layers are given: the inputs from the network pruned so far (``"sequential"``), or from
            the ``"dense"`` one.
        curvature: what a solver goes by: each layer's outputs (``"layers"``), or the loss over all weights as one
            vector (``"ggn"``, ``"fisher"``, ``"hessian"``).
        rounds: how often the curvature of the whole network is taken anew.
        optimizer: the optimizer that will go on training; its state is cleared where weights go, and hooks keep
            the zeros.
        also: averaged copies (EMA) to prune along; not with a solver, which moves weights.
        layers: also forecast and measure the rise of the loss tensor by tensor, those before it pruned already, on the
            first 256 examples (two backward passes and one forward pass for each); a solver's layers always are.
        **options: as for :func:`plan`, when a target is given. ``measure=False`` holds for both: nothing but the loss
            is measured, neither in planning layer by layer nor after.

    Raises:
        SecateurError: as :func:`plan`; nothing was changed then.
    """
    if isinstance(plan_or_to, str) and ("patterns" in options or is_aim(plan_or_to)):
        plan_or_to = plan(task, plan_or_to, **options, solver=solver, inputs=inputs)
        solver, inputs, options = (
            None,
            "sequential",
            {key: options[key] for key in ("example", "measure") if key in options},
        )
    if isinstance(plan_or_to, LayerPlan):
        if solver is not None or inputs != "sequential" or curvature != "layers" or rounds != 1:
            raise UsageError("a plan layer by layer names its own solver; make it with plan(..., solver=...).")
        return carry_out_plan(task, plan_or_to, optimizer=optimizer, also=also, **options)
    if solver is None:
        if inputs != "sequential" or curvature != "layers" or rounds != 1:
            raise UsageError("inputs, curvature and rounds are for solvers; pass solver=..., or leave them out.")
        return carry_out(task, plan_or_to, optimizer=optimizer, also=also, layers=layers, **options)
    if also:
        raise UsageError("a solver moves weights, so averaged copies cannot follow; begin a new average afterwards.")
    before = {name: p.detach().clone() for name, p in task.params().items()}
    solved = solve(task, solver, plan_or_to, inputs=inputs, curvature=curvature, rounds=rounds, **options)
    try:
        done = carry_out(task, replace(solved.plan, forecast=None), optimizer=optimizer)
    except SecateurError:  # an optimizer of another network
        with torch.no_grad():
            for name, p in task.params().items():
                p.copy_(before[name])
        raise
    return replace(done, plan=solved.plan, layers=solved.layers, rounds=solved.rounds)


def save(
    folder: str | Path,
    model: nn.Module,
    masks: Masks | None = None,
    notes: dict[str, Any] | None = None,
    example: Any = None,
) -> Artefact:
    """Write a network of your own as a folder that loads anywhere, and read it back to be sure.

    Args:
        folder: where; made if absent.
        model: the network. Its class is noted, so that :func:`load` can be given a fresh instance.
        masks: which weights are kept; read off the zeros by default.
        notes: anything else for the card.
        example: a batch as the network takes it; with it the folder also holds the graph, and loads without the class.

    Raises:
        UsageError: for a ``GraphModule``, which has no class, without an example.
        ModelError: when torch.export cannot trace the network.
        MaskError: when a pruned weight is not zero.
        FileError: when the folder cannot be written.
    """
    if example is None and isinstance(unwrap(model), GraphModule):
        raise UsageError("a rewritten network has no class to load it by; pass example=<one batch> to save its graph.")
    program = trace(model, example).program if example is not None else None
    masks = masks or Masks.from_zeros(model)
    kind = type(unwrap(model))
    about = {"use": f"{kind.__module__}:{kind.__qualname__}", "options": {}, "input_shape": None, "outputs": None}
    counts = {name: [int(mask.sum()), mask.numel()] for name, mask in masks.items()}
    card = {
        "do": "save",
        "kept": masks.kept,
        "total": masks.total,
        "sparsity": masks.sparsity,
        "counts": counts,
        **(notes or {}),
    }
    left = {n: why for n, why in coverage(model).left_alone.items() if n not in masks}
    return save_folder(
        Path(folder), model, masks, structure_of(model, about, left), "# saved from Python\n", card, program
    )


def load(
    folder: str | Path, model: nn.Module | type[nn.Module] | None = None, **options: Any
) -> tuple[nn.Module, Masks]:
    """A network and its masks from a folder; every file is checked against its digest.

    Args:
        folder: a run folder, a step folder, or one written by :func:`save`.
        model: a fresh instance of the class to fill, as large as it was before surgery or smaller: it takes the widths
            that were saved; or the class itself, with ``options``. By default the network that ``structure.json``
            names, or the graph in the folder.
        **options: what the class is built with.

    Raises:
        UsageError: for options without a class.
        FileError: when a file is missing, damaged, or does not fit the network.
    """
    if options and not isinstance(model, type):
        raise UsageError("options are for the class of the network; pass it too: load(folder, Class, **options).")
    artefact = Artefact.open(folder)
    masks = artefact.masks()
    if model is None:
        return artefact.build(), masks
    model = model(**options) if isinstance(model, type) else model
    resize(model, artefact.structure, artefact.buffers(), str(artefact.folder))
    load_state(model, artefact.state(), str(artefact.folder))
    masks = masks.to(next(unwrap(model).parameters()).device)
    masks.check(model)
    return model, masks
