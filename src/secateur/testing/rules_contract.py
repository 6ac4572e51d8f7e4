"""The contract of rules: they resume to the bit, leave a plain network behind and keep their counts.

For authors of rules: one line in a test file, ``check_rule(MyRule())``. The first broken promise raises
:class:`ContractError` with the rule, the promise, the network and what was seen.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.budget import keep_for
from secateur.core.errors import MaskError, SecateurError, UsageError
from secateur.core.masks import Masks
from secateur.core.names import parameters
from secateur.core.patterns import NM, Pattern, Unstructured
from secateur.core.prunable import coverage
from secateur.core.sockets import Rule
from secateur.core.streams import global_state
from secateur.core.task import Task
from secateur.data import Loader, Split
from secateur.engine.checkpoint import STATE, load_state
from secateur.engine.loop import Training, needs_teacher
from secateur.engine.recipe import TrainStep
from secateur.testing.cases import CASES
from secateur.testing.promises import ContractError, broken, check_form, chosen, expect, expecting, same_random_state
from secateur.testing.snapshot import changes

__all__ = ["ContractError", "check_rule"]

_BATCHES = (8, 6)
_OPTIONS: dict[str, dict[str, Any]] = {
    "tanh_mlp": {"optimizer": "adam", "lr": 0.01, "warmup": 1.0},
    "relu_mlp": {"nesterov": True, "weight_decay": 1e-3, "clip": 1.0},
    "conv_bn": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "residual_bn": {"ema": 0.9, "weight_decay": 1e-3},
    "depthwise": {"optimizer": "rmsprop", "lr": 0.001},
    "attention": {"accumulate": 2, "smoothing": 0.1},
    "tied": {"optimizer": "adam", "lr": 0.01, "only": ("embed.weight", "up.weight", "down.weight")},
    "lstm": {"schedule": "one-cycle"},
}


@dataclass
class _Trial:
    """One network with its data and options, to be trained with a rule any number of times."""

    rule: Rule
    name: str
    step: TrainStep
    dtype: torch.dtype
    device: torch.device
    task: Task = field(init=False)
    split: Split = field(init=False)

    def __post_init__(self) -> None:
        self.task = CASES[self.name](self.dtype, _BATCHES)
        pairs = list(self.task.data)
        self.split = Split(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])).to(self.device)

    @property
    def per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-len(_BATCHES) // self.step.accumulate)

    def training(self, folder: Path, copies: Sequence[int] = (), resumed: bool = False) -> Training:
        """A run with a fresh network that lays a copy of the checkpoint after each step of ``copies`` aside."""
        net = CASES[self.name](self.dtype, _BATCHES).model.to(self.device)
        if resumed:  # everything must come from the checkpoint
            for tensor in (*net.parameters(), *net.buffers()):
                if tensor.is_floating_point():
                    tensor.data.fill_(torch.nan)

        def watch(figures: dict[str, Any]) -> None:
            done = figures["step"] - 1
            if done in copies:
                (folder / str(done)).mkdir(exist_ok=True)
                shutil.copyfile(folder / STATE, folder / str(done) / STATE)

        def sample(examples: int, model: nn.Module) -> Task:
            count = min(examples, len(self.split))
            return Task(model, self.task.loss, [(self.split.x[:count], self.split.y[:count])])

        teacher = CASES[self.name](self.dtype, _BATCHES, 1).model.to(self.device).requires_grad_(False)
        loader = Loader(self.split, _BATCHES[0], shuffle=True, seed=3, dtype=self.dtype)
        step = replace(self.step, save_every=1 if copies else 0)
        return Training(
            net, loader, step, seed=5, folder=folder, sample=sample, watch=watch,
            teacher=teacher if needs_teacher(step.rules) else None,
        )  # fmt: skip


def check_rule(
    rule: Rule, networks: Iterable[str] | None = None, epochs: int = 10, device: torch.device | str = "cpu"
) -> None:
    """Check a rule against the contract of all rules; returns when it holds.

    Its form (a frozen dataclass, docstring with a *Cost*, paper, repr that rebuilds it). On every network, each with
    another optimizer: a run that is stopped after step k (every k on the first network) and resumed, by a fresh
    network full of NaN, ends as the uninterrupted one to the bit (weights, buffers, masks, optimizer, averages, rule
    state, random state); after ``end`` the network is plain (the same modules, parameters and names in the same
    order, no hooks) and finite, its zeros are the masks, and their count is exactly the one of the rule's
    ``sparsity`` if it has one; torch's global random state moves as in training without the rule; the teacher is
    left alone. One network is also trained in bfloat16. Tied weights may be refused with a :class:`SecateurError`,
    nothing else.

    Args:
        rule: the instance to check; its sparsity should be moderate, for the networks have about a hundred weights.
        networks: names in :data:`secateur.testing.cases.CASES`; all by default.
        epochs: length of a run, of two steps an epoch.
        device: where the networks live.

    Raises:
        ContractError: at the first promise broken.
        UsageError: for an unknown network.

    Cost: about forty short training runs on tiny networks, a few seconds.
    """
    check_form(rule, Rule)
    names = chosen(networks)
    with same_random_state():
        for number, name in enumerate(names):
            _check_network(rule, name, epochs, torch.float64, torch.device(device), number)
        _check_network(rule, names[0], epochs, torch.bfloat16, torch.device(device), len(names))


def _check_network(rule: Rule, name: str, epochs: int, dtype: torch.dtype, device: torch.device, number: int) -> None:
    trial = _trial(rule, name, epochs, dtype, device)
    if trial is None:
        return
    where = f"{name} in {str(dtype).removeprefix('torch.')}"
    total = epochs * trial.per_epoch
    # Every step on the first network, so every change of phase; another one on each of the others
    stops = range(1, total) if number == 0 else (1 + 3 * number % (total - 1),)
    with tempfile.TemporaryDirectory() as folder:
        try:
            whole = _finished(trial, Path(folder), where, stops)
        except SecateurError as error:
            if name == "tied":
                return
            raise broken(rule, "works", where, f"it raised {type(error).__name__}: {error}") from error
        if number == 0 or any(isinstance(module, nn.Dropout) for module in trial.task.model.modules()):
            _check_random(trial, Path(folder) / "plain", where, whole)
        for stop in stops:
            _check_resume(trial, Path(folder) / str(stop), where, stop, whole)


def _trial(rule: Rule, name: str, epochs: int, dtype: torch.dtype, device: torch.device) -> _Trial | None:
    """The network without tensors that cannot take the rule's pattern; None when no other is left."""
    step = TrainStep(epochs=epochs, rules=(rule,), **{"lr": 0.05, **_OPTIONS.get(name, {})})
    pattern: Pattern = getattr(rule, "pattern", Unstructured())
    prunable = coverage(CASES[name]().model, step.only).prunable
    unfit = tuple(key for key, w in prunable.items() if pattern.why_not(tuple(w.shape)))
    if len(unfit) == len(prunable):
        return None
    return _Trial(rule, name, replace(step, skip=unfit), dtype, device)


def _finished(trial: _Trial, folder: Path, where: str, stops: Sequence[int]) -> dict[str, Any]:
    """Train to the end, check what is left behind, and return all that a resumed run must reach."""
    training = trial.training(folder, stops)
    try:
        before = _form(training.model)
        teacher = copy.deepcopy(training.teacher.state_dict()) if training.teacher is not None else {}
        masks = _fit(training, trial.rule, where)
    except UsageError:
        if not trial.step.ema:
            raise
        trial.step = replace(trial.step, ema=0.0)  # a rule may refuse to be averaged
        return _finished(trial, folder, where, stops)
    must = expecting(trial.rule, where)
    odd = changes(before, _form(training.model))
    must(not odd, "leaves a plain network behind", f"changed: {', '.join(odd[:4])}")
    if training.teacher is not None:
        odd = changes(teacher, training.teacher.state_dict())
        must(not odd, "leaves the teacher alone", f"changed: {', '.join(odd[:4])}")
    _check_zeros(trial, where, training.model, masks)
    return _outcome(training, folder, masks)


def _fit(training: Training, rule: Rule, where: str) -> Masks:
    try:
        return training.fit()
    except MaskError as error:
        raise broken(rule, "leaves zeros that are the masks", where, str(error)) from error
    except SecateurError:
        raise
    except Exception as error:
        raise broken(rule, "works", where, f"it raised {type(error).__name__}: {error}") from error


def _form(model: nn.Module) -> dict[str, Any]:
    """Everything about a network but its numbers."""
    seen: dict[str, Any] = {"the names in `state_dict`": list(model.state_dict())}
    for name, module in model.named_modules():
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        seen[f"the type of `{name}`"] = type(module)
        seen[f"the hooks of `{name}`"] = [len(getattr(module, kind)) for kind in kinds]
    for name, p in parameters(model).items():
        seen[f"the parameter `{name}`"] = (id(p), p.dtype, tuple(p.shape), p.requires_grad)
        kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
        seen[f"the hooks of `{name}`"] = [len(getattr(p, kind) or ()) for kind in kinds]
    return seen


def _check_zeros(trial: _Trial, where: str, model: nn.Module, masks: Masks) -> None:
    must = expecting(trial.rule, where)
    wanted = Masks.dense(model, trial.step.only, trial.step.skip)
    must(set(masks) == set(wanted), "keeps the tensors of the masks", f"{list(wanted)} became {list(masks)}")
    bad = [name for name, t in model.state_dict().items() if isinstance(t, Tensor) and not bool(t.isfinite().all())]
    must(not bad, "leaves finite numbers", f"NaN or infinity in {', '.join(bad[:4])}")
    sparsity, pattern = getattr(trial.rule, "sparsity", None), getattr(trial.rule, "pattern", Unstructured())
    if not isinstance(sparsity, float):
        return
    if isinstance(pattern, NM):
        least = most = sum(pattern.fixed(tuple(mask.shape)) or 0 for mask in masks.values())
    else:
        most = keep_for(sparsity, masks.total)
        least = most + 1 - max(pattern.unit_size(tuple(mask.shape)) for mask in masks.values())
    exact = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    found = f"{masks.kept:,} of {masks.total:,} weights are kept; a sparsity of {sparsity:g} keeps {exact}"
    must(least <= masks.kept <= most, "keeps its count exactly", found)


def _outcome(training: Training, folder: Path, masks: Masks) -> dict[str, Any]:
    """The last checkpoint, the network after the end, and the random states."""
    saved = load_state(folder) or {}
    last = {f"{key} before the end": value for key, value in saved.items() if key not in ("seconds", "metrics")}
    network = {f"`{name}`": tensor.detach().clone() for name, tensor in training.model.state_dict().items()}
    return {**last, **network, "the masks": dict(masks), "torch's random state": global_state()}


def _check_random(trial: _Trial, folder: Path, where: str, whole: dict[str, Any]) -> None:
    plain = trial.training(folder)
    plain.step = replace(plain.step, rules=())
    plain.fit()
    alone = global_state()
    with_rule = whole["torch's random state"]
    found = "torch's global generators have moved; use secateur.core.streams"
    expect(not changes(alone, with_rule), trial.rule, "draws no global random numbers", where, found)


def _check_resume(trial: _Trial, folder: Path, where: str, stop: int, whole: dict[str, Any]) -> None:
    again = trial.training(folder, resumed=True)
    masks = _fit(again, trial.rule, where)
    odd = changes(whole, _outcome(again, folder, masks))
    found = f"stopped after step {stop}; different: {', '.join(odd[:4])}"
    expect(not odd, trial.rule, "resumes to the bit", where, found)
