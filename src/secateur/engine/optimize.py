"""Optimizers and learning rates for the training loop."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from secateur.core.compact import CompactState
from secateur.core.errors import ModelError
from secateur.engine.recipe import TrainStep


def make_optimizer(parameters: Iterable[nn.Parameter], step: TrainStep) -> torch.optim.Optimizer:
    """The optimizer a training step asks for, over the parameters that can be trained.

    Raises:
        ModelError: when no parameter can be trained.
    """
    chosen = [p for p in parameters if p.requires_grad]
    if not chosen:
        raise ModelError("no parameter of the network can be trained; set `requires_grad` of those you want to train.")
    made = _made(chosen, step)
    return CompactState(made) if step.compact_state else made


def _made(chosen: list[nn.Parameter], step: TrainStep) -> torch.optim.Optimizer:
    if step.optimizer == "sgd":
        return torch.optim.SGD(chosen, step.lr, step.momentum, weight_decay=step.weight_decay, nesterov=step.nesterov)
    if step.optimizer == "rmsprop":
        return torch.optim.RMSprop(chosen, step.lr, weight_decay=step.weight_decay, momentum=step.momentum)
    kind = torch.optim.AdamW if step.optimizer == "adamw" else torch.optim.Adam
    return kind(chosen, step.lr, weight_decay=step.weight_decay)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that an optimizer remembers: its moments, and with compact state the places of kept weights."""
    if isinstance(optimizer, CompactState):
        return optimizer.nbytes
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def rate(step: TrainStep, done: int, total: int, steps_per_epoch: int) -> float:
    """The learning rate of the optimizer step after ``done`` steps: a pure function, so resuming needs no state.

    Args:
        step: the training step with ``lr``, ``schedule`` and ``warmup``.
        done: optimizer steps done.
        total: optimizer steps in all.
        steps_per_epoch: optimizer steps in an epoch.
    """
    warm = round(step.warmup * steps_per_epoch)
    if done < warm:
        return step.lr * (done + 1) / warm
    progress = (done - warm) / max(1, total - warm)
    if step.schedule == "constant":
        return step.lr
    if step.schedule == "step":
        return step.lr * (1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01)
    if step.schedule == "one-cycle":
        if progress < 0.3:
            return step.lr * (0.04 + 0.96 * progress / 0.3)
        progress = (progress - 0.3) / 0.7
    return step.lr * (1 + math.cos(math.pi * progress)) / 2
