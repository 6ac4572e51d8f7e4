"""Trainings that begin at a state on the way of another: rewinding to step k, twins, and iterative pruning with both.

Every training has a folder. Its checkpoint (``state.pt``) is that of the training loop, so a training that was
stopped goes on bit for bit and a finished one is read; ``weights.safetensors`` and ``masks.safetensors`` lie beside it
once it has ended. One process; averaged copies (``ema``) are refused, since a rewound average has no meaning.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.core import streams
from secateur.core.allocations import Global
from secateur.core.choose import choose
from secateur.core.errors import BudgetError, FileError, UsageError, nearest
from secateur.core.files import write_tensors
from secateur.core.masks import Masks
from secateur.core.names import Named, parameters, unwrap
from secateur.core.patterns import Unstructured
from secateur.core.select import top_mask
from secateur.engine.checkpoint import Feed, load_state, save_state
from secateur.engine.folder import MASKS, WEIGHTS, clean
from secateur.engine.loop import Training
from secateur.engine.recipe import TrainStep

Scope = Literal["layer", "global"]


@dataclass(frozen=True)
class Way:
    """How a network is trained: the same way every time.

    Args:
        loader: training batches, such as :class:`secateur.data.Loader`, whose seed is that of the data order.
        step: the options; rules are allowed, an average is not.
        seed: for dropout and rules.
        loss: ``loss(output, target)``; cross-entropy by default.
        evaluate: figures after every epoch, for ``metrics.jsonl``.

    Raises:
        UsageError: when ``step.ema`` is not 0.
    """

    loader: Feed
    step: TrainStep
    seed: int = 0
    loss: Callable[[Any, Any], Tensor] | None = None
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None

    def __post_init__(self) -> None:
        if self.step.ema:
            raise UsageError(f"a training with `ema = {self.step.ema:g}` cannot be rewound; set `ema = 0`.")

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.step.epochs * math.ceil(len(self.loader) / self.step.accumulate)


@dataclass(frozen=True)
class Round:
    """A finished round of :func:`prune_and_rewind`.

    Args:
        number: 0 is the dense network.
        net: the trained network, in evaluation mode.
        masks: under which it was trained.
        folder: where it lies.
    """

    number: int
    net: nn.Module
    masks: Masks
    folder: Path


def train_to(model: nn.Module, way: Way, folder: Path, at: int | None = None, masks: Masks | None = None) -> Masks:
    """Train in place up to a step and leave the state there, or go on from the state in the folder.

    Args:
        model: the network at its initial weights, also to go on from the folder's state: they name the training.
        way: how.
        folder: of this training.
        at: the step, 0 (before the first) to ``way.steps``; the end by default.
        masks: which weights are kept; all that can be pruned by default.

    Returns:
        The masks at that step.

    Raises:
        UsageError: when the step is out of range.
        FileError: when the folder holds a later state, or one of another training.
    """
    return _train(model, way, folder, at, masks, _weights_digest(model))


def train_from(
    source: Path, model: nn.Module, way: Way, folder: Path, masks: Masks, *, at: int | None = None,
    seed: int | None = None,
) -> nn.Module:  # fmt: skip
    """Train on from the state in another folder, under masks.

    Surviving weights, biases, buffers, the optimizer's state of survivors, the place in the schedule of the rate and in
    the order of the data are those of the state; pruned weights and the optimizer's state of them are zero.

    Args:
        source: folder of the training that was left at some step (:func:`train_to`).
        model: a network of the architecture; it stays as it is.
        way: how; another data order than in ``source`` makes a twin.
        folder: of the new training, which goes on there when it was stopped.
        masks: which weights are kept.
        at: up to this step; the end by default.
        seed: seeds dropout anew; by default it goes on as it would have.

    Returns:
        A copy of the network, trained, in evaluation mode.

    Raises:
        FileError: when ``source`` holds no state, or ``folder`` one that began otherwise.
        MaskError: when the masks belong to another network.
    """
    before = load_state(source)
    if before is None:
        raise FileError(f"{source} holds no state of a training; leave one there with `train_to(..., at=step)`.")
    net = copy.deepcopy(model)
    unwrap(net).load_state_dict(before["model"])
    begun = f"step {before['step']} at {_weights_digest(net)}"
    masks.apply_(net)
    if reached(folder) is None:
        del before["asked"]  # the new training may ask for other masks and another order of the data
        save_state(folder, before | _beginning(before, net, masks, seed))
    _train(net, way, folder, at, masks, begun if seed is None else f"{begun}, seed {seed}")
    return net


def reached(folder: Path) -> int | None:
    """The step that a folder's training has come to; None when it holds none."""
    state = load_state(folder)
    return None if state is None else int(state["step"])


def fewer(
    net: nn.Module, masks: Masks, share: float, scope: Scope = "layer", shares: Mapping[str, float] | None = None
) -> Masks:
    """Masks without the smallest of the weights that are left.

    Args:
        net: the trained network.
        masks: what is left.
        share: of what is left, 0 or more and below 1; ``n - round(share n)`` stay.
        scope: of each tensor, or of all together (``"global"``).
        shares: other shares for some tensors, by name or glob; with ``"layer"``.

    Returns:
        Masks within the given ones. Of equal magnitudes those of the lower index stay.

    Raises:
        UsageError: for a share out of range, or a glob that matches nothing.
        BudgetError: when a tensor would lose all of its weights.
    """
    shares = _shares(masks, share, scope, shares or {})
    scores = {n: p.detach().abs().masked_fill(~masks[n].to(p.device), -1.0) for n, p in masks.match(net).items()}
    if scope == "global":
        keep = masks.kept - round(share * masks.kept)
        return masks if keep == masks.kept else choose(scores, keep, Unstructured(), Global()).to(_where(masks))
    chosen = {}
    for name, count in masks.counts().items():
        keep = count - round(shares[name] * count)
        if count and not keep:
            raise BudgetError(f"`{name}` has {count} weights left and would lose all; prune a smaller share of it.")
        chosen[name] = top_mask(scores[name], keep).to(masks[name].device)
    return Masks(chosen)


def shuffled(masks: Masks, seed: int) -> Masks:
    """Random masks that keep as many weights of each tensor: the control for where they lie."""
    return Masks({
        name: top_mask(torch.rand(mask.shape, generator=streams.stream(seed, "shuffled", name)), int(mask.sum())).to(
            mask.device
        )
        for name, mask in masks.items()
    })  # fmt: skip


def prune_and_rewind(
    model: nn.Module,
    way: Way,
    folder: Path,
    *,
    rounds: int,
    share: float = 0.2,
    rewind: int = 0,
    scope: Scope = "layer",
    shares: Mapping[str, float] | None = None,
    masks: Masks | None = None,
) -> Iterator[Round]:
    """Iterative magnitude pruning: train, prune a share of what is left, set the rest back to step ``rewind``, again.

    Args:
        model: the network at its initial weights; it stays as it is.
        way: how each round is trained.
        folder: holds ``start-K``, the state at step K, and ``round-0`` (dense), ``round-1``, ... Rounds that
            are finished there are read, not trained again.
        rounds: prunings.
        share: of what is left that each round prunes, by magnitude at the end of training.
        rewind: the step that survivors are set back to; 0 is the initial network, the lottery ticket.
        scope: see :func:`fewer`.
        shares: see :func:`fewer`.
        masks: what may be pruned; all by default.

    Yields:
        Every round once it is trained, the dense one first.

    Raises:
        SecateurError: as the functions of the parts.

    Cost: ``rounds + 1`` trainings, each from step ``rewind`` on.
    """
    masks = masks or Masks.dense(model, way.step.only, way.step.skip)
    _shares(masks, share, scope, shares or {})  # what is wrong is told before anything is trained
    start = folder / f"start-{rewind}"
    train_to(copy.deepcopy(model), way, start, rewind, masks)
    for number in range(rounds + 1):
        place = folder / f"round-{number}"
        net = train_from(start, model, way, place, masks)
        yield Round(number, net, masks, place)
        if number < rounds:
            masks = fewer(net, masks, share, scope, shares)


@dataclass
class _Part(Training):
    """A training that stops at a step, after its checkpoint; ``begun`` says what it began with."""

    until: int = 0
    begun: str = ""

    def go(self) -> Masks:
        """Train to the step; the masks there."""
        there = reached(self.folder) if self.folder is not None else None
        if there == self.until or (there is None and not self.until):
            self._prepare()
            if there is None:
                self._checkpoint()
            return self.run.masks
        try:
            return self.fit()
        except KeyboardInterrupt:
            if self.run.step != self.until or self._pressed():
                raise
        self.run.masks.check(self.model)
        return self.run.masks

    def _stop(self) -> bool:
        return self.until <= self.run.step < self.run.total or super()._stop()

    def _asked(self) -> dict[str, str]:
        return super()._asked() | {"begun": json.dumps(self.begun)}


def _train(model: nn.Module, way: Way, folder: Path, at: int | None, masks: Masks | None, begun: str) -> Masks:
    at = way.steps if at is None else at
    if not 0 <= at <= way.steps:
        raise UsageError(f"step {at} is not in this training, which has steps 0 to {way.steps}.")
    there = reached(folder)
    if there is not None and there > at:
        raise FileError(f"the training in {folder} is at step {there}, past step {at}. Name another folder.")
    training = _Part(
        model, way.loader, way.step, masks or Masks.dense(model, way.step.only, way.step.skip), way.seed, folder,
        way.evaluate, loss=way.loss, until=at, begun=begun,
    )  # fmt: skip
    found = training.go() if at < way.steps else training.fit()
    model.eval()
    _keep(model, found, folder)
    return found


def _beginning(before: Mapping[str, Any], net: nn.Module, masks: Masks, seed: int | None) -> dict[str, Any]:
    """What differs between a state and the beginning of a training under masks that goes on from it."""
    where = {name: mask.cpu() for name, mask in masks.items()}
    return {
        "model": unwrap(net).state_dict(), "masks": where, "optimizer": _forgetting(before["optimizer"], net, where),
        "metrics": 0, "seconds": 0.0, "best": -math.inf, "best_kept": masks.total, "best_masks": {},
        "random": before["random"] if seed is None else [_seeded(seed)],
    }  # fmt: skip


def _keep(model: nn.Module, masks: Masks, folder: Path) -> None:
    """Weights and masks as files that load anywhere."""
    state = {name: clean(t) for name, t in unwrap(model).state_dict().items() if isinstance(t, Tensor)}
    masks.save(folder / MASKS, weights=write_tensors(folder / WEIGHTS, state, {"format": "pt"}))


def _forgetting(optimizer: dict[str, Any], net: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """An optimizer's state that remembers nothing of pruned weights."""
    names = [name for name, p in parameters(net).items() if p.requires_grad]
    places = [place for group in optimizer["param_groups"] for place in group["params"]]
    for place, name in zip(places, names, strict=True):
        entries: Named = optimizer["state"].get(place, {})
        for key, value in entries.items():
            if name in masks and isinstance(value, Tensor) and value.shape == masks[name].shape:
                entries[key] = value.masked_fill(~masks[name], 0)
    return optimizer


def _weights_digest(model: nn.Module) -> str:
    """A short digest of parameters and buffers."""
    sha = hashlib.sha256()
    for name, tensor in unwrap(model).state_dict().items():
        if isinstance(tensor, Tensor):
            sha.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:12]


def _seeded(seed: int) -> dict[str, Tensor]:
    """The global random state that a fresh training with this seed begins with; the state itself is put back."""
    with streams.seeded(seed, "train"):
        return streams.global_state()


def _shares(masks: Masks, share: float, scope: Scope, shares: Mapping[str, float]) -> dict[str, float]:
    """The share of every tensor."""
    for value in (share, *shares.values()):
        if not 0 <= value < 1:
            raise UsageError(f"share={value!r} must be at least 0 and below 1; write `share = 0.2`.")
    if shares and scope == "global":
        raise UsageError("shares are of single tensors; write `scope = 'layer'`, or leave them out.")
    found = dict.fromkeys(masks, share)
    for glob, value in shares.items():
        names = [name for name in masks if fnmatchcase(name, glob)]
        if not names:
            raise UsageError(f"no tensor matches {glob!r}. {nearest(glob, masks)}")
        found |= dict.fromkeys(names, value)
    return found


def _where(masks: Masks) -> torch.device:
    return next(iter(masks.values())).device
